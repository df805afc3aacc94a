//! Scaled-dot-product attention: softmax(q kᵀ · scale + mask) v.
//!
//! Position i of the new ones sees what the cache holds and the new ones up to
//! itself, unless a mask hides padding or a window hides what is too long ago.
//! The plain case needs no mask at all; any other mask is made once a forward
//! pass and shared by the layers.

use peft_core::Ctx;
use peft_torch::attention;
use tch::{Device, Kind, Tensor};

use crate::{Cache, front::Front};

/// What the new positions may look at.
#[derive(Debug, Clone)]
pub(crate) enum Mask {
    /// Everything: nothing is hidden.
    All,
    /// Themselves and what is before them, with nothing in the cache.
    Causal,
    /// Not everything.
    Added(Added),
}

/// What is added to the scores of attention.
#[derive(Debug)]
pub(crate) struct Added {
    /// `[batch or 1, heads or 1, new, past + new]`: −∞ where a position is hidden.
    pub(crate) scores: Tensor,
    /// Positions that see nothing, padding before a text: `[batch, new, 1, 1]`.
    ///
    /// Their sums are 0/0, which would spoil others through 0 · NaN. They see themselves, and their result is made 0, as
    /// libtorch makes it: a softmax over the positions of a text, as answers have it, counts them.
    blind: Option<Tensor>,
}

impl Clone for Added {
    fn clone(&self) -> Added {
        Added {
            scores: self.scores.shallow_clone(),
            blind: self.blind.as_ref().map(Tensor::shallow_clone),
        }
    }
}

impl Added {
    /// The same with these scores for its own, which may be those of another graph.
    pub(crate) fn with(&self, scores: &Tensor) -> Mask {
        Mask::Added(Added {
            scores: scores.shallow_clone(),
            blind: self.blind.as_ref().map(Tensor::shallow_clone),
        })
    }
}

impl Mask {
    /// The mask of one forward pass for layers that look back `window` positions, themselves included.
    pub(crate) fn new(front: &Front, window: Option<i64>, like: &Tensor) -> Mask {
        let (past, new) = (front.past, front.new);
        let window = window.filter(|&w| w < past + new);
        let padding = front.mask.as_ref().filter(|it| hides(it));
        if padding.is_none() && window.is_none() {
            if new == 1 {
                return Mask::All;
            }
            if past == 0 {
                return Mask::Causal;
            }
        }
        Mask::Added(backwards((new, past), padding, window, like))
    }

    /// The mask of a decoder whose scores have a `bias` of their own `[1, heads, new, past + new]`.
    pub(crate) fn biased(bias: &Tensor, past: i64, attention_mask: Option<&Tensor>) -> Added {
        let new = bias.size()[2];
        let padding = attention_mask.filter(|it| hides(it));
        if new == 1 && padding.is_none() {
            return Mask::All.and(bias);
        }
        Mask::Added(backwards((new, past), padding, None, bias)).and(bias)
    }

    /// The same scores with `bias` `[1, heads, new, keys]` added.
    pub(crate) fn and(self, bias: &Tensor) -> Added {
        let (scores, blind) = match self {
            Mask::Added(it) => (bias + it.scores, it.blind),
            _ => (bias.shallow_clone(), None),
        };
        Added { scores, blind }
    }

    /// The mask of `new` positions that see every token of `attention_mask` `[batch, keys]`, before and behind them.
    pub(crate) fn padding(attention_mask: Option<&Tensor>, new: i64, kind: Kind) -> Mask {
        let Some(mask) = attention_mask.filter(|it| hides(it)) else {
            return Mask::All;
        };
        let real = mask.ne(0); // [batch, keys]
        // A row of nothing but padding would be 0/0, and spoil others through 0 · NaN: it sees itself.
        let empty = real.any_dim(1, true).logical_not();
        let seen = real.logical_or(&empty).unsqueeze(1).unsqueeze(1); // [batch, 1, 1, keys]
        Mask::Added(Added {
            scores: added(&seen, kind).expand([-1, -1, new, -1], false),
            blind: None,
        })
    }
}

