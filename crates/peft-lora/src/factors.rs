//! A and B of one layer, and what they add to its weight: ΔW = s·BA.
//!
//! For PiSSA and OLoRA the first factors A₀, B₀ are kept too, and
//! ΔW = s·(BA − B₀A₀) = s·[B −B₀]·[A; A₀]: a LoRA of twice the rank, which is
//! also how it is saved, so that a reader needs nothing but plain LoRA.

use peft_core::{Result, State};
use peft_torch::thin;
use tch::{Kind, Tensor};

/// Names under which an embedding leaves its factors for a tied head.
const LENT: [&str; 4] = ["a", "b", "first a", "first b"];

/// A pair of factors.
#[derive(Debug)]
pub(crate) struct Factors {
    /// `[r, in]`
    pub(crate) a: Tensor,
    /// `[out, r]`
    pub(crate) b: Tensor,
    /// What A and B began as, where that is part of the base.
    pub(crate) first: Option<(Tensor, Tensor)>,
    /// s
    pub(crate) scale: f64,
}

impl Factors {
    /// Trainable factors; `subtract`: what they are now belongs to the base.
    pub(crate) fn new(a: &Tensor, b: &Tensor, scale: f64, subtract: bool) -> Factors {
        let first = subtract.then(|| (a.copy(), b.copy()));
        Factors {
            a: leaf(a),
            b: leaf(b),
            first,
            scale,
        }
    }

    /// The factors in effect: `[r, in]` and `[out, r]`, or twice that rank.
    pub(crate) fn effective(&self) -> (Tensor, Tensor) {
        match &self.first {
            None => (self.a.shallow_clone(), self.b.shallow_clone()),
            Some((a, b)) => (
                Tensor::cat(&[&self.a, a], 0),
                Tensor::cat(&[&self.b, &-b], 1),
            ),
        }
    }

    /// Leaves handles to the tensors in `shared`.
    pub(crate) fn lend(&self, shared: &mut State) {
        let first = self.first.iter().flat_map(|(a, b)| [a, b]);
        for (name, tensor) in LENT.iter().zip([&self.a, &self.b].into_iter().chain(first)) {
            shared.insert((*name).to_owned(), tensor.shallow_clone());
        }
    }

    /// Takes what [`Factors::lend`] left.
    pub(crate) fn lent<'a>(
        shared: &'a State,
        scale: f64,
        take: impl Fn(&'a State, &str) -> Result<&'a Tensor>,
    ) -> Result<Factors> {
        let handle = |i: usize| take(shared, LENT[i]).map(Tensor::shallow_clone);
        let first = match shared.contains_key(LENT[2]) {
            true => Some((handle(2)?, handle(3)?)),
            false => None,
        };
        Ok(Factors {
            a: handle(0)?,
            b: handle(1)?,
            first,
            scale,
        })
    }

    /// W + ΔW, rounded once, in the strides of W; weight: `[out, in]`.
    pub(crate) fn onto(&self, weight: &Tensor) -> Tensor {
        let (a, b) = self.effective();
        if weight.is_contiguous() {
            let mut sum = weight.copy();
            thin::add(&mut sum, &b, &a, self.scale);
            return sum;
        }
        let mut sum = weight.tr().contiguous().copy();
        let [a, b] = [a, b].map(|t| t.tr().contiguous());
        thin::add(&mut sum, &a, &b, self.scale);
        sum.tr()
    }

    /// ΔW `[out, in]` in fp32.
    pub(crate) fn delta(&self) -> Tensor {
        let (a, b) = self.effective();
        b.matmul(&a) * self.scale
    }
}

/// A trainable copy in fp32, dense in memory.
pub(crate) fn leaf(t: &Tensor) -> Tensor {
    let copy = tch::no_grad(|| t.detach().to_kind(Kind::Float).contiguous().copy());
    copy.set_requires_grad(true)
}

/// `weight + delta`, summed in fp32 and rounded once.
pub(crate) fn add(weight: &Tensor, delta: &Tensor) -> Tensor {
    (weight.to_kind(Kind::Float) + delta).to_kind(weight.kind())
}
