//! How much memory is in use, how much was at most, and how it is kept.

use crate::ffi;
use half::{bf16, f16};
use std::{
    path::Path,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};
use tch::{Device, Kind, TchError, Tensor};

/// Bytes in use now and at most since the start (or [`reset_peak`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Now.
    pub now: u64,
    /// At most.
    pub peak: u64,
}

/// Memory of this process (`Device::Cpu`: resident, with mapped files) or of tensors on a GPU.
///
/// `None` where the system does not tell.
pub fn usage(device: Device) -> Option<Usage> {
    match device {
        Device::Cpu => resident(),
        Device::Cuda(i) => ffi::cuda_memory(i as i32).ok().map(|(now, peak)| Usage {
            now: now.max(0) as u64,
            peak: peak.max(0) as u64,
        }),
        _ => None,
    }
}

/// Starts the peak anew, where the system allows it.
pub fn reset_peak(device: Device) {
    match device {
        // Writing 5 resets VmHWM; refused without harm in some containers.
        Device::Cpu => drop(std::fs::write("/proc/self/clear_refs", "5")),
        Device::Cuda(i) => drop(ffi::cuda_reset_peak(i as i32)),
        _ => {}
    }
}

/// Runs `body` and counts what tensors hold in main memory, in bytes: of what this thread and its backward passes take
/// meanwhile, how much is left and how much there was at most.
///
/// Exact where [`usage`] is not: blocks that the C library keeps, programs and mapped files do not count. Each block
/// costs an entry in a table, so it is for tests and measurements. Counts do not nest: the inner one has it all.
pub fn counted<T>(body: impl FnOnce() -> T) -> Result<(T, Usage), TchError> {
    let counter = ffi::Counter::start()?;
    let result = body();
    let (now, peak) = counter.stop();
    let bytes = |it: i64| it.max(0) as u64;
    Ok((
        result,
        Usage {
            now: bytes(now),
            peak: bytes(peak),
        },
    ))
}

#[cfg(target_os = "linux")]
fn resident() -> Option<Usage> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let kib = |key: &str| -> Option<u64> {
        let line = status.lines().find(|line| line.starts_with(key))?;
        line.split_whitespace().nth(1)?.parse().ok()
    };
    Some(Usage {
        now: kib("VmRSS:")? << 10,
        peak: kib("VmHWM:")? << 10,
    })
}

#[cfg(not(target_os = "linux"))]
fn resident() -> Option<Usage> {
    // SAFETY: all-zero is a valid `rusage`, which the call fills.
    let mut it: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: a valid place for the result.
    (unsafe { libc::getrusage(libc::RUSAGE_SELF, &mut it) } == 0).then(|| {
        let peak = it.ru_maxrss as u64; // bytes on macOS
        Usage { now: peak, peak }
    })
}

/// Tells the C library to keep freed blocks instead of giving them back to the system.
///
/// A tensor of many megabytes is otherwise mapped, faulted in page by page and
/// unmapped again each time: 4 GB/s for its first use against 41. Call it once
/// at the start of a program; does nothing where the C library is not glibc.
pub fn keep_freed_blocks() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: sets two numbers of the allocator.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 30);
        libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
    }
}

/// Lends the bytes of a tensor to `body`: row-major, of a copy where the tensor lies otherwise or on another device.
///
/// `body` must not change the tensor.
pub fn with_bytes<T>(tensor: &Tensor, body: impl FnOnce(&[u8]) -> T) -> T {
    let tensor = tensor.detach().to_device(Device::Cpu).contiguous();
    let len = tensor.numel() * tensor.kind().elt_size_in_bytes();
    if len == 0 {
        return body(&[]);
    }
    // SAFETY: a contiguous tensor in main memory of `len` bytes, which `tensor` keeps alive through the call.
    body(unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast::<u8>(), len) })
}

/// Gives freed blocks back to the system after all: when something large was needed once, such as the dense weights of a
/// model that is kept in few bits.
pub fn give_back() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: frees what nobody uses.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Memory may grow by so many bytes before freed blocks are given back.
const SLACK: u64 = 256 << 20;

/// [`give_back`], if the process has grown by more than 256 MiB since the last time: to be called between the parts of what is done
/// one part after the other so that it needs little memory.
///
/// What a part leaves behind comes to lie among the blocks that it freed, and the next part, whose blocks are as large, finds
/// no room there; so freed blocks that are kept become more and more.
pub fn give_back_growth() {
    static BEFORE: AtomicU64 = AtomicU64::new(0);
    let Some(usage) = resident() else {
        return;
    };
    let least = BEFORE.fetch_min(usage.now, Relaxed).min(usage.now);
    if usage.now > least + SLACK {
        give_back();
        BEFORE.store(resident().map_or(0, |it| it.now), Relaxed);
    }
}

