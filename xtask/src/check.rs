//! `cargo xtask test` and `cargo xtask ci`.
//!
//! `ci` is what must pass before a change goes in, from nothing: no step needs what a person would have had to
//! install, and the cheap ones come first. All of them share one profile, so that the bindings to libtorch are
//! compiled once.

use crate::{libtorch, model, paths, run, tidy, ui};
use anyhow::{Context, Result};
use std::process::Command;

/// Flags of `cargo xtask test`.
#[derive(clap::Args)]
pub(crate) struct TestArgs {
    /// Fetch no model and leave out doc tests
    #[arg(long)]
    quick: bool,
    /// Arguments for the test runner, such as the part of a test's name
    #[arg(last = true, value_name = "FILTER")]
    filter: Vec<String>,
}

/// `cargo xtask test`: fetches what is missing and runs every test.
pub(crate) fn test(args: &TestArgs) -> Result<()> {
    libtorch::ensure()?;
    if !args.quick {
        run::build_peft()?;
        fetch_models();
    }
    let filter: Vec<&str> = args.filter.iter().map(String::as_str).collect();
    let runner: &[&str] = if run::works(&mut run::cargo(&["nextest", "--version"])) {
        &["nextest", "run", "--workspace", "--no-fail-fast"]
    } else {
        &[
            "test",
            "--workspace",
            "--lib",
            "--bins",
            "--tests",
            "--no-fail-fast",
            "--quiet",
        ]
    };
    let mut tests = run::cargo(runner);
    if model::is_ready() {
        tests.env("PEFT_TEST_GGUF", model::gguf());
    }
    run::run(tests.args(&filter))?;
    if !args.quick && filter.is_empty() {
        run::run(&mut run::cargo(&[
            "test",
            "--workspace",
            "--doc",
            "--no-fail-fast",
            "--quiet",
        ]))?;
    }
    Ok(())
}

/// Tests must pass without a network, so a model that cannot be had is only said.
fn fetch_models() {
    for (name, model) in [
        ("SmolLM2", model::ensure()),
        ("MiniLM", model::ensure_encoder()),
    ] {
        if let Err(error) = model {
            ui::say(format!(
                "{name} could not be fetched ({error}); the tests that need it are skipped"
            ));
        }
    }
}

/// `cargo xtask ci`.
pub(crate) fn ci() -> Result<()> {
    let steps: [(&str, Step); 6] = [
        ("Format", format),
        ("Tidy", || tidy::tidy(&tidy::Args::default())),
        ("libtorch", libtorch::ensure),
        ("Lints", lints),
        ("Documentation", docs),
        ("Tests", || {
            test(&TestArgs {
                quick: false,
                filter: Vec::new(),
            })
        }),
    ];
    for (number, (title, check)) in steps.iter().enumerate() {
        ui::step(number + 1, steps.len(), title);
        check().with_context(|| match free_space() {
            Some(bytes) if bytes < ROOM_TO_LINK => format!(
                "{} did not pass; the disk of {} is full, which linkers report as a bus error",
                title.to_lowercase(),
                paths::root().display()
            ),
            _ => format!("{} did not pass", title.to_lowercase()),
        })?;
    }
    println!("\n{}", ui::bold("All checks passed"));
    Ok(())
}

/// With less, a program of a hundred megabytes may not fit while two are linked at once.
const ROOM_TO_LINK: u64 = 1 << 30;

/// Bytes that are free where this repository lies, if the system tells.
fn free_space() -> Option<u64> {
    let table = run::output(Command::new("df").arg("-Pk").arg(paths::root())).ok()?;
    let kib = table.lines().nth(1)?.split_whitespace().nth(3)?;
    kib.parse::<u64>().ok().map(|kib| kib * 1024)
}

type Step = fn() -> Result<()>;

fn format() -> Result<()> {
    component("rustfmt", "fmt")?;
    run::run(&mut run::cargo(&["fmt", "--all", "--check"]))
}

fn lints() -> Result<()> {
    component("clippy", "clippy")?;
    run::run(&mut run::cargo(&[
        "clippy",
        "--workspace",
        "--all-targets",
        "--",
        "--deny",
        "warnings",
    ]))
}

fn docs() -> Result<()> {
    // Joins the flags in `.cargo/config.toml`; the variable RUSTDOCFLAGS would replace them.
    let deny = r#"build.rustdocflags=["--deny", "warnings"]"#;
    run::run(&mut run::cargo(&[
        "doc",
        "--workspace",
        "--no-deps",
        "--config",
        deny,
    ]))
}

/// Says plainly that a part of the Rust tool chain is not installed.
fn component(name: &str, command: &str) -> Result<()> {
    if run::works(&mut run::cargo(&[command, "--version"])) {
        return Ok(());
    }
    // Where rustup rules, it may be a matter of one more download.
    if run::works(Command::new("rustup").args(["component", "add", name])) {
        return Ok(());
    }
    Err(ui::problem(
        format!("`cargo {command}` is not installed"),
        format!("`rustup component add {name}`"),
    ))
}
