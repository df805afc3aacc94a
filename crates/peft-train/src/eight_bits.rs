//! AdamW whose moments are kept in 8 bits (2110.02861), as `bitsandbytes` keeps them.
//!
//! A moment is an index into 256 values that are dense around zero, and 256 neighbours share a scale: 2 bytes and 8/256 a parameter
//! instead of 8. Each step decodes, updates and encodes a block at a time ([`peft_codec::AdamW8`]). Of tensors with fewer
//! than [`SMALLEST`] numbers the moments stay in fp32, where they weigh nothing. On a GPU all tensors are stepped in one launch
//! ([`peft_cuda::adamw`]), by the same rules to the bit.

use crate::{cuda, ffi::paged_zeros, settings::Keep};
use half::bf16;
use peft_codec::{AdamW8, Compat, STATE_BLOCK};
use peft_torch::{
    for_each_chunk,
    memory::{with_slice, with_slice_mut},
};
use tch::{Device, Kind, TchError, Tensor};

/// Tensors with fewer numbers keep their moments in fp32.
pub(crate) const SMALLEST: usize = 4096;

/// Numbers that one thread steps at a time.
const PIECE: usize = 1 << 14;

/// What AdamW remembers of one tensor, in 8 bits.
#[derive(Debug)]
pub(crate) struct Moments8 {
    /// Of the running mean: an index for each parameter.
    pub(crate) state1: Tensor,
    /// Of the running mean of squares.
    pub(crate) state2: Tensor,
    /// A scale for each 256 of them, in fp32.
    pub(crate) absmax1: Tensor,
    pub(crate) absmax2: Tensor,
    /// How many steps were taken: a scalar in fp32.
    pub(crate) step: Tensor,
}

impl Moments8 {
    /// The state before the first step; `None` for a tensor that keeps it in fp32.
    ///
    /// # Errors
    /// If the tensor is not of fp32 or bf16, or on a GPU without the kernels.
    pub(crate) fn of(param: &Tensor, keep: Keep) -> Result<Option<Moments8>, TchError> {
        let device = param.device();
        match device {
            Device::Cpu => {}
            Device::Cuda(ordinal) => peft_cuda::prepare(ordinal as i32).map_err(|error| {
                TchError::Torch(format!(
                    "the kernels of AdamW with 8-bit states are not there ({error}); `offloaded_adamw_8bit` steps in main memory"
                ))
            })?,
            other => {
                return Err(TchError::Torch(format!(
                    "AdamW with 8-bit states has no kernels for {other:?}; `offloaded_adamw_8bit` steps in main memory"
                )));
            }
        }
        if !matches!(param.kind(), Kind::Float | Kind::BFloat16) {
            return Err(TchError::Kind(format!(
                "AdamW with 8-bit states trains fp32 and bf16, not {:?}",
                param.kind()
            )));
        }
        let n = param.numel();
        if n < SMALLEST {
            return Ok(None);
        }
        let codes = || match keep.pages(param) {
            true => paged_zeros(&[n as i64], Kind::Uint8, device),
            false => Ok(Tensor::zeros([n as i64], (Kind::Uint8, device))),
        };
        let blocks = n.div_ceil(STATE_BLOCK) as i64;
        let scales = || Tensor::zeros([blocks], (Kind::Float, device));
        Ok(Some(Moments8 {
            state1: codes()?,
            state2: codes()?,
            absmax1: scales(),
            absmax2: scales(),
            step: Tensor::from(0f32),
        }))
    }

    /// Which step comes next, from 1.
    pub(crate) fn count(&mut self) -> u64 {
        let _ = self.step.g_add_scalar_(1.0);
        self.step.double_value(&[]) as u64
    }

    /// One step on a tensor in main memory.
    fn step(&mut self, adam: AdamW8, param: &Tensor, grad: &Tensor) -> Result<(), TchError> {
        let t = self.count();
        let grad = grad.to_kind(Kind::Float);
        let mut param = param.detach();
        with_slice(&grad, |grads: &[f32]| match param.kind() {
            Kind::BFloat16 => with_slice_mut(&mut param, |it: &mut [bf16]| {
                self.update(adam, t, it, grads)
            }),
            _ => with_slice_mut(&mut param, |it: &mut [f32]| self.update(adam, t, it, grads)),
        })
        .flatten()
        .flatten()
    }

