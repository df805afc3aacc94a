//! AdamW whose two states are kept in 8 bits.
//!
//! ```text
//! m = β₁ m + (1 − β₁) g        v = β₂ v + (1 − β₂) g²        p = p − lr · m̂ / (√v̂ + ε) − lr · λ · p
//! ```
//!
//! A state is a code into the dynamic [`Map`] (signed for m, unsigned for v) and a scale for each [`STATE_BLOCK`] of them. Both
//! are decoded, moved, used for the update as they then are, and encoded again, block by block: no state in full is ever in
//! memory. It begins with all bytes and scales zero.
//!
//! [`Compat::Cuda`] is the kernel of `bitsandbytes` (`kOptimizerStatic8bit2StateBlockwise`): decay after the update, ε times
//! the square root of v's bias correction, codes of the nearest values; a gradient that is not finite zeroes both states and
//! leaves the parameter; a code of m whose sign is wrong moves by one. Its approximate divisions are exact here.
//! [`Compat::Cpu`] is the path of torch operations: decay first, √v̂ divided before ε is added, codes of 65,536 bins, no special
//! cases; its constants are what Python computes in f64 of the shortest digits of each number.

#[cfg(target_arch = "x86_64")]
mod simd;

use rayon::prelude::*;

use crate::{
    element::Element,
    error::{Error, Result, length},
    four::Level,
    map::{Map, SIGNED_BINS, UNSIGNED_BINS},
    table::Compat,
};

/// Numbers of a state that share a scale.
pub const STATE_BLOCK: usize = 256;

/// AdamW in 8 bits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW8 {
    /// The learning rate.
    pub lr: f32,
    /// Of the mean of gradients.
    pub beta1: f32,
    /// Of the mean of their squares.
    pub beta2: f32,
    /// Added to the root of that.
    pub eps: f32,
    /// λ: how much of a parameter is taken away, times the learning rate.
    pub weight_decay: f32,
}

/// What a step multiplies with.
#[derive(Debug, Clone, Copy)]
struct Step {
    compat: Compat,
    grad_scale: f32,
    beta1: f32,
    beta2: f32,
    /// 1 − β.
    rest1: f32,
    rest2: f32,
    eps: f32,
    /// √(1 − β₂ᵗ).
    correction2: f32,
    /// What m / √v is multiplied with, negative.
    size: f32,
    /// What a parameter is multiplied with, if it decays.
    decay: Option<f32>,
}

/// The states of some parameters.
struct States<'a> {
    codes1: &'a mut [u8],
    codes2: &'a mut [u8],
    absmax1: &'a mut [f32],
    absmax2: &'a mut [f32],
}

#[expect(clippy::too_many_arguments, reason = "what a step takes are slices")]
impl AdamW8 {
    /// The `t`-th step, from 1 on, of whole blocks or of a tensor's end, on the caller's core.
    ///
    /// `params` and `grads` are as long as the codes, `absmax1` and `absmax2` have a scale for each [`STATE_BLOCK`] of them.
    pub fn step<P: Element, G: Element>(
        &self,
        t: u64,
        params: &mut [P],
        grads: &[G],
        state1: &mut [u8],
        state2: &mut [u8],
        absmax1: &mut [f32],
        absmax2: &mut [f32],
        compat: Compat,
        grad_scale: f32,
    ) -> Result<()> {
        let level = Level::best();
        self.step_at(
            level, t, params, grads, state1, state2, absmax1, absmax2, compat, grad_scale,
        )
    }

    /// [`AdamW8::step`] with given instructions, which the processor must have ([`Level::all`]); others are replaced by its best.
    pub fn step_at<P: Element, G: Element>(
        &self,
        level: Level,
        t: u64,
        params: &mut [P],
        grads: &[G],
        state1: &mut [u8],
        state2: &mut [u8],
        absmax1: &mut [f32],
        absmax2: &mut [f32],
        compat: Compat,
        grad_scale: f32,
    ) -> Result<()> {
        let states = States::of(params.len(), state1, state2, absmax1, absmax2)?;
        length("gradients", params.len(), grads.len())?;
        let step = self.constants(t, compat, grad_scale)?;
        states.step(level.here(), &step, params, grads);
        Ok(())
    }

