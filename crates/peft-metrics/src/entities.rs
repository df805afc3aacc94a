//! Named entities: runs of words, right only if the whole run is.
//!
//! Tags are `O`, or a prefix and a type: `B-PER` begins, `I-PER` goes on, also
//! `E-` (end) and `S-` (single). A model may say what no one would write, an
//! `I-PER` after `O` or after `I-LOC`; as in the CoNLL script and in seqeval's
//! default, such a tag begins an entity. A run is
//!
//! ```text
//! begun  by B and S, by E and I after O, E or S, and by any tag of another type than the one before
//! ended  by O, B and S after B or I, after E and S, and by any tag of another type
//! ```

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::confusion::{Score, part};
use crate::error::{Error, Result, same};

/// A run of words of one type: half-open.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Entity {
    /// The type, such as `PER`.
    pub kind: String,
    /// The first word.
    pub start: usize,
    /// One past the last word.
    pub end: usize,
}

impl Entity {
    /// The entities of one row of tags.
    pub fn of<T: AsRef<str>>(tags: &[T]) -> Vec<Entity> {
        let mut found = Vec::new();
        let mut open: Option<(usize, &str)> = None;
        let mut before = Tag::OUTSIDE;
        let tags = tags.iter().map(|tag| Tag::of(tag.as_ref()));
        // A tag outside closes what is open at the end.
        for (at, tag) in tags.chain([Tag::OUTSIDE]).enumerate() {
            if ends(before, tag)
                && let Some((start, kind)) = open.take()
            {
                found.push(Entity {
                    kind: kind.to_owned(),
                    start,
                    end: at,
                });
            }
            if begins(before, tag) {
                open = Some((at, tag.kind));
            }
            before = tag;
        }
        found
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Tag<'a> {
    place: char,
    kind: &'a str,
}

impl<'a> Tag<'a> {
    const OUTSIDE: Tag<'static> = Tag {
        place: 'O',
        kind: "_",
    };

    /// `B-PER` is `B` and `PER`; a tag without a type has the type `_`.
    fn of(tag: &'a str) -> Self {
        let mut letters = tag.chars();
        let Some(place) = letters.next() else {
            return Tag::OUTSIDE;
        };
        let rest = letters.as_str();
        let kind = rest.split_once('-').map_or(rest, |(_, kind)| kind);
        Tag {
            place,
            kind: if kind.is_empty() { "_" } else { kind },
        }
    }

    fn outside(self) -> bool {
        matches!(self.place, 'O' | '.')
    }
}

fn ends(before: Tag<'_>, tag: Tag<'_>) -> bool {
    let change = !before.outside() && before.kind != tag.kind;
    let by_place = match before.place {
        'E' | 'S' => true,
        'B' | 'I' => matches!(tag.place, 'B' | 'S' | 'O'),
        _ => false,
    };
    by_place || change
}

fn begins(before: Tag<'_>, tag: Tag<'_>) -> bool {
    let change = !tag.outside() && before.kind != tag.kind;
    let by_place = match tag.place {
        'B' | 'S' => true,
        'E' | 'I' => matches!(before.place, 'E' | 'S' | 'O'),
        _ => false,
    };
    by_place || change
}

/// How well entities are found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Entities {
    /// For each type, by name.
    pub kinds: BTreeMap<String, Score>,
    /// All entities together: the F1 that is meant where none is named.
    pub micro: Score,
    /// Every type as heavy as every other.
    pub macro_mean: Score,
    /// Every type as heavy as it is frequent.
    pub weighted_mean: Score,
}

impl Entities {
    /// A line for each type and for each mean.
    pub fn report(&self) -> String {
        let kinds = self
            .kinds
            .iter()
            .map(|(name, score)| (name.as_str(), *score));
        let means = [
            ("micro mean", self.micro),
            ("macro mean", self.macro_mean),
            ("weighted mean", self.weighted_mean),
        ];
        crate::table::report(kinds.collect(), None, &means)
    }
}

