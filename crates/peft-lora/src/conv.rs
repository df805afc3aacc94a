//! LoRA and DoRA on a convolution: A with the kernel of the base to r channels, B a 1×…×1 mix of them.
//!
//! ```text
//! y = W ∗ x + b + s·B ∗ (A ∗ drop(x))        A [r, in, kernel…]   B [out, r / groups, 1…]
//! ΔW[o, i, q] = s Σⱼ B[o, j] A[j, i, q]      for one group
//! ```
//!
//! A moves as the base does (stride, padding, dilation), so that BA has the form of a weight. It sees all input channels even
//! where the base has groups; B has the groups of the base, which r must be a multiple of. So a grouped layer's update
//! mixes channels that its weight keeps apart, and there is no weight of this shape that it could be merged into.
//!
//! Python's `peft` makes A without the dilation of the base. Its outputs then have another size than the base's and the
//! forward pass fails, or, with padding `same`, it is another function than the merged weight. Here A is dilated, which is
//! what Python merges.
//!
//! DoRA is that of linear layers with the norm over everything but the output channel; m is kept `[1, out, 1…]`, as
//! Python keeps it.

use peft_core::{BeneathConv, ConvAdapter, Ctx, DenseConv, Geometry, Params, Plain, Visit};
use tch::{Kind, Tensor};

use crate::{
    dora::MAGNITUDE,
    factors::{add, leaf},
    lora::{A, B, BIAS, dropped, merged_bias},
};

/// What LoRA or DoRA leaves on one convolution.
#[derive(Debug)]
pub(crate) struct ConvLora {
    /// `[r, in, kernel…]`
    a: Tensor,
    /// `[out, r / groups, 1…]`
    b: Tensor,
    /// Of B, `[out]`: it is scaled too.
    bias: Option<Tensor>,
    /// m `[1, out, 1…]` for DoRA, which has one group.
    magnitude: Option<Tensor>,
    scale: f64,
    dropout: f64,
}

impl ConvLora {
    /// Plain LoRA from first factors.
    pub(crate) fn new(a: &Tensor, b: &Tensor, scale: f64, dropout: f64) -> ConvLora {
        ConvLora {
            a: leaf(a),
            b: leaf(b),
            bias: None,
            magnitude: None,
            scale,
            dropout,
        }
    }

    /// With a bias of B `[out]`.
    pub(crate) fn with_bias(self, bias: &Tensor) -> ConvLora {
        let bias = Some(leaf(bias));
        ConvLora { bias, ..self }
    }

    /// With a magnitude, which is what the layer has now.
    pub(crate) fn dora(self, base: &DenseConv) -> ConvLora {
        let shape = by_channel(base, 1);
        let magnitude = self.norm(base).view(shape.as_slice());
        ConvLora {
            magnitude: Some(leaf(&magnitude)),
            ..self
        }
    }

    /// s·B ∗ (A ∗ x), in fp32; x: `[batch, in, …] -> [batch, out, …]`
    fn update(&self, x: &Tensor, geometry: &Geometry) -> Tensor {
        let whole = Geometry {
            groups: 1,
            ..geometry.clone()
        };
        let mix = Geometry {
            groups: geometry.groups,
            ..Geometry::plain(geometry.stride.len())
        };
        let h = whole.apply(&x.to_kind(Kind::Float), &self.a, None); // [batch, r, …]
        mix.apply(&h, &self.b, self.bias.as_ref()) * self.scale
    }

    /// ΔW `[out, in, kernel…]` in fp32, of a layer with one group.
    fn delta(&self, base: &DenseConv) -> Tensor {
        let r = self.a.size()[0];
        let product = self.b.view([-1, r]).matmul(&self.a.view([r, -1])); // [out, in · kernel]
        product.view(base.weight().size().as_slice()) * self.scale
    }

    /// ‖W + ΔW‖ by output channel `[out]`, without a gradient.
    fn norm(&self, base: &DenseConv) -> Tensor {
        let _off = tch::no_grad_guard();
        let sum = self.delta(base) + base.weight();
        sum.flatten(1, -1)
            .norm_scalaropt_dim(2.0, [1i64].as_slice(), false)
    }

    /// n = m/‖W + ΔW‖ `[out]`, for DoRA.
    fn stretch(&self, base: &DenseConv) -> Option<Tensor> {
        let magnitude = self.magnitude.as_ref()?;
        Some(magnitude.view([-1]) / self.norm(base))
    }

    /// y₀ is what lies beneath gives for x: n∘(y₀ − b) + b + n∘s·B ∗ (A ∗ x). With dropout W sees the dropped x, too.
    fn stretched(&self, n: &Tensor, x: &Tensor, beneath: BeneathConv<'_>, ctx: Ctx) -> Tensor {
        let base = beneath.base();
        let shape = by_channel(base, 0);
        let wide = |t: &Tensor| t.to_kind(Kind::Float);
        let n = n.view(shape.as_slice()); // [out, 1…]
        let bias = beneath.bias().map(|b| wide(&b).view(shape.as_slice()));
        let pure = |y: &Tensor| match &bias {
            Some(bias) => wide(y) - bias,
            None => wide(y),
        };
        let y = beneath.forward(x);
        let x = dropped(x, self.dropout, ctx);
        let seen = match ctx.train && self.dropout > 0.0 {
            true => pure(&beneath.forward(&x)),
            false => pure(&y),
        };
        let change = (&n - 1.0) * seen + n * self.update(&x, base.geometry());
        (wide(&y) + change).to_kind(y.kind())
    }
}

impl ConvAdapter for ConvLora {
    fn forward(&self, x: &Tensor, beneath: BeneathConv<'_>, ctx: Ctx) -> Tensor {
        if let Some(n) = self.stretch(beneath.base()) {
            return self.stretched(&n, x, beneath, ctx);
        }
        let y = beneath.forward(x);
        let update = self.update(&dropped(x, self.dropout, ctx), beneath.base().geometry());
        add(&y, &update)
    }

    fn merge(&self, plain: Plain, base: &DenseConv) -> Option<Plain> {
        if base.geometry().groups > 1 {
            return None;
        }
        let kind = plain.weight.kind();
        let weight = match self.stretch(base) {
            None => add(&plain.weight, &self.delta(base)),
            Some(n) => {
                let n = n.view(by_channel(base, 0).as_slice()).unsqueeze(1); // [out, 1, 1…]
                ((plain.weight.to_kind(Kind::Float) + self.delta(base)) * n).to_kind(kind)
            }
        };
        let bias = merged_bias(plain.bias, self.bias.as_ref(), self.scale, kind);
        Some(Plain { weight, bias })
    }
}

impl Params for ConvLora {
    fn params(&self, visit: Visit<'_>) {
        visit(A, &self.a);
        visit(B, &self.b);
        if let Some(bias) = &self.bias {
            visit(BIAS, bias);
        }
        if let Some(magnitude) = &self.magnitude {
            visit(MAGNITUDE, magnitude);
        }
    }
}

/// The shape of one number a channel: `[out, 1…]` beside an output, with `front` axes before the channels.
fn by_channel(base: &DenseConv, front: usize) -> Vec<i64> {
    let axes = base.geometry().stride.len();
    let ones = |n: usize| std::iter::repeat_n(1, n);
    ones(front).chain([-1]).chain(ones(axes)).collect()
}
