//! The door from a tensor on a GPU to its address.

use peft_cuda::Memory;
use tch::Tensor;

/// The bytes of a tensor.
///
/// # Panics
/// If it is not on a GPU, or has gaps.
pub(crate) fn memory(tensor: &Tensor) -> Memory<'_> {
    let (address, len) = peft_torch::cuda::bytes(tensor).expect("dense, on a GPU");
    // SAFETY: bytes of a tensor that is alive for as long, and whose allocator knows the stream, libtorch's current one.
    unsafe { Memory::of(address, len) }
}
