//! Memory of a GPU: an address and a length, the caller's or shared with main memory.

use std::marker::PhantomData;

use crate::{
    driver::{self, Device},
    error::{Error, Result},
};

/// A format of numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Number {
    /// fp32.
    F32,
    /// bf16.
    Bf16,
    /// fp16.
    F16,
}

impl Number {
    /// As the kernels' names end.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Number::F32 => "f32",
            Number::Bf16 => "bf16",
            Number::F16 => "f16",
        }
    }

    /// Of one.
    pub(crate) fn bytes(self) -> usize {
        match self {
            Number::F32 => 4,
            Number::Bf16 | Number::F16 => 2,
        }
    }
}

/// Bytes on a GPU, for as long as `'a`.
#[derive(Debug, Clone, Copy)]
pub struct Memory<'a> {
    address: u64,
    bytes: usize,
    owner: PhantomData<&'a ()>,
}

impl Memory<'_> {
    /// The bytes from an address on, such as a tensor's.
    ///
    /// # Safety
    /// They are on the device of the stream that a kernel using them is launched on, may be written where a function says that it
    /// writes, and are not given to somebody else before the stream has come past the kernel: for `'a` by the caller, after it by
    /// an allocator that knows the stream, as libtorch's does.
    pub unsafe fn of(address: u64, bytes: usize) -> Self {
        Memory {
            address,
            bytes,
            owner: PhantomData,
        }
    }

    /// Where it begins.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// How long it is.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn aligned(&self, to: u64) -> bool {
        self.address.is_multiple_of(to)
    }

    /// The address, if `count` numbers of `size` bytes lie there and nothing else.
    pub(crate) fn holds(&self, what: &'static str, count: usize, size: usize) -> Result<u64> {
        let expected = count.saturating_mul(size);
        if self.bytes != expected {
            return Err(Error::Bytes {
                what,
                expected,
                got: self.bytes,
            });
        }
        if !self.aligned(size as u64) {
            return Err(Error::Address {
                what,
                address: self.address,
                align: size as u64,
            });
        }
        Ok(self.address)
    }
}

/// Memory of a GPU and of the machine at once (CUDA's unified memory): the driver keeps a page where it was used last, and moves those
/// that were not used for long to main memory when the GPU is full. Freed when dropped.
///
/// For what a step uses once, as an optimiser's moments: with them out of the way a step that would not fit does.
#[derive(Debug)]
pub struct Managed {
    device: &'static Device,
    address: u64,
    bytes: usize,
}

impl Managed {
    /// So many new bytes, more than none, of a device; what is in them is undefined.
    ///
    /// # Errors
    /// If there is no such device, it cannot move pages ([`Error::Unmovable`]), or main memory is full, too.
    pub fn new(bytes: usize, ordinal: i32) -> Result<Managed> {
        let device = driver::device(ordinal)?;
        Ok(Managed {
            device,
            address: device.managed(bytes)?,
            bytes,
        })
    }

    /// Where it begins.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// How long it is.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Managed {
    fn drop(&mut self) {
        // It cannot fail but by a kernel that has failed before, which whoever waits for it is told.
        let _ = self.device.free(self.address);
    }
}
