//! DoRA (2402.09353): the weight as a magnitude for each output and a direction.
//!
//! ```text
//! W' = m/‖W + ΔW‖ ∘ (W + ΔW)        m [out], norms by row
//! y  = W' x + b = n∘(y₀ − b) + b + n∘ΔW x,   n = m/‖W + ΔW‖
//! ```
//!
//! The norm follows ΔW but takes no gradient (section 4.3 of the paper): it is
//! a constant of the step. It is that of the base, whatever else is stacked on
//! the layer. No matrix of the size of W is needed for it:
//!
//! ```text
//! ‖w + s bA‖² = ‖w‖² + 2s (w Aᵀ)·b + s² b A Aᵀ·b        for each row w of W and b of B
//! ```
//!
//! and ‖w‖² never changes. With dropout ΔW and W see the same dropped input,
//! so the layer itself runs once more.

use peft_core::{Beneath, Ctx, LinearAdapter, LinearOp, Params, Plain, Visit};
use peft_torch::{add_low_rank, thin};
use tch::{Kind, Tensor};

use crate::{
    factors::{Factors, leaf},
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
    /// ‖w‖² of the rows of the base `[out]`
    squares: Tensor,
    dropout: f64,
}

impl Dora {
    /// With the magnitude that the layer has now.
    pub(crate) fn new(factors: Factors, base: &dyn LinearOp, dropout: f64) -> Dora {
        let rows = [1i64];
        let squares = tch::no_grad(|| {
            let weight = base.weight().to_kind(Kind::Float);
            weight
                .square()
                .sum_dim_intlist(rows.as_slice(), false, Kind::Float)
        });
        let magnitude = leaf(&norm(&factors, base, &squares));
        Dora {
            factors,
            magnitude,
            squares,
            dropout,
        }
    }

    /// n `[out]`
    fn stretch(&self, base: &dyn LinearOp) -> Tensor {
        &self.magnitude / norm(&self.factors, base, &self.squares)
    }
}

impl LinearAdapter for Dora {
    fn forward(&self, x: &Tensor, beneath: Beneath<'_>, ctx: Ctx) -> Tensor {
        let wide = |t: &Tensor| t.to_kind(Kind::Float);
        let y = beneath.forward(x);
        let n = self.stretch(beneath.base());
        let bias = beneath.bias().as_ref().map(wide);
        let pure = |y: &Tensor| match &bias {
            Some(bias) => wide(y) - bias,
            None => wide(y),
        };
        let (a, b) = self.factors.effective();
        let b = b * n.unsqueeze(1);
        let more = |y: Tensor, x: &Tensor| add_low_rank(y, x, &a, &b, None, self.factors.scale);
        let sum = if ctx.train && self.dropout > 0.0 {
            let x = dropped(x, self.dropout, ctx);
            let stretched = wide(&y) + (&n - 1.0) * pure(&beneath.forward(&x));
            more(stretched, &x)
        } else {
            let stretched = pure(&y) * &n;
            let stretched = match &bias {
                Some(bias) => stretched + bias,
                None => stretched,
            };
            more(stretched, x)
        };
        sum.to_kind(y.kind())
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

/// ‖W + ΔW‖ by row `[out]`, without a gradient; squares: ‖w‖² by row.
fn norm(factors: &Factors, base: &dyn LinearOp, squares: &Tensor) -> Tensor {
    let _off = tch::no_grad_guard();
    let (a, b) = factors.effective();
    let weight = base.weight();
    let crossed = match base.transposed() {
        false => thin::project(&weight.contiguous(), &a), // [out, r]
        true => thin::outer(&a.tr(), &weight.tr().contiguous(), 1.0).tr(),
    };
    let own = b.matmul(&a.matmul(&a.tr())); // [out, r]
    let s = factors.scale;
    let change = (crossed * (2.0 * s) + own * (s * s)) * b;
    let sum = squares + change.sum_dim_intlist([1i64].as_slice(), false, Kind::Float);
    sum.clamp_min(0.0).sqrt()
}
