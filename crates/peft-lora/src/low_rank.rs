//! The best product of a given rank, BA, of a matrix or of a sum of products.
//!
//! ```text
//! M = U S Vᵀ              B = Uᵣ Sᵣ   A = Vᵣᵀ              the nearest of rank r (Eckart, Young)
//! M = P Q = Qₚ Rₚ R_qᵀ Q_qᵀ                                P [m, k]   Q [k, n]
//!         = (Qₚ U) S (Q_q V)ᵀ,  U S Vᵀ = Rₚ R_qᵀ           a decomposition of [k, k]
//! ```
//!
//! A sum of low-rank updates is such a product, Σ cᵢ Bᵢ Aᵢ = [B₁ B₂ …]·[c₁A₁; c₂A₂; …], with k the sum of the
//! ranks. The second form never builds the matrix of the layer's size and is as exact. All is in double
//! precision: singular values of a difference of adapters are small ones.

use peft_core::Result;
use tch::{Kind, Tensor};

/// M = U diag(S) Vᵀ: U `[m, k]`, S `[k]` falling, Vᵀ `[k, n]`.
#[derive(Debug)]
pub(crate) struct Svd {
    u: Tensor,
    s: Tensor,
    vt: Tensor,
}

impl Svd {
    /// Of a matrix `[m, n]`.
    pub(crate) fn of(matrix: &Tensor) -> Result<Svd> {
        let (u, s, v) = matrix.to_kind(Kind::Double).f_svd(true, true)?;
        Ok(Svd { u, s, vt: v.tr() })
    }

    /// Of `left · right`; left: `[m, k]`, right: `[k, n]`.
    pub(crate) fn of_product(left: &Tensor, right: &Tensor) -> Result<Svd> {
        let [left, right] = [left, right].map(|t| t.to_kind(Kind::Double));
        let (q_left, r_left) = Tensor::f_linalg_qr(&left, "reduced")?;
        let (q_right, r_right) = Tensor::f_linalg_qr(&right.tr(), "reduced")?;
        let core = Svd::of(&r_left.matmul(&r_right.tr()))?;
        Ok(Svd {
            u: q_left.matmul(&core.u),
            s: core.s,
            vt: core.vt.matmul(&q_right.tr()),
        })
    }

    /// With the largest entry of each column of U positive: a decomposition fixes the signs only in pairs, and two
    /// machines may choose differently.
    pub(crate) fn upright(self) -> Svd {
        let largest = self.u.abs().argmax(0, true); // [1, k]
        let sign = self.u.gather(0, &largest, false).sign(); // [1, k]
        Svd {
            u: self.u * &sign,
            s: self.s,
            vt: self.vt * sign.tr(),
        }
    }

    /// A `[r, n]` and B `[m, r]` of the r largest directions; zeros where there are fewer.
    pub(crate) fn factors(&self, r: i64) -> (Tensor, Tensor) {
        let (a, b) = self.largest(r);
        padded(&a, &b, r)
    }

    /// A `[k, n]` and B `[m, k]` of the largest directions, r of them or all that there are.
    pub(crate) fn largest(&self, r: i64) -> (Tensor, Tensor) {
        let there = r.min(self.s.size()[0]);
        let a = self.vt.narrow(0, 0, there);
        let b = self.u.narrow(1, 0, there) * self.s.narrow(0, 0, there);
        (a, b)
    }

    /// The smallest rank whose share of Σ S² is at least `share`; 1 for a matrix of zeros.
    pub(crate) fn rank_for(&self, share: f64) -> i64 {
        let energy = self.s.square().cumsum(0, Kind::Double);
        let all = energy.size()[0];
        let wanted = energy.get(all - 1) * share;
        let below = energy.lt_tensor(&wanted).sum(Kind::Int64).int64_value(&[]);
        (below + 1).min(all)
    }
}

/// Factors filled up with zeros to rank r: A `[k, n] -> [r, n]`, B `[m, k] -> [m, r]`.
pub(crate) fn padded(a: &Tensor, b: &Tensor, r: i64) -> (Tensor, Tensor) {
    let more = r - a.size()[0];
    (
        a.constant_pad_nd([0, 0, 0, more]),
        b.constant_pad_nd([0, more]),
    )
}

/// Whether every number is finite.
pub(crate) fn is_finite(tensor: &Tensor) -> bool {
    tensor.isfinite().all().int64_value(&[]) != 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    fn random(rows: i64, columns: i64) -> Tensor {
        Tensor::randn([rows, columns], (Kind::Double, Device::Cpu))
    }

    fn off(a: &Tensor, b: &Tensor) -> f64 {
        let norm = |t: &Tensor| t.norm().double_value(&[]);
        norm(&(a - b)) / norm(b)
    }

    #[test]
    fn the_small_core_gives_what_the_whole_matrix_gives() {
        tch::manual_seed(3);
        for (m, k, n) in [
            (13, 4, 10),
            (5, 9, 17),
            (20, 8, 6),
            (7, 7, 7),
            (3, 11, 2),
            (1, 1, 9),
        ] {
            let (left, right) = (random(m, k), random(k, n));
            let dense = Svd::of(&left.matmul(&right)).unwrap();
            let small = Svd::of_product(&left, &right).unwrap();
            let count = small.s.size()[0].min(dense.s.size()[0]);
            let values = |it: &Svd| it.s.narrow(0, 0, count);
            assert!(off(&values(&small), &values(&dense)) < 1e-12, "{m} {k} {n}");
            for r in [1, 2, count, count + 3] {
                let product = |(a, b): (Tensor, Tensor)| b.matmul(&a);
                let (expected, actual) = (product(dense.factors(r)), product(small.factors(r)));
                assert!(off(&actual, &expected) < 1e-10, "{m} {k} {n} at {r}");
            }
        }
    }

    #[test]
    fn energy() {
        let s = Tensor::from_slice(&[4.0f64, 2.0, 1.0, 0.0]); // squares 16, 4, 1 of 21
        let svd = Svd {
            u: random(4, 4),
            vt: random(4, 4),
            s,
        };
        for (share, rank) in [
            (0.1, 1),
            (16.0 / 21.0, 1),
            (0.77, 2),
            (0.952, 2),
            (0.96, 3),
            (0.999, 3),
        ] {
            assert_eq!(svd.rank_for(share), rank, "{share}");
        }
        let zero = Svd::of(&Tensor::zeros([3, 5], (Kind::Double, Device::Cpu))).unwrap();
        assert_eq!(zero.rank_for(0.9), 1);
    }

    #[test]
    fn upright_signs_change_no_product() {
        tch::manual_seed(4);
        let matrix = random(6, 9);
        let svd = Svd::of(&matrix).unwrap().upright();
        let (a, b) = svd.factors(6);
        assert!(off(&b.matmul(&a), &matrix) < 1e-12);
        let turned = Svd {
            u: -&svd.u,
            vt: -&svd.vt,
            s: svd.s.copy(),
        }
        .upright();
        assert!(off(&turned.u, &svd.u) < 1e-15 && off(&turned.vt, &svd.vt) < 1e-15);
    }
}
