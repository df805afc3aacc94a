//! `cargo xtask setup`: libtorch in `target/libtorch`, where `.cargo/config.toml` looks for it.
//!
//! Three sources, in this order: the folder in `LIBTORCH`; the torch of the active Python environment; pinned
//! wheels. The first two are not copied: `target/libtorch` becomes a folder of links to them, so that plain
//! cargo commands, tests and programs find it without any variable.
//!
//! From the wheels only the CPU half is kept (half a gigabyte of 1.2), and the program is never linked with
//! more than that, whatever the source: no link to `libtorch_cuda` is made, because the bindings would then
//! link it. One binary serves CPU and CUDA; it follows the link of `libtorch_cpu.so` to the real folder and
//! loads the CUDA half from there if there is one.
//!
//! `target/libtorch` is built beside its place and renamed into it with a stamp inside: it is either whole
//! or not there, and a second call only reads the stamp.

use crate::{paths, run, ui, wheel::Wheel, wheel::need_space, wheel::remove_leftovers};
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The only version that fits: the bindings speak to its C++ interface.
pub(crate) const VERSION: &str = "2.11.0";

/// Flags of `cargo xtask setup`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Make target/libtorch anew: after switching the Python environment, or if in doubt
    #[arg(long)]
    force: bool,
}

/// `cargo xtask setup`.
pub(crate) fn setup(args: &Args) -> Result<()> {
    if args.force {
        forget()?;
    }
    ensure()?;
    let stamp = read_stamp().context("the set-up left no stamp")?;
    println!(
        "libtorch {} is ready in target/libtorch ({})",
        stamp.torch, stamp.source
    );
    println!(
        "{}",
        ui::dim("cargo build, cargo test and cargo run -p peft-cli work as they are")
    );
    Ok(())
}

/// What lies in `target/libtorch`, written there last.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Stamp {
    torch: String,
    /// "pinned wheels", or the folder that is linked to.
    source: String,
    /// The environment variables that led to this source.
    libtorch: Option<PathBuf>,
    environment: Option<PathBuf>,
}

/// Makes `target/libtorch` ready; at once if it is.
pub(crate) fn ensure() -> Result<()> {
    if is_ready() {
        return follow_target_dir();
    }
    fs::create_dir_all(paths::target()).context("at `target`")?;
    let lock = File::create(paths::target().join(".setup.lock")).context("at `target`")?;
    lock.lock().context("cannot lock `target/.setup.lock`")?;
    // Another call may have done it while this one waited.
    if !is_ready() {
        remove_leftovers(&paths::target(), PARTIAL)?;
        match find()? {
            Some(found) => link(&found)?,
            None => unpack()?,
        }
    }
    follow_target_dir()
}

/// Whether `target/libtorch` is whole and from the source that the environment now asks for.
fn is_ready() -> bool {
    let Some(stamp) = read_stamp() else {
        return false;
    };
    let wanted = stamp.torch == VERSION && given().is_none_or(|path| stamp.libtorch == Some(path));
    // A link that leads nowhere does not exist: its Python environment was removed.
    wanted && !new_environment(&stamp) && paths::libtorch().join("lib").join(CPU).exists()
}

/// Whether an environment with a torch was activated since.
fn new_environment(stamp: &Stamp) -> bool {
    let Some(active) = environment().filter(|_| given().is_none()) else {
        return false;
    };
    stamp.environment.as_ref() != Some(&active) && has_torch(&active)
}

fn has_torch(environment: &Path) -> bool {
    let libraries = fs::read_dir(environment.join("lib"))
        .into_iter()
        .flatten()
        .flatten();
    libraries
        .into_iter()
        .any(|python| python.path().join("site-packages/torch").is_dir())
}

fn read_stamp() -> Option<Stamp> {
    let text = fs::read_to_string(paths::libtorch().join(STAMP)).ok()?;
    serde_json::from_str(&text).ok()
}

fn forget() -> Result<()> {
    match fs::remove_file(paths::libtorch().join(STAMP)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).context("at `target/libtorch`")
        }
        _ => Ok(()),
    }
}

/// The user's `LIBTORCH`, as opposed to the one that `.cargo/config.toml` sets.
fn given() -> Option<PathBuf> {
    let path = PathBuf::from(std::env::var_os("LIBTORCH")?);
    let ours = paths::libtorch();
    (!path.as_os_str().is_empty() && path != ours && absolute(&path) != absolute(&ours))
        .then_some(path)
}

