//! Products with a matrix of few rows: what a low-rank adapter costs.
//!
//! With r of 4 to 64 these do a handful of multiplications for each number
//! they read, so memory decides.

use tch::{Kind, Tensor};

/// `[.., n]` as dense rows `[m, n]`.
pub fn rows(t: &Tensor) -> Tensor {
    t.reshape([-1, t.size()[t.dim() - 1]]).contiguous()
}

/// h = x aᵀ; x: `[m, n]`, a: `[r, n]` in fp32 -> `[m, r]` in fp32.
pub fn project(x: &Tensor, a: &Tensor) -> Tensor {
    x.to_kind(Kind::Float).matmul(&a.tr())
}

/// y += scale · h a in place; y: `[.., n]`, h: `[m, r]`, a: `[r, n]`.
pub fn add(y: &mut Tensor, h: &Tensor, a: &Tensor, scale: f64) {
    let delta = h.matmul(a) * scale;
    let sum = (y.to_kind(Kind::Float) + delta.view_as(y)).to_kind(y.kind());
    y.copy_(&sum);
}

/// scale · h a; h: `[m, r]`, a: `[r, n]` -> `[m, n]` of a kind.
pub fn expand(h: &Tensor, a: &Tensor, scale: f64, kind: Kind) -> Tensor {
    (h.matmul(a) * scale).to_kind(kind)
}

/// scale · hᵀ x; h: `[m, r]`, x: `[m, n]` -> `[r, n]` in fp32.
pub fn outer(h: &Tensor, x: &Tensor, scale: f64) -> Tensor {
    h.tr().matmul(&x.to_kind(Kind::Float)) * scale
}
