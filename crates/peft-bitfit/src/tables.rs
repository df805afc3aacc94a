//! What the parts of a block are called, by the type of the model: expressions that a whole name must match.

use peft_core::Result;

use crate::config::{BitfitConfig, Part};

/// Types of models, and for each part its expression.
type Row = (&'static [&'static str], &'static [(Part, &'static str)]);

const PARTS: &[Row] = &[
    (
        &["gpt2"],
        &[
            (Part::Output, r".*\.attn\.c_proj"),
            (Part::Mlp, r".*\.mlp\.(?:c_fc|c_proj)"),
            (Part::Norm, r".*\.ln_(?:1|2|f)"),
        ],
    ),
    (
        &["bert", "roberta", "xlm-roberta", "electra"],
        &[
            (Part::Query, r".*\.query"),
            (Part::Key, r".*\.key"),
            (Part::Value, r".*\.value"),
            (Part::Output, r".*\.attention\.output\.dense"),
            (Part::Mlp, r".*\.layer\.\d+\.(?:intermediate|output)\.dense"),
            (Part::Norm, r".*\.LayerNorm"),
        ],
    ),
    (
        &[
            "llama",
            "mistral",
            "qwen2",
            "qwen3",
            "gemma",
            "gemma2",
            "gemma3_text",
            "stablelm",
        ],
        &[
            (Part::Query, r".*\.q_proj"),
            (Part::Key, r".*\.k_proj"),
            (Part::Value, r".*\.v_proj"),
            (Part::Output, r".*\.o_proj"),
            (Part::Mlp, r".*\.(?:gate_proj|up_proj|down_proj)"),
            (Part::Norm, r".*norm"),
        ],
    ),
    (
        &["opt", "bart"],
        &[
            (Part::Query, r".*\.q_proj"),
            (Part::Key, r".*\.k_proj"),
            (Part::Value, r".*\.v_proj"),
            (Part::Output, r".*\.out_proj"),
            (Part::Mlp, r".*\.fc[12]"),
            (Part::Norm, r".*layer_?norm.*"),
        ],
    ),
    (
        &["t5", "mt5"],
        &[
            (Part::Query, r".*\.q"),
            (Part::Key, r".*\.k"),
            (Part::Value, r".*\.v"),
            (Part::Output, r".*\.o"),
            (Part::Mlp, r".*\.(?:wi|wi_0|wi_1|wo)"),
            (Part::Norm, r".*layer_norm"),
        ],
    ),
];

/// GPT-2 keeps these three in one layer with one bias.
const FUSED: (&str, &str, [Part; 3]) = (
    "gpt2",
    r".*\.attn\.c_attn",
    [Part::Query, Part::Key, Part::Value],
);

/// One expression for some parts of a model.
pub(crate) fn expression(parts: &[Part], model_type: &str) -> Result<String> {
    let row = PARTS.iter().find(|(types, _)| types.contains(&model_type));
    let Some((_, known)) = row else {
        return Err(BitfitConfig::fault(format!(
            "the parts of models of type `{model_type}` are not known; set target_modules"
        )));
    };
    let mut found = Vec::new();
    for part in parts {
        let own = known
            .iter()
            .find(|(it, _)| it == part)
            .map(|(_, text)| *text);
        let (fused_type, fused, together) = FUSED;
        let text = match own {
            Some(text) => text,
            None if model_type == fused_type && together.iter().all(|it| parts.contains(it)) => {
                fused
            }
            None => {
                return Err(BitfitConfig::fault(format!(
                    "models of type `{model_type}` have one bias for query, key and value together; name all three in parts, or none"
                )));
            }
        };
        if !found.contains(&text) {
            found.push(text);
        }
    }
    Ok(found.join("|"))
}
