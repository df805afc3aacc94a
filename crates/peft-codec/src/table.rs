//! The 16 values of a 4-bit type, and which number becomes which of them.

use std::fmt;

use crate::error::{Error, Result};

/// A 4-bit type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Type {
    /// 4-bit NormalFloat: quantiles of a normal distribution, with a zero (2305.14314).
    Nf4,
    /// A sign, and eight magnitudes in the order of their bit patterns.
    Fp4,
}

impl Type {
    /// As `bitsandbytes` writes it.
    pub fn name(self) -> &'static str {
        match self {
            Type::Nf4 => "nf4",
            Type::Fp4 => "fp4",
        }
    }

    /// The value of each code.
    pub fn table(self) -> &'static [f32; 16] {
        match self {
            Type::Nf4 => &NF4,
            Type::Fp4 => &FP4,
        }
    }
}

impl fmt::Display for Type {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.write_str(self.name())
    }
}

/// Which of the two behaviours of `bitsandbytes`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Compat {
    /// As its CUDA kernels: a block of zeros has code 0, a number that is none has code 0 and does not spoil its block.
    /// Reciprocals are IEEE's, where the kernels approximate them within one ulp.
    #[default]
    Cuda,
    /// As its CPU path: a block of zeros has the code of zero, a number that is none spoils its block.
    Cpu,
}

/// How many numbers share a scale: a power of two from 32 to 4096.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Block(usize);

impl Block {
    /// 64, which nearly all checkpoints have.
    pub const USUAL: Block = Block(64);

    /// A block of so many numbers.
    pub fn of(size: usize) -> Result<Block> {
        match size.is_power_of_two() && (32..=4096).contains(&size) {
            true => Ok(Block(size)),
            false => Err(Error::Block(size)),
        }
    }

    /// How many numbers.
    #[inline]
    pub fn size(self) -> usize {
        self.0
    }

    /// How many blocks `n` numbers make, the last one perhaps short.
    pub fn count(self, n: usize) -> usize {
        n.div_ceil(self.0)
    }
}

/// The decision: `order[#{ t < v }]`, and `nan` for what is no number.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Decision {
    /// In rising order; 15 and one that nothing exceeds.
    pub(crate) thresholds: [f32; 16],
    /// The codes in the order of their values.
    pub(crate) order: [u8; 16],
    /// Of what is no number.
    pub(crate) nan: u8,
    /// Whose it is.
    pub(crate) compat: Compat,
    /// The same for numbers from -1 to 1, if the thresholds are far enough apart.
    pub(crate) bins: Option<Bins>,
}

/// 31 bins of [-1, 1] with at most one threshold in each: a lookup and a comparison decide.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bins {
    /// Of each bin; where there is none, one that nothing exceeds.
    pub(crate) thresholds: [f32; 32],
    /// Of each bin, the code up to its threshold and that beyond.
    pub(crate) codes: [u8; 64],
}

impl Bins {
    /// Half of the bins, so that the rounded product is from -15 to 15.
    pub(crate) const SCALE: f32 = 15.4;
    /// Moves the rounded product, and 16, to the last bits of a number.
    pub(crate) const SHIFT: f32 = 8_388_624.0; // 2^23 + 16

    /// A number's bin. It rises with the number.
    fn bin(v: f32) -> usize {
        (v.mul_add(Bins::SCALE, Bins::SHIFT).to_bits() & 31) as usize
    }

    fn of(thresholds: &[f32; 15], order: &[u8; 16]) -> Option<Bins> {
        let bins = thresholds.map(Bins::bin);
        if bins.is_sorted_by(|a, b| a < b) {
            let mut it = Bins {
                thresholds: [f32::INFINITY; 32],
                codes: [0; 64],
            };
            for bin in 0..32 {
                let below = bins.iter().filter(|of| **of < bin).count();
                it.codes[2 * bin] = order[below];
                it.codes[2 * bin + 1] = order[(below + 1).min(15)];
            }
            bins.iter()
                .zip(thresholds)
                .for_each(|(bin, t)| it.thresholds[*bin] = *t);
            return Some(it);
        }
        None
    }
}

impl Decision {
    pub(crate) fn of(kind: Type, compat: Compat) -> Decision {
        let (thresholds, order) = match (kind, compat) {
            (Type::Nf4, _) => (NF4_THRESHOLDS, NF4_ORDER),
            (Type::Fp4, Compat::Cuda) => fp4_by_magnitude(),
            (Type::Fp4, Compat::Cpu) => fp4_by_value(),
        };
        let nan = match compat {
            Compat::Cuda => 0, // every comparison fails
            Compat::Cpu => order[15],
        };
        let mut all = [f32::INFINITY; 16];
        all[..15].copy_from_slice(&thresholds);
        Decision {
            thresholds: all,
            order,
            nan,
            compat,
            bins: Bins::of(&thresholds, &order),
        }
    }

    /// The code of a scaled number.
    pub(crate) fn code(&self, v: f32) -> u8 {
        if v.is_nan() {
            return self.nan;
        }
        let below = self.thresholds[..15].iter().filter(|t| **t < v).count();
        self.order[below]
    }
}

const fn floats<const N: usize>(bits: [u32; N]) -> [f32; N] {
    let mut out = [0.0; N];
    let mut i = 0;
    while i < N {
        out[i] = f32::from_bits(bits[i]);
        i += 1;
    }
    out
}

