//! Errors as the user sees them: what, where, and the nearest right name, on one line or few.
//!
//! An error of the command line (a flag, a key, a combination of them) ends with code 2, as clap's own do;
//! everything else with 1. A command says that something is a mistake of usage by returning [`Usage`].

use std::{fmt::Display, process::ExitCode};

use anyhow::Error;
use console::style;

/// A mistake in what was typed: exit code 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Usage(pub(crate) String);

/// A [`Usage`] error with this text.
pub(crate) fn usage(text: impl Display) -> Error {
    Usage(text.to_string()).into()
}

/// A mistake in a method's settings is one of usage.
pub(crate) fn of_settings(error: peft::Error) -> Error {
    match error {
        peft::Error::Config { .. }
        | peft::Error::Unsupported { .. }
        | peft::Error::NoTarget { .. } => usage(error),
        error => error.into(),
    }
}

/// Says what clap has to say: help and version are no failure.
pub(crate) fn refuse(error: &clap::Error) -> ExitCode {
    // A terminal that is gone is no reason to fail in another way.
    let _ = error.print();
    ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2))
}

/// Prints the chain of an error and gives the exit code.
pub(crate) fn report(error: &Error) -> ExitCode {
    eprintln!(
        "{} {}",
        style("error:").red().bold().for_stderr(),
        chain(error)
    );
    ExitCode::from(if error.is::<Usage>() { 2 } else { 1 })
}

/// The causes, outermost first, without those that repeat the one before them.
fn chain(error: &Error) -> String {
    let mut said: Vec<String> = Vec::new();
    for cause in error.chain() {
        let text = cause.to_string();
        if !said.iter().any(|earlier| earlier.contains(&text)) {
            said.push(text);
        }
    }
    said.join("\n  because: ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::{Context, anyhow};

    #[test]
    fn a_cause_is_said_once() {
        let error = anyhow!("no such file")
            .context("a: no such file")
            .context("reading a run");
        assert_eq!(chain(&error), "reading a run\n  because: a: no such file");
    }

    #[test]
    fn usage_is_found_below_context() {
        let error = Err::<(), _>(usage("unknown key"))
            .context("in train.yaml")
            .unwrap_err();
        assert!(error.is::<Usage>() || error.downcast_ref::<Usage>().is_some());
    }
}
