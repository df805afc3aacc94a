//! Norms: y = (x − μ)/√(σ² + eps) · w + b, or RMSNorm without μ and b, and what methods put on w and b.

use std::fmt;

use tch::Tensor;

use crate::{
    BASE, Ctx, Error, Params, Result,
    stack::{Stack, finite, place},
    thaw::Leaves,
};

/// The two vectors of a norm.
#[derive(Debug)]
pub struct Affine {
    /// `[hidden]`
    pub weight: Tensor,
    /// `[hidden]`
    pub bias: Option<Tensor>,
}

impl Clone for Affine {
    fn clone(&self) -> Affine {
        Affine {
            weight: self.weight.shallow_clone(),
            bias: self.bias.as_ref().map(Tensor::shallow_clone),
        }
    }
}

/// Which norm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// LayerNorm (1607.06450).
    Layer,
    /// RMSNorm (1910.07467).
    Rms,
}

/// What one method leaves on one norm: other vectors.
pub trait NormAdapter: Params + fmt::Debug + Send {
    /// The vectors with this adapter at work.
    fn affine(&self, beneath: Affine) -> Affine;
}

/// A named norm in a model.
#[derive(Debug)]
pub struct Norm {
    kind: NormKind,
    eps: f64,
    base: Affine,
    original: Option<Affine>,
    adapters: Stack<dyn NormAdapter>,
}

impl Norm {
    /// A frozen norm without adapters; weight, bias: `[hidden]`.
    pub fn new(kind: NormKind, weight: Tensor, bias: Option<Tensor>, eps: f64) -> Norm {
        Norm {
            kind,
            eps,
            base: Affine { weight, bias },
            original: None,
            adapters: Stack::new(),
        }
    }

    /// x: `[.., hidden] -> [.., hidden]`
    pub fn forward(&self, x: &Tensor, ctx: Ctx) -> Tensor {
        match ctx.rows {
            Some(rows) if !self.adapters.all().is_empty() => rows.apply([x], |name, [x]| {
                self.normed(&x, self.effective(Some(name.unwrap_or(BASE))))
            }),
            _ => self.normed(x, self.effective(None)),
        }
    }

    fn normed(&self, x: &Tensor, Affine { weight, bias }: Affine) -> Tensor {
        match self.kind {
            NormKind::Rms => peft_torch::rms_norm(x, &weight, self.eps),
            NormKind::Layer => {
                x.layer_norm(weight.size(), Some(&weight), bias.as_ref(), self.eps, false)
            }
        }
    }

    /// The frozen vectors; after a merge, the merged ones.
    pub fn base(&self) -> &Affine {
        &self.base
    }

    /// Puts an adapter on top.
    pub fn attach(&mut self, name: &str, adapter: Box<dyn NormAdapter>) {
        self.adapters.push(name, adapter);
    }

    pub(crate) fn thaw(&mut self, leaves: &mut Leaves) {
        self.base = Affine {
            weight: leaves.take("weight", &self.base.weight),
            bias: self.base.bias.as_ref().map(|it| leaves.take("bias", it)),
        };
    }

    /// The adapters of one name, innermost first.
    pub fn adapters(&self, name: &str) -> impl Iterator<Item = &dyn NormAdapter> {
        let all = self.adapters.all().iter();
        all.filter(move |it| it.name == name).map(|it| &*it.adapter)
    }

    /// The vectors with the active adapters, or with those of one name alone.
    fn effective(&self, only: Option<&str>) -> Affine {
        match self.original {
            Some(_) => self.base.clone(),
            None => {
                let active = self.adapters.all().iter().filter(|it| it.works(only));
                active.fold(self.base.clone(), |a, it| it.adapter.affine(a))
            }
        }
    }

    fn baked(&self, at: &str) -> Result<Affine> {
        let Affine { weight, bias } = self.effective(None);
        if finite(&weight) && bias.as_ref().is_none_or(finite) {
            return Ok(Affine {
                weight: weight.detach().copy(),
                bias: bias.map(|b| b.detach().copy()),
            });
        }
        Err(Error::NotMergeable {
            at: at.to_owned(),
            why: "the merged norm is not finite".to_owned(),
        })
    }
}

place!(Norm);
