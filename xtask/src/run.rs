//! Running other programs, with errors that say which one and how it ended.

use crate::{paths, ui};
use anyhow::{Context, Result, bail};
use std::io::ErrorKind;
use std::process::{Command, ExitStatus, Output};

/// `cargo` in the root of the repository, in the environment that plain cargo commands have.
///
/// A `LIBTORCH` of the user's is behind `target/libtorch` already, which `.cargo/config.toml` names; if it were
/// passed on, the next plain cargo command would compile the bindings a second time.
pub(crate) fn cargo(args: &[&str]) -> Command {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(program);
    command
        .args(args)
        .current_dir(paths::root())
        .env_remove("LIBTORCH");
    // Cargo set this for this program, not for the next cargo.
    command.env_remove("CARGO_MANIFEST_DIR");
    command
}

/// Runs a command to its end; anything but success is an error that names it.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| missing(command))?;
    if !status.success() {
        bail!("`{}` {}", line(command), ended(status));
    }
    Ok(())
}

/// Runs a command and gives what it wrote to standard output; its complaints become the error.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let Output {
        status,
        stdout,
        stderr,
    } = command.output().with_context(|| missing(command))?;
    if !status.success() {
        let complaint = String::from_utf8_lossy(&stderr);
        bail!(
            "`{}` {}: {}",
            line(command),
            ended(status),
            complaint.trim()
        );
    }
    Ok(String::from_utf8_lossy(&stdout).into_owned())
}

/// Whether the command can be run and succeeds; says nothing.
pub(crate) fn works(command: &mut Command) -> bool {
    command.output().is_ok_and(|output| output.status.success())
}

/// Builds the `peft` program of the development profile.
pub(crate) fn build_peft() -> Result<()> {
    run(&mut build("peft")).map_err(|error| match needs_compiler() {
        Some(problem) => problem.context(error.to_string()),
        None => error,
    })
}

/// Builds a program of the workspace. With the features that the whole workspace asks for: those of its package alone would
/// compile the bindings to libtorch a second time.
pub(crate) fn build(program: &str) -> Command {
    cargo(&["build", "--workspace", "--bin", program])
}

/// The usual reason why a build stops on a fresh machine.
fn needs_compiler() -> Option<anyhow::Error> {
    let compiler = std::env::var_os("CXX").unwrap_or_else(|| "c++".into());
    let found = !matches!(
        Command::new(&compiler).arg("--version").output(),
        Err(error) if error.kind() == ErrorKind::NotFound
    );
    (!found).then(|| {
        ui::problem(
            format!("there is no C++ compiler `{}`", compiler.display()),
            "install one (Debian and Ubuntu: `apt install g++`; macOS: `xcode-select --install`)",
        )
    })
}

/// The command as one would type it.
fn line(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let words: Vec<_> = words.map(|word| word.to_string_lossy()).collect();
    words.join(" ")
}

fn missing(command: &Command) -> String {
    format!("cannot run `{}`", line(command))
}

fn ended(status: ExitStatus) -> String {
    match status.code() {
        Some(code) => format!("ended with exit status {code}"),
        None => format!("was ended by a signal ({status})"),
    }
}
