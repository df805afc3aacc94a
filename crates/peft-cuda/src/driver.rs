//! The driver's calls, each behind a safe function.
//!
//! A device's primary context is the one libtorch uses, so its tensors' addresses are valid in it. It is made current for a call and
//! then what was before: the caller's thread may belong to another device, or to none.

use std::{
    collections::HashMap,
    ffi::{CStr, CString},
    ptr::null_mut,
    sync::{Mutex, OnceLock, PoisonError},
    time::Duration,
};

use cudarc::driver::sys::{self, CUdevice_attribute as Attribute, CUevent, CUresult};

use crate::{
    error::{Error, Result},
    kernels::{Launch, THREADS},
    memory::Memory,
    stream::Stream,
};

/// A GPU.
#[derive(Debug)]
pub(crate) struct Device {
    ordinal: i32,
    context: Context,
    arch: u32,
    processors: u32,
    evicts: bool,
}

#[derive(Debug, Clone, Copy)]
struct Context(sys::CUcontext);

// SAFETY: the driver's handles may be used from any thread.
unsafe impl Send for Context {}
// SAFETY: and from several at once.
unsafe impl Sync for Context {}

/// Kernels that are loaded.
#[derive(Debug)]
pub(crate) struct Module {
    handle: sys::CUmodule,
    functions: Mutex<HashMap<String, Function>>,
}

#[derive(Debug, Clone, Copy)]
struct Function(sys::CUfunction);

// SAFETY: the driver's handles may be used from any thread.
unsafe impl Send for Module {}
// SAFETY: and from several at once.
unsafe impl Sync for Module {}
// SAFETY: as above.
unsafe impl Send for Function {}

/// A device by its number, as libtorch counts. Found once.
pub(crate) fn device(ordinal: i32) -> Result<&'static Device> {
    static FOUND: Mutex<Option<HashMap<i32, &'static Device>>> = Mutex::new(None);
    let mut found = FOUND.lock().unwrap_or_else(PoisonError::into_inner);
    let found = found.get_or_insert_default();
    if let Some(device) = found.get(&ordinal) {
        return Ok(device);
    }
    let device: &Device = Box::leak(Box::new(Device::open(ordinal)?)); // for the rest of the process
    found.insert(ordinal, device);
    Ok(device)
}

/// How many GPUs there are.
pub fn devices() -> Result<i32> {
    start()?;
    let mut count = 0;
    // SAFETY: writes one number.
    check("cuDeviceGetCount", unsafe {
        sys::cuDeviceGetCount(&mut count)
    })?;
    Ok(count)
}

/// The calls that are made. cudarc looks each up when it is first made, and panics where it is not.
const CALLS: [&CStr; 20] = [
    c"cuInit",
    c"cuDeviceGet",
    c"cuDeviceGetCount",
    c"cuDeviceGetAttribute",
    c"cuDevicePrimaryCtxRetain",
    c"cuCtxPushCurrent_v2",
    c"cuCtxPopCurrent_v2",
    c"cuModuleLoadData",
    c"cuModuleGetFunction",
    c"cuLaunchKernel",
    c"cuGetErrorString",
    c"cuMemcpyHtoDAsync_v2",
    c"cuMemcpyDtoDAsync_v2",
    c"cuMemAllocManaged",
    c"cuMemFree_v2",
    c"cuStreamSynchronize",
    c"cuEventCreate",
    c"cuEventRecord",
    c"cuEventSynchronize",
    c"cuEventElapsedTime",
];

/// Loads the driver and starts it, once.
fn start() -> Result<()> {
    static STARTED: OnceLock<Result<()>> = OnceLock::new();
    let started = STARTED.get_or_init(|| {
        // SAFETY: looks for the library by its names; its constructors are the system's concern.
        if !unsafe { sys::is_culib_present() } {
            let text = "libcuda.so.1 is not on this machine";
            return Err(Error::NoDriver(text.into()));
        }
        for call in CALLS.into_iter().chain([c"cuEventDestroy_v2"]) {
            // SAFETY: looked up and not called.
            let there = unsafe { sys::culib().get::<unsafe extern "C" fn()>(call) };
            there.map_err(|error| Error::NoDriver(error.to_string()))?;
        }
        // SAFETY: takes no address.
        let code = unsafe { sys::cuInit(0) };
        check("cuInit", code).map_err(|error| Error::NoDriver(error.to_string()))
    });
    started.clone()
}

fn check(call: &'static str, code: CUresult) -> Result<()> {
    match code {
        CUresult::CUDA_SUCCESS => Ok(()),
        code => Err(Error::Driver {
            call,
            text: text(code),
        }),
    }
}