fn absolute(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| path.to_path_buf())
}

/// The active Python environment.
fn environment() -> Option<PathBuf> {
    let variables = ["VIRTUAL_ENV", "CONDA_PREFIX"];
    let active = variables
        .into_iter()
        .find_map(std::env::var_os)
        .map(PathBuf::from);
    active.filter(|path| !path.as_os_str().is_empty())
}

/// A libtorch that is on this machine already.
struct Found {
    root: PathBuf,
    version: String,
    libtorch: Option<PathBuf>,
}

/// Looks for one; an unusable `LIBTORCH` is an error, an unusable Python torch only a remark.
fn find() -> Result<Option<Found>> {
    if let Some(root) = given() {
        let next = "unset LIBTORCH to let this command fetch the right one, or point it at a libtorch 2.11.0";
        let version = version_of(&root).map_err(|error| {
            ui::problem(format!("LIBTORCH is `{}`: {error}", root.display()), next)
        })?;
        if version != VERSION {
            let what = format!(
                "LIBTORCH is `{}`, which is version {version}, not {VERSION}",
                root.display()
            );
            return Err(ui::problem(what, next));
        }
        return Ok(Some(Found {
            root: absolute(&root),
            version,
            libtorch: Some(root),
        }));
    }
    let Some(root) = torch_of_python() else {
        return Ok(None);
    };
    match version_of(&root) {
        Ok(version) if version == VERSION => Ok(Some(Found {
            root,
            version,
            libtorch: None,
        })),
        Ok(version) => {
            ui::say(format!(
                "the torch of the active Python is {version}, not {VERSION}: left alone"
            ));
            Ok(None)
        }
        Err(error) => {
            ui::say(format!(
                "the torch of the active Python is not usable: {error}"
            ));
            Ok(None)
        }
    }
}

/// The folder of the `torch` package that the active Python would import; finding is not importing.
fn torch_of_python() -> Option<PathBuf> {
    let find = "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')";
    let python = environment().map_or("python3".into(), |env| env.join("bin/python3"));
    let folder = run::output(Command::new(python).args(["-c", find])).ok()?;
    let folder = folder.trim();
    (!folder.is_empty()).then(|| absolute(Path::new(folder)))
}

/// The version of the libtorch in `root`, from its headers: they are what we compile against.
fn version_of(root: &Path) -> Result<String> {
    let header = root.join("include/torch/headeronly/version.h");
    if !root.join("lib").join(CPU).exists() {
        bail!("there is no `lib/{CPU}` in `{}`", root.display());
    }
    let text = match fs::read_to_string(&header) {
        Ok(text) => text,
        // Before 2.9 it lay elsewhere.
        Err(_) => fs::read_to_string(root.join("include/torch/csrc/api/include/torch/version.h"))
            .with_context(|| {
            format!(
                "there is no `include/torch/headeronly/version.h` in `{}`",
                root.display()
            )
        })?,
    };
    let quoted = text
        .split_once("define TORCH_VERSION \\")
        .and_then(|(_, rest)| rest.split('"').nth(1));
    quoted
        .map(ToOwned::to_owned)
        .with_context(|| format!("`{}` names no version", header.display()))
}

/// Makes `target/libtorch` a folder of links to `found`.
fn link(found: &Found) -> Result<()> {
    ui::say(format!(
        "using libtorch {} in `{}`",
        found.version,
        found.root.display()
    ));
    let fresh = fresh_folder()?;
    let lib = fresh.path().join("lib");
    fs::create_dir(&lib)?;
    symlink(&found.root.join("include"), &fresh.path().join("include"))?;
    let libraries = found.root.join("lib");
    for entry in
        fs::read_dir(&libraries).with_context(|| format!("at `{}`", libraries.display()))?
    {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if is_cpu_library(&name) {
            symlink(&libraries.join(&name), &lib.join(&name))?;
        }
    }
    // In a Python environment the CUDA runtime, which the CPU half needs to load, lies in a package of its own.
    for name in CUDA_RUNTIME {
        let beside = found.root.join("../nvidia/cu13/lib").join(name);
        if beside.exists() && !lib.join(name).exists() {
            symlink(&absolute(&beside), &lib.join(name))?;
        }
    }
    write_linker_names(&lib)?;
    check_loads(&lib)?;
    if found.libtorch.is_some() {
        ui::say(
            "from now on LIBTORCH need not be set: plain cargo commands find it through target/libtorch",
        );
    }
    finish(
        fresh,
        &found.version,
        &found.root.display().to_string(),
        found.libtorch.clone(),
    )
}

