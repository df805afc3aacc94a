//! What can go wrong: answers that cannot be counted, a picture that cannot be written.

use std::io;
use std::path::PathBuf;

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that counting and drawing can refuse.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// As many answers as there are truths are needed.
    #[error("{predicted} answers for {truth} truths{at}")]
    Lengths {
        /// How many truths there are.
        truth: usize,
        /// How many answers there are.
        predicted: usize,
        /// Where, as ` in row 3`; empty for the whole.
        at: String,
    },
    /// A class that does not exist.
    #[error("row {row} has class {class}, there are {classes}")]
    Class {
        /// The row, counted from 0.
        row: usize,
        /// The class.
        class: usize,
        /// How many classes there are.
        classes: usize,
    },
    /// Nothing to count.
    #[error("no {0} to measure")]
    Empty(&'static str),
    /// The operating system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file in question.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A picture cannot be drawn.
    #[error("{}: {reason}", path.display())]
    Picture {
        /// The file in question.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
}

/// An error if the counts differ.
pub(crate) fn same(truth: usize, predicted: usize, at: impl FnOnce() -> String) -> Result<()> {
    if truth == predicted {
        return Ok(());
    }
    Err(Error::Lengths {
        truth,
        predicted,
        at: at(),
    })
}
