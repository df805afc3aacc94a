//! Memory that is lent, given back and lent again.
//!
//! A weight that is decoded for one product is large and short-lived. Fresh
//! memory for it would cost more than the decoding: the system hands it out
//! page by page, 3 GB/s against 50. So there is one region, as large as the
//! largest weight so far and on huge pages where the system has them, and one
//! more for each product that runs at the same time.

use std::{
    ptr::null_mut,
    sync::{Arc, Mutex, PoisonError},
};

use tch::{Device, Kind, Tensor};

use crate::ffi;

/// Huge pages are of this size, and regions are multiples of it.
const PAGE: usize = 2 << 20;

/// Regions that nobody uses.
static FREE: Mutex<Vec<Arc<Region>>> = Mutex::new(Vec::new());

/// Lends a tensor of `shape` and `kind` in main memory; what is in it is whatever was there before.
///
/// A tensor, or a view of it, that outlives `body` keeps the memory for itself.
pub fn with_scratch<R>(kind: Kind, shape: &[i64], body: impl FnOnce(Tensor) -> R) -> R {
    let len = shape.iter().product::<i64>() as usize * kind.elt_size_in_bytes();
    let Some(region) = take(len) else {
        return body(Tensor::empty(shape, (kind, Device::Cpu)));
    };
    // SAFETY: the region is as large, aligned for anything, may be written, and is held by the tensor.
    let tensor =
        unsafe { ffi::from_blob(region.start(), shape, (kind, Device::Cpu), region.clone()) };
    let result = body(tensor.expect("a shape of so many bytes"));
    if Arc::strong_count(&region) == 1 {
        FREE.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(region);
    }
    result
}

/// How many regions are free, and their bytes.
pub fn kept() -> (usize, usize) {
    let free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
    (free.len(), free.iter().map(|it| it.len).sum())
}

/// A free region that is large enough, or a new one in place of the largest that is not.
fn take(len: usize) -> Option<Arc<Region>> {
    let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
    free.sort_by_key(|it| it.len);
    match free.iter().position(|it| it.usable() >= len) {
        Some(at) => Some(free.remove(at)),
        None => {
            free.pop();
            Region::new(len).map(Arc::new)
        }
    }
}

/// A mapping of memory that is nobody's file.
#[derive(Debug)]
struct Region {
    at: *mut libc::c_void,
    len: usize,
}

// SAFETY: a number and an address; who has the tensor on it has the memory.
unsafe impl Send for Region {}
// SAFETY: nothing is done through a shared region.
unsafe impl Sync for Region {}

impl Region {
    fn new(len: usize) -> Option<Region> {
        let len = len.checked_next_multiple_of(PAGE)?.checked_add(PAGE)?;
        let (access, how) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANON,
        );
        // SAFETY: a new mapping at a place of the system's choice.
        let at = unsafe { libc::mmap(null_mut(), len, access, how, -1, 0) };
        if at == libc::MAP_FAILED {
            return None;
        }
        #[cfg(target_os = "linux")]
        // SAFETY: the mapping above; a hint that may be refused.
        unsafe {
            libc::madvise(at, len, libc::MADV_HUGEPAGE);
        }
        Some(Region { at, len })
    }

    /// The first byte on a huge page of its own.
    fn start(&self) -> *const u8 {
        let at = self.at.cast::<u8>();
        at.wrapping_add(at.align_offset(PAGE))
    }

    fn usable(&self) -> usize {
        self.len - PAGE
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: the mapping that was made, once.
        unsafe { libc::munmap(self.at, self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One test, since the regions are the process's.
    #[test]
    fn memory_is_used_again_unless_somebody_kept_it() {
        let at = |shape: &[i64]| {
            with_scratch(Kind::Float, shape, |mut t| t.fill_(1.0).data_ptr() as usize)
        };
        let first = at(&[1000, 1000]);
        assert_eq!(first % PAGE, 0);
        assert_eq!((at(&[1000, 1000]), at(&[3])), (first, first));
        assert_eq!(kept().0, 1);
        // A tensor that is kept keeps its memory; the next one gets other memory.
        let view = with_scratch(Kind::Float, &[4], |mut t| t.fill_(2.0).narrow(0, 1, 2));
        assert_eq!(kept().0, 0);
        with_scratch(Kind::Float, &[4], |mut t| drop(t.fill_(3.0)));
        assert_eq!(view.sum(Kind::Float).double_value(&[]), 4.0);
        // Two at a time have two; a larger one takes the place of a smaller.
        with_scratch(Kind::Half, &[8], |_| with_scratch(Kind::Half, &[8], |_| ()));
        assert_eq!(kept().0, 2);
        at(&[4000, 1000]);
        assert_eq!(kept().0, 2);
    }
}
