//! What is refused, and what is said: the key, its value, and what would fit.

use peft_core::{Adapter, Config, ModelExt, Registry, State, Tuner, parse};
use peft_prompt::{PromptConfig, PtuningConfig};
use peft_testing::toy::{Kit, Toy};
use serde_json::{Value, json};

fn toy() -> Toy {
    let kit = Kit {
        tied: false,
        lossy: false,
    };
    Toy::new(kit, 1)
}

/// The configuration is refused, when it is read or when it meets the model, and the message has these words.
fn refused<C: Config>(more: Value, words: &[&str]) {
    let mut json = json!({"peft_type": C::PEFT_TYPE, "num_virtual_tokens": 3});
    for (key, value) in more.as_object().into_iter().flatten() {
        json[key] = value.clone();
    }
    let mut model = toy();
    let result = parse::<C>(json.clone()).and_then(|it| model.inject("default", &it));
    complains(result, words, &json.to_string());
    assert!(model.adapters().is_empty());
}

fn complains<T>(result: peft_core::Result<T>, words: &[&str], what: &str) {
    let error = result.err();
    let message = error
        .unwrap_or_else(|| panic!("{what} is accepted"))
        .to_string();
    for word in words {
        assert!(message.contains(word), "{what}: `{message}` lacks `{word}`");
    }
}

#[test]
fn sizes() {
    for (key, value) in [
        ("num_virtual_tokens", 0),
        ("num_virtual_tokens", 70_000),
        ("token_dim", -1),
        ("token_dim", 768),
        ("num_transformer_submodules", 2),
    ] {
        let (more, value) = (json!({key: value}), value.to_string());
        refused::<PromptConfig>(more.clone(), &["PROMPT_TUNING", key, &value]);
        refused::<PtuningConfig>(more, &["P_TUNING", key, &value]);
    }
    refused::<PromptConfig>(
        json!({"num_virtual_tokens": null}),
        &["num_virtual_tokens is not set"],
    );
    refused::<PtuningConfig>(
        json!({"encoder_hidden_size": 0}),
        &["encoder_hidden_size is 0"],
    );
    refused::<PtuningConfig>(
        json!({"encoder_num_layers": 65}),
        &["encoder_num_layers is 65"],
    );
}

#[test]
fn tasks() {
    refused::<PromptConfig>(
        json!({"task_type": "SEQ_2_SEQ_LM"}),
        &["SEQ_2_SEQ_LM", "one stack"],
    );
    refused::<PtuningConfig>(
        json!({"modules_to_save": ["lm_haed"]}),
        &["lm_haed", "lm_head"],
    );
}

#[test]
fn beginnings() {
    refused::<PromptConfig>(
        json!({"prompt_tuning_init": "EXACT"}),
        &["EXACT", "SAMPLE_VOCAB"],
    );
    let text = json!({"prompt_tuning_init": "TEXT"});
    refused::<PromptConfig>(text.clone(), &["TEXT", "tokenizer_name_or_path"]);
    let mut with = text;
    with["tokenizer_name_or_path"] = json!("t5-base");
    refused::<PromptConfig>(with.clone(), &["TEXT", "prompt_tuning_init_text"]);
    with["prompt_tuning_init_text"] = json!("Classify:");
    refused::<PromptConfig>(with, &["TEXT", "PromptConfig::with_text", "init_ids"]);
    refused::<PromptConfig>(
        json!({"tokenizer_kwargs": {"use_fast": false}}),
        &["tokenizer_kwargs", "TEXT"],
    );
    let labels = json!({"label_words": ["good", "bad"]});
    refused::<PromptConfig>(
        labels.clone(),
        &["label_words", "PromptConfig::with_labels"],
    );
    let mut sampled = labels;
    sampled["prompt_tuning_init"] = json!("SAMPLE_VOCAB");
    refused::<PromptConfig>(sampled, &["label_words", "RANDOM"]);

    let begin = |config: PromptConfig, words: &[&str]| {
        complains(
            toy().inject("default", &config),
            words,
            &config.to_json().to_string(),
        );
    };
    let text = |ids: &[i64]| PromptConfig::of(3).with_text("a text", "a tokenizer", ids);
    begin(text(&[4, 23]), &["token 23", "vocabulary of 23"]);
    begin(text(&[-1]), &["token -1"]);
    begin(text(&[]), &["no tokens"]);
    let labels: [(&str, &[i64]); 2] = [("good", &[3]), ("bad", &[5])];
    begin(
        PromptConfig::of(1).with_labels(&labels),
        &["2 label_words", "1 virtual tokens"],
    );
    begin(
        PromptConfig::of(3).with_labels(&[("good", &[])]),
        &["no tokens"],
    );
    let mut uneven = PromptConfig::of(3).with_labels(&labels);
    uneven.init_ids = Some(vec![vec![1]]);
    begin(uneven, &["2 label_words", "init_ids for 1"]);
}

