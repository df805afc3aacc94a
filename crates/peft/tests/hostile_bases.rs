//! Damaged folders of models in few bits: every mutation is an error that names its place, or a model whose layers can be used;
//! never a panic, and never a read beyond the end.
//!
//! 256 cases a test by default; `PROPTEST_CASES=100000` for a long run.

use std::{fs, path::Path};

use peft::{
    Ctx, Input, OpenOptions,
    core::{Slot, State, files, tensors},
    models::{Source, open_source_in},
    open,
    quant::{Eight, Format, Scheme},
    tch::{Kind, Tensor},
};
use peft_testing::fixtures::root;
use proptest::prelude::*;
use serde_json::{Value, json};

const MODELS: [&str; 4] = [
    "llama-nf4-double",
    "llama-fp4",
    "gpt2-nf4-double",
    "llama-int8",
];

/// What becomes of one tensor of a file.
#[derive(Debug, Clone)]
enum Change {
    Missing,
    /// Without its last numbers.
    Short(i64),
    /// With numbers more.
    Long(i64),
    Flat,
    Turned,
    OfKind(Kind),
    /// Other bytes: of codes, scales, maps, and of the text of a state.
    Filled(i64),
    NotANumber,
    /// Its name is another's, which it replaces.
    InPlaceOf(usize),
    Renamed(&'static str, &'static str),
    /// It is there a second time, under another name of the same layer.
    Also(&'static str),
    /// A part of the text of a state.
    Text(&'static str, &'static str),
}

fn kind() -> impl Strategy<Value = Kind> {
    prop::sample::select(vec![
        Kind::Float,
        Kind::BFloat16,
        Kind::Half,
        Kind::Double,
        Kind::Int64,
        Kind::Int8,
        Kind::Uint8,
        Kind::Bool,
    ])
}

fn text() -> impl Strategy<Value = Change> {
    prop::sample::select(vec![
        ("nf4", "fp4"),
        ("fp4", "nf4"),
        ("nf4", "nf8"),
        ("64", "32"),
        ("64", "4096"),
        ("64", "0"),
        ("64", "-64"),
        ("64", "18446744073709551616"),
        ("256", "128"),
        ("float32", "int4"),
        ("float32", "bfloat16"),
        ("[", "[1, "),
        ("[", "[0, "),
        ("[", "[4294967296, 4294967296, "),
        ("\"shape\"", "\"form\""),
        ("\"nested_offset\"", "\"nested_onset\""),
        ("}", ", \"nested_blocksize\": 256}"),
        ("{", "["),
        ("\"dtype\": ", "\"dtype\": null, \"x\": "),
    ])
    .prop_map(|(from, to)| Change::Text(from, to))
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        1 => Just(Change::Missing),
        1 => (1i64..200).prop_map(Change::Short),
        1 => (1i64..200).prop_map(Change::Long),
        1 => Just(Change::Flat),
        1 => Just(Change::Turned),
        1 => kind().prop_map(Change::OfKind),
        1 => (0i64..256).prop_map(Change::Filled),
        1 => Just(Change::NotANumber),
        1 => any::<usize>().prop_map(Change::InPlaceOf),
        1 => prop::sample::select(vec![
            ("nf4", "fp4"),
            ("fp4", "nf4"),
            ("quant_state", "quant_status"),
            ("SCB", "absmax"),
            ("weight_format", "weight_form"),
            ("nested_absmax", "absmax"),
        ])
        .prop_map(|(from, to)| Change::Renamed(from, to)),
        1 => prop::sample::select(vec!["weight", "SCB", "weight.absmax", "weight.quant_state.bitsandbytes__fp4"])
            .prop_map(Change::Also),
        4 => text(),
    ]
}

