//! Scales in 8 bits: `absmax ≈ map[code] · absmax₂ + offset`.
//!
//! The scales of 4-bit blocks are all positive and of like size; less their mean they spread around zero, where the map is dense.

use crate::{
    error::Result,
    map::{Map, Quantised, dequantise_blockwise, quantise_blockwise},
    table::Compat,
};

/// How many scales share one.
pub const NESTED_BLOCK: usize = 256;

/// The scales of a tensor, quantised once more.
#[derive(Debug, Clone, PartialEq)]
pub struct Nested {
    /// An index for each block of the tensor.
    pub codes: Vec<u8>,
    /// A scale for each [`NESTED_BLOCK`] of them.
    pub absmax: Vec<f32>,
    /// The mean of all scales.
    pub offset: f32,
    /// What an index means.
    pub map: Map,
}

impl Nested {
    /// Quantises scales. The mean is computed in fp64 and rounded.
    pub fn of(absmax: &[f32], compat: Compat) -> Nested {
        let sum: f64 = absmax.iter().map(|it| f64::from(*it)).sum();
        let offset = match absmax.is_empty() {
            true => 0.0,
            false => (sum / absmax.len() as f64) as f32,
        };
        Nested::around(absmax, offset, compat)
    }

    /// The same around a given mean.
    pub fn around(absmax: &[f32], offset: f32, compat: Compat) -> Nested {
        let less: Vec<f32> = absmax.iter().map(|it| it - offset).collect();
        let map = Map::signed();
        let Quantised { codes, absmax } = quantise_blockwise(&less, map, NESTED_BLOCK, compat);
        Nested {
            codes,
            absmax,
            offset,
            map: map.clone(),
        }
    }

    /// The scales: a product and a sum, each rounded.
    pub fn absmax(&self) -> Result<Vec<f32>> {
        let mut out = vec![0.0; self.codes.len()];
        dequantise_blockwise(&self.codes, &self.absmax, &self.map, NESTED_BLOCK, &mut out)?;
        out.iter_mut().for_each(|it| *it += self.offset);
        Ok(out)
    }
}
