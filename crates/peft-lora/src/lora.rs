//! LoRA on a linear layer (2106.09685): y = W x + s·B(A·drop(x)), s = α/r.
//!
//! In the paper's words: the pretrained W `[k, d]` stays frozen and its update
//! is constrained to rank r ≪ min(d, k); A is random and B zero at first, so
//! that training begins at the base (section 4.1).

use peft_core::{Beneath, Ctx, LinearAdapter, LinearOp, Params, Plain, Visit};
use peft_torch::add_low_rank;
use tch::Tensor;

use crate::factors::{Factors, add};

/// The on-disk names below a linear layer.
pub(crate) const A: &str = "lora_A.weight";
pub(crate) const B: &str = "lora_B.weight";
pub(crate) const BIAS: &str = "lora_B.bias";

/// What plain LoRA leaves on one layer.
#[derive(Debug)]
pub(crate) struct Lora {
    pub(crate) factors: Factors,
    /// Of B, `[out]`: it is scaled too.
    pub(crate) bias: Option<Tensor>,
    pub(crate) dropout: f64,
}

impl LinearAdapter for Lora {
    fn forward(&self, x: &Tensor, beneath: Beneath<'_>, ctx: Ctx) -> Tensor {
        let y = beneath.forward(x);
        let (a, b) = self.factors.effective();
        let x = dropped(x, self.dropout, ctx);
        add_low_rank(y, &x, &a, &b, self.bias.as_ref(), self.factors.scale)
    }

    fn reads_beneath(&self) -> bool {
        false
    }

    fn merge(&self, plain: Plain, _: &dyn LinearOp) -> Option<Plain> {
        Some(Plain {
            weight: self.factors.onto(&plain.weight),
            bias: merged_bias(
                plain.bias,
                self.bias.as_ref(),
                self.factors.scale,
                plain.weight.kind(),
            ),
        })
    }
}

impl Params for Lora {
    fn params(&self, visit: Visit<'_>) {
        visit(A, &self.factors.a);
        visit(B, &self.factors.b);
        if let Some(bias) = &self.bias {
            visit(BIAS, bias);
        }
    }

    fn saved(&self, visit: Visit<'_>) {
        let (a, b) = self.factors.effective();
        visit(A, &a);
        visit(B, &b);
        if let Some(bias) = &self.bias {
            visit(BIAS, bias);
        }
    }
}

/// In training, x with some of its elements zero and the rest scaled up.
pub(crate) fn dropped(x: &Tensor, p: f64, ctx: Ctx) -> Tensor {
    match ctx.train && p > 0.0 {
        true => x.dropout(p, true),
        false => x.shallow_clone(),
    }
}

/// The layer's bias with B's in it. Python refuses where the layer has none; here it gets one.
pub(crate) fn merged_bias(
    base: Option<Tensor>,
    of_b: Option<&Tensor>,
    scale: f64,
    kind: tch::Kind,
) -> Option<Tensor> {
    match (base, of_b) {
        (base, None) => base,
        (Some(base), Some(bias)) => Some(add(&base, &(bias * scale))),
        (None, Some(bias)) => Some((bias * scale).to_kind(kind)),
    }
}

/// LoRA on an output embedding that shares the table, and therefore the factors, of the input embedding.
///
/// It owns nothing: A of the head is Bᵀ of the embedding and B is Aᵀ.
#[derive(Debug)]
pub(crate) struct TiedHead {
    /// Those of the embedding: A `[r, vocab]`, B `[hidden, r]`.
    pub(crate) factors: Factors,
    pub(crate) dropout: f64,
}

impl TiedHead {
    /// A `[r, hidden]` and B `[vocab, r]` of the head.
    fn turned(&self) -> (Tensor, Tensor) {
        let (a, b) = self.factors.effective();
        (b.tr(), a.tr())
    }
}

impl LinearAdapter for TiedHead {
    fn forward(&self, x: &Tensor, beneath: Beneath<'_>, ctx: Ctx) -> Tensor {
        let y = beneath.forward(x);
        let (a, b) = self.turned();
        let x = dropped(x, self.dropout, ctx);
        add_low_rank(y, &x, &a, &b, None, self.factors.scale)
    }

    fn merge(&self, plain: Plain, _: &dyn LinearOp) -> Option<Plain> {
        Some(Plain {
            weight: add(&plain.weight, &self.factors.delta().tr()),
            bias: plain.bias,
        })
    }
}

impl Params for TiedHead {
    fn params(&self, _: Visit<'_>) {}

    fn derived(&self, visit: Visit<'_>) {
        let (a, b) = self.turned();
        visit(A, &a);
        visit(B, &b);
    }
}
