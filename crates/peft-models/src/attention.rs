//! Scaled-dot-product attention: softmax(q kᵀ · scale + mask) v.
//!
//! Position i of the new ones sees what the cache holds and the new ones up to
//! itself, unless a mask hides padding or a window hides what is too long ago.
//! The plain case needs no mask at all; any other mask is made once a forward
//! pass and shared by the layers.

use peft_core::Ctx;
use peft_torch::attention;
use tch::{Device, Kind, Tensor};

use crate::{Cache, Input};

/// What the new positions may look at.
#[derive(Debug)]
pub(crate) enum Mask {
    /// Everything: one new position, nothing hidden.
    All,
    /// Themselves and what is before them, with nothing in the cache.
    Causal,
    /// `[batch or 1, 1, new, past + new]`, added to the scores: 0 or −∞.
    Added(Tensor),
}

impl Mask {
    /// The mask of one forward pass for layers that look back `window` positions, themselves included.
    pub(crate) fn new(input: &Input, past: i64, window: Option<i64>, kind: Kind) -> Mask {
        let new = input.ids.size()[1];
        let total = past + new;
        let window = window.filter(|&w| w < total);
        let padding = input.attention_mask.as_ref();
        let padding = padding.filter(|it| it.logical_not().any().int64_value(&[]) != 0);
        if padding.is_none() && window.is_none() {
            if new == 1 {
                return Mask::All;
            }
            if past == 0 {
                return Mask::Causal;
            }
        }
        let device = input.ids.device();
        let line = |from: i64| Tensor::arange_start(from, total, (Kind::Int64, device));
        let (query, key) = (line(past).unsqueeze(1), line(0).unsqueeze(0));
        let mut seen = key.le_tensor(&query); // [new, total]
        if let Some(window) = window {
            seen = seen.logical_and(&key.gt_tensor(&(&query - window)));
        }
        let mut seen = seen.unsqueeze(0).unsqueeze(0); // [1, 1, new, total]
        if let Some(padding) = padding {
            let real = padding.ne(0).unsqueeze(1).unsqueeze(1); // [batch, 1, 1, total]
            // A row that sees nothing would be 0/0, and spoil others through 0 · NaN: it sees itself.
            let own = key.eq_tensor(&query);
            seen = seen.logical_and(&real).logical_or(&own);
        }
        let zero = Tensor::zeros(seen.size(), (kind, device));
        Mask::Added(zero.masked_fill(&seen.logical_not(), f64::NEG_INFINITY))
    }
}

/// How the heads of one layer attend.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Heads {
    pub(crate) scale: f64,
    pub(crate) dropout: f64,
}

/// query: `[batch, new, queries, d]`, key, value: `[batch, new, keys, d]` -> `[batch, new, queries · d]`.
pub(crate) fn attend(
    heads: Heads,
    [query, key, value]: [Tensor; 3],
    mask: &Mask,
    cache: Option<(&mut Cache, usize)>,
    ctx: Ctx,
) -> Tensor {
    let (key, value) = match cache {
        None => (key, value),
        Some((cache, layer)) => cache.append(layer, &key, &value),
    };
    let added = match mask {
        Mask::Added(tensor) => Some(tensor),
        _ => None,
    };
    let causal = matches!(mask, Mask::Causal);
    let dropout = if ctx.train { heads.dropout } else { 0.0 };
    let y = attention([&query, &key, &value], heads.scale, causal, added, dropout);
    let size = y.size();
    y.reshape([size[0], size[1], size[2] * size[3]])
}

/// The positions of the new tokens, `[batch or 1, new]`.
pub(crate) fn positions(input: &Input, past: i64) -> Tensor {
    match &input.position_ids {
        Some(given) => given.shallow_clone(),
        None => {
            let (new, device): (i64, Device) = (input.ids.size()[1], input.ids.device());
            Tensor::arange_start(past, past + new, (Kind::Int64, device)).unsqueeze(0)
        }
    }
}
