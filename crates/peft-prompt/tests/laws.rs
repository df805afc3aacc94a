//! Every setting against the laws that any method of virtual tokens keeps.

use peft_prompt::{PromptConfig, PtuningConfig};
use peft_testing::conforms_prompt;
use serde_json::{Value, json};

/// Three tokens; and whatever `more` says.
fn tokens(tag: &str, more: Value) -> Value {
    let mut json = json!({"peft_type": tag, "num_virtual_tokens": 3});
    for (key, value) in more.as_object().into_iter().flatten() {
        json[key] = value.clone();
    }
    json
}

#[test]
fn prompts() {
    let prompt = |more| tokens("PROMPT_TUNING", more);
    conforms_prompt::<PromptConfig>(&[
        prompt(json!({})),
        prompt(json!({"num_virtual_tokens": 1, "task_type": "CAUSAL_LM"})),
        prompt(json!({"prompt_tuning_init": "SAMPLE_VOCAB", "num_virtual_tokens": 30})),
        prompt(json!({"token_dim": 10, "num_attention_heads": 2, "num_layers": 2})),
        prompt(json!({"modules_to_save": ["lm_head", "norm"]})),
    ]);
}

#[test]
fn mlps() {
    let ptuning = |more| tokens("P_TUNING", more);
    conforms_prompt::<PtuningConfig>(&[
        ptuning(json!({})),
        ptuning(json!({"encoder_hidden_size": 7, "task_type": "CAUSAL_LM"})),
        ptuning(json!({"modules_to_save": ["k_proj"], "num_virtual_tokens": 1})),
    ]);
}

#[test]
fn lstms() {
    let lstm = |more: Value| {
        let mut json = tokens(
            "P_TUNING",
            json!({"encoder_reparameterization_type": "LSTM"}),
        );
        for (key, value) in more.as_object().into_iter().flatten() {
            json[key] = value.clone();
        }
        json
    };
    conforms_prompt::<PtuningConfig>(&[
        lstm(json!({})),
        lstm(json!({"encoder_num_layers": 1, "encoder_hidden_size": 7})),
        lstm(json!({"encoder_num_layers": 3, "encoder_hidden_size": 5, "encoder_dropout": 0.4})),
    ]);
}
