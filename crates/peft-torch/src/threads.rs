//! Work for all of libtorch's threads.
//!
//! libtorch keeps its threads awake for a while after each product, waiting
//! for the next one. A second pool would have to share the cores with them; so
//! what runs between products runs on the same threads.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::Mutex,
};

use crate::ffi;

/// Ends the process at once, from any thread: without the destructors of libtorch and oneDNN, which take apart what threads that
/// still compute are using.
pub fn end_process(code: i32) -> ! {
    // SAFETY: it does not return, and runs nothing of this process.
    unsafe { libc::_exit(code) }
}

/// Runs `body(i, chunk i)` for each chunk of `size` elements of `out`, the last one perhaps shorter.
///
/// A panic of one chunk is passed on once all have ended.
///
/// # Panics
/// If `size` is zero.
pub fn for_each_chunk<T: Send>(out: &mut [T], size: usize, body: impl Fn(usize, &mut [T]) + Sync) {
    let count = out.len().div_ceil(size);
    if count == 1 {
        return body(0, out);
    }
    let (start, len) = (Start(out.as_mut_ptr()), out.len());
    let panic: Mutex<Option<Box<dyn Any + Send>>> = Mutex::new(None);
    ffi::parallel_for(count, |i| {
        let begin = i * size;
        // SAFETY: chunks do not overlap, each index comes once, and `out` is borrowed meanwhile.
        let chunk =
            unsafe { std::slice::from_raw_parts_mut(start.at().add(begin), size.min(len - begin)) };
        if let Err(text) = catch_unwind(AssertUnwindSafe(|| body(i, chunk)))
            && let Ok(mut panic) = panic.lock()
        {
            *panic = Some(text);
        }
    });
    if let Ok(Some(panic)) = panic.into_inner() {
        resume_unwind(panic);
    }
}

/// An address that threads share.
struct Start<T>(*mut T);

// SAFETY: used for chunks that do not overlap, of elements that may go to other threads.
unsafe impl<T: Send> Sync for Start<T> {}

impl<T> Start<T> {
    fn at(&self) -> *mut T {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_chunk_comes_once() {
        for (n, size) in [(0, 3), (1, 3), (10, 3), (1000, 7), (64, 64)] {
            let mut all = vec![0usize; n];
            for_each_chunk(&mut all, size, |i, chunk| {
                for (j, it) in chunk.iter_mut().enumerate() {
                    *it += i * size + j + 1;
                }
            });
            assert!(all.iter().enumerate().all(|(i, it)| *it == i + 1));
        }
    }

    #[test]
    fn a_panic_comes_out() {
        let mut all = [0u8; 100];
        let run = AssertUnwindSafe(|| for_each_chunk(&mut all, 1, |i, _| assert!(i != 57)));
        assert!(catch_unwind(run).is_err());
    }
}
