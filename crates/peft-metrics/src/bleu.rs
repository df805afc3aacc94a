//! BLEU of a corpus, as sacreBLEU gives it: words by the rules of `13a`, case kept.
//!
//! ```text
//! pₙ   = n-grams of the answers that are in a reference (no oftener than there) / n-grams of the answers
//! BP   = 1 if the answers are as long as the closest references, else exp(1 − ref / answers)
//! BLEU = 100 · BP · (p₁ p₂ p₃ p₄)^¼
//! ```
//!
//! Where no n-gram is right, pₙ is 1/2, 1/4, … of one n-gram (`exp` smoothing), the
//! first time, the second, and so on. Sums go over the corpus before any
//! quotient, so this is not the mean of the sentences' BLEU.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result, same};

const ORDER: usize = 4;

/// BLEU and its parts.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Bleu {
    /// From 0 to 100.
    pub score: f64,
    /// p₁ to p₄, from 0 to 100.
    pub precisions: [f64; ORDER],
    /// The brevity penalty.
    pub brevity: f64,
    /// Words of the answers.
    pub length: usize,
    /// Words of the closest references.
    pub reference_length: usize,
}

/// BLEU of answers, each with one or more references.
pub fn bleu<T: AsRef<str>, A: AsRef<str>>(references: &[Vec<T>], answers: &[A]) -> Result<Bleu> {
    same(references.len(), answers.len(), String::new)?;
    if answers.is_empty() {
        return Err(Error::Empty("answers"));
    }
    let (mut right, mut all) = ([0_u64; ORDER], [0_u64; ORDER]);
    let (mut length, mut reference_length) = (0, 0);
    for (references, answer) in references.iter().zip(answers) {
        if references.is_empty() {
            return Err(Error::Empty("references"));
        }
        let answer = words(answer.as_ref());
        let references: Vec<Vec<String>> = references.iter().map(|it| words(it.as_ref())).collect();
        length += answer.len();
        let distance = |it: &usize| (it.abs_diff(answer.len()), *it);
        let lengths = references.iter().map(Vec::len);
        reference_length += lengths.min_by_key(distance).unwrap_or(0);
        for n in 1..=ORDER {
            let said = grams(&answer, n);
            let mut most: HashMap<&[String], u64> = HashMap::new();
            for reference in &references {
                for (gram, count) in grams(reference, n) {
                    let known = most.entry(gram).or_default();
                    *known = count.max(*known);
                }
            }
            for (gram, count) in said {
                all[n - 1] += count;
                right[n - 1] += count.min(most.get(gram).copied().unwrap_or(0));
            }
        }
    }
    let precisions = precisions(&right, &all);
    let brevity = match length {
        0 => 0.0,
        length if length >= reference_length => 1.0,
        length => (1.0 - reference_length as f64 / length as f64).exp(),
    };
    let score = match right.iter().any(|count| *count > 0) {
        true => brevity * (precisions.iter().map(|it| it.ln()).sum::<f64>() / ORDER as f64).exp(),
        false => 0.0,
    };
    Ok(Bleu {
        score,
        precisions,
        brevity,
        length,
        reference_length,
    })
}

fn precisions(right: &[u64; ORDER], all: &[u64; ORDER]) -> [f64; ORDER] {
    let mut precisions = [0.0; ORDER];
    if right.iter().all(|count| *count == 0) {
        return precisions;
    }
    let mut smoothing = 1.0;
    for n in 0..ORDER {
        // Answers too short for any n-gram of this order have no longer ones either.
        if all[n] == 0 {
            break;
        }
        precisions[n] = match right[n] {
            0 => {
                smoothing *= 2.0;
                100.0 / (smoothing * all[n] as f64)
            }
            right => 100.0 * right as f64 / all[n] as f64,
        };
    }
    precisions
}

fn grams(words: &[String], n: usize) -> HashMap<&[String], u64> {
    let mut counts = HashMap::new();
    for gram in words.windows(n) {
        *counts.entry(gram).or_default() += 1;
    }
    counts
}

/// The words of a text, by the rules of mteval-v13a.
fn words(text: &str) -> Vec<String> {
    let mut text = text
        .trim_end()
        .replace("<skipped>", "")
        .replace("-\n", "")
        .replace('\n', " ");
    if text.contains('&') {
        for (code, letter) in [
            ("&quot;", "\""),
            ("&amp;", "&"),
            ("&lt;", "<"),
            ("&gt;", ">"),
        ] {
            text = text.replace(code, letter);
        }
    }
    let mut spaced = String::from(" ");
    for letter in text.chars() {
        match letter {
            '{'..='~' | '['..='`' | ' '..='&' | '('..='+' | ':'..='@' | '/' => {
                spaced.extend([' ', letter, ' ']);
            }
            other => spaced.push(other),
        }
    }
    spaced.push(' ');
    let stop = |letter: char| matches!(letter, '.' | ',');
    let digit = |letter: char| letter.is_ascii_digit();
    // A stop is a word of its own, except between digits; a dash is one after a digit.
    let spaced = part(
        &spaced,
        |a, b| !digit(a) && stop(b),
        |a, b| format!("{a} {b} "),
    );
    let spaced = part(
        &spaced,
        |a, b| stop(a) && !digit(b),
        |a, b| format!(" {a} {b}"),
    );
    let spaced = part(
        &spaced,
        |a, b| digit(a) && b == '-',
        |a, b| format!("{a} {b} "),
    );
    spaced.split_whitespace().map(str::to_owned).collect()
}

/// Replaces pairs of letters from the left, none twice, as a regular expression does.
fn part(
    text: &str,
    found: impl Fn(char, char) -> bool,
    with: impl Fn(char, char) -> String,
) -> String {
    let letters: Vec<char> = text.chars().collect();
    let mut parted = String::with_capacity(text.len());
    let mut at = 0;
    while at < letters.len() {
        match letters.get(at + 1) {
            Some(next) if found(letters[at], *next) => {
                parted.push_str(&with(letters[at], *next));
                at += 2;
            }
            _ => {
                parted.push(letters[at]);
                at += 1;
            }
        }
    }
    parted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_13a() {
        let check = |text: &str, wanted: &str| assert_eq!(words(text).join(" "), wanted);
        check("Hello, world!", "Hello , world !");
        check("3.14 and 1,000.", "3.14 and 1,000 .");
        check("1990-2000 well-known", "1990 - 2000 well-known");
        check("a &quot;b&quot; (c)", "a \" b \" ( c )");
        check("don't", "don't");
        check("Wait... .5", "Wait . . . . 5");
    }

    #[test]
    fn a_text_is_itself() {
        let texts = ["The cat sat on the mat.", "It was a fine day, all said."];
        let references: Vec<Vec<&str>> = texts.iter().map(|it| vec![*it]).collect();
        let it = bleu(&references, &texts).unwrap();
        assert!((it.score - 100.0).abs() < 1e-9 && it.brevity == 1.0);
        assert_eq!(bleu(&references, &["", ""]).unwrap().score, 0.0);
    }
}