/// Each new position sees those before it and itself; like: has the dtype and the device of the scores.
fn backwards(
    (new, past): (i64, i64),
    padding: Option<&Tensor>,
    window: Option<i64>,
    like: &Tensor,
) -> Added {
    let (total, device) = (past + new, like.device());
    let line = |from: i64| Tensor::arange_start(from, total, (Kind::Int64, device));
    let (query, key) = (line(past).unsqueeze(1), line(0).unsqueeze(0));
    let mut seen = key.le_tensor(&query); // [new, total]
    if let Some(window) = window {
        seen = seen.logical_and(&key.gt_tensor(&(&query - window)));
    }
    let mut seen = seen.unsqueeze(0).unsqueeze(0); // [1, 1, new, total]
    let mut blind = None;
    if let Some(padding) = padding {
        let real = padding.ne(0).unsqueeze(1).unsqueeze(1); // [batch, 1, 1, total]
        seen = seen.logical_and(&real);
        let empty = seen.any_dim(3, true).logical_not(); // [batch, 1, new, 1]
        if empty.any().int64_value(&[]) != 0 {
            seen = seen.logical_or(&key.eq_tensor(&query).logical_and(&empty));
            blind = Some(empty.transpose(1, 2));
        }
    }
    Added {
        scores: added(&seen, like.kind()),
        blind,
    }
}

/// Whether there is padding at all.
fn hides(mask: &Tensor) -> bool {
    mask.logical_not().any().int64_value(&[]) != 0
}

/// 0 where something is seen and −∞ elsewhere.
fn added(seen: &Tensor, kind: Kind) -> Tensor {
    let zero = Tensor::zeros(seen.size(), (kind, seen.device()));
    zero.masked_fill(&seen.logical_not(), f64::NEG_INFINITY)
}

/// How the heads of one layer attend.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Heads {
    pub(crate) scale: f64,
    pub(crate) dropout: f64,
}

/// What a layer looks at besides its own keys and values.
#[derive(Debug, Default)]
pub(crate) struct Before<'a> {
    /// Virtual keys and values, each `[kv_heads, n, d]`.
    pub(crate) kv: Option<(&'a Tensor, &'a Tensor)>,
    /// What was seen before, and the number of the layer.
    pub(crate) cache: Option<(&'a mut Cache, usize)>,
}

/// query: `[batch, new, queries, d]`, key, value: `[batch, new, keys, d]` -> `[batch, new, queries · d]`.
pub(crate) fn attend(
    heads: Heads,
    [query, key, value]: [Tensor; 3],
    mask: &Mask,
    before: Before<'_>,
    ctx: Ctx,
) -> Tensor {
    let (key, value) = match before.kv {
        None => (key, value),
        Some((k, v)) => (behind(k, &key), behind(v, &value)),
    };
    let (key, value) = match before.cache {
        None => (key, value),
        Some((cache, layer)) => cache.append(layer, &key, &value),
    };
    let added = match mask {
        Mask::Added(it) => Some(it),
        _ => None,
    };
    let scores = added.map(|it| &it.scores);
    let blind = added.and_then(|it| it.blind.as_ref());
    let causal = matches!(mask, Mask::Causal);
    let dropout = if ctx.train { heads.dropout } else { 0.0 };
    let mut y = attention([&query, &key, &value], heads.scale, causal, scores, dropout);
    if let Some(blind) = blind {
        y = y.masked_fill(blind, 0.0);
    }
    let size = y.size();
    y.reshape([size[0], size[1], size[2] * size[3]])
}

/// Virtual ones `[heads, n, d]` before `[batch, new, heads, d]`, the same in every row.
fn behind(ahead: &Tensor, own: &Tensor) -> Tensor {
    let ahead = ahead.transpose(0, 1).unsqueeze(0); // [1, n, heads, d]
    let rows = own.size()[0];
    Tensor::cat(&[&ahead.expand([rows, -1, -1, -1], false), own], 1)
}

/// `new` positions behind `past` others, `[1, new]`.
pub(crate) fn counted(past: i64, new: i64, device: Device) -> Tensor {
    Tensor::arange_start(past, past + new, (Kind::Int64, device)).unsqueeze(0)
}
