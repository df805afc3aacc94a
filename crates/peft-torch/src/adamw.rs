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
        let grads: Vec<Tensor> = params.iter().map(|(p, _)| p.grad()).collect();
        for ((_, moments), _) in params.iter_mut().zip(&grads).filter(|(_, g)| g.defined()) {
            let _ = moments.step.g_add_scalar_(1.0); // the kernel wants the number of this step
        }
        let params: &[(&mut Tensor, &mut Moments)] = params;
        let trained = || (0..params.len()).filter(|&i| grads[i].defined());
        if trained().next().is_none() {
            return Ok(());
        }
        let adam = ffi::Adam {
            lr,
            betas: self.betas,
            weight_decay,
            eps: self.eps,
        };
        ffi::fused_adamw(
            [
                &trained().map(|i| &*params[i].0).collect::<Vec<_>>(),
                &trained().map(|i| &grads[i]).collect::<Vec<_>>(),
                &trained().map(|i| &params[i].1.m).collect::<Vec<_>>(),
                &trained().map(|i| &params[i].1.v).collect::<Vec<_>>(),
                &trained().map(|i| &params[i].1.step).collect::<Vec<_>>(),
            ],
            &adam,
        )
    }
}
