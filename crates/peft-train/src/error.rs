//! What can go wrong while training, each error naming the setting, step or file.

use std::path::{Path, PathBuf};

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that a run can refuse or stumble over.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setting that is not one.
    #[error("unknown setting `{key}`{hint}")]
    UnknownSetting {
        /// What was written.
        key: String,
        /// `; nearest is …`, or nothing.
        hint: String,
    },
    /// A setting with a value that cannot be.
    #[error("setting `{key}`: {reason}")]
    Setting {
        /// The setting.
        key: String,
        /// The value, and what would fit.
        reason: String,
    },
    /// There is nothing to learn from, or nothing to train.
    #[error("{0}")]
    Nothing(String),
    /// A token that the model does not know.
    #[error(
        "row {row} of the data has the token {id}, the model knows the tokens 0 to {}: \
         tokenizer and model do not belong together", vocab - 1
    )]
    Token {
        /// The row of the data set, from 0.
        row: usize,
        /// The token.
        id: i64,
        /// How many the model knows.
        vocab: i64,
    },
    /// A row for which a model that looks positions up has no place.
    #[error(
        "{row}: {tokens} tokens, but the model has {most} positions for a text; `max_length: {most}` cuts rows there"
    )]
    TooLong {
        /// Which, with its file where known.
        row: String,
        /// How many it has.
        tokens: usize,
        /// How many there may be, virtual tokens taken off.
        most: usize,
    },
    /// The loss or the gradient is no number any more.
    #[error(
        "{what} is {value} at step {step} ({rows}): nothing was changed by this step; \
         a lower learning_rate or fp32 often helps, and these rows are worth a look"
    )]
    NotFinite {
        /// `the loss` or `the gradient's norm`.
        what: &'static str,
        /// What it is: NaN, inf.
        value: f64,
        /// The step that was not taken, from 1.
        step: usize,
        /// The rows of the batch, where known with file and line.
        rows: String,
    },
    /// A run folder that cannot be used.
    #[error("{}: {reason}", path.display())]
    Run {
        /// The folder, or a file of it.
        path: PathBuf,
        /// What is wrong, and what to do.
        reason: String,
    },
    /// The curve could not be drawn.
    #[error("{}: cannot draw: {reason}", path.display())]
    Picture {
        /// The picture.
        path: PathBuf,
        /// What the drawing library says.
        reason: String,
    },
    /// The held-out rows could not be judged.
    #[error("judging the held-out rows: {0}")]
    Judge(String),
    /// Files, adapters, tensors.
    #[error(transparent)]
    Core(Box<peft_core::Error>),
    /// Data and tokenizers.
    #[error(transparent)]
    Data(#[from] peft_data::Error),
    /// libtorch refused.
    #[error(transparent)]
    Torch(#[from] tch::TchError),
}

impl From<peft_core::Error> for Error {
    fn from(error: peft_core::Error) -> Error {
        Error::Core(Box::new(error))
    }
}

impl Error {
    pub(crate) fn setting(key: &str, reason: impl Into<String>) -> Error {
        Error::Setting {
            key: key.to_owned(),
            reason: reason.into(),
        }
    }

    pub(crate) fn run(path: &Path, reason: impl Into<String>) -> Error {
        Error::Run {
            path: path.to_owned(),
            reason: reason.into(),
        }
    }

    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Error + '_ {
        move |source| peft_core::Error::io(path)(source).into()
    }
}
