//! Numbers that were to be predicted: errors, and whether they go up together.
//!
//! ```text
//! mse = mean (x − y)²      mae = mean |x − y|      r² = 1 − Σ(x − y)² / Σ(x − x̄)²
//! pearson  = Σ(x − x̄)(y − ȳ) / √(Σ(x − x̄)² · Σ(y − ȳ)²)
//! spearman = pearson of the ranks, equal numbers sharing the mean of theirs
//! ```
//!
//! A correlation with something constant does not exist, so it is not a number
//! here but nothing.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result, same};

/// How far predicted numbers are from true ones.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Numbers {
    /// Mean squared error.
    pub mse: f64,
    /// Mean absolute error.
    pub mae: f64,
    /// The part of the variance that is explained; nothing where there is no variance.
    pub r2: Option<f64>,
    /// Linear correlation.
    pub pearson: Option<f64>,
    /// Correlation of ranks.
    pub spearman: Option<f64>,
}

impl Numbers {
    /// Compares numbers.
    pub fn of(truth: &[f64], predicted: &[f64]) -> Result<Self> {
        same(truth.len(), predicted.len(), String::new)?;
        if truth.is_empty() {
            return Err(Error::Empty("rows"));
        }
        let n = truth.len() as f64;
        let off = || truth.iter().zip(predicted).map(|(x, y)| x - y);
        let squares: f64 = off().map(|it| it * it).sum();
        let spread: f64 = {
            let mean = mean(truth);
            truth.iter().map(|it| (it - mean).powi(2)).sum()
        };
        Ok(Self {
            mse: squares / n,
            mae: off().map(f64::abs).sum::<f64>() / n,
            r2: (spread > 0.0).then(|| 1.0 - squares / spread),
            pearson: pearson(truth, predicted),
            spearman: pearson(&ranks(truth), &ranks(predicted)),
        })
    }

    /// The root of the mean squared error.
    pub fn rmse(&self) -> f64 {
        self.mse.sqrt()
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

fn pearson(xs: &[f64], ys: &[f64]) -> Option<f64> {
    let constant = |values: &[f64]| values.iter().all(|it| *it == values[0]);
    if constant(xs) || constant(ys) {
        return None;
    }
    let (x0, y0) = (mean(xs), mean(ys));
    let (mut xx, mut xy, mut yy) = (0.0, 0.0, 0.0);
    for (x, y) in xs.iter().zip(ys) {
        xx += (x - x0) * (x - x0);
        xy += (x - x0) * (y - y0);
        yy += (y - y0) * (y - y0);
    }
    let r = xy / (xx.sqrt() * yy.sqrt());
    r.is_finite().then(|| r.clamp(-1.0, 1.0))
}

/// Ranks from 1, equal numbers sharing the mean of theirs.
fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*a].total_cmp(&values[*b]));
    let mut ranks = vec![0.0; values.len()];
    let mut start = 0;
    while start < order.len() {
        let same = order[start..]
            .iter()
            .take_while(|at| values[**at] == values[order[start]]);
        // A value that equals nothing, not even itself, is alone.
        let end = start + same.count().max(1);
        for at in &order[start..end] {
            ranks[*at] = (start + end + 1) as f64 / 2.0;
        }
        start = end;
    }
    ranks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_shared() {
        assert_eq!(ranks(&[3.0, 1.0, 3.0, 2.0]), [3.5, 1.0, 3.5, 2.0]);
        assert_eq!(ranks(&[f64::NAN, 1.0]), [2.0, 1.0]);
    }

    #[test]
    fn constants_have_no_correlation() {
        let it = Numbers::of(&[1.0, 2.0], &[5.0, 5.0]).unwrap();
        assert_eq!((it.pearson, it.spearman, it.mse), (None, None, 12.5));
        assert_eq!(Numbers::of(&[1.0, 1.0], &[1.0, 2.0]).unwrap().r2, None);
    }
}
