//! What is told to a forward pass besides its tensors.

/// What a forward pass needs to know besides its tensors. Passed, never stored:
/// a dropout that is on in evaluation is a bug that nobody sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ctx {
    /// Dropout and friends are active.
    pub train: bool,
}

impl Ctx {
    /// Training mode.
    pub const TRAIN: Ctx = Ctx { train: true };
    /// Evaluation mode.
    pub const EVAL: Ctx = Ctx { train: false };
}
