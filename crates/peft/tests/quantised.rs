//! Bases in 4 and 8 bits against Python's: each folder of `fixtures/quant/models` is loaded as a user would load it, must
//! give Python's logits and loss, be written as it was, and come out of our own encoder to the byte.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use peft::{
    Ctx, Decoder, Input, OpenOptions, Sampling, causal_loss,
    core::{Slot, State, files, tensors},
    generate,
    models::{Source, Task, convert},
    open,
    quant::{Block, Compat, Decoded, Format, Four, Scheme, Type},
    save,
    tch::{Kind, Tensor},
    torch::memory::with_bytes,
};
use peft_testing::{agree, fixtures::root, same_bits};
use serde_json::Value;

/// A folder that Python wrote.
struct Case {
    name: String,
    dir: PathBuf,
    meta: Value,
    io: State,
}

impl Case {
    fn model(&self) -> Box<dyn Decoder> {
        let options = OpenOptions {
            kind: Some(Kind::Float),
            ..OpenOptions::default()
        };
        open(&self.dir.to_string_lossy(), options).unwrap()
    }

    fn input(&self, batch: &str) -> Option<Input> {
        let get = |name: &str| {
            let it = self.io.get(&format!("{batch}.{name}"));
            it.map(Tensor::shallow_clone)
        };
        Some(Input {
            attention_mask: get("attention_mask"),
            position_ids: get("position_ids"),
            ..Input::new(get("input_ids")?)
        })
    }
}

fn cases() -> Vec<Case> {
    tch::set_num_threads(1);
    let root = root().join("quant/models");
    let mut dirs: Vec<PathBuf> = std::fs::read_dir(root)
        .unwrap()
        .map(|it| it.unwrap().path())
        .collect();
    dirs.sort();
    assert!(dirs.len() > 10);
    let case = |dir: PathBuf| Case {
        name: dir.file_name().unwrap().to_string_lossy().into_owned(),
        meta: files::read_json(&dir.join("meta.json")).unwrap(),
        io: tensors::read(&dir.join("base.safetensors")).unwrap(),
        dir,
    };
    dirs.into_iter().map(case).collect()
}

/// At positions that are attended to.
fn attended(t: &Tensor, mask: Option<&Tensor>) -> Tensor {
    let rows = t.reshape([-1, *t.size().last().unwrap()]);
    match mask {
        Some(mask) => rows.index_select(0, &mask.reshape([-1]).nonzero().view([-1])),
        None => rows,
    }
}

#[test]
fn logits_and_loss_are_pythons() {
    let mut seen = 0;
    for case in cases() {
        let model = case.model();
        for batch in ["plain", "right", "left", "positions"] {
            let Some(input) = case.input(batch) else {
                continue;
            };
            seen += 1;
            let got = tch::no_grad(|| model.forward(&input, Ctx::EVAL));
            let mask = input.attention_mask.as_ref();
            let expected = attended(&case.io[&format!("{batch}.logits")], mask);
            let what = format!("{} {batch}", case.name);
            agree(&attended(&got, mask), &expected, 1e-5, &what).unwrap();
            let labels = &case.io[&format!("{batch}.labels")];
            let (sum, count) = tch::no_grad(|| causal_loss(&*model, &input, labels, Ctx::EVAL));
            let expected = case.io[&format!("{batch}.loss")].double_value(&[]);
            let loss = sum.double_value(&[]) / count as f64;
            assert!((loss - expected).abs() < 1e-5 * expected, "{}", case.name);
        }
    }
    assert!(seen > 30, "{seen}");
}

/// One row at a time goes through another product than a batch.
#[test]
fn greedy_text_is_pythons() {
    for case in cases() {
        let Some(expected) = case.io.get("greedy.tokens") else {
            continue;
        };
        let model = case.model();
        let (ids, mask) = (
            &case.io["greedy.input_ids"],
            &case.io["greedy.attention_mask"],
        );
        let [rows, masks] = [ids, mask].map(|t| Vec::<Vec<i64>>::try_from(t).unwrap());
        let prompts: Vec<Vec<u32>> = rows
            .iter()
            .zip(&masks)
            .map(|(row, mask)| {
                let real = row.iter().zip(mask).filter(|(_, m)| **m == 1);
                real.map(|(id, _)| *id as u32).collect()
            })
            .collect();
        let expected = Vec::<Vec<i64>>::try_from(expected).unwrap();
        let sampling = Sampling {
            max_new_tokens: expected[0].len(),
            ..Sampling::default()
        };
        let go = &mut |_, _| std::ops::ControlFlow::Continue(());
        let replies = generate(&*model, &prompts, &sampling, go).unwrap();
        for (reply, expected) in replies.iter().zip(&expected) {
            let tokens: Vec<i64> = reply.tokens.iter().map(|&id| id.into()).collect();
            assert_eq!(&tokens, expected, "{}", case.name);
        }
    }
}

