//! The doors to addresses: of a tensor on a GPU, and past the caches.

use peft_cuda::Memory;
use tch::Tensor;

/// Four numbers on a place of their own.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(16))]
pub struct Line(pub [f32; 4]);

/// Fills memory without reading first what lies in it, where the processor can.
pub fn fill_past_caches(to: &mut [Line], with: Line) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: four numbers at a multiple of their 16 bytes; every processor of this architecture has the instructions.
    unsafe {
        use std::arch::x86_64::{_mm_load_ps, _mm_sfence, _mm_stream_ps};
        let with = _mm_load_ps(with.0.as_ptr());
        to.iter_mut()
            .for_each(|line| _mm_stream_ps(line.0.as_mut_ptr(), with));
        _mm_sfence();
    }
    #[cfg(not(target_arch = "x86_64"))]
    to.fill(with);
}

/// The bytes of a contiguous tensor on a GPU, `from` of them left out and `len` taken.
pub fn memory(tensor: &Tensor, from: usize, len: usize) -> Memory<'_> {
    let (address, all) = peft_torch::cuda::bytes(tensor).expect("dense, on a GPU");
    assert!(from + len <= all);
    // SAFETY: bytes of a tensor that is alive for as long, and whose allocator knows the stream, libtorch's current one.
    unsafe { Memory::of(address + from as u64, len) }
}
