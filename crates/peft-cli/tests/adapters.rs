//! `check`, `merge`, `info` and `import` on good and on damaged folders.

mod common;

use std::{fs, path::Path};

use common::{TEXT, close, copy, fixture, peft, read, root, under};
use peft::core::{State, tensors};
use tch::Tensor;

/// A copy of a good adapter, damaged by `harm`, must fail `check` and say all of `words`.
#[track_caller]
fn damaged(harm: impl FnOnce(&Path), words: &[&str]) {
    let held = tempfile::tempdir().unwrap();
    let dir = held.path().join("adapter");
    copy(&fixture("lora/llama__r3"), &dir);
    harm(&dir);
    let said = peft(["check", dir.to_str().unwrap()]);
    assert_eq!(said.code, Some(1), "{}{}", said.out, said.err);
    // The table breaks lines.
    let flat = said.out.split_whitespace().collect::<Vec<_>>().join(" ");
    for word in words {
        assert!(flat.contains(word), "`{word}` is not in: {flat}");
    }
    assert!(!said.err.contains("internal error"), "{}", said.err);
}

fn with_tensors(dir: &Path, change: impl FnOnce(&mut State)) {
    let path = dir.join("adapter_model.safetensors");
    let mut state: State = read(&path)
        .into_iter()
        .map(|(key, it)| (key, it.copy()))
        .collect();
    change(&mut state);
    tensors::write(&path, &state).unwrap();
}

fn with_config(dir: &Path, key: &str, value: serde_json::Value) {
    let path = dir.join("adapter_config.json");
    let mut json: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    json[key] = value;
    fs::write(&path, json.to_string()).unwrap();
}

#[test]
fn a_good_adapter_is_ok() {
    let out = peft(["check", "fixtures/lora/llama__r3"]).ok();
    for word in ["LORA", "q_proj", "v_proj", "any runtime", "0 failed"] {
        assert!(out.contains(word), "{word}: {out}");
    }
    let out = peft(["check", "fixtures/lora/llama__dora"]).ok();
    assert!(out.contains("DoRA") && out.contains("warn"), "{out}");
}

#[test]
fn damage_is_found_and_named() {
    const KEY: &str = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
    let weights = "adapter_model.safetensors";
    damaged(
        |dir| fs::write(dir.join("adapter_config.json"), "{").unwrap(),
        &["adapter_config.json", "EOF"],
    );
    damaged(
        |dir| fs::remove_file(dir.join(weights)).unwrap(),
        &[weights],
    );
    damaged(
        |dir| {
            let path = dir.join(weights);
            let bytes = fs::read(&path).unwrap();
            fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
        },
        &["not a safetensors file"],
    );
    damaged(
        |dir| {
            with_tensors(dir, |it| {
                drop(it.get_mut(KEY).unwrap().get(0).fill_(f64::NAN))
            })
        },
        &["NaN or infinite", "lora_A.weight"],
    );
    damaged(
        |dir| with_tensors(dir, |it| drop(it.remove(KEY))),
        &["lacks", KEY],
    );
    damaged(
        |dir| {
            with_tensors(dir, |it| {
                let tensor = it.remove(KEY).unwrap();
                it.insert(KEY.replace("q_proj", "q_porj"), tensor);
            });
        },
        &["lacks", "nearest is", "q_porj"],
    );
    damaged(
        |dir| {
            with_tensors(dir, |it| {
                drop(it.insert(KEY.into(), Tensor::from_slice(&[1f32])))
            })
        },
        &["expected shape [3, 24], got [1]"],
    );
    damaged(|dir| with_config(dir, "r", 4.into()), &["expected shape"]);
    damaged(|dir| with_config(dir, "r", 0.into()), &["r"]);
    damaged(
        |dir| with_config(dir, "peft_type", "BOFT".into()),
        &["BOFT", "LORA"],
    );
    damaged(
        |dir| with_config(dir, "use_dorra", true.into()),
        &["use_dorra", "use_dora"],
    );
    damaged(
        |dir| with_config(dir, "target_modules", serde_json::json!(["qq_proj"])),
        &["qq_proj", "q_proj"],
    );
}

