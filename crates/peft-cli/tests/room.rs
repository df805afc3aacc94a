//! Rows that fill a model whose positions are a table, and rows with nothing to learn.

mod common;

use std::{fs, path::Path};

use common::{peft, root};
use serde_json::{Map, Value, json};

/// One of the fixtures' models of 61 tokens in `dir`, with a tokenizer to which every word is a token.
fn model(dir: &Path, of: &str) -> String {
    let from = root().join("fixtures").join(of);
    let to = dir.join("model");
    fs::create_dir_all(&to).unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(from.join(file), to.join(file)).unwrap();
    }
    let config: Value =
        serde_json::from_slice(&fs::read(from.join("config.json")).unwrap()).unwrap();
    let pad = config["pad_token_id"].as_u64().unwrap_or(0) as usize;
    let special = [
        (pad, "[PAD]"),
        (57, "[CLS]"),
        (58, "[SEP]"),
        (59, "[MASK]"),
        (60, "[UNK]"),
    ];
    let mut vocab = Map::new();
    for id in 0..61 {
        let name = special.iter().find(|it| it.0 == id);
        let name = name.map_or(format!("w{id}"), |it| it.1.to_owned());
        vocab.insert(name, id.into());
    }
    let added: Vec<Value> = special
        .iter()
        .map(|(id, token)| {
            json!({"id": id, "content": token, "special": true, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false})
        })
        .collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"},
    });
    let names = json!({
        "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "eos_token": "[SEP]", "unk_token": "[UNK]",
        "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]",
    });
    fs::write(to.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    fs::write(to.join("tokenizer_config.json"), names.to_string()).unwrap();
    to.to_string_lossy().into_owned()
}

/// Rows of `words` words, one for each of `starts`.
fn rows(file: &Path, starts: &[usize], words: usize) -> String {
    let row = |start: &usize| {
        let text: Vec<String> = (0..words)
            .map(|i| format!("w{}", 2 + (start + i) % 50))
            .collect();
        format!("{}\n", json!({"text": text.join(" ")}))
    };
    fs::write(file, starts.iter().map(row).collect::<String>()).unwrap();
    file.to_string_lossy().into_owned()
}

/// `train` on rows, in three steps.
fn train(model: &str, (data, held_out): (&str, &str), out: &str, more: &[&str]) -> common::Said {
    let usual = [
        "train",
        "--model",
        model,
        "--data",
        data,
        "--validation",
        held_out,
        "--out",
        out,
        "--max-steps",
        "3",
        "--dtype",
        "fp32",
        "--threads",
        "1",
    ];
    peft(usual.iter().chain(more))
}

/// Virtual tokens take positions away, and batches are no wider than what is left: of GPT-2's 32 positions, with 3 of
/// them, 29 for a text, which is no multiple of 8.
#[test]
fn virtual_tokens_and_padding_leave_room() {
    let held = tempfile::tempdir().unwrap();
    for (of, task) in [
        ("models/gpt2", "CAUSAL_LM"),
        ("tasks/bert-masked", "MASKED_LM"),
        ("tasks/roberta-masked", "MASKED_LM"),
    ] {
        let dir = held.path().join(task).join(of.replace('/', "-"));
        fs::create_dir_all(&dir).unwrap();
        let model = model(&dir, of);
        let data = rows(&dir.join("long.jsonl"), &[0, 7, 20], 60);
        for method in ["prompt", "p-tuning", "prefix", "lora"] {
            let run = dir.join(method);
            let run = run.to_str().unwrap();
            let asked: &[&str] = match method {
                "lora" => &["--task", task, "--method", method],
                _ => &[
                    "--task",
                    task,
                    "--method",
                    method,
                    "--num-virtual-tokens",
                    "3",
                ],
            };
            train(&model, (&data, &data), run, asked).ok();
            peft(["eval", run, "--data", &data]).ok();
        }
        // What is asked for and does not fit is refused before anything is written.
        let run = dir.join("refused");
        let more = ["--task", task, "--method", "prompt", "--max-length", "40"];
        let said = train(&model, (&data, &data), run.to_str().unwrap(), &more);
        said.fails(2, &["long.jsonl, row ", "40 tokens", "max_length"]);
        assert!(!run.exists());
    }
}

