//! Activation checkpointing (1604.06174): a part of a network that is computed twice instead of being kept.
//!
//! ```text
//! forward    y = f(x, θ)          kept: x, θ and the state of the random generators
//! backward   y = f(x, θ) again;   dx, dθ = gᵀ ∂y/∂(x, θ)
//! ```
//!
//! A network of n such parts holds the inputs of all and the inside of one, for one more forward pass.
//!
//! θ is named, not found: the parameters are inputs of the step like x, so their gradients go through the ordinary
//! graph, into whatever asked for them, and f need not depend on x at all. Gradients have the very bits of those without:
//! libtorch chooses kernels by which tensors want gradients, so both passes run f with a graph, on inputs that want what
//! the given ones want, and that of the first is dropped as soon as y is there. Dropout draws the same numbers twice.

use crate::{Function, apply, ffi, memory, rng, vjp};
use tch::{Device, TchError, Tensor};

/// Which time a part of a network is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    /// In the forward pass.
    First,
    /// In the backward pass: nobody reads the numbers of the output, only its graph counts. What comes last and is needed by no
    /// gradient can be left out.
    Again,
}

/// `run(inputs, Pass::First)`, which the backward pass computes again: of all that is in it only `inputs` are kept.
///
/// `params` are what takes gradients inside `run` without being given to it. What `run` does may depend on nothing else that
/// changes before the backward pass has run. Where no gradient is wanted this is `run` and no more.
///
/// # Errors
/// Whatever `run` gives, and a device without a random state that can be read.
///
/// ```
/// use peft_torch::checkpoint;
/// use tch::{Kind, Tensor};
///
/// let x = Tensor::from_slice(&[3f32]).set_requires_grad(true);
/// let w = Tensor::from_slice(&[2f32]).set_requires_grad(true);
/// let inside = w.shallow_clone();
/// let y = checkpoint(&[&x], &[&w], move |x, _| Ok(&x[0] * &x[0] * &inside))?;
/// y.sum(Kind::Float).backward();
/// assert_eq!([&x, &w].map(|it| it.grad().double_value(&[0])), [12.0, 9.0]);
/// # Ok::<(), tch::TchError>(())
/// ```
pub fn checkpoint(
    inputs: &[&Tensor],
    params: &[&Tensor],
    run: impl Fn(&[Tensor], Pass) -> Result<Tensor, TchError> + Send + 'static,
) -> Result<Tensor, TchError> {
    let wanted = inputs.iter().chain(params).any(|it| it.requires_grad());
    if !wanted || !ffi::grad_enabled() {
        let inputs: Vec<Tensor> = inputs.iter().map(|it| it.shallow_clone()).collect();
        return run(&inputs, Pass::First);
    }
    let mut named: Vec<&Tensor> = Vec::new();
    for it in params {
        // Of one that is named twice, either name would be given the whole gradient.
        if it.requires_grad() && !named.iter().any(|other| ffi::same(other, it)) {
            named.push(it);
        }
    }
    let saved = Checkpoint {
        inputs: inputs
            .iter()
            .map(|it| (it.detach(), it.requires_grad()))
            .collect(),
        params: named.iter().map(|it| it.shallow_clone()).collect(),
        drawn: rng::snapshot(inputs.iter().chain(params).map(|it| it.device()))?,
        run,
    };
    let y = (saved.run)(&saved.fresh(), Pass::First)?.detach();
    memory::give_back_growth();
    let all: Vec<&Tensor> = inputs.iter().copied().chain(named).collect();
    let [y] = apply(&all, || ([y], saved));
    Ok(y)
}

struct Checkpoint<F> {
    /// Without a graph, and whether each wants a gradient.
    inputs: Vec<(Tensor, bool)>,
    /// The leaves themselves.
    params: Vec<Tensor>,
    /// The states of the generators before the first pass.
    drawn: Vec<(Device, Tensor)>,
    run: F,
}

impl<F: Fn(&[Tensor], Pass) -> Result<Tensor, TchError>> Checkpoint<F> {
    /// The inputs as leaves of a graph of their own.
    fn fresh(&self) -> Vec<Tensor> {
        let leaf = |(it, wants): &(Tensor, bool)| it.detach().set_requires_grad(*wants);
        self.inputs.iter().map(leaf).collect()
    }

    /// The same graph once more, from `inputs`.
    fn again(&self, inputs: &[Tensor]) -> Result<Tensor, TchError> {
        let now = rng::snapshot(self.drawn.iter().map(|(device, _)| *device))?;
        rng::restore(&self.drawn)?;
        let y = tch::with_grad(|| (self.run)(inputs, Pass::Again));
        rng::restore(&now)?;
        y
    }
}

impl<F> Function for Checkpoint<F>
where
    F: Fn(&[Tensor], Pass) -> Result<Tensor, TchError> + Send + 'static,
{
    fn backward(
        &self,
        grads: &[Option<Tensor>],
        needs: &[bool],
    ) -> Result<Vec<Option<Tensor>>, TchError> {
        let mut all: Vec<Option<Tensor>> = needs.iter().map(|_| None).collect();
        let Some(g) = &grads[0] else {
            return Ok(all);
        };
        let inputs = self.fresh();
        let y = self.again(&inputs)?;
        if !y.requires_grad() {
            return Ok(all);
        }
        let given = inputs.iter().chain(&self.params).zip(needs);
        let asked: Vec<&Tensor> = given.filter(|(_, need)| **need).map(|(it, _)| it).collect();
        let mut found = vjp(&[&y], &[g], &asked)?.into_iter();
        for (place, _) in all.iter_mut().zip(needs).filter(|(_, need)| **need) {
            *place = found.next().flatten();
        }
        drop((y, inputs));
        memory::give_back_growth();
        Ok(all)
    }
}
