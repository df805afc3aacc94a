//! Mutated real files: whatever comes in, it is rows or an error, never a panic.
//!
//! `PROPTEST_CASES=20000 cargo test -p peft-data --test fuzz` for a long run.

mod harm;

use std::fs;
use std::path::PathBuf;

use harm::{apply, cases, harms};

use peft_data::{ChatTemplate, Message, Options, RenderOptions, Tokenizer, pieces, prepare};
use proptest::prelude::*;

fn fixtures() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures")
}

fn tokenizer() -> Tokenizer {
    Tokenizer::open(&fixtures().join("tokenizer")).unwrap()
}

const ROWS: [(&str, &str); 6] = [
    (
        "a.jsonl",
        "{\"messages\": [{\"role\": \"system\", \"content\": \"s\"}, {\"role\": \"user\", \"content\": \"Grüße\"}, {\"role\": \"assistant\", \"content\": \"Hi\"}, {\"role\": \"user\", \"content\": \"x\"}, {\"role\": \"assistant\", \"content\": \"y\"}]}\n{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"assistant\", \"content\": null, \"tool_calls\": [{\"function\": {\"name\": \"f\", \"arguments\": {}}}]}], \"tools\": []}\n",
    ),
    (
        "a.jsonl",
        "{\"conversations\": [{\"from\": \"human\", \"value\": \"a\"}, {\"from\": \"gpt\", \"value\": \"b\"}], \"system\": \"s\"}\n",
    ),
    (
        "a.jsonl",
        "{\"prompt\": \"a\", \"completion\": \"b\"}\n{\"prompt\": [{\"role\": \"user\", \"content\": \"a\"}], \"completion\": [{\"role\": \"assistant\", \"content\": \"b\"}]}",
    ),
    (
        "a.json",
        "[{\"instruction\": \"a\", \"input\": \"\", \"output\": \"b\"},\n {\"instruction\": \"a\", \"output\": \"b\"}]",
    ),
    (
        "a.jsonl",
        "\u{feff}{\"text\": \"a\"}\r\n\r\n{\"text\": \"\\u00e9\"}",
    ),
    ("a.txt", "It is a truth universally acknowledged, é.\n\n"),
];

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn data_files(which in 0..ROWS.len(), template in 0..3usize, harms in harms()) {
        let (name, content) = ROWS[which];
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        fs::write(&path, apply(content.into(), &harms)).unwrap();
        let name = ["chatml", "thinking", "inst"][template];
        let source = fs::read_to_string(fixtures().join(format!("chat/templates/{name}.jinja"))).unwrap();
        let tokenizer = tokenizer().with_chat_template(source).unwrap();
        let options = Options { max_length: 64, ..Options::default() };
        if let Ok(data) = prepare(&[path], &tokenizer, &options, &|_| {}) {
            for row in data.rows() {
                prop_assert!(!row.ids.is_empty() && row.ids.len() <= 64);
                pieces(&tokenizer, row).unwrap();
            }
        }
    }

    #[test]
    fn tokenizer_files(which in 0..2usize, harms in harms()) {
        let dir = tempfile::tempdir().unwrap();
        for (at, name) in ["tokenizer.json", "tokenizer_config.json"].into_iter().enumerate() {
            let bytes = fs::read(fixtures().join("tokenizer").join(name)).unwrap();
            let bytes = if at == which { apply(bytes, &harms) } else { bytes };
            fs::write(dir.path().join(name), bytes).unwrap();
        }
        if let Ok(tokenizer) = Tokenizer::open(dir.path()) {
            let text = "Hi <|im_end|> Grüße 123";
            if let (Ok(ids), Ok((fast, _))) = (tokenizer.encode(text, true), tokenizer.encode_with_offsets(text, true)) {
                prop_assert_eq!(&ids, &fast);
                let _ = tokenizer.decode(&ids, false);
            }
            let _ = tokenizer.render(&[Message::user("a")], &RenderOptions::default());
        }
    }

    #[test]
    fn templates(which in 0..TEMPLATES.len(), harms in harms()) {
        let path = fixtures().join(format!("chat/templates/{}.jinja", TEMPLATES[which]));
        let source = apply(fs::read(path).unwrap(), &harms);
        if let Ok(template) = ChatTemplate::compile(&String::from_utf8_lossy(&source), &Default::default()) {
            let messages = [Message::user("Hello"), Message::assistant("Hi")];
            let _ = template.render(&messages, &RenderOptions::default());
        }
    }

    #[test]
    fn the_fast_way_gives_the_same_ids(text in text(), config in 0..CONFIGS.len()) {
        thread_local! {
            static TOKENIZERS: Vec<Tokenizer> = CONFIGS.iter().map(configured).collect();
        }
        TOKENIZERS.with(|tokenizers| {
            let tokenizer = &tokenizers[config];
            for special in [false, true] {
                let (ids, offsets) = tokenizer.encode_with_offsets(&text, special).unwrap();
                prop_assert_eq!(&ids, &tokenizer.encode(&text, special).unwrap(), "{:?}", text);
                prop_assert!(offsets.iter().all(|(start, end)| start <= end && *end <= text.len()));
            }
            Ok(())
        })?;
    }
}

const TEMPLATES: [&str; 9] = [
    "chatml",
    "chatml_tools",
    "thinking",
    "headers",
    "inst",
    "zephyr",
    "turns",
    "ends",
    "generation",
];

/// Text made of what the patterns tell apart.
fn text() -> impl Strategy<Value = String> {
    let parts = vec![
        "a",
        "the",
        " the",
        "Hello",
        "'s",
        "'LL",
        "'ve",
        "'",
        "ſ",
        "1",
        "23",
        "½",
        "٣",
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "\u{a0}",
        "\u{2003}",
        "\u{85}",
        "\u{1c}",
        "!",
        "--",
        " ?",
        "é",
        "e\u{301}",
        "你好",
        "👩‍🚀",
        "<|im_end|>",
        "<|im_start|>",
        "<|im",
        "\0",
        "K",
        "İ",
        "ß",
        "_",
        "\u{200b}",
        "\u{fffd}",
        "supercalifragilistic",
    ];
    let known =
        prop::collection::vec(prop::sample::select(parts), 0..24).prop_map(|parts| parts.concat());
    prop_oneof![3 => known, 1 => any::<String>(), 1 => "[a-z ]{0,600}"]
}

/// Pre-tokenizer and normaliser of the kinds that the fast way takes on.
const CONFIGS: [(&str, &str); 5] = [
    (
        r#"{"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}"#,
        "null",
    ),
    (
        r#"{"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": true}, {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}]}"#,
        "null",
    ),
    (
        r#"{"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"}, "behavior": "Isolated", "invert": false}, {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}]}"#,
        "null",
    ),
    (
        r#"{"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"}, "behavior": "Isolated", "invert": false}, {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}]}"#,
        r#"{"type": "NFC"}"#,
    ),
    (
        r#"{"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": false}"#,
        "null",
    ),
];

fn configured((pre, normalizer): &(&str, &str)) -> Tokenizer {
    let dir = tempfile::tempdir().unwrap();
    let bytes = fs::read(fixtures().join("tokenizer/tokenizer.json")).unwrap();
    let mut json: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
    json["pre_tokenizer"] = serde_json::from_str(pre).unwrap();
    json["normalizer"] = serde_json::from_str(normalizer).unwrap();
    fs::write(dir.path().join("tokenizer.json"), json.to_string()).unwrap();
    Tokenizer::open(dir.path()).unwrap()
}
