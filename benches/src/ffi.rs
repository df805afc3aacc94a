//! The one door from a tensor to its address.

use peft_cuda::Memory;
use tch::Tensor;

/// The bytes of a contiguous tensor on a GPU, `from` of them left out and `len` taken.
pub fn memory(tensor: &Tensor, from: usize, len: usize) -> Memory<'_> {
    let all = tensor.numel() * tensor.kind().elt_size_in_bytes();
    assert!(tensor.is_contiguous() && from + len <= all && tensor.device().is_cuda());
    let address = tensor.data_ptr().expose_provenance() as u64 + from as u64;
    // SAFETY: bytes of a tensor that is alive for as long, and whose allocator knows the stream, libtorch's current one.
    unsafe { Memory::of(address, len) }
}
