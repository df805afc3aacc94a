//! What a decoder-only language model can do.
//!
//! A forward pass is two halves: the blocks, which give one vector a position,
//! and the output head, which turns a vector into a score for each token of
//! the vocabulary. They are apart because training needs the head only where
//! there is a label, and generation only at the last position.

use peft_core::{Ctx, Linear};
use tch::Tensor;

use crate::{Cache, Input, Network};

/// A language model that reads from left to right.
pub trait Decoder: Network {
    /// The blocks and the last norm: `[batch, seq] -> [batch, seq, hidden]`. With a cache, the new
    /// positions see what it holds and are added to it.
    fn hidden(&self, input: &Input, cache: Option<&mut Cache>, ctx: Ctx) -> Tensor;
    /// The output head: `[.., hidden] -> [.., vocab]`.
    fn head(&self) -> &Linear;
    /// Scores for every position: `[batch, seq] -> [batch, seq, vocab]`.
    fn forward(&self, input: &Input, ctx: Ctx) -> Tensor {
        self.head().forward(&self.hidden(input, None, ctx), ctx)
    }
}