    /// The same on all cores.
    pub fn step_all<P: Element, G: Element>(
        &self,
        t: u64,
        params: &mut [P],
        grads: &[G],
        state1: &mut [u8],
        state2: &mut [u8],
        absmax1: &mut [f32],
        absmax2: &mut [f32],
        compat: Compat,
        grad_scale: f32,
    ) -> Result<()> {
        const BLOCKS: usize = 64;
        const PIECE: usize = BLOCKS * STATE_BLOCK;
        States::of(params.len(), state1, state2, absmax1, absmax2)?;
        length("gradients", params.len(), grads.len())?;
        let step = self.constants(t, compat, grad_scale)?;
        let numbers = params.par_chunks_mut(PIECE).zip(grads.par_chunks(PIECE));
        let codes = state1
            .par_chunks_mut(PIECE)
            .zip(state2.par_chunks_mut(PIECE));
        let scales = absmax1
            .par_chunks_mut(BLOCKS)
            .zip(absmax2.par_chunks_mut(BLOCKS));
        let pieces = numbers.zip(codes).zip(scales);
        pieces.for_each(
            |(((params, grads), (codes1, codes2)), (absmax1, absmax2))| {
                let states = States {
                    codes1,
                    codes2,
                    absmax1,
                    absmax2,
                };
                states.step(Level::best(), &step, params, grads);
            },
        );
        Ok(())
    }

    fn constants(&self, t: u64, compat: Compat, grad_scale: f32) -> Result<Step> {
        if t == 0 {
            return Err(Error::State("steps of AdamW count from 1".into()));
        }
        let number = |x: f32| match compat {
            Compat::Cuda => f64::from(x),
            Compat::Cpu => x.to_string().parse().unwrap_or(f64::from(x)),
        };
        let [beta1, beta2] = [self.beta1, self.beta2].map(number);
        let [lr, weight_decay] = [self.lr, self.weight_decay].map(number);
        let correction1 = 1.0 - beta1.powf(t as f64);
        let correction2 = (1.0 - beta2.powf(t as f64)).sqrt();
        let size = match compat {
            Compat::Cuda => -lr * correction2 / correction1,
            Compat::Cpu => -lr / correction1,
        };
        Ok(Step {
            compat,
            grad_scale,
            beta1: self.beta1,
            beta2: self.beta2,
            rest1: (1.0 - beta1) as f32,
            rest2: (1.0 - beta2) as f32,
            eps: match compat {
                Compat::Cuda => correction2 as f32 * self.eps,
                Compat::Cpu => self.eps,
            },
            correction2: correction2 as f32,
            size: size as f32,
            decay: (self.weight_decay > 0.0).then_some((1.0 - lr * weight_decay) as f32),
        })
    }
}

impl<'a> States<'a> {
    fn of(
        n: usize,
        codes1: &'a mut [u8],
        codes2: &'a mut [u8],
        absmax1: &'a mut [f32],
        absmax2: &'a mut [f32],
    ) -> Result<States<'a>> {
        let blocks = n.div_ceil(STATE_BLOCK);
        length("codes of the mean", n, codes1.len())?;
        length("codes of the squares", n, codes2.len())?;
        length("scales of the mean", blocks, absmax1.len())?;
        length("scales of the squares", blocks, absmax2.len())?;
        Ok(States {
            codes1,
            codes2,
            absmax1,
            absmax2,
        })
    }

    fn step<P: Element, G: Element>(
        self,
        level: Level,
        step: &Step,
        params: &mut [P],
        grads: &[G],
    ) {
        let numbers = params
            .chunks_mut(STATE_BLOCK)
            .zip(grads.chunks(STATE_BLOCK));
        let codes = self
            .codes1
            .chunks_mut(STATE_BLOCK)
            .zip(self.codes2.chunks_mut(STATE_BLOCK));
        let scales = self.absmax1.iter_mut().zip(self.absmax2);
        #[cfg(target_arch = "x86_64")]
        let (signed, unsigned) = (&*crate::nearest::SIGNED, &*crate::nearest::UNSIGNED);
        for (((params, grads), (codes1, codes2)), (absmax1, absmax2)) in
            numbers.zip(codes).zip(scales)
        {
            let block = Block {
                codes1,
                codes2,
                absmax1,
                absmax2,
            };
            #[cfg(target_arch = "x86_64")]
            if level >= Level::Avx512 && step.compat == Compat::Cuda && params.len() == STATE_BLOCK
            {
                simd::step(level, step, signed, unsigned, params, grads, block);
                continue;
            }
            let _ = level;
            block.step(step, params, grads);
        }
    }
}

