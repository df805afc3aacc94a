//! Embedding tables: y = E[ids], and what methods put on them.

use std::fmt;

use tch::{Device, Tensor, nn};

use crate::{
    BASE, Ctx, Error, Params, Result,
    stack::{Attached, Stack, finite, place},
    thaw::Leaves,
};

/// What one method leaves on one embedding table.
pub trait EmbeddingAdapter: Params + fmt::Debug + Send {
    /// ids: `[..] -> [.., hidden]` with this adapter at work.
    fn forward(&self, ids: &Tensor, beneath: BeneathEmbedding<'_>, ctx: Ctx) -> Tensor;
    /// The table `[vocab, hidden]` with this adapter baked in, if the method has such a form.
    ///
    /// `weight` has the adapters beneath in it already; `base` has none.
    fn merge(&self, weight: Tensor, base: &Tensor) -> Option<Tensor>;
}

/// The table without its topmost adapter.
#[derive(Clone, Copy)]
pub struct BeneathEmbedding<'a> {
    base: &'a Tensor,
    padding_idx: Option<i64>,
    adapters: &'a [Attached<dyn EmbeddingAdapter>],
    ctx: Ctx<'a>,
    /// Of all adapters only those of this name are at work.
    only: Option<&'a str>,
}

impl<'a> BeneathEmbedding<'a> {
    /// The table without any adapter `[vocab, hidden]`.
    pub fn base(self) -> &'a Tensor {
        self.base
    }

    /// Which row is never trained by being looked up.
    pub fn padding_idx(self) -> Option<i64> {
        self.padding_idx
    }

    /// Rows of a `table` `[vocab, width]` that stands beside or in place of the base's: ids `[..] -> [.., width]`.
    pub fn look_up(self, table: &Tensor, ids: &Tensor) -> Tensor {
        Tensor::embedding(table, ids, self.padding_idx.unwrap_or(-1), false, false)
    }

    /// ids: `[..] -> [.., hidden]`
    pub fn forward(self, ids: &Tensor) -> Tensor {
        let Some((top, rest)) = self.adapters.split_last() else {
            return self.look_up(self.base, ids);
        };
        let beneath = BeneathEmbedding {
            adapters: rest,
            ..self
        };
        if top.works(self.only) {
            top.adapter.forward(ids, beneath, self.ctx)
        } else {
            beneath.forward(ids)
        }
    }

    /// The table `[vocab, hidden]`, with the active adapters beneath where they have a weight form.
    pub fn weight(self) -> Tensor {
        let active = self.adapters.iter().filter(|it| it.works(self.only));
        active.fold(self.base.shallow_clone(), |w, it| {
            it.adapter.merge(w.shallow_clone(), self.base).unwrap_or(w)
        })
    }
}

/// A named embedding table in a model.
#[derive(Debug)]
pub struct Embedding {
    base: Tensor,
    padding_idx: Option<i64>,
    original: Option<Tensor>,
    adapters: Stack<dyn EmbeddingAdapter>,
}

impl Embedding {
    /// A frozen table `[vocab, hidden]` without adapters.
    pub fn new(weight: Tensor) -> Embedding {
        Embedding {
            base: weight,
            padding_idx: None,
            original: None,
            adapters: Stack::new(),
        }
    }

    /// Looking this row up trains neither it nor what an adapter has for it, as `padding_idx` of `torch.nn.Embedding` has it.
    ///
    /// An output layer that shares the table trains it all the same.
    ///
    /// # Panics
    /// If the table has no such row.
    pub fn with_padding_idx(self, padding_idx: Option<i64>) -> Embedding {
        let rows = self.base.size()[0];
        assert!(
            padding_idx.is_none_or(|it| (0..rows).contains(&it)),
            "padding_idx {padding_idx:?} in a table of {rows} rows"
        );
        Embedding {
            padding_idx,
            ..self
        }
    }

    /// ids: `[..] -> [.., hidden]`
    pub fn forward(&self, ids: &Tensor, ctx: Ctx) -> Tensor {
        let adapters = match self.original {
            Some(_) => &[],
            None => self.adapters.all(),
        };
        let whole = BeneathEmbedding {
            base: &self.base,
            padding_idx: self.padding_idx,
            adapters,
            ctx: Ctx { rows: None, ..ctx },
            only: None,
        };
        let Some(rows) = ctx.rows else {
            return whole.forward(ids);
        };
        rows.apply([ids], |name, [ids]| {
            let alone = BeneathEmbedding {
                only: Some(name.unwrap_or(BASE)),
                ..whole
            };
            alone.forward(&ids)
        })
    }

    /// The frozen table `[vocab, hidden]`; after a merge, the merged one.
    pub fn weight(&self) -> &Tensor {
        &self.base
    }

    /// Where new parameters should live.
    pub fn device(&self) -> Device {
        self.base.device()
    }

    /// Puts an adapter on top.
    pub fn attach(&mut self, name: &str, adapter: Box<dyn EmbeddingAdapter>) {
        self.adapters.push(name, adapter);
    }

    pub(crate) fn thaw(&mut self, leaves: &mut Leaves) {
        self.base = leaves.take("weight", &self.base);
    }

    /// The adapters of one name, innermost first.
    pub fn adapters(&self, name: &str) -> impl Iterator<Item = &dyn EmbeddingAdapter> {
        let all = self.adapters.all().iter();
        all.filter(move |it| it.name == name).map(|it| &*it.adapter)
    }

    fn baked(&self, at: &str) -> Result<Tensor> {
        let not = |why: &str| Error::NotMergeable {
            at: at.to_owned(),
            why: why.to_owned(),
        };
        let start = self.base.shallow_clone();
        let active = self.adapters.active();
        let merged = tch::no_grad(|| {
            active
                .into_iter()
                .try_fold(start, |w, it| it.merge(w, &self.base))
        })
        .ok_or_else(|| not("the method has no form as a table here"))?;
        if finite(&merged) {
            Ok(merged.detach())
        } else {
            Err(not("the merged table is not finite"))
        }
    }
}

place!(Embedding);

/// A table of `tch`, frozen. `tch` does not tell its padding index; give it again, if adapters are to leave it alone
/// ([`Embedding::with_padding_idx`]).
impl From<nn::Embedding> for Embedding {
    fn from(table: nn::Embedding) -> Embedding {
        Embedding::new(table.ws.detach())
    }
}
