//! Every setting of a prefix against the laws that any method of virtual tokens keeps.

use peft_prefix::PrefixConfig;
use peft_testing::conforms_prompt;
use serde_json::{Value, json};

/// Three tokens; and whatever `more` says.
fn prefix(more: Value) -> Value {
    let mut json = json!({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3});
    for (key, value) in more.as_object().into_iter().flatten() {
        json[key] = value.clone();
    }
    json
}

#[test]
fn a_table() {
    conforms_prompt::<PrefixConfig>(&[
        prefix(json!({})),
        prefix(json!({"num_virtual_tokens": 1, "task_type": "CAUSAL_LM"})),
        prefix(json!({"init_weights": "zero", "num_virtual_tokens": 5})),
        prefix(json!({"token_dim": 3, "num_attention_heads": 1, "num_layers": 2})),
        prefix(json!({"modules_to_save": ["lm_head", "norm"]})),
    ]);
}

#[test]
fn a_projection() {
    conforms_prompt::<PrefixConfig>(&[
        prefix(json!({"prefix_projection": true})),
        prefix(
            json!({"prefix_projection": true, "encoder_hidden_size": 7, "task_type": "CAUSAL_LM"}),
        ),
        prefix(json!({"prefix_projection": true, "init_weights": "zero"})),
        prefix(json!({"prefix_projection": true, "modules_to_save": ["v_proj"]})),
    ]);
}
