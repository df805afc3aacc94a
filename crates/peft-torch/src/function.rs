//! Autograd functions written in Rust.
//!
//! libtorch differentiates what it is made of. A step that it would
//! differentiate badly (a product with a weight kept in four bits, a loss over
//! chunks of a vocabulary, a norm in one pass) is written here as a pair: the
//! output, computed by anybody, and a [`Function`] that turns gradients of the
//! outputs into gradients of the inputs. What the function needs for that it
//! owns; nothing is saved behind its back.
//!
//! ```
//! use peft_torch::{Function, apply};
//! use tch::{Kind, TchError, Tensor};
//!
//! /// y = x², dy/dx = 2x
//! struct Square(Tensor);
//! impl Function for Square {
//!     fn backward(&self, grads: &[Option<Tensor>], _: &[bool]) -> Result<Vec<Option<Tensor>>, TchError> {
//!         Ok(vec![grads[0].as_ref().map(|g| g * &self.0 * 2.0)])
//!     }
//! }
//! let x = Tensor::from_slice(&[3f32]).set_requires_grad(true);
//! let [y] = apply(&[&x], || ([&x * &x], Square(x.detach())));
//! y.sum(Kind::Float).backward();
//! assert_eq!(x.grad().double_value(&[0]), 6.0);
//! ```

use crate::ffi;
use tch::{TchError, Tensor};

/// The backward half of a differentiable step.
pub trait Function: Send + 'static {
    /// Gradients of the inputs from gradients of the outputs.
    ///
    /// `grads[i]` is `None` where nothing depends on output `i`; `needs[i]`
    /// says whether input `i` wants a gradient. Returns one entry an input,
    /// `None` for no gradient. Runs with gradients off, on whatever thread
    /// libtorch runs the backward pass. An error, or a panic, becomes an error
    /// of the call that started the pass. There is no second derivative:
    /// asking for it is an error.
    fn backward(
        &self,
        grads: &[Option<Tensor>],
        needs: &[bool],
    ) -> Result<Vec<Option<Tensor>>, TchError>;
}

/// Runs `forward` with gradients off and ties its outputs to `inputs`.
///
/// `forward` returns the outputs and the function that differentiates them.
/// Where no input requires a gradient the function is dropped at once, so an
/// evaluation saves nothing.
///
/// # Panics
/// If libtorch refuses, which it does not for defined tensors.
pub fn apply<F: Function, const N: usize>(
    inputs: &[&Tensor],
    forward: impl FnOnce() -> ([Tensor; N], F),
) -> [Tensor; N] {
    let (outputs, function) = {
        let _off = tch::no_grad_guard();
        forward()
    };
    if !ffi::grad_enabled() || !inputs.iter().any(|t| t.requires_grad()) {
        return outputs;
    }
    // The function may hold an output; the graph must hold another handle, or the two would keep each other alive.
    let outputs = outputs.map(|t| t.detach());
    let tied = ffi::apply(inputs, &outputs, function).expect("defined tensors can be tied");
    tied.try_into().expect("as many outputs as went in")
}

/// Gradients of `Σ outputs · grads` with respect to `inputs`: a vector-Jacobian product.
///
/// Outputs that need no gradient are passed over. Nothing is accumulated; an
/// input that no output depends on gives `None`.
pub fn vjp(
    outputs: &[&Tensor],
    grads: &[&Tensor],
    inputs: &[&Tensor],
) -> Result<Vec<Option<Tensor>>, TchError> {
    if inputs.is_empty() {
        return Ok(Vec::new());
    }
    ffi::vjp(outputs, grads, inputs)
}

/// Runs the backward pass from `outputs` with `grads`, accumulating into the leaves.
pub fn backward(outputs: &[&Tensor], grads: &[&Tensor]) -> Result<(), TchError> {
    ffi::vjp(outputs, grads, &[]).map(drop)
}

/// Forgets the gradient of a leaf, so that the next backward pass stores its own instead of adding to zeros.
///
/// For a model that is trained whole that is a pass over all gradients less, and they need no memory during the
/// forward pass.
pub fn drop_grad(leaf: &mut Tensor) {
    ffi::drop_grad(leaf);
}
