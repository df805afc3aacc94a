//! AdamW whose moments are kept in 8 bits, over all tensors in one launch.
//!
//! ```text
//! m = m·β₁ + (1-β₁)·g        v = v·β₂ + (1-β₂)·g²
//! p = round(p + step · m / (√v + eps))        p = round(p · (1 - lr·λ))
//! step = -lr · √(1-β₂ᵗ) / (1-β₁ᵗ)        eps = ε · √(1-β₂ᵗ)
//! ```
//!
//! The rules are those of the CUDA kernels of `bitsandbytes`: m and v of the update are the ones that are not yet rounded to 8 bits; the
//! decay comes last; the code of m has m's sign, one index further where the nearest has not; a number whose gradient is not finite
//! stays, and its moments become zero. Every operation is rounded by itself, where those kernels divide approximately, so
//! [`step_scalar`], which says in Rust what the kernel does, has the same bits.
//!
//! New moments are bytes of zero and scales of zero.

use peft_codec::{Compat, Element, Map, NESTED_BLOCK, quantise_blockwise};

use crate::{
    driver,
    encode::blocks_at_once,
    error::Result,
    kernels::{Arg, Launch, Source, THREADS},
    memory::{Memory, Number},
    stream::Stream,
};

/// How many moments share a scale.
pub const MOMENT_BLOCK: usize = 256;

/// How much of the moments before is kept.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Betas(pub f32, pub f32);

/// What is the same for the numbers of a tensor in a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rate {
    step: f32,
    eps: f32,
    decay: f32,
}

impl Rate {
    /// Of step `t`, counted from 1. Computed in fp64 and rounded.
    pub fn of(t: u32, lr: f64, eps: f64, weight_decay: f64, betas: Betas) -> Rate {
        let t = f64::from(t);
        let first = 1.0 - f64::from(betas.0).powf(t);
        let second = (1.0 - f64::from(betas.1).powf(t)).sqrt();
        Rate {
            step: (-lr * second / first) as f32,
            eps: (eps * second) as f32,
            decay: (1.0 - lr * weight_decay) as f32,
        }
    }
}

/// A tensor of a step. All memory but the gradient's is read and written.
#[derive(Debug, Clone, Copy)]
pub struct Tensor<'a> {
    /// `len` numbers.
    pub parameter: Memory<'a>,
    /// As many of the same format.
    pub gradient: Memory<'a>,
    /// A code a number.
    pub first: Memory<'a>,
    /// A code a number.
    pub second: Memory<'a>,
    /// fp32, one for each [`MOMENT_BLOCK`].
    pub first_absmax: Memory<'a>,
    /// fp32, one for each [`MOMENT_BLOCK`].
    pub second_absmax: Memory<'a>,
    /// How many numbers.
    pub len: usize,
    /// Its own, for groups differ.
    pub rate: Rate,
}

/// Bytes of a tensor in the list on the GPU, as `struct Tensor` of `adamw.cu`.
pub const ROOM: usize = 80;