/// A type of numbers that Rust and libtorch lay out alike.
pub trait Number: Copy + private::Sealed {
    /// Its name in libtorch.
    const KIND: Kind;
}

mod private {
    /// Only the types below: others would read what is not there.
    pub trait Sealed {}
}

macro_rules! numbers {
    ($($type:ty => $kind:ident),*) => {$(
        impl private::Sealed for $type {}
        impl Number for $type {
            const KIND: Kind = Kind::$kind;
        }
    )*};
}

numbers!(u8 => Uint8, f32 => Float, bf16 => BFloat16, f16 => Half);

/// Lends the numbers of a tensor to `body`: row-major, of a copy where the tensor lies otherwise or on another device.
///
/// `body` must not change the tensor.
///
/// # Errors
/// If the tensor holds numbers of another type.
pub fn with_slice<T: Number, R>(
    tensor: &Tensor,
    body: impl FnOnce(&[T]) -> R,
) -> Result<R, TchError> {
    let tensor = tensor.detach().to_device(Device::Cpu).contiguous();
    holds::<T>(&tensor)?;
    if tensor.numel() == 0 {
        return Ok(body(&[]));
    }
    // SAFETY: a contiguous tensor in main memory of so many `T`, which `tensor` keeps alive through the call.
    Ok(body(unsafe {
        std::slice::from_raw_parts(tensor.data_ptr().cast::<T>(), tensor.numel())
    }))
}

/// Lends the numbers of a tensor in main memory to `body`, to be written.
///
/// # Errors
/// If the tensor holds numbers of another type, is not contiguous, or lies on another device.
pub fn with_slice_mut<T: Number, R>(
    tensor: &mut Tensor,
    body: impl FnOnce(&mut [T]) -> R,
) -> Result<R, TchError> {
    holds::<T>(tensor)?;
    if tensor.device() != Device::Cpu || !tensor.is_contiguous() {
        return Err(TchError::Shape(format!(
            "{tensor:?} is no plain array in main memory"
        )));
    }
    if tensor.numel() == 0 {
        return Ok(body(&mut []));
    }
    // SAFETY: a contiguous tensor in main memory of so many `T`, borrowed for the call.
    Ok(body(unsafe {
        std::slice::from_raw_parts_mut(tensor.data_ptr().cast::<T>(), tensor.numel())
    }))
}

fn holds<T: Number>(tensor: &Tensor) -> Result<(), TchError> {
    match tensor.kind() == T::KIND {
        true => Ok(()),
        false => Err(TchError::Kind(format!(
            "{:?} where {:?} is wanted",
            tensor.kind(),
            T::KIND
        ))),
    }
}

/// A tensor over bytes that somebody else owns, without a copy.
///
/// For weights in a memory-mapped file. The tensor and all its views hold
/// `owner`; nothing may be written to it.
///
/// # Safety
/// `owner` must keep `bytes` valid, unmoved and unchanged as long as it lives.
///
/// # Errors
/// If the length does not fit `shape` and `kind`, or the address is not aligned for `kind`.
pub unsafe fn borrow<O: Send + 'static>(
    bytes: &[u8],
    shape: &[i64],
    kind: Kind,
    owner: O,
) -> Result<Tensor, TchError> {
    let size = kind.elt_size_in_bytes();
    let wanted = shape.iter().try_fold(size as i64, |n, &d| n.checked_mul(d));
    if wanted != Some(bytes.len() as i64) || !(bytes.as_ptr() as usize).is_multiple_of(size) {
        return Err(TchError::Shape(format!(
            "{} bytes at {:p} are no {kind:?} tensor of shape {shape:?}",
            bytes.len(),
            bytes.as_ptr()
        )));
    }
    // SAFETY: length and alignment are checked, the rest is the caller's promise.
    unsafe { ffi::from_blob(bytes.as_ptr(), shape, (kind, Device::Cpu), owner) }
}

/// The folder of the libtorch that this process runs on, if the system tells.
pub fn libtorch_folder() -> Option<std::path::PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let line = maps
        .lines()
        .find(|line| line.ends_with("libtorch_cpu.so"))?;
    let path = &line[line.find('/')?..];
    Path::new(path).parent().map(Path::to_owned)
}
