//! NVRTC: NVIDIA's compiler as a library, loaded when it is wanted.
//!
//! Packages of libtorch for CUDA bring it, under names and in folders of their own; so it is looked for beside `libtorch_cuda.so` first,
//! and the loader is given a path and not a name.

use std::{
    ffi::{CStr, CString, c_char, c_int, c_void},
    fmt,
    path::{Path, PathBuf},
    ptr::null,
    sync::OnceLock,
};

use libloading::Library;

use crate::{
    error::{Error, Result},
    kernels::Source,
};

/// What every kernel is compiled with: as it is written, each operation rounded by itself.
pub(crate) const OPTIONS: [&CStr; 5] = [
    c"--std=c++17",
    c"--fmad=false",
    c"--ftz=false",
    c"--prec-div=true",
    c"--prec-sqrt=true",
];

/// For which GPUs: by compute capability, 90 being 9.0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Target {
    /// Those of one; an image.
    Machine(u32),
    /// Those from one on; text that the driver compiles.
    Portable(u32),
}

impl fmt::Display for Target {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Target::Machine(arch) => write!(to, "sm_{arch}"),
            Target::Portable(arch) => write!(to, "compute_{arch}"),
        }
    }
}

/// What to compile for a GPU: its own code, or the latest that an older compiler knows.
pub(crate) fn target(arch: u32) -> Result<Target> {
    Ok(choose(arch, &nvrtc()?.architectures()))
}

fn choose(arch: u32, known: &[u32]) -> Target {
    if known.contains(&arch) {
        return Target::Machine(arch);
    }
    let older = known.iter().copied().filter(|it| *it <= arch).max();
    older.map_or(Target::Machine(arch), Target::Portable) // the compiler will say what it thinks of it
}

/// Compiles a file of kernels.
pub(crate) fn compile(source: Source, target: Target) -> Result<Vec<u8>> {
    let nvrtc = nvrtc()?;
    let error = |log: String| Error::Compile {
        source_file: source.file(),
        target: target.to_string(),
        log,
    };
    let text = CString::new(source.text()).expect("kernels without NUL");
    let name = CString::new(source.file()).expect("a name without NUL");
    let arch = CString::new(format!("--gpu-architecture={target}")).expect("without NUL");
    let program = Program::new(nvrtc, &text, &name).map_err(error)?;
    let options: Vec<&CStr> = OPTIONS.into_iter().chain([arch.as_c_str()]).collect();
    program.compile(&options).map_err(error)?;
    let image = match target {
        Target::Machine(_) => program.bytes(nvrtc.cubin_size, nvrtc.cubin),
        Target::Portable(_) => program.bytes(nvrtc.ptx_size, nvrtc.ptx),
    };
    image.map_err(error)
}

type Handle = *mut c_void;
type Size = unsafe extern "C" fn(Handle, *mut usize) -> c_int;
type Get = unsafe extern "C" fn(Handle, *mut c_char) -> c_int;
type Create = unsafe extern "C" fn(
    *mut Handle,
    *const c_char,
    *const c_char,
    c_int,
    *const *const c_char,
    *const *const c_char,
) -> c_int;

/// The functions that are used.
struct Nvrtc {
    create: Create,
    destroy: unsafe extern "C" fn(*mut Handle) -> c_int,
    compile: unsafe extern "C" fn(Handle, c_int, *const *const c_char) -> c_int,
    log_size: Size,
    log: Get,
    ptx_size: Size,
    ptx: Get,
    cubin_size: Size,
    cubin: Get,
    message: unsafe extern "C" fn(c_int) -> *const c_char,
    known: unsafe extern "C" fn(*mut c_int) -> c_int,
    all_known: unsafe extern "C" fn(*mut c_int) -> c_int,
}

/// The library, looked for once.
fn nvrtc() -> Result<&'static Nvrtc> {
    static FOUND: OnceLock<Result<Nvrtc, Vec<String>>> = OnceLock::new();
    let found = FOUND.get_or_init(|| {
        let mut looked = Vec::new();
        for place in places() {
            match open(&place) {
                Ok(nvrtc) => return Ok(nvrtc),
                Err(text) => looked.push(text),
            }
        }
        Err(looked)
    });
    found.as_ref().map_err(|looked| Error::NoNvrtc {
        looked: looked.clone(),
    })
}

