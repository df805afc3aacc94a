//! What can be wrong with a GGUF file, said so that one can act on it.
//!
//! Each variant names the file and the place: a byte offset while the structure is still being
//! parsed, a metadata key or a tensor once they have names. Names come from the file, so they are
//! shortened and escaped before they reach a terminal.

use std::path::{Path, PathBuf};

/// The result of reading or importing a GGUF file.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a GGUF file was not read, or a folder not written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system said no.
    #[error("{}: {doing}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was being done with it.
        doing: &'static str,
        /// What the system answered.
        source: std::io::Error,
    },
    /// The bytes do not follow the GGUF layout.
    #[error("{}: byte {at}: {problem}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// Where in it.
        at: u64,
        /// What was there.
        problem: String,
    },
    /// A metadata key is missing, has another type or a value that cannot be honoured.
    #[error("{}: key `{key}`: {problem}", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// The metadata key.
        key: String,
        /// What was there.
        problem: String,
    },
    /// A tensor is missing, unexpected, mis-shaped or out of place.
    #[error("{}: tensor `{tensor}`: {problem}", path.display())]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor's name, in the file or in the Hugging Face view.
        tensor: String,
        /// What was there.
        problem: String,
    },
    /// The target folder is not free.
    #[error("{}: {problem}", path.display())]
    Target {
        /// The folder.
        path: PathBuf,
        /// What was there.
        problem: String,
    },
}

impl Error {
    pub(crate) fn io(path: &Path, doing: &'static str, source: std::io::Error) -> Self {
        Error::Io {
            path: path.into(),
            doing,
            source,
        }
    }

    pub(crate) fn key(path: &Path, key: &str, problem: impl Into<String>) -> Self {
        Error::Key {
            path: path.into(),
            key: shown(key),
            problem: problem.into(),
        }
    }

    pub(crate) fn tensor(path: &Path, tensor: &str, problem: impl Into<String>) -> Self {
        Error::Tensor {
            path: path.into(),
            tensor: shown(tensor),
            problem: problem.into(),
        }
    }
}

/// Text from a file, fit for one line of a terminal: at most 80 characters, control characters escaped.
pub(crate) fn shown(text: &str) -> String {
    let head: String = text.chars().take(80).collect();
    let cut = if head.len() < text.len() { "…" } else { "" };
    // `escape_debug` would also escape quotes, which are harmless here
    let escaped: String = head
        .chars()
        .flat_map(|c| match c {
            '\'' | '"' => vec![c],
            c => c.escape_debug().collect(),
        })
        .collect();
    escaped + cut
}

/// `, the nearest is …` for the candidate that looks most like `name`, or nothing if none does.
pub(crate) fn nearest<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> String {
    let name = shown(name);
    candidates
        .into_iter()
        .map(|candidate| (strsim::jaro_winkler(&name, &shown(candidate)), candidate))
        .filter(|(likeness, _)| *likeness > 0.7)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map_or(String::new(), |(_, best)| {
            format!(", the nearest is `{}`", shown(best))
        })
}
