//! Things that only a real encoder with a tokenizer shows.

mod common;

use std::fs;

use common::peft;

/// MiniLM has no head for hidden words: what is drawn for it is trained, saved, and found again.
#[test]
fn a_head_that_the_base_lacks_travels_with_the_adapter() {
    let model = common::root().join("target/models/minilm");
    if !model.join("config.json").is_file() {
        println!("skipped: target/models/minilm is not there; `cargo xtask test` fetches it");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_string_lossy().into_owned();
    let rows: String = (0..16)
        .map(|i| format!("{{\"text\": \"The {i}th house of the street has a red door.\"}}\n"))
        .collect();
    fs::write(path("rows.jsonl"), rows).unwrap();
    let model = model.to_string_lossy().into_owned();
    for method in ["lora", "ia3", "prompt"] {
        let (data, run) = (path("rows.jsonl"), path(method));
        let said = peft([
            "train",
            "--model",
            &model,
            "--data",
            &data,
            "--validation",
            &data,
            "--task",
            "MASKED_LM",
            "--method",
            method,
            "--dtype",
            "fp32",
            "--max-steps",
            "2",
            "--batch-size",
            "4",
            "--out",
            &run,
            "--threads",
            "1",
        ])
        .ok();
        let loss = |text: &str, word: &str| -> String {
            let line = text
                .lines()
                .find(|it| it.contains(word))
                .unwrap_or_default();
            line.split_whitespace()
                .last()
                .unwrap_or_default()
                .to_owned()
        };
        let trained = loss(&said, "judged");
        let said = peft([
            "eval",
            &run,
            "--data",
            &data,
            "--dtype",
            "fp32",
            "--threads",
            "1",
        ])
        .ok();
        assert_eq!(loss(&said, "perplexity"), trained, "{method}: {said}");
        let said = peft(["check", &run]).ok();
        assert!(said.contains("every key and shape"), "{method}: {said}");
    }
}
