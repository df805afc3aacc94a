//! What memory gives and takes.

use std::arch::x86_64::*;

/// Reads all of it.
pub(crate) fn read(from: &[u8]) -> u64 {
    let mut sums = [0u64; 16];
    for chunk in from.chunks_exact(128) {
        for (sum, eight) in sums.iter_mut().zip(chunk.as_chunks::<8>().0) {
            *sum = sum.wrapping_add(u64::from_ne_bytes(*eight));
        }
    }
    sums.iter().fold(0, |a, b| a.wrapping_add(*b))
}

/// Through the caches.
pub(crate) fn copy(from: &[u8], to: &mut [u8]) {
    // SAFETY: every processor of this architecture has these; so many bytes are there.
    unsafe {
        for i in 0..from.len().min(to.len()) / 16 {
            let it = _mm_loadu_si128(from.as_ptr().add(16 * i).cast());
            _mm_storeu_si128(to.as_mut_ptr().add(16 * i).cast(), it);
        }
    }
}

/// Past them. `to` begins at a multiple of 16 bytes.
pub(crate) fn copy_past(from: &[u8], to: &mut [u8]) {
    assert!(to.as_ptr().addr().is_multiple_of(16));
    // SAFETY: every processor of this architecture has these; so many bytes are there.
    unsafe {
        for i in 0..from.len().min(to.len()) / 16 {
            let it = _mm_loadu_si128(from.as_ptr().add(16 * i).cast());
            _mm_stream_si128(to.as_mut_ptr().add(16 * i).cast(), it);
        }
        _mm_sfence();
    }
}
