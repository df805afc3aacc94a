//! AdamW (1711.05101) over many tensors at once.
//!
//! m ← β₁m + (1−β₁)g, v ← β₂v + (1−β₂)g², θ ← θ − lr·λ·θ − lr·m̂/(√v̂ + eps).
//!
//! One call into libtorch's fused kernel for all tensors instead of a dozen
//! operations for each: 0.27 s against 0.08 s for 124 M parameters here. The
//! state is plain tensors that a checkpoint can read and write.

use crate::ffi;
use tch::{Device, Kind, TchError, Tensor};

/// What AdamW remembers of one tensor.
#[derive(Debug)]
pub struct Moments {
    /// Running mean of the gradient, in the shape of the parameter.
    pub m: Tensor,
    /// Running mean of its square.
    pub v: Tensor,
    /// How many steps were taken: a scalar in fp32.
    pub step: Tensor,
}

impl Moments {
    /// The state before the first step.
    pub fn new(param: &Tensor) -> Moments {
        Moments {
            m: tch::no_grad(|| param.zeros_like()),
            v: tch::no_grad(|| param.zeros_like()),
            step: Tensor::zeros(
                [0i64; 0],
                (
                    Kind::Float,
                    if param.device().is_cuda() {
                        param.device()
                    } else {
                        Device::Cpu
                    },
                ),
            ),
        }
    }
}

/// The constants of AdamW, with PyTorch's defaults.
#[derive(Debug, Clone, Copy)]
pub struct AdamW {
    /// Decay rates of the two running means.
    pub betas: (f64, f64),
    /// Added to the root.
    pub eps: f64,
}

impl Default for AdamW {
    fn default() -> AdamW {
        AdamW {
            betas: (0.9, 0.999),
            eps: 1e-8,
        }
    }
}

impl AdamW {
    /// Takes one step on tensors that share a learning rate and a decay.
    ///
    /// Tensors without a gradient are left alone. `weight_decay` is λ.
    pub fn step(
        &self,
        params: &mut [(&mut Tensor, &mut Moments)],
        lr: f64,
        weight_decay: f64,
    ) -> Result<(), TchError> {
        let mut trained: Vec<(Tensor, Tensor, &mut Moments)> = Vec::new();
        for (param, moments) in params {
            let grad = param.grad();
            if grad.defined() {
                trained.push((param.shallow_clone(), grad, moments));
            }
        }
        self.step_with(&mut trained, lr, weight_decay)
    }

    /// The same with gradients that are not the tensors' own.
    pub fn step_with(
        &self,
        params: &mut [(Tensor, Tensor, &mut Moments)],
        lr: f64,
        weight_decay: f64,
    ) -> Result<(), TchError> {
        if params.is_empty() {
            return Ok(());
        }
        for (.., moments) in &mut *params {
            let _ = moments.step.g_add_scalar_(1.0); // the kernel wants the number of this step
        }
        let adam = ffi::Adam {
            lr,
            betas: self.betas,
            weight_decay,
            eps: self.eps,
        };
        let params = || params.iter();
        ffi::fused_adamw(
            [
                &params().map(|it| &it.0).collect::<Vec<_>>(),
                &params().map(|it| &it.1).collect::<Vec<_>>(),
                &params().map(|it| &it.2.m).collect::<Vec<_>>(),
                &params().map(|it| &it.2.v).collect::<Vec<_>>(),
                &params().map(|it| &it.2.step).collect::<Vec<_>>(),
            ],
            &adam,
        )
    }
}
