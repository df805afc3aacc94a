//! Which rows go together in which order, and how they become a rectangle.
//!
//! A plan is a pure function of `(seed, epoch)`: nothing is carried from batch
//! to batch, so a run that stops in the middle goes on from a position
//! `(epoch, batch)` by computing that epoch's order anew. The generator is
//! ChaCha8 and the shuffle is written out here, because both are part of what
//! "the same seed" means: a library's next version must not change a run.
//!
//! Length grouping sorts by length inside windows of [`GROUP`] batches of the
//! shuffled order and then shuffles the batches: rows of a batch are alike, so
//! little is padding, and yet every epoch has other batches.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::error::{Error, Result};
use crate::prepare::Row;

/// The label of a position that does not count in the loss, as Hugging Face has it.
pub const IGNORED: i64 = -100;
/// Batches in one window of length grouping.
const GROUP: usize = 50;

/// On which side short rows are filled up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Side {
    /// After the row: for training.
    #[default]
    Right,
    /// Before the row: for generating from several prompts at once.
    Left,
}

/// Rows as a rectangle: each field is `[rows, cols]`, row by row.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Batch {
    /// How many rows.
    pub rows: usize,
    /// How many columns: the longest row, rounded up.
    pub cols: usize,
    /// Token ids, `[rows, cols]`.
    pub input_ids: Vec<i64>,
    /// 1 where there is a token, 0 where there is padding, `[rows, cols]`.
    pub attention_mask: Vec<i64>,
    /// The id itself where it is trained, else [`IGNORED`], `[rows, cols]`. Not
    /// shifted: position `i` is to be predicted from the ones before it.
    pub labels: Vec<i64>,
    /// Which rows of the data set these are; [`collate`] alone does not know.
    pub indices: Vec<usize>,
}

impl Batch {
    /// How many positions count in the loss: those with a label, but for the first of a row.
    pub fn trained_tokens(&self) -> usize {
        self.labels
            .chunks(self.cols.max(1))
            .flat_map(|row| row.iter().skip(1))
            .filter(|label| **label != IGNORED)
            .count()
    }
}

