//! The same text from a real model as Python's, end to end: importer, tokenizer, template, model, decoding.

mod common;

use common::{fixture, peft, root};

#[test]
fn a_real_model_says_what_it_says_in_python() {
    let model = root().join("target/models/smollm2");
    if !model.join("config.json").exists() {
        println!("skipped: no model in target/models/smollm2; `cargo xtask test` fetches it");
        return;
    }
    let told: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(fixture("smollm2.json")).unwrap()).unwrap();
    let asked = told["chat"][0]["content"].as_str().unwrap();
    let model = model.to_str().unwrap();
    for case in told["prompts"].as_array().unwrap() {
        let text = |key: &str| case[key].as_str().unwrap();
        let raw = [
            "generate",
            "--model",
            model,
            "--dtype",
            "fp32",
            "--max-new-tokens",
            "24",
            "--raw",
            "--prompt",
        ];
        let answer = peft(raw.iter().chain(&[text("prompt")])).ok();
        assert_eq!(
            answer.strip_suffix('\n').unwrap(),
            text("continuation"),
            "{}",
            text("prompt")
        );
        if text("prompt").contains(asked) {
            let chat = [
                "generate",
                "--model",
                model,
                "--dtype",
                "fp32",
                "--max-new-tokens",
                "24",
                "--prompt",
                asked,
            ];
            assert_eq!(peft(chat).ok(), answer, "through the template");
        }
    }
}
