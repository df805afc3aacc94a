//! BERT and RoBERTa.

use peft_core::Result;
use serde_json::Value;

use crate::{activation::Activation, config::Keys};

/// What tells one BERT or RoBERTa from another.
#[derive(Debug, Clone)]
pub(crate) struct BertConfig {
    pub(crate) model_type: String,
    pub(crate) vocab: i64,
    pub(crate) hidden: i64,
    pub(crate) intermediate: i64,
    pub(crate) layers: usize,
    pub(crate) heads: i64,
    pub(crate) activation: Activation,
    /// Rows of the table of positions.
    pub(crate) positions: i64,
    pub(crate) token_types: i64,
    pub(crate) eps: f64,
    pub(crate) hidden_dropout: f64,
    pub(crate) attention_dropout: f64,
    /// RoBERTa counts positions from behind this token's number, and only over tokens that are not it.
    pub(crate) padding: Option<i64>,
    /// [`Keys::padding_idx`].
    pub(crate) padding_idx: Option<i64>,
    pub(crate) json: Value,
}

impl BertConfig {
    pub(crate) fn read(keys: &Keys) -> Result<BertConfig> {
        let model_type = keys.text("model_type")?.unwrap_or_default().to_owned();
        for key in ["is_decoder", "add_cross_attention"] {
            if keys.flag(key, false)? {
                return Err(keys.fault(
                    key,
                    "but this model reads in both directions, as an encoder",
                ));
            }
        }
        let kind = keys.text("position_embedding_type")?;
        if kind.is_some_and(|it| it != "absolute") {
            let wanted = "but positions are looked up in a table here, as in `absolute`";
            return Err(keys.fault("position_embedding_type", wanted));
        }
        let size =
            |key: &str, default: i64| -> Result<i64> { Ok(keys.size(key)?.unwrap_or(default)) };
        let (hidden, heads) = (size("hidden_size", 768)?, size("num_attention_heads", 12)?);
        if hidden % heads != 0 {
            return Err(keys.fault("hidden_size", "which num_attention_heads does not divide"));
        }
        let roberta = model_type == "roberta";
        let positions = size("max_position_embeddings", 512)?;
        let vocab = size("vocab_size", if roberta { 50265 } else { 30522 })?;
        let padding = match roberta {
            true => Some(keys.id("pad_token_id", vocab)?.unwrap_or(1)),
            false => None,
        };
        if padding.is_some_and(|it| it + 1 >= positions) {
            return Err(keys.fault("pad_token_id", "which leaves no positions behind it"));
        }
        Ok(BertConfig {
            padding_idx: keys.padding_idx(vocab, Some(if roberta { 1 } else { 0 }))?,
            vocab,
            hidden,
            intermediate: size("intermediate_size", 3072)?,
            layers: size("num_hidden_layers", 12)? as usize,
            heads,
            activation: keys.activation("hidden_act", "gelu")?,
            positions,
            token_types: size("type_vocab_size", 2)?,
            eps: keys.positive("layer_norm_eps", 1e-12)?,
            hidden_dropout: keys.share("hidden_dropout_prob", 0.1)?,
            attention_dropout: keys.share("attention_probs_dropout_prob", 0.1)?,
            padding,
            model_type,
            json: keys.json.clone(),
        })
    }
}
