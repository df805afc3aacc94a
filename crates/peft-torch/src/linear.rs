//! Products with a weight: y = x Wᵀ + b.
//!
//! libtorch sends fp32 products to MKL, which on processors that are not
//! Intel's takes a slow path: 195 against 440 GFLOP/s for oneDNN from the same
//! library on two Zen 5 cores, at the same accuracy. The rule is therefore: on
//! x86-64 with AVX-512, not from Intel, with oneDNN in the build, fp32
//! products go to oneDNN; anywhere else libtorch decides. It is a rule and not
//! a measurement because two runs must give the same bits.
//! `PEFT_ONEDNN=0` (or `1`) overrides it.
//!
//! The gradients use the same products: dx = g W, dW = gᵀ x, db = Σ g.
//! For a frozen weight x is not saved, since dx does not need it.
//!
//! One to four rows, as when text is generated, are bound by reading W; they
//! go through [`gemv`](crate::gemv), which reads it at the speed of memory.

use crate::{Function, apply, ffi, gemv};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{LazyLock, OnceLock};
use tch::{Device, Kind, TchError, Tensor};

/// `y = x wᵀ + b`; x: `[.., in]`, w: `[out, in]`, b: `[out]` -> `[.., out]`.
///
/// Any strides: pass `w.tr()` for a weight kept `[in, out]`. Differentiable in
/// whatever requires a gradient.
///
/// # Panics
/// If shapes, dtypes or devices do not fit together.
pub fn linear(x: &Tensor, w: &Tensor, b: Option<&Tensor>) -> Tensor {
    tied(x, w, b, product)
}

/// [`linear`] without the product: what is returned has its graph, and on a processor any numbers.
///
/// # Panics
/// As [`linear`].
pub fn linear_unread(x: &Tensor, w: &Tensor, b: Option<&Tensor>) -> Tensor {
    tied(x, w, b, |x, w, _| unread(x, w.size()[0]))
}

/// Memory for `[.., out]` like x, with anything in it.
pub fn unread(x: &Tensor, out: i64) -> Tensor {
    let mut shape = x.size();
    *shape.last_mut().expect("a row") = out;
    x.new_empty(shape.as_slice(), (x.kind(), x.device()))
}

/// The output of a linear layer as `product` gives it, and its graph.
fn tied(
    x: &Tensor,
    w: &Tensor,
    b: Option<&Tensor>,
    product: impl Fn(&Tensor, &Tensor, Option<&Tensor>) -> Tensor,
) -> Tensor {
    if x.device() != Device::Cpu {
        return x.linear(w, b);
    }
    let trained = w.requires_grad() || b.is_some_and(Tensor::requires_grad);
    let forward = || {
        let saved = Linear {
            w: w.detach(),
            x: w.requires_grad().then(|| x.detach()),
        };
        ([product(x, w, b)], saved)
    };
    if !trained && !x.requires_grad() {
        return tch::no_grad(|| product(x, w, b));
    }
    let mut inputs = vec![x, w];
    inputs.extend(b);
    let [y] = apply(&inputs, forward);
    y
}

/// `y += alpha · a b` in place; y: `[.., n]`, a: `[rows, k]`, b: `[k, n]`.
///
/// # Panics
/// If shapes or dtypes do not fit together, or y is not contiguous.
pub fn add_product(y: &mut Tensor, a: &Tensor, b: &Tensor, alpha: f64) {
    let n = y.size().last().copied().unwrap_or(1);
    let mut flat = y.view([-1, n]);
    ffi::addmm(&mut flat, a, b, alpha).expect("shapes fit");
}

/// Whether fp32 products on the processor go to oneDNN.
pub fn fast_fp32() -> bool {
    switch().load(Ordering::Relaxed)
}

/// Whether batches of products do. The only switch by which libtorch sends them there also allows bf16, which oneDNN uses where a
/// processor has AMX.
pub(crate) fn fast_batches() -> bool {
    // Asked once: on a virtual machine the question takes a microsecond.
    static AMX: LazyLock<bool> = LazyLock::new(has_amx);
    fast_fp32() && !*AMX
}

