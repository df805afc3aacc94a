//! Steps of a transformer that libtorch takes in several passes over memory.
//!
//! On the processor these are bound by memory, not by arithmetic: a norm
//! written with `square`, `mean`, `rsqrt`, `mul`, `mul` reads and writes its
//! activations five times. The kernels here read once and write once, and
//! their backward recomputes what is cheap instead of saving it. On any other
//! device, dtype or layout the same formula is written with libtorch's
//! operations: the result is the same, only slower.

use crate::{Function, apply, ffi};
use tch::{Device, Kind, TchError, Tensor};

/// RMSNorm (1910.07467): `y = x / √(mean(x²) + eps) · w`; x: `[.., d]`, w: `[d]`. Differentiable in both.
pub fn rms_norm(x: &Tensor, w: &Tensor, eps: f64) -> Tensor {
    let fits = w.kind() == x.kind() && w.is_contiguous();
    if !(fits && native(x)) {
        let f = x.to_kind(Kind::Float);
        let mean = f.square().mean_dim([-1i64].as_slice(), true, Kind::Float);
        return (f * (mean + eps).rsqrt()).to_kind(x.kind()) * w;
    }
    let [y] = apply(&[x, w], || {
        let x = x.contiguous();
        let [y, rstd] = ffi::rms_norm(&x, w, eps).expect("checked above");
        let saved = RmsNorm {
            x: x.detach(),
            w: w.detach(),
            rstd,
        };
        ([y], saved)
    });
    y
}

struct RmsNorm {
    x: Tensor,
    w: Tensor,
    rstd: Tensor,
}

impl Function for RmsNorm {
    fn backward(
        &self,
        grads: &[Option<Tensor>],
        needs: &[bool],
    ) -> Result<Vec<Option<Tensor>>, TchError> {
        let Some(g) = &grads[0] else {
            return Ok(vec![None, None]);
        };
        let g = g.contiguous();
        let dx = match needs[0] {
            true => Some(ffi::rms_norm_backward(&g, &self.x, &self.w, &self.rstd)?),
            false => None,
        };
        // Σ rows g · x · rstd, in fp32
        let dw = needs[1].then(|| {
            let rows = |t: &Tensor| t.view([-1, self.w.numel() as i64]).to_kind(Kind::Float);
            let sum = (rows(&g) * rows(&self.x)).tr().mv(&self.rstd);
            sum.to_kind(self.w.kind())
        });
        Ok(vec![dx, dw])
    }
}

/// `x ∘ s`: each column by a factor of its own; x: `[.., n]`, s: `[n]` in fp32 -> `[.., n]` in the dtype of x.
///
/// One pass forward and one back, in which dx = g ∘ s and ds = Σ g ∘ x. x is kept for that only where s wants a gradient.
///
/// # Panics
/// If the shapes do not fit together.
pub fn scale(x: &Tensor, s: &Tensor) -> Tensor {
    if !native(x) || s.kind() != Kind::Float {
        return (x * s).to_kind(x.kind());
    }
    let [y] = apply(&[x, s], || {
        let (x, s) = (x.detach().contiguous(), s.detach().contiguous());
        let mut y = x.empty_like();
        ffi::scale(&x, &s, &mut y).expect("n columns and n factors");
        ([y], Scale { x: Some(x), s })
    });
    y
}

/// [`scale`] in the memory of x, which is used up; x is kept as it was only where s wants a gradient.
///
/// # Panics
/// If the shapes do not fit together.
pub fn scale_(x: Tensor, s: &Tensor) -> Tensor {
    let wanted = s.requires_grad() && ffi::grad_enabled();
    if wanted || !(native(&x) && x.is_contiguous() && s.kind() == Kind::Float) {
        return scale(&x, s);
    }
    let [y] = apply(&[&x], || {
        let (mut y, s) = (x.detach(), s.detach().contiguous());
        ffi::scale(&x, &s, &mut y).expect("n columns and n factors");
        ([y], Scale { x: None, s })
    });
    y
}

