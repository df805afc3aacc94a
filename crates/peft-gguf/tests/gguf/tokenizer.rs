//! Tokenizers against Python's: the same texts, the same ids.

use crate::support::{Kv, MODELS, Writer, fixture};
use peft_gguf::{Gguf, write_tokenizer};
use serde_json::{Value, json};
use std::fs;
use tokenizers::Tokenizer;

fn written(gguf: &Gguf) -> (tempfile::TempDir, Tokenizer) {
    let dir = tempfile::tempdir().unwrap();
    write_tokenizer(gguf, dir.path()).unwrap();
    let tokenizer = Tokenizer::from_file(dir.path().join("tokenizer.json")).unwrap();
    (dir, tokenizer)
}

fn open(model: &str) -> Gguf {
    Gguf::open(&fixture(&format!("{model}.gguf"))).unwrap()
}

#[test]
fn ids_are_pythons() {
    let expected: Value =
        serde_json::from_slice(&fs::read(fixture("tokens.json")).unwrap()).unwrap();
    for model in MODELS {
        let (_dir, tokenizer) = written(&open(model));
        for case in expected[model].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            let got = tokenizer.encode(text, true).unwrap();
            assert_eq!(json!(got.get_ids()), case["ids"], "{model} {text:?}");
        }
    }
}

#[test]
fn texts_survive_the_round_trip() {
    let texts: Value = serde_json::from_slice(&fs::read(fixture("tokens.json")).unwrap()).unwrap();
    for model in MODELS {
        let (_dir, tokenizer) = written(&open(model));
        for case in texts[model].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            // `qwen2` composes accents, on purpose
            if model == "qwen2" && text.contains('\u{301}') {
                continue;
            }
            let ids = tokenizer.encode(text, false).unwrap();
            let back = tokenizer.decode(ids.get_ids(), false).unwrap();
            assert_eq!(back, text, "{model}");
        }
    }
}

#[test]
fn roles_and_template_are_written() {
    let (dir, tokenizer) = written(&open("llama"));
    let read = |name: &str| -> Value {
        serde_json::from_slice(&fs::read(dir.path().join(name)).unwrap()).unwrap()
    };
    let template = fs::read_to_string(dir.path().join("chat_template.jinja")).unwrap();
    let config = read("tokenizer_config.json");
    assert_eq!(config["chat_template"], template);
    assert_eq!(config["bos_token"], "<|begin|>");
    assert_eq!(config["add_bos_token"], true);
    assert_eq!(config["model_max_length"], 96);
    let roles = json!({"bos_token": "<|begin|>", "eos_token": "<|end|>"});
    assert_eq!(read("special_tokens_map.json"), roles);
    let added = tokenizer.get_added_tokens_decoder();
    assert!(added[&330].special && added.len() == 3);
    let (_dir, tokenizer) = written(&open("qwen3"));
    let added = tokenizer.get_added_tokens_decoder();
    assert!(!added[&tokenizer.token_to_id("<think>").unwrap()].special);
    // padding tokens fill the embedding, but are not words
    let (_dir, tokenizer) = written(&open("qwen2"));
    assert_eq!(tokenizer.get_vocab_size(true), 333);
}

#[test]
fn named_templates_get_files_but_not_any_name() {
    let write = |name: &str| {
        let (dir, path) = tiny()
            .key(
                &format!("tokenizer.chat_template.{name}"),
                Kv::Text("{{ x }}"),
            )
            .file();
        let result = write_tokenizer(&Gguf::open(&path).unwrap(), dir.path());
        (dir, result.map_err(|e| e.to_string()))
    };
    let (dir, result) = write("tool_use");
    result.unwrap();
    let file = dir.path().join("additional_chat_templates/tool_use.jinja");
    assert_eq!(fs::read_to_string(file).unwrap(), "{{ x }}");
    for name in ["", "../../etc/x", "a/b", "a.b", &"a".repeat(65)] {
        let error = write(name).1.unwrap_err();
        assert!(error.contains("the name of a template"), "{error}");
    }
}