/// A row of special tokens alone is left out; and `eval` hides the words that the run hid, whatever its seed.
#[test]
fn rows_with_nothing_to_hide_are_left_out() {
    let held = tempfile::tempdir().unwrap();
    let dir = held.path();
    let model = model(dir, "tasks/bert-masked");
    let data = rows(&dir.join("rows.jsonl"), &[0, 5, 11, 30], 12);
    let mut text = fs::read_to_string(&data).unwrap();
    text.push_str("{\"text\": \"[UNK] [MASK]\"}\n");
    fs::write(&data, text).unwrap();
    let run = dir.join("run").to_string_lossy().into_owned();
    let said = train(
        &model,
        (&data, &data),
        &run,
        &["--set", "seed=508", "--task", "MASKED_LM"],
    )
    .ok();
    assert!(said.contains("1 rows are left out"), "{said}");
    let summary: Value =
        serde_json::from_slice(&fs::read(dir.join("run/run.json")).unwrap()).unwrap();
    let measured = peft(["eval", &run, "--data", &data, "--json", "--dtype", "fp32"]).ok();
    let measured: Value = serde_json::from_str(&measured).unwrap();
    let [a, b] =
        [&summary["summary"]["last_eval"], &measured["loss"]].map(|it| it.as_f64().unwrap());
    assert!((a - b).abs() < 1e-6, "{a} {b}");

    let nothing = dir.join("nothing.jsonl");
    fs::write(&nothing, "{\"text\": \"[PAD] [MASK]\"}\n").unwrap();
    peft(["eval", &run, "--data", nothing.to_str().unwrap()])
        .fails(1, &["none has a word that could be hidden"]);
}

/// What goes by the loss of held-out rows needs some.
#[test]
fn early_stopping_needs_held_out_rows() {
    let held = tempfile::tempdir().unwrap();
    let dir = held.path();
    let model = model(dir, "models/gpt2");
    let data = rows(&dir.join("rows.jsonl"), &[0, 5], 12);
    let run = dir.join("run");
    for more in [
        ["--early-stopping-patience", "2"],
        ["--lr-scheduler-type", "reduce_lr_on_plateau"],
    ] {
        let said = train(&model, (&data, "0"), run.to_str().unwrap(), &more);
        said.fails(2, &["held out"]);
        assert!(!run.exists());
    }
}

/// Methods with virtual tokens and without are compared on the same rows.
#[test]
fn a_comparison_cuts_rows_alike() {
    let held = tempfile::tempdir().unwrap();
    let dir = held.path();
    let model = model(dir, "models/gpt2");
    let data = rows(&dir.join("rows.jsonl"), &[0, 5, 9, 31], 60);
    let out = dir.join("compared");
    let args = [
        "compare",
        "--model",
        &model,
        "--data",
        &data,
        "--validation",
        &data,
        "--methods",
        "lora,prompt",
        "--set",
        "prompt.num_virtual_tokens=3",
        "--out",
        out.to_str().unwrap(),
        "--max-steps",
        "2",
    ];
    peft(args).ok();
    for method in ["lora", "prompt"] {
        let config = fs::read_to_string(out.join(method).join("config.yaml")).unwrap();
        assert!(config.contains("max_length: 29"), "{config}");
    }
}

/// The second Ctrl-C ends the program at once and by its code, whatever its threads are doing.
#[cfg(unix)]
#[test]
fn the_second_interrupt_ends_it() {
    use std::{
        process::{Command, Stdio},
        thread::sleep,
        time::Duration,
    };
    let held = tempfile::tempdir().unwrap();
    let dir = held.path();
    let model = model(dir, "models/gpt2");
    let data = rows(&dir.join("rows.jsonl"), &[0, 5, 9, 31], 20);
    for round in 0..4 {
        let run = dir.join(format!("run-{round}"));
        let mut child = Command::new(env!("CARGO_BIN_EXE_peft"))
            .args(["train", "--model", &model, "--data", &data, "--out"])
            .arg(&run)
            .args(["--max-steps", "100000", "--validation", "0"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        while !run.join("log.jsonl").exists() {
            sleep(Duration::from_millis(20));
        }
        for _ in 0..2 {
            let id = child.id().to_string();
            let _ = Command::new("kill").args(["-INT", &id]).status().unwrap();
        }
        assert_eq!(child.wait().unwrap().code(), Some(130));
    }
}
