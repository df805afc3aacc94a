//! Which tokens are hidden from a model that learns to fill them in.
//!
//! Of all tokens but the special ones a part p is chosen. Of the chosen, 80 %
//! become the mask token, 10 % a random token, 10 % stay; the model is asked for
//! all of them and cannot tell which it sees right. A short row might come out
//! without any choice and teach nothing, so then one token is chosen, as BERT's
//! own data had one at least (`max(1, n·p)`).
//!
//! The choice is a pure function of (seed, epoch, row): a run that stops and goes
//! on hides the same tokens, whatever the batches are. Evaluation has one choice
//! for ever, so that its losses can be compared. The generator's stream is the
//! epoch, and rows lie 2²⁶ words apart in it, more than the longest row takes.

use rand_chacha::rand_core::Rng;

use crate::batch::{IGNORED, below, generator};

/// What masking needs to know.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Masking {
    pub(crate) probability: f64,
    pub(crate) seed: u64,
    pub(crate) mask_id: u32,
    pub(crate) vocab_size: usize,
    /// The ids that are never hidden, sorted.
    pub(crate) special: Vec<u32>,
}

/// The stream of evaluation; epochs count from 0.
pub(crate) const EVALUATION: u64 = u64::MAX - 1;
/// Told apart from the seed that shuffles.
const MASKS: u64 = 0x6d61_736b_6564_2d6c;
/// Words of the generator between two rows.
const ROW: u128 = 1 << 26;

impl Masking {
    /// Hides tokens of a row; the labels are the ids that were there, else [`IGNORED`].
    pub(crate) fn hide(&self, ids: &mut [i64], stream: u64, row: usize) -> Vec<i64> {
        let mut rng = generator(self.seed ^ MASKS, stream);
        rng.set_word_pos(row as u128 * ROW);
        let open: Vec<usize> = (0..ids.len())
            .filter(|at| !self.is_special(ids[*at]))
            .collect();
        let mut chosen: Vec<usize> = open
            .iter()
            .copied()
            .filter(|_| unit(rng.next_u64()) < self.probability)
            .collect();
        if chosen.is_empty() && !open.is_empty() {
            chosen.push(open[below(open.len() as u64, &mut rng) as usize]);
        }
        let mut labels = vec![IGNORED; ids.len()];
        for at in chosen {
            labels[at] = ids[at];
            ids[at] = match unit(rng.next_u64()) {
                it if it < 0.8 => i64::from(self.mask_id),
                it if it < 0.9 => below(self.vocab_size as u64, &mut rng) as i64,
                _ => ids[at],
            };
        }
        labels
    }

    fn is_special(&self, id: i64) -> bool {
        u32::try_from(id).is_ok_and(|id| self.special.binary_search(&id).is_ok())
    }
}

/// 53 random bits as a number from 0 up to 1.
fn unit(bits: u64) -> f64 {
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn masking(probability: f64) -> Masking {
        Masking {
            probability,
            seed: 7,
            mask_id: 4,
            vocab_size: 100,
            special: vec![0, 1, 2],
        }
    }

    #[test]
    fn parts_are_what_they_should_be() {
        let masking = masking(0.15);
        let original: Vec<i64> = (0..2000).map(|at| 5 + at % 95).collect();
        let (mut chosen, mut masked, mut kept) = (0, 0, 0);
        for row in 0..50 {
            let mut ids = original.clone();
            let labels = masking.hide(&mut ids, 3, row);
            for ((id, label), was) in ids.iter().zip(&labels).zip(&original) {
                if *label == IGNORED {
                    assert_eq!(id, was);
                    continue;
                }
                assert_eq!(label, was);
                chosen += 1;
                masked += usize::from(*id == 4);
                kept += usize::from(id == was);
            }
        }
        // Four standard deviations of the counts.
        let near = |count: usize, of: f64, part: f64| {
            (count as f64 - of * part).abs() < 4.0 * (of * part * (1.0 - part)).sqrt()
        };
        assert!(near(chosen, 100_000.0, 0.15), "{chosen}");
        assert!(near(masked, chosen as f64, 0.8 + 0.1 / 100.0), "{masked}");
        assert!(near(kept, chosen as f64, 0.1 + 0.1 / 100.0), "{kept}");
    }

    #[test]
    fn a_row_is_hidden_the_same_way_and_special_tokens_never() {
        let masking = masking(0.5);
        let original: Vec<i64> = vec![1, 7, 8, 9, 10, 11, 12, 2, 0, 0];
        let run = |stream: u64, row: usize| {
            let mut ids = original.clone();
            let labels = masking.hide(&mut ids, stream, row);
            (ids, labels)
        };
        assert_eq!(run(0, 5), run(0, 5));
        assert_ne!(run(0, 5), run(1, 5));
        assert_ne!(run(0, 5), run(0, 6));
        for row in 0..50 {
            let (ids, labels) = run(EVALUATION, row);
            for at in [0, 7, 8, 9] {
                assert_eq!((ids[at], labels[at]), (original[at], IGNORED));
            }
            assert!(labels.iter().any(|label| *label != IGNORED));
        }
    }
}
