//! The norms that are tuned where nothing else is said, by the type of the model: Python's table, and BERT.

/// Types of models, names.
type Table = &'static [(&'static [&'static str], &'static [&'static str])];

/// Norms within and after the blocks.
pub(crate) const TARGETS: Table = &[
    (
        &["llama", "mistral", "gemma"],
        &["input_layernorm", "post_attention_layernorm", "norm"],
    ),
    (
        &["bloom", "falcon"],
        &["input_layernorm", "post_attention_layernorm", "ln_f"],
    ),
    (
        &["llava"],
        &[
            "multi_modal_projector",
            "input_layernorm",
            "post_attention_layernorm",
            "norm",
            "embed_tokens",
            "lm_head",
        ],
    ),
    (&["t5", "mt5"], &["layer_norm", "final_layer_norm"]),
    // Not in Python's table, which has nothing for these; a saved file names them.
    (&["bert", "roberta"], &["LayerNorm"]),
    (
        &["bart"],
        &[
            "self_attn_layer_norm",
            "encoder_attn_layer_norm",
            "final_layer_norm",
        ],
    ),
    (&["gpt2"], &["ln_1", "ln_2", "ln_f"]),
    (
        &["blip-2"],
        &[
            "layernorm",
            "LayerNorm",
            "final_layer_norm",
            "self_attn_layer_norm",
        ],
    ),
    (&["gptj"], &["ln_1", "ln_f"]),
    (&["phi"], &["input_layernorm", "final_layernorm"]),
    (
        &["gemma2", "gemma3_text"],
        &[
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
            "norm",
        ],
    ),
    (&["qwen2", "qwen3"], &["post_attention_layernorm"]),
];