struct Scale {
    /// Kept where `s` is an input, too.
    x: Option<Tensor>,
    s: Tensor,
}

impl Function for Scale {
    fn backward(
        &self,
        grads: &[Option<Tensor>],
        needs: &[bool],
    ) -> Result<Vec<Option<Tensor>>, TchError> {
        let Some(g) = grads[0].as_ref().map(Tensor::contiguous) else {
            return Ok(needs.iter().map(|_| None).collect());
        };
        let mut dx = needs[0].then(|| g.empty_like());
        let Some(x) = self.x.as_ref().filter(|_| needs.get(1) == Some(&true)) else {
            if let Some(dx) = &mut dx {
                ffi::scale(&g, &self.s, dx)?;
            }
            return Ok(std::iter::once(dx)
                .chain(needs[1..].iter().map(|_| None))
                .collect());
        };
        let ds = ffi::scale_backward(&g, x, &self.s, dx.as_mut())?;
        Ok(vec![dx, Some(ds)])
    }
}

/// `y + delta` in the memory of y, which is used up, rounded once to its dtype; both of one shape. Differentiable in both.
///
/// # Panics
/// If the shapes do not fit together.
pub fn add_(y: Tensor, delta: &Tensor) -> Tensor {
    let [sum] = apply(&[&y, delta], || {
        ([y.detach().g_add_(delta)], Add(delta.kind()))
    });
    sum
}

struct Add(Kind);

impl Function for Add {
    fn backward(
        &self,
        grads: &[Option<Tensor>],
        _: &[bool],
    ) -> Result<Vec<Option<Tensor>>, TchError> {
        let g = grads[0].as_ref();
        Ok(vec![
            g.map(Tensor::shallow_clone),
            g.map(|g| g.to_kind(self.0)),
        ])
    }
}

/// `y + row` in the memory of y, which is used up; y: `[.., out]`, row: `[out]`. Differentiable in both.
///
/// # Panics
/// If the shapes do not fit together.
pub fn add_row_(y: Tensor, row: &Tensor) -> Tensor {
    let [sum] = apply(&[&y, row], || {
        ([y.detach().g_add_(row)], AddRow(row.kind()))
    });
    sum
}

struct AddRow(Kind);

impl Function for AddRow {
    fn backward(
        &self,
        grads: &[Option<Tensor>],
        _: &[bool],
    ) -> Result<Vec<Option<Tensor>>, TchError> {
        let rows =
            |g: &Tensor| crate::thin::rows(g).sum_dim_intlist([0i64].as_slice(), false, self.0);
        let g = grads[0].as_ref();
        Ok(vec![g.map(Tensor::shallow_clone), g.map(rows)])
    }
}

/// Rotary position embedding (2104.09864), halves rotated as Hugging Face does.
///
/// x: `[batch, seq, heads, d]`; cos, sin: `[batch or 1, seq, rot / 2]` in fp32
/// with `rot <= d`: the first `rot` components turn, the rest pass.
pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Tensor {
    if !native(x) {
        return rope_slow(x, cos, sin);
    }
    let half = cos.size()[2];
    let [cos, sin] = [cos, sin].map(|t| t.reshape([-1, half]).contiguous());
    let [y] = apply(&[x], || {
        let y = ffi::rope(&x.contiguous(), &cos, &sin, false).expect("checked above");
        ([y], Rope { cos, sin })
    });
    y
}

