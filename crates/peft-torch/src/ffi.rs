//! The C++ shim: its declarations, and one safe function for each.
//!
//! Every function of the shim takes tensors by pointer, catches what C++
//! throws and leaves the text in `err`. [`call`] turns that into a `Result`.

use libc::{c_char, c_int, c_void};
use std::{
    ffi::CStr,
    panic::{AssertUnwindSafe, catch_unwind},
    ptr::null_mut,
};
use tch::{Device, Kind, TchError, Tensor};
use torch_sys::C_tensor;

use crate::Function;

type P = *mut C_tensor;
type Backward = unsafe extern "C" fn(
    *mut c_void,
    *mut P,
    usize,
    *const u8,
    *mut P,
    usize,
    *mut *mut c_char,
) -> c_int;
type DropState = unsafe extern "C" fn(*mut c_void);

unsafe extern "C" {
    fn peft_apply(
        inputs: *const P,
        nin: usize,
        outputs: *const P,
        nout: usize,
        state: *mut c_void,
        backward: Backward,
        drop: DropState,
        result: *mut P,
        err: *mut *mut c_char,
    ) -> c_int;
    fn peft_vjp(
        outputs: *const P,
        grads: *const P,
        nout: usize,
        inputs: *const P,
        nin: usize,
        result: *mut P,
        err: *mut *mut c_char,
    ) -> c_int;
    fn peft_drop_grad(leaf: P);
    fn peft_same(a: P, b: P) -> c_int;
    fn peft_linear_onednn(x: P, w: P, b: P, y: *mut P, err: *mut *mut c_char) -> c_int;
    fn peft_has_onednn() -> c_int;
    fn peft_grad_enabled() -> c_int;
    fn peft_addmm(y: P, a: P, b: P, alpha: f64, err: *mut *mut c_char) -> c_int;
    fn peft_fused_adamw(
        params: *const P,
        grads: *const P,
        m: *const P,
        v: *const P,
        steps: *const P,
        n: usize,
        lr: f64,
        beta1: f64,
        beta2: f64,
        weight_decay: f64,
        eps: f64,
        err: *mut *mut c_char,
    ) -> c_int;
    fn peft_rng_get(device: c_int, state: *mut P, err: *mut *mut c_char) -> c_int;
    fn peft_rng_set(device: c_int, state: P, err: *mut *mut c_char) -> c_int;
    fn peft_cuda_memory(
        device: c_int,
        now: *mut i64,
        peak: *mut i64,
        err: *mut *mut c_char,
    ) -> c_int;
    fn peft_cuda_reset_peak(device: c_int, err: *mut *mut c_char) -> c_int;
    fn peft_count_start(counter: *mut *mut c_void, err: *mut *mut c_char) -> c_int;
    fn peft_count_stop(counter: *mut c_void, now: *mut i64, peak: *mut i64);
    fn peft_from_blob(
        data: *mut c_void,
        shape: *const i64,
        ndim: usize,
        like: P,
        owner: *mut c_void,
        drop: DropState,
        out: *mut P,
        err: *mut *mut c_char,
    ) -> c_int;
    fn peft_parallel_for(n: i64, body: unsafe extern "C" fn(*mut c_void, i64), state: *mut c_void);
    fn peft_rms_norm(x: P, w: P, eps: f64, y: *mut P, rstd: *mut P, err: *mut *mut c_char)
    -> c_int;
    fn peft_rms_norm_backward(
        g: P,
        x: P,
        w: P,
        rstd: P,
        dx: *mut P,
        err: *mut *mut c_char,
    ) -> c_int;
    fn peft_rope(x: P, cos: P, sin: P, inverse: c_int, y: *mut P, err: *mut *mut c_char) -> c_int;
    fn peft_swiglu(a: P, u: P, y: *mut P, err: *mut *mut c_char) -> c_int;
    fn peft_swiglu_backward(
        g: P,
        a: P,
        u: P,
        da: *mut P,
        du: *mut P,
        err: *mut *mut c_char,
    ) -> c_int;
    fn peft_scale(x: P, s: P, y: P, err: *mut *mut c_char) -> c_int;
    fn peft_scale_backward(g: P, x: P, s: P, dx: P, ds: *mut P, err: *mut *mut c_char) -> c_int;
    fn peft_gelu_tanh(x: P, y: *mut P, err: *mut *mut c_char) -> c_int;
    fn peft_gelu_tanh_backward(g: P, x: P, dx: *mut P, err: *mut *mut c_char) -> c_int;
    fn peft_bmm(a: P, b: P, onednn: c_int, y: *mut P, err: *mut *mut c_char) -> c_int;
    fn peft_softmax(z: P, mask: P, scale: f64, causal: c_int, err: *mut *mut c_char) -> c_int;
    fn peft_softmax_backward(dp: P, p: P, scale: f64, err: *mut *mut c_char) -> c_int;
    fn peft_cross_entropy(z: P, target: P, loss: *mut P, err: *mut *mut c_char) -> c_int;
    fn peft_gemv(x: P, w: P, bias: P, y: *mut P, err: *mut *mut c_char) -> c_int;
    fn peft_thin_project(x: P, a: P, h: *mut P, err: *mut *mut c_char) -> c_int;
    fn peft_thin_add(y: P, h: P, a: P, s: f64, err: *mut *mut c_char) -> c_int;
    fn peft_thin_expand(h: P, a: P, s: f64, half: c_int, y: *mut P, err: *mut *mut c_char)
    -> c_int;
    fn peft_thin_outer(h: P, x: P, s: f64, c: *mut P, err: *mut *mut c_char) -> c_int;
}

