//! Where an answer stands in a row, and which answer a model means.
//!
//! A context is cut into windows that overlap. In a window that holds the whole
//! answer the labels are
//!
//! ```text
//! start = the last token that begins at or before the answer's first byte
//! end   = the first token that ends at or after its last
//! ```
//!
//! and in any other both are the place of the class token (of the begin token,
//! or 0, where there is none), which then means "not here". This is what Hugging
//! Face's `run_qa.py` does, but for an answer that ends a context: there its
//! search for the start runs on over the special tokens after it.
//!
//! The way back looks at the best few starts and ends of every window of a
//! question and takes the pair with the highest sum of scores that is an answer
//! at all: within the context, not backwards, not too long.

use std::ops::Range;

use crate::error::{Error, Result};

/// A question of the data, with its answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// What is asked.
    pub question: String,
    /// Where the answer is to be found.
    pub context: String,
    /// The texts of the right answers; none where there is no answer.
    pub answers: Vec<String>,
}

/// The byte range of each token in the context; nothing for other tokens.
pub(crate) type Places = Vec<Option<(u32, u32)>>;

/// First and last token of the answer `bytes`, if all of it is in this window.
pub(crate) fn span(places: &Places, bytes: &Range<usize>) -> Option<(usize, usize)> {
    let inside = |at: usize| places[at].map(|(start, end)| (start as usize, end as usize));
    let first = (0..places.len()).find(|at| inside(*at).is_some())?;
    let last = (0..places.len()).rev().find(|at| inside(*at).is_some())?;
    let begins = |at: usize| inside(at).is_some_and(|(start, _)| start <= bytes.start);
    let ends = |at: usize| inside(at).is_some_and(|(_, end)| end >= bytes.end);
    if !begins(first) || !ends(last) {
        return None;
    }
    let start = (first..=last).take_while(|at| begins(*at)).last()?;
    let end = (first..=last).rev().take_while(|at| ends(*at)).last()?;
    Some((start, end))
}

/// How an answer is looked for in a model's scores.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Search {
    /// Starts and ends of each window that are tried.
    pub best: usize,
    /// The most tokens of an answer.
    pub max_answer_tokens: usize,
    /// Say "no answer" where its score beats the best answer's by more than this; never if not
    /// given.
    pub null_threshold: Option<f32>,
}

impl Default for Search {
    fn default() -> Self {
        Self {
            best: 20,
            max_answer_tokens: 30,
            null_threshold: None,
        }
    }
}

/// The answer that a model means.
#[derive(Debug, Clone, PartialEq)]
pub struct Found {
    /// Its text; empty where the model means that there is none.
    pub text: String,
    /// Its byte range in the context.
    pub bytes: Range<usize>,
    /// The sum of the scores of its start and its end.
    pub score: f32,
    /// The same of "no answer": the least that any window gives.
    pub null_score: f32,
}

/// One window with the scores that a model gives its tokens: `[tokens]` each, padding left out.
pub(crate) struct Scored<'a> {
    pub(crate) places: &'a Places,
    pub(crate) null: usize,
    pub(crate) starts: &'a [f32],
    pub(crate) ends: &'a [f32],
}

/// The best answer over all windows of a question.
pub(crate) fn search(context: &str, windows: &[Scored<'_>], how: &Search) -> Result<Found> {
    let mut best: Option<(f32, Range<usize>)> = None;
    let mut null_score = f32::INFINITY;
    for window in windows {
        let tokens = window.places.len();
        if window.starts.len() != tokens || window.ends.len() != tokens {
            return Err(Error::Option(format!(
                "{} and {} scores for a window of {tokens} tokens",
                window.starts.len(),
                window.ends.len()
            )));
        }
        null_score = null_score.min(window.starts[window.null] + window.ends[window.null]);
        for start in top(window.starts, how.best) {
            for end in top(window.ends, how.best) {
                if end < start || end - start >= how.max_answer_tokens {
                    continue;
                }
                let (Some(from), Some(to)) = (window.places[start], window.places[end]) else {
                    continue;
                };
                let score = window.starts[start] + window.ends[end];
                let bytes = from.0 as usize..to.1 as usize;
                if context.get(bytes.clone()).is_none_or(str::is_empty) {
                    continue;
                }
                if best.as_ref().is_none_or(|(known, _)| score > *known) {
                    best = Some((score, bytes));
                }
            }
        }
    }
    let none = |score: f32| Found {
        text: String::new(),
        bytes: 0..0,
        score,
        null_score,
    };
    Ok(match (best, how.null_threshold) {
        (None, _) => none(null_score),
        (Some((score, _)), Some(threshold)) if null_score - score > threshold => none(score),
        (Some((score, bytes)), _) => Found {
            text: context[bytes.clone()].to_owned(),
            bytes,
            score,
            null_score,
        },
    })
}

/// The places of the highest scores, the highest first; of equals the first.
fn top(scores: &[f32], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
    order.truncate(count);
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    /// [CLS] q [SEP] then "one two three" and [SEP].
    fn places() -> Places {
        vec![
            None,
            None,
            None,
            Some((0, 3)),
            Some((4, 7)),
            Some((8, 13)),
            None,
        ]
    }

    #[test]
    fn spans_of_answers() {
        assert_eq!(span(&places(), &(4..7)), Some((4, 4)));
        assert_eq!(span(&places(), &(0..13)), Some((3, 5)));
        // An answer that ends the context, where Python's search runs on.
        assert_eq!(span(&places(), &(8..13)), Some((5, 5)));
        // A part of a token is the whole token.
        assert_eq!(span(&places(), &(5..9)), Some((4, 5)));
        assert_eq!(span(&places(), &(8..14)), None);
        assert_eq!(span(&vec![None, None], &(0..1)), None);
    }

    #[test]
    fn the_best_answer_is_within_the_context_and_not_backwards() {
        let places = places();
        let starts = [9.0, 8.0, 0.0, 1.0, 2.0, 5.0, 0.0];
        let ends = [9.0, 8.0, 0.0, 1.0, 6.0, 0.0, 7.0];
        let window = [Scored {
            places: &places,
            null: 0,
            starts: &starts,
            ends: &ends,
        }];
        let found = search("one two three", &window, &Search::default()).unwrap();
        assert_eq!((found.text.as_str(), found.score), ("two", 8.0));
        assert_eq!(found.null_score, 18.0);
        let strict = Search {
            null_threshold: Some(0.0),
            ..Search::default()
        };
        assert_eq!(search("one two three", &window, &strict).unwrap().text, "");
        let short = [Scored {
            places: &places,
            null: 0,
            starts: &starts[1..],
            ends: &ends,
        }];
        assert!(search("one two three", &short, &strict).is_err());
    }
}
