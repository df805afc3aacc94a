//! A model that writes a text for a text, through the program: T5 of some thousand parameters with a vocabulary of words.

mod common;

use std::fs;

use common::{copy, fixture, peft};
use serde_json::json;

#[test]
fn a_text_for_a_text_is_learnt_written_and_measured() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("t5");
    copy(&fixture("tasks/t5"), &model);
    let words = "<pad> </s> <unk> one two three four five un deux trois quatre cinq";
    let vocabulary: serde_json::Map<String, serde_json::Value> = words
        .split(' ')
        .enumerate()
        .map(|(i, word)| (word.to_owned(), i.into()))
        .collect();
    let special = |id: usize, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    let end = json!({"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}});
    let tokenizer = json!({
        "version": "1.0",
        "added_tokens": [special(0, "<pad>"), special(1, "</s>"), special(2, "<unk>")],
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": end,
        },
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    });
    fs::write(model.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let config = json!({"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"});
    fs::write(model.join("tokenizer_config.json"), config.to_string()).unwrap();
    let data = dir.path().join("rows.jsonl");
    let pairs = [
        ("one", "un"),
        ("two", "deux"),
        ("three", "trois"),
        ("four", "quatre"),
    ];
    let rows: String = (0..16)
        .map(|i| {
            let (a, b) = (pairs[i % 4], pairs[i / 4]);
            let row =
                json!({"source": format!("{} {}", a.0, b.0), "target": format!("{} {}", a.1, b.1)});
            format!("{row}\n")
        })
        .collect();
    fs::write(&data, rows).unwrap();
    let path = |it: &std::path::Path| it.to_string_lossy().into_owned();
    let (model, data) = (path(&model), path(&data));
    let run = path(&dir.path().join("run"));
    let said = peft([
        "train",
        "--model",
        &model,
        "--data",
        &data,
        "--validation",
        &data,
        "--method",
        "full",
        "--learning-rate",
        "3e-2",
        "--epochs",
        "60",
        "--batch-size",
        "16",
        "--out",
        &run,
        "--threads",
        "1",
    ])
    .ok();
    assert!(said.contains("SEQ_2_SEQ_LM"), "{said}");
    let figures = peft([
        "eval",
        &run,
        "--data",
        &data,
        "--json",
        "--dtype",
        "fp32",
        "--threads",
        "1",
    ])
    .ok();
    let figures: serde_json::Value = serde_json::from_str(figures.trim()).unwrap();
    let figure = |name: &str| figures[name].as_f64().unwrap();
    assert!(
        figure("rouge1") > 0.5 && figure("rougeL") <= figure("rouge1"),
        "{figures}"
    );
    assert!(
        (0.0..=100.0).contains(&figure("bleu")) && figure("rouge2") <= 1.0,
        "{figures}"
    );
    let said = peft(["generate", &run, "--prompt", "two four", "--dtype", "fp32"]).ok();
    assert!(!said.trim().is_empty(), "it writes nothing");
    peft(["generate", &run, "--prompt", "two", "--system", "be brief"]).fails(2, &["--system"]);
    peft(["chat", &run]).fails(2, &["SEQ_2_SEQ_LM"]);
}