fn ptr(tensor: &Tensor) -> P {
    tensor.as_ptr().cast_mut()
}

fn ptrs(tensors: &[&Tensor]) -> Vec<P> {
    tensors.iter().map(|t| ptr(t)).collect()
}

fn opt(tensor: Option<&Tensor>) -> P {
    tensor.map_or(null_mut(), ptr)
}

/// Runs one function of the shim and turns its error text into an error.
fn call(f: impl FnOnce(*mut *mut c_char) -> c_int) -> Result<(), TchError> {
    let mut err: *mut c_char = null_mut();
    if f(&mut err) == 0 {
        return Ok(());
    }
    if err.is_null() {
        return Err(TchError::Torch("unknown C++ error".into()));
    }
    // SAFETY: the shim leaves a NUL-terminated string from strdup, ours to free.
    let text = unsafe { CStr::from_ptr(err) }
        .to_string_lossy()
        .into_owned();
    // SAFETY: allocated by strdup, freed once.
    unsafe { libc::free(err.cast()) };
    Err(TchError::Torch(text))
}

/// Runs a function of the shim that makes one tensor.
fn make(f: impl FnOnce(*mut P, *mut *mut c_char) -> c_int) -> Result<Tensor, TchError> {
    let mut out = null_mut();
    call(|err| f(&mut out, err))?;
    // SAFETY: on success the shim has stored a `new at::Tensor`, owned by us now.
    Ok(unsafe { Tensor::from_ptr(out) })
}

fn make2(
    f: impl FnOnce(*mut P, *mut P, *mut *mut c_char) -> c_int,
) -> Result<[Tensor; 2], TchError> {
    let (mut a, mut b) = (null_mut(), null_mut());
    call(|err| f(&mut a, &mut b, err))?;
    // SAFETY: on success the shim has stored two `new at::Tensor`, owned by us now.
    Ok(unsafe { [Tensor::from_ptr(a), Tensor::from_ptr(b)] })
}

