//! 8 bits for a number: the index of the nearest of 256 values that are dense around zero.
//!
//! The values of a decade are as many as fit its weight: of 10⁻⁶ to 1 there are 1, 2, 4, … 64 steps, on both sides of zero or,
//! for what is never negative, twice as many on one. Optimiser states and the scales of 4-bit weights are kept so.

use std::sync::LazyLock;

use rayon::prelude::*;

use crate::{
    error::{Error, Result, length},
    nearest,
    table::Compat,
};

/// 256 values in rising order.
#[derive(Debug, Clone, PartialEq)]
pub struct Map([f32; 256]);

impl Map {
    /// For numbers of either sign.
    pub fn signed() -> &'static Map {
        static MAP: LazyLock<Map> = LazyLock::new(|| Map::dynamic(true));
        &MAP
    }

    /// For numbers that are not negative.
    pub fn unsigned() -> &'static Map {
        static MAP: LazyLock<Map> = LazyLock::new(|| Map::dynamic(false));
        &MAP
    }

    /// A map as a file holds it: 256 numbers, in order.
    pub fn of(values: &[f32]) -> Result<Map> {
        length("values of a map", 256, values.len())?;
        if !values.is_sorted() {
            // What is no number is not in order either.
            return Err(Error::State("the values of a map are not in order".into()));
        }
        let mut map = [0.0; 256];
        map.copy_from_slice(values);
        Ok(Map(map))
    }

    /// The values.
    pub fn values(&self) -> &[f32; 256] {
        &self.0
    }

    /// The bits are those of torch's `linspace`, which fuses multiplication and addition.
    fn dynamic(signed: bool) -> Map {
        let mut all = vec![0.0f32, 1.0];
        for decade in 0..7 {
            let scale = 10f64.powi(decade - 6) as f32;
            let steps = 1usize << (decade as usize + usize::from(!signed));
            let edge = |i: usize| -> f32 {
                let step = (1.0f32 - 0.1) / steps as f32;
                match i < steps.div_ceil(2) {
                    true => step.mul_add(i as f32, 0.1),
                    false => (-step).mul_add((steps - i) as f32, 1.0),
                }
            };
            for i in 0..steps {
                let middle = (edge(i) + edge(i + 1)) / 2.0 * scale;
                all.push(middle);
                if signed {
                    all.push(-middle);
                }
            }
        }
        all.sort_by(f32::total_cmp);
        let mut map = [0.0; 256];
        map.copy_from_slice(&all);
        Map(map)
    }

    /// The nearest value's index; between two, the even one (as the search of the CUDA kernels ends).
    pub(crate) fn nearest(&self, v: f32) -> u8 {
        if v.is_nan() {
            return 0; // every comparison fails
        }
        let map = &self.0;
        let above = map.partition_point(|it| *it < v); // the first that is not below
        let index = match above {
            0 => 0,
            256 => 255,
            i => {
                let middle = (map[i - 1] + map[i]) * 0.5;
                let tie = if i % 2 == 0 { i } else { i - 1 };
                match v.partial_cmp(&middle) {
                    Some(std::cmp::Ordering::Less) => i - 1,
                    Some(std::cmp::Ordering::Greater) => i,
                    _ => tie,
                }
            }
        };
        index as u8
    }

    /// For each of 65,536 bins of [-1, 1] the code of its middle, as the CPU path of `bitsandbytes` looks it up.
    fn bins(&self) -> Vec<u8> {
        let middles = (0u16..=65535).map(|i| -1.0 + 2.0 * f32::from(i) / 65535.0);
        middles.map(|it| self.nearest(it)).collect()
    }

    /// The code of the bin that a number falls into.
    pub(crate) fn binned(bins: &[u8], v: f32) -> u8 {
        let v = v.clamp(-1.0, 1.0);
        bins[((v + 1.0) * 0.5 * 65535.0 + 0.5) as usize & 0xffff]
    }
}

/// [`Map::bins`] of the signed map.
pub(crate) static SIGNED_BINS: LazyLock<Vec<u8>> = LazyLock::new(|| Map::signed().bins());
/// [`Map::bins`] of the unsigned map.
pub(crate) static UNSIGNED_BINS: LazyLock<Vec<u8>> = LazyLock::new(|| Map::unsigned().bins());