#[test]
fn a_file_may_have_patterns_that_match_nothing() {
    let held = tempfile::tempdir().unwrap();
    let dir = held.path().join("adapter");
    copy(&fixture("lora/llama__r3"), &dir);
    let nothing = serde_json::json!({"k_porj": 5});
    with_config(&dir, "rank_pattern", nothing.clone());
    with_config(&dir, "alpha_pattern", nothing);
    peft(["check", dir.to_str().unwrap()]).ok();
    // Who types them hears of it.
    let typed = [
        "info",
        "fixtures/models/llama",
        "--method",
        "lora",
        "--set",
        r#"rank_pattern={"k_porj": 5}"#,
    ];
    peft(typed).fails(2, &["k_porj", "matches none"]);
}

#[test]
fn another_base_does_not_fit() {
    let said = peft([
        "check",
        "fixtures/lora/llama__r3",
        "--model",
        "fixtures/models/gpt2",
    ]);
    assert_eq!(said.code, Some(1));
    assert!(said.out.contains("FAIL"), "{}", said.out);
    // A base that is not there is only a warning, unless it was asked for.
    let held = tempfile::tempdir().unwrap();
    copy(&fixture("lora/llama__r3"), held.path());
    with_config(
        held.path(),
        "base_model_name_or_path",
        "no/such/base".into(),
    );
    let dir = held.path().to_str().unwrap();
    assert!(peft(["check", dir]).ok().contains("cannot be looked at"));
    assert_eq!(
        peft(["check", dir, "--model", "no/such/base"]).code,
        Some(1)
    );
}

#[test]
fn a_merged_folder_computes_what_python_merged() {
    let held = tempfile::tempdir().unwrap();
    let merged = held.path().join("merged");
    let merged = merged.to_str().unwrap();
    let out = peft(["merge", "fixtures/lora/llama__r3", "--out", merged]).ok();
    assert!(
        out.contains("moved the logits by") && out.contains(&format!("peft chat {merged}")),
        "{out}"
    );

    let io = read(&fixture("lora/llama__r3/io.safetensors"));
    let (to, from) = (
        held.path().join("in.safetensors"),
        held.path().join("out.safetensors"),
    );
    let mut batch = under(&io, "right");
    batch.retain(|key, _| ["input_ids", "attention_mask"].contains(&key.as_str()));
    tensors::write(&to, &batch).unwrap();
    let args = [
        "forward",
        "--model",
        merged,
        "--inputs",
        to.to_str().unwrap(),
        "--out",
        from.to_str().unwrap(),
    ];
    peft(args).ok();
    close(
        "merged",
        &read(&from)["logits"],
        &io["right.merged_logits"],
        batch.get("attention_mask"),
    );

    peft(["merge", "fixtures/lora/llama__r3", "--out", merged]).fails(1, &["not empty", merged]);
}

/// The logits that `peft forward` computes for the batch `right` of a fixture.
fn logits(held: &Path, io: &State, which: &[&str]) -> Tensor {
    let (to, from) = (held.join("in.safetensors"), held.join("out.safetensors"));
    let mut batch = under(io, "right");
    batch.retain(|key, _| ["input_ids", "attention_mask"].contains(&key.as_str()));
    tensors::write(&to, &batch).unwrap();
    let files = [
        "--inputs",
        to.to_str().unwrap(),
        "--out",
        from.to_str().unwrap(),
    ];
    peft([&["forward"], which, &files].concat()).ok();
    read(&from)["logits"].copy()
}

