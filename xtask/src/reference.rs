//! `cargo xtask fixtures` and `cargo xtask interop`: Python's numbers and Python's files.
//!
//! The fixtures are committed, so tests never need Python. These two tasks do: one remakes the fixtures, or
//! checks that remaking them gives what is committed; the other lets Python read what we write and us what
//! Python writes, and compares the numbers.

use crate::{files, libtorch, model, paths, python, run, ui};
use anyhow::{Context, Result};
use std::path::Path;
use std::process::Command;

/// Flags of `cargo xtask fixtures`.
#[derive(clap::Args)]
pub(crate) struct FixturesArgs {
    /// Change nothing: remake them elsewhere and compare
    #[arg(long)]
    check: bool,
    /// Only the fixtures whose path starts so, as in `lora/gpt2`
    #[arg(long, value_name = "PREFIX")]
    only: Option<String>,
}

/// Flags of `cargo xtask interop`.
#[derive(clap::Args)]
pub(crate) struct InteropArgs {
    /// More flags for `fixtures/interop.py`
    #[arg(last = true, value_name = "FLAGS")]
    flags: Vec<String>,
}

/// `cargo xtask fixtures`.
pub(crate) fn fixtures(args: &FixturesArgs) -> Result<()> {
    let python = python::ensure()?;
    let committed = paths::root().join("fixtures");
    if !args.check {
        return make(&python, &committed, args);
    }
    let fresh = tempfile::tempdir_in(paths::target()).context("cannot write into `target`")?;
    if args.only.is_some() {
        // Adapters are made over the models that lie beside them.
        files::copy_tree(&committed.join("models"), &fresh.path().join("models"))?;
    }
    make(&python, fresh.path(), args)?;
    let mut compare = script(&python, "xtask/python/compare.py");
    compare.arg(&committed).arg(fresh.path());
    run::run(&mut compare).map_err(|_| {
        ui::problem(
            "remaking the fixtures gives other numbers than the committed ones",
            "if the change is meant, `cargo xtask fixtures` writes them; look at the difference before you commit it",
        )
    })
}

fn make(python: &Path, out: &Path, args: &FixturesArgs) -> Result<()> {
    let mut make = script(python, "fixtures/make.py");
    make.arg("--out").arg(out);
    if model::is_ready() {
        make.arg("--smollm2").arg(model::folder());
    }
    if model::encoder_is_ready() {
        make.arg("--minilm").arg(model::encoder_folder());
    }
    if let Some(prefix) = &args.only {
        make.args(["--only", prefix]);
    }
    run::run(&mut make)
}

/// `cargo xtask interop`.
pub(crate) fn interop(args: &InteropArgs) -> Result<()> {
    libtorch::ensure()?;
    let python = python::ensure()?;
    run::build_peft()?;
    let mut interop = script(&python, "fixtures/interop.py");
    interop.arg("--peft").arg(paths::peft("debug"));
    run::run(interop.args(&args.flags))
}

fn script(python: &Path, path: &str) -> Command {
    let mut command = Command::new(python);
    command.arg(path).current_dir(paths::root());
    command
}
