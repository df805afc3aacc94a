//! Where things lie, in one place.
//!
//! The repository is found from this crate's own folder, so every task works from any folder of the clone.

use std::path::{Path, PathBuf};

/// The root of the repository.
pub(crate) fn root() -> PathBuf {
    // Cargo sets the variable for `cargo run`; the fallback is for a debugger that starts the program itself.
    let here = std::env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    here.parent().map_or(here.clone(), Path::to_path_buf)
}

/// `target/`: whatever was fetched or made, and nothing that cannot be fetched or made again.
///
/// Not `CARGO_TARGET_DIR`: the paths in `.cargo/config.toml` are relative to the repository.
pub(crate) fn target() -> PathBuf {
    root().join("target")
}

/// Where cargo puts what it builds: `target/`, or what `CARGO_TARGET_DIR` says.
pub(crate) fn cargo_target() -> PathBuf {
    // <target>/debug/xtask
    let program = std::env::current_exe().ok();
    program
        .as_deref()
        .and_then(Path::parent)
        .and_then(Path::parent)
        .map_or_else(target, Path::to_path_buf)
}

/// The `peft` program of a profile's folder (`debug`, `release`).
pub(crate) fn peft(folder: &str) -> PathBuf {
    cargo_target().join(folder).join("peft")
}

/// libtorch, or a folder of links to one.
pub(crate) fn libtorch() -> PathBuf {
    target().join("libtorch")
}

/// Python with the reference stack, if it was made.
pub(crate) fn python() -> PathBuf {
    target().join("python/bin/python")
}

/// `path` as a person in the repository's root would type it.
pub(crate) fn short(path: &Path) -> String {
    path.strip_prefix(root())
        .unwrap_or(path)
        .display()
        .to_string()
}