/// Lays rows out as a rectangle, its width a multiple of `multiple_of` (0 and 1: any).
pub fn collate(rows: &[Row<'_>], pad_id: u32, side: Side, multiple_of: usize) -> Batch {
    let longest = rows.iter().map(|row| row.ids.len()).max().unwrap_or(0);
    let cols = longest.next_multiple_of(multiple_of.max(1));
    let mut batch = Batch {
        rows: rows.len(),
        cols,
        input_ids: vec![i64::from(pad_id); rows.len() * cols],
        attention_mask: vec![0; rows.len() * cols],
        labels: vec![IGNORED; rows.len() * cols],
        indices: Vec::new(),
    };
    for (at, row) in rows.iter().enumerate() {
        let start = at * cols
            + match side {
                Side::Right => 0,
                Side::Left => cols - row.ids.len(),
            };
        for (i, id) in row.ids.iter().enumerate() {
            batch.input_ids[start + i] = i64::from(*id);
        }
        batch.attention_mask[start..start + row.ids.len()].fill(1);
        for [from, to] in row.trained {
            let run = start + *from as usize..start + (*to as usize).min(row.ids.len());
            if let Some(ids) = batch.input_ids.get(run.clone()) {
                batch.labels[run].copy_from_slice(ids);
            }
        }
    }
    batch
}

/// The batches of every epoch.
#[derive(Debug, Clone)]
pub struct Plan {
    rows: Vec<usize>,
    /// Lengths of `rows`, where batches are grouped by length.
    lengths: Option<Vec<usize>>,
    batch_size: usize,
    shuffle: bool,
    seed: u64,
}

impl Plan {
    /// Batches of `batch_size` of the given rows, in their order; the last may be smaller.
    pub fn new(rows: Vec<usize>, batch_size: usize, seed: u64) -> Result<Self> {
        if batch_size == 0 {
            return Err(Error::Option("a batch size of 0".into()));
        }
        if rows.is_empty() {
            return Err(Error::Option("no rows to make batches of".into()));
        }
        Ok(Self {
            rows,
            lengths: None,
            batch_size,
            shuffle: false,
            seed,
        })
    }

    /// The same in another order each epoch.
    pub fn shuffled(mut self) -> Self {
        self.shuffle = true;
        self
    }

    /// The same with rows of like length together; `lengths[i]` is that of row `i` of the data set.
    pub fn grouped_by_length(mut self, lengths: &[usize]) -> Result<Self> {
        let of = |row: &usize| {
            lengths.get(*row).copied().ok_or_else(|| {
                Error::Option(format!(
                    "row {row} has no length, there are {}",
                    lengths.len()
                ))
            })
        };
        self.lengths = Some(self.rows.iter().map(of).collect::<Result<_>>()?);
        Ok(self)
    }

    /// How many batches an epoch has.
    pub fn batches_per_epoch(&self) -> usize {
        self.rows.len().div_ceil(self.batch_size)
    }

    /// How many rows an epoch has.
    pub fn rows_per_epoch(&self) -> usize {
        self.rows.len()
    }

    /// The batches of an epoch: indices into the data set.
    ///
    /// To go on after `done` batches, skip that many of this list.
    pub fn epoch(&self, epoch: usize) -> Vec<Vec<usize>> {
        let mut rng = generator(self.seed, epoch as u64);
        let mut order: Vec<usize> = (0..self.rows.len()).collect();
        if self.shuffle {
            shuffle(&mut order, &mut rng);
        }
        if let Some(lengths) = &self.lengths {
            for window in order.chunks_mut(self.batch_size.saturating_mul(GROUP)) {
                window.sort_by_key(|at| std::cmp::Reverse(lengths[*at]));
            }
        }
        let rows = |batch: &[usize]| batch.iter().map(|at| self.rows[*at]).collect();
        let mut batches: Vec<Vec<usize>> = order.chunks(self.batch_size).map(rows).collect();
        if self.shuffle && self.lengths.is_some() {
            // The short last batch stays last, so that windows of accumulation stay whole.
            let whole = self.rows.len() / self.batch_size;
            shuffle(&mut batches[..whole], &mut rng);
        }
        batches
    }
}

/// How much of a data set is held out.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Holdout {
    /// This part of the rows, at least one and not all.
    Fraction(f64),
    /// This many rows.
    Count(usize),
}

/// Splits `n` rows at random into those to train on and those held out, each in order.
pub fn split(n: usize, holdout: Holdout, seed: u64) -> Result<(Vec<usize>, Vec<usize>)> {
    let count = match holdout {
        Holdout::Count(count) => count,
        Holdout::Fraction(part) if (0.0..1.0).contains(&part) => {
            // Within 0..n, since part is within 0..1.
            let count = (n as f64 * part).round() as usize;
            if part > 0.0 {
                count.clamp(1, n.saturating_sub(1).max(1))
            } else {
                0
            }
        }
        Holdout::Fraction(part) => {
            return Err(Error::Option(format!(
                "the held-out part must be from 0 up to 1, not {part}"
            )));
        }
    };
    if count >= n && count > 0 {
        return Err(Error::Option(format!(
            "{count} rows cannot be held out of {n}, one at least must be left to train on"
        )));
    }
    let mut order: Vec<usize> = (0..n).collect();
    shuffle(&mut order, &mut generator(seed, SPLIT));
    let mut held_out = order.split_off(n - count);
    order.sort_unstable();
    held_out.sort_unstable();
    Ok((order, held_out))
}

/// The stream of the generator that splits use; epochs use those from 0 on.
const SPLIT: u64 = u64::MAX;

pub(crate) fn generator(seed: u64, stream: u64) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(stream);
    rng
}

