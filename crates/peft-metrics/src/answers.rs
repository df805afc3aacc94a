//! Answers that are pieces of a text: SQuAD's exact match and F1.
//!
//! Both compare what is left of an answer in small letters, without ASCII
//! punctuation, without `a`, `an` and `the` as words, its blanks made single. F1
//! is that of the two bags of words. Of several right answers the best counts,
//! and no right answer at all means that the right one is empty. If either side
//! is empty, F1 is 1 where both are and 0 otherwise.

use std::collections::HashMap;

use crate::confusion::part;

/// 1 where the answer is one of the right ones, else 0.
pub fn exact_match<T: AsRef<str>>(right: &[T], answer: &str) -> f64 {
    let answer = plain(answer);
    best(right, |right| f64::from(right == answer))
}

/// How well the answer's words are those of the best of the right ones.
pub fn answer_f1<T: AsRef<str>>(right: &[T], answer: &str) -> f64 {
    let answer = plain(answer);
    best(right, |right| f1(right, &answer))
}

fn best<T: AsRef<str>>(right: &[T], score: impl Fn(&str) -> f64) -> f64 {
    // Answers that are only punctuation do not count, unless there is no other.
    let plain: Vec<String> = right
        .iter()
        .map(|it| plain(it.as_ref()))
        .filter(|it| !it.is_empty())
        .collect();
    if plain.is_empty() {
        return score("");
    }
    plain.iter().map(|it| score(it)).fold(0.0, f64::max)
}

fn f1(right: &str, answer: &str) -> f64 {
    let right: Vec<&str> = right.split_whitespace().collect();
    let answer: Vec<&str> = answer.split_whitespace().collect();
    if right.is_empty() || answer.is_empty() {
        return f64::from(right.is_empty() && answer.is_empty());
    }
    let mut left: HashMap<&str, usize> = HashMap::new();
    for word in &right {
        *left.entry(word).or_default() += 1;
    }
    let mut common = 0;
    for word in &answer {
        if let Some(count) = left.get_mut(word).filter(|count| **count > 0) {
            *count -= 1;
            common += 1;
        }
    }
    part(2 * common, (right.len() + answer.len()) as u64)
}

/// An answer as it is compared.
fn plain(answer: &str) -> String {
    let lower = answer.to_lowercase();
    let bare: String = lower
        .chars()
        .filter(|it| !it.is_ascii_punctuation())
        .collect();
    let mut text = String::new();
    let mut rest = bare.as_str();
    while let Some(first) = rest.chars().next() {
        let is_word = |letter: char| letter.is_alphanumeric() || letter == '_';
        let end = rest
            .find(|letter| is_word(letter) != is_word(first))
            .unwrap_or(rest.len());
        match &rest[..end] {
            "a" | "an" | "the" => text.push(' '),
            other => text.push_str(other),
        }
        rest = &rest[end..];
    }
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_of_an_answer() {
        assert_eq!(plain("The  U.S. Army's an—a \t the"), "us armys —");
        assert_eq!(plain("theatre an1"), "theatre an1");
    }

    #[test]
    fn by_hand() {
        assert_eq!(exact_match(&["the Cat!"], "cat"), 1.0);
        assert_eq!(
            answer_f1(&["a black cat sat"], "the cat sat sat"),
            4.0 / 6.0
        );
        assert_eq!(answer_f1(&["dog", "black cat"], "cat"), 2.0 / 3.0);
        let none: [&str; 0] = [];
        assert_eq!((exact_match(&none, ""), answer_f1(&none, "x")), (1.0, 0.0));
    }
}
