//! Merging task vectors: what several fine-tunings of one base have changed, made into one change.
//!
//! ```text
//! pruned    Tᵢ with the share `density` of its entries: the largest (TIES, 2306.01708), or some that are
//!           drawn, over density, so that the mean stays (DARE, 2311.03099)
//! elected   γ = sgn Σ Tᵢ, or sgn Σ sgn Tᵢ, entry by entry; where that is 0, +
//! merged    Σ wᵢ Tᵢ over those i whose sign is γ, over how many they are
//! ```
//!
//! Two tasks often pull an entry in opposite directions, and most of what each has changed hardly matters. A plain mean
//! pays for both. So the small changes go first, then each entry follows the majority alone.
//!
//! These are functions on tensors, whatever those belong to: the weights of a layer, factors, scales of (IA)³.

use std::{fmt, str::FromStr};

use peft_core::{Error, Result, nearest};
use tch::{Kind, Tensor};

/// How the sign of an entry is elected: `majority_sign_method`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MajoritySign {
    /// `total`: the sign of the sum.
    #[default]
    Total,
    /// `frequency`: the sign that more tasks have.
    Frequency,
}

impl FromStr for MajoritySign {
    type Err = Error;

    fn from_str(word: &str) -> Result<MajoritySign> {
        match word {
            "total" => Ok(MajoritySign::Total),
            "frequency" => Ok(MajoritySign::Frequency),
            _ => Err(Error::Config {
                peft_type: "LORA".to_owned(),
                reason: format!(
                    "majority_sign_method `{word}` is neither `total` nor `frequency`{}",
                    nearest(word, ["total", "frequency"])
                ),
            }),
        }
    }
}

impl fmt::Display for MajoritySign {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.write_str(match self {
            MajoritySign::Total => "total",
            MajoritySign::Frequency => "frequency",
        })
    }
}

/// The largest entries by magnitude, `⌊density · n⌋` of them, the others zero; density in 0..=1.
pub fn prune_magnitude(task: &Tensor, density: f64) -> Tensor {
    let flat = task.reshape([-1]);
    let keep = (density * flat.numel() as f64) as i64;
    let (_, largest) = flat.abs().topk(keep, 0, true, false);
    let mask = flat.zeros_like().index_fill(0, &largest, 1.0);
    (flat * mask).reshape(task.size())
}

/// Each entry with probability `density`, divided by it, else zero; density in 0..=1, except 0.
///
/// Which are kept depends on the seed and on nothing else: not on torch's generator, nor on the device.
pub fn prune_random(task: &Tensor, density: f64, seed: u64) -> Tensor {
    let mut draw = draws(seed);
    let kept: Vec<bool> = (0..task.numel()).map(|_| draw() < density).collect();
    let mask = Tensor::from_slice(&kept).to_device(task.device());
    task * mask.reshape(task.size()).to_kind(task.kind()) / density
}

/// Which entries have the elected sign; tasks: `[n, ..]` -> `[n, ..]` of booleans. Zeros have none.
pub fn elect_sign(tasks: &Tensor, method: MajoritySign) -> Tensor {
    let sign = tasks.sign();
    let kind = tasks.kind();
    let votes = match method {
        MajoritySign::Total => tasks.sum_dim_intlist(0, false, kind),
        MajoritySign::Frequency => sign.sum_dim_intlist(0, false, kind),
    };
    let elected = votes.ge(0.0).to_kind(kind) * 2.0 - 1.0;
    sign.eq_tensor(&elected)
}

/// The sum of the entries that `mask` lets in, over how many they are, at least 1; tasks, mask: `[n, ..]` -> `[..]`.
pub fn disjoint_merge(tasks: &Tensor, mask: &Tensor) -> Tensor {
    let kind = tasks.kind();
    let mask = mask.to_kind(kind);
    let count = mask.sum_dim_intlist(0, false, kind);
    (tasks * &mask).sum_dim_intlist(0, false, kind) / count.clamp_min(1.0)
}

