//! To 4 bits.
//!
//! Two numbers make a byte, the first in the high half. Blocks are cut out of the flat tensor; only the last may be short.

use rayon::prelude::*;

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use crate::simd;
use crate::{
    element::Element,
    error::{Result, length},
    table::{Block, Compat, Decision, Type},
    view::{Scales, View},
};

/// Which instructions compute. All levels give the same bits, but for [`View::multiply`], whose sums have another order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Level {
    /// One number at a time: what the others are compared with.
    Scalar,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// And BF16, VBMI and VBMI2.
    Avx512Bf16,
    /// NEON, which every processor of 64-bit Arm has.
    Neon,
}

impl Level {
    /// The best of this processor.
    pub fn best() -> Level {
        *Level::all().last().unwrap_or(&Level::Scalar)
    }

    /// All that this processor has, the slowest first.
    pub fn all() -> Vec<Level> {
        let mut all = vec![Level::Scalar];
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            if has!("avx2") && has!("f16c") && has!("fma") {
                all.push(Level::Avx2);
                if has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl") {
                    all.push(Level::Avx512);
                    if has!("avx512bf16") && has!("avx512vbmi") && has!("avx512vbmi2") {
                        all.push(Level::Avx512Bf16);
                    }
                }
            }
        }
        if cfg!(all(target_arch = "aarch64", target_endian = "little")) {
            all.push(Level::Neon);
        }
        all
    }

    /// This one, or the best, where the processor does not have it.
    pub(crate) fn here(self) -> Level {
        match Level::all().contains(&self) {
            true => self,
            false => Level::best(),
        }
    }
}

/// A tensor in 4 bits.
#[derive(Debug, Clone, PartialEq)]
pub struct Packed {
    /// Two codes a byte, `⌈n / 2⌉`.
    pub bytes: Vec<u8>,
    /// The scale of each block.
    pub absmax: Vec<f32>,
}

/// Numbers in a piece of work of one core.
pub(crate) const PIECE: usize = 1 << 16;

/// Quantises a flat tensor.
pub fn quantise<T: Element>(values: &[T], kind: Type, block: Block, compat: Compat) -> Packed {
    quantise_at(Level::best(), values, kind, block, compat)
}

/// [`quantise`] with given instructions, which the processor must have ([`Level::all`]); others are replaced by its best.
pub fn quantise_at<T: Element>(
    level: Level,
    values: &[T],
    kind: Type,
    block: Block,
    compat: Compat,
) -> Packed {
    let level = level.here();
    let decision = Decision::of(kind, compat);
    let mut bytes = vec![0; values.len().div_ceil(2)];
    let mut absmax = vec![0.0; block.count(values.len())];
    let pieces = values
        .par_chunks(PIECE)
        .zip(bytes.par_chunks_mut(PIECE / 2));
    let pieces = pieces.zip(absmax.par_chunks_mut(PIECE / block.size()));
    pieces.for_each(|((values, bytes), absmax)| {
        encode_blocks(level, &decision, values, block, bytes, absmax);
    });
    Packed { bytes, absmax }
}

/// Quantises whole blocks of a tensor, or its end, on the caller's core.
pub fn quantise_piece<T: Element>(
    values: &[T],
    kind: Type,
    block: Block,
    compat: Compat,
    bytes: &mut [u8],
    absmax: &mut [f32],
) -> Result<()> {
    length("packed bytes", values.len().div_ceil(2), bytes.len())?;
    length("scales", block.count(values.len()), absmax.len())?;
    let decision = Decision::of(kind, compat);
    encode_blocks(Level::best(), &decision, values, block, bytes, absmax);
    Ok(())
}

fn encode_blocks<T: Element>(
    level: Level,
    decision: &Decision,
    values: &[T],
    block: Block,
    bytes: &mut [u8],
    absmax: &mut [f32],
) {
    let blocks = values.chunks(block.size());
    let blocks = blocks.zip(bytes.chunks_mut(block.size() / 2)).zip(absmax);
    for ((values, bytes), absmax) in blocks {
        *absmax = encode(level, decision, values, bytes, block.size());
    }
}

/// Quantises one block and gives its scale.
#[inline]
fn encode<T: Element>(
    level: Level,
    decision: &Decision,
    values: &[T],
    bytes: &mut [u8],
    size: usize,
) -> f32 {
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    if level > Level::Scalar && values.len() == size {
        // Nothing unusual in it, or the scalar form has to decide.
        if let Some(absmax) = simd::encode(level, decision, values, bytes) {
            return absmax;
        }
    }
    let _ = level;
    encode_scalar(decision, values, bytes, size)
}

fn encode_scalar<T: Element>(
    decision: &Decision,
    values: &[T],
    bytes: &mut [u8],
    size: usize,
) -> f32 {
    let magnitudes = values.iter().map(|it| it.wide().abs());
    let compat = decision.compat;
    let mut absmax = match compat {
        Compat::Cuda => magnitudes.fold(0.0, f32::max), // of a number and of what is none it takes the number
        Compat::Cpu => magnitudes.fold(0.0, |a: f32, b| if a.is_nan() || b <= a { a } else { b }),
    };
    let short = values.len() < size;
    let scaled: &dyn Fn(f32) -> f32 = match compat {
        Compat::Cuda => {
            let scale = 1.0 / absmax;
            &move |x| x * scale
        }
        Compat::Cpu if short => {
            if absmax < SMALLEST {
                absmax = SMALLEST; // and so it is stored
            }
            &move |x| (x / absmax).clamp(-1.0, 1.0)
        }
        Compat::Cpu => {
            let least = if absmax < SMALLEST { SMALLEST } else { absmax };
            let scale = 1.0 / least;
            &move |x| (x * scale).clamp(-1.0, 1.0)
        }
    };
    let code = |x: f32| decision.code(scaled(x));
    for (pair, byte) in values.chunks(2).zip(bytes) {
        let second = match pair.get(1) {
            Some(x) => code(x.wide()),
            None => match compat {
                Compat::Cuda => code(0.0),         // the lane beyond the end holds zero
                Compat::Cpu => decision.code(0.0), // the scaled numbers are padded
            },
        };
        *byte = code(pair[0].wide()) << 4 | second;
    }
    absmax
}

/// Vector forms leave scales below this, or not finite, to the scalar one: their reciprocals are no ordinary numbers.
pub(crate) const LEAST: f32 = 1e-30;

/// Below this the CPU path takes a scale for this.
const SMALLEST: f32 = 1e-38;

/// Decodes into `out`, which has as many numbers as were quantised.
pub fn dequantise<T: Element>(
    bytes: &[u8],
    absmax: &[f32],
    kind: Type,
    block: Block,
    out: &mut [T],
) -> Result<()> {
    dequantise_at(Level::best(), bytes, absmax, kind, block, out)
}

/// [`dequantise`] with given instructions, which the processor must have ([`Level::all`]); others are replaced by its best.
pub fn dequantise_at<T: Element>(
    level: Level,
    bytes: &[u8],
    absmax: &[f32],
    kind: Type,
    block: Block,
    out: &mut [T],
) -> Result<()> {
    let scales = Scales::Plain(absmax);
    let view = View::new(bytes, scales, kind.table(), block, out.len())?;
    view.at(level).dequantise(out)
}
