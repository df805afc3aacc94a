//! What does not fit.

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Sizes that contradict each other, and states that nobody wrote.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A block size that the format does not have.
    #[error("block size {0}, expected one of 32, 64, 128, 256, 512, 1024, 2048, 4096")]
    Block(usize),
    /// A slice of another length.
    #[error("{what}: expected {expected}, got {got}")]
    Length {
        /// What it holds.
        what: &'static str,
        /// How many there should be.
        expected: usize,
        /// How many there are.
        got: usize,
    },
    /// A piece of a tensor that begins inside a byte or ends beyond it.
    #[error("numbers from {from} on, {count} of them, are no piece of {len}")]
    Piece {
        /// Its first number.
        from: usize,
        /// How many it has.
        count: usize,
        /// How many the tensor has.
        len: usize,
    },
    /// A `quant_state` that cannot be.
    #[error("quant_state: {0}")]
    State(String),
}

/// Compares a length with what it should be.
pub(crate) fn length(what: &'static str, expected: usize, got: usize) -> Result<()> {
    match expected == got {
        true => Ok(()),
        false => Err(Error::Length {
            what,
            expected,
            got,
        }),
    }
}
