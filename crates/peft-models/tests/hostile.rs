//! Damaged model folders: every mutation is an error or a model, never a panic.
//!
//! 256 cases a test by default; `PROPTEST_CASES=100000` for a long run.

use std::{
    fs,
    path::{Path, PathBuf},
};

use peft_core::tensors;
use peft_models::{HeadOptions, OpenOptions, Source, Task, open, open_task};
use proptest::prelude::*;

fn fixture(model: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures");
    let decoder = root.join("models").join(model);
    match decoder.exists() {
        true => decoder,
        false => root.join("tasks").join(model),
    }
}

/// A change to some bytes: overwritten, cut out, doubled, or the file cut short.
#[derive(Debug, Clone)]
enum Change {
    Set(usize, u8),
    Cut(usize, usize),
    Double(usize, usize),
    End(usize),
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        4 => (any::<usize>(), any::<u8>()).prop_map(|(at, byte)| Change::Set(at, byte)),
        1 => (any::<usize>(), 1usize..64).prop_map(|(at, len)| Change::Cut(at, len)),
        1 => (any::<usize>(), 1usize..64).prop_map(|(at, len)| Change::Double(at, len)),
        1 => any::<usize>().prop_map(Change::End),
    ]
}

/// Applies changes within the first `reach` bytes, where a header is.
fn damaged(mut bytes: Vec<u8>, changes: &[Change], reach: usize) -> Vec<u8> {
    for change in changes {
        if bytes.is_empty() {
            break;
        }
        let within = bytes.len().min(reach);
        match *change {
            Change::Set(at, byte) => bytes[at % within] = byte,
            Change::Cut(at, len) => {
                let at = at % within;
                bytes.drain(at..(at + len).min(bytes.len()));
            }
            Change::Double(at, len) => {
                let at = at % within;
                let part = bytes[at..(at + len).min(bytes.len())].to_vec();
                bytes.splice(at..at, part);
            }
            Change::End(at) => {
                let end = at % bytes.len();
                bytes.truncate(end);
            }
        }
    }
    bytes
}

/// A copy of a model folder with one file replaced.
fn with_file(model: &str, name: &str, content: &[u8]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a folder");
    for file in ["config.json", "model.safetensors"] {
        let from = fixture(model).join(file);
        if from.exists() {
            fs::copy(from, dir.path().join(file)).expect("a copy");
        }
    }
    fs::write(dir.path().join(name), content).expect("a file");
    dir
}

fn opens(dir: &Path) -> Result<(), String> {
    let name = dir.to_string_lossy();
    match open(&name, OpenOptions::default()) {
        Ok(_) => Ok(()),
        Err(error) => {
            let text = error.to_string();
            assert!(!text.is_empty());
            Err(text)
        }
    }
}

proptest! {
    #[test]
    fn weights(changes in prop::collection::vec(change(), 1..5), whole in any::<bool>()) {
        let bytes = fs::read(fixture("llama-tied").join("model.safetensors")).expect("weights");
        let reach = if whole { usize::MAX } else { 2048 };
        let bytes = damaged(bytes, &changes, reach);
        let dir = with_file("llama-tied", "model.safetensors", &bytes);
        let _ = opens(dir.path());
        let _ = tensors::read(&dir.path().join("model.safetensors"));
    }

    #[test]
    fn configurations(changes in prop::collection::vec(change(), 1..4), gpt2 in any::<bool>()) {
        let model = if gpt2 { "gpt2" } else { "qwen2-window" };
        let bytes = fs::read(fixture(model).join("config.json")).expect("a configuration");
        let dir = with_file(model, "config.json", &damaged(bytes, &changes, usize::MAX));
        let _ = opens(dir.path());
    }

    #[test]
    fn any_value_of_any_key(
        key in 0usize..64,
        value in prop_oneof![
            Just("null"), Just("true"), Just("-1"), Just("0"), Just("1e300"), Just("9223372036854775807"),
            Just("\"x\""), Just("[]"), Just("{}"), Just("0.5"), Just("[1, \"a\"]"), Just("3"),
        ],
        model in prop_oneof![
            Just("gpt2"), Just("llama-rope-yarn"), Just("llama-rope-dynamic"), Just("qwen2-window"), Just("qwen3"),
        ],
    ) {
        let text = fs::read_to_string(fixture(model).join("config.json")).expect("a configuration");
        let mut json: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        let keys: Vec<String> = json.as_object().expect("an object").keys().cloned().collect();
        json[&keys[key % keys.len()]] = serde_json::from_str(value).expect("JSON");
        let dir = with_file(model, "config.json", json.to_string().as_bytes());
        let _ = opens(dir.path());
    }
}

