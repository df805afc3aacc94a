//! `cargo xtask gpu-check`: every kernel for CUDA on the GPU of this machine.
//!
//! The work is a program of its own (`benches/src/bin/gpu-check.rs`): it is built here and may be run elsewhere, beside libtorch's two
//! halves and with nothing else of this repository.

use crate::{libtorch, paths, run};
use anyhow::Result;
use std::process::Command;

/// `cargo xtask gpu-check`.
pub(crate) fn gpu_check() -> Result<()> {
    libtorch::ensure()?;
    run::run(&mut run::build("gpu-check"))?;
    run::run(&mut Command::new(
        paths::cargo_target().join("debug").join("gpu-check"),
    ))
}
