//! What a decoder-only language model can do.
//!
//! A forward pass is two halves: the blocks, which give one vector a position,
//! and the output head, which turns a vector into a score for each token of
//! the vocabulary. They are apart because training needs the head only where
//! there is a label, and generation only at the last position.

use peft_core::{Ctx, Linear, Model};
use tch::{Device, Kind, Tensor};

/// One batch for a decoder.
#[derive(Debug)]
pub struct Input {
    /// Token ids `[batch, seq]`, int64, each below the vocabulary size.
    pub ids: Tensor,
    /// `[batch, past + seq]`: 1 for a token, 0 for padding; `None`: all tokens.
    pub attention_mask: Option<Tensor>,
    /// `[batch or 1, seq]`; `None`: counted from the length of the cache, as `transformers` does.
    pub position_ids: Option<Tensor>,
}

impl Input {
    /// A batch without padding.
    pub fn new(ids: Tensor) -> Input {
        Input {
            ids,
            attention_mask: None,
            position_ids: None,
        }
    }
}

/// A language model that reads from left to right.
pub trait Decoder: Model {
    /// The blocks and the last norm: `[batch, seq] -> [batch, seq, hidden]`. With a cache, the new
    /// positions see what it holds and are added to it.
    fn hidden(&self, input: &Input, cache: Option<&mut Cache>, ctx: Ctx) -> Tensor;
    /// The output head: `[.., hidden] -> [.., vocab]`.
    fn head(&self) -> &Linear;
    /// Number of tokens it knows.
    fn vocab(&self) -> i64;
    /// Where its weights are.
    fn device(&self) -> Device;
    /// The dtype it computes in.
    fn kind(&self) -> Kind;
    /// The most positions it was made for.
    fn max_positions(&self) -> i64;
    /// `config.json`, as it would be saved.
    fn config(&self) -> &serde_json::Value;
    /// Scores for every position: `[batch, seq] -> [batch, seq, vocab]`.
    fn forward(&self, input: &Input, ctx: Ctx) -> Tensor {
        self.head().forward(&self.hidden(input, None, ctx), ctx)
    }
}

/// Keys and values of the positions seen so far, for each layer.
#[derive(Debug, Default)]
pub struct Cache {
    layers: Vec<Option<Kv>>,
    len: i64,
}

#[derive(Debug)]
struct Kv {
    /// `[batch, capacity, kv_heads, head_dim]`, filled up to the length of the cache.
    key: Tensor,
    value: Tensor,
}

impl Cache {
    /// An empty cache.
    pub fn new() -> Cache {
        Cache::default()
    }

    /// How many positions it holds.
    pub fn len(&self) -> i64 {
        self.len
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Forgets all positions after the first `len`.
    pub fn truncate(&mut self, len: i64) {
        self.len = self.len.min(len);
    }

    /// Adds keys and values `[batch, new, kv_heads, head_dim]` of one layer; gives all of them so far.
    ///
    /// Room is doubled when it runs out, so a text of n tokens is copied O(n) times and not O(n²).
    pub(crate) fn append(
        &mut self,
        layer: usize,
        key: &Tensor,
        value: &Tensor,
    ) -> (Tensor, Tensor) {
        if self.layers.len() <= layer {
            self.layers.resize_with(layer + 1, || None);
        }
        let size = key.size();
        let (new, total) = (size[1], self.len + size[1]);
        let slot = &mut self.layers[layer];
        let room = slot.as_ref().map_or(0, |it| it.key.size()[1]);
        if room < total {
            let capacity = (2 * total).max(64);
            let old = slot.take();
            let grow = |like: &Tensor, old: Option<&Tensor>| {
                let shape = [size[0], capacity, size[2], size[3]];
                let fresh = Tensor::empty(shape, (like.kind(), like.device()));
                if let Some(old) = old {
                    fresh
                        .narrow(1, 0, self.len)
                        .copy_(&old.narrow(1, 0, self.len));
                }
                fresh
            };
            *slot = Some(Kv {
                key: grow(key, old.as_ref().map(|it| &it.key)),
                value: grow(value, old.as_ref().map(|it| &it.value)),
            });
        }
        let kv = slot.as_ref().expect("made above");
        kv.key.narrow(1, self.len, new).copy_(key);
        kv.value.narrow(1, self.len, new).copy_(value);
        (kv.key.narrow(1, 0, total), kv.value.narrow(1, 0, total))
    }

    /// Counts the new positions, after every layer has added its own.
    pub(crate) fn advance(&mut self, new: i64) {
        self.len += new;
    }

    /// Keeps and orders the rows `[n]` of the batch, for beams or finished rows.
    pub fn select(&mut self, rows: &Tensor) {
        for kv in self.layers.iter_mut().flatten() {
            kv.key = kv.key.index_select(0, rows);
            kv.value = kv.value.index_select(0, rows);
        }
    }
}
