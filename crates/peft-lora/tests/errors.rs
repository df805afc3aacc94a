//! What is refused, and what is said: the thing, the place, and the nearest right name.

use peft_core::{ModelExt, Tuner, parse};
use peft_lora::LoraConfig;
use peft_testing::toy::{Kit, Toy};
use serde_json::{Value, json};

fn toy(tied: bool) -> Toy {
    Toy::new(Kit { tied, lossy: false }, 1)
}

fn lora(more: Value) -> Value {
    let mut json = json!({"peft_type": "LORA", "target_modules": ["q_proj"]});
    for (key, value) in more.as_object().into_iter().flatten() {
        json[key] = value.clone();
    }
    json
}

/// The configuration is refused, when it is read or when it meets the model, and the message has these words.
fn refused(more: Value, words: &[&str]) {
    let json = lora(more);
    let mut model = toy(false);
    let result = parse::<LoraConfig>(json.clone()).and_then(|it| model.inject("default", &it));
    let message = result
        .err()
        .unwrap_or_else(|| panic!("{json} is accepted"))
        .to_string();
    for word in words {
        assert!(message.contains(word), "{json}: `{message}` lacks `{word}`");
    }
    assert!(model.adapters().is_empty());
}

#[test]
fn ranges() {
    refused(json!({"r": 0}), &["rank 0", "`r`"]);
    refused(json!({"r": -4}), &["rank -4"]);
    refused(json!({"r": 4000000000i64}), &["4000000000"]);
    refused(json!({"r": "eight"}), &["eight"]);
    refused(json!({"rank_pattern": {"q_proj": 0}}), &["`q_proj`"]);
    refused(json!({"lora_dropout": 1.0}), &["lora_dropout"]);
    refused(json!({"lora_dropout": -0.1}), &["lora_dropout"]);
    refused(json!({"bias": "some"}), &["some"]);
    refused(
        json!({"init_lora_weights": "orthogonal", "r": 3}),
        &["orthogonal", "even"],
    );
    refused(
        json!({"init_lora_weights": "pissa", "r": 11}),
        &["rank 11", "blocks.0.q_proj", "10"],
    );
}

/// A value of another type is named by its key, whatever forms the key may have.
#[test]
fn mistyped_values() {
    for (key, value) in [
        ("r", json!(1.5)),
        ("r", json!("eight")),
        ("lora_alpha", json!({})),
        ("use_dora", json!("*")),
        ("rank_pattern", json!([])),
        ("target_modules", json!(3)),
        ("layers_to_transform", json!("x")),
        ("trainable_token_indices", json!("a")),
        ("exclude_modules", json!([1])),
        ("bias", json!("some")),
    ] {
        let named = format!("`{key}` is {value}: ");
        refused(json!({key: value}), &[&named]);
    }
    let message = parse::<LoraConfig>(lora(json!({"target_modules": 3}))).unwrap_err();
    assert!(!message.to_string().contains("enum"), "{message}");
}

#[test]
fn variants_that_are_not_there() {
    for init in [
        "eva",
        "corda",
        "loftq",
        "lora_ga",
        "mica",
        "pissa_niter_",
        "pissa_niter_x",
        "pisa",
    ] {
        refused(
            json!({"init_lora_weights": init}),
            &["init_lora_weights", init, "pissa_niter_N"],
        );
    }
    for (key, value) in [
        ("megatron_config", json!({"a": 1})),
        ("layer_replication", json!([[0, 2]])),
        ("eva_config", json!({"rho": 2.0})),
        ("corda_config", json!({"a": 1})),
        ("lora_ga_config", json!({"a": 1})),
        ("loftq_config", json!({"loftq_bits": 4})),
        ("velora_config", json!({"a": 1})),
        ("alora_invocation_tokens", json!([1, 2])),
        ("use_qalora", json!(true)),
        ("monteclora_config", json!({"a": 1})),
        ("target_parameters", json!(["experts.gate"])),
        ("use_bdlora", json!({"nblocks": 2})),
        ("arrow_config", json!({"top_k": 3})),
        ("kasa_config", json!({"beta": 1e-4})),
        ("use_doora", json!(true)),
    ] {
        refused(json!({key: value}), &[key]);
    }
    refused(json!({"use_doora": true}), &["use_dora"]);
}

