//! A model without its head: embeddings, blocks and the last norm.
//!
//! hidden: `[batch, seq] -> [batch, seq, hidden]`
//!
//! Each model is written once, as a body; a head on it makes it a model for a task. A body asks a
//! [`Weights`] for its layers and does not know whether they are dense or quantised, plain or adapted.

use std::fmt::Debug;

use peft_core::{
    Ctx, Dense, Embedding, Error, Linear, Norm, NormKind, PromptSlot, Result, Slot, Spec, Weights,
};
use serde_json::Value;
use tch::Tensor;

use crate::{Cache, Input, input::Sizes};

/// Called with the name and the place of each layer.
pub(crate) type Visitor<'a> = &'a mut dyn FnMut(&str, Slot<'_>);

/// A model without its head.
pub(crate) trait Body: Debug + Send {
    /// A vector for each position: `[batch, seq] -> [batch, seq, hidden]`. With a cache, the new positions see what
    /// it holds and are added to it.
    fn hidden(&self, input: &Input, cache: Option<&mut Cache>, ctx: Ctx) -> Tensor;
    /// The place for virtual tokens.
    fn prompt(&self) -> &PromptSlot;
    /// The table of the tokens.
    fn table(&self) -> &Embedding;
    /// How large its tables are.
    fn sizes(&self) -> Sizes;
    /// `config.json`.
    fn config(&self) -> &Value;
    /// Sizes and names, where the body's own begin with `root`; nothing is said of a head.
    fn spec(&self, root: &str) -> Spec;
    /// The longest row that it reads: virtual tokens in front of it take places away.
    fn longest(&self) -> i64 {
        self.sizes().longest - self.prompt().tokens()
    }
    /// Visits every place under the name that `named_modules()` gives it behind `root`, in that order; the place for
    /// virtual tokens first.
    fn slots(&mut self, root: &str, visit: Visitor<'_>);
}

/// With which of `roots` the names of the body begin in a checkpoint; a bare model has none.
pub(crate) fn root(weights: &dyn Weights, roots: &[&'static str], probe: &str) -> &'static str {
    let found = roots.iter().find(|it| weights.has(&format!("{it}{probe}")));
    found.copied().unwrap_or("")
}

/// A LayerNorm; the oldest checkpoints call its vectors `gamma` and `beta`.
pub(crate) fn layer_norm(w: &mut dyn Weights, at: &str, width: i64, eps: f64) -> Result<Norm> {
    let old = w.has(&format!("{at}.gamma"));
    let [weight, bias] = if old {
        ["gamma", "beta"]
    } else {
        ["weight", "bias"]
    };
    let weight = w.tensor(&format!("{at}.{weight}"), &[width])?;
    let bias = w.tensor(&format!("{at}.{bias}"), &[width])?;
    Ok(Norm::new(NormKind::Layer, weight, Some(bias), eps))
}

/// An RMSNorm.
pub(crate) fn rms_norm(w: &mut dyn Weights, at: &str, width: i64, eps: f64) -> Result<Norm> {
    let weight = w.tensor(&format!("{at}.weight"), &[width])?;
    Ok(Norm::new(NormKind::Rms, weight, None, eps))
}

/// An embedding table `[rows, width]`.
pub(crate) fn table(w: &mut dyn Weights, at: &str, rows: i64, width: i64) -> Result<Embedding> {
    let weight = w.tensor(&format!("{at}.weight"), &[rows, width])?;
    Ok(Embedding::new(weight))
}

/// The output layer over the vocabulary called `at`: a weight of its own, or the table of the input embedding.
pub(crate) fn output(
    weights: &mut dyn Weights,
    at: &str,
    embed: &Tensor,
    tied: bool,
    bias: Option<Tensor>,
) -> Result<Linear> {
    let key = format!("{at}.weight");
    let size = embed.size();
    let weight = match tied {
        false if bias.is_none() => return weights.linear(at, (size[0], size[1]), false),
        false => weights.tensor(&key, &size)?,
        true => {
            if weights.has(&key) && !weights.tensor(&key, &size)?.equal(embed) {
                return Err(Error::Config {
                    peft_type: "model".into(),
                    reason: format!(
                        "`tie_word_embeddings` is true, but `{key}` differs from the input embedding"
                    ),
                });
            }
            embed.shallow_clone()
        }
    };
    Ok(Linear::new(Dense::new(weight, bias)))
}

/// Drops some numbers in training.
pub(crate) fn dropout(x: Tensor, p: f64, ctx: Ctx) -> Tensor {
    if ctx.train && p > 0.0 {
        x.dropout(p, true)
    } else {
        x
    }
}
