//! Whole models: names, shapes, values and configuration as Hugging Face has them.

use crate::support::{Kv, MODELS, Writer, fixture, values};
use peft_gguf::{Dtype, Gguf, HfView, import};
use safetensors::SafeTensors;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

fn view(name: &str) -> HfView {
    HfView::new(Gguf::open(&fixture(&format!("{name}.gguf"))).unwrap()).unwrap()
}

#[test]
fn every_tensor_of_every_architecture_has_its_original_values() {
    for (model, tensors) in [
        ("llama", 28),
        ("mistral", 21),
        ("qwen2", 26),
        ("qwen3", 24),
        ("gpt2", 28),
    ] {
        let view = view(model);
        assert_eq!(view.names().len(), tensors, "{model}");
        for name in view.names() {
            let count = view.shape(&name).unwrap().iter().product();
            let got = view.tensor(&name).unwrap();
            assert_eq!(got, values(&name, count), "{model} {name}");
        }
    }
}

#[test]
fn tensor_into_fills_exactly_its_buffer() {
    let view = view("llama");
    let name = "model.layers.1.self_attn.k_proj.weight";
    let mut out = vec![f32::NAN; 16 * 32];
    view.tensor_into(name, &mut out).unwrap();
    assert_eq!(out, values(name, 16 * 32));
    for (name, size) in [(name, 511), ("model.norm.weight", 33)] {
        let error = view.tensor_into(name, &mut vec![0.0; size]).unwrap_err();
        assert!(
            error.to_string().contains(&format!("the buffer {size}")),
            "{error}"
        );
    }
}

#[test]
fn configurations() {
    let check = |model: &str, expected: Value| {
        let view = view(model);
        for (key, value) in expected.as_object().unwrap() {
            assert_eq!(&view.config()[key], value, "{model} {key}");
        }
    };
    check(
        "llama",
        json!({
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 333,
            "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
            "max_position_embeddings": 96, "rms_norm_eps": 1e-5, "rope_theta": 50000.0,
            "rope_scaling": null, "tie_word_embeddings": true, "hidden_act": "silu",
            "attention_bias": true, "mlp_bias": false,
            "bos_token_id": 330, "eos_token_id": 331, "pad_token_id": null,
        }),
    );
    check(
        "mistral",
        json!({
            "model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 48,
            "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "tie_word_embeddings": false,
        }),
    );
    check(
        "qwen2",
        json!({
            "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "pad_token_id": 330,
            "use_sliding_window": false, "sliding_window": null,
        }),
    );
    check(
        "qwen3",
        json!({
            "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 12,
            "attention_bias": false, "bos_token_id": null,
            "rope_scaling": {
                "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24,
            },
        }),
    );
    check(
        "gpt2",
        json!({
            "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_positions": 24,
            "n_embd": 16, "n_layer": 2, "n_head": 4, "n_inner": 40, "layer_norm_epsilon": 1e-5,
            "activation_function": "gelu_new", "tie_word_embeddings": true, "vocab_size": 331,
        }),
    );
    // both the end of the text and the end of a turn stop generation
    assert_eq!(
        view("llama").generation_config()["eos_token_id"],
        json!([331, 332])
    );
    assert_eq!(view("gpt2").generation_config()["eos_token_id"], 330);
}

/// A one-layer llama with heads of 64 and this tensor of rotary factors.
fn with_rope_factors(factors: &[f32]) -> Writer {
    small_llama().f32("rope_freqs.weight", &[factors.len() as u64], factors)
}

