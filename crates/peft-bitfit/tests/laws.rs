//! Every setting of BitFit against the laws that any method keeps.

use peft_bitfit::BitfitConfig;
use peft_testing::conforms;
use serde_json::{Value, json};

fn bitfit(more: Value) -> Value {
    let mut json = json!({"peft_type": "BITFIT"});
    for (key, value) in more.as_object().into_iter().flatten() {
        json[key] = value.clone();
    }
    json
}

#[test]
fn biases_that_are_there() {
    conforms::<BitfitConfig>(&[
        bitfit(json!({})),
        bitfit(json!({"target_modules": ["q_proj", "norm"], "task_type": "CAUSAL_LM"})),
        bitfit(json!({"target_modules": r"blocks\.0\.k.*"})),
        bitfit(json!({"target_modules": "all-linear"})),
        bitfit(json!({"exclude_modules": ["norm"]})),
    ]);
}

#[test]
fn biases_that_are_added() {
    conforms::<BitfitConfig>(&[
        bitfit(json!({"add_bias": true})),
        bitfit(json!({"add_bias": true, "target_modules": ["v_proj", "q_proj", "lm_head"]})),
    ]);
}

/// Filled in as an expression, so what is saved is another configuration, of the same meaning.
#[test]
fn parts_by_name() {
    conforms::<BitfitConfig>(&[
        bitfit(json!({"parts": ["query", "norm"]})),
        bitfit(json!({"parts": ["key", "value", "output"], "add_bias": true})),
    ]);
}

#[test]
fn parts_of_the_base() {
    conforms::<BitfitConfig>(&[
        bitfit(json!({"modules_to_save": ["lm_head", "blocks.0.norm"]})),
        bitfit(json!({"modules_to_save": ["embed_tokens", "k_proj"], "add_bias": true})),
        bitfit(json!({"modules_to_save": ["k_proj"], "target_modules": ["q_proj", "k_proj"]})),
    ]);
}