/// A function and what its backward made, behind the pointer that libtorch keeps.
unsafe extern "C" fn backward<F: Function>(
    state: *mut c_void,
    grads: *mut P,
    ngrads: usize,
    needs: *const u8,
    out: *mut P,
    nout: usize,
    err: *mut *mut c_char,
) -> c_int {
    let run = || {
        // SAFETY: `state` is the `Box<F>` given to `peft_apply`; libtorch runs a node once at a time.
        let function = unsafe { &*(state as *const F) };
        // SAFETY: the shim passes `ngrads` pointers, null or to live tensors, and `nout` flags.
        let (grads, needs) = unsafe {
            (
                std::slice::from_raw_parts(grads, ngrads),
                std::slice::from_raw_parts(needs, nout),
            )
        };
        let grads: Vec<Option<Tensor>> = grads
            .iter()
            // SAFETY: not null, so a live tensor; the clone holds its own reference.
            .map(|&g| (!g.is_null()).then(|| unsafe { Tensor::clone_from_ptr(g) }))
            .collect();
        let needs: Vec<bool> = needs.iter().map(|&n| n != 0).collect();
        // A guard, since `tch::no_grad` would leave gradients off after a panic.
        let _off = tch::no_grad_guard();
        function.backward(&grads, &needs)
    };
    let text = match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(results)) if results.len() == nout => {
            for (i, tensor) in results.into_iter().enumerate() {
                if let Some(tensor) = tensor {
                    // SAFETY: `out` has `nout` places; the shim takes the tensor over.
                    unsafe { *out.add(i) = ptr(&tensor) };
                    std::mem::forget(tensor);
                }
            }
            return 0;
        }
        Ok(Ok(results)) => format!(
            "backward of {} gave {} gradients for {nout} inputs",
            std::any::type_name::<F>(),
            results.len()
        ),
        Ok(Err(error)) => format!("backward of {}: {error}", std::any::type_name::<F>()),
        Err(panic) => {
            let what = panic
                .downcast_ref::<&str>()
                .map(|s| (*s).to_owned())
                .or_else(|| panic.downcast_ref::<String>().cloned())
                .unwrap_or_else(|| "no message".into());
            format!(
                "backward of {} panicked: {what}",
                std::any::type_name::<F>()
            )
        }
    };
    let text = std::ffi::CString::new(text.replace('\0', " ")).unwrap_or_default();
    // SAFETY: `err` is a valid place; the shim frees the copy.
    unsafe { *err = libc::strdup(text.as_ptr()) };
    1
}

unsafe extern "C" fn drop_box<F>(state: *mut c_void) {
    // SAFETY: libtorch calls this once, with the pointer from `Box::into_raw`.
    let state = unsafe { Box::from_raw(state as *mut F) };
    // A destructor must not unwind into C++.
    let _ = catch_unwind(AssertUnwindSafe(|| drop(state)));
}

pub(crate) fn apply<F: Function>(
    inputs: &[&Tensor],
    outputs: &[Tensor],
    function: F,
) -> Result<Vec<Tensor>, TchError> {
    let ins = ptrs(inputs);
    let outs: Vec<P> = outputs.iter().map(ptr).collect();
    let mut result = vec![null_mut(); outs.len()];
    let state = Box::into_raw(Box::new(function)) as *mut c_void;
    // SAFETY: the pointers live through the call; the shim owns `state` from here, also on error.
    call(|err| unsafe {
        peft_apply(
            ins.as_ptr(),
            ins.len(),
            outs.as_ptr(),
            outs.len(),
            state,
            backward::<F>,
            drop_box::<F>,
            result.as_mut_ptr(),
            err,
        )
    })?;
    // SAFETY: on success every place holds a `new at::Tensor`.
    Ok(result
        .into_iter()
        .map(|p| unsafe { Tensor::from_ptr(p) })
        .collect())
}

pub(crate) fn vjp(
    outputs: &[&Tensor],
    grads: &[&Tensor],
    inputs: &[&Tensor],
) -> Result<Vec<Option<Tensor>>, TchError> {
    let (outs, gs, ins) = (ptrs(outputs), ptrs(grads), ptrs(inputs));
    let mut result = vec![null_mut(); ins.len()];
    // SAFETY: the lengths belong to the arrays; the tensors live through the call.
    call(|err| unsafe {
        peft_vjp(
            outs.as_ptr(),
            gs.as_ptr(),
            outs.len(),
            ins.as_ptr(),
            ins.len(),
            result.as_mut_ptr(),
            err,
        )
    })?;
    // SAFETY: each place is null or a `new at::Tensor`.
    Ok(result
        .into_iter()
        .map(|p: P| (!p.is_null()).then(|| unsafe { Tensor::from_ptr(p) }))
        .collect())
}