#[test]
fn decoded_weights_are_pythons() {
    let mut seen = 0;
    for case in cases() {
        let mut model = case.model();
        model.slots(&mut |at, slot| {
            let Slot::Linear(it) = slot else { return };
            let Some(expected) = case.io.get(&format!("weight.{at}")) else {
                return;
            };
            let weight = it.base().weight();
            assert!(same_bits(&weight, expected), "{} {at}", case.name);
            seen += 1;
        });
    }
    assert!(seen > 10, "{seen}");
}

/// The bytes of every tensor of a folder.
fn bytes(dir: &Path) -> BTreeMap<String, (Vec<i64>, Kind, Vec<u8>)> {
    let files = std::fs::read_dir(dir).unwrap().map(|it| it.unwrap().path());
    let name = |it: &PathBuf| it.file_name().unwrap().to_string_lossy().into_owned();
    let models = files.filter(|it| {
        name(it).starts_with("model") && it.extension().is_some_and(|it| it == "safetensors")
    });
    let all = models.flat_map(|it| tensors::read(&it).unwrap());
    all.map(|(key, t)| {
        let bytes = with_bytes(&t, <[u8]>::to_vec);
        (key, (t.size(), t.kind(), bytes))
    })
    .collect()
}

fn same_files(what: &str, got: &Path, expected: &Path) {
    let (got_tensors, expected_tensors) = (bytes(got), bytes(expected));
    assert!(got_tensors.keys().eq(expected_tensors.keys()), "{what}");
    for (key, expected) in &expected_tensors {
        let found = &got_tensors[key];
        assert_eq!(
            (&found.0, found.1),
            (&expected.0, expected.1),
            "{what} {key}"
        );
        assert!(found.2 == expected.2, "{what} {key}: other bytes");
    }
    let config = |dir: &Path| files::read_json(&dir.join("config.json")).unwrap();
    assert_eq!(
        config(got)["quantization_config"],
        config(expected)["quantization_config"],
        "{what}"
    );
}

#[test]
fn what_is_read_is_written_again() {
    for case in cases() {
        let options = OpenOptions::default();
        let mut model = open(&case.dir.to_string_lossy(), options).unwrap();
        let out = tempfile::tempdir().unwrap();
        let out = out.path().join("again");
        save(&mut *model, &out, &[]).unwrap();
        same_files(&case.name, &out, &case.dir);
    }
}

/// Dense, the model computes what it did with products in the dtype of its input.
#[test]
fn a_folder_is_made_dense_again() {
    for case in cases() {
        let out = tempfile::tempdir().unwrap();
        let out = out.path().join("dense");
        let source = Source::Folder(case.dir.clone());
        let options = OpenOptions::default();
        let decoded = Decoded::new();
        let done = convert(
            &source,
            Task::CausalLm,
            options,
            &decoded,
            &out,
            &[],
            Some(100_000),
        );
        assert_eq!(done.unwrap().layers, 0, "{}", case.name);
        let config = files::read_json(&out.join("config.json")).unwrap();
        assert!(config.get("quantization_config").is_none());
        let [dense, kept] =
            [&out, &case.dir].map(|dir| open(&dir.to_string_lossy(), options).unwrap());
        let ids = &case.io["plain.input_ids"];
        let [got, expected] = [&dense, &kept]
            .map(|it| tch::no_grad(|| it.forward(&Input::new(ids.shallow_clone()), Ctx::EVAL)));
        agree(&got, &expected, 1e-6, &case.name).unwrap();
        let weights = |mut model: Box<dyn Decoder>| {
            let mut all = Vec::new();
            model.slots(&mut |at, slot| {
                if let Slot::Linear(it) = slot {
                    all.push((at.to_owned(), it.base().weight(), it.base().is_dense()));
                }
            });
            all
        };
        for ((at, dense, is_dense), (_, kept, _)) in weights(dense).iter().zip(&weights(kept)) {
            assert!(*is_dense && same_bits(dense, kept), "{} {at}", case.name);
        }
    }
}

