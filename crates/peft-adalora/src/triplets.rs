//! The triplets of one layer: y = W x + b + s·B (E ∘ (A·drop(x))).
//!
//! E ∘ A is as small as A, so it is made first, and the rest is the product of a plain low-rank adapter in one pass over y.

use peft_core::{Beneath, Ctx, LinearAdapter, LinearOp, Params, Plain, Visit};
use peft_torch::add_low_rank;
use tch::{Device, Kind, Tensor};

/// The on-disk names below a layer: bare, unlike those of LoRA.
pub(crate) const A: &str = "lora_A";
pub(crate) const B: &str = "lora_B";
pub(crate) const E: &str = "lora_E";
/// In no file: which ranks the last mask has left. `rank_pattern` is made of it.
pub(crate) const MASK: &str = "rank_mask";

/// What AdaLoRA leaves on one layer.
#[derive(Debug)]
pub(crate) struct Triplets {
    /// `[r, in]`
    pub(crate) a: Tensor,
    /// `[out, r]`
    pub(crate) b: Tensor,
    /// `[r, 1]`
    pub(crate) e: Tensor,
    /// `[r]`, 1 or 0; before the first mask −1.
    pub(crate) mask: Tensor,
    pub(crate) scale: f64,
    pub(crate) dropout: f64,
}

/// How many ranks of how large a layer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Size {
    pub(crate) ranks: i64,
    pub(crate) out: i64,
    pub(crate) inp: i64,
    pub(crate) device: Device,
}

impl Triplets {
    /// As Python begins: `small`, so that the update is zero, or all normal.
    pub(crate) fn new(size: Size, small: bool, scale: f64, dropout: f64) -> Triplets {
        let Size {
            ranks,
            out,
            inp,
            device,
        } = size;
        let normal = |shape: [i64; 2]| {
            let it = Tensor::randn(shape, (Kind::Float, device));
            if small { it * 0.02 } else { it }
        };
        let (a, e, b) = (
            normal([ranks, inp]),
            normal([ranks, 1]),
            normal([out, ranks]),
        );
        let e = if small { e.zeros_like() } else { e };
        Triplets {
            a: a.set_requires_grad(true),
            b: b.set_requires_grad(true),
            e: e.set_requires_grad(true),
            mask: Tensor::full([ranks], -1, (Kind::Float, device)),
            scale,
            dropout,
        }
    }

    /// Which ranks a file has: those that are not both masked and zero. `[kept]`
    fn kept(&self) -> Tensor {
        let gone = self
            .mask
            .eq(0.0)
            .logical_and(&self.e.detach().view([-1]).eq(0.0));
        gone.logical_not().nonzero().view([-1])
    }
}

impl LinearAdapter for Triplets {
    fn forward(&self, x: &Tensor, beneath: Beneath<'_>, ctx: Ctx) -> Tensor {
        let y = beneath.forward(x);
        if self.a.size()[0] == 0 {
            return y; // no rank is left here
        }
        let x = match ctx.train && self.dropout > 0.0 {
            true => x.dropout(self.dropout, true),
            false => x.shallow_clone(),
        };
        add_low_rank(y, &x, &(&self.a * &self.e), &self.b, None, self.scale)
    }

    fn reads_beneath(&self) -> bool {
        false
    }

    fn merge(&self, plain: Plain, _: &dyn LinearOp) -> Option<Plain> {
        let delta = self.b.matmul(&(&self.a * &self.e)) * self.scale; // [out, in]
        let weight = plain.weight.to_kind(Kind::Float) + delta;
        Some(Plain {
            weight: weight.to_kind(plain.weight.kind()),
            bias: plain.bias,
        })
    }
}

impl Params for Triplets {
    fn params(&self, visit: Visit<'_>) {
        visit(A, &self.a);
        visit(B, &self.b);
        visit(E, &self.e);
        visit(MASK, &self.mask);
    }

    fn saved(&self, visit: Visit<'_>) {
        let kept = self.kept();
        visit(A, &self.a.index_select(0, &kept));
        visit(B, &self.b.index_select(1, &kept));
        visit(E, &self.e.index_select(0, &kept));
    }
}