/// One block of both states.
struct Block<'a> {
    codes1: &'a mut [u8],
    codes2: &'a mut [u8],
    absmax1: &'a mut f32,
    absmax2: &'a mut f32,
}

impl Block<'_> {
    /// What a step is.
    fn step<P: Element, G: Element>(self, step: &Step, params: &mut [P], grads: &[G]) {
        let maps = [Map::signed(), Map::unsigned()];
        let (mut s1, mut s2) = ([0f32; STATE_BLOCK], [0f32; STATE_BLOCK]);
        for (i, (p, g)) in params.iter_mut().zip(grads).enumerate() {
            let g = g.wide();
            let m = maps[0].values()[usize::from(self.codes1[i])] * *self.absmax1;
            let v = maps[1].values()[usize::from(self.codes2[i])] * *self.absmax2;
            (s1[i], s2[i]) = match step.compat {
                Compat::Cuda if !g.is_finite() => continue,
                Compat::Cuda => step.cuda(p, g, m, v),
                Compat::Cpu => step.cpu(p, g, m, v),
            };
        }
        let n = params.len();
        *self.absmax1 = step.encode(&s1[..n], true, self.codes1);
        *self.absmax2 = step.encode(&s2[..n], false, self.codes2);
        if step.compat == Compat::Cuda {
            for (s, code) in s1.iter().zip(self.codes1) {
                let negative = maps[0].values()[usize::from(*code)].is_sign_negative();
                if negative != s.is_sign_negative() {
                    let by = if *s > 0.0 { 1 } else { u8::MAX };
                    *code = code.wrapping_add(by);
                }
            }
        }
    }
}

impl Step {
    fn cuda<P: Element>(&self, p: &mut P, g: f32, m: f32, v: f32) -> (f32, f32) {
        let g = g * self.grad_scale;
        let v = v.mul_add(self.beta2, self.rest2 * g * g);
        let m = m.mul_add(self.beta1, self.rest1 * g);
        let moved = self.size.mul_add(m / (v.sqrt() + self.eps), p.wide());
        *p = P::round(moved);
        if let Some(decay) = self.decay {
            *p = P::round(p.wide() * decay);
        }
        (m, v)
    }

    fn cpu<P: Element>(&self, p: &mut P, g: f32, m: f32, v: f32) -> (f32, f32) {
        let g = g * self.grad_scale;
        let m = g.mul_add(self.rest1, m * self.beta1);
        let v = (self.rest2 * g).mul_add(g, v * self.beta2);
        let below = v.sqrt() / self.correction2 + self.eps;
        let kept = self.decay.map_or(p.wide(), |decay| p.wide() * decay);
        *p = P::round(kept + self.size * m / below);
        (m, v)
    }

    /// Encodes a state and gives its scale.
    fn encode(&self, values: &[f32], signed: bool, codes: &mut [u8]) -> f32 {
        let absmax = values.iter().fold(0f32, |most, x| most.max(x.abs()));
        let scale = 1.0 / absmax;
        let map = if signed {
            Map::signed()
        } else {
            Map::unsigned()
        };
        let bins = if signed { &SIGNED_BINS } else { &UNSIGNED_BINS };
        for (x, code) in values.iter().zip(codes) {
            *code = match self.compat {
                Compat::Cuda => map.nearest(x * scale),
                Compat::Cpu if absmax == 0.0 => 0,
                Compat::Cpu => Map::binned(bins, x * scale),
            };
        }
        absmax
    }
}