const NF4: [f32; 16] = floats([
    0xbf80_0000,
    0xbf32_39b1,
    0xbf06_6b30,
    0xbeca_32a0,
    0xbe91_a24d,
    0xbe3d_353f,
    0xbdba_7871,
    0x0000_0000,
    0x3da2_faff,
    0x3e24_cae3,
    0x3e7c_04dd,
    0x3ead_033a,
    0x3ee1_a4b8,
    0x3f10_07ab,
    0x3f39_13b3,
    0x3f80_0000,
]);

/// Half-way between neighbours, in fp32.
const NF4_THRESHOLDS: [f32; 15] = floats([
    0xbf59_1cd8,
    0xbf1c_5270,
    0xbeeb_8480,
    0xbead_ea76,
    0xbe70_3cec,
    0xbe0d_38bc,
    0xbd3a_7871,
    0x3d22_faff,
    0x3df6_4862,
    0x3e50_67e0,
    0x3e95_82d4,
    0x3ec7_53f9,
    0x3f00_6d04,
    0x3f24_8daf,
    0x3f5c_89da,
]);

const NF4_ORDER: [u8; 16] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];

/// Magnitudes 0, 1/192, 8/12, 1, 4/12, 6/12, 2/12, 3/12; code 8 is +0 as `bitsandbytes` stores it.
const FP4: [f32; 16] = floats([
    0x0000_0000,
    0x3baa_aaab,
    0x3f2a_aaab,
    0x3f80_0000,
    0x3eaa_aaab,
    0x3f00_0000,
    0x3e2a_aaab,
    0x3e80_0000,
    0x0000_0000,
    0xbbaa_aaab,
    0xbf2a_aaab,
    0xbf80_0000,
    0xbeaa_aaab,
    0xbf00_0000,
    0xbe2a_aaab,
    0xbe80_0000,
]);

/// Codes of the magnitudes in rising order.
const MAGNITUDES: [u8; 8] = [0, 1, 6, 7, 4, 5, 2, 3];

/// CUDA takes the sign away, compares the magnitude (a tie is the smaller one), and puts the sign back: a small negative
/// number is code 8. On the signed axis a tie below zero falls to the code above it, so these thresholds are one step lower.
fn fp4_by_magnitude() -> ([f32; 15], [u8; 16]) {
    const BETWEEN: [f32; 7] = floats([
        0x3b2a_aab9,
        0x3db0_0000,
        0x3e55_5555,
        0x3e95_5555,
        0x3ed5_5556,
        0x3f15_5550,
        0x3f55_5555,
    ]);
    let (mut thresholds, mut order) = ([0.0; 15], [0; 16]);
    for (i, between) in BETWEEN.into_iter().enumerate() {
        thresholds[8 + i] = between;
        thresholds[6 - i] = (-between).next_down();
    }
    thresholds[7] = 0f32.next_down();
    for (i, code) in MAGNITUDES.into_iter().enumerate() {
        order[8 + i] = code;
        order[7 - i] = code | 8;
    }
    (thresholds, order)
}

/// The CPU path looks for the signed value among all 16 in order, with both zeros in it.
fn fp4_by_value() -> ([f32; 15], [u8; 16]) {
    const ORDER: [u8; 16] = [11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3];
    let mut thresholds = [0.0; 15];
    for (i, t) in thresholds.iter_mut().enumerate() {
        let value = |at: usize| FP4[usize::from(ORDER[at])];
        *t = (value(i) + value(i + 1)) / 2.0;
    }
    (thresholds, ORDER)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// CRC-32 (IEEE), bit by bit.
    pub(crate) fn crc32(bytes: impl IntoIterator<Item = u8>) -> u32 {
        let step = |crc: u32, byte: u8| {
            (0..8).fold(crc ^ u32::from(byte), |crc, _| {
                (crc >> 1) ^ (0xedb8_8320 & (0u32.wrapping_sub(crc & 1)))
            })
        };
        !bytes.into_iter().fold(!0, step)
    }

    #[test]
    fn the_tables_are_those_of_bitsandbytes() {
        let crc = |it: Type| crc32(it.table().iter().flat_map(|x| x.to_le_bytes()));
        assert_eq!(crc(Type::Nf4), 0xc471_f81a);
        assert_eq!(crc(Type::Fp4), 0x0967_dbc3);
        for i in 0..15 {
            assert_eq!(NF4_THRESHOLDS[i], (NF4[i] + NF4[i + 1]) / 2.0);
        }
    }

    #[test]
    fn ties_signs_and_zeros_fall_as_each_side_has_them() {
        let cuda = Decision::of(Type::Fp4, Compat::Cuda);
        let cpu = Decision::of(Type::Fp4, Compat::Cpu);
        let tie = f32::from_bits(0x3db0_0000); // exact on both sides
        assert_eq!([cuda.code(tie), cuda.code(-tie)], [1, 9]);
        assert_eq!([cpu.code(tie), cpu.code(-tie)], [1, 14]);
        assert_eq!([cuda.code(0.0), cuda.code(-0.0)], [0, 0]);
        assert_eq!([cuda.code(1e-9), cuda.code(-1e-9)], [0, 8]);
        assert_eq!([cpu.code(1e-9), cpu.code(-1e-9), cpu.code(0.0)], [8, 0, 0]);
        assert_eq!([cuda.code(f32::NAN), cpu.code(f32::NAN)], [0, 3]);
        let nf4 = Decision::of(Type::Nf4, Compat::Cuda);
        assert!(nf4.bins.is_some() && cuda.bins.is_none() && cpu.bins.is_none());
        for i in 0..15u8 {
            let t = NF4_THRESHOLDS[usize::from(i)];
            assert_eq!([nf4.code(t), nf4.code(t.next_up())], [i, i + 1]);
        }
    }
}
