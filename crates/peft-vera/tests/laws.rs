//! Every setting of VeRA against the laws that any method keeps.

use peft_testing::{conforms, conforms_except};
use peft_vera::VeraConfig;
use serde_json::{Value, json};

/// Rank 3 on a biased, a transposed, a bias-free and a rounded layer of different widths; and whatever `more` says.
fn vera(more: Value) -> Value {
    let mut json = json!({
        "peft_type": "VERA", "r": 3, "d_initial": 0.3, "projection_prng_key": 5,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    });
    for (key, value) in more.as_object().into_iter().flatten() {
        json[key] = value.clone();
    }
    json
}

#[test]
fn plain() {
    conforms::<VeraConfig>(&[
        vera(json!({})),
        vera(json!({"save_projection": false, "task_type": "CAUSAL_LM"})),
        vera(json!({"target_modules": null, "r": 1})),
        vera(json!({"target_modules": "all-linear"})),
        vera(json!({"vera_dropout": 0.4, "d_initial": 0.1})),
        vera(json!({"layers_to_transform": 1, "layers_pattern": "blocks", "fan_in_fan_out": true})),
    ]);
}

#[test]
fn parts_of_the_base() {
    conforms::<VeraConfig>(&[
        vera(json!({"modules_to_save": ["lm_head", "norm"]})),
        vera(json!({"bias": "all", "save_projection": false})),
        vera(json!({"bias": "vera_only", "target_modules": ["q_proj", "v_proj"]})),
        vera(json!({"modules_to_save": ["k_proj"], "bias": "all"})),
    ]);
}

#[test]
fn a_random_start() {
    conforms_except::<VeraConfig>(&["fresh"], &[vera(json!({"init_weights": false}))]);
}
