//! Rotary position embeddings (2104.09864) and the ways to stretch them.
//!
//! Component pair j of a head turns by position · θ_j, θ_j = base^(−2j/d). A
//! model that shall read further than it was trained turns slower: all pairs
//! (`linear`), by a larger base (`dynamic`), or only the pairs whose
//! wavelength is long (`llama3`, `yarn` 2309.00071). The formulas are those of
//! `transformers`, computed in fp32 as there.

use tch::{Device, Kind, Tensor};

/// The frequencies of one model.
#[derive(Debug, Clone)]
pub struct Rope {
    /// θ_j for `j` in `0..d/2`.
    frequencies: Vec<f32>,
    /// Factor on cos and sin (`yarn`).
    attention: f64,
    /// For `dynamic`: what is needed to compute the frequencies of a longer text.
    dynamic: Option<Dynamic>,
}

#[derive(Debug, Clone)]
struct Dynamic {
    theta: f64,
    factor: f64,
    max_positions: i64,
}

/// base^(−2j/d), each operation rounded to fp32 as torch does it.
fn frequencies(base: f64, d: i64) -> Vec<f32> {
    let exponents = Tensor::arange_start_step(0, d, 2, (Kind::Float, Device::Cpu)) / d;
    let powers = Tensor::from(base as f32).pow(&exponents);
    let inverse: Tensor = powers.reciprocal();
    Vec::try_from(inverse).expect("a vector of fp32")
}

impl Rope {
    fn fixed(frequencies: Vec<f32>, attention: f64) -> Rope {
        Rope {
            frequencies,
            attention,
            dynamic: None,
        }
    }

    /// Without scaling.
    pub fn plain(theta: f64, d: i64) -> Rope {
        Rope::fixed(frequencies(theta, d), 1.0)
    }

    /// Every position counts 1/factor.
    pub fn linear(theta: f64, d: i64, factor: f64) -> Rope {
        let scaled = frequencies(theta, d)
            .iter()
            .map(|f| f / factor as f32)
            .collect();
        Rope::fixed(scaled, 1.0)
    }

    /// A base that grows with the text once that is longer than `max_positions`.
    pub fn dynamic(theta: f64, d: i64, factor: f64, max_positions: i64) -> Rope {
        let dynamic = Dynamic {
            theta,
            factor,
            max_positions,
        };
        Rope {
            dynamic: Some(dynamic),
            ..Rope::plain(theta, d)
        }
    }

    /// Llama 3.1: long waves are stretched, short ones kept, with a ramp between.
    pub fn llama3(theta: f64, d: i64, factor: f64, low: f64, high: f64, original: i64) -> Rope {
        let (low, high, factor, original) =
            (low as f32, high as f32, factor as f32, original as f32);
        let stretch = |f: f32| {
            let wave = 2.0 * std::f32::consts::PI / f;
            if wave < original / high {
                f
            } else if wave > original / low {
                f / factor
            } else {
                let smooth = (original / wave - low) / (high - low);
                (1.0 - smooth) * f / factor + smooth * f
            }
        };
        Rope::fixed(
            frequencies(theta, d).into_iter().map(stretch).collect(),
            1.0,
        )
    }

    /// YaRN: a ramp from kept to stretched between two numbers of turns over the original context.
    pub fn yarn(
        theta: f64,
        d: i64,
        factor: f64,
        attention: f64,
        (fast, slow): (f64, f64),
        original: i64,
        truncate: bool,
    ) -> Rope {
        let dim = d as f64;
        let turns = |n: f64| {
            dim * (original as f64 / (n * 2.0 * std::f64::consts::PI)).ln() / (2.0 * theta.ln())
        };
        let (mut low, mut high) = (turns(fast), turns(slow));
        if truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, mut high) = (low.max(0.0), high.min(dim - 1.0));
        if low == high {
            high += 0.001;
        }
        let plain = frequencies(theta, d);
        let stretched = plain.iter().enumerate().map(|(j, &f)| {
            let ramp = ((j as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
            let keep = 1.0 - ramp;
            f / factor as f32 * (1.0 - keep) + f * keep
        });
        Rope::fixed(stretched.collect(), attention)
    }

    /// cos and sin for positions `[batch, seq]`, each `[batch, seq, d/2]` in fp32.
    pub fn tables(&self, positions: &Tensor) -> (Tensor, Tensor) {
        let device = positions.device();
        let frequencies = Tensor::from_slice(&self.frequencies_for(positions)).to_device(device);
        let angles = positions.to_kind(Kind::Float).unsqueeze(-1) * frequencies; // [batch, seq, d/2]
        (angles.cos() * self.attention, angles.sin() * self.attention)
    }

    fn frequencies_for(&self, positions: &Tensor) -> Vec<f32> {
        let Some(Dynamic {
            theta,
            factor,
            max_positions,
        }) = self.dynamic
        else {
            return self.frequencies.clone();
        };
        let length = positions.max().int64_value(&[]) + 1;
        if length <= max_positions {
            return self.frequencies.clone();
        }
        let d = 2 * self.frequencies.len() as i64;
        let stretch = factor * length as f64 / max_positions as f64 - (factor - 1.0);
        frequencies(theta * stretch.powf(d as f64 / (d - 2) as f64), d)
    }
}