fn apply(state: &mut State, key: &str, change: &Change) {
    let old = state[key].shallow_clone();
    let flat = old.reshape([-1]);
    let n = flat.numel() as i64;
    let new = match change {
        Change::Missing => {
            state.remove(key);
            return;
        }
        Change::Short(by) => flat.narrow(0, 0, (n - by).max(0)),
        Change::Long(by) => Tensor::cat(
            &[&flat, &flat.new_zeros([*by], (flat.kind(), flat.device()))],
            0,
        ),
        Change::Flat => flat,
        Change::Turned if old.dim() == 2 => old.tr().contiguous(),
        Change::Turned => old.unsqueeze(0),
        Change::OfKind(kind) => old.to_kind(*kind),
        Change::Filled(byte) if old.kind() == Kind::Int8 => old.full_like(byte - 128),
        Change::Filled(byte) => old.full_like(*byte),
        Change::NotANumber if old.is_floating_point() => old.full_like(f64::NAN),
        Change::NotANumber => old.zeros_like(),
        Change::InPlaceOf(other) => {
            let key = state.keys().nth(other % state.len()).unwrap().clone();
            state.insert(key, old);
            return;
        }
        Change::Renamed(from, to) => {
            state.remove(key);
            state.insert(key.replace(from, to), old);
            return;
        }
        Change::Also(name) => {
            let layer = key.split(".weight").next().unwrap();
            state.insert(format!("{layer}.{name}"), old);
            return;
        }
        Change::Text(from, to) => {
            let text = Vec::<u8>::try_from(flat.to_kind(Kind::Uint8)).unwrap();
            let text = String::from_utf8_lossy(&text).replace(from, to);
            Tensor::from_slice(text.as_bytes())
        }
    };
    state.insert(key.to_owned(), new.contiguous());
}

/// Opens a folder and uses every layer of what comes out.
fn used(dir: &Path) -> Result<(), String> {
    let mut model = match open(&dir.to_string_lossy(), OpenOptions::default()) {
        Ok(model) => model,
        Err(error) => return Err(error.to_string()),
    };
    let ids = Tensor::from_slice(&[1i64, 2, 3]).view([1, 3]);
    for rows in [1, 5] {
        let ids = ids.repeat([rows, 1]);
        let _ = tch::no_grad(|| model.forward(&Input::new(ids), Ctx::EVAL));
    }
    model.slots(&mut |_, slot| {
        if let Slot::Linear(it) = slot {
            let _ = it.base().weight();
        }
    });
    Ok(())
}

fn with(model: &str, edit: impl FnOnce(&mut Value, &mut State)) -> tempfile::TempDir {
    let from = root().join("quant/models").join(model);
    let mut config = files::read_json(&from.join("config.json")).unwrap();
    let mut state = tensors::read(&from.join("model.safetensors")).unwrap();
    edit(&mut config, &mut state);
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    tensors::write(&dir.path().join("model.safetensors"), &state).unwrap();
    dir
}

proptest! {
    #[test]
    fn tensors_that_were_changed(
        model in prop::sample::select(MODELS.to_vec()),
        changes in prop::collection::vec((any::<usize>(), change()), 1..4),
    ) {
        tch::set_num_threads(1);
        let dir = with(model, |_, state| {
            for (which, change) in &changes {
                // A change of text is one of a state's, where there is one.
                let text = matches!(change, Change::Text(..));
                let keys: Vec<String> = state.keys().filter(|it| !text || it.contains("quant_state")).cloned().collect();
                if !keys.is_empty() {
                    apply(state, &keys[which % keys.len()], change);
                }
            }
        });
        let _ = used(dir.path());
    }

    #[test]
    fn any_value_of_any_key(
        model in prop::sample::select(MODELS.to_vec()),
        key in any::<usize>(),
        value in prop::sample::select(vec![
            json!(null), json!(true), json!(false), json!(-1), json!(0), json!(1e300), json!("x"), json!([]), json!({}),
            json!([1, "a"]), json!("gptq"), json!("nf4"), json!("bfloat16"), json!(["lm_head", "q_proj"]), json!(u64::MAX),
        ]),
        whole in prop::bool::weighted(0.1),
    ) {
        tch::set_num_threads(1);
        let dir = with(model, |config, _| {
            let it = &mut config["quantization_config"];
            if whole {
                *it = value;
                return;
            }
            let keys: Vec<String> = it.as_object().unwrap().keys().cloned().collect();
            it[&keys[key % keys.len()]] = value;
        });
        let _ = used(dir.path());
    }
}