proptest! {
    #[test]
    fn any_value_of_any_key_of_a_head(
        key in 0usize..64,
        value in prop_oneof![
            Just("null"), Just("true"), Just("-1"), Just("0"), Just("1e300"), Just("9223372036854775807"), Just("3"),
            Just("\"x\""), Just("[]"), Just("{}"), Just("0.5"), Just("{\"0\": 1}"), Just("{\"1\": \"a\"}"),
        ],
        (model, task) in prop_oneof![
            Just(("bert-classes", Task::SeqCls)), Just(("bert-masked", Task::MaskedLm)), Just(("t5", Task::Seq2SeqLm)),
            Just(("roberta-tokens", Task::TokenCls)), Just(("llama-marks", Task::SeqCls)),
            Just(("gpt2-answers", Task::QuestionAns)), Just(("t5-gated", Task::Seq2SeqLm)),
        ],
    ) {
        let text = fs::read_to_string(fixture(model).join("config.json")).expect("a configuration");
        let mut json: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        let keys: Vec<String> = json.as_object().expect("an object").keys().cloned().collect();
        json[&keys[key % keys.len()]] = serde_json::from_str(value).expect("JSON");
        let dir = with_file(model, "config.json", json.to_string().as_bytes());
        let source = Source::Folder(dir.path().to_owned());
        if let Err(error) = open_task(&source, task, OpenOptions::default(), &HeadOptions::default()) {
            assert!(!error.to_string().is_empty());
        }
    }
}

#[test]
fn keys_of_other_tasks_that_change_numbers_are_refused_by_name() {
    let refused = |model: &str, task, key: &str, value: serde_json::Value| {
        let text = fs::read_to_string(fixture(model).join("config.json")).expect("a file");
        let mut json: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        json[key] = value;
        let dir = with_file(model, "config.json", json.to_string().as_bytes());
        let source = Source::Folder(dir.path().to_owned());
        match open_task(
            &source,
            task,
            OpenOptions::default(),
            &HeadOptions::default(),
        ) {
            Ok(_) => panic!("{model}: `{key}` is not refused"),
            Err(error) => error.to_string(),
        }
    };
    for (model, task, key, value) in [
        (
            "bert-classes",
            Task::SeqCls,
            "position_embedding_type",
            "relative_key".into(),
        ),
        ("bert-classes", Task::SeqCls, "is_decoder", true.into()),
        (
            "bert-classes",
            Task::SeqCls,
            "add_cross_attention",
            true.into(),
        ),
        (
            "bert-classes",
            Task::SeqCls,
            "problem_type",
            "ranking".into(),
        ),
        (
            "bert-classes",
            Task::SeqCls,
            "id2label",
            serde_json::json!({"1": "a", "2": "b"}),
        ),
        ("bert-classes", Task::SeqCls, "num_labels", 2.into()),
        (
            "bert-classes",
            Task::SeqCls,
            "classifier_dropout",
            1.5.into(),
        ),
        ("roberta-classes", Task::SeqCls, "pad_token_id", 61.into()),
        (
            "t5",
            Task::Seq2SeqLm,
            "feed_forward_proj",
            "gated-swishy".into(),
        ),
        ("t5", Task::Seq2SeqLm, "is_encoder_decoder", false.into()),
        (
            "t5",
            Task::Seq2SeqLm,
            "decoder_start_token_id",
            serde_json::Value::Null,
        ),
        (
            "t5",
            Task::Seq2SeqLm,
            "relative_attention_max_distance",
            3.into(),
        ),
    ] {
        let text = refused(model, task, key, value);
        assert!(text.contains(key), "`{key}` in: {text}");
    }
}

#[test]
fn errors_name_what_is_wrong() {
    let config = |change: &dyn Fn(&mut serde_json::Value)| {
        let text = fs::read_to_string(fixture("llama").join("config.json")).expect("a file");
        let mut json = serde_json::from_str(&text).expect("JSON");
        change(&mut json);
        let dir = with_file("llama", "config.json", json.to_string().as_bytes());
        opens(dir.path()).expect_err("refused")
    };
    for (text, words) in [
        (
            config(&|it| it["model_type"] = "lama".into()),
            ["model_type", "llama"],
        ),
        (
            config(&|it| it["hidden_act"] = "swishy".into()),
            ["hidden_act", "swish"],
        ),
        (
            config(&|it| it["rope_parameters"]["rope_type"] = "longrope".into()),
            ["rope_type", "yarn"],
        ),
        (
            config(&|it| it["num_key_value_heads"] = 3.into()),
            ["num_key_value_heads", "divide"],
        ),
        (
            config(&|it| it["quantization_config"] = serde_json::json!({"bits": 4})),
            ["quantization_config", "dense"],
        ),
        (
            config(&|it| it["vocab_size"] = 62.into()),
            ["model.embed_tokens.weight", "[62"],
        ),
        (
            config(&|it| it["num_hidden_layers"] = 9.into()),
            ["model.layers.3", "nearest"],
        ),
        (
            config(&|it| it["num_hidden_layers"] = 1.into()),
            ["model.layers.1", "no layer takes"],
        ),
        (
            config(&|it| it["attention_bias"] = true.into()),
            ["q_proj.bias", "lacks"],
        ),
        (
            config(&|it| it["rms_norm_eps"] = "small".into()),
            ["rms_norm_eps", "number"],
        ),
    ] {
        for word in words {
            assert!(text.contains(word), "`{word}` in: {text}");
        }
    }
}
