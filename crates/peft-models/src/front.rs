//! What virtual tokens do to a forward pass.
//!
//! ```text
//! embeddings     x = [P; E[ids]]: n more positions, counted from 0 with the rest
//! keys, values   each layer looks at [Pₖ; K], [Pᵥ; V]: positions of the tokens begin at n
//! ```
//!
//! They are put in place in the first pass, when a cache holds nothing yet; afterwards the cache holds them. So the
//! attention mask of a caller, who does not know of them, gets n ones in front, and so do positions: with
//! embeddings in front, given ones are dropped and counted anew, padding included; with keys and values
//! they are moved by n. That is what Python's `peft` does.

use peft_core::{Ctx, PromptSlot};
use tch::{Kind, Tensor};

use crate::{Cache, Input, attention::counted};

/// One pass behind whatever is in front of it.
#[derive(Debug)]
pub(crate) struct Front {
    /// `[n, hidden]`, to be put before the embeddings of the tokens.
    embeds: Option<Tensor>,
    /// For each layer, to be put before its keys and values, each `[kv_heads, n, head_dim]`.
    kv: Option<Vec<(Tensor, Tensor)>>,
    /// How many positions there are before the new ones: in the cache, or only as keys and values.
    pub(crate) past: i64,
    /// How many new positions there are, virtual tokens among them.
    pub(crate) new: i64,
    /// How many tokens are new.
    tokens: i64,
    /// `[batch, past + new]`
    pub(crate) mask: Option<Tensor>,
    /// Positions that the caller gave, where they count: `[batch or 1, new]`.
    given: Option<Tensor>,
    /// Virtual positions that the cache does not hold yet.
    fresh: i64,
    /// Positions are counted, whatever the caller gives.
    counted: bool,
}

/// What a caller gives.
#[derive(Debug, Clone, Copy)]
struct Pass<'a> {
    ids: &'a Tensor,
    mask: Option<&'a Tensor>,
    given: Option<&'a Tensor>,
    /// Virtual embeddings belong here.
    embeds: bool,
}

impl Front {
    /// The pass of `input`; kind: the dtype of the model.
    pub(crate) fn new(
        slot: &PromptSlot,
        input: &Input,
        cache: Option<&mut Cache>,
        kind: Kind,
        ctx: Ctx,
    ) -> Front {
        let pass = Pass {
            ids: &input.ids,
            mask: input.attention_mask.as_ref(),
            given: input.position_ids.as_ref(),
            embeds: true,
        };
        Front::of(slot, pass, cache, kind, ctx)
    }

    /// The pass of a decoder behind an encoder, where virtual embeddings are the encoder's; ids: `[batch, target]`.
    pub(crate) fn keys(
        slot: &PromptSlot,
        (ids, mask): (&Tensor, Option<&Tensor>),
        cache: Option<&mut Cache>,
        kind: Kind,
        ctx: Ctx,
    ) -> Front {
        let pass = Pass {
            ids,
            mask,
            given: None,
            embeds: false,
        };
        Front::of(slot, pass, cache, kind, ctx)
    }

    fn of(
        slot: &PromptSlot,
        pass: Pass<'_>,
        cache: Option<&mut Cache>,
        kind: Kind,
        ctx: Ctx,
    ) -> Front {
        let (held, seen, mut is_counted) = match cache {
            Some(cache) if !cache.is_empty() => (cache.ahead(), cache.len(), cache.is_counted()),
            Some(cache) => {
                cache.clear();
                (0, 0, false)
            }
            None => (0, 0, false),
        };
        let begins = seen == 0 && slot.is_active(ctx);
        let (embeds, kv) = match begins {
            true => slot.ahead(ctx),
            false => (None, None),
        };
        let embeds = embeds.filter(|_| pass.embeds).map(|it| it.to_kind(kind));
        let kv: Option<Vec<(Tensor, Tensor)>> = kv.map(|layers| {
            let cast = |(k, v): (Tensor, Tensor)| (k.to_kind(kind), v.to_kind(kind));
            layers.into_iter().map(cast).collect()
        });
        let before = kv.as_ref().and_then(|it| it.first());
        let before = before.map_or(0, |(key, _)| key.size()[1]);
        let among = embeds.as_ref().map_or(0, |it| it.size()[0]);
        is_counted |= among > 0;
        let tokens = pass.ids.size()[1];
        let ahead = held + before + among;
        let given = pass.given.filter(|_| !is_counted);
        Front {
            past: held + seen + before,
            new: among + tokens,
            tokens,
            mask: pass.mask.map(|it| ones_before(it, ahead)),
            given: given.map(|it| it + ahead),
            fresh: before + among,
            counted: is_counted,
            embeds,
            kv,
        }
    }

    /// Virtual tokens before those of the input: `[batch, tokens, hidden] -> [batch, new, hidden]`.
    pub(crate) fn put(&self, x: Tensor) -> Tensor {
        match &self.embeds {
            None => x,
            Some(embeds) => {
                let rows = x.size()[0];
                let embeds = embeds.unsqueeze(0).expand([rows, -1, -1], false);
                Tensor::cat(&[&embeds, &x], 1)
            }
        }
    }

    /// Zeros in front of numbers that belong to tokens: `[batch, tokens] -> [batch, new]`.
    pub(crate) fn zeros_before(&self, numbers: &Tensor) -> Tensor {
        match self.new - self.tokens {
            0 => numbers.shallow_clone(),
            n => numbers.pad([n, 0], "constant", 0.0),
        }
    }

    /// Keys and values before those of a layer.
    pub(crate) fn kv(&self, layer: usize) -> Option<(&Tensor, &Tensor)> {
        let layer = self.kv.as_ref().and_then(|it| it.get(layer));
        layer.map(|(key, value)| (key, value))
    }

    /// Positions of the new ones as the caller gave them, `[batch or 1, new]`.
    pub(crate) fn given(&self) -> Option<Tensor> {
        self.given.as_ref().map(Tensor::shallow_clone)
    }

    /// Whether embeddings stand before those of the tokens.
    pub(crate) fn has_embeds(&self) -> bool {
        self.embeds.is_some()
    }

    /// Positions of the new ones, `[batch or 1, new]`.
    pub(crate) fn positions(&self, like: &Tensor) -> Tensor {
        self.given()
            .unwrap_or_else(|| counted(self.past, self.new, like.device()))
    }

    /// Counts the new positions, after every layer has added its own.
    pub(crate) fn finish(&self, cache: Option<&mut Cache>) {
        if let Some(cache) = cache {
            cache.advance(self.tokens, self.fresh, self.counted);
        }
    }
}

/// A mask `[batch, keys]` with `n` ones in front.
pub(crate) fn ones_before(mask: &Tensor, n: i64) -> Tensor {
    match n {
        0 => mask.shallow_clone(),
        n => mask.to_kind(Kind::Int64).pad([n, 0], "constant", 1.0),
    }
}