/// Σ wᵢ Tᵢ
pub fn weighted_sum(tasks: &[Tensor], weights: &[f64]) -> Tensor {
    let kind = tasks.first().map_or(Kind::Float, Tensor::kind);
    weighted(tasks, weights).sum_dim_intlist(0, false, kind)
}

/// wᵢ Tᵢ, one behind the other `[n, ..]`.
pub(crate) fn weighted(tasks: &[Tensor], weights: &[f64]) -> Tensor {
    let each = tasks
        .iter()
        .zip(weights)
        .map(|(task, &weight)| task * weight);
    Tensor::stack(&each.collect::<Vec<_>>(), 0)
}

/// Numbers in 0..1 from a seed (SplitMix64).
fn draws(seed: u64) -> impl FnMut() -> f64 {
    let mut state = seed;
    move || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^= z >> 31;
        (z >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(numbers: &[f64]) -> Tensor {
        Tensor::from_slice(numbers)
    }

    fn same(actual: &Tensor, expected: &[f64]) {
        let actual: Vec<f64> = actual.to_kind(Kind::Double).try_into().unwrap();
        assert_eq!(actual.len(), expected.len());
        for (a, e) in actual.iter().zip(expected) {
            assert!((a - e).abs() < 1e-12, "{actual:?} is not {expected:?}");
        }
    }

    #[test]
    fn the_largest_stay() {
        let task = of(&[0.5, -3.0, 2.0, -0.1, 1.0]);
        same(&prune_magnitude(&task, 0.5), &[0.0, -3.0, 2.0, 0.0, 0.0]); // ⌊2.5⌋
        same(&prune_magnitude(&task, 1.0), &[0.5, -3.0, 2.0, -0.1, 1.0]);
        same(&prune_magnitude(&task, 0.0), &[0.0; 5]);
        let square = of(&[1.0, 2.0, 3.0, 4.0]).reshape([2, 2]);
        assert_eq!(prune_magnitude(&square, 0.25).size(), [2, 2]);
    }

    #[test]
    fn what_is_drawn_keeps_the_mean_and_follows_the_seed() {
        let task = Tensor::ones([20_000], (Kind::Double, tch::Device::Cpu));
        let pruned = prune_random(&task, 0.3, 7);
        let mean = pruned.mean(Kind::Double).double_value(&[]);
        assert!((mean - 1.0).abs() < 0.05, "{mean}");
        let values = (&pruned * 0.3 * (&pruned * 0.3 - 1.0)).abs().max();
        assert!(values.double_value(&[]) < 1e-12, "each is 0 or 1/density");
        assert!(pruned.equal(&prune_random(&task, 0.3, 7)));
        assert!(!pruned.equal(&prune_random(&task, 0.3, 8)));
        assert!(prune_random(&task, 1.0, 7).equal(&task));
    }

    #[test]
    fn the_majority_decides_each_entry() {
        let tasks = of(&[
            3.0, -1.0, 0.0, 2.0, -1.0, 1.0, 0.0, -2.0, -1.0, -1.0, 0.0, 0.0,
        ])
        .reshape([3, 4]);
        // sums 1, -1, 0, 0; signs -1, -1, 0, 0
        let total = elect_sign(&tasks, MajoritySign::Total);
        same(&disjoint_merge(&tasks, &total), &[3.0, -1.0, 0.0, 2.0]);
        let frequency = elect_sign(&tasks, MajoritySign::Frequency);
        same(&disjoint_merge(&tasks, &frequency), &[-1.0, -1.0, 0.0, 2.0]);
    }

    #[test]
    fn words() {
        for method in [MajoritySign::Total, MajoritySign::Frequency] {
            assert_eq!(method.to_string().parse::<MajoritySign>().unwrap(), method);
        }
        let message = "totl".parse::<MajoritySign>().unwrap_err().to_string();
        assert!(
            message.contains("`total`") && message.contains("totl"),
            "{message}"
        );
    }
}
