//! The CUDA half of libtorch, loaded when it is wanted.
//!
//! The program links `libtorch_cpu` and `libc10` only, so it starts on a
//! machine without a GPU. Kernels for CUDA register themselves when
//! `libtorch_cuda.so` is loaded; that is all a program needs to do to gain
//! them. The two halves must come from one build.

use std::{
    ffi::{CStr, CString},
    path::{Path, PathBuf},
};

use tch::{Device, Kind, TchError, Tensor};

use crate::ffi;

/// Why there is no CUDA.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No second half was found.
    #[error(
        "no libtorch_cuda.so beside the libtorch in use ({cpu}); install a CUDA build of torch 2.11.0 and run `cargo xtask setup` in its environment, or point PEFT_LIBTORCH_CUDA at the folder of its libraries"
    )]
    Missing {
        /// Where it was looked for.
        cpu: String,
    },
    /// The halves are of different builds.
    #[error("{cuda} belongs to another build of libtorch than {cpu}: take both from one package")]
    Mismatch {
        /// The CUDA half found.
        cuda: PathBuf,
        /// The half in use.
        cpu: PathBuf,
    },
    /// The system's loader refused.
    #[error("{path}: {text}")]
    Load {
        /// What was to be loaded.
        path: PathBuf,
        /// What the loader says.
        text: String,
    },
    /// Loaded, but there is no device.
    #[error("libtorch has CUDA support, but finds no GPU or no driver")]
    NoDevice,
}

/// Makes CUDA devices usable: loads the library if it is not loaded and checks for a device.
pub fn load() -> Result<(), Error> {
    if tch::Cuda::is_available() {
        return Ok(());
    }
    if !tch::utils::has_cuda() {
        let path = find()?;
        open(&path)?;
    }
    if tch::Cuda::is_available() {
        Ok(())
    } else {
        Err(Error::NoDevice)
    }
}

/// Where the numbers of a tensor lie on a GPU, and how many bytes they are; `None` if they lie elsewhere or have gaps.
pub fn bytes(tensor: &tch::Tensor) -> Option<(u64, usize)> {
    let dense = tensor.device().is_cuda() && tensor.is_contiguous();
    let len = tensor.numel() * tensor.kind().elt_size_in_bytes();
    dense.then(|| (tensor.data_ptr().expose_provenance() as u64, len))
}

/// A tensor over memory of a GPU that `owner` holds, until the tensor and its views are gone. `address` is that of the first of
/// `bytes` bytes; what is in them is the tensor's to write.
///
/// # Safety
/// `owner` must keep the memory on device `ordinal` as long as it lives, and nobody else may use it meanwhile.
///
/// # Errors
/// If the length is not that of `shape` and `kind`, the address is not aligned, or libtorch does not find it on the device.
pub unsafe fn borrow<O: Send + 'static>(
    (address, bytes): (u64, usize),
    shape: &[i64],
    kind: Kind,
    ordinal: usize,
    owner: O,
) -> Result<Tensor, TchError> {
    let size = kind.elt_size_in_bytes();
    let wanted = shape.iter().try_fold(size as i64, |n, &d| n.checked_mul(d));
    if wanted != Some(bytes as i64) || !address.is_multiple_of(size as u64) {
        return Err(TchError::Shape(format!(
            "{bytes} bytes at {address:#x} are no {kind:?} tensor of shape {shape:?}"
        )));
    }
    let place = std::ptr::with_exposed_provenance(address as usize);
    // SAFETY: length and alignment are checked, the rest is the caller's promise.
    unsafe { ffi::from_blob(place, shape, (kind, Device::Cuda(ordinal)), owner) }
}

fn find() -> Result<PathBuf, Error> {
    // Touch libtorch, so that it is among the mapped files.
    let _ = tch::utils::has_cuda();
    let beside = crate::memory::libtorch_folder();
    let cpu = beside.clone().unwrap_or_default().join("libtorch_cpu.so");
    let named = std::env::var_os("PEFT_LIBTORCH_CUDA").map(PathBuf::from);
    let folders = named.iter().chain(beside.iter());
    let found = folders
        .map(|folder| folder.join("libtorch_cuda.so"))
        .find(|path| path.exists())
        .ok_or_else(|| Error::Missing {
            cpu: cpu.display().to_string(),
        })?;
    if same_build(&cpu, &found.with_file_name("libtorch_cpu.so")) {
        Ok(found)
    } else {
        Err(Error::Mismatch { cuda: found, cpu })
    }
}

/// Whether two CPU halves are the same file: of one length, which no two builds share.
fn same_build(a: &Path, b: &Path) -> bool {
    let len = |path: &Path| std::fs::metadata(path).map(|it| it.len()).ok();
    len(a).is_some() && len(a) == len(b)
}

fn open(path: &Path) -> Result<(), Error> {
    let failed = |text: String| Error::Load {
        path: path.to_owned(),
        text,
    };
    let name = CString::new(path.as_os_str().as_encoded_bytes())
        .map_err(|_| failed("a path with a NUL byte".into()))?;
    // SAFETY: a valid path; the library's constructors only register kernels.
    let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    if handle.is_null() {
        // SAFETY: after a failure dlerror gives a string, or null.
        let text = unsafe {
            let text = libc::dlerror();
            (!text.is_null()).then(|| CStr::from_ptr(text).to_string_lossy().into_owned())
        };
        return Err(failed(text.unwrap_or_else(|| "cannot be loaded".into())));
    }
    Ok(())
}