/// What the driver says of a code.
fn text(code: CUresult) -> String {
    let mut text = std::ptr::null();
    // SAFETY: writes the address of a string that stays, or null.
    let known = unsafe { sys::cuGetErrorString(code, &mut text) };
    if known != CUresult::CUDA_SUCCESS || text.is_null() {
        return format!("{code:?}");
    }
    // SAFETY: a string that stays.
    let text = unsafe { CStr::from_ptr(text) };
    format!("{} ({code:?})", text.to_string_lossy())
}

impl Device {
    fn open(ordinal: i32) -> Result<Device> {
        let count = devices()?;
        if !(0..count).contains(&ordinal) {
            return Err(Error::NoDevice { ordinal, count });
        }
        let (mut device, mut context) = (0, null_mut());
        // SAFETY: each writes one handle.
        unsafe {
            check("cuDeviceGet", sys::cuDeviceGet(&mut device, ordinal))?;
            // Kept for the rest of the process.
            let code = sys::cuDevicePrimaryCtxRetain(&mut context, device);
            check("cuDevicePrimaryCtxRetain", code)?;
        }
        let attribute = |which| -> Result<u32> {
            let mut value = 0;
            // SAFETY: writes one number.
            let code = unsafe { sys::cuDeviceGetAttribute(&mut value, which, device) };
            check("cuDeviceGetAttribute", code)?;
            Ok(value.max(0) as u32)
        };
        let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        Ok(Device {
            ordinal,
            context: Context(context),
            arch: major * 10 + minor,
            processors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            evicts: attribute(Attribute::CU_DEVICE_ATTRIBUTE_CONCURRENT_MANAGED_ACCESS)? != 0,
        })
    }

    pub(crate) fn ordinal(&self) -> i32 {
        self.ordinal
    }

    /// The compute capability: 90 is 9.0.
    pub(crate) fn arch(&self) -> u32 {
        self.arch
    }

    /// How many multiprocessors it has.
    pub(crate) fn processors(&self) -> u32 {
        self.processors
    }

    /// Runs `body` with the device's context as the thread's.
    fn within<R>(&self, body: impl FnOnce() -> Result<R>) -> Result<R> {
        // SAFETY: a context that is retained.
        let code = unsafe { sys::cuCtxPushCurrent_v2(self.context.0) };
        check("cuCtxPushCurrent", code)?;
        let _pop = Pop;
        body()
    }

    /// Loads an image, or text that the driver compiles.
    pub(crate) fn load(&self, image: &[u8]) -> Result<Module> {
        let mut image = image.to_vec();
        image.push(0); // text ends so; an image knows its length
        self.within(|| {
            let mut handle = null_mut();
            // SAFETY: a whole image, which it copies.
            let code = unsafe { sys::cuModuleLoadData(&mut handle, image.as_ptr().cast()) };
            check("cuModuleLoadData", code)?;
            Ok(Module {
                handle,
                functions: Mutex::default(),
            })
        })
    }

    /// Puts a kernel on a stream of this device.
    pub(crate) fn launch(&self, module: &Module, it: &Launch, stream: &Stream) -> Result<()> {
        self.within(|| {
            let function = module.function(&it.kernel)?;
            let mut places = it.places();
            // SAFETY: the arguments are the kernel's, which the tests in `tests.rs` see to; its memory is there by the promise of
            // `Memory::of`, as long as the checks before asked; the stream is alive by the promise of `Stream::of`.
            let code = unsafe {
                sys::cuLaunchKernel(
                    function.0,
                    it.grid,
                    1,
                    1,
                    THREADS,
                    1,
                    1,
                    0,
                    stream.raw().cast(),
                    places.as_mut_ptr(),
                    null_mut(),
                )
            };
            check("cuLaunchKernel", code).map_err(|_| Error::Launch {
                kernel: it.kernel.clone(),
                text: text(code),
            })
        })
    }

    /// Copies bytes to the device. They may be dropped at once.
    pub(crate) fn upload(&self, bytes: &[u8], to: u64, stream: &Stream) -> Result<()> {
        self.within(|| {
            // SAFETY: pageable memory is copied aside before the call returns; `to` has as many bytes, which the caller has checked.
            let code = unsafe {
                sys::cuMemcpyHtoDAsync_v2(
                    to,
                    bytes.as_ptr().cast(),
                    bytes.len(),
                    stream.raw().cast(),
                )
            };
            check("cuMemcpyHtoDAsync", code)
        })
    }