#[test]
fn a_bias_that_a_layer_had_not_is_in_the_merged_folder_or_refused() {
    let held = tempfile::tempdir().unwrap();
    let adapter = fixture("lora/llama__lora-bias");
    let io = read(&adapter.join("io.safetensors"));
    let merged = held.path().join("merged");
    let (adapter, name) = (adapter.to_str().unwrap(), merged.to_str().unwrap());
    peft(["merge", adapter, "--out", name]).ok();
    // The configuration says so, and what has no bias of the adapter's has zeros: so `transformers` reads all of them.
    let text = fs::read_to_string(merged.join("config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(config["attention_bias"], true);
    assert_ne!(config["mlp_bias"], true);
    let state = read(&merged.join("model.safetensors"));
    let bias = |at: &str| {
        state[&format!("model.layers.0.self_attn.{at}.bias")]
            .abs()
            .sum(tch::Kind::Float)
    };
    assert!(bias("q_proj").double_value(&[]) > 0.0);
    assert_eq!(bias("o_proj").double_value(&[]), 0.0);
    close(
        "merged",
        &logits(held.path(), &io, &["--model", name]),
        &logits(held.path(), &io, &["--adapter", adapter]),
        None,
    );

    // A Mistral has none, whatever its configuration says.
    let other = held.path().join("mistral");
    copy(&fixture("lora/mistral__r3"), &other);
    with_config(&other, "lora_bias", true.into());
    with_tensors(&other, |state| {
        let b: Vec<String> = state
            .keys()
            .filter(|it| it.contains("lora_B"))
            .cloned()
            .collect();
        for key in b {
            let width = state[&key].size()[0];
            state.insert(
                key.replace("lora_B.weight", "lora_B.bias"),
                Tensor::ones([width], (tch::Kind::Float, tch::Device::Cpu)),
            );
        }
    });
    let out = held.path().join("out");
    peft([
        "merge",
        other.to_str().unwrap(),
        "--out",
        out.to_str().unwrap(),
    ])
    .fails(1, &["q_proj", "has no place in a mistral"]);
    assert!(!out.exists());
}

#[test]
fn a_merged_folder_can_be_of_another_dtype_and_keeps_ties() {
    let held = tempfile::tempdir().unwrap();
    let merged = held.path().join("merged");
    let name = merged.to_str().unwrap();
    peft([
        "merge",
        "fixtures/lora/llama-tied__target-all-linear",
        "--out",
        name,
        "--dtype",
        "bf16",
    ])
    .ok();
    let state = read(&merged.join("model.safetensors"));
    assert!(state.values().all(|it| it.kind() == tch::Kind::BFloat16));
    assert!(
        !state.contains_key("lm_head.weight"),
        "the head is the embedding"
    );
    assert!(peft(["info", name]).ok().contains("in bf16"));
}

#[test]
fn a_merge_that_fails_leaves_nothing() {
    let held = tempfile::tempdir().unwrap();
    let adapter = held.path().join("adapter");
    copy(&fixture("lora/llama__r3"), &adapter);
    with_tensors(&adapter, |state| {
        for tensor in state.values_mut() {
            let _ = tensor.fill_(1e30);
        }
    });
    let out = held.path().join("out");
    peft([
        "merge",
        adapter.to_str().unwrap(),
        "--out",
        out.to_str().unwrap(),
    ])
    .fails(1, &["finite"]);
    let left: Vec<_> = fs::read_dir(held.path())
        .unwrap()
        .map(|it| it.unwrap().file_name())
        .collect();
    assert_eq!(left, ["adapter"]);
}

#[test]
fn info_counts_what_would_be_trained() {
    let out = peft(["info", TEXT]).ok();
    for word in ["llama", "21,552", "r 16", "all linear layers"] {
        assert!(out.contains(word), "{word}: {out}");
    }
    // Two layers, q_proj 16 × 16, r 4: 2 · 4 · (16 + 16).
    let one = [
        "info",
        TEXT,
        "--method",
        "lora",
        "--set",
        "r=4",
        "--set",
        r#"target_modules=["q_proj"]"#,
    ];
    assert!(peft(one).ok().contains("256 (1.174 %)"));
    let adapter = peft(["info", "fixtures/lora/llama__dora"]).ok();
    assert!(
        adapter.contains("use_dora: true") && adapter.contains("fixtures/models/llama"),
        "{adapter}"
    );
}

#[test]
fn a_gguf_file_becomes_a_folder_once() {
    let held = tempfile::tempdir().unwrap();
    let out = held.path().join("model");
    let out = out.to_str().unwrap();
    let args = ["import", "fixtures/gguf/llama.gguf", "--out", out];
    assert!(peft(args).ok().contains("imported into"));
    assert!(Path::new(out).join("config.json").exists());
    peft(args).fails(1, &["empty"]);
    let direct = [
        "generate",
        "--model",
        "fixtures/gguf/llama.gguf",
        "--raw",
        "--prompt",
        "a",
        "--max-new-tokens",
        "4",
    ];
    let imported = [
        "generate",
        "--model",
        out,
        "--raw",
        "--prompt",
        "a",
        "--max-new-tokens",
        "4",
        "--dtype",
        "fp32",
    ];
    let fp32 = direct.iter().chain(&["--dtype", "fp32"]);
    if root().join("fixtures/gguf/llama.gguf").exists() {
        let (direct, imported) = (peft(fp32), peft(imported));
        assert_eq!(direct.code, imported.code, "{direct:?} {imported:?}");
    }
}
