//! Errors at the borders of the library: each names the thing, the place and what would fit.

use std::path::{Path, PathBuf};

/// Everything that can go wrong at a border: files, configurations, names, shapes.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tag that no registered method answers to.
    #[error("unknown peft_type `{found}`, this build knows {known:?}")]
    UnknownMethod {
        /// What the file says.
        found: String,
        /// What could be read.
        known: Vec<&'static str>,
    },
    /// A configuration that does not parse, or holds a value that is out of range.
    #[error("{peft_type} configuration: {reason}")]
    Config {
        /// The method.
        peft_type: String,
        /// Key, value and what would fit.
        reason: String,
    },
    /// A setting that would change the numbers and is not there yet.
    #[error(
        "{peft_type} configuration sets `{key}` to {value}, which this build does not offer{hint}"
    )]
    Unsupported {
        /// The method.
        peft_type: String,
        /// The key.
        key: String,
        /// Its value.
        value: Box<serde_json::Value>,
        /// `; nearest known key: …`, or nothing.
        hint: String,
    },
    /// Nothing in the model matched.
    #[error("{what} matches no layer of this model; it has for example {examples:?}")]
    NoTarget {
        /// The setting, spelt out.
        what: String,
        /// Real names, nearest first.
        examples: Vec<String>,
    },
    /// A tensor of another shape.
    #[error("expected shape {expected:?}, got {got:?} at `{key}`")]
    Shape {
        /// The tensor.
        key: String,
        /// What the model or method needs.
        expected: Vec<i64>,
        /// What there is.
        got: Vec<i64>,
    },
    /// A tensor that should be there.
    #[error("{place} lacks `{key}`{hint}")]
    Missing {
        /// The file or thing that was searched.
        place: String,
        /// The tensor.
        key: String,
        /// `; nearest is …`, or nothing.
        hint: String,
    },
    /// Tensors that nothing takes.
    #[error("{place} has {count} tensors that no layer takes, first `{key}`{hint}")]
    Unexpected {
        /// The file.
        place: String,
        /// How many.
        count: usize,
        /// The first.
        key: String,
        /// `; nearest is …`, or nothing.
        hint: String,
    },
    /// A layer that has no merged form.
    #[error("`{at}` cannot be merged: {why}")]
    NotMergeable {
        /// The layer.
        at: String,
        /// The reason.
        why: String,
    },
    /// A part of the base that full fine-tuning cannot train.
    #[error("`{at}` cannot be trained: {why}")]
    NotTrainable {
        /// The layer.
        at: String,
        /// The reason.
        why: String,
    },
    /// A convolution whose weight, bias and settings do not go together.
    #[error("convolution: {0}")]
    Geometry(String),
    /// A name that is taken, missing or not allowed.
    #[error("adapter `{name}`: {why}")]
    Name {
        /// The adapter.
        name: String,
        /// What is wrong with it.
        why: String,
    },
    /// A batch that does not fit the model: ids without a row in a table, labels of another task.
    #[error("batch: {reason}")]
    Batch {
        /// What there is and what would fit.
        reason: String,
    },
    /// A file that is not what it should be.
    #[error("{}: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong, with line or key.
        reason: String,
    },
    /// The system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's words.
        source: std::io::Error,
    },
    /// libtorch refused.
    #[error(transparent)]
    Torch(#[from] tch::TchError),
}

impl Error {
    /// An [`Error::Io`] at `path`.
    pub fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Error + '_ {
        |source| Error::Io {
            path: path.to_owned(),
            source,
        }
    }

    /// An [`Error::File`] at `path`.
    pub fn file(path: &Path, reason: impl std::fmt::Display) -> Error {
        Error::File {
            path: path.to_owned(),
            reason: reason.to_string(),
        }
    }
}

/// Result of an operation at a border.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// `; nearest is …` for an error message, or nothing if nothing is near.
pub fn nearest<'a>(wanted: &str, among: impl IntoIterator<Item = &'a str>) -> String {
    let best = among
        .into_iter()
        .map(|name| (strsim::jaro_winkler(wanted, name), name))
        .max_by(|a, b| a.0.total_cmp(&b.0));
    match best {
        Some((score, name)) if score > 0.7 => format!("; nearest is `{name}`"),
        _ => String::new(),
    }
}

/// The `count` names that are most like `wanted`, nearest first, for an error message.
pub fn closest<'a>(
    wanted: &str,
    among: impl IntoIterator<Item = &'a str>,
    count: usize,
) -> Vec<String> {
    let likeness =
        |name: &str| strsim::jaro_winkler(wanted, name.rsplit('.').next().unwrap_or(name));
    let mut scored: Vec<_> = among
        .into_iter()
        .map(|name| (likeness(name), name))
        .collect();
    scored.sort_by(|a, b| b.0.total_cmp(&a.0));
    scored
        .into_iter()
        .take(count)
        .map(|(_, name)| name.to_owned())
        .collect()
}
