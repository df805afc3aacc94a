//! LoRA and DoRA on an embedding table: E' = E + s·(BA)ᵀ, A `[r, vocab]`, B `[hidden, r]`.
//!
//! A row of E' is needed only for the tokens that occur, so A is looked up as E is:
//! y = E[ids] + s·Aᵀ[ids] Bᵀ. DoRA keeps a magnitude for each column of the table:
//! y = n∘(E[ids] + s·Aᵀ[ids] Bᵀ), n = m/‖E'‖ by column.

use peft_core::{BeneathEmbedding, Ctx, EmbeddingAdapter, Params, Visit};
use tch::{Kind, Tensor};

use crate::{
    dora::MAGNITUDE,
    factors::{Factors, add, leaf},
};

/// The on-disk names below an embedding; they have no `.weight`.
pub(crate) const A: &str = "lora_embedding_A";
pub(crate) const B: &str = "lora_embedding_B";

/// What LoRA or DoRA leaves on a table.
#[derive(Debug)]
pub(crate) struct EmbeddingLora {
    factors: Factors,
    /// m `[hidden]` for DoRA.
    magnitude: Option<Tensor>,
}

impl EmbeddingLora {
    /// Plain LoRA.
    pub(crate) fn new(factors: Factors) -> EmbeddingLora {
        EmbeddingLora {
            factors,
            magnitude: None,
        }
    }

    /// With a magnitude, which is what `table` `[vocab, hidden]` has now.
    pub(crate) fn dora(factors: Factors, table: &Tensor) -> EmbeddingLora {
        let magnitude = Some(leaf(&norm(&table.tr(), &factors)));
        EmbeddingLora { factors, magnitude }
    }

    /// n `[hidden]`
    fn stretch(&self, base: &Tensor) -> Option<Tensor> {
        let magnitude = self.magnitude.as_ref()?;
        Some(magnitude / norm(&base.tr(), &self.factors))
    }
}

impl EmbeddingAdapter for EmbeddingLora {
    fn forward(&self, ids: &Tensor, beneath: BeneathEmbedding<'_>, _: Ctx) -> Tensor {
        let y = beneath.forward(ids);
        let (a, b) = self.factors.effective();
        let h = beneath.look_up(&a.tr(), ids); // [.., r]
        let sum = y.to_kind(Kind::Float) + h.matmul(&b.tr()) * self.factors.scale;
        let sum = match self.stretch(beneath.base()) {
            Some(n) => sum * n,
            None => sum,
        };
        sum.to_kind(y.kind())
    }

    fn merge(&self, weight: Tensor, base: &Tensor) -> Option<Tensor> {
        let delta = self.factors.delta().tr();
        Some(match self.stretch(base) {
            Some(n) => ((weight.to_kind(Kind::Float) + delta) * n).to_kind(weight.kind()),
            None => add(&weight, &delta),
        })
    }
}

impl Params for EmbeddingLora {
    fn params(&self, visit: Visit<'_>) {
        visit(A, &self.factors.a);
        visit(B, &self.factors.b);
        if let Some(magnitude) = &self.magnitude {
            visit(MAGNITUDE, magnitude);
        }
    }

    fn saved(&self, visit: Visit<'_>) {
        let (a, b) = self.factors.effective();
        visit(A, &a);
        visit(B, &b);
        if let Some(magnitude) = &self.magnitude {
            visit(MAGNITUDE, magnitude);
        }
    }
}

/// Norms of the columns of a table with ΔW, without a gradient: `[hidden, vocab] -> [hidden]`.
fn norm(weight: &Tensor, factors: &Factors) -> Tensor {
    let _off = tch::no_grad_guard();
    let sum = factors.delta() + weight;
    sum.norm_scalaropt_dim(2.0, [1i64].as_slice(), false)
}