#[test]
fn settings_that_would_do_nothing_in_a_training() {
    refused::<PtuningConfig>(
        json!({"encoder_num_layers": 3}),
        &["encoder_num_layers is 3", "MLP", "LSTM"],
    );
    refused::<PtuningConfig>(
        json!({"encoder_dropout": 0.1}),
        &["encoder_dropout is 0.1", "MLP", "LSTM"],
    );
    refused::<PtuningConfig>(
        json!({"encoder_dropout": 0.1, "encoder_num_layers": 1, "encoder_reparameterization_type": "LSTM"}),
        &["encoder_dropout is 0.1", "encoder_num_layers is 1"],
    );
    refused::<PtuningConfig>(json!({"encoder_dropout": 1.0}), &["not in 0..1"]);
    refused::<PtuningConfig>(
        json!({"encoder_reparameterization_type": "GRU"}),
        &["GRU", "MLP", "LSTM"],
    );
    // A file that says so was trained without them, and means what its rows say.
    let json = json!({"peft_type": "P_TUNING", "num_virtual_tokens": 3, "encoder_dropout": 0.1});
    let mut model = toy();
    let config = parse::<PtuningConfig>(json.clone()).unwrap();
    let quiet = PtuningConfig::of(3);
    model.inject("default", &quiet).unwrap();
    let mut adapter = Adapter::of("default", &quiet, &mut model).unwrap();
    adapter.tuner = Box::new(config);
    adapter.apply("default", &mut toy()).unwrap();
}

#[test]
fn files_of_python_cannot_be_trained_on_where_an_encoder_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let config = PtuningConfig::of(3);
    let mut model = toy();
    model.inject("default", &config).unwrap();
    let mut adapter = Adapter::of("default", &config, &mut model).unwrap();
    adapter.trained = State::new();
    adapter.save(dir.path()).unwrap();
    let registry = Registry::default().with::<PtuningConfig>();
    let loaded = Adapter::load(dir.path(), &registry).unwrap();
    let mut again = toy();
    complains(
        loaded.resume("default", &mut again),
        &[
            "adapter_model.safetensors",
            "prompt_encoder.embedding.weight",
        ],
        "a file without its encoder",
    );
    assert!(again.adapters().is_empty());
    loaded.apply("default", &mut again).unwrap();
}

#[test]
fn a_file_of_another_size_is_refused() {
    let config = PromptConfig::of(3);
    let mut model = toy();
    model.inject("default", &config).unwrap();
    let mut adapter = Adapter::of("default", &config, &mut model).unwrap();
    let rows = adapter.state["prompt_embeddings"].narrow(0, 0, 2).copy();
    adapter.state.insert("prompt_embeddings".to_owned(), rows);
    let mut again = toy();
    complains(
        adapter.apply("default", &mut again),
        &["prompt_embeddings", "[3, 10]", "[2, 10]"],
        "two rows of three",
    );
    assert!(again.adapters().is_empty());
    adapter.state = State::new();
    complains(
        adapter.apply("default", &mut again),
        &["lacks `prompt_embeddings`"],
        "no rows",
    );
}

#[test]
fn a_label_word_is_saved_as_random_beside_a_key_of_our_own() {
    let json = PromptConfig::default()
        .with_labels(&[("good", &[3]), ("bad", &[5])])
        .to_json();
    assert_eq!(json["prompt_tuning_init"], "RANDOM");
    assert_eq!(json["label_words"], json!(["good", "bad"]));
    assert!(json.get("init_ids").is_none());
    let plain = PromptConfig::of(3).to_json();
    assert!(
        plain.get("label_words").is_none(),
        "Python would warn of it"
    );
    // What is loaded needs no tokenizer.
    let read = parse::<PromptConfig>(json).unwrap();
    let mut model = toy();
    let labels = PromptConfig::default().with_labels(&[("good", &[3]), ("bad", &[5])]);
    model.inject("default", &labels).unwrap();
    let mut adapter = Adapter::of("default", &labels, &mut model).unwrap();
    adapter.tuner = Box::new(read);
    adapter.apply("default", &mut toy()).unwrap();
}