/// A one-layer llama with heads of 64.
fn small_llama() -> Writer {
    let (hidden, inner) = (128, 4);
    let zeros = vec![0.0; hidden * hidden];
    let mut writer = Writer::new()
        .key("general.architecture", Kv::Text("llama"))
        .key("llama.block_count", Kv::U32(1))
        .key("llama.context_length", Kv::U32(131_072))
        .key("llama.embedding_length", Kv::U32(128))
        .key("llama.feed_forward_length", Kv::U32(4))
        .key("llama.attention.head_count", Kv::U32(2))
        .key("llama.rope.freq_base", Kv::F32(500_000.0))
        .key("llama.attention.layer_norm_rms_epsilon", Kv::F32(1e-5));
    for (name, rows, columns) in [
        ("token_embd", 3, hidden),
        ("blk.0.attn_q", hidden, hidden),
        ("blk.0.attn_k", hidden, hidden),
        ("blk.0.attn_v", hidden, hidden),
        ("blk.0.attn_output", hidden, hidden),
        ("blk.0.ffn_gate", inner, hidden),
        ("blk.0.ffn_up", inner, hidden),
        ("blk.0.ffn_down", hidden, inner),
    ] {
        let dims = [columns as u64, rows as u64];
        writer = writer.f32(&format!("{name}.weight"), &dims, &zeros[..rows * columns]);
    }
    for name in ["blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"] {
        writer = writer.f32(&format!("{name}.weight"), &[128], &zeros[..128]);
    }
    writer
}

/// Llama 3's factors as its converter computes them, for heads of 64.
fn llama3_factors(factor: f32) -> Vec<f32> {
    let wavelength = |i: i32| std::f32::consts::TAU * 500_000f32.powf(2.0 * i as f32 / 64.0);
    let of = |wavelength: f32| match wavelength {
        short if short < 8192.0 / 4.0 => 1.0,
        long if long > 8192.0 => factor,
        between => {
            let smooth = (8192.0 / between - 1.0) / 3.0;
            1.0 / ((1.0 - smooth) / factor + smooth)
        }
    };
    (0..32).map(wavelength).map(of).collect()
}

#[test]
fn llama_3_scaling_is_recovered_from_its_factors_or_refused() {
    let open = |factors: &[f32]| {
        let (_dir, path) = with_rope_factors(factors).file();
        HfView::new(Gguf::open(&path).unwrap())
    };
    let scaling = open(&llama3_factors(32.0)).unwrap().config()["rope_scaling"].clone();
    let expected = json!({
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    });
    assert_eq!(scaling, expected);
    assert_eq!(
        open(&[1.0; 32]).unwrap().config()["rope_scaling"],
        Value::Null
    );

    let mut other = llama3_factors(8.0);
    other[12] *= 1.1;
    let error = open(&other).unwrap_err().to_string();
    assert!(error.contains("`rope_freqs.weight`: factor 12"), "{error}");
    let error = open(&[f32::NAN; 32]).unwrap_err().to_string();
    assert!(error.contains("rope_freqs.weight"), "{error}");
}

#[test]
fn a_scaling_without_a_type_is_linear_as_to_ggml() {
    let scaling = |writer: Writer| {
        let (_dir, path) = writer.file();
        HfView::new(Gguf::open(&path).unwrap()).map(|it| it.config()["rope_scaling"].clone())
    };
    let with =
        |writer: Writer, factor: f32| writer.key("llama.rope.scaling.factor", Kv::F32(factor));
    assert_eq!(
        scaling(with(small_llama(), 4.0)).unwrap(),
        json!({"rope_type": "linear", "factor": 4.0})
    );
    for none in [0.0, 1.0] {
        assert_eq!(scaling(with(small_llama(), none)).unwrap(), Value::Null);
    }
    let off = with(small_llama(), 4.0).key("llama.rope.scaling.type", Kv::Text("none"));
    assert_eq!(scaling(off).unwrap(), Value::Null);
    assert!(scaling(with(small_llama(), -4.0)).is_err());
    let both = scaling(with(with_rope_factors(&llama3_factors(8.0)), 4.0));
    let error = both.unwrap_err().to_string();
    assert!(error.contains("rope_freqs.weight"), "{error}");
}

