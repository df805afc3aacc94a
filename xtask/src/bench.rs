//! `cargo xtask bench`: how fast, and beside Python how much faster.
//!
//! Alone it runs the criterion benches of the kernels. With `--python` it runs whole jobs, ours and Python's in
//! turn on the same machine in the same minutes, because times drift from one machine and hour to the next;
//! raw results go to `benches/results`.

use crate::{libtorch, paths, python, run};
use anyhow::Result;
use std::process::Command;

/// Flags of `cargo xtask bench`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Whole jobs beside Python's torch, transformers and peft (fetched into target/python: 4 GB)
    #[arg(long)]
    python: bool,
    /// Fewer repetitions: a glance, not a result
    #[arg(long)]
    quick: bool,
    /// Which benches, by a part of their name
    #[arg(last = true, value_name = "FILTER")]
    filter: Vec<String>,
}

/// `cargo xtask bench`.
pub(crate) fn bench(args: &Args) -> Result<()> {
    libtorch::ensure()?;
    if args.python {
        beside_python(args)
    } else {
        kernels(args)
    }
}

fn kernels(args: &Args) -> Result<()> {
    // The development profile is optimised; another would compile the bindings once more.
    let mut bench = run::cargo(&["bench", "--package", "benches", "--profile", "dev", "--"]);
    if args.quick {
        bench.arg("--quick");
    }
    run::run(bench.args(&args.filter))
}

fn beside_python(args: &Args) -> Result<()> {
    let python = python::ensure()?;
    run::run(&mut run::build("jobs"))?;
    let mut compare = Command::new(python);
    compare.current_dir(paths::root()).arg("benches/compare.py");
    if args.quick {
        compare.args(["--rounds", "1", "--steps", "3"]);
    }
    if let Some(part) = args.filter.first() {
        compare.args(["--only", part]);
    }
    run::run(&mut compare)
}
