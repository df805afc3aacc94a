//! What a method does while it is trained, besides its forward pass.
//!
//! Most methods do nothing: their parameters are stepped like any others. Some add a term to the loss (factors
//! that are to stay orthogonal), some act between a step and the next (ranks that are taken away where they matter
//! least). Both need the parameters and nothing of the model, so the loop asks for them here and knows no method:
//!
//! ```text
//! loss.backward()   penalty.backward()   optimizer.step()   after_step   zero_grad
//! ```

use crate::{Param, Result, State};
use std::fmt;
use tch::Tensor;

/// One method's part in a training loop; from [`Tuner::schedule`](crate::Tuner::schedule).
pub trait Schedule: fmt::Debug + Send {
    /// A scalar that is added to the mean loss of a step, if there is one. `params`: all of the adapter.
    fn penalty(&self, params: &[Param]) -> Option<Tensor>;

    /// Called when the optimiser has taken a step, with the gradients of that step still there.
    ///
    /// `step` is whatever the loop counts by; the one of this project says how many steps were taken, this one included.
    fn after_step(&mut self, params: &[Param], step: usize) -> Result<()>;

    /// What it remembers from step to step, for a checkpoint.
    fn state(&self) -> State;

    /// Puts back what [`Schedule::state`] gave, so that the next step gives the same bits.
    fn restore(&mut self, state: State) -> Result<()>;
}