/// Fisher and Yates, from the end.
fn shuffle<T>(items: &mut [T], rng: &mut ChaCha8Rng) {
    for last in (1..items.len()).rev() {
        items.swap(last, below(last as u64 + 1, rng) as usize);
    }
}

/// A number below `n`, each as likely: the high half of a 128-bit product.
pub(crate) fn below(n: u64, rng: &mut ChaCha8Rng) -> u64 {
    let threshold = n.wrapping_neg() % n;
    loop {
        let product = u128::from(rng.next_u64()) * u128::from(n);
        if product as u64 >= threshold {
            return (product >> 64) as u64;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_means_the_same_for_ever() {
        let plan = Plan::new((0..10).collect(), 4, 7).unwrap().shuffled();
        assert_eq!(plan.epoch(0), plan.epoch(0));
        assert_ne!(plan.epoch(0), plan.epoch(1));
        let mut all: Vec<usize> = plan.epoch(3).concat();
        all.sort();
        assert_eq!(all, (0..10).collect::<Vec<_>>());
    }

    #[test]
    fn grouping_pads_less_and_loses_nothing() {
        let lengths: Vec<usize> = (0..1003).map(|i| 1 + (i * 7919) % 509).collect();
        let plain = Plan::new((0..1003).collect(), 8, 1).unwrap().shuffled();
        let grouped = plain.clone().grouped_by_length(&lengths).unwrap();
        let cells = |plan: &Plan| -> usize {
            let width = |batch: &Vec<usize>| batch.iter().map(|i| lengths[*i]).max().unwrap();
            plan.epoch(2)
                .iter()
                .map(|batch| width(batch) * batch.len())
                .sum()
        };
        let tokens: usize = lengths.iter().sum();
        assert!(cells(&grouped) < tokens * 11 / 10);
        assert!(cells(&plain) > tokens * 15 / 10);
        let mut all = grouped.epoch(2).concat();
        all.sort();
        assert_eq!(all, (0..1003).collect::<Vec<_>>());
        assert_eq!(grouped.epoch(2).last().unwrap().len(), 1003 % 8);
    }

    #[test]
    fn batches_are_rectangles() {
        let rows = [
            Row {
                ids: &[1, 2, 3],
                trained: &[[1, 3]],
            },
            Row {
                ids: &[4],
                trained: &[],
            },
        ];
        let right = collate(&rows, 9, Side::Right, 4);
        assert_eq!((right.rows, right.cols), (2, 4));
        assert_eq!(right.input_ids, [1, 2, 3, 9, 4, 9, 9, 9]);
        assert_eq!(right.attention_mask, [1, 1, 1, 0, 1, 0, 0, 0]);
        assert_eq!(right.labels, [-100, 2, 3, -100, -100, -100, -100, -100]);
        let left = collate(&rows, 9, Side::Left, 1);
        assert_eq!(left.input_ids, [1, 2, 3, 9, 9, 4]);
        assert_eq!(left.labels, [-100, 2, 3, -100, -100, -100]);
        assert_eq!(left.trained_tokens(), 2);
    }

    #[test]
    fn splits_are_disjoint_and_never_everything() {
        let (train, held_out) = split(100, Holdout::Fraction(0.1), 3).unwrap();
        assert_eq!((train.len(), held_out.len()), (90, 10));
        assert!(held_out.iter().all(|row| !train.contains(row)));
        assert_eq!(split(100, Holdout::Fraction(0.1), 3).unwrap().1, held_out);
        assert_ne!(split(100, Holdout::Count(10), 4).unwrap().1, held_out);
        assert!(split(5, Holdout::Count(5), 0).is_err());
        assert!(split(5, Holdout::Fraction(1.0), 0).is_err());
        assert!(split(5, Holdout::Fraction(f64::NAN), 0).is_err());
        assert!(split(5, Holdout::Fraction(0.0), 0).unwrap().1.is_empty());
    }
}