#[test]
fn names_that_match_nothing() {
    refused(
        json!({"target_modules": ["q_prj"]}),
        &["q_prj", "blocks.0.q_proj"],
    );
    refused(json!({"target_modules": r".*\.q_prj"}), &["q_prj"]);
    refused(json!({"target_modules": "(("}), &["(("]);
    refused(json!({"target_modules": []}), &["target_modules"]);
    refused(
        json!({"target_modules": ["norm"]}),
        &["blocks.0.norm", "norm"],
    );
    refused(json!({"exclude_modules": ["q_proj"]}), &["exclude_modules"]);
    refused(
        json!({"layers_to_transform": [7]}),
        &["layers_to_transform"],
    );
    refused(
        json!({"layers_pattern": "blocks"}),
        &["layers_pattern", "layers_to_transform"],
    );
    refused(
        json!({"target_modules": ".*q_proj", "layers_to_transform": 1}),
        &["layers_to_transform"],
    );
    refused(
        json!({"rank_pattern": {"q_porj": 4}}),
        &["rank_pattern", "q_porj"],
    );
    refused(
        json!({"alpha_pattern": {"v_proj": 4}}),
        &["alpha_pattern", "v_proj"],
    );
    refused(
        json!({"modules_to_save": ["lm_haed"]}),
        &["lm_haed", "lm_head"],
    );
    refused(json!({"modules_to_save": ["q_proj"]}), &["modules_to_save"]);
}

#[test]
fn tokens() {
    refused(
        json!({"trainable_token_indices": [23]}),
        &["23", "embed_tokens", "22"],
    );
    refused(json!({"trainable_token_indices": [-1]}), &["-1"]);
    refused(json!({"trainable_token_indices": [3, 3]}), &["3", "twice"]);
    refused(json!({"trainable_token_indices": []}), &["no rows"]);
    refused(
        json!({"trainable_token_indices": {"wte": [1]}}),
        &["wte", "embed_tokens"],
    );
    refused(json!({"trainable_token_indices": {"norm": [1]}}), &["norm"]);
    let both = json!({"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]});
    refused(both, &["embed_tokens", "modules_to_save"]);
}

#[test]
fn settings_that_do_not_go_together() {
    refused(
        json!({"lora_bias": true, "use_dora": true}),
        &["lora_bias", "use_dora"],
    );
    refused(
        json!({"lora_bias": true, "init_lora_weights": "gaussian"}),
        &["lora_bias"],
    );
    refused(
        json!({"lora_bias": true, "target_modules": ["embed_tokens"]}),
        &["lora_bias", "embed_tokens"],
    );
}

#[test]
fn only_one_adapter_trains_biases() {
    let config = parse::<LoraConfig>(lora(json!({"bias": "all"}))).unwrap();
    let mut model = toy(false);
    model.inject("first", &config).unwrap();
    let error = model.inject("second", &config).unwrap_err().to_string();
    assert!(error.contains("blocks.0.norm"), "{error}");
    model.inject("second", &LoraConfig::on(["q_proj"])).unwrap();
}

#[test]
fn a_model_without_a_default_says_so() {
    let mut outline = toy(false).outline();
    outline.spec.model_type = "mlp".to_owned();
    let error = LoraConfig::default()
        .resolve(&outline)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("`mlp`") && error.contains("target_modules"),
        "{error}"
    );
}

#[test]
fn what_the_model_knows_is_filled_in() {
    let resolved = |more: Value, tied: bool| {
        let config = parse::<LoraConfig>(lora(more)).unwrap();
        config.resolve(&toy(tied).outline()).unwrap().to_json()
    };
    assert_eq!(
        resolved(json!({"target_modules": null}), false)["target_modules"],
        json!(["q_proj", "v_proj"])
    );
    let all = resolved(json!({"target_modules": "All-Linear"}), false);
    assert_eq!(all["target_modules"].as_array().map(Vec::len), Some(4));
    assert_eq!(
        resolved(json!({"target_modules": ["k_proj"]}), false)["fan_in_fan_out"],
        json!(true)
    );
    assert_eq!(
        resolved(json!({"fan_in_fan_out": true}), false)["fan_in_fan_out"],
        json!(false)
    );
    let tie = json!({"target_modules": ["lm_head"], "ensure_weight_tying": true});
    assert_eq!(
        resolved(tie.clone(), true)["target_modules"],
        json!(["embed_tokens"])
    );
    assert_eq!(resolved(tie, false)["target_modules"], json!(["lm_head"]));
}

#[test]
fn numbers_are_written_as_python_writes_them() {
    let config = LoraConfig {
        lora_alpha: 16.0,
        ..LoraConfig::default()
    };
    assert_eq!(config.to_json()["lora_alpha"], json!(16));
    let config = LoraConfig {
        lora_alpha: 2.5,
        ..LoraConfig::default()
    };
    assert_eq!(config.to_json()["lora_alpha"], json!(2.5));
}
