//! DoRA (2402.09353): the weight as a magnitude for each output and a direction.
//!
//! ```text
//! W' = m/‖W + ΔW‖ ∘ (W + ΔW)        m [out], norms by row
//! y  = W' x + b = n∘(y₀ − b) + n∘ΔW x + b,   n = m/‖W + ΔW‖
//! ```
//!
//! The norm follows ΔW but takes no gradient (section 4.3 of the paper): it is
//! a constant of the step. It is that of the base, whatever else is stacked on
//! the layer. With dropout ΔW and W see the same dropped input, so the layer
//! itself runs once more.

use peft_core::{Beneath, Ctx, LinearAdapter, LinearOp, Params, Plain, Visit};
use tch::{Kind, Tensor};

use crate::{
    factors::{Factors, leaf},
    in_place::add_low_rank,
    lora::{A, B, dropped},
};

/// The on-disk name of m; it has no `.weight`.
pub(crate) const MAGNITUDE: &str = "lora_magnitude_vector";

/// What DoRA leaves on one layer.
#[derive(Debug)]
pub(crate) struct Dora {
    factors: Factors,
    /// m `[out]`
    magnitude: Tensor,
    dropout: f64,
}

impl Dora {
    /// With the magnitude that the layer has now.
    pub(crate) fn new(factors: Factors, base: &dyn LinearOp, dropout: f64) -> Dora {
        let magnitude = leaf(&norm(&base.weight(), &factors));
        Dora {
            factors,
            magnitude,
            dropout,
        }
    }

    /// n `[out]`
    fn stretch(&self, base: &dyn LinearOp) -> Tensor {
        &self.magnitude / norm(&base.weight(), &self.factors)
    }
}

impl LinearAdapter for Dora {
    fn forward(&self, x: &Tensor, beneath: Beneath<'_>, ctx: Ctx) -> Tensor {
        let y = beneath.forward(x);
        let n = self.stretch(beneath.base());
        let again = (ctx.train && self.dropout > 0.0).then(|| dropped(x, self.dropout, ctx));
        let (a, b) = self.factors.effective();
        let wide = |t: &Tensor| t.to_kind(Kind::Float);
        // The part of the layer that is stretched: without its bias.
        let pure = |y: &Tensor| match beneath.bias() {
            Some(bias) => wide(y) - wide(&bias),
            None => wide(y),
        };
        let stretched = match &again {
            None => pure(&y),
            Some(x) => pure(&beneath.forward(x)),
        };
        // (n − 1)∘y₀ + n∘ΔW x, to be added to the layer's own output.
        let b = b * n.unsqueeze(1);
        let x = again.as_ref().unwrap_or(x);
        let more = add_low_rank((n - 1.0) * stretched, x, &a, &b, None, self.factors.scale);
        (wide(&y) + more).to_kind(y.kind())
    }

    fn merge(&self, plain: Plain, base: &dyn LinearOp) -> Option<Plain> {
        let weight = plain.weight.to_kind(Kind::Float) + self.factors.delta();
        let weight = weight * self.stretch(base).unsqueeze(1);
        Some(Plain {
            weight: weight.to_kind(plain.weight.kind()),
            bias: plain.bias,
        })
    }
}

impl Params for Dora {
    fn params(&self, visit: Visit<'_>) {
        visit(A, &self.factors.a);
        visit(B, &self.factors.b);
        visit(MAGNITUDE, &self.magnitude);
    }

    fn saved(&self, visit: Visit<'_>) {
        let (a, b) = self.factors.effective();
        visit(A, &a);
        visit(B, &b);
        visit(MAGNITUDE, &self.magnitude);
    }
}

/// ‖W + ΔW‖ by row `[out]`, without a gradient.
pub(crate) fn norm(weight: &Tensor, factors: &Factors) -> Tensor {
    let _off = tch::no_grad_guard();
    let mut sum = factors.delta(); // the one copy of the weight's size
    let _ = sum.g_add_(weight);
    sum.norm_scalaropt_dim(2.0, [1i64].as_slice(), false)
}