#[test]
fn importing_writes_a_whole_folder() {
    for (model, dtype, width) in [
        ("llama", Dtype::F32, 4),
        ("mistral", Dtype::F16, 2),
        ("gpt2", Dtype::BF16, 2),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("model");
        let mut seen = Vec::new();
        let source = fixture(&format!("{model}.gguf"));
        let imported = import(&source, &out, dtype, &mut |done, total, name| {
            seen.push((done, total, name.to_owned()));
        })
        .unwrap();
        let view = view(model);
        let total = view.names().len();
        assert_eq!(seen.len(), total);
        assert_eq!(
            seen[total - 1],
            (total, total, view.names()[total - 1].clone())
        );
        assert_eq!(imported.tensors, total);

        let bytes = fs::read(out.join("model.safetensors")).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        assert_eq!(header.metadata().as_ref().unwrap()["format"], "pt");
        let weights = SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(weights.len(), total);
        let mut parameters = 0;
        for (name, tensor) in weights.tensors() {
            assert_eq!(Some(tensor.shape()), view.shape(&name), "{model} {name}");
            let count = tensor.data().len() / width;
            parameters += count as u64;
            let decode = |b: &[u8]| match dtype {
                Dtype::F32 => f32::from_le_bytes(b.try_into().unwrap()),
                Dtype::F16 => half::f16::from_le_bytes(b.try_into().unwrap()).to_f32(),
                Dtype::BF16 => half::bf16::from_le_bytes(b.try_into().unwrap()).to_f32(),
            };
            let got: Vec<f32> = tensor.data().chunks(width).map(decode).collect();
            let mut want = values(&name, count);
            if dtype == Dtype::BF16 {
                want.iter_mut()
                    .for_each(|x| *x = half::bf16::from_f32(*x).to_f32());
            }
            assert_eq!(got, want, "{model} {name}");
        }
        assert_eq!(imported.parameters, parameters);

        let names: BTreeSet<String> = fs::read_dir(&out)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        let mut expected = BTreeSet::from(
            [
                "config.json",
                "generation_config.json",
                "model.safetensors",
                "special_tokens_map.json",
                "tokenizer.json",
                "tokenizer_config.json",
            ]
            .map(String::from),
        );
        if model == "llama" {
            expected.insert("chat_template.jinja".into());
        }
        assert_eq!(names, expected);
        assert_eq!(only_child(dir.path()), "model");
    }
}

fn only_child(dir: &Path) -> String {
    let mut names = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name());
    let name = names.next().unwrap().into_string().unwrap();
    assert_eq!(names.next(), None);
    name
}

#[test]
fn importing_overwrites_nothing_and_leaves_nothing_half() {
    let dir = tempfile::tempdir().unwrap();
    let source = fixture("qwen2.gguf");
    let run = |out: &Path| import(&source, out, Dtype::F32, &mut |_, _, _| {});

    let full = dir.path().join("full");
    fs::create_dir(&full).unwrap();
    fs::write(full.join("notes.txt"), "mine").unwrap();
    let error = run(&full).unwrap_err().to_string();
    assert!(error.ends_with("full: the folder is not empty"), "{error}");
    let error = run(&full.join("notes.txt")).unwrap_err().to_string();
    assert!(error.ends_with("exists and is not a folder"), "{error}");
    assert_eq!(only_child(&full), "notes.txt");
    fs::remove_dir_all(&full).unwrap();

    let empty = dir.path().join("empty");
    fs::create_dir(&empty).unwrap();
    run(&empty).unwrap();
    assert_eq!(only_child(dir.path()), "empty");
    fs::remove_dir_all(&empty).unwrap();

    // the tokenizer is read after the folder is begun
    let mut bytes = fs::read(&source).unwrap();
    let pre = bytes.windows(5).position(|w| w == b"qwen2").unwrap();
    let pre = pre
        + 1
        + bytes[pre + 1..]
            .windows(18)
            .position(|w| w == b"tokenizer.ggml.pre")
            .unwrap();
    bytes[pre + 18 + 4 + 8] = b'x';
    let broken = dir.path().join("broken.gguf");
    fs::write(&broken, bytes).unwrap();
    let error = import(
        &broken,
        &dir.path().join("out"),
        Dtype::F32,
        &mut |_, _, _| {},
    )
    .unwrap_err();
    assert!(error.to_string().contains("`xwen2`"), "{error}");
    assert_eq!(only_child(dir.path()), "broken.gguf");
}

