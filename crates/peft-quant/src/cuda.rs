//! Weights in 4 bits on a GPU: the kernels of [`peft_cuda`] where they are there, libtorch's operations where not. The bits of a
//! decoded weight are the same; libtorch moves an index of 8 bytes for each number to get them.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

use peft_cuda::{Number, Result, Scales, Stream, Weight};
use tch::{Device, Kind, Tensor};

use crate::{
    ffi::memory,
    four::{FourBits, Kept},
};

/// Whether kernels decode weights in 4 bits on a GPU; if not, why libtorch's operations do.
///
/// The first call compiles them, which takes a second or two unless it was done on this machine before.
///
/// # Errors
/// What is missing: a driver, NVRTC, a GPU of this number.
pub fn kernels(ordinal: usize) -> Result<()> {
    static KNOWN: Mutex<Option<HashMap<usize, Result<()>>>> = Mutex::new(None);
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    let it = known.get_or_insert_default().entry(ordinal);
    it.or_insert_with(|| peft_cuda::prepare(ordinal as i32))
        .clone()
}

/// The weight `[out, in]`, decoded by a kernel; `None` where there is none.
pub(crate) fn decode(four: &FourBits, kind: Kind) -> Option<Tensor> {
    let (number, (out, inp)) = (number(kind)?, four.shape());
    let to = Tensor::empty([out, inp], (kind, four.packed.device()));
    run(four, |weight, stream| {
        weight.dequantise(memory(&to), number, stream)
    })?;
    Some(to)
}

/// `x Wᵀ` straight from the codes by a kernel; x: `[m, in]` of up to [`peft_cuda::MOST_ROWS`] rows -> `[m, out]` in its dtype;
/// `None` where there is none.
pub(crate) fn few_rows(four: &FourBits, x: &Tensor) -> Option<Tensor> {
    let (number, (out, inp)) = (number(x.kind())?, four.shape());
    let x = x.contiguous();
    let m = x.size()[0];
    let y = Tensor::empty([m, out], (x.kind(), x.device()));
    run(four, |weight, stream| {
        let (rows, inp) = (m as usize, inp as usize);
        weight.multiply(memory(&x), rows, inp, memory(&y), number, stream)
    })?;
    Some(y)
}

/// Launches something on libtorch's stream.
fn run(four: &FourBits, launch: impl FnOnce(Weight<'_>, &Stream) -> Result<()>) -> Option<()> {
    let Device::Cuda(ordinal) = four.packed.device() else {
        return None;
    };
    kernels(ordinal).ok()?;
    let codes = four.bytes().contiguous();
    let scales = match &four.scales {
        Kept::Plain(absmax) => Scales::Plain(memory(absmax)),
        Kept::Nested { codes, absmax, map } => Scales::Nested {
            codes: memory(codes),
            absmax: memory(absmax),
            map: memory(map),
            offset: four.state.nested.as_ref().map_or(0.0, |it| it.offset),
        },
    };
    let (state, len) = (&four.state, four.state.shape.iter().product());
    let table = *state.quant_type.table();
    let done = Weight::new(memory(&codes), scales, table, state.blocksize, len)
        .and_then(|weight| launch(weight, &Stream::current(ordinal as i32)?));
    // As a libtorch operation on a GPU that fails.
    done.expect("a kernel on a GPU that works");
    Some(())
}

fn number(kind: Kind) -> Option<Number> {
    match kind {
        Kind::Float => Some(Number::F32),
        Kind::BFloat16 => Some(Number::Bf16),
        Kind::Half => Some(Number::F16),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_gpu_the_reason_is_given_each_time() {
        if !tch::Cuda::is_available() {
            let error = kernels(0).unwrap_err();
            assert_eq!(kernels(0), Err(error));
        }
    }
}