/// One step over all tensors, whose parameters and gradients are of one format.
///
/// `room` is for the list of them, [`ROOM`] bytes each, and is written. `maps` are the values of [`Map::signed`] and
/// [`Map::unsigned`] on the GPU.
pub fn step(
    tensors: &[Tensor<'_>],
    number: Number,
    betas: Betas,
    maps: (Memory<'_>, Memory<'_>),
    room: Memory<'_>,
    stream: &Stream,
) -> Result<()> {
    let most = blocks_at_once(stream)?;
    if let Some((list, launch)) = stepped(tensors, number, betas, maps, room, most)? {
        driver::device(stream.device())?.upload(&list, room.address(), stream)?;
        launch.run(stream)?;
    }
    Ok(())
}

pub(crate) fn stepped(
    tensors: &[Tensor<'_>],
    number: Number,
    betas: Betas,
    maps: (Memory<'_>, Memory<'_>),
    room: Memory<'_>,
    most: u64,
) -> Result<Option<(Vec<u8>, Launch)>> {
    room.holds("the list of tensors", tensors.len() * ROOM / 8, 8)?;
    let maps = (
        maps.0.holds("values of a map", 256, 4)?,
        maps.1.holds("values of a map", 256, 4)?,
    );
    let (mut list, mut blocks, mut count) = (Vec::with_capacity(room.bytes()), 0u64, 0u32);
    for it in tensors {
        let own = it.len.div_ceil(MOMENT_BLOCK);
        let long = [
            it.parameter.holds("a parameter", it.len, number.bytes())?,
            it.gradient.holds("a gradient", it.len, number.bytes())?,
            it.first.holds("first moments", it.len, 1)?,
            it.second.holds("second moments", it.len, 1)?,
            it.first_absmax.holds("scales of first moments", own, 4)?,
            it.second_absmax.holds("scales of second moments", own, 4)?,
            it.len as u64,
            blocks,
        ];
        if it.len == 0 {
            continue; // nothing begins with its first block
        }
        list.extend(long.into_iter().flat_map(u64::to_ne_bytes));
        let Rate { step, eps, decay } = it.rate;
        list.extend(
            [step, eps, decay, 0.0]
                .into_iter()
                .flat_map(f32::to_ne_bytes),
        );
        (blocks, count) = (blocks + own as u64, count + 1);
    }
    if blocks == 0 {
        return Ok(None);
    }
    let args = vec![
        Arg::Long(room.address()),
        Arg::Word(count),
        Arg::Long(blocks),
        Arg::Long(maps.0),
        Arg::Long(maps.1),
        Arg::Float(betas.0),
        Arg::Float(1.0 - betas.0),
        Arg::Float(betas.1),
        Arg::Float(1.0 - betas.1),
    ];
    let kernel = format!("adamw_{}", number.name());
    let warps = u64::from(THREADS) / 32;
    let launch = Launch::of(Source::AdamW, kernel, blocks, warps, most, args);
    Ok(Some((list, launch)))
}

/// The moments of a tensor in main memory.
#[derive(Debug, Clone, PartialEq)]
pub struct Moments {
    /// A code a number.
    pub first: Vec<u8>,
    /// A code a number.
    pub second: Vec<u8>,
    /// One for each [`MOMENT_BLOCK`].
    pub first_absmax: Vec<f32>,
    /// One for each [`MOMENT_BLOCK`].
    pub second_absmax: Vec<f32>,
}

impl Moments {
    /// Those of a tensor of `len` numbers that has not moved.
    pub fn new(len: usize) -> Moments {
        let blocks = len.div_ceil(MOMENT_BLOCK);
        Moments {
            first: vec![0; len],
            second: vec![0; len],
            first_absmax: vec![0.0; blocks],
            second_absmax: vec![0.0; blocks],
        }
    }
}

/// The same step on a processor, a number at a time: what the kernel is compared with. The slices are of one length.
pub fn step_scalar<T: Element>(
    parameter: &mut [T],
    gradient: &[T],
    moments: &mut Moments,
    betas: Betas,
    rate: Rate,
) {
    let blocks = parameter.chunks_mut(MOMENT_BLOCK);
    let blocks = blocks.zip(gradient.chunks(MOMENT_BLOCK));
    let first = moments.first.chunks_mut(MOMENT_BLOCK);
    let blocks = blocks.zip(first.zip(&mut moments.first_absmax));
    let second = moments.second.chunks_mut(MOMENT_BLOCK);
    let blocks = blocks.zip(second.zip(&mut moments.second_absmax));
    for (((p, g), (first, a1)), (second, a2)) in blocks {
        let finite: Vec<bool> = g.iter().map(|g| g.wide().is_finite()).collect();
        let moment = |code: u8, map: &Map, absmax: f32, beta: f32, part: f32| {
            map.values()[usize::from(code)] * absmax * beta + part
        };
        let mut m = vec![0f32; p.len()];
        let mut v = vec![0f32; p.len()];
        for i in (0..p.len()).filter(|i| finite[*i]) {
            let g = g[i].wide();
            m[i] = moment(first[i], Map::signed(), *a1, betas.0, (1.0 - betas.0) * g);
            let square = (1.0 - betas.1) * g * g;
            v[i] = moment(second[i], Map::unsigned(), *a2, betas.1, square);
            let far = m[i] / (v[i].sqrt() + rate.eps);
            let moved = T::round(p[i].wide() + rate.step * far);
            p[i] = T::round(moved.wide() * rate.decay);
        }
        *a1 = m.iter().fold(0f32, |most, it| most.max(it.abs()));
        *a2 = v.iter().fold(0f32, |most, it| most.max(it.abs()));
        first.copy_from_slice(&codes(&m, *a1, Map::signed()));
        second.copy_from_slice(&codes(&v, *a2, Map::unsigned()));
        for (code, m) in first.iter_mut().zip(m) {
            let below = Map::signed().values()[usize::from(*code)].is_sign_negative();
            if m > 0.0 && below {
                *code += 1;
            } else if m < 0.0 && !below {
                *code -= 1;
            }
        }
    }
}

/// The nearest of `moment / absmax`.
fn codes(moments: &[f32], absmax: f32, map: &Map) -> Vec<u8> {
    let mut quotients: Vec<f32> = moments.iter().map(|it| it / absmax).collect();
    quotients.push(1.0); // so that the quotients, which are not larger, are quantised as they are
    let block = quotients.len();
    let mut codes = quantise_blockwise(&quotients, map, block, Compat::Cuda).codes;
    codes.truncate(moments.len());
    codes
}

const _: () = assert!(MOMENT_BLOCK == NESTED_BLOCK); // `adamw.cu` and `quantise.cu` shift by eight