/// Whether a file of a foreign `lib` folder belongs to the half that we link with.
fn is_cpu_library(name: &str) -> bool {
    let library = name.contains(".so") || name.ends_with(".dylib");
    let other = [
        "cuda.",
        "cuda_",
        "_python",
        "nvshmem",
        "nvrtc",
        "hip",
        "global_deps",
        "shm",
    ];
    library
        && name != "libtorch.so"
        && (CUDA_RUNTIME.contains(&name) || !other.iter().any(|part| name.contains(part)))
}

/// Fetches the pinned wheels and keeps what is needed of them.
fn unpack() -> Result<()> {
    let pins = pins()?;
    ui::say(format!(
        "libtorch {VERSION} is not here yet: fetching its pinned wheels, once"
    ));
    let downloads: u64 = pins.iter().map(Wheel::space).sum();
    need_space(&paths::target(), downloads + UNPACKED, "libtorch")?;
    // The small ones first: what is wrong with the network shows at once.
    let fetched = pins.iter().map(Wheel::fetch).collect::<Result<Vec<_>>>()?;
    ui::say("unpacking");
    let fresh = fresh_folder()?;
    for (wheel, pin) in fetched.iter().zip(pins) {
        wheel.unpack(fresh.path(), |name| place(pin.package, name))?;
    }
    let lib = fresh.path().join("lib");
    for name in libraries() {
        if !lib.join(name).exists() {
            bail!("the wheels hold no `{name}`");
        }
    }
    write_linker_names(&lib)?;
    finish(fresh, VERSION, "pinned wheels", None)?;
    fetched.into_iter().try_for_each(|wheel| wheel.done())
}

/// Where a file of a wheel goes below `target/libtorch`, if it is wanted.
fn place(package: &str, name: &str) -> Option<PathBuf> {
    if let Some(header) = name.strip_prefix("torch/include/") {
        return Some(Path::new("include").join(header));
    }
    if let Some((_, licence)) = name.split_once(".dist-info/licenses/") {
        let package = package.split("==").next().unwrap_or(package);
        return Some(Path::new("licenses").join(package).join(licence));
    }
    let library = name
        .strip_prefix("torch/lib/")
        .or_else(|| name.strip_prefix("nvidia/cu13/lib/"))?;
    libraries()
        .contains(&library)
        .then(|| Path::new("lib").join(library))
}

/// What unpacked wheels take, with some room.
const UNPACKED: u64 = 600_000_000;

/// Writes the names under which the linker asks for what has other names here.
fn write_linker_names(lib: &Path) -> Result<()> {
    if cfg!(target_os = "macos") {
        return Ok(());
    }
    fs::write(lib.join("libtorch.so"), LINKER_SCRIPT)
        .context("at `target/libtorch/lib/libtorch.so`")?;
    // libtorch's own libgomp, whose name holds a hash in some packagings: two of them in one process disagree.
    let gomp = fs::read_dir(lib)?
        .flatten()
        .map(|entry| entry.file_name())
        .find(|name| {
            let name = name.to_string_lossy();
            name.starts_with("libgomp") && name.contains(".so.")
        });
    match gomp {
        Some(gomp) if !lib.join("libgomp.so").exists() => {
            symlink(Path::new(&gomp), &lib.join("libgomp.so"))
        }
        _ => Ok(()),
    }
}

const LINKER_SCRIPT: &str =
    "/* GNU ld script: the CPU half of libtorch; a CUDA half is loaded at run time. */
INPUT(-ltorch_cpu -lc10)
";

/// Finds a missing library now, by name, rather than when the first program starts.
fn check_loads(lib: &Path) -> Result<()> {
    // Without `ldd` (macOS) the first program will tell.
    let Ok(list) = run::output(Command::new("ldd").arg(lib.join(CPU))) else {
        return Ok(());
    };
    let missing: Vec<_> = list
        .lines()
        .filter(|line| line.contains("not found"))
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(ui::problem(
        format!(
            "this libtorch needs {}, which is not beside it",
            missing.join(", ")
        ),
        "install torch with its dependencies there, or deactivate that environment and unset LIBTORCH\nto let this command fetch a complete one",
    ))
}