/// Compares the entities of rows of tags.
pub fn entities<T: AsRef<str>>(truth: &[Vec<T>], predicted: &[Vec<T>]) -> Result<Entities> {
    let mut counts: BTreeMap<String, (u64, u64, u64)> = BTreeMap::new();
    for (truth, said) in rows(truth, predicted)? {
        let truth: BTreeSet<Entity> = Entity::of(truth).into_iter().collect();
        let said: BTreeSet<Entity> = Entity::of(said).into_iter().collect();
        for entity in &truth {
            let count = counts.entry(entity.kind.clone()).or_default();
            match said.contains(entity) {
                true => count.0 += 1,
                false => count.2 += 1,
            }
        }
        for entity in said.difference(&truth) {
            counts.entry(entity.kind.clone()).or_default().1 += 1;
        }
    }
    let score = |(right, wrong, missed): &(u64, u64, u64)| Score::of(*right, *wrong, *missed);
    let kinds: BTreeMap<String, Score> = counts
        .iter()
        .map(|(kind, count)| (kind.clone(), score(count)))
        .collect();
    let sum = counts.values().fold((0, 0, 0), |all, it| {
        (all.0 + it.0, all.1 + it.1, all.2 + it.2)
    });
    Ok(Entities {
        micro: score(&sum),
        macro_mean: Score::mean(kinds.values().map(|it| (*it, 1.0))),
        weighted_mean: Score::mean(kinds.values().map(|it| (*it, it.support as f64))),
        kinds,
    })
}

/// The part of all words whose tag is right.
pub fn token_accuracy<T: AsRef<str>>(truth: &[Vec<T>], predicted: &[Vec<T>]) -> Result<f64> {
    let (mut right, mut all) = (0, 0);
    for (truth, said) in rows(truth, predicted)? {
        all += truth.len() as u64;
        let pairs = truth.iter().zip(said);
        right += pairs.filter(|(a, b)| a.as_ref() == b.as_ref()).count() as u64;
    }
    Ok(part(right, all))
}

/// The rows of both, if they are of like lengths.
fn rows<'a, T>(
    truth: &'a [Vec<T>],
    predicted: &'a [Vec<T>],
) -> Result<impl Iterator<Item = (&'a [T], &'a [T])>> {
    same(truth.len(), predicted.len(), String::new)?;
    if truth.is_empty() {
        return Err(Error::Empty("rows"));
    }
    for (row, (truth, said)) in truth.iter().zip(predicted).enumerate() {
        same(truth.len(), said.len(), || format!(" in row {row}"))?;
    }
    let rows = truth.iter().zip(predicted);
    Ok(rows.map(|(truth, said)| (truth.as_slice(), said.as_slice())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(tags: &str, expected: &[(&str, usize, usize)]) {
        let tags: Vec<&str> = tags.split(' ').collect();
        let made: Vec<(String, usize, usize)> = Entity::of(&tags)
            .into_iter()
            .map(|it| (it.kind, it.start, it.end))
            .collect();
        let wanted: Vec<(String, usize, usize)> = expected
            .iter()
            .map(|(kind, start, end)| (kind.to_string(), *start, *end))
            .collect();
        assert_eq!(made, wanted, "{tags:?}");
    }

    #[test]
    fn runs_of_tags() {
        check("B-PER I-PER O B-LOC", &[("PER", 0, 2), ("LOC", 3, 4)]);
        check("B-PER B-PER", &[("PER", 0, 1), ("PER", 1, 2)]);
        check("O I-PER I-LOC I-LOC", &[("PER", 1, 2), ("LOC", 2, 4)]);
        check("B-PER E-PER S-PER O", &[("PER", 0, 2), ("PER", 2, 3)]);
        check("B-a-b I-a-b", &[("a-b", 0, 2)]);
        check("B I O", &[("_", 0, 2)]);
        check("O O", &[]);
    }
}
