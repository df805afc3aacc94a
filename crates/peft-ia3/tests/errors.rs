//! What is refused, and what is said; and what only the model knows.

use peft_core::{ModelExt, Tuner, parse};
use peft_ia3::Ia3Config;
use peft_testing::toy::{Kit, Toy};
use serde_json::{Value, json};

fn toy() -> Toy {
    let kit = Kit {
        tied: false,
        lossy: false,
    };
    Toy::new(kit, 1)
}

fn ia3(more: Value) -> Value {
    let mut json = json!({"peft_type": "IA3", "target_modules": ["q_proj", "o_proj"], "feedforward_modules": ["o_proj"]});
    for (key, value) in more.as_object().into_iter().flatten() {
        json[key] = value.clone();
    }
    json
}

/// The configuration is refused, when it is read or when it meets the model, and the message has these words.
fn refused(more: Value, words: &[&str]) {
    let json = ia3(more);
    let mut model = toy();
    let result = parse::<Ia3Config>(json.clone()).and_then(|it| model.inject("default", &it));
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
fn what_does_not_fit() {
    refused(
        json!({"feedforward_modules": ["o_prj"]}),
        &[
            "feedforward_modules",
            "`o_prj`",
            "target_modules",
            "nearest is `o_proj`",
        ],
    );
    refused(
        json!({"feedforward_modules": r".*down_proj"}),
        &["feedforward_modules", "down_proj", "blocks.0.q_proj"],
    );
    refused(
        json!({"target_modules": r".*_proj", "feedforward_modules": ["donw_proj"]}),
        &["feedforward_modules", "`donw_proj`"],
    );
    refused(json!({"feedforward_modules": "(("}), &["(("]);
    refused(
        json!({"target_modules": "((", "feedforward_modules": null}),
        &["(("],
    );
    refused(
        json!({"target_modules": ["q_prj"], "feedforward_modules": null}),
        &["q_prj", "blocks.0.q_proj"],
    );
    refused(
        json!({"target_modules": ["norm", "o_proj"]}),
        &["`blocks.0.norm`", "a norm"],
    );
    refused(
        json!({"target_modules": ["embed_tokens", "o_proj"]}),
        &["`embed_tokens`", "an embedding"],
    );
    refused(
        json!({"exclude_modules": ["q_proj", "o_proj"]}),
        &["exclude_modules"],
    );
    refused(
        json!({"modules_to_save": ["lm_haed"]}),
        &["lm_haed", "lm_head"],
    );
    refused(
        json!({"layers_to_transform": [1]}),
        &["layers_to_transform", "does not offer"],
    );
    refused(
        json!({"feedforward_module": ["o_proj"]}),
        &["nearest is `feedforward_modules`"],
    );
    refused(json!({"init_ia3_weights": "ones"}), &["ones"]);
}

#[test]
fn a_model_without_defaults_says_so() {
    let mut outline = toy().outline();
    outline.spec.model_type = "mlp".to_owned();
    let said = |config: Ia3Config| config.resolve(&outline).unwrap_err().to_string();
    let error = said(Ia3Config::default());
    assert!(
        error.contains("`mlp`") && error.contains("target_modules"),
        "{error}"
    );
    let error = said(Ia3Config::on(["q_proj"]));
    assert!(
        error.contains("`mlp`") && error.contains("feedforward_modules"),
        "{error}"
    );
}

/// What is filled in can be read again, here and in Python, and means the same.
#[test]
fn what_the_model_knows_is_filled_in() {
    let resolved = |more: Value| {
        let config = parse::<Ia3Config>(ia3(more)).unwrap();
        let json = config.resolve(&toy().outline()).unwrap().to_json();
        parse::<Ia3Config>(json.clone()).unwrap();
        json
    };
    let json = resolved(json!({"target_modules": null, "feedforward_modules": null}));
    assert_eq!(
        json["target_modules"],
        json!(["k_proj", "v_proj", "down_proj"])
    );
    assert_eq!(json["feedforward_modules"], json!(["down_proj"]));
    assert_eq!(json["fan_in_fan_out"], json!(true));
    let json = resolved(json!({"feedforward_modules": null, "fan_in_fan_out": true}));
    assert_eq!(json["feedforward_modules"], json!([]));
    assert_eq!(json["fan_in_fan_out"], json!(false));

    // GPT-2's default, `mlp.c_proj`, on a target that is spelt another way.
    let mut outline = toy().outline();
    outline.spec.model_type = "gpt2".to_owned();
    for site in &mut outline.sites {
        site.at = site.at.replace("o_proj", "mlp.c_proj");
    }
    let config = Ia3Config::on(["c_proj", "q_proj"]);
    let json = config.resolve(&outline).unwrap().to_json();
    assert_eq!(json["feedforward_modules"], json!(r".*(?:mlp\.c_proj)"));
    let config = parse::<Ia3Config>(json).unwrap();
    assert!(config.scales_input("blocks.1.mlp.c_proj").unwrap());
    assert!(!config.scales_input("blocks.1.q_proj").unwrap());
}
