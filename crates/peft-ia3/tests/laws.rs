//! Every setting of (IA)³ against the laws that any method keeps.

use peft_ia3::Ia3Config;
use peft_testing::{conforms, conforms_except};
use serde_json::{Value, json};

/// A biased, a transposed, a bias-free and a rounded layer, the last two with a scaled input; and whatever `more` says.
fn ia3(more: Value) -> Value {
    let mut json = json!({
        "peft_type": "IA3", "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "feedforward_modules": ["v_proj", "o_proj"],
    });
    for (key, value) in more.as_object().into_iter().flatten() {
        json[key] = value.clone();
    }
    json
}

#[test]
fn plain() {
    conforms::<Ia3Config>(&[
        ia3(json!({})),
        ia3(json!({"feedforward_modules": []})),
        ia3(
            json!({"feedforward_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "task_type": "CAUSAL_LM"}),
        ),
        ia3(json!({"feedforward_modules": r".*\.1\.o_proj"})),
        ia3(json!({"target_modules": r".*_proj", "feedforward_modules": ["o_proj"]})),
        ia3(json!({"target_modules": "all-linear", "feedforward_modules": null})),
        ia3(json!({"target_modules": null, "feedforward_modules": null})),
        ia3(json!({"exclude_modules": ["o_proj"], "fan_in_fan_out": true})),
        ia3(json!({"target_modules": ["lm_head", "q_proj"], "feedforward_modules": ["lm_head"]})),
    ]);
}

#[test]
fn parts_of_the_base() {
    conforms::<Ia3Config>(&[
        ia3(json!({"modules_to_save": ["lm_head", "norm"]})),
        ia3(json!({"modules_to_save": ["embed_tokens", "k_proj"]})),
    ]);
}

#[test]
fn a_random_start() {
    conforms_except::<Ia3Config>(&["fresh"], &[ia3(json!({"init_ia3_weights": false}))]);
}
