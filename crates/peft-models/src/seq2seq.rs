//! What a model can do that reads one text and writes another.
//!
//! The encoder reads the source once, in both directions. The decoder writes from left to right, and each of its
//! layers looks at the encoder's output as well as at what was written.

use peft_core::{Ctx, Linear};
use tch::Tensor;

use crate::{Cache, Input, Network};

/// A source text, read.
#[derive(Debug)]
pub struct Encoded {
    /// `[batch, source, hidden]`
    pub states: Tensor,
    /// `[batch, source]`: 1 for a token, 0 for padding; `None`: all tokens.
    pub mask: Option<Tensor>,
}

impl Encoded {
    /// Keeps and orders the rows `[n]` of the batch.
    pub fn select(&mut self, rows: &Tensor) {
        self.states = self.states.index_select(0, rows);
        self.mask = self.mask.as_ref().map(|it| it.index_select(0, rows));
    }
}

/// A model with an encoder and a decoder.
pub trait Seq2Seq: Network {
    /// Reads the source `[batch, source]`.
    fn encode(&self, input: &Input, ctx: Ctx) -> Encoded;
    /// The vectors of the target as the head wants them: ids `[batch, target] -> [batch, target, hidden]`.
    ///
    /// mask: `[batch, past + target]`. With a cache, the new positions see what it holds and are added to it; what it
    /// took from `source` is not computed again.
    fn decode(
        &self,
        ids: &Tensor,
        mask: Option<&Tensor>,
        source: &Encoded,
        cache: Option<&mut Cache>,
        ctx: Ctx,
    ) -> Tensor;
    /// The output head: `[.., hidden] -> [.., vocab]`.
    fn head(&self) -> &Linear;
    /// The token that every target begins with.
    fn start(&self) -> i64;
    /// What the decoder reads where nobody says: labels `[batch, target]` shifted to the right, with padding where they
    /// do not count.
    fn shifted(&self, labels: &Tensor) -> Tensor;
}