fn fresh_folder() -> Result<tempfile::TempDir> {
    let mut builder = tempfile::Builder::new();
    builder
        .prefix(PARTIAL)
        .tempdir_in(paths::target())
        .context("cannot write into `target`")
}

/// Stamps the folder and renames it into place.
fn finish(
    fresh: tempfile::TempDir,
    version: &str,
    source: &str,
    libtorch: Option<PathBuf>,
) -> Result<()> {
    let stamp = Stamp {
        torch: version.to_owned(),
        source: source.to_owned(),
        libtorch,
        environment: environment(),
    };
    fs::write(
        fresh.path().join(STAMP),
        serde_json::to_string_pretty(&stamp)?,
    )?;
    // A stamp that outlives a power cut while the libraries do not would be a lie. One call for ten
    // thousand headers; where `sync` knows no `-f` (macOS), only that guarantee is lost.
    let _ = Command::new("sync").arg("-f").arg(fresh.path()).output();
    let place = paths::libtorch();
    if place.symlink_metadata().is_ok() {
        let old = fresh_folder()?;
        fs::rename(&place, old.path().join("libtorch"))
            .context("cannot move the old `target/libtorch` away")?;
    }
    fs::rename(fresh.keep(), &place).context("cannot rename the new folder to `target/libtorch`")
}

/// Programs look for libtorch beside the folder that they were built into; with `CARGO_TARGET_DIR` that is
/// elsewhere, so a link goes there.
fn follow_target_dir() -> Result<()> {
    let (ours, theirs) = (paths::libtorch(), paths::cargo_target().join("libtorch"));
    if absolute(&ours) != absolute(&theirs) {
        let _ = fs::remove_file(&theirs);
        symlink(&ours, &theirs)?;
    }
    Ok(())
}

fn symlink(to: &Path, at: &Path) -> Result<()> {
    std::os::unix::fs::symlink(to, at)
        .with_context(|| format!("cannot make the link `{}`", at.display()))
}

const PARTIAL: &str = ".libtorch-";
const STAMP: &str = ".stamp.json";
const CUDA_RUNTIME: [&str; 2] = ["libcudart.so.13", "libcupti.so.13"];
const CPU: &str = if cfg!(target_os = "macos") {
    "libtorch_cpu.dylib"
} else {
    "libtorch_cpu.so"
};

/// The libraries that a program needs to run, on this platform.
fn libraries() -> &'static [&'static str] {
    if cfg!(target_os = "macos") {
        &["libc10.dylib", "libomp.dylib", "libtorch.dylib", CPU]
    } else if cfg!(target_arch = "aarch64") {
        &[
            CPU,
            "libc10.so",
            "libgomp.so.1",
            "libcudart.so.13",
            "libcupti.so.13",
            "libarm_compute.so",
            "libarm_compute_graph.so",
            "libgfortran.so.5",
            "libnvpl_blas_core.so.0",
            "libnvpl_blas_lp64_gomp.so.0",
            "libnvpl_lapack_core.so.0",
            "libnvpl_lapack_lp64_gomp.so.0",
        ]
    } else {
        &[
            CPU,
            "libc10.so",
            "libgomp.so.1",
            "libcudart.so.13",
            "libcupti.so.13",
        ]
    }
}

/// The pinned wheels of this platform. Linux on x86-64 is what is tested.
fn pins() -> Result<&'static [Wheel]> {
    match (std::env::consts::OS, std::env::consts::ARCH) {
        ("linux", "x86_64") => Ok(&LINUX_X86_64),
        ("linux", "aarch64") => Ok(&LINUX_AARCH64),
        ("macos", "aarch64") => Ok(&MACOS_ARM64),
        (os, arch) => Err(ui::problem(
            format!("no libtorch {VERSION} is pinned for {os} on {arch}"),
            "set LIBTORCH to a libtorch 2.11.0 that was built for this machine",
        )),
    }
}

