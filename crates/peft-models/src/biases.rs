//! Biases that a layer has only if `config.json` says so.
//!
//! An adapter may give a layer a bias where the base has none (`lora_bias`, BitFit's `add_bias`). `transformers` reads it from a
//! merged folder if the configuration has a key for it, and else drops it without a word. A key is for several layers, so the
//! others get zeros.

use peft_core::{Error, Result};
use serde_json::{Map, Value};
use tch::{Kind, Tensor};

type Layers = &'static [&'static str];

const ATTENTION: Layers = &[
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
];
const MLP: Layers = &["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"];
const OUT_AND_MLP: Layers = &[
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
];
const BOTH: Layers = &[
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
];
const T5: Layers = &[
    "Attention.q",
    "Attention.k",
    "Attention.v",
    "Attention.o",
    "DenseReluDense.wi",
    "DenseReluDense.wi_0",
    "DenseReluDense.wi_1",
    "DenseReluDense.wo",
];

/// Which key gives which layers a bias, and which never have one.
fn rules(model_type: &str) -> (&'static [(&'static str, Layers)], Layers) {
    match model_type {
        "llama" => (&[("attention_bias", ATTENTION), ("mlp_bias", MLP)], &[]),
        "qwen3" => (&[("attention_bias", ATTENTION)], MLP),
        "qwen2" => (&[], OUT_AND_MLP),
        "mistral" => (&[], BOTH),
        "t5" => (&[], T5),
        _ => (&[], &[]),
    }
}

/// Makes `config` and `tensors` of a model agree on which of its `linear` layers, by name and width of the output, have a bias.
pub(crate) fn settle(
    config: &mut Map<String, Value>,
    tensors: &mut Vec<(String, Tensor)>,
    linear: &[(String, i64)],
) -> Result<()> {
    let model_type = config
        .get("model_type")
        .and_then(Value::as_str)
        .unwrap_or_default()
        .to_owned();
    let (told, never) = rules(&model_type);
    let bias_of = |tensors: &[(String, Tensor)], at: &str| {
        let key = format!("{at}.bias");
        tensors.iter().find(|it| it.0 == key).map(|it| it.1.kind())
    };
    for (at, _) in linear {
        let one = never.iter().any(|it| at.ends_with(it));
        // Of encoders this is a module with biases of its own.
        let head = at == "lm_head" || (at == "score" && single_scores(config));
        if (one || head) && bias_of(tensors, at).is_some() {
            let why = format!(
                "the bias that it gets has no place in a {model_type} of `transformers`, which would drop it; keep the adapter beside its base"
            );
            return Err(Error::NotMergeable {
                at: at.clone(),
                why,
            });
        }
    }
    for (key, layers) in told {
        let of_key: Vec<_> = linear
            .iter()
            .filter(|(at, _)| layers.iter().any(|it| at.ends_with(it)))
            .collect();
        let kind: Option<Kind> = of_key.iter().find_map(|(at, _)| bias_of(tensors, at));
        let Some(kind) = kind else { continue };
        for (at, width) in of_key {
            if bias_of(tensors, at).is_none() {
                tensors.push((
                    format!("{at}.bias"),
                    Tensor::zeros([*width], (kind, tch::Device::Cpu)),
                ));
            }
        }
        config.insert((*key).into(), true.into());
    }
    Ok(())
}

/// Whether the scores of a decoder are for a text as a whole, and then without a bias.
fn single_scores(config: &Map<String, Value>) -> bool {
    let class = config.get("architectures").and_then(|it| it[0].as_str());
    class.is_some_and(|it| it.ends_with("ForSequenceClassification"))
}
