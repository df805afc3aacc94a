//! Biases that a layer has only if `config.json` says so.
//!
//! An adapter may give a layer a bias where the base has none (`lora_bias`, BitFit's `add_bias`). `transformers` reads it from a
//! merged folder if the configuration has a key for it, and else drops it without a word. A key is for several layers, so the
//! others get zeros.

use std::collections::HashMap;

use peft_core::{Error, Result};
use serde_json::{Map, Value};
use tch::{Device, Kind, Tensor};

/// Ends of names.
type Layers = &'static [&'static str];

const ATTENTION: Layers = &["attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj"];
const OUT: Layers = &["attn.o_proj"];
const MLP: Layers = &["gate_proj", "up_proj", "down_proj"];
const T5: Layers = &[
    "Attention.q",
    "Attention.k",
    "Attention.v",
    "Attention.o",
    "wi",
    "wi_0",
    "wi_1",
    "wo",
];

/// Which key gives which layers a bias, and which never have one.
fn rules(model_type: &str) -> (&'static [(&'static str, Layers)], &'static [Layers]) {
    match model_type {
        "llama" => (&[("attention_bias", ATTENTION), ("mlp_bias", MLP)], &[]),
        "qwen3" => (&[("attention_bias", ATTENTION)], &[MLP]),
        "qwen2" => (&[], &[OUT, MLP]),
        "mistral" => (&[], &[ATTENTION, MLP]),
        "t5" => (&[], &[T5]),
        _ => (&[], &[]),
    }
}

/// Makes `config` and `tensors` of a model agree on which of its `linear` layers, by name and width of the output, have a bias.
pub(crate) fn settle(
    config: &mut Map<String, Value>,
    tensors: &mut Vec<(String, Tensor)>,
    linear: &[(String, i64)],
) -> Result<()> {
    let model_type = config.get("model_type").and_then(Value::as_str);
    let model_type = model_type.unwrap_or_default().to_owned();
    let (told, never) = rules(&model_type);
    let is = |at: &str, layers: Layers| layers.iter().any(|it| at.ends_with(it));
    let found: HashMap<&str, Kind> = tensors
        .iter()
        .filter_map(|(key, it)| Some((key.strip_suffix(".bias")?, it.kind())))
        .collect();
    for (at, _) in linear.iter().filter(|it| found.contains_key(&*it.0)) {
        // Of RoBERTa the head is a module with biases of its own.
        let head = at == "lm_head" || (at == "score" && scores_a_text(config));
        if head || never.iter().any(|layers| is(at, layers)) {
            let why = format!(
                "the bias that it gets has no place in a {model_type} of `transformers`, which would drop it; keep the adapter beside its base"
            );
            return Err(Error::NotMergeable {
                at: at.clone(),
                why,
            });
        }
    }
    let mut zeros = Vec::new();
    for (key, layers) in told {
        let those = || linear.iter().filter(|(at, _)| is(at, layers));
        let Some(kind) = those().find_map(|(at, _)| found.get(&**at)) else {
            continue;
        };
        for (at, width) in those().filter(|it| !found.contains_key(&*it.0)) {
            let bias = Tensor::zeros([*width], (*kind, Device::Cpu));
            zeros.push((format!("{at}.bias"), bias));
        }
        config.insert((*key).into(), true.into());
    }
    tensors.append(&mut zeros);
    Ok(())
}

/// Whether the scores of a decoder are those of a text as a whole, which are without a bias.
fn scores_a_text(config: &Map<String, Value>) -> bool {
    let class = config.get("architectures").and_then(|it| it[0].as_str());
    class.is_some_and(|it| it.ends_with("ForSequenceClassification"))
}