fn rope_slow(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Tensor {
    let (half, d) = (cos.size()[2], x.size()[3]);
    let [cos, sin] = [cos, sin].map(|t| t.unsqueeze(2).to_kind(x.kind())); // [b, seq, 1, half]
    let (a, b) = (x.narrow(-1, 0, half), x.narrow(-1, half, half));
    let mut parts = vec![&a * &cos - &b * &sin, &b * &cos + &a * &sin];
    if d > 2 * half {
        parts.push(x.narrow(-1, 2 * half, d - 2 * half));
    }
    Tensor::cat(&parts, -1)
}

struct Rope {
    cos: Tensor,
    sin: Tensor,
}

impl Function for Rope {
    fn backward(
        &self,
        grads: &[Option<Tensor>],
        _: &[bool],
    ) -> Result<Vec<Option<Tensor>>, TchError> {
        let dx = |g: &Tensor| ffi::rope(&g.contiguous(), &self.cos, &self.sin, true);
        Ok(vec![grads[0].as_ref().map(dx).transpose()?])
    }
}

/// SwiGLU (2002.05202): `silu(gate) · up`, elementwise over one shape.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Tensor {
    if !(native(gate) && native(up) && gate.kind() == up.kind()) {
        return gate.silu() * up;
    }
    let [y] = apply(&[gate, up], || {
        let (a, u) = (gate.contiguous(), up.contiguous());
        let y = ffi::swiglu(&a, &u).expect("checked above");
        ([y], SwiGlu(a.detach(), u.detach()))
    });
    y
}

struct SwiGlu(Tensor, Tensor);

impl Function for SwiGlu {
    fn backward(
        &self,
        grads: &[Option<Tensor>],
        _: &[bool],
    ) -> Result<Vec<Option<Tensor>>, TchError> {
        let Some(g) = &grads[0] else {
            return Ok(vec![None, None]);
        };
        let both = ffi::swiglu_backward(&g.contiguous(), &self.0, &self.1)?;
        Ok(both.map(Some).into())
    }
}

/// GELU (1606.08415) in its tanh form, which Hugging Face calls `gelu_new`.
pub fn gelu_tanh(x: &Tensor) -> Tensor {
    if !native(x) {
        return x.gelu("tanh");
    }
    let [y] = apply(&[x], || {
        let x = x.contiguous();
        let y = ffi::gelu_tanh(&x).expect("checked above");
        ([y], GeluTanh(x.detach()))
    });
    y
}

struct GeluTanh(Tensor);

impl Function for GeluTanh {
    fn backward(
        &self,
        grads: &[Option<Tensor>],
        _: &[bool],
    ) -> Result<Vec<Option<Tensor>>, TchError> {
        let dx = |g: &Tensor| ffi::gelu_tanh_backward(&g.contiguous(), &self.0);
        Ok(vec![grads[0].as_ref().map(dx).transpose()?])
    }
}

/// Cross-entropy of scores z: `[n, vocab]` against targets: `[n]`; gives the losses `[n]` in fp32.
///
/// Afterwards `z` holds the gradient of the sum of losses: softmax(z) − onehot(target). No graph.
///
/// # Panics
/// If a target is not below the size of the vocabulary, or the shapes do not fit.
pub fn cross_entropy_(z: &mut Tensor, targets: &Tensor) -> Tensor {
    let _off = tch::no_grad_guard();
    if native(z) && z.is_contiguous() {
        return ffi::cross_entropy(z, &targets.contiguous()).expect("targets below the vocabulary");
    }
    let at = targets.unsqueeze(1);
    let logs = z.log_softmax(-1, Kind::Float);
    let losses = -logs.gather(1, &at, false).squeeze_dim(1);
    let one = Tensor::ones_like(&at).to_kind(Kind::Float);
    z.copy_(&(logs.exp().scatter_add(1, &at, &-one)));
    losses
}

/// `x wᵀ + b` for few rows, at the speed of reading `w`; x: `[m, in]`, w: `[out, in]`. No gradient.
///
/// # Panics
/// If the tensors are not contiguous on the processor, in one of fp32 and bf16, or do not fit.
pub fn gemv(x: &Tensor, w: &Tensor, b: Option<&Tensor>) -> Tensor {
    ffi::gemv(x, w, b).expect("two contiguous matrices that fit")
}

/// Whether the kernels take this tensor.
fn native(x: &Tensor) -> bool {
    x.device() == Device::Cpu && matches!(x.kind(), Kind::Float | Kind::BFloat16) && x.numel() > 0
}