pub(crate) fn drop_grad(leaf: &mut Tensor) {
    // SAFETY: a live tensor, borrowed mutably; an undefined gradient is reset to itself.
    unsafe { peft_drop_grad(ptr(leaf)) }
}

/// Whether two handles are of one tensor.
pub(crate) fn same(a: &Tensor, b: &Tensor) -> bool {
    // SAFETY: live tensors, which are looked at only.
    unsafe { peft_same(ptr(a), ptr(b)) != 0 }
}

pub(crate) fn linear_onednn(
    x: &Tensor,
    w: &Tensor,
    b: Option<&Tensor>,
) -> Result<Tensor, TchError> {
    // SAFETY: live tensors in, one new tensor out.
    make(|y, err| unsafe { peft_linear_onednn(ptr(x), ptr(w), opt(b), y, err) })
}

pub(crate) fn has_onednn() -> bool {
    // SAFETY: reads a constant of the build.
    unsafe { peft_has_onednn() != 0 }
}

pub(crate) fn grad_enabled() -> bool {
    // SAFETY: reads a flag of this thread.
    unsafe { peft_grad_enabled() != 0 }
}

pub(crate) fn addmm(y: &mut Tensor, a: &Tensor, b: &Tensor, alpha: f64) -> Result<(), TchError> {
    // SAFETY: live tensors; `y` is borrowed mutably.
    call(|err| unsafe { peft_addmm(ptr(y), ptr(a), ptr(b), alpha, err) })
}

/// Hyper-parameters of one fused AdamW call.
pub(crate) struct Adam {
    pub(crate) lr: f64,
    pub(crate) betas: (f64, f64),
    pub(crate) weight_decay: f64,
    pub(crate) eps: f64,
}

pub(crate) fn fused_adamw(
    [params, grads, m, v, steps]: [&[&Tensor]; 5],
    adam: &Adam,
) -> Result<(), TchError> {
    let n = params.len();
    assert!(
        [grads, m, v, steps].iter().all(|list| list.len() == n),
        "lists of one length"
    );
    let lists = [params, grads, m, v, steps].map(ptrs);
    // SAFETY: five arrays of `n` live tensors; the caller gives up exclusive use of params, m, v, steps.
    call(|err| unsafe {
        peft_fused_adamw(
            lists[0].as_ptr(),
            lists[1].as_ptr(),
            lists[2].as_ptr(),
            lists[3].as_ptr(),
            lists[4].as_ptr(),
            n,
            adam.lr,
            adam.betas.0,
            adam.betas.1,
            adam.weight_decay,
            adam.eps,
            err,
        )
    })
}

pub(crate) fn rng_get(device: c_int) -> Result<Tensor, TchError> {
    // SAFETY: one new tensor out.
    make(|state, err| unsafe { peft_rng_get(device, state, err) })
}

pub(crate) fn rng_set(device: c_int, state: &Tensor) -> Result<(), TchError> {
    // SAFETY: a live tensor, which libtorch checks.
    call(|err| unsafe { peft_rng_set(device, ptr(state), err) })
}

pub(crate) fn cuda_memory(device: c_int) -> Result<(i64, i64), TchError> {
    let (mut now, mut peak) = (0, 0);
    // SAFETY: two places for two integers.
    call(|err| unsafe { peft_cuda_memory(device, &mut now, &mut peak, err) })?;
    Ok((now, peak))
}

pub(crate) fn cuda_reset_peak(device: c_int) -> Result<(), TchError> {
    // SAFETY: no memory is passed.
    call(|err| unsafe { peft_cuda_reset_peak(device, err) })
}

/// Counts the bytes that tensors take in main memory on this thread, until [`Counter::stop`] or a panic.
pub(crate) struct Counter(*mut c_void);

impl Counter {
    pub(crate) fn start() -> Result<Counter, TchError> {
        let mut counter = null_mut();
        // SAFETY: a place for one pointer.
        call(|err| unsafe { peft_count_start(&mut counter, err) })?;
        Ok(Counter(counter))
    }

