//! How often each class was taken for which.
//!
//! ```text
//! precision = tp / (tp + fp)    recall = tp / (tp + fn)    F1 = 2·tp / (2·tp + fp + fn)
//! macro     = mean over the classes that occur
//! weighted  = mean over the same, each as often as it is true
//! micro     = of all decisions together; with one class a row, that is the accuracy
//! ```
//!
//! A quotient 0/0 is 0, and a class occurs if it is true or said anywhere:
//! scikit-learn's choices (`zero_division=0`, no `labels`), without its warnings.
//! A class that never occurs says nothing about a model, so it is in no mean.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result, same};

/// Counts of (true class, said class).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Confusion {
    classes: Vec<String>,
    /// `[classes, classes]`: the true class is the row.
    counts: Vec<u64>,
}

/// How well one class, or a mean of several, is told.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Score {
    /// Of what was said to be it, the part that is.
    pub precision: f64,
    /// Of what is it, the part that was said to be.
    pub recall: f64,
    /// The harmonic mean of both.
    pub f1: f64,
    /// How often it is true.
    pub support: u64,
}

impl Score {
    /// From the counts of right ones, of wrongly said and of missed ones.
    pub fn of(right: u64, wrong: u64, missed: u64) -> Self {
        Self {
            precision: part(right, right + wrong),
            recall: part(right, right + missed),
            f1: part(2 * right, 2 * right + wrong + missed),
            support: right + missed,
        }
    }

    /// The mean of some scores, each as heavy as it says.
    pub(crate) fn mean(scores: impl Iterator<Item = (Score, f64)>) -> Self {
        let (mut sum, mut weights) = (Score::default(), 0.0);
        for (score, weight) in scores {
            sum.precision += weight * score.precision;
            sum.recall += weight * score.recall;
            sum.f1 += weight * score.f1;
            sum.support += score.support;
            weights += weight;
        }
        if weights > 0.0 {
            sum.precision /= weights;
            sum.recall /= weights;
            sum.f1 /= weights;
        }
        sum
    }
}

/// A quotient, 0/0 being 0.
pub(crate) fn part(some: u64, all: u64) -> f64 {
    match all {
        0 => 0.0,
        all => some as f64 / all as f64,
    }
}

impl Confusion {
    /// Counts answers; both lists hold indices into `classes`.
    pub fn of(classes: &[String], truth: &[usize], predicted: &[usize]) -> Result<Self> {
        same(truth.len(), predicted.len(), String::new)?;
        let n = classes.len();
        let mut counts = vec![0; n * n];
        for (row, (truth, said)) in truth.iter().zip(predicted).enumerate() {
            for class in [*truth, *said] {
                if class >= n {
                    return Err(Error::Class {
                        row,
                        class,
                        classes: n,
                    });
                }
            }
            counts[truth * n + said] += 1;
        }
        if truth.is_empty() {
            return Err(Error::Empty("rows"));
        }
        Ok(Self {
            classes: classes.to_vec(),
            counts,
        })
    }

    /// The names of the classes.
    pub fn classes(&self) -> &[String] {
        &self.classes
    }

    /// How often class `truth` was said to be `said`.
    ///
    /// # Panics
    ///
    /// Where there is no such class, as an index out of a slice does.
    pub fn count(&self, truth: usize, said: usize) -> u64 {
        self.row(truth)[said]
    }

    /// What class `truth` was said to be.
    pub(crate) fn row(&self, truth: usize) -> &[u64] {
        let n = self.classes.len();
        &self.counts[truth * n..][..n]
    }

    /// All answers.
    pub fn total(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// The part of all answers that is right.
    pub fn accuracy(&self) -> f64 {
        let right = (0..self.classes.len()).map(|class| self.count(class, class));
        part(right.sum(), self.total())
    }

    /// How well class `class` is told: for two classes, what is called "binary" F1 of the one.
    ///
    /// # Panics
    ///
    /// Where there is no such class.
    pub fn class(&self, class: usize) -> Score {
        let right = self.count(class, class);
        let said: u64 = (0..self.classes.len())
            .map(|truth| self.count(truth, class))
            .sum();
        let truth: u64 = self.row(class).iter().sum();
        Score::of(right, said - right, truth - right)
    }

    /// Every class as heavy as every other.
    pub fn macro_mean(&self) -> Score {
        Score::mean(self.occurring().map(|score| (score, 1.0)))
    }

    /// Every class as heavy as it is frequent.
    pub fn weighted_mean(&self) -> Score {
        Score::mean(self.occurring().map(|score| (score, score.support as f64)))
    }

    /// All decisions together.
    pub fn micro(&self) -> Score {
        let right: u64 = (0..self.classes.len())
            .map(|class| self.count(class, class))
            .sum();
        let wrong = self.total() - right;
        Score::of(right, wrong, wrong)
    }

    /// The scores of the classes that are true or said anywhere.
    fn occurring(&self) -> impl Iterator<Item = Score> {
        (0..self.classes.len())
            .filter(|class| {
                let said = (0..self.classes.len()).any(|truth| self.count(truth, *class) > 0);
                said || self.row(*class).iter().any(|count| *count > 0)
            })
            .map(|class| self.class(class))
    }

    /// A line for each class and for each mean, as `classification_report` has them.
    pub fn report(&self) -> String {
        let classes = (0..self.classes.len()).map(|at| (self.classes[at].as_str(), self.class(at)));
        let means = [
            ("macro mean", self.macro_mean()),
            ("weighted mean", self.weighted_mean()),
        ];
        let accuracy = Some((self.accuracy(), self.total()));
        crate::table::report(classes.collect(), accuracy, &means)
    }

    /// The counts as text of at most 80 columns: see [`crate::Confusion::draw`] for a picture.
    pub fn table(&self) -> String {
        crate::table::confusion(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(n: usize) -> Vec<String> {
        (0..n).map(|at| format!("c{at}")).collect()
    }

    #[test]
    fn by_hand() {
        let seen = Confusion::of(&names(4), &[0, 0, 0, 1, 1, 2], &[0, 0, 1, 1, 0, 0]).unwrap();
        assert_eq!(seen.total(), 6);
        assert_eq!(seen.accuracy(), 0.5);
        assert_eq!(
            seen.class(0),
            Score {
                precision: 0.5,
                recall: 2.0 / 3.0,
                f1: 4.0 / 7.0,
                support: 3
            }
        );
        assert_eq!(
            seen.class(2),
            Score {
                precision: 0.0,
                recall: 0.0,
                f1: 0.0,
                support: 1
            }
        );
        // The fourth class does not occur and is in no mean.
        let f1 = [4.0 / 7.0, 0.5, 0.0];
        assert_eq!(seen.macro_mean().f1, f1.iter().sum::<f64>() / 3.0);
        assert_eq!(seen.micro().f1, seen.accuracy());
    }

    #[test]
    fn what_cannot_be_counted() {
        let error = |truth: &[usize], said: &[usize]| {
            Confusion::of(&names(2), truth, said)
                .unwrap_err()
                .to_string()
        };
        assert!(error(&[0], &[0, 1]).contains("2 answers for 1"));
        assert!(error(&[0, 2], &[0, 1]).contains("row 1 has class 2, there are 2"));
        assert!(error(&[], &[]).contains("no rows"));
    }
}
