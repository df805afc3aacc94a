//! The product of a low-rank adapter, added to the output of a layer in its own memory, with its gradients.
//!
//! It decides the time of a training step of LoRA and its relatives, y + s·(x Aᵀ) Bᵀ:
//!
//! ```text
//! h  = x Aᵀ                      [rows, r]
//! y += s·h Bᵀ                    [rows, out]
//! dB = s·gᵀh   dA = s·(gB)ᵀx   dx = s·(gB)A   dy = g
//! ```
//!
//! Written with libtorch's operations this would be two products, a scaling and
//! a sum, each with a temporary as large as y, and the same again backwards. It
//! is arithmetic for a few multiplications per number of y, so memory is what
//! it costs: here y is changed where it lies, its gradient is handed on as it
//! came, and only x and h (r numbers a row) are kept.
//!
//! A and B stay in fp32 over a base in bf16: x is read in its own dtype, sums
//! are fp32, and the sum with y is rounded once.

use crate::{Function, apply, thin};
use tch::{Kind, TchError, Tensor};

/// `y + scale · ((x aᵀ) bᵀ + bias)`; y is used up.
///
/// y: `[.., out]`, x: `[.., in]`, a: `[r, in]`, b: `[out, r]`, bias: `[out]` -> `[.., out]` in the dtype of y.
///
/// # Panics
/// If the shapes do not fit together, or y is not dense in memory.
pub fn add_low_rank(
    y: Tensor,
    x: &Tensor,
    a: &Tensor,
    b: &Tensor,
    bias: Option<&Tensor>,
    scale: f64,
) -> Tensor {
    let mut inputs = vec![&y, x, a, b];
    inputs.extend(bias);
    let [sum] = apply(&inputs, || {
        let (rows, a, b) = (thin::rows(x), a.detach(), b.detach());
        let h = thin::project(&rows, &a); // [rows, r]
        let mut sum = y.detach();
        match bias {
            None => thin::add(&mut sum, &h, &b.tr(), scale),
            Some(bias) => {
                // One more rank, whose h is always 1: so the sum is rounded once.
                let h = Tensor::cat(
                    &[&h, &h.new_ones([h.size()[0], 1], (h.kind(), h.device()))],
                    1,
                );
                let b = Tensor::cat(&[&b, &bias.detach().unsqueeze(1)], 1);
                thin::add(&mut sum, &h, &b.tr(), scale);
            }
        }
        let saved = LowRank {
            x: rows.detach(),
            shape: x.size(),
            h,
            a,
            b,
            scale,
        };
        ([sum], saved)
    });
    sum
}

struct LowRank {
    /// `[rows, in]`, in its own dtype
    x: Tensor,
    shape: Vec<i64>,
    /// `[rows, r]`
    h: Tensor,
    a: Tensor,
    b: Tensor,
    scale: f64,
}

impl Function for LowRank {
    fn backward(
        &self,
        grads: &[Option<Tensor>],
        needs: &[bool],
    ) -> Result<Vec<Option<Tensor>>, TchError> {
        let Some(g) = &grads[0] else {
            return Ok(needs.iter().map(|_| None).collect());
        };
        let rows = thin::rows(g); // [rows, out]
        let gb = thin::project(&rows, &self.b.tr()); // [rows, r]
        let dx = needs[1].then(|| thin::expand(&gb, &self.a, self.scale, self.x.kind()));
        let da = needs[2].then(|| thin::outer(&gb, &self.x, self.scale));
        let db = needs[3].then(|| thin::outer(&self.h, &rows, self.scale).tr());
        let dx = dx.map(|dx| dx.view(self.shape.as_slice()));
        let mut all = vec![needs[0].then(|| g.shallow_clone()), dx, da, db];
        if let Some(&bias) = needs.get(4) {
            let sum = || rows.sum_dim_intlist([0i64].as_slice(), false, Kind::Float) * self.scale;
            all.push(bias.then(sum));
        }
        Ok(all)
    }
}