#[test]
fn a_value_too_large_for_f16_is_not_made_infinite() {
    let mut writer = with_rope_factors(&[1.0; 32]);
    writer.tensors[0].data[..4].copy_from_slice(&70_000f32.to_le_bytes());
    let (dir, path) = writer.file();
    let run = |name: &str, dtype| import(&path, &dir.path().join(name), dtype, &mut |_, _, _| {});
    let error = run("half", Dtype::F16).unwrap_err().to_string();
    assert!(
        error.contains("`model.embed_tokens.weight`: has the value 70000"),
        "{error}"
    );
    let imported = run("full", Dtype::BF16).unwrap();
    assert_eq!(imported.tokenizer, None);
}

#[test]
fn a_missing_extra_or_mis_shaped_tensor_is_named() {
    let check = |change: &dyn Fn(&mut Writer), expected: &str| {
        let mut writer = with_rope_factors(&[1.0; 32]);
        change(&mut writer);
        let (_dir, path) = writer.file();
        let error = HfView::new(Gguf::open(&path).unwrap())
            .unwrap_err()
            .to_string();
        assert!(error.contains(expected), "{error}");
    };
    check(
        &|w| w.tensors[2].name = "blk.0.attn_kk.weight".into(),
        "`blk.0.attn_k.weight`: is missing, the nearest is `blk.0.attn_kk.weight`",
    );
    check(
        &|w| w.tensors[2].dims = vec![64, 256],
        "`blk.0.attn_k.weight`: expected [128, 128], got [256, 64]",
    );
    check(
        &|w| {
            w.keys
                .push(("llama.logit_scale".into(), 6, 2f32.to_le_bytes().into()))
        },
        "`llama.logit_scale`: f32 2 is not understood",
    );
    check(
        &|w| {
            w.keys
                .push(("llama.expert_count".into(), 4, 8u32.to_le_bytes().into()))
        },
        "`llama.expert_count`: mixture-of-experts",
    );
    check(
        &|w| {
            w.keys
                .push(("llama.vocab_size".into(), 4, 8u32.to_le_bytes().into()))
        },
        "`llama.vocab_size`: says 8, but `token_embd.weight` has 3 rows",
    );
    check(
        &|w| {
            w.keys.push((
                "general.quantization_version".into(),
                4,
                1u32.to_le_bytes().into(),
            ))
        },
        "`general.quantization_version`: block formats of version 1",
    );
    check(
        &|w| {
            w.keys
                .push(("split.count".into(), 4, 3u32.to_le_bytes().into()))
        },
        "`split.count`: one of 3 parts",
    );
    check(
        &|w| {
            w.keys
                .push(("general.type".into(), 8, crate::support::string("adapter")))
        },
        "`general.type`: expected `model`, got `adapter`",
    );
    check(
        &|w| {
            let tokens = "abcd".chars().map(String::from).collect();
            let mut more = Writer::new().key("tokenizer.ggml.tokens", Kv::Texts(tokens));
            w.keys.append(&mut more.keys);
        },
        "`tokenizer.ggml.tokens`: 4 tokens, but the embedding has 3 rows",
    );
    check(
        &|w| w.keys[1].2 = u32::MAX.to_le_bytes().into(),
        "`llama.block_count`",
    );
    check(
        &|w| w.keys[5].2 = 3u32.to_le_bytes().into(),
        "`llama.attention.head_count`: 3 heads do not divide 128",
    );
    check(
        &|w| drop(w.keys.remove(3)),
        "`llama.embedding_length`: is missing",
    );
    check(
        &|w| w.keys[0].2 = crate::support::string("llma"),
        "unknown architecture `llma`, this build knows llama, qwen2, qwen3, gpt2, the nearest is `llama`",
    );
    check(
        &|w| {
            w.tensors.push(crate::support::Row {
                name: "blk.0.attn_q.lora".into(),
                ..copy(&w.tensors[0])
            })
        },
        "`blk.0.attn_q.lora`: is not part of this model",
    );
}

fn copy(row: &crate::support::Row) -> crate::support::Row {
    crate::support::Row {
        name: row.name.clone(),
        dims: row.dims.clone(),
        kind: row.kind,
        offset: row.offset,
        data: row.data.clone(),
    }
}

#[test]
fn every_model_fixture_has_a_view() {
    for model in MODELS {
        assert!(!view(model).names().is_empty());
    }
}