    /// Bytes that are held still and bytes that were held at most, of those taken since the start.
    pub(crate) fn stop(mut self) -> (i64, i64) {
        self.close()
    }

    fn close(&mut self) -> (i64, i64) {
        let (mut now, mut peak) = (0, 0);
        let counter = std::mem::replace(&mut self.0, null_mut());
        if !counter.is_null() {
            // SAFETY: from `peft_count_start` on this thread, as a raw pointer keeps it there; given back once.
            unsafe { peft_count_stop(counter, &mut now, &mut peak) };
        }
        (now, peak)
    }
}

impl Drop for Counter {
    fn drop(&mut self) {
        self.close();
    }
}

/// A tensor over `bytes`, which `owner` keeps alive.
///
/// # Safety
/// `bytes` must stay valid and unchanged as long as `owner` lives, hold
/// `shape` elements of `kind`, and be aligned for it. Nobody may write to the
/// tensor if the memory cannot be written.
pub(crate) unsafe fn from_blob<O: Send + 'static>(
    bytes: *const u8,
    shape: &[i64],
    (kind, device): (Kind, Device),
    owner: O,
) -> Result<Tensor, TchError> {
    let like = Tensor::empty([0i64], (kind, device));
    let owner = Box::into_raw(Box::new(owner)) as *mut c_void;
    // SAFETY: as the caller promises; the deleter runs once, when the storage goes.
    make(|out, err| unsafe {
        peft_from_blob(
            bytes as *mut c_void,
            shape.as_ptr(),
            shape.len(),
            ptr(&like),
            owner,
            drop_box::<O>,
            out,
            err,
        )
    })
}

unsafe extern "C" fn one<F: Fn(usize) + Sync>(state: *mut c_void, i: i64) {
    // SAFETY: the closure that `parallel_for` lends until it returns.
    let body = unsafe { &*(state as *const F) };
    body(i as usize);
}

/// Calls `body(i)` for each `i` below `n`, on libtorch's threads. `body` must not panic.
pub(crate) fn parallel_for<F: Fn(usize) + Sync>(n: usize, body: F) {
    let state = &raw const body as *mut c_void;
    // SAFETY: `body` outlives the call, is only read, and may be shared between threads.
    unsafe { peft_parallel_for(n as i64, one::<F>, state) }
}

pub(crate) fn rms_norm(x: &Tensor, w: &Tensor, eps: f64) -> Result<[Tensor; 2], TchError> {
    // SAFETY: live tensors in, whose layout the shim checks; new tensors out.
    make2(|y, rstd, err| unsafe { peft_rms_norm(ptr(x), ptr(w), eps, y, rstd, err) })
}

pub(crate) fn rms_norm_backward(
    g: &Tensor,
    x: &Tensor,
    w: &Tensor,
    rstd: &Tensor,
) -> Result<Tensor, TchError> {
    // SAFETY: as `rms_norm`; `rstd` is what it made for `x`.
    make(|dx, err| unsafe { peft_rms_norm_backward(ptr(g), ptr(x), ptr(w), ptr(rstd), dx, err) })
}

pub(crate) fn rope(
    x: &Tensor,
    cos: &Tensor,
    sin: &Tensor,
    inverse: bool,
) -> Result<Tensor, TchError> {
    // SAFETY: as `rms_norm`.
    make(|y, err| unsafe { peft_rope(ptr(x), ptr(cos), ptr(sin), inverse.into(), y, err) })
}

pub(crate) fn swiglu(a: &Tensor, u: &Tensor) -> Result<Tensor, TchError> {
    // SAFETY: as `rms_norm`.
    make(|y, err| unsafe { peft_swiglu(ptr(a), ptr(u), y, err) })
}

pub(crate) fn swiglu_backward(g: &Tensor, a: &Tensor, u: &Tensor) -> Result<[Tensor; 2], TchError> {
    // SAFETY: as `rms_norm`.
    make2(|da, du, err| unsafe { peft_swiglu_backward(ptr(g), ptr(a), ptr(u), da, du, err) })
}

