//! The one door from a tensor to its address.

use peft_cuda::Memory;
use tch::Tensor;

/// The bytes of a contiguous tensor on a GPU, `from` of them left out and `len` taken.
pub fn memory(tensor: &Tensor, from: usize, len: usize) -> Memory<'_> {
    let (address, all) = peft_torch::cuda::bytes(tensor).expect("dense, on a GPU");
    assert!(from + len <= all);
    // SAFETY: bytes of a tensor that is alive for as long, and whose allocator knows the stream, libtorch's current one.
    unsafe { Memory::of(address + from as u64, len) }
}
