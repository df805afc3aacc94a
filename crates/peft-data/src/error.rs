//! What can go wrong between a data file and a batch, each error naming its place.
//!
//! A row's error carries file and line, because that is what a person opens
//! next: `train.jsonl:812: …`. Nothing here wraps an error without saying
//! which file it was about.

use std::io;
use std::path::{Path, PathBuf};

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that reading, rendering, tokenising and caching can refuse.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder in question.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A whole file is not what it should be.
    #[error("{}: {what}", path.display())]
    File {
        /// The file in question.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// One row of a data file is not what it should be.
    #[error("{}:{line}: {what}", path.display())]
    Row {
        /// The data file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// What is wrong with it.
        what: String,
    },
    /// The chat template is wrong, or refuses a conversation.
    #[error("chat template: {0}")]
    Template(String),
    /// The tokenizer refuses a text or an id.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// An option cannot be what it is.
    #[error("{0}")]
    Option(String),
}

impl Error {
    pub(crate) fn io(path: &Path) -> impl FnOnce(io::Error) -> Error + '_ {
        move |source| Error::Io {
            path: path.to_owned(),
            source,
        }
    }

    pub(crate) fn file(path: &Path, what: impl Into<String>) -> Error {
        Error::File {
            path: path.to_owned(),
            what: what.into(),
        }
    }

    pub(crate) fn row(path: &Path, line: usize, what: impl Into<String>) -> Error {
        Error::Row {
            path: path.to_owned(),
            line,
            what: what.into(),
        }
    }
}

/// The candidate most like `name`, if any is alike enough to be a misspelling.
pub(crate) fn nearest<'a>(
    name: &str,
    candidates: impl IntoIterator<Item = &'a str>,
) -> Option<&'a str> {
    candidates
        .into_iter()
        .map(|candidate| (strsim::jaro_winkler(name, candidate), candidate))
        .filter(|(likeness, _)| *likeness > 0.8)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate)
}
