//! The two vectors of one layer, around random matrices that belong to all: λ_b ∘ (B (λ_d ∘ (A·drop(x)))).
//!
//! The matrices are no gradient's concern, so nothing as large as x is kept for them: backwards there are two products, and
//! for each vector the numbers that it scaled, r and out a row.

use peft_core::{Beneath, Ctx, LinearAdapter, LinearOp, Params, Plain, Result, Visit};
use peft_torch::{add_, linear, rng, scale};
use tch::{Device, Kind, Tensor};

/// On-disk names: of a layer, and of the model.
const LAMBDA_B: &str = "vera_lambda_b";
const LAMBDA_D: &str = "vera_lambda_d";
pub(crate) const A: &str = "vera_A";
pub(crate) const B: &str = "vera_B";

/// A `[r, widest in]` and B `[widest out, r]`, in fp32.
#[derive(Debug)]
pub(crate) struct Projection {
    pub(crate) a: Tensor,
    pub(crate) b: Tensor,
}

impl Projection {
    /// Uniform as He's initialisation has it, A first, then B, as Python draws them.
    pub(crate) fn draw(
        key: u64,
        r: i64,
        (out, inp): (i64, i64),
        device: Device,
    ) -> Result<Projection> {
        let kaiming = |rows: i64, columns: i64| {
            let bound = 3f64.sqrt() * (2f64.sqrt() / (columns as f64).sqrt());
            Tensor::zeros([rows, columns], (Kind::Float, Device::Cpu)).uniform_(-bound, bound)
        };
        let (a, b) = rng::with_seed(key as i64, || (kaiming(r, inp), kaiming(out, r)))?;
        Ok(Projection {
            a: a.to_device(device),
            b: b.to_device(device),
        })
    }

    /// Handles to the same tensors.
    pub(crate) fn share(&self) -> Projection {
        Projection {
            a: self.a.shallow_clone(),
            b: self.b.shallow_clone(),
        }
    }
}

/// What a place has to do with the file's copy of the matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// Another place shows them.
    Guest,
    /// Shows them for the whole model.
    Owner {
        /// The file has them.
        saved: bool,
    },
}

/// What VeRA leaves on one layer.
#[derive(Debug)]
pub(crate) struct Scaled {
    /// `[out]`
    lambda_b: Tensor,
    /// `[r]`
    lambda_d: Tensor,
    projection: Projection,
    role: Role,
    dropout: f64,
}

impl Scaled {
    /// On a layer with `out` outputs; `initial`: what λ_d begins with, and λ_b with zero; `None`: both random or one.
    pub(crate) fn new(
        out: i64,
        projection: Projection,
        role: Role,
        initial: Option<f64>,
        dropout: f64,
    ) -> Scaled {
        let at = (Kind::Float, projection.a.device());
        let r = projection.a.size()[0];
        let (lambda_b, lambda_d) = match initial {
            Some(d) => (Tensor::zeros([out], at), Tensor::full([r], d, at)),
            None => (Tensor::ones([out], at), Tensor::randn([r], at)),
        };
        Scaled {
            lambda_b: lambda_b.set_requires_grad(true),
            lambda_d: lambda_d.set_requires_grad(true),
            projection,
            role,
            dropout,
        }
    }

    /// The part of A and B that a layer `(out, in)` takes: `[r, in]`, `[out, r]`.
    fn part(&self, inp: i64) -> (Tensor, Tensor) {
        let Projection { a, b } = &self.projection;
        (a.narrow(1, 0, inp), b.narrow(0, 0, self.lambda_b.size()[0]))
    }
}

impl LinearAdapter for Scaled {
    fn forward(&self, x: &Tensor, beneath: Beneath<'_>, ctx: Ctx) -> Tensor {
        let y = beneath.forward(x);
        let x = x.to_kind(Kind::Float);
        let x = match ctx.train && self.dropout > 0.0 {
            true => x.dropout(self.dropout, true),
            false => x,
        };
        let (a, b) = self.part(x.size()[x.dim() - 1]);
        let h = scale(&linear(&x, &a, None), &self.lambda_d); // [.., r]
        let delta = scale(&linear(&h, &b, None), &self.lambda_b); // [.., out]
        add_(y, &delta)
    }

    fn reads_beneath(&self) -> bool {
        false
    }

    fn merge(&self, plain: Plain, _: &dyn LinearOp) -> Option<Plain> {
        let (a, b) = self.part(plain.weight.size()[1]);
        let (left, right) = (
            b * self.lambda_b.unsqueeze(1),
            a * self.lambda_d.unsqueeze(1),
        );
        let weight = plain.weight.to_kind(Kind::Float) + left.matmul(&right);
        Some(Plain {
            weight: weight.to_kind(plain.weight.kind()),
            bias: plain.bias,
        })
    }
}

impl Scaled {
    fn vectors(&self, visit: Visit<'_>) {
        visit(LAMBDA_B, &self.lambda_b);
        visit(LAMBDA_D, &self.lambda_d);
    }

    fn matrices(&self, visit: Visit<'_>) {
        visit(A, &self.projection.a);
        visit(B, &self.projection.b);
    }
}

impl Params for Scaled {
    fn params(&self, visit: Visit<'_>) {
        self.vectors(visit);
        if self.role != Role::Guest {
            self.matrices(visit);
        }
    }

    /// A file that has them although its configuration says that it has not: passed over, as in Python.
    fn derived(&self, visit: Visit<'_>) {
        if self.role == (Role::Owner { saved: false }) {
            self.matrices(visit);
        }
    }

    fn saved(&self, visit: Visit<'_>) {
        self.vectors(visit);
        if self.role == (Role::Owner { saved: true }) {
            self.matrices(visit);
        }
    }
}
