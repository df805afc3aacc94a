//! Virtual tokens: what prompt methods put in front of every row, and the place where they do.
//!
//! ```text
//! embeddings     x = [P; E[ids]]                   P [tokens, hidden]                     2104.08691
//! keys, values   attention over [Pₖ; K], [Pᵥ; V]   per layer, each [kv_heads, tokens, d]  2101.00190
//! ```
//!
//! A model has one such place. It asks for both and puts them where they belong; which method
//! they come from, and how they are computed, it does not know. Several active adapters stand one behind
//! the other, the one attached first in front.

use std::fmt;

use tch::Tensor;

use crate::{
    Ctx, Error, Params, Result,
    stack::{Place, Stack},
    thaw::Leaves,
};

/// What stands in front of every row of a batch.
#[derive(Debug)]
pub enum Ahead {
    /// Embeddings before those of the input `[tokens, hidden]`.
    Embeds(Tensor),
    /// For each layer keys and values before the input's, each `[kv_heads, tokens, head_dim]`.
    Kv(Vec<(Tensor, Tensor)>),
}

/// What one method puts in front of every row.
pub trait PromptAdapter: Params + fmt::Debug + Send {
    /// The virtual tokens, with a graph to the parameters.
    fn ahead(&self, ctx: Ctx) -> Ahead;
    /// How many there are.
    fn tokens(&self) -> i64;
}

/// The place for virtual tokens in a model. Its name is empty: it is the model as a whole.
#[derive(Debug)]
pub struct PromptSlot {
    words: Tensor,
    adapters: Stack<dyn PromptAdapter>,
}

impl PromptSlot {
    /// Without any; words: the table of the input embedding `[vocab, hidden]`, for methods that begin at real tokens.
    pub fn new(words: &Tensor) -> PromptSlot {
        PromptSlot {
            words: words.shallow_clone(),
            adapters: Stack::new(),
        }
    }

    /// The table of the input embedding `[vocab, hidden]`.
    pub fn words(&self) -> &Tensor {
        &self.words
    }

    /// Looks at the trainable copy of the table, where there is one.
    pub(crate) fn thaw(&mut self, leaves: &Leaves) {
        if let Some(leaf) = leaves.copy_of(&self.words) {
            self.words = leaf.detach();
        }
    }

    /// Puts an adapter behind those that are there.
    pub fn attach(&mut self, name: &str, adapter: Box<dyn PromptAdapter>) {
        self.adapters.push(name, adapter);
    }

    /// The adapters of one name.
    pub fn adapters(&self, name: &str) -> impl Iterator<Item = &dyn PromptAdapter> {
        let all = self.adapters.all().iter();
        all.filter(move |it| it.name == name).map(|it| &*it.adapter)
    }

    /// How many virtual tokens are switched on.
    pub fn tokens(&self) -> i64 {
        self.adapters.active().map(|it| it.tokens()).sum()
    }

    /// Whether any virtual tokens are switched on. They are none in a mixed batch.
    pub fn is_active(&self, ctx: Ctx) -> bool {
        ctx.rows.is_none() && self.adapters.active().next().is_some()
    }

    /// What stands in front, each method computed once: [`PromptSlot::embeds`] and [`PromptSlot::kv`].
    pub fn ahead(&self, ctx: Ctx) -> (Option<Tensor>, Option<Vec<(Tensor, Tensor)>>) {
        let (mut embeds, mut kv) = (Vec::new(), None::<Vec<(Tensor, Tensor)>>);
        let join = |a: &Tensor, b: &Tensor| Tensor::cat(&[a, b], 1);
        for adapter in self.adapters.active().filter(|_| ctx.rows.is_none()) {
            match adapter.ahead(ctx) {
                Ahead::Embeds(tokens) => embeds.push(tokens),
                Ahead::Kv(layers) => {
                    kv = Some(match kv {
                        None => layers,
                        Some(first) => {
                            let both = first.iter().zip(&layers);
                            both.map(|(a, b)| (join(&a.0, &b.0), join(&a.1, &b.1)))
                                .collect()
                        }
                    });
                }
            }
        }
        ((!embeds.is_empty()).then(|| Tensor::cat(&embeds, 0)), kv)
    }

    /// Embeddings to be put before those of the input `[tokens, hidden]`, in the adapters' own dtype.
    pub fn embeds(&self, ctx: Ctx) -> Option<Tensor> {
        self.ahead(ctx).0
    }

    /// Keys and values to be put before those of each layer, each `[kv_heads, tokens, head_dim]`.
    pub fn kv(&self, ctx: Ctx) -> Option<Vec<(Tensor, Tensor)>> {
        self.ahead(ctx).1
    }
}

impl Place for PromptSlot {
    fn names(&self) -> Vec<(String, bool)> {
        let all = self.adapters.all().iter();
        all.map(|it| (it.name.clone(), it.on)).collect()
    }
    fn switch(&mut self, name: &str, on: bool) {
        self.adapters.switch(name, on);
    }
    fn delete(&mut self, name: &str) {
        self.adapters.delete(name);
    }
    fn set_aside(&mut self, name: &str) {
        self.adapters.set_aside(name);
    }
    fn put_back(&mut self) {
        self.adapters.put_back();
    }
    fn settle(&mut self, name: &str) {
        self.adapters.settle(name);
    }
    fn merge(&mut self, _: &str) -> Result<()> {
        match self.adapters.active().next() {
            None => Ok(()),
            Some(_) => Err(Error::NotMergeable {
                at: "the input".to_owned(),
                why: "virtual tokens have no form as a weight".to_owned(),
            }),
        }
    }
    fn unmerge(&mut self) {}
    fn merged(&self) -> bool {
        false
    }
    fn bare(&mut self) {
        self.adapters.clear();
    }
    fn params(&self, name: &str, visit: crate::Visit<'_>) {
        self.adapters(name).for_each(|it| it.params(visit));
    }
    fn derived(&self, name: &str, visit: crate::Visit<'_>) {
        self.adapters(name).for_each(|it| it.derived(visit));
    }
    fn saved(&self, name: &str, visit: crate::Visit<'_>) {
        self.adapters(name).for_each(|it| it.saved(visit));
    }
}
