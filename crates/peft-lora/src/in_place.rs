//! What adapters add to the output of a layer, in its own memory and with its gradients.
//!
//! The output that [`peft_core::Beneath::forward`] gives is fresh memory, so nothing needs a copy of it. The product of
//! LoRA itself is [`peft_torch::add_low_rank`].

use peft_torch::{Function, apply};
use tch::{TchError, Tensor};

/// y with some of its columns replaced; y is used up. y: `[.., out]`, at: `[n]`, columns: `[.., n]`.
pub(crate) fn replace_columns(y: Tensor, at: &Tensor, columns: &Tensor) -> Tensor {
    let [y] = apply(&[&y, columns], || {
        let replaced = y.detach().index_copy_(-1, at, &columns.detach());
        ([replaced], Replace(at.shallow_clone()))
    });
    y
}

struct Replace(Tensor);

impl Function for Replace {
    fn backward(
        &self,
        grads: &[Option<Tensor>],
        needs: &[bool],
    ) -> Result<Vec<Option<Tensor>>, TchError> {
        let Some(g) = &grads[0] else {
            return Ok(vec![None, None]);
        };
        let kept = needs[0].then(|| g.index_fill(-1, &self.0, 0.0));
        Ok(vec![kept, Some(g.index_select(-1, &self.0))])
    }
}
