//! The stream that work is put on: libtorch's, so that kernels and tensors wait for each other.

use std::{
    ffi::{c_int, c_void},
    ptr::null_mut,
    time::Duration,
};

use libloading::os::unix::Library;

use crate::{
    driver,
    error::{Error, Result},
    memory::Memory,
};

/// A queue of work on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stream {
    raw: usize,
    device: i32,
}

impl Stream {
    /// A `CUstream` of a device; null is the device's default stream.
    ///
    /// # Safety
    /// It belongs to that device, whose primary context it was made in, and is not destroyed while it is used.
    pub unsafe fn of(raw: *mut c_void, device: i32) -> Stream {
        Stream {
            raw: raw.expose_provenance(),
            device,
        }
    }

    /// The one that libtorch puts this thread's work for a device on. Its CUDA half must be loaded.
    pub fn current(device: i32) -> Result<Stream> {
        let mut raw = null_mut();
        // SAFETY: libtorch's shim for C: writes one address, and 0 says that it has. The streams it gives live as long as libtorch.
        unsafe {
            let loaded = Library::this();
            let current = loaded
                .get::<CurrentStream>(SYMBOL.as_bytes())
                .map_err(|_| Error::NoTorch(SYMBOL))?;
            match current(device, &mut raw) {
                0 => Ok(Stream::of(raw, device)),
                code => Err(Error::NoStream {
                    ordinal: device,
                    code,
                }),
            }
        }
    }

    /// The device's number.
    pub fn device(&self) -> i32 {
        self.device
    }

    /// The `CUstream`.
    pub fn raw(&self) -> *mut c_void {
        std::ptr::with_exposed_provenance_mut(self.raw)
    }

    /// Waits until everything on it is done. What a kernel before did wrong is said here.
    pub fn wait(&self) -> Result<()> {
        driver::device(self.device)?.wait(self)
    }

    /// How long the device takes for what `body` puts on it.
    pub fn time(&self, body: impl FnOnce() -> Result<()>) -> Result<Duration> {
        driver::device(self.device)?.time(self, body)
    }

    /// Copies to memory of the same length.
    pub fn copy(&self, from: &Memory<'_>, to: &Memory<'_>) -> Result<()> {
        driver::device(self.device)?.copy(from, to, self)
    }
}

/// In libtorch's stable interface for C.
const SYMBOL: &str = "aoti_torch_get_current_cuda_stream";
type CurrentStream = unsafe extern "C" fn(i32, *mut *mut c_void) -> c_int;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_libtorch_there_is_no_stream() {
        assert_eq!(Stream::current(0), Err(Error::NoTorch(SYMBOL)));
    }
}
