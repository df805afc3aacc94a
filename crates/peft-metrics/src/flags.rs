//! Several classes at once: each of them is a question with yes or no.
//!
//! ```text
//! macro, weighted   mean of the classes' scores
//! micro             of all decisions together
//! samples           mean over rows of the score of that row's set
//! exact             the part of rows whose whole set is right
//! hamming loss      the part of all decisions that is wrong
//! ```

use serde::{Deserialize, Serialize};

use crate::confusion::{Score, part};
use crate::error::{Error, Result, same};

/// Counts of right and wrong decisions for each class.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Flags {
    classes: Vec<String>,
    /// Right, wrongly said and missed, for each class.
    counts: Vec<(u64, u64, u64)>,
    rows: u64,
    exact: u64,
    samples: Score,
}

impl Flags {
    /// Counts decisions; both lists are `[rows, classes]`, row by row.
    pub fn of(classes: &[String], truth: &[bool], predicted: &[bool]) -> Result<Self> {
        same(truth.len(), predicted.len(), String::new)?;
        if classes.is_empty() {
            return Err(Error::Empty("classes"));
        }
        if truth.is_empty() {
            return Err(Error::Empty("rows"));
        }
        let n = classes.len();
        same(truth.len().div_ceil(n) * n, truth.len(), || {
            format!(" ({n} classes, so rows are of {n})")
        })?;
        let mut counts = vec![(0, 0, 0); n];
        let (mut rows, mut exact) = (0, 0);
        let mut samples = Vec::new();
        for (truth, said) in truth.chunks(n).zip(predicted.chunks(n)) {
            let mut row = (0, 0, 0);
            for (class, (truth, said)) in truth.iter().zip(said).enumerate() {
                match (truth, said) {
                    (true, true) => counts[class].0 += 1,
                    (false, true) => counts[class].1 += 1,
                    (true, false) => counts[class].2 += 1,
                    (false, false) => {}
                }
                row.0 += u64::from(*truth && *said);
                row.1 += u64::from(!*truth && *said);
                row.2 += u64::from(*truth && !*said);
            }
            rows += 1;
            exact += u64::from(truth == said);
            samples.push((Score::of(row.0, row.1, row.2), 1.0));
        }
        Ok(Self {
            classes: classes.to_vec(),
            counts,
            rows,
            exact,
            samples: Score::mean(samples.into_iter()),
        })
    }

    /// How well class `class` is told.
    ///
    /// # Panics
    ///
    /// Where there is no such class.
    pub fn class(&self, class: usize) -> Score {
        let (right, wrong, missed) = self.counts[class];
        Score::of(right, wrong, missed)
    }

    /// Every class as heavy as every other.
    pub fn macro_mean(&self) -> Score {
        Score::mean((0..self.classes.len()).map(|class| (self.class(class), 1.0)))
    }

    /// Every class as heavy as it is frequent.
    pub fn weighted_mean(&self) -> Score {
        let scores = (0..self.classes.len()).map(|class| self.class(class));
        Score::mean(scores.map(|score| (score, score.support as f64)))
    }

    /// All decisions together.
    pub fn micro(&self) -> Score {
        let sum =
            |all: (u64, u64, u64), it: &(u64, u64, u64)| (all.0 + it.0, all.1 + it.1, all.2 + it.2);
        let (right, wrong, missed) = self.counts.iter().fold((0, 0, 0), sum);
        Score::of(right, wrong, missed)
    }

    /// Every row as heavy as every other.
    pub fn samples(&self) -> Score {
        self.samples
    }

    /// The part of the rows whose whole set is right (scikit-learn's accuracy of such rows).
    pub fn exact(&self) -> f64 {
        part(self.exact, self.rows)
    }

    /// The part of all decisions that is wrong.
    pub fn hamming_loss(&self) -> f64 {
        let wrong: u64 = self
            .counts
            .iter()
            .map(|(_, wrong, missed)| wrong + missed)
            .sum();
        part(wrong, self.rows * self.classes.len() as u64)
    }

    /// A line for each class and for each mean.
    pub fn report(&self) -> String {
        let classes = (0..self.classes.len()).map(|at| (self.classes[at].as_str(), self.class(at)));
        let means = [
            ("micro mean", self.micro()),
            ("macro mean", self.macro_mean()),
            ("weighted mean", self.weighted_mean()),
            ("samples mean", self.samples()),
        ];
        crate::table::report(classes.collect(), None, &means)
    }
}
