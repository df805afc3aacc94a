//! T5.

use peft_core::Result;
use serde_json::Value;

use crate::{activation::Activation, config::Keys};

/// What tells one T5 from another.
#[derive(Debug, Clone)]
pub(crate) struct T5Config {
    pub(crate) vocab: i64,
    pub(crate) hidden: i64,
    pub(crate) head_dim: i64,
    pub(crate) inner: i64,
    pub(crate) layers: usize,
    pub(crate) decoder_layers: usize,
    pub(crate) heads: i64,
    pub(crate) buckets: i64,
    pub(crate) max_distance: i64,
    pub(crate) dropout: f64,
    pub(crate) eps: f64,
    pub(crate) activation: Activation,
    /// The inside of an MLP is act(W₀ x) · W₁ x, not act(W x).
    pub(crate) gated: bool,
    /// The decoder's vectors are multiplied with hidden^(−1/2) before the head.
    pub(crate) scaled: bool,
    /// The first token of the decoder.
    pub(crate) start: i64,
    pub(crate) pad: i64,
    pub(crate) json: Value,
}

impl T5Config {
    pub(crate) fn read(keys: &Keys) -> Result<T5Config> {
        if keys.flag("is_decoder", false)? {
            return Err(keys.fault("is_decoder", "but this model is an encoder and a decoder"));
        }
        if !keys.flag("is_encoder_decoder", true)? {
            let wanted = "but this model is an encoder and a decoder";
            return Err(keys.fault("is_encoder_decoder", wanted));
        }
        // `hidden_size` and so on are other names for the same keys.
        let named = |key: &str, other: &str, default: i64| -> Result<i64> {
            Ok(keys.size(key)?.or(keys.size(other)?).unwrap_or(default))
        };
        let layers = named("num_layers", "num_hidden_layers", 6)?;
        let (activation, gated) = feed_forward(keys)?;
        let vocab = keys.size("vocab_size")?.unwrap_or(32128);
        let buckets = keys.size("relative_attention_num_buckets")?.unwrap_or(32);
        if buckets < 4 {
            let wanted = "expected 4 at least: an encoder splits them in four";
            return Err(keys.fault("relative_attention_num_buckets", wanted));
        }
        let max_distance = keys.size("relative_attention_max_distance")?.unwrap_or(128);
        if max_distance <= buckets / 2 {
            let wanted = "expected more than half of relative_attention_num_buckets";
            return Err(keys.fault("relative_attention_max_distance", wanted));
        }
        let pad = match keys.json.get("pad_token_id") {
            None => 0,
            Some(_) => keys.need("pad_token_id", keys.id("pad_token_id", vocab)?)?,
        };
        let start = keys.id("decoder_start_token_id", vocab)?;
        Ok(T5Config {
            vocab,
            hidden: named("d_model", "hidden_size", 512)?,
            head_dim: named("d_kv", "head_dim", 64)?,
            inner: keys.size("d_ff")?.unwrap_or(2048),
            layers: layers as usize,
            decoder_layers: keys.size("num_decoder_layers")?.unwrap_or(layers) as usize,
            heads: named("num_heads", "num_attention_heads", 8)?,
            buckets,
            max_distance,
            dropout: keys.share("dropout_rate", 0.1)?,
            eps: keys.positive("layer_norm_epsilon", 1e-6)?,
            activation,
            gated,
            // transformers 5 writes the first key; what was saved before says it by not being tied.
            scaled: match keys.get("scale_decoder_outputs") {
                Some(_) => keys.flag("scale_decoder_outputs", true)?,
                None => keys.flag("tie_word_embeddings", true)?,
            },
            start: keys.need("decoder_start_token_id", start)?,
            pad,
            json: keys.json.clone(),
        })
    }
}

/// The activation, and whether it is a gate: `relu`, `gated-gelu`, `gated-silu`.
fn feed_forward(keys: &Keys) -> Result<(Activation, bool)> {
    let key = "feed_forward_proj";
    let text = keys.text(key)?.unwrap_or("relu");
    let (name, gated) = match text.strip_prefix("gated-") {
        Some("gelu") => ("gelu_new", true), // as transformers reads it
        Some(name) => (name, true),
        None => (text, false),
    };
    let known = Activation::NAMES.iter().map(|(name, _)| *name);
    let known: Vec<&str> = known.collect();
    let wanted = format!("expected ACTIVATION or gated-ACTIVATION of {known:?}");
    let activation = Activation::named(name).ok_or_else(|| keys.fault(key, &wanted))?;
    Ok((activation, gated))
}
