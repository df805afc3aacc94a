//! Products with a matrix of few rows: what a low-rank adapter costs.
//!
//! ```text
//! project  h = x aᵀ      [m, n] · [r, n]ᵀ -> [m, r]
//! add      y += s·h a    [m, r] · [r, n] onto [m, n]
//! expand   y  = s·h a
//! outer    c = s·hᵀ x    [m, r]ᵀ · [m, n] -> [r, n]
//! ```
//!
//! With r of 4 to 64 these do a handful of multiplications for each number
//! that they read or write, so memory decides: a general product, which is made for
//! square matrices, followed by a scaling and a sum reads and writes them
//! several times. The kernels here do it once, in fp32 or bf16, with sums in
//! fp32. On another device or dtype libtorch does the same in more steps.

use crate::ffi;
use tch::{Device, Kind, Tensor};

/// `[.., n]` as dense rows `[m, n]`.
pub fn rows(t: &Tensor) -> Tensor {
    let n = t.size().last().copied().unwrap_or(1);
    let m = t.numel() as i64 / n.max(1);
    t.reshape([m, n]).contiguous()
}

/// `x aᵀ`; x: `[m, n]`, a: `[r, n]` in fp32 -> `[m, r]` in fp32. No gradient.
///
/// # Panics
/// If the shapes do not fit.
pub fn project(x: &Tensor, a: &Tensor) -> Tensor {
    if native(x) {
        return ffi::thin_project(x, a).expect("two matrices that fit");
    }
    x.to_kind(a.kind()).matmul(&a.tr())
}

/// `y += scale · h a` in place, rounded once; y: `[.., n]` dense, h: `[m, r]`, a: `[r, n]`. No gradient.
///
/// # Panics
/// If the shapes do not fit.
pub fn add(y: &mut Tensor, h: &Tensor, a: &Tensor, scale: f64) {
    if native(y) && y.is_contiguous() {
        let mut flat = y.view([h.size()[0], a.size()[1]]);
        return ffi::thin_add(&mut flat, h, a, scale).expect("matrices that fit");
    }
    let delta = h.matmul(a) * scale;
    let sum = y.to_kind(delta.kind()) + delta.view_as(y);
    y.copy_(&sum);
}

/// `scale · h a` of a dtype; h: `[m, r]`, a: `[r, n]` -> `[m, n]`. No gradient.
///
/// # Panics
/// If the shapes do not fit.
pub fn expand(h: &Tensor, a: &Tensor, scale: f64, kind: Kind) -> Tensor {
    if native(h) && matches!(kind, Kind::Float | Kind::BFloat16) {
        let half = kind == Kind::BFloat16;
        return ffi::thin_expand(h, a, scale, half).expect("two matrices that fit");
    }
    (h.matmul(a) * scale).to_kind(kind)
}

/// `scale · hᵀ x`; h: `[m, r]`, x: `[m, n]` -> `[r, n]` in the dtype of h. No gradient.
///
/// # Panics
/// If the shapes do not fit.
pub fn outer(h: &Tensor, x: &Tensor, scale: f64) -> Tensor {
    if native(x) && h.kind() == Kind::Float {
        return ffi::thin_outer(h, x, scale).expect("two matrices that fit");
    }
    h.tr().matmul(&x.to_kind(h.kind())) * scale
}

/// Whether the kernels take this tensor.
fn native(t: &Tensor) -> bool {
    t.device() == Device::Cpu && matches!(t.kind(), Kind::Float | Kind::BFloat16)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(actual: &Tensor, expected: &Tensor, tolerance: f64, what: &str) {
        let [a, e] = [actual, expected].map(|t| t.to_kind(Kind::Double));
        let off = (a - &e).abs().max().double_value(&[]) / e.abs().max().double_value(&[]);
        assert!(off < tolerance, "{what}: off by {off:e}");
    }

    /// Sizes around the edges of a tile, ranks around its height.
    #[test]
    fn they_are_the_products_they_say() {
        for (m, n, r) in [
            (1, 1, 1),
            (3, 15, 2),
            (4, 16, 4),
            (9, 83, 5),
            (64, 200, 8),
            (70, 129, 17),
        ] {
            for (kind, tolerance) in [(Kind::Float, 1e-6), (Kind::BFloat16, 4e-3)] {
                let what = format!("{m} × {n}, rank {r}, {kind:?}");
                let random = |shape: [i64; 2]| Tensor::randn(shape, (Kind::Float, Device::Cpu));
                let (x, a, h) = (random([m, n]).to_kind(kind), random([r, n]), random([m, r]));
                let wide = |t: &Tensor| t.to_kind(Kind::Double);
                close(
                    &project(&x, &a),
                    &wide(&x).matmul(&wide(&a).tr()),
                    1e-5,
                    &what,
                );
                let product = wide(&h).matmul(&wide(&a)) * 1.7;
                close(
                    &expand(&h, &a.tr().contiguous().tr(), 1.7, kind),
                    &product,
                    tolerance,
                    &what,
                );
                let mut y = x.copy();
                add(&mut y, &h, &a, 1.7);
                close(&y, &(wide(&x) + product), tolerance, &what);
                close(
                    &outer(&h, &x, 1.7),
                    &(wide(&h).tr().matmul(&wide(&x)) * 1.7),
                    1e-5,
                    &what,
                );
            }
        }
    }

    #[test]
    fn empty_batches_give_empty_or_zero() {
        let none = Tensor::zeros([0, 5], (Kind::Float, Device::Cpu));
        let a = Tensor::ones([2, 5], (Kind::Float, Device::Cpu));
        let h = project(&none, &a);
        assert_eq!(h.size(), [0, 2]);
        assert_eq!(
            outer(&h, &none, 1.0)
                .abs()
                .sum(Kind::Float)
                .double_value(&[]),
            0.0
        );
        assert_eq!(
            rows(&Tensor::zeros([2, 0, 5], (Kind::Float, Device::Cpu))).size(),
            [0, 5]
        );
    }
}