#[cfg(target_arch = "x86_64")]
fn has_amx() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    const AMX_BF16: u32 = 1 << 22;
    __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & AMX_BF16 != 0
}

#[cfg(not(target_arch = "x86_64"))]
fn has_amx() -> bool {
    false
}

/// Overrides the rule. Changes the last bits of results: set it once, at the start.
pub fn set_fast_fp32(on: bool) {
    switch().store(on && ffi::has_onednn(), Ordering::Relaxed);
}

fn switch() -> &'static AtomicBool {
    static SWITCH: OnceLock<AtomicBool> = OnceLock::new();
    SWITCH.get_or_init(|| {
        let wanted = match std::env::var("PEFT_ONEDNN").as_deref() {
            Ok("0") => false,
            Ok("1") => true,
            _ => slow_mkl(),
        };
        AtomicBool::new(wanted && ffi::has_onednn())
    })
}

#[cfg(target_arch = "x86_64")]
fn slow_mkl() -> bool {
    let id = std::arch::x86_64::__cpuid(0);
    let intel = (id.ebx, id.edx, id.ecx) == (0x756e_6547, 0x4965_6e69, 0x6c65_746e);
    !intel && is_x86_feature_detected!("avx512f")
}

#[cfg(not(target_arch = "x86_64"))]
fn slow_mkl() -> bool {
    false
}

struct Linear {
    w: Tensor,
    x: Option<Tensor>,
}

impl Function for Linear {
    fn backward(
        &self,
        grads: &[Option<Tensor>],
        needs: &[bool],
    ) -> Result<Vec<Option<Tensor>>, TchError> {
        let Some(g) = &grads[0] else {
            return Ok(needs.iter().map(|_| None).collect());
        };
        let rows = |t: &Tensor| t.reshape([-1, t.size()[t.dim() - 1]]);
        let dx = needs[0].then(|| product(g, &self.w.tr(), None));
        let dw = match &self.x {
            // In the strides of the weight, or libtorch would copy it into them.
            Some(x) if needs[1] && self.w.is_contiguous() => {
                Some(product(&rows(g).tr(), &rows(x).tr(), None))
            }
            Some(x) if needs[1] => Some(product(&rows(x).tr(), &rows(g).tr(), None).tr()),
            _ => None,
        };
        let mut all = vec![dx, dw];
        if let Some(&bias) = needs.get(2) {
            let kind = g.kind();
            all.push(bias.then(|| rows(g).sum_dim_intlist([0i64].as_slice(), false, kind)));
        }
        Ok(all)
    }
}

/// The product itself, by the fastest way, without a graph.
fn product(x: &Tensor, w: &Tensor, b: Option<&Tensor>) -> Tensor {
    let inner = w.size()[1];
    let rows = x.numel() as i64 / inner.max(1);
    if rows <= 4 && w.is_contiguous() && small(x, w, b) {
        let mut shape = x.size();
        *shape.last_mut().expect("a row") = w.size()[0];
        return gemv(&x.reshape([-1, inner]).contiguous(), w, b).view(shape.as_slice());
    }
    let f32s = x.kind() == Kind::Float && w.kind() == Kind::Float;
    if rows > 4 && f32s && fast_fp32() {
        return ffi::linear_onednn(x, w, b).expect("shapes fit");
    }
    x.linear(w, b)
}

/// Whether `gemv` takes these.
fn small(x: &Tensor, w: &Tensor, b: Option<&Tensor>) -> bool {
    let kind = x.kind();
    x.device() == Device::Cpu
        && matches!(kind, Kind::Float | Kind::BFloat16)
        && w.kind() == kind
        && w.numel() >= 1 << 14
        && b.is_none_or(|b| b.kind() == kind && b.is_contiguous())
}
