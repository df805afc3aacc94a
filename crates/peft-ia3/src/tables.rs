//! The layers that (IA)³ goes on where nothing else is said, by the type of the model: Python's tables.

/// Types of models, names.
type Table = &'static [(&'static [&'static str], &'static [&'static str])];

/// Keys, values and the last layer of the feed-forward block.
pub(crate) const TARGETS: Table = &[
    (&["t5"], &["k", "v", "wo"]),
    (&["mt5"], &["k", "v", "wi_1"]),
    (&["gpt2", "gpt_bigcode"], &["c_attn", "mlp.c_proj"]),
    (&["bloom"], &["query_key_value", "mlp.dense_4h_to_h"]),
    (&["roberta", "bert"], &["key", "value", "output.dense"]),
    (&["opt"], &["q_proj", "k_proj", "fc2"]),
    (&["gptj"], &["q_proj", "v_proj", "fc_out"]),
    (
        &["gpt_neox", "RefinedWebModel", "RefinedWeb", "falcon"],
        &["query_key_value", "dense_4h_to_h"],
    ),
    (&["gpt_neo"], &["q_proj", "v_proj", "c_proj"]),
    (&["bart", "phi"], &["q_proj", "v_proj", "fc2"]),
    (&["llama", "mistral"], &["k_proj", "v_proj", "down_proj"]),
    (
        &["llama4", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"],
        &["q_proj", "v_proj", "down_proj"],
    ),
    (&["mixtral"], &["k_proj", "v_proj", "w2"]),
    (&["deberta-v2"], &["key_proj", "value_proj", "output.dense"]),
    (&["deberta"], &["in_proj", "output.dense"]),
];

/// Those of them whose input is scaled.
pub(crate) const FEEDFORWARD: Table = &[
    (&["t5"], &["wo"]),
    (&["mt5"], &[]),
    (&["gpt2", "gpt_bigcode"], &["mlp.c_proj"]),
    (&["bloom"], &["mlp.dense_4h_to_h"]),
    (
        &["roberta", "bert", "deberta-v2", "deberta"],
        &["output.dense"],
    ),
    (&["opt", "bart", "phi"], &["fc2"]),
    (&["gptj"], &["fc_out"]),
    (
        &["gpt_neox", "RefinedWeb", "RefinedWebModel", "falcon"],
        &["dense_4h_to_h"],
    ),
    (&["gpt_neo"], &["c_proj"]),
    (
        &[
            "llama",
            "llama4",
            "mistral",
            "gemma",
            "gemma2",
            "gemma3_text",
            "qwen2",
            "qwen3",
        ],
        &["down_proj"],
    ),
    (&["mixtral"], &["w2"]),
];