static LINUX_X86_64: [Wheel; 3] = [
    Wheel {
        package: "nvidia-cuda-runtime==13.0.96",
        file: "nvidia_cuda_runtime-13.0.96-py3-none-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
        sha256: "7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548",
        bytes: 2_243_632,
    },
    Wheel {
        package: "nvidia-cuda-cupti==13.0.85",
        file: "nvidia_cuda_cupti-13.0.85-py3-none-manylinux_2_25_x86_64.whl",
        sha256: "4eb01c08e859bf924d222250d2e8f8b8ff6d3db4721288cf35d14252a4d933c8",
        bytes: 10_715_597,
    },
    Wheel {
        package: "torch==2.11.0",
        file: "torch-2.11.0-cp311-cp311-manylinux_2_28_x86_64.whl",
        sha256: "7aa2f9bbc6d4595ba72138026b2074be1233186150e9292865e04b7a63b8c67a",
        bytes: 530_604_548,
    },
];

static LINUX_AARCH64: [Wheel; 3] = [
    Wheel {
        package: "nvidia-cuda-runtime==13.0.96",
        file: "nvidia_cuda_runtime-13.0.96-py3-none-manylinux2014_aarch64.manylinux_2_17_aarch64.whl",
        sha256: "ef9bcbe90493a2b9d810e43d249adb3d02e98dd30200d86607d8d02687c43f55",
        bytes: 2_261_060,
    },
    Wheel {
        package: "nvidia-cuda-cupti==13.0.85",
        file: "nvidia_cuda_cupti-13.0.85-py3-none-manylinux_2_25_aarch64.whl",
        sha256: "796bd679890ee55fb14a94629b698b6db54bcfd833d391d5e94017dd9d7d3151",
        bytes: 10_310_827,
    },
    Wheel {
        package: "torch==2.11.0",
        file: "torch-2.11.0-cp311-cp311-manylinux_2_28_aarch64.whl",
        sha256: "d91aac77f24082809d2c5a93f52a5f085032740a1ebc9252a7b052ef5a4fddc6",
        bytes: 419_718_178,
    },
];

static MACOS_ARM64: [Wheel; 1] = [Wheel {
    package: "torch==2.11.0",
    file: "torch-2.11.0-cp311-cp311-macosx_11_0_arm64.whl",
    sha256: "7b6a60d48062809f58595509c524b88e6ddec3ebe25833d6462eeab81e5f2ce4",
    bytes: 80_529_712,
}];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_cpu_half_is_kept() {
        let at = |name| place("torch==2.11.0", name);
        assert_eq!(
            at("torch/include/c10/util/Half.h"),
            Some("include/c10/util/Half.h".into())
        );
        assert_eq!(at("torch/lib/libc10.so"), Some("lib/libc10.so".into()));
        assert_eq!(at("torch/lib/libtorch_cuda.so"), None);
        assert_eq!(at("torch/nn/functional.py"), None);
        assert_eq!(
            at("torch-2.11.0.dist-info/licenses/LICENSE"),
            Some("licenses/torch/LICENSE".into())
        );
    }

    #[test]
    fn the_bindings_must_not_see_a_cuda_half() {
        let taken = [
            "libtorch_cpu.so",
            "libc10.so",
            "libgomp-24e2ab19.so.1",
            "libcudart.so.13",
            "libmkl_core.so.2",
        ];
        let left = [
            "libtorch_cuda.so",
            "libc10_cuda.so",
            "libtorch_cuda_linalg.so",
            "libtorch.so",
            "libtorch_python.so",
            "readme",
        ];
        assert!(taken.iter().all(|name| is_cpu_library(name)));
        assert!(!left.iter().any(|name| is_cpu_library(name)));
    }

    #[test]
    fn the_version_is_read_from_the_headers() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let root = folder.path();
        assert!(
            version_of(root)
                .unwrap_err()
                .to_string()
                .contains("libtorch_cpu")
        );
        fs::create_dir_all(root.join("lib"))?;
        fs::write(root.join("lib").join(CPU), "")?;
        fs::create_dir_all(root.join("include/torch/headeronly"))?;
        let header = root.join("include/torch/headeronly/version.h");
        fs::write(
            &header,
            "#define TORCH_VERSION_MAJOR 2\n#define TORCH_VERSION \\\n  \"2.11.0\"\n",
        )?;
        assert_eq!(version_of(root)?, "2.11.0");
        fs::write(&header, "")?;
        assert!(
            version_of(root)
                .unwrap_err()
                .to_string()
                .contains("names no version")
        );
        Ok(())
    }
}
