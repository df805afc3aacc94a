//! ROUGE-1, ROUGE-2 and ROUGE-L, as rouge-score gives them without a stemmer.
//!
//! ```text
//! ROUGE-n   common n-grams of answer and reference, as bags
//! ROUGE-L   their longest common subsequence of words
//! precision = common / of the answer    recall = common / of the reference    F = 2PR / (P + R)
//! ```
//!
//! Of several references the one with the best F counts, for each number on its
//! own; over a corpus it is the mean. Words are what rouge-score takes for words:
//! runs of `a-z` and `0-9` after lower-casing, so `für` is `f` and `r` and a
//! Greek text has none. [`Words::Unicode`] counts all letters, and is what one
//! wants for any language but English; only numbers to be compared with
//! published ones need [`Words::Ascii`].

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result, same};

/// What a word is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Words {
    /// Runs of `a-z` and `0-9`, as in rouge-score.
    #[default]
    Ascii,
    /// Runs of letters and digits of any script.
    Unicode,
}

/// How much two texts have in common.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Overlap {
    /// The part of the answer that is in the reference.
    pub precision: f64,
    /// The part of the reference that is in the answer.
    pub recall: f64,
    /// The harmonic mean of both.
    pub f: f64,
}

impl Overlap {
    fn of(common: usize, answer: usize, reference: usize) -> Self {
        let precision = common as f64 / answer.max(1) as f64;
        let recall = common as f64 / reference.max(1) as f64;
        let f = match precision + recall {
            0.0 => 0.0,
            sum => 2.0 * precision * recall / sum,
        };
        Self {
            precision,
            recall,
            f,
        }
    }
}

/// The means over a corpus.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Rouge {
    /// Of words.
    pub rouge1: Overlap,
    /// Of pairs of words.
    pub rouge2: Overlap,
    /// Of the longest common subsequence.
    pub rouge_l: Overlap,
}

/// ROUGE of answers, each with one or more references.
pub fn rouge<T: AsRef<str>, A: AsRef<str>>(
    references: &[Vec<T>],
    answers: &[A],
    kind: Words,
) -> Result<Rouge> {
    same(references.len(), answers.len(), String::new)?;
    if answers.is_empty() {
        return Err(Error::Empty("answers"));
    }
    let mut sum = Rouge::default();
    for (references, answer) in references.iter().zip(answers) {
        if references.is_empty() {
            return Err(Error::Empty("references"));
        }
        let answer = words(answer.as_ref(), kind);
        let mut best = Rouge::default();
        for reference in references {
            let reference = words(reference.as_ref(), kind);
            better(&mut best.rouge1, of_grams(&reference, &answer, 1));
            better(&mut best.rouge2, of_grams(&reference, &answer, 2));
            let common = longest_common(&reference, &answer);
            better(
                &mut best.rouge_l,
                Overlap::of(common, answer.len(), reference.len()),
            );
        }
        add(&mut sum.rouge1, best.rouge1, answers.len());
        add(&mut sum.rouge2, best.rouge2, answers.len());
        add(&mut sum.rouge_l, best.rouge_l, answers.len());
    }
    Ok(sum)
}

fn better(best: &mut Overlap, it: Overlap) {
    if it.f > best.f {
        *best = it;
    }
}

fn add(sum: &mut Overlap, it: Overlap, of: usize) {
    sum.precision += it.precision / of as f64;
    sum.recall += it.recall / of as f64;
    sum.f += it.f / of as f64;
}

fn words(text: &str, kind: Words) -> Vec<String> {
    let text = text.to_lowercase();
    let parts = text.split(|letter: char| match kind {
        Words::Ascii => !(letter.is_ascii_lowercase() || letter.is_ascii_digit()),
        // A combining mark is part of its letter.
        Words::Unicode => !(letter.is_alphanumeric() || ('\u{300}'..='\u{36f}').contains(&letter)),
    });
    parts
        .filter(|it| !it.is_empty())
        .map(str::to_owned)
        .collect()
}

fn of_grams(reference: &[String], answer: &[String], n: usize) -> Overlap {
    let mut left: HashMap<&[String], usize> = HashMap::new();
    for gram in reference.windows(n) {
        *left.entry(gram).or_default() += 1;
    }
    let mut common = 0;
    for gram in answer.windows(n) {
        if let Some(count) = left.get_mut(gram).filter(|count| **count > 0) {
            *count -= 1;
            common += 1;
        }
    }
    let grams = |words: &[String]| (words.len() + 1).saturating_sub(n);
    Overlap::of(common, grams(answer), grams(reference))
}

/// The length of the longest common subsequence: a row of the table at a time.
fn longest_common(a: &[String], b: &[String]) -> usize {
    let mut row = vec![0; b.len() + 1];
    for word in a {
        let mut diagonal = 0;
        for (at, other) in b.iter().enumerate() {
            let above = row[at + 1];
            row[at + 1] = match word == other {
                true => diagonal + 1,
                false => above.max(row[at]),
            };
            diagonal = above;
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_hand() {
        let it = rouge(
            &[vec!["the cat sat on the mat"]],
            &["the cat on a mat"],
            Words::Ascii,
        )
        .unwrap();
        assert_eq!(it.rouge1, Overlap::of(4, 5, 6));
        assert_eq!(it.rouge2, Overlap::of(1, 4, 5));
        assert_eq!(it.rouge_l, Overlap::of(4, 5, 6));
        assert_eq!(
            rouge(&[vec![""]], &["a"], Words::Ascii).unwrap(),
            Rouge::default()
        );
    }

    #[test]
    fn letters_of_other_scripts() {
        let greek = |kind| rouge(&[vec!["καλή μέρα"]], &["μέρα καλή"], kind).unwrap();
        assert_eq!(greek(Words::Ascii).rouge1.f, 0.0);
        assert_eq!(
            (
                greek(Words::Unicode).rouge1.f,
                greek(Words::Unicode).rouge_l.f
            ),
            (1.0, 0.5)
        );
    }
}
