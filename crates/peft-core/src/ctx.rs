//! What is told to a forward pass besides its tensors.

use crate::Rows;

/// What a forward pass needs to know besides its tensors. Passed, never stored:
/// a dropout that is on in evaluation is a bug that nobody sees.
#[derive(Debug, Clone, Copy)]
pub struct Ctx<'a> {
    /// Dropout and friends are active.
    pub train: bool,
    /// The rows of the batch go through different adapters; `None`: all through those that are switched on.
    pub rows: Option<&'a Rows>,
    /// In training, blocks of a model are computed again in the backward pass instead of being kept (1604.06174): the same
    /// gradients to the bit, in less memory and more time. A model of one's own may do without.
    pub checkpoint: bool,
    /// A block is being computed again for its gradients: of what it returns nobody reads the numbers, only the graph counts.
    pub again: bool,
}

impl Ctx<'_> {
    /// Training mode.
    pub const TRAIN: Ctx<'static> = Ctx {
        train: true,
        rows: None,
        checkpoint: false,
        again: false,
    };
    /// Evaluation mode.
    pub const EVAL: Ctx<'static> = Ctx {
        train: false,
        rows: None,
        checkpoint: false,
        again: false,
    };
}

impl<'a> Ctx<'a> {
    /// Evaluation of a batch whose rows use different adapters.
    pub fn mixed(rows: &'a Rows) -> Ctx<'a> {
        Ctx {
            rows: Some(rows),
            ..Ctx::EVAL
        }
    }
}