pub(crate) fn scale(x: &Tensor, s: &Tensor, y: &mut Tensor) -> Result<(), TchError> {
    // SAFETY: as `rms_norm`; `y` is borrowed mutably, and may share the memory of `x`.
    call(|err| unsafe { peft_scale(ptr(x), ptr(s), ptr(y), err) })
}

/// The gradient of s; that of x is written into `dx`.
pub(crate) fn scale_backward(
    g: &Tensor,
    x: &Tensor,
    s: &Tensor,
    dx: Option<&mut Tensor>,
) -> Result<Tensor, TchError> {
    // SAFETY: as `rms_norm`; `dx` is borrowed mutably.
    make(|ds, err| unsafe {
        peft_scale_backward(ptr(g), ptr(x), ptr(s), opt(dx.as_deref()), ds, err)
    })
}

pub(crate) fn gelu_tanh(x: &Tensor) -> Result<Tensor, TchError> {
    // SAFETY: as `rms_norm`.
    make(|y, err| unsafe { peft_gelu_tanh(ptr(x), y, err) })
}

pub(crate) fn gelu_tanh_backward(g: &Tensor, x: &Tensor) -> Result<Tensor, TchError> {
    // SAFETY: as `rms_norm`.
    make(|dx, err| unsafe { peft_gelu_tanh_backward(ptr(g), ptr(x), dx, err) })
}

pub(crate) fn gemv(x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Result<Tensor, TchError> {
    // SAFETY: as `rms_norm`.
    make(|y, err| unsafe { peft_gemv(ptr(x), ptr(w), opt(bias), y, err) })
}

pub(crate) fn cross_entropy(z: &mut Tensor, target: &Tensor) -> Result<Tensor, TchError> {
    // SAFETY: as `rms_norm`; `z` is borrowed mutably.
    make(|loss, err| unsafe { peft_cross_entropy(ptr(z), ptr(target), loss, err) })
}

pub(crate) fn thin_project(x: &Tensor, a: &Tensor) -> Result<Tensor, TchError> {
    // SAFETY: as `rms_norm`.
    make(|h, err| unsafe { peft_thin_project(ptr(x), ptr(a), h, err) })
}

pub(crate) fn thin_add(y: &mut Tensor, h: &Tensor, a: &Tensor, s: f64) -> Result<(), TchError> {
    // SAFETY: as `rms_norm`; `y` is borrowed mutably.
    call(|err| unsafe { peft_thin_add(ptr(y), ptr(h), ptr(a), s, err) })
}

pub(crate) fn thin_expand(h: &Tensor, a: &Tensor, s: f64, half: bool) -> Result<Tensor, TchError> {
    // SAFETY: as `rms_norm`.
    make(|y, err| unsafe { peft_thin_expand(ptr(h), ptr(a), s, c_int::from(half), y, err) })
}

pub(crate) fn thin_outer(h: &Tensor, x: &Tensor, s: f64) -> Result<Tensor, TchError> {
    // SAFETY: as `rms_norm`.
    make(|c, err| unsafe { peft_thin_outer(ptr(h), ptr(x), s, c, err) })
}

pub(crate) fn bmm(a: &Tensor, b: &Tensor, onednn: bool) -> Result<Tensor, TchError> {
    // SAFETY: live tensors in, one new tensor out.
    make(|y, err| unsafe { peft_bmm(ptr(a), ptr(b), onednn.into(), y, err) })
}

pub(crate) fn softmax(
    z: &mut Tensor,
    mask: Option<&Tensor>,
    scale: f64,
    causal: bool,
) -> Result<(), TchError> {
    // SAFETY: live tensors, whose layout the shim checks; `z` is borrowed mutably.
    call(|err| unsafe { peft_softmax(ptr(z), opt(mask), scale, causal.into(), err) })
}

pub(crate) fn softmax_backward(dp: &mut Tensor, p: &Tensor, scale: f64) -> Result<(), TchError> {
    // SAFETY: as `softmax`.
    call(|err| unsafe { peft_softmax_backward(ptr(dp), ptr(p), scale, err) })
}