/// A byte-level vocabulary of `a`, `b`, `ab` and `<s>`.
fn tiny() -> Writer {
    let texts = |all: &[&str]| Kv::Texts(all.iter().map(|t| t.to_string()).collect());
    Writer::new()
        .key("general.architecture", Kv::Text("llama"))
        .key("tokenizer.ggml.model", Kv::Text("gpt2"))
        .key("tokenizer.ggml.pre", Kv::Text("smollm"))
        .key("tokenizer.ggml.tokens", texts(&["a", "b", "ab", "<s>"]))
        .key("tokenizer.ggml.token_type", Kv::Ints(vec![1, 1, 1, 3]))
        .key("tokenizer.ggml.merges", texts(&["a b"]))
}

/// What is said about [`tiny`] with one thing changed.
fn changed(key: &str, value: Option<Kv<'_>>) -> String {
    let mut writer = tiny();
    writer.keys.retain(|k| k.0 != key);
    if let Some(value) = value {
        writer = writer.key(key, value);
    }
    let (dir, path) = writer.file();
    let result = write_tokenizer(&Gguf::open(&path).unwrap(), dir.path());
    result.map_or_else(|e| e.to_string(), |()| "written".into())
}

#[test]
fn what_is_wrong_with_a_tokenizer_is_named() {
    let texts = |all: &[&str]| Some(Kv::Texts(all.iter().map(|t| t.to_string()).collect()));
    let check = |key: &str, value, expected: &str| {
        let message = changed(&format!("tokenizer.ggml.{key}"), value);
        assert!(message.contains(expected), "{message}");
    };
    assert_eq!(changed("", None), "written");
    check("model", None, "`tokenizer.ggml.model`: is missing");
    check(
        "model",
        Some(Kv::Text("gpt3")),
        "unknown tokenizer `gpt3`, this build knows gpt2, llama",
    );
    check("model", Some(Kv::U32(7)), "expected a string, got u32 7");
    check("pre", None, "`tokenizer.ggml.pre`: is missing");
    check("pre", Some(Kv::Text("smolm")), "the nearest is `smollm`");
    check(
        "tokens",
        Some(Kv::Text("a")),
        "expected an array of strings, got the string `a`",
    );
    check(
        "tokens",
        texts(&["a", "b", "a", "<s>"]),
        "tokens 0 and 2 are both `a`",
    );
    check(
        "tokens",
        texts(&["a", "b", "ab", ""]),
        "token 3 is special and empty",
    );
    check(
        "token_type",
        Some(Kv::Ints(vec![1])),
        "has 1 entries for 4 tokens",
    );
    check(
        "merges",
        texts(&["ab"]),
        "merge 0, `ab`: expected two tokens",
    );
    check(
        "merges",
        texts(&["a b", "a c"]),
        "merge 1, `a c`: `c` is not a token",
    );
    check("merges", texts(&["b a"]), "`ba` is not a token");
    check(
        "bos_token_id",
        Some(Kv::U32(4)),
        "`tokenizer.ggml.bos_token_id`: 4 is outside",
    );
    check(
        "add_bos_token",
        Some(Kv::U32(1)),
        "expected true or false, got u32 1",
    );
    check(
        "add_bos_token",
        Some(Kv::Bool(true)),
        "`tokenizer.ggml.bos_token_id`: is missing",
    );

    let scores = |scores: &[f32]| {
        let (dir, path) = Writer::new()
            .key("tokenizer.ggml.model", Kv::Text("llama"))
            .key("tokenizer.ggml.tokens", texts(&["a", "b"]).unwrap())
            .key("tokenizer.ggml.scores", Kv::Floats(scores.into()))
            .file();
        write_tokenizer(&Gguf::open(&path).unwrap(), dir.path())
            .unwrap_err()
            .to_string()
    };
    assert!(scores(&[0.5]).contains("has 1 entries for 2 tokens"));
}
