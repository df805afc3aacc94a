//! Every setting of AdaLoRA against the laws that any method keeps.

use peft_adalora::AdaLoraConfig;
use peft_testing::{conforms, conforms_except};
use serde_json::{Value, json};

/// Rank 3, α 7, on a biased, a transposed, a bias-free and a rounded layer; and whatever `more` says.
fn adalora(more: Value) -> Value {
    let mut json = json!({
        "peft_type": "ADALORA", "init_r": 3, "target_r": 2, "lora_alpha": 7, "total_step": 10,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    });
    for (key, value) in more.as_object().into_iter().flatten() {
        json[key] = value.clone();
    }
    json
}

#[test]
fn plain() {
    conforms::<AdaLoraConfig>(&[
        adalora(json!({})),
        adalora(json!({"target_modules": null, "init_r": 1, "target_r": 0, "lora_alpha": 0})),
        adalora(json!({"target_modules": "all-linear", "task_type": "CAUSAL_LM", "r": 4})),
        adalora(json!({"lora_dropout": 0.4, "tinit": 2, "tfinal": 3, "deltaT": 2})),
        adalora(json!({"exclude_modules": ["o_proj"], "fan_in_fan_out": true})),
        adalora(
            json!({"layers_to_transform": [1], "layers_pattern": "blocks", "orth_reg_weight": 0.0}),
        ),
    ]);
}

#[test]
fn parts_of_the_base() {
    conforms::<AdaLoraConfig>(&[
        adalora(json!({"modules_to_save": ["lm_head", "norm"]})),
        adalora(json!({"bias": "all"})),
        adalora(json!({"bias": "lora_only", "target_modules": ["q_proj", "v_proj"]})),
    ]);
}

#[test]
fn a_random_start() {
    conforms_except::<AdaLoraConfig>(
        &["fresh"],
        &[adalora(
            json!({"init_lora_weights": false, "lora_alpha": 1}),
        )],
    );
}
