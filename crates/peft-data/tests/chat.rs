//! Chat templates against Hugging Face's own renderings (`fixtures/chat/make.py`).

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use peft_data::{ChatTemplate, Message, RenderOptions, Tokenizer};
use serde_json::{Map, Value};

fn fixtures() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/chat")
}

fn cases() -> Value {
    serde_json::from_slice(&fs::read(fixtures().join("cases.json")).unwrap()).unwrap()
}

fn template(cases: &Value, name: &str) -> ChatTemplate {
    let source = fs::read_to_string(fixtures().join(format!("templates/{name}.jinja"))).unwrap();
    let special: BTreeMap<String, String> =
        serde_json::from_value(cases["templates"][name]["special"].clone()).unwrap();
    ChatTemplate::compile(&source, &special).unwrap()
}

fn options(case: &Value) -> RenderOptions {
    let mut variables: Map<String, Value> = case["options"].as_object().unwrap().clone();
    RenderOptions {
        add_generation_prompt: variables.remove("add_generation_prompt") == Some(true.into()),
        tools: variables.remove("tools"),
        documents: variables.remove("documents"),
        variables,
    }
}

#[test]
fn every_rendering_equals_pythons() {
    let cases = cases();
    let mut wrong = Vec::new();
    for name in cases["templates"].as_object().unwrap().keys() {
        let template = template(&cases, name);
        for case in cases["cases"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|case| case["template"] == **name)
        {
            let messages: Vec<Message> = serde_json::from_value(case["messages"].clone()).unwrap();
            let rendered = template.render(&messages, &options(case));
            let same = match (&rendered, case["text"].as_str()) {
                (Ok(text), Some(expected)) => text == expected,
                (Err(error), None) if case["raised"] == true => {
                    error.to_string().ends_with(case["error"].as_str().unwrap())
                }
                (Err(_), None) => true,
                _ => false,
            };
            if !same {
                wrong.push(format!(
                    "{}\n  python {:?}\n  rust   {:?}",
                    case["name"],
                    case["text"].as_str().or(case["error"].as_str()),
                    rendered
                ));
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "{} differ:\n{}",
        wrong.len(),
        wrong
            .iter()
            .take(12)
            .cloned()
            .collect::<Vec<_>>()
            .join("\n")
    );
}

#[test]
fn generation_spans_equal_pythons() {
    let cases = cases();
    let template = template(&cases, "generation");
    for case in cases["cases"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|case| case.get("spans").is_some())
    {
        let messages: Vec<Message> = serde_json::from_value(case["messages"].clone()).unwrap();
        let (text, spans) = template.render_spans(&messages, &options(case)).unwrap();
        assert_eq!(text, case["text"].as_str().unwrap());
        // Python counts characters, we count bytes.
        let chars: Vec<[usize; 2]> = spans
            .iter()
            .map(|span| [span.start, span.end].map(|at| text[..at].chars().count()))
            .collect();
        let expected: Vec<[usize; 2]> = serde_json::from_value(case["spans"].clone()).unwrap();
        let expected: Vec<_> = expected
            .into_iter()
            .filter(|[start, end]| start < end)
            .collect();
        assert_eq!(chars, expected, "{}", case["name"]);
    }
}

/// The real thing: template and vocabulary of the model that `cargo xtask demo` fetches.
#[test]
fn smollm2() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../target/models/smollm2");
    if !folder.join("tokenizer.json").exists() {
        eprintln!("skipped: SmolLM2 is not in target/models, `cargo xtask demo` fetches it");
        return;
    }
    let tokenizer = Tokenizer::open(&folder).unwrap();
    let options = RenderOptions {
        add_generation_prompt: true,
        ..RenderOptions::default()
    };
    assert_eq!(
        tokenizer.render(&[Message::user("Hi")], &options).unwrap(),
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n\
         <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    );
    let text = fs::read_to_string(fixtures().join("../data/austen_pp_200k.txt")).unwrap();
    let (ids, _) = tokenizer.encode_with_offsets(&text, true).unwrap();
    assert_eq!(ids, tokenizer.encode(&text, true).unwrap());
}
