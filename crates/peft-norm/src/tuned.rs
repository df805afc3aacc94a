//! A trained copy of a norm, and of the other modules that Python lets pass for one.
//!
//! The copy is kept whole, as it is on disk, and at work it counts as a difference: w'' + (w' − w) where w'' is what the
//! adapters beneath have made of w. Where there are none w' itself is used, so that a norm with one adapter has no rounding
//! and no sum in its graph.

use peft_core::{
    Affine, Beneath, BeneathEmbedding, Ctx, EmbeddingAdapter, LinearAdapter, LinearOp, NormAdapter,
    Params, Plain, Saved, Visit,
};
use tch::Tensor;

/// On-disk names below the norm.
const WEIGHT: &str = "ln_tuning_layers.weight";
const BIAS: &str = "ln_tuning_layers.bias";
/// What they begin with, for modules whose parameters have names of their own.
const PREFIX: &str = "ln_tuning_layers.";

/// w' and b' of a norm, in the dtype of the base.
#[derive(Debug)]
pub(crate) struct Tuned {
    base: Affine,
    own: Affine,
}

impl Tuned {
    /// Beginning as the norm is.
    pub(crate) fn new(base: &Affine) -> Tuned {
        Tuned {
            own: Affine {
                weight: copy(&base.weight),
                bias: base.bias.as_ref().map(copy),
            },
            base: base.clone(),
        }
    }
}

fn copy(t: &Tensor) -> Tensor {
    let copy = tch::no_grad(|| t.detach().contiguous().copy());
    copy.set_requires_grad(true)
}

impl NormAdapter for Tuned {
    fn affine(&self, beneath: Affine) -> Affine {
        let moved =
            |own: &Tensor, base: &Tensor, now: Tensor| match now.data_ptr() == base.data_ptr() {
                true => own.shallow_clone(),
                false => now + (own - base),
            };
        let bias = match (&self.own.bias, &self.base.bias, beneath.bias) {
            (Some(own), Some(base), Some(now)) => Some(moved(own, base, now)),
            (_, _, now) => now, // a norm without a bias, which something else may have given one
        };
        Affine {
            weight: moved(&self.own.weight, &self.base.weight, beneath.weight),
            bias,
        }
    }
}

impl Params for Tuned {
    fn params(&self, visit: Visit<'_>) {
        visit(WEIGHT, &self.own.weight);
        if let Some(bias) = &self.own.bias {
            visit(BIAS, bias);
        }
    }
}

/// A trained copy of a linear layer or an embedding.
#[derive(Debug)]
pub(crate) struct Whole(pub(crate) Saved);

impl LinearAdapter for Whole {
    fn forward(&self, x: &Tensor, beneath: Beneath<'_>, ctx: Ctx) -> Tensor {
        LinearAdapter::forward(&self.0, x, beneath, ctx)
    }

    fn merge(&self, plain: Plain, base: &dyn LinearOp) -> Option<Plain> {
        LinearAdapter::merge(&self.0, plain, base)
    }
}

impl EmbeddingAdapter for Whole {
    fn forward(&self, ids: &Tensor, beneath: BeneathEmbedding<'_>, ctx: Ctx) -> Tensor {
        EmbeddingAdapter::forward(&self.0, ids, beneath, ctx)
    }

    fn merge(&self, weight: Tensor, base: &Tensor) -> Option<Tensor> {
        EmbeddingAdapter::merge(&self.0, weight, base)
    }
}

impl Params for Whole {
    fn params(&self, visit: Visit<'_>) {
        self.0
            .params(&mut |name, tensor| visit(&format!("{PREFIX}{name}"), tensor));
    }
}
