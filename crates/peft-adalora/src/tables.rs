//! The layers that AdaLoRA goes on where nothing else is said, by the type of the model: Python's table.

/// Types of models, names.
type Table = &'static [(&'static [&'static str], &'static [&'static str])];

/// Projections of the attention, and in some models the feed-forward block.
pub(crate) const TARGETS: Table = &[
    (&["t5"], &["q", "k", "v", "o", "wi", "wo"]),
    (&["mt5"], &["q", "k", "v", "o", "wi_0", "wi_1", "wo"]),
    (
        &["bart", "opt"],
        &["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    ),
    (&["gpt2", "gpt_bigcode"], &["c_attn"]),
    (&["bloom", "gpt_neox"], &["query_key_value"]),
    (
        &[
            "gptj",
            "gpt_neo",
            "llama",
            "llama4",
            "gemma",
            "gemma2",
            "gemma3_text",
            "qwen2",
            "qwen3",
        ],
        &["q_proj", "v_proj"],
    ),
    (&["bert"], &["query", "value"]),
    (&["roberta"], &["query", "key", "value", "dense"]),
    (
        &["deberta-v2"],
        &["query_proj", "key_proj", "value_proj", "dense"],
    ),
    (&["deberta"], &["in_proj"]),
    (&["nemotron_h"], &["q_proj", "k_proj", "v_proj", "o_proj"]),
];