fn open(path: &Path) -> Result<Nvrtc, String> {
    // SAFETY: NVIDIA's library; its constructors do nothing that concerns us. It stays loaded.
    let library = unsafe { Library::new(path) }.map_err(|error| error.to_string())?;
    let library: &'static Library = Box::leak(Box::new(library));
    macro_rules! get {
        ($name:literal) => {
            // SAFETY: the signatures of the fields are those of nvrtc.h, in every version since 11.2.
            *unsafe { library.get($name) }
                .map_err(|error| format!("{}: {error}", path.display()))?
        };
    }
    Ok(Nvrtc {
        create: get!(c"nvrtcCreateProgram"),
        destroy: get!(c"nvrtcDestroyProgram"),
        compile: get!(c"nvrtcCompileProgram"),
        log_size: get!(c"nvrtcGetProgramLogSize"),
        log: get!(c"nvrtcGetProgramLog"),
        ptx_size: get!(c"nvrtcGetPTXSize"),
        ptx: get!(c"nvrtcGetPTX"),
        cubin_size: get!(c"nvrtcGetCUBINSize"),
        cubin: get!(c"nvrtcGetCUBIN"),
        message: get!(c"nvrtcGetErrorString"),
        known: get!(c"nvrtcGetNumSupportedArchs"),
        all_known: get!(c"nvrtcGetSupportedArchs"),
    })
}

/// Where it may be, in this order; a name without a folder is looked for by the loader.
fn places() -> Vec<PathBuf> {
    if let Some(named) = std::env::var_os("PEFT_NVRTC") {
        return vec![named.into()];
    }
    let mut places = Vec::new();
    if let Some(torch) = torch_folder() {
        places.extend(libraries(&torch));
        // In a Python environment: site-packages/torch/lib and site-packages/nvidia/*/lib.
        let packages = torch.join("../../nvidia");
        let folders = std::fs::read_dir(packages).into_iter().flatten().flatten();
        places.extend(folders.flat_map(|it| libraries(&it.path().join("lib"))));
    }
    let names = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"];
    places.extend(names.map(PathBuf::from));
    places.extend(libraries(Path::new("/usr/local/cuda/lib64")));
    places
}

/// The compilers in a folder, whatever hash or version their names hold.
fn libraries(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> = entries
        .filter(|it| is_compiler(&it.file_name().to_string_lossy()))
        .map(|it| it.path())
        .collect();
    found.sort();
    found
}

fn is_compiler(name: &str) -> bool {
    let other = ["builtins", ".alt."];
    name.starts_with("libnvrtc")
        && name.contains(".so")
        && !other.iter().any(|it| name.contains(it))
}

/// The folder of the CUDA half of libtorch, if it is loaded.
fn torch_folder() -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let line = maps
        .lines()
        .find(|line| line.ends_with("/libtorch_cuda.so"))?;
    let path = &line[line.find('/')?..];
    Path::new(path).parent().map(Path::to_owned)
}

impl Nvrtc {
    /// What it compiles for.
    fn architectures(&self) -> Vec<u32> {
        let mut count = 0;
        // SAFETY: writes one number.
        if unsafe { (self.known)(&mut count) } != 0 {
            return Vec::new();
        }
        let mut all = vec![0; count.max(0) as usize];
        // SAFETY: writes as many numbers as it said.
        match unsafe { (self.all_known)(all.as_mut_ptr()) } {
            0 => all
                .into_iter()
                .filter_map(|it| it.try_into().ok())
                .collect(),
            _ => Vec::new(),
        }
    }

    fn check(&self, code: c_int) -> Result<(), String> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: gives a string that stays.
        let text = unsafe { CStr::from_ptr((self.message)(code)) };
        Err(text.to_string_lossy().into_owned())
    }
}

/// A program in the compiler.
struct Program<'a> {
    nvrtc: &'a Nvrtc,
    handle: Handle,
}

