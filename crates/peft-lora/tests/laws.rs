//! Every setting of LoRA against the laws that any method keeps.

use peft_lora::LoraConfig;
use peft_testing::{conforms, conforms_except};
use serde_json::{Value, json};

/// Rank 3, α 7, on a biased, a transposed, a bias-free and a rounded layer; and whatever `more` says.
fn lora(more: Value) -> Value {
    let mut json = json!({
        "peft_type": "LORA", "r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    });
    for (key, value) in more.as_object().into_iter().flatten() {
        json[key] = value.clone();
    }
    json
}

#[test]
fn plain() {
    conforms::<LoraConfig>(&[
        lora(json!({})),
        lora(json!({"use_rslora": true, "target_modules": null})),
        lora(json!({"target_modules": "all-linear", "r": 1, "task_type": "CAUSAL_LM"})),
        lora(json!({"lora_dropout": 0.4})),
        lora(json!({"lora_bias": true})),
        lora(
            json!({"rank_pattern": {"q_proj": 5, "blocks.1.*": 2}, "alpha_pattern": {"v_proj": 2.5}}),
        ),
        lora(
            json!({"exclude_modules": ["o_proj"], "layers_to_transform": [1], "layers_pattern": "blocks"}),
        ),
    ]);
}

#[test]
fn initialisations() {
    conforms::<LoraConfig>(&[
        lora(json!({"init_lora_weights": "gaussian"})),
        lora(json!({"init_lora_weights": "orthogonal", "r": 4})),
        lora(json!({"init_lora_weights": "pissa"})),
        lora(
            json!({"init_lora_weights": "pissa", "use_rslora": true, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 5}}),
        ),
        lora(
            json!({"init_lora_weights": "pissa", "target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
        ),
        lora(json!({"init_lora_weights": "pissa_niter_4"})),
        lora(json!({"init_lora_weights": "olora", "lora_dropout": 0.2})),
    ]);
    conforms_except::<LoraConfig>(
        &["fresh"],
        &[lora(json!({"init_lora_weights": false, "lora_bias": true}))],
    );
}

/// The norm takes no gradient by design, so gradients are not slopes.
#[test]
fn dora() {
    conforms_except::<LoraConfig>(
        &["gradient check"],
        &[
            lora(json!({"use_dora": true})),
            lora(json!({"use_dora": true, "lora_dropout": 0.3})),
            lora(json!({"use_dora": true, "bias": "all"})),
            lora(json!({"use_dora": true, "init_lora_weights": "pissa"})),
            lora(json!({"use_dora": true, "target_modules": ["embed_tokens", "lm_head"]})),
        ],
    );
}

#[test]
fn embeddings() {
    conforms::<LoraConfig>(&[
        lora(json!({"target_modules": ["embed_tokens"]})),
        lora(json!({"target_modules": ["embed_tokens", "lm_head", "q_proj"]})),
        lora(json!({"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": true})),
        lora(
            json!({"target_modules": ["lm_head"], "ensure_weight_tying": true, "init_lora_weights": "pissa"}),
        ),
        lora(json!({"trainable_token_indices": [4, 0, 22]})),
        lora(json!({"trainable_token_indices": {"embed_tokens": [3], "lm_head": [5, 6]}})),
        lora(
            json!({"trainable_token_indices": [7, 2], "target_modules": ["embed_tokens", "v_proj"]}),
        ),
    ]);
}

#[test]
fn parts_of_the_base() {
    conforms::<LoraConfig>(&[
        lora(json!({"bias": "all"})),
        lora(json!({"bias": "lora_only", "target_modules": ["q_proj", "v_proj"]})),
        lora(json!({"modules_to_save": ["lm_head", "norm"]})),
        lora(json!({"modules_to_save": ["embed_tokens", "k_proj"], "bias": "all"})),
        lora(json!({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": true})),
        lora(json!({"modules_to_save": ["blocks.0"], "target_modules": ["o_proj"]})),
    ]);
}