    fn update<P: peft_codec::Element>(
        &mut self,
        adam: AdamW8,
        t: u64,
        params: &mut [P],
        grads: &[f32],
    ) -> Result<(), TchError> {
        let [state1, state2] = [&mut self.state1, &mut self.state2];
        let [absmax1, absmax2] = [&mut self.absmax1, &mut self.absmax2];
        let done = with_slice_mut(state1, |codes1: &mut [u8]| {
            with_slice_mut(state2, |codes2: &mut [u8]| {
                with_slice_mut(absmax1, |scales1: &mut [f32]| {
                    with_slice_mut(absmax2, |scales2: &mut [f32]| {
                        let blocks = PIECE / STATE_BLOCK;
                        let numbers = params.chunks_mut(PIECE).zip(grads.chunks(PIECE));
                        let codes = codes1.chunks_mut(PIECE).zip(codes2.chunks_mut(PIECE));
                        let scales = scales1.chunks_mut(blocks).zip(scales2.chunks_mut(blocks));
                        let pieces = numbers.zip(codes).zip(scales);
                        let mut pieces: Vec<_> = pieces.map(|it| (it, Ok(()))).collect();
                        for_each_chunk(&mut pieces, 1, |_, pieces| {
                            for ((((p, g), (c1, c2)), (a1, a2)), done) in pieces {
                                *done = adam.step(t, p, g, c1, c2, a1, a2, Compat::Cuda, 1.0);
                            }
                        });
                        pieces.into_iter().try_for_each(|it| it.1)
                    })
                })
            })
        });
        done.flatten()
            .flatten()
            .flatten()?
            .map_err(|error| TchError::Shape(error.to_string()))
    }
}

/// A tensor, its gradient, and what is remembered of it.
pub(crate) type Stepped<'a> = (Tensor, Tensor, &'a mut Moments8);

/// One step of every tensor.
pub(crate) fn step(adam: AdamW8, all: &mut [Stepped<'_>]) -> Result<(), TchError> {
    let (mut away, mut here): (Vec<_>, Vec<_>) =
        all.iter_mut().partition(|it| it.0.device().is_cuda());
    for (param, grad, moments) in &mut here {
        moments.step(adam, param, grad)?;
    }
    for kind in [Kind::Float, Kind::BFloat16] {
        let mut same: Vec<_> = away.iter_mut().filter(|it| it.0.kind() == kind).collect();
        cuda::step(adam, &mut same).map_err(|error| TchError::Torch(error.to_string()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Optim, Optimizer, Settings};
    use peft_core::Param;

    fn optimizer(optim: Optim, tensor: &Tensor) -> Optimizer {
        let param = Param {
            adapter: "default".into(),
            at: "layer".into(),
            name: "weight".into(),
            norm: false,
            tensor: tensor.shallow_clone(),
        };
        let settings = Settings {
            optim,
            weight_decay: 0.1,
            max_grad_norm: 0.0,
            ..Settings::default()
        };
        Optimizer::new(&[param], &settings).unwrap()
    }

    /// Both go down the same bowl, one with eight bits of memory.
    #[test]
    fn it_descends_as_the_whole_one_does() {
        tch::manual_seed(1);
        let target = Tensor::randn([5000], (Kind::Float, Device::Cpu));
        let losses = [Optim::AdamwTorch, Optim::Adamw8bit].map(|optim| {
            let tensor = Tensor::zeros([5000], (Kind::Float, Device::Cpu)).set_requires_grad(true);
            let mut optimizer = optimizer(optim, &tensor);
            for _ in 0..300 {
                optimizer.zero_grad();
                (&tensor - &target).square().sum(Kind::Float).backward();
                optimizer.step(1e-2).unwrap();
            }
            (&tensor - &target)
                .square()
                .mean(Kind::Float)
                .double_value(&[])
        });
        // From 1.0 at the start; the farthest targets are not reached in so many steps.
        let [whole, eight] = losses;
        assert!(whole < 0.05 && eight < 1.2 * whole, "{losses:?}");
    }

    #[test]
    fn small_tensors_keep_their_moments_and_no_gradient_is_no_step() {
        let small = Tensor::zeros([4095], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let names = |it: &Optimizer| it.entries()[0].moments.tensors()[0].0;
        assert_eq!(names(&optimizer(Optim::Adamw8bit, &small)), "m");
        let large = Tensor::ones([4096], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let mut optimizer = optimizer(Optim::Adamw8bit, &large);
        assert_eq!(names(&optimizer), "state1");
        optimizer.step(1.0).unwrap();
        assert_eq!(large.sum(Kind::Float).double_value(&[]), 4096.0);
    }

    #[test]
    fn what_it_cannot_train_is_refused() {
        let half = Tensor::zeros([4096], (Kind::Half, Device::Cpu));
        let error = Moments8::of(&half, Keep::Here).unwrap_err().to_string();
        assert!(error.contains("Half"), "{error}");
    }
}