/// What Python has to be told: it leaves alone what is named, or, where nothing is, the output embedding and a head without a bias.
#[test]
fn layers_that_stay_dense_are_named_where_python_would_not_find_them() {
    let value = ["value"].as_slice();
    for (name, task, skip, expected) in [
        ("bert-classes", Task::SeqCls, None, &["classifier"][..]),
        ("bert-tokens", Task::TokenCls, None, &["classifier"]),
        ("bert-answers", Task::QuestionAns, None, &["qa_outputs"]),
        ("gpt2-tokens", Task::TokenCls, None, &["classifier"]),
        ("gpt2-answers", Task::QuestionAns, None, &["qa_outputs"]),
        ("llama-tokens", Task::TokenCls, None, &["score"]),
        ("llama-classes", Task::SeqCls, None, &[]),
        ("gpt2-classes", Task::SeqCls, None, &[]),
        ("bert", Task::FeatureExtraction, None, &[]),
        ("bert-masked", Task::MaskedLm, None, &[]),
        ("bert-masked-untied", Task::MaskedLm, None, &[]),
        (
            "bert-masked-untied",
            Task::MaskedLm,
            Some(value),
            &[
                "bert.encoder.layer.0.attention.self.value",
                "cls.predictions.decoder",
            ],
        ),
        (
            "roberta-masked",
            Task::MaskedLm,
            None,
            &["lm_head.decoder", "lm_head.dense"],
        ),
    ] {
        let mut format = Format::of(Scheme::NF4);
        if let Some(names) = skip {
            format.skip = names.iter().map(|&it| it.to_owned()).collect();
        }
        let out = tempfile::tempdir().unwrap();
        let out = out.path().join("four");
        let source = Source::Folder(root().join("tasks").join(name));
        convert(
            &source,
            task,
            OpenOptions::default(),
            &format,
            &out,
            &[],
            None,
        )
        .unwrap();
        let config = files::read_json(&out.join("config.json")).unwrap();
        let named = &config["quantization_config"]["llm_int8_skip_modules"];
        let found: Vec<&str> = named
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect();
        assert_eq!(found, expected, "{name}");
    }
}

/// Python's CPU wrote the folders, so its behaviour encodes here.
#[test]
fn our_encoder_writes_pythons_folders() {
    let mut seen = 0;
    for case in cases() {
        let asked = &case.meta["asked"];
        let flag = |key: &str| asked[key].as_bool().unwrap_or(false);
        let storage = asked["bnb_4bit_quant_storage"].as_str();
        if storage.is_some_and(|it| it != "uint8")
            || case.dir.join("model.safetensors.index.json").exists()
        {
            continue; // we write bytes as bytes, and files of another size
        }
        let scheme = match flag("load_in_8bit") {
            true => Scheme::INT8,
            false => Scheme::Four(Four {
                kind: match asked["bnb_4bit_quant_type"].as_str() {
                    Some("nf4") => Type::Nf4,
                    _ => Type::Fp4,
                },
                block: Block::USUAL,
                double_quant: flag("bnb_4bit_use_double_quant"),
                compat: Compat::Cpu,
            }),
        };
        let mut format = Format::of(scheme);
        if let Some(skip) = asked["llm_int8_skip_modules"].as_array() {
            let names = skip.iter().map(|it| it.as_str().unwrap().to_owned());
            format.skip = names.collect();
        }
        let dense = root()
            .join("quant/dense")
            .join(case.meta["base"].as_str().unwrap());
        let kind = match case.meta["dtype"].as_str() {
            Some("bfloat16") => Kind::BFloat16,
            Some("float16") => Kind::Half,
            _ => Kind::Float,
        };
        let options = OpenOptions {
            kind: Some(kind),
            ..OpenOptions::default()
        };
        let out = tempfile::tempdir().unwrap();
        let out = out.path().join("ours");
        let source = Source::Folder(dense);
        convert(&source, Task::CausalLm, options, &format, &out, &[], None).unwrap();
        let expected = bytes(&case.dir);
        let got = bytes(&out);
        for (key, expected) in &expected {
            let found = got
                .get(key)
                .unwrap_or_else(|| panic!("{} lacks {key}", case.name));
            assert!(found == expected, "{} {key}: other bytes", case.name);
        }
        assert_eq!(got.len(), expected.len(), "{}", case.name);
        // Python must leave dense what is: it goes by names, and all are named where not just the head is left.
        let config = files::read_json(&out.join("config.json")).unwrap();
        let named = &config["quantization_config"]["llm_int8_skip_modules"];
        let names = |it: &Value| -> BTreeSet<String> {
            let all = it.as_array().into_iter().flatten();
            all.filter_map(|it| Some(it.as_str()?.to_owned())).collect()
        };
        match asked["llm_int8_skip_modules"].is_array() {
            true => assert_eq!(names(named), names(&case.meta["left"]), "{}", case.name),
            false => assert!(named.is_null(), "{}", case.name),
        }
        seen += 1;
    }
    assert!(seen > 5, "{seen}");
}