/// Numbers in 8 bits.
#[derive(Debug, Clone, PartialEq)]
pub struct Quantised {
    /// An index for each number.
    pub codes: Vec<u8>,
    /// The scale of each block.
    pub absmax: Vec<f32>,
}

/// Quantises to a map, `block` numbers sharing a scale.
pub fn quantise_blockwise(values: &[f32], map: &Map, block: usize, compat: Compat) -> Quantised {
    let block = block.max(1);
    let other;
    let bins: &[u8] = match compat {
        Compat::Cuda => &[],
        Compat::Cpu if map == Map::signed() => &SIGNED_BINS,
        Compat::Cpu if map == Map::unsigned() => &UNSIGNED_BINS,
        Compat::Cpu => {
            other = map.bins();
            &other
        }
    };
    let mut codes = vec![0; values.len()];
    let mut absmax = vec![0.0; values.len().div_ceil(block)];
    let blocks = values.par_chunks(block).zip(codes.par_chunks_mut(block));
    blocks
        .zip(&mut absmax)
        .for_each(|((values, codes), absmax)| {
            *absmax = values.iter().fold(0f32, |most, x| most.max(x.abs()));
            let scale = 1.0 / *absmax;
            let scaled = values.iter().map(|x| x * scale).zip(codes);
            match compat {
                Compat::Cpu if *absmax == 0.0 => scaled.for_each(|(_, code)| *code = 0),
                Compat::Cpu => scaled.for_each(|(v, code)| *code = Map::binned(bins, v)),
                Compat::Cuda if map == Map::signed() => nearest::signed(scaled),
                Compat::Cuda if map == Map::unsigned() => nearest::unsigned(scaled),
                Compat::Cuda => scaled.for_each(|(v, code)| *code = map.nearest(v)),
            }
        });
    Quantised { codes, absmax }
}

/// The way back: `map[code] · absmax`.
pub fn dequantise_blockwise(
    codes: &[u8],
    absmax: &[f32],
    map: &Map,
    block: usize,
    out: &mut [f32],
) -> Result<()> {
    let block = block.max(1);
    length("codes", out.len(), codes.len())?;
    length("scales", codes.len().div_ceil(block), absmax.len())?;
    let blocks = codes.par_chunks(block).zip(out.par_chunks_mut(block));
    blocks.zip(absmax).for_each(|((codes, out), absmax)| {
        for (code, out) in codes.iter().zip(out) {
            *out = map.0[usize::from(*code)] * absmax;
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::tests::crc32;

    #[test]
    fn the_maps_are_those_of_bitsandbytes() {
        let crc = |map: &Map| crc32(map.values().iter().flat_map(|x| x.to_le_bytes()));
        let signed = Map::signed().values();
        assert_eq!(
            (signed[0], signed[127], signed[255]),
            (-0.992_968_74, 0.0, 1.0)
        );
        assert_eq!(crc(Map::signed()), 0x1b13_7aeb);
        assert_eq!(crc(Map::unsigned()), 0xe871_278f);
    }

    #[test]
    fn the_nearest_is_found_and_ties_are_even() {
        let map = Map::signed();
        for i in 0..255usize {
            let (a, b) = (map.0[i], map.0[i + 1]);
            let middle = (a + b) * 0.5;
            let even = if i % 2 == 0 { i } else { i + 1 };
            assert_eq!(usize::from(map.nearest(middle)), even, "{i}");
            assert_eq!(usize::from(map.nearest(a)), i);
            assert_eq!(usize::from(map.nearest(middle.next_down())), i);
            assert_eq!(usize::from(map.nearest(middle.next_up())), i + 1);
        }
        assert_eq!(map.nearest(f32::NAN), 0);
        assert_eq!([map.nearest(-9.0), map.nearest(9.0)], [0, 255]);
    }

    #[test]
    fn a_map_of_a_file_is_checked() {
        assert!(Map::of(&[0.0; 255]).is_err());
        let mut values = *Map::signed().values();
        assert!(Map::of(&values).is_ok());
        values[3] = f32::NAN;
        assert!(Map::of(&values).is_err());
    }
}
