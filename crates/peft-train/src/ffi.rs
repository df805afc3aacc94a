//! The doors between a tensor on a GPU and its address.

use peft_cuda::{Managed, Memory};
use tch::{Device, Kind, TchError, Tensor};

/// The bytes of a tensor.
///
/// # Panics
/// If it is not on a GPU, or has gaps.
pub(crate) fn memory(tensor: &Tensor) -> Memory<'_> {
    let (address, len) = peft_torch::cuda::bytes(tensor).expect("dense, on a GPU");
    // SAFETY: bytes of a tensor that is alive for as long, and whose allocator knows the stream, libtorch's current one.
    unsafe { Memory::of(address, len) }
}

/// Zeros that the driver moves to main memory when the GPU is full, and back when they are used.
///
/// # Errors
/// If the device is none of CUDA's, or cannot move memory.
pub(crate) fn paged_zeros(shape: &[i64], kind: Kind, device: Device) -> Result<Tensor, TchError> {
    let numbers: i64 = shape.iter().product();
    if numbers == 0 {
        return Tensor::f_zeros(shape, (kind, device));
    }
    let fault = |reason: String| {
        TchError::Torch(format!(
            "moments cannot be paged: {reason}; `offloaded_adamw_8bit` and `offloaded_adamw_32bit` keep them in main memory"
        ))
    };
    let Device::Cuda(ordinal) = device else {
        return Err(fault(format!("{device:?} is no GPU of CUDA's")));
    };
    let bytes = numbers as usize * kind.elt_size_in_bytes();
    let pages = Managed::new(bytes, ordinal as i32).map_err(|error| fault(error.to_string()))?;
    let place = (pages.address(), pages.bytes());
    // SAFETY: the pages are the tensor's alone until it drops them.
    let tensor = unsafe { peft_torch::cuda::borrow(place, shape, kind, ordinal, pages) }?;
    tch::no_grad(|| tensor.shallow_clone().f_zero_())
}
