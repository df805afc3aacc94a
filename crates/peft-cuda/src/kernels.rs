//! The kernels: their text, and one of them with its arguments.
//!
//! What is launched is decided here and in the files beside, without a GPU: a [`Launch`] is a value, so that tests can run it elsewhere.

use std::{
    collections::HashMap,
    ffi::c_void,
    sync::{Mutex, PoisonError},
};

use crate::{
    cache,
    driver::{self, Device, Module},
    error::{Error, Result},
    nvrtc::{self, Target},
    stream::Stream,
};

/// Threads of a block, in every kernel.
pub(crate) const THREADS: u32 = 256;

/// A file of kernels, which is compiled when one of them is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Source {
    Dequantise,
    Multiply,
    Quantise,
    AdamW,
}

macro_rules! text {
    ($file:literal) => {
        concat!(
            include_str!("../kernels/numbers.cuh"),
            include_str!(concat!("../kernels/", $file))
        )
    };
}

impl Source {
    pub(crate) const ALL: [Source; 4] = [
        Source::Dequantise,
        Source::Multiply,
        Source::Quantise,
        Source::AdamW,
    ];

    pub(crate) fn file(self) -> &'static str {
        match self {
            Source::Dequantise => "dequantise.cu",
            Source::Multiply => "multiply.cu",
            Source::Quantise => "quantise.cu",
            Source::AdamW => "adamw.cu",
        }
    }

    pub(crate) fn text(self) -> &'static str {
        match self {
            Source::Dequantise => text!("dequantise.cu"),
            Source::Multiply => text!("multiply.cu"),
            Source::Quantise => text!("quantise.cu"),
            Source::AdamW => text!("adamw.cu"),
        }
    }
}

/// An argument of a kernel.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Arg {
    /// An address or a count.
    Long(u64),
    Word(u32),
    Float(f32),
    Table([f32; 16]),
}

impl Arg {
    /// Where its value lies.
    fn place(&self) -> *mut c_void {
        let place: *const c_void = match self {
            Arg::Long(it) => (&raw const *it).cast(),
            Arg::Word(it) => (&raw const *it).cast(),
            Arg::Float(it) => (&raw const *it).cast(),
            Arg::Table(it) => (&raw const *it).cast(),
        };
        place.cast_mut()
    }
}

/// A kernel and its arguments.
#[derive(Debug, Clone)]
pub(crate) struct Launch {
    pub(crate) source: Source,
    pub(crate) kernel: String,
    /// Blocks of [`THREADS`]. Every kernel does all of its work with any number of them.
    pub(crate) grid: u32,
    pub(crate) args: Vec<Arg>,
}

impl Launch {
    /// With a block for each so many `units` of work, but not more than `most`.
    pub(crate) fn of(
        source: Source,
        kernel: String,
        units: u64,
        each: u64,
        most: u64,
        args: Vec<Arg>,
    ) -> Launch {
        let grid = units.div_ceil(each).clamp(1, most.min(i32::MAX as u64)) as u32;
        Launch {
            source,
            kernel,
            grid,
            args,
        }
    }

    /// The places of the arguments, as the driver takes them.
    pub(crate) fn places(&self) -> Vec<*mut c_void> {
        self.args.iter().map(Arg::place).collect()
    }

    /// Puts it on the stream.
    pub(crate) fn run(&self, stream: &Stream) -> Result<()> {
        let device = driver::device(stream.device())?;
        let module = module(device, self.source)?;
        device.launch(module, self, stream)
    }
}

/// The kernels of a file, compiled and loaded: once a process and device.
fn module(device: &'static Device, source: Source) -> Result<&'static Module> {
    static LOADED: Mutex<Option<HashMap<(i32, Source), &'static Module>>> = Mutex::new(None);
    // Held while compiling, so that nobody compiles the same a second time.
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    let loaded = loaded.get_or_insert_default();
    let key = (device.ordinal(), source);
    if let Some(module) = loaded.get(&key) {
        return Ok(module);
    }
    let module: &Module = Box::leak(Box::new(load(device, source)?)); // for the rest of the process
    loaded.insert(key, module);
    Ok(module)
}

fn load(device: &Device, source: Source) -> Result<Module> {
    let kept = cache::Place::of(source, device.arch());
    if let Some(image) = kept.as_ref().and_then(cache::Place::read) {
        // What an older driver refuses is compiled anew.
        if let Ok(module) = device.load(&image) {
            return Ok(module);
        }
    }
    let target = nvrtc::target(device.arch())?;
    let image = nvrtc::compile(source, target)?;
    let module = device.load(&image)?;
    if let Some(place) = kept {
        place.write(&image);
    }
    Ok(module)
}

/// Compiles and loads all kernels, which else happens when each is first wanted.
pub fn prepare(device: i32) -> Result<()> {
    let device = driver::device(device)?;
    Source::ALL
        .into_iter()
        .try_for_each(|source| module(device, source).map(drop))
}

/// Compiles all kernels for GPUs of an architecture (90 is sm_90) and gives the bytes of each file's image. Needs no GPU.
pub fn compile(arch: u32) -> Result<Vec<(&'static str, usize)>> {
    let all = Source::ALL.into_iter();
    all.map(|source| {
        let image = nvrtc::compile(source, Target::Machine(arch))?;
        Ok((source.file(), image.len()))
    })
    .collect::<Result<_, Error>>()
}