/// The errors that people meet say where, what and what was expected.
#[test]
fn what_is_wrong_is_named() {
    tch::set_num_threads(1);
    let at = "model.layers.0.mlp.down_proj";
    let missing = Change::Missing;
    for (model, key, change, words) in [
        (NF4, "weight", missing.clone(), vec!["weight"]),
        (
            NF4,
            "weight",
            Change::Short(3),
            vec!["weight", "bytes", "expected"],
        ),
        (NF4, STATE, missing.clone(), vec!["weight.absmax", STATE]),
        (NF4, STATE, Change::Text("nf4", "fp4"), vec!["nf4", "fp4"]),
        (
            NF4,
            STATE,
            Change::Text("[", "[3, "),
            vec!["weight", "[3, "],
        ),
        (NF4, STATE, Change::Text("64", "63"), vec![STATE, "63"]),
        (
            NF4,
            STATE,
            Change::Also("weight.quant_state.bitsandbytes__fp4"),
            vec!["both", STATE],
        ),
        (NF4, STATE, Change::Also("SCB"), vec!["both", STATE, "SCB"]),
        (NF4, "weight.absmax", missing.clone(), vec!["weight.absmax"]),
        (
            NF4,
            "weight.absmax",
            Change::Short(1),
            vec!["weight.absmax", "expected"],
        ),
        (
            NF4,
            "weight.absmax",
            Change::OfKind(Kind::Float),
            vec!["weight.absmax", "bytes"],
        ),
        (
            NF4,
            "weight.nested_absmax",
            Change::Long(1),
            vec!["nested_absmax", "expected"],
        ),
        (
            NF4,
            "weight.nested_quant_map",
            Change::Short(1),
            vec!["nested_quant_map", "256"],
        ),
        (
            NF4,
            "weight.quant_map",
            Change::Filled(1),
            vec!["weight.quant_map", "nf4"],
        ),
        (INT8, "SCB", missing.clone(), vec!["weight_format", "SCB"]),
        (INT8, "SCB", Change::Short(1), vec!["SCB", "expected"]),
        (
            INT8,
            "weight",
            Change::OfKind(Kind::Float),
            vec!["weight", "int8"],
        ),
        (INT8, "weight", Change::Turned, vec!["weight", "expected"]),
        (
            INT8,
            "weight_format",
            Change::Filled(2),
            vec!["weight_format", "expected 0"],
        ),
    ] {
        let dir = with(model, |_, state| {
            apply(state, &format!("{at}.{key}"), &change)
        });
        let error = used(dir.path()).unwrap_err();
        for word in [at].into_iter().chain(words) {
            assert!(error.contains(word), "{key} {change:?}: {error}");
        }
    }
}

/// Codes would say nothing of it: the block's scale is no number, or all of the block is.
#[test]
fn a_weight_without_a_number_is_not_quantised() {
    let at = "model.layers.1.mlp.up_proj.weight";
    for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let from = root().join("models/llama");
        let state = tensors::read(&from.join("model.safetensors")).unwrap();
        let _ = state[at].get(1).get(2).fill_(bad);
        let dir = tempfile::tempdir().unwrap();
        fs::copy(from.join("config.json"), dir.path().join("config.json")).unwrap();
        tensors::write(&dir.path().join("model.safetensors"), &state).unwrap();
        for scheme in [Scheme::NF4, Scheme::Eight(Eight)] {
            let source = Source::Folder(dir.path().to_owned());
            let format = Format::of(scheme);
            let made = open_source_in(&source, OpenOptions::default(), &format);
            let error = made.err().expect("refused").to_string();
            assert!(
                error.contains("layers.1.mlp.up_proj`") && error.contains("no number"),
                "{error}"
            );
        }
    }
}

const NF4: &str = "llama-nf4-double";
const INT8: &str = "llama-int8";
const STATE: &str = "weight.quant_state.bitsandbytes__nf4";
