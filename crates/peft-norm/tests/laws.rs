//! Every setting of LN tuning against the laws that any method keeps.

use peft_norm::NormConfig;
use peft_testing::conforms;
use serde_json::{Value, json};

fn norms(more: Value) -> Value {
    let mut json = json!({"peft_type": "LN_TUNING"});
    for (key, value) in more.as_object().into_iter().flatten() {
        json[key] = value.clone();
    }
    json
}

#[test]
fn norms_of_both_kinds() {
    conforms::<NormConfig>(&[
        norms(json!({})),
        norms(json!({"target_modules": ["norm"], "task_type": "CAUSAL_LM"})),
        norms(json!({"target_modules": r"blocks\.1\.norm"})),
        norms(json!({"target_modules": ["norm"], "exclude_modules": ["blocks.0.norm"]})),
    ]);
}

#[test]
fn what_python_also_takes_for_a_norm() {
    conforms::<NormConfig>(&[
        norms(json!({"target_modules": ["norm", "embed_tokens", "lm_head"]})),
        norms(json!({"target_modules": ["k_proj", "q_proj"]})),
    ]);
}

#[test]
fn parts_of_the_base() {
    conforms::<NormConfig>(&[
        norms(json!({"modules_to_save": ["lm_head", "embed_tokens"]})),
        norms(json!({"target_modules": ["norm"], "modules_to_save": ["blocks.0.norm"]})),
    ]);
}
