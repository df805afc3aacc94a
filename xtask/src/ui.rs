//! What a person sees: numbered steps, plain notes, and errors that end with what to do next.
//!
//! Colour only on a terminal, and never where `NO_COLOR` is set; the words are the same either way.

use std::fmt::{self, Display};
use std::io::{IsTerminal, stderr, stdout};

/// `text` in bold on a terminal.
pub(crate) fn bold(text: impl Display) -> String {
    painted(text, "1", stdout().is_terminal())
}

/// `text` in grey on a terminal.
pub(crate) fn dim(text: impl Display) -> String {
    painted(text, "2", stdout().is_terminal())
}

fn painted(text: impl Display, code: &str, terminal: bool) -> String {
    if terminal && std::env::var_os("NO_COLOR").is_none() {
        format!("\x1b[{code}m{text}\x1b[0m")
    } else {
        text.to_string()
    }
}

/// The headline of a step: `[2/5] Build the program`.
pub(crate) fn step(number: usize, of: usize, title: &str) {
    println!("\n{} {}", bold(format!("[{number}/{of}]")), bold(title));
}

/// One indented line below a step.
pub(crate) fn say(line: impl Display) {
    println!("      {line}");
}

/// An error of which one knows what to do next.
#[derive(Debug)]
struct Problem {
    what: String,
    next: String,
}

impl Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.what)
    }
}

impl std::error::Error for Problem {}

/// An error that says what is wrong and, on its own line, the next step.
pub(crate) fn problem(what: impl Into<String>, next: impl Into<String>) -> anyhow::Error {
    anyhow::Error::new(Problem {
        what: what.into(),
        next: next.into(),
    })
}

/// Prints an error: the chain of causes, then the next step if one is known.
pub(crate) fn fail(error: &anyhow::Error) {
    let paint = |text: &str, code| painted(text, code, stderr().is_terminal());
    eprintln!("\n{} {error}", paint("error:", "1;31"));
    for cause in error.chain().skip(1) {
        eprintln!("       because {cause}");
    }
    let problem = error
        .chain()
        .find_map(|cause| cause.downcast_ref::<Problem>());
    if let Some(problem) = problem {
        eprintln!(
            "{}  {}",
            paint("next:", "1;32"),
            problem.next.replace('\n', "\n       ")
        );
    }
}

/// `n` bytes as a person reads them: `531 MB`.
pub(crate) fn bytes(n: u64) -> String {
    match n {
        0..1_000_000 => format!("{} kB", n / 1_000),
        1_000_000..1_000_000_000 => format!("{} MB", n / 1_000_000),
        _ => format!("{:.1} GB", n as f64 / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_like_sizes() {
        assert_eq!(bytes(2_300), "2 kB");
        assert_eq!(bytes(530_604_548), "530 MB");
        assert_eq!(bytes(1_690_000_000), "1.7 GB");
    }
}
