//! What is refused, and what is said: the key, its value, and what would fit.

use peft_core::{Adapter, Ahead, Ctx, ModelExt, Registry, State, parse};
use peft_prefix::{PrefixConfig, begin_with_kv, prefix_from_kv};
use peft_testing::toy::{Kit, Toy};
use serde_json::{Value, json};
use tch::{Kind, Tensor};

fn toy() -> Toy {
    let kit = Kit {
        tied: false,
        lossy: false,
    };
    Toy::new(kit, 1)
}

/// The configuration is refused, when it is read or when it meets the model, and the message has these words.
fn refused(more: Value, words: &[&str]) {
    let mut json = json!({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3});
    for (key, value) in more.as_object().into_iter().flatten() {
        json[key] = value.clone();
    }
    let mut model = toy();
    let result = parse::<PrefixConfig>(json.clone()).and_then(|it| model.inject("default", &it));
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
        ("token_dim", 10), // the width of the model, and not of its keys
        ("num_attention_heads", 2),
        ("num_layers", 12),
        ("num_transformer_submodules", 2),
        ("encoder_hidden_size", 0),
    ] {
        refused(
            json!({key: value}),
            &["PREFIX_TUNING", key, &value.to_string()],
        );
    }
    refused(
        json!({"num_virtual_tokens": null}),
        &["num_virtual_tokens is not set"],
    );
}

#[test]
fn settings() {
    refused(json!({"init_weights": "ones"}), &["ones", "zero"]);
    refused(
        json!({"task_type": "SEQ_2_SEQ_LM"}),
        &["SEQ_2_SEQ_LM", "one stack"],
    );
    refused(
        json!({"modules_to_save": ["lm_haed"]}),
        &["lm_haed", "lm_head"],
    );
    refused(
        json!({"prefix_projektion": true}),
        &["prefix_projektion", "prefix_projection"],
    );
}

#[test]
fn files_of_python_cannot_be_trained_on_where_a_projection_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let config = PrefixConfig {
        prefix_projection: true,
        ..PrefixConfig::of(3)
    };
    let mut model = toy();
    model.inject("default", &config).unwrap();
    let mut adapter = Adapter::of("default", &config, &mut model).unwrap();
    adapter.trained = State::new();
    adapter.save(dir.path()).unwrap();
    let registry = Registry::default().with::<PrefixConfig>();
    let loaded = Adapter::load(dir.path(), &registry).unwrap();
    let mut again = toy();
    complains(
        loaded.resume("default", &mut again),
        &[
            "adapter_model.safetensors",
            "prompt_encoder.embedding.weight",
        ],
        "a file without its projection",
    );
    assert!(again.adapters().is_empty());
    loaded.apply("default", &mut again).unwrap();
    assert!(again.trainable("default").is_empty());
}

#[test]
fn keys_and_values_that_do_not_fit() {
    let random = |shape: [i64; 3]| Tensor::randn(shape, (Kind::Float, tch::Device::Cpu));
    let kv = |layers: usize, shape: [i64; 3]| -> Vec<(Tensor, Tensor)> {
        (0..layers)
            .map(|_| (random(shape), random(shape)))
            .collect()
    };
    let mut model = toy();
    model.inject("default", &PrefixConfig::of(4)).unwrap();
    let mut begin = |name: &str, kv: &[(Tensor, Tensor)], words: &[&str]| {
        complains(begin_with_kv(&mut model, name, kv), words, name);
    };
    begin("defualt", &kv(2, [1, 4, 3]), &["defualt", "default"]);
    begin("default", &kv(2, [1, 3, 3]), &["4 virtual tokens", "of 3"]);
    begin("default", &kv(3, [1, 4, 3]), &["[4, 12]", "[4, 18]"]);
    begin("default", &kv(2, [1, 4, 5]), &["[4, 12]", "[4, 20]"]);
    begin("default", &[], &["no keys and values"]);
    let uneven = [(random([1, 4, 3]), random([1, 5, 3]))];
    complains(prefix_from_kv(&uneven), &["values of layer 0"], "uneven");
    let flat = [(
        Tensor::ones([4], (Kind::Float, tch::Device::Cpu)),
        random([1, 4, 3]),
    )];
    complains(prefix_from_kv(&flat), &["keys of layer 0"], "flat");

    let mut model = toy();
    let projected = PrefixConfig {
        prefix_projection: true,
        ..PrefixConfig::of(4)
    };
    model.inject("default", &projected).unwrap();
    let before = model.params("default")[0].tensor.copy();
    complains(
        begin_with_kv(&mut model, "default", &kv(2, [1, 4, 3])),
        &["default", "prefix_projection", "no inverse"],
        "a projection",
    );
    assert!(before.equal(&model.params("default")[0].tensor));
}

#[test]
fn a_second_prefix_stands_behind_the_first() {
    let mut model = toy();
    model.inject("first", &PrefixConfig::of(2)).unwrap();
    model.inject("second", &PrefixConfig::of(3)).unwrap();
    let kv = model.prompt().kv(Ctx::EVAL).unwrap();
    assert_eq!(kv[0].0.size(), [1, 5, 3]);
    let second = model.prompt().adapters("second").next().unwrap();
    let Ahead::Kv(alone) = second.ahead(Ctx::EVAL) else {
        panic!("a prefix is keys and values");
    };
    assert!(kv[1].1.narrow(1, 2, 3).equal(&alone[1].1));
}
