//! The factors of one layer: l on its output, y = l ∘ (W x + b), or on its input, y = W (l ∘ x) + b.
//!
//! On the output, what `beneath` gives is scaled in its own memory where the factors are constant, and in one pass where
//! they are trained; on the input the product with W is of l ∘ x, so that a quantised W need not be touched. Both are
//! the same function with the same gradient, [`peft_torch::scale`]. The factors stay in fp32 over a base in bf16.

use peft_core::{Beneath, Ctx, LinearAdapter, LinearOp, Params, Plain, Visit};
use peft_torch::{scale, scale_};
use tch::{Device, Kind, Tensor};

/// The on-disk name below a layer.
pub(crate) const L: &str = "ia3_l";

/// What (IA)³ leaves on one layer.
#[derive(Debug)]
pub(crate) struct Factors {
    /// `[out, 1]` on the output, `[1, in]` on the input: so it can be told from the file alone.
    l: Tensor,
    on_input: bool,
}

impl Factors {
    /// Ones, or normal numbers, for a layer of this shape `(out, in)`.
    pub(crate) fn new(
        (out, inp): (i64, i64),
        on_input: bool,
        random: bool,
        device: Device,
    ) -> Factors {
        let shape = if on_input { [1, inp] } else { [out, 1] };
        let at = (Kind::Float, device);
        let l = if random {
            Tensor::randn(shape, at)
        } else {
            Tensor::ones(shape, at)
        };
        Factors {
            l: l.set_requires_grad(true),
            on_input,
        }
    }

    /// `[out]` or `[in]`
    fn row(&self) -> Tensor {
        self.l.view([-1])
    }
}

impl LinearAdapter for Factors {
    fn forward(&self, x: &Tensor, beneath: Beneath<'_>, _: Ctx) -> Tensor {
        match self.on_input {
            true => beneath.forward(&scale(x, &self.row())),
            false => scale_(beneath.forward(x), &self.row()),
        }
    }

    fn merge(&self, plain: Plain, _: &dyn LinearOp) -> Option<Plain> {
        let Plain { weight, bias } = plain;
        Some(Plain {
            weight: times(&weight, &self.l),
            bias: match self.on_input {
                true => bias,
                false => bias.map(|b| times(&b, &self.row())),
            },
        })
    }
}

impl Params for Factors {
    fn params(&self, visit: Visit<'_>) {
        visit(L, &self.l);
    }
}

/// The product, rounded once to the dtype of `t`.
fn times(t: &Tensor, by: &Tensor) -> Tensor {
    (t.to_kind(Kind::Float) * by).to_kind(t.kind())
}
