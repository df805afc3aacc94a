//! How A and B begin.
//!
//! | `init_lora_weights` | A | B |
//! | --- | --- | --- |
//! | `true` | U(±1/√in) | 0 |
//! | `false` | U(±1/√in) | U(±1/√r) |
//! | `gaussian` | N(0, 1/r²) | 0 |
//! | `orthogonal` | (R₁ Q₀)ᵀ/10 | R₂ Q₁/10; Q₀, Q₁ the even and odd rows of an orthogonal matrix |
//! | `pissa` | √(S/s) Vᵀ | U √(S/s), of W ≈ U S Vᵀ to rank r |
//! | `olora` | first r rows of R | first r columns of Q, of W = QR |
//!
//! The last two take directions of the base. Python subtracts s·BA from the base so that nothing
//! changes at first, and from then on the base is another one. Here the base is never touched: the first factors
//! are kept beside those that are trained and their product is subtracted ([`Factors`](crate::factors::Factors)),
//! which is the same sum.

use peft_core::Result;
use tch::{Device, Kind, Tensor};

use crate::config::{Init, LoraConfig};

/// A `[r, in]` and B `[out, r]` for a linear layer with this weight, in fp32; `weight` is asked only where the
/// initialisation wants it.
pub(crate) fn linear(
    init: Init,
    weight: impl FnOnce() -> Tensor,
    (out, inp): (i64, i64),
    r: i64,
    scale: f64,
    device: Device,
) -> Result<(Tensor, Tensor)> {
    let on = (Kind::Float, device);
    let uniform = |shape: [i64; 2]| -> Result<Tensor> {
        let bound = 1.0 / (shape[1].max(1) as f64).sqrt();
        Ok(Tensor::f_empty(shape, on)?.f_uniform_(-bound, bound)?)
    };
    Ok(match init {
        Init::Kaiming => (uniform([r, inp])?, Tensor::f_zeros([out, r], on)?),
        Init::Random => (uniform([r, inp])?, uniform([out, r])?),
        Init::Gaussian => {
            let a = Tensor::f_empty([r, inp], on)?.f_normal_(0.0, 1.0 / r as f64)?;
            (a, Tensor::f_zeros([out, r], on)?)
        }
        Init::Orthogonal => {
            let (q, _) = Tensor::f_linalg_qr(&Tensor::f_randn([r, r], on)?, "reduced")?;
            let half = |from: i64| q.slice(0, from, None, 2); // [r/2, r]
            let a = Tensor::f_randn([inp, r / 2], on)?.matmul(&half(0)).tr() / 10.0;
            let b = Tensor::f_randn([r / 2, out], on)?.tr().matmul(&half(1)) / 10.0;
            (a, b)
        }
        Init::Pissa => {
            let (u, s, vh) = svd(&weight().to_kind(Kind::Float))?;
            principal(&u, &s, &vh, r, scale)
        }
        Init::PissaFast(rounds) => {
            let (u, s, vh) = svd_lowrank(&weight().to_kind(Kind::Float), r, rounds)?;
            principal(&u, &s, &vh, r, scale)
        }
        Init::Olora => {
            let (q, upper) = Tensor::f_linalg_qr(&weight().to_kind(Kind::Float), "reduced")?;
            (upper.narrow(0, 0, r), q.narrow(1, 0, r))
        }
    })
}

/// A `[r, vocab]` and B `[hidden, r]` for an embedding: the opposite of a linear layer, as its A is looked up.
pub(crate) fn embedding(
    init: Init,
    (vocab, hidden): (i64, i64),
    r: i64,
    device: Device,
) -> Result<(Tensor, Tensor)> {
    let on = (Kind::Float, device);
    let b = Tensor::f_randn([hidden, r], on)?;
    let a = match init {
        Init::Random => Tensor::f_randn([r, vocab], on)?,
        _ => Tensor::f_zeros([r, vocab], on)?,
    };
    Ok((a, b))
}

/// A `[r, in, kernel…]` and B `[out, r / groups, 1…]` for a convolution with a weight of this `size` `[out, in / groups, kernel…]`.
///
/// Bounds are over all that one output sums up. What takes directions of a matrix does not go on a convolution, as in Python.
pub(crate) fn conv(
    init: Init,
    size: &[i64],
    groups: i64,
    r: i64,
    device: Device,
) -> Result<(Tensor, Tensor)> {
    let on = (Kind::Float, device);
    let mut of_a = size.to_vec();
    (of_a[0], of_a[1]) = (r, size[1] * groups);
    let mut of_b = vec![1; size.len()];
    (of_b[0], of_b[1]) = (size[0], r / groups);
    let uniform = |shape: &[i64]| -> Result<Tensor> {
        let summed: i64 = shape[1..].iter().product();
        let bound = 1.0 / (summed.max(1) as f64).sqrt();
        Ok(Tensor::f_empty(shape, on)?.f_uniform_(-bound, bound)?)
    };
    let zeros = |shape: &[i64]| Tensor::f_zeros(shape, on);
    Ok(match init {
        Init::Kaiming => (uniform(&of_a)?, zeros(&of_b)?),
        Init::Random => (uniform(&of_a)?, uniform(&of_b)?),
        Init::Gaussian => {
            let a = Tensor::f_empty(of_a.as_slice(), on)?.f_normal_(0.0, 1.0 / r as f64)?;
            (a, zeros(&of_b)?)
        }
        Init::Orthogonal | Init::Pissa | Init::PissaFast(_) | Init::Olora => {
            return Err(LoraConfig::fault(
                "init_lora_weights of a convolution is true, false or `gaussian`",
            ));
        }
    })
}

/// The r largest directions, each factor with a root of the singular values over the scale.
fn principal(u: &Tensor, s: &Tensor, vh: &Tensor, r: i64, scale: f64) -> (Tensor, Tensor) {
    let root = (s.narrow(0, 0, r) / scale).sqrt(); // [r]
    (
        vh.narrow(0, 0, r) * root.unsqueeze(1),
        u.narrow(1, 0, r) * root,
    )
}

/// U `[out, k]`, S `[k]` and Vᵀ `[k, in]` with k the smaller side.
fn svd(w: &Tensor) -> Result<(Tensor, Tensor, Tensor)> {
    let (u, s, v) = w.f_svd(true, true)?;
    Ok((u, s, v.tr()))
}

/// Randomised decomposition (0909.4061, algorithm 5.1) to rank r with some rounds of power iteration.
fn svd_lowrank(w: &Tensor, r: i64, rounds: i64) -> Result<(Tensor, Tensor, Tensor)> {
    let probe = Tensor::f_randn([w.size()[1], r], (Kind::Float, w.device()))?;
    let basis = |m: Tensor| -> Result<Tensor> { Ok(Tensor::f_linalg_qr(&m, "reduced")?.0) };
    let mut q = basis(w.matmul(&probe))?; // [out, r]
    for _ in 0..rounds {
        let back = basis(w.tr().matmul(&q))?;
        q = basis(w.matmul(&back))?;
    }
    let (u, s, vh) = svd(&q.tr().matmul(w))?;
    Ok((q.matmul(&u), s, vh))
}