    /// Copies on the device.
    pub(crate) fn copy(&self, from: &Memory<'_>, to: &Memory<'_>, stream: &Stream) -> Result<()> {
        let (at, bytes) = (to.holds("the copy", from.bytes(), 1)?, from.bytes());
        self.within(|| {
            // SAFETY: both are as long.
            let code = unsafe {
                sys::cuMemcpyDtoDAsync_v2(at, from.address(), bytes, stream.raw().cast())
            };
            check("cuMemcpyDtoDAsync", code)
        })
    }

    /// The address of so many new bytes, more than none, whose pages move between the device and main memory.
    pub(crate) fn managed(&self, bytes: usize) -> Result<u64> {
        if !self.evicts {
            return Err(Error::Unmovable {
                ordinal: self.ordinal,
            });
        }
        self.within(|| {
            let mut address = 0;
            let global = sys::CUmemAttach_flags::CU_MEM_ATTACH_GLOBAL as u32;
            // SAFETY: writes one address.
            let code = unsafe { sys::cuMemAllocManaged(&mut address, bytes, global) };
            check("cuMemAllocManaged", code)?;
            Ok(address)
        })
    }

    /// Gives back what [`managed`](Self::managed) gave, once the device has done everything.
    pub(crate) fn free(&self, address: u64) -> Result<()> {
        self.within(|| {
            // SAFETY: an address that `managed` gave, for the caller frees it once. The driver waits for kernels that use it.
            check("cuMemFree", unsafe { sys::cuMemFree_v2(address) })
        })
    }

    /// Waits until the stream has done everything.
    pub(crate) fn wait(&self, stream: &Stream) -> Result<()> {
        self.within(|| {
            // SAFETY: a stream that is alive.
            let code = unsafe { sys::cuStreamSynchronize(stream.raw().cast()) };
            check("cuStreamSynchronize", code)
        })
    }

    /// How long the device takes for what `body` puts on the stream.
    pub(crate) fn time(
        &self,
        stream: &Stream,
        body: impl FnOnce() -> Result<()>,
    ) -> Result<Duration> {
        let (begin, end) = (self.event()?, self.event()?);
        self.record(&begin, stream)?;
        body()?;
        self.record(&end, stream)?;
        self.within(|| {
            let mut milliseconds = 0.0;
            // SAFETY: both are recorded; writes one number.
            unsafe {
                check("cuEventSynchronize", sys::cuEventSynchronize(end.0))?;
                let code = sys::cuEventElapsedTime(&mut milliseconds, begin.0, end.0);
                check("cuEventElapsedTime", code)?;
            }
            Ok(Duration::from_secs_f32(milliseconds.max(0.0) / 1e3))
        })
    }

    fn event(&self) -> Result<Event> {
        self.within(|| {
            let mut event = null_mut();
            // SAFETY: writes one handle.
            check("cuEventCreate", unsafe {
                sys::cuEventCreate(&mut event, 0)
            })?;
            Ok(Event(event))
        })
    }

    fn record(&self, event: &Event, stream: &Stream) -> Result<()> {
        self.within(|| {
            // SAFETY: both are alive and of this device.
            let code = unsafe { sys::cuEventRecord(event.0, stream.raw().cast()) };
            check("cuEventRecord", code)
        })
    }
}

impl Module {
    /// A kernel by its name, looked for once. Its device's context is current.
    fn function(&self, name: &str) -> Result<Function> {
        let mut functions = self
            .functions
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(function) = functions.get(name) {
            return Ok(*function);
        }
        let text = CString::new(name).expect("a kernel's name without NUL");
        let mut handle = null_mut();
        // SAFETY: a module that is loaded for good; writes one handle.
        let code = unsafe { sys::cuModuleGetFunction(&mut handle, self.handle, text.as_ptr()) };
        check("cuModuleGetFunction", code).map_err(|_| Error::Launch {
            kernel: name.to_owned(),
            text: self::text(code),
        })?;
        functions.insert(name.to_owned(), Function(handle));
        Ok(Function(handle))
    }
}

/// Makes the context that was before the thread's again.
struct Pop;

impl Drop for Pop {
    fn drop(&mut self) {
        let mut context = null_mut();
        // SAFETY: one was pushed. It cannot fail but by a driver that is shutting down.
        let _ = unsafe { sys::cuCtxPopCurrent_v2(&mut context) };
    }
}

struct Event(CUevent);

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: alive until here.
        let _ = unsafe { sys::cuEventDestroy_v2(self.0) };
    }
}
