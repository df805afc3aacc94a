//! `cargo xtask`: everything one does to this workspace that is more than one cargo command.
//!
//! ```text
//! cargo xtask demo     from a fresh clone to a fine-tuned model
//! cargo xtask test     fetch what is missing, run every test
//! ```
//!
//! Rust instead of shell scripts, so that it runs where cargo runs and is checked like the rest; without
//! libtorch, so that it builds in seconds and can be the one who fetches libtorch. Each file here is one
//! job. All that is fetched or made lies in `target/`: deleting that folder is the way back to a fresh clone.

mod bench;
mod check;
mod demo;
mod dist;
mod files;
mod gpu_check;
mod libtorch;
mod model;
mod new_method;
mod paths;
mod python;
mod readme;
mod real;
mod reference;
mod run;
mod tidy;
mod ui;
mod wheel;

use anyhow::Result;
use clap::{CommandFactory, Parser, Subcommand};

/// Set-up, demo, tests and house-keeping
#[derive(Parser)]
#[command(
    name = "cargo xtask",
    bin_name = "cargo xtask",
    disable_version_flag = true
)]
struct Args {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Fine-tune a small language model, from nothing, in one command
    Demo(demo::Args),
    /// Fetch what is missing, then run every test
    Test(check::TestArgs),
    /// Put libtorch into target/libtorch, so that plain cargo commands work
    Setup(libtorch::Args),
    /// Make an archive with the program and its libtorch, for machines without Rust or Python
    Dist(dist::Args),
    /// Run the benchmarks; with --python beside Python's `peft`
    Bench(bench::Args),
    /// Compare every kernel for CUDA with the processor's results, and time it, on this machine's GPU
    GpuCheck,
    /// Train every method on real models and text, ours beside Python's, and make the table of it
    Real(real::Args),
    /// Remake the committed test fixtures with Python's `peft`
    Fixtures(reference::FixturesArgs),
    /// Exchange files with Python's `peft` both ways and compare the numbers
    Interop(reference::InteropArgs),
    /// Start a new method: a crate that compiles and obeys the laws
    NewMethod(new_method::Args),
    /// Check what of the house rules a program can check
    Tidy(tidy::Args),
    /// All that must pass before a change goes in: format, lints, docs, tidy, tests
    Ci,
}

fn main() {
    let task = Args::parse().task;
    if let Err(error) = run(task) {
        ui::fail(&error);
        std::process::exit(1);
    }
}

fn run(task: Task) -> Result<()> {
    match task {
        Task::Demo(args) => demo::demo(&args),
        Task::Test(args) => check::test(&args),
        Task::Setup(args) => libtorch::setup(&args),
        Task::Dist(args) => dist::dist(&args),
        Task::Bench(args) => bench::bench(&args),
        Task::GpuCheck => gpu_check::gpu_check(),
        Task::Real(args) => real::real(&args),
        Task::Fixtures(args) => reference::fixtures(&args),
        Task::Interop(args) => reference::interop(&args),
        Task::NewMethod(args) => new_method::new_method(&args),
        Task::Tidy(args) => tidy::tidy(&args),
        Task::Ci => check::ci(),
    }
}

/// The tasks and their one-line descriptions, for the README.
fn tasks() -> Vec<(String, String)> {
    let about = |task: &clap::Command| task.get_about().map(ToString::to_string);
    Args::command()
        .get_subcommands()
        .map(|task| (task.get_name().to_owned(), about(task).unwrap_or_default()))
        .collect()
}