impl<'a> Program<'a> {
    fn new(nvrtc: &'a Nvrtc, text: &CStr, name: &CStr) -> Result<Program<'a>, String> {
        let mut handle = std::ptr::null_mut();
        // SAFETY: two strings, which it copies, and no headers.
        let code =
            unsafe { (nvrtc.create)(&mut handle, text.as_ptr(), name.as_ptr(), 0, null(), null()) };
        nvrtc.check(code)?;
        Ok(Program { nvrtc, handle })
    }

    fn compile(&self, options: &[&CStr]) -> Result<(), String> {
        let options: Vec<*const c_char> = options.iter().map(|it| it.as_ptr()).collect();
        // SAFETY: a program that is alive, and as many strings as it is told.
        let code =
            unsafe { (self.nvrtc.compile)(self.handle, options.len() as c_int, options.as_ptr()) };
        self.nvrtc.check(code).map_err(|text| {
            let log = self.bytes(self.nvrtc.log_size, self.nvrtc.log);
            let log = String::from_utf8_lossy(&log.unwrap_or_default())
                .trim_end_matches('\0')
                .trim()
                .to_owned();
            format!("{text}\n{log}")
        })
    }

    /// What was made: asked for its size first.
    fn bytes(&self, size: Size, get: Get) -> Result<Vec<u8>, String> {
        let mut len = 0;
        // SAFETY: a program that is alive; writes one number.
        let code = unsafe { size(self.handle, &mut len) };
        self.nvrtc.check(code)?;
        let mut bytes = vec![0u8; len];
        // SAFETY: writes as many bytes as it said.
        let code = unsafe { get(self.handle, bytes.as_mut_ptr().cast()) };
        self.nvrtc.check(code)?;
        Ok(bytes)
    }
}

impl Drop for Program<'_> {
    fn drop(&mut self) {
        // SAFETY: alive until here. What it returns concerns nobody any more.
        let _ = unsafe { (self.nvrtc.destroy)(&mut self.handle) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_compiles() {
        match nvrtc() {
            Ok(nvrtc) => println!("NVRTC for {:?}", nvrtc.architectures()),
            Err(error) => {
                eprintln!(
                    "skipped: no NVRTC ({error}). `pip install --target /tmp/nvrtc nvidia-cuda-nvrtc`, then set PEFT_NVRTC to its libnvrtc.so.13"
                );
                return;
            }
        }
        for target in [
            Target::Portable(75),
            Target::Machine(80),
            Target::Machine(90),
            Target::Portable(90),
        ] {
            for source in Source::ALL {
                let begin = std::time::Instant::now();
                let image = compile(source, target).unwrap_or_else(|error| panic!("{error}"));
                println!(
                    "{} for {target}: {} bytes in {:.1?}",
                    source.file(),
                    image.len(),
                    begin.elapsed()
                );
                for kernel in crate::tests::kernels(source) {
                    let name = kernel.as_bytes();
                    let there = image.windows(name.len()).any(|it| it == name);
                    assert!(there, "{kernel} for {target}");
                }
                if let Ok(folder) = std::env::var("PEFT_CUDA_KEEP") {
                    let path = Path::new(&folder).join(format!("{}.{target}", source.file()));
                    std::fs::write(path, &image).unwrap();
                }
            }
        }
    }

    #[test]
    fn a_gpu_that_the_compiler_does_not_know_gets_older_code() {
        let known = [75, 80, 90];
        assert_eq!(choose(80, &known), Target::Machine(80));
        assert_eq!(choose(86, &known), Target::Portable(80));
        assert_eq!(choose(120, &known), Target::Portable(90));
        assert_eq!(choose(70, &known), Target::Machine(70));
    }

    #[test]
    fn the_compiler_is_told_from_its_neighbours() {
        assert!(is_compiler("libnvrtc.so.13") && is_compiler("libnvrtc-b51b459d.so.12"));
        assert!(!is_compiler("libnvrtc-builtins.so.13.0") && !is_compiler("libnvrtc.alt.so.12"));
    }
}
