//! Which places a setting names: matching as Python's `peft` does it.
//!
//! A list names suffixes: an entry matches a place that equals it or ends with
//! `.entry`. A string is a regular expression that must match the whole name
//! (`re.fullmatch`). Patterns with values (`rank_pattern`) match a suffix that
//! starts at a dot, by regular expression, and the first in the order of the
//! file wins.

use std::{cell::RefCell, collections::HashMap};

use fancy_regex::Regex;
use indexmap::IndexMap;
use serde::{Deserialize, Serialize};

use crate::{Error, Outline, Result, SiteKind};

/// A list of names or one regular expression: `target_modules`, `exclude_modules`, `layers_pattern`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Names {
    /// Suffixes.
    List(Vec<String>),
    /// An expression (or a keyword such as `all-linear`).
    Regex(String),
}

/// Alias that says what a [`Names`] is for.
pub type Targets = Names;

impl<const N: usize> From<[&str; N]> for Names {
    fn from(list: [&str; N]) -> Names {
        Names::List(list.map(str::to_owned).into())
    }
}

impl Names {
    /// Whether the place called `at` is named.
    pub fn matches(&self, at: &str) -> Result<bool> {
        match self {
            Names::List(list) => Ok(list.iter().any(|entry| suffix_match(at, entry))),
            Names::Regex(pattern) => fullmatch(pattern, at),
        }
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        match self {
            Names::List(list) => list.is_empty(),
            Names::Regex(text) => text.is_empty(),
        }
    }

    /// The keyword `all-linear`, in any capitals.
    pub fn is_all_linear(&self) -> bool {
        matches!(self, Names::Regex(word) if word.eq_ignore_ascii_case("all-linear"))
    }

    /// `all-linear` spelt out: every linear layer but the output embedding and a classifier's head; anything else as it is.
    ///
    /// Twenty names and more are replaced by the fewest suffixes that name the same places, as `peft` saves them.
    pub fn expand(&self, outline: &Outline) -> Names {
        if !self.is_all_linear() {
            return self.clone();
        }
        let spec = &outline.spec;
        let is_head = |at: &str| {
            spec.output_embedding.as_deref() == Some(at)
                || spec
                    .task_head
                    .as_deref()
                    .is_some_and(|head| at == head || at.starts_with(&format!("{head}.")))
        };
        let (chosen, others): (Vec<_>, Vec<_>) = outline
            .sites
            .iter()
            .partition(|it| it.kind == SiteKind::Linear && !is_head(&it.at));
        let names: Vec<&str> = chosen.iter().map(|it| it.at.as_str()).collect();
        let others: Vec<&str> = others.iter().map(|it| it.at.as_str()).collect();
        if names.len() < 20 {
            return Names::List(names.into_iter().map(str::to_owned).collect());
        }
        Names::List(fewest_suffixes(&names, &others))
    }
}

/// Suffixes that match all of `names` and none of `others`: for each name its shortest that is allowed.
fn fewest_suffixes(names: &[&str], others: &[&str]) -> Vec<String> {
    let mut chosen: Vec<String> = Vec::new();
    for name in names {
        if chosen.iter().any(|suffix| suffix_match(name, suffix)) {
            continue;
        }
        let starts = name.rmatch_indices('.').map(|(i, _)| i + 1).chain([0]);
        let mut suffixes = starts.map(|i| &name[i..]);
        let free = |suffix: &&str| !others.iter().any(|other| suffix_match(other, suffix));
        chosen.push(suffixes.find(free).unwrap_or(name).to_owned());
    }
    chosen
}

/// Whether `at` is `entry` or ends with `.entry`.
pub fn suffix_match(at: &str, entry: &str) -> bool {
    at.strip_suffix(entry)
        .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// Python's `re.fullmatch`.
pub fn fullmatch(pattern: &str, text: &str) -> Result<bool> {
    Pattern::new(&format!(r"\A(?:{pattern})\z"), pattern)?.is_match(text)
}

/// The value whose pattern matches `at`, the first in order: `(.*\.)?(pattern)$`.
pub fn pattern_value<T: Copy>(patterns: &IndexMap<String, T>, at: &str) -> Result<Option<T>> {
    for (pattern, value) in patterns {
        if Pattern::new(&format!(r"\A(?:.*\.)?(?:{pattern})\z"), pattern)?.is_match(at)? {
            return Ok(Some(*value));
        }
    }
    Ok(None)
}

thread_local! {
    /// The expressions of the configurations that this thread has seen.
    static COMPILED: RefCell<HashMap<String, Regex>> = RefCell::default();
}

/// A compiled regular expression with Python's meaning (lookaround, backreferences).
#[derive(Debug)]
pub struct Pattern {
    regex: Regex,
    shown: String,
}

impl Pattern {
    /// Compiles `source`; errors show `shown`.
    ///
    /// Each expression is compiled once a thread: one setting is asked about every place of a model, several times.
    pub fn new(source: &str, shown: &str) -> Result<Pattern> {
        let known = COMPILED.with_borrow(|all| all.get(source).cloned());
        let regex = match known {
            Some(regex) => regex,
            None => {
                let regex = Regex::new(source).map_err(|error| Error::Config {
                    peft_type: "module name".to_owned(),
                    reason: format!("`{shown}` is no regular expression: {error}"),
                })?;
                COMPILED.with_borrow_mut(|all| all.insert(source.to_owned(), regex.clone()));
                regex
            }
        };
        Ok(Pattern {
            regex,
            shown: shown.to_owned(),
        })
    }

    /// Whether the expression is found in `text`.
    pub fn is_match(&self, text: &str) -> Result<bool> {
        self.regex.is_match(text).map_err(|error| self.fault(error))
    }

    /// The groups of the first match.
    pub fn groups(&self, text: &str) -> Result<Option<Vec<Option<String>>>> {
        let found = self.regex.captures(text).map_err(|e| self.fault(e))?;
        Ok(found.map(|groups| {
            groups
                .iter()
                .map(|group| group.map(|it| it.as_str().to_owned()))
                .collect()
        }))
    }

    fn fault(&self, error: fancy_regex::Error) -> Error {
        Error::Config {
            peft_type: "module name".to_owned(),
            reason: format!("`{}` cannot be matched: {error}", self.shown),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(names: &[&str]) -> Names {
        Names::List(names.iter().map(|&n| n.to_owned()).collect())
    }

    #[test]
    fn a_list_matches_whole_components_at_the_end() {
        let at = "model.layers.11.self_attn.q_proj";
        for (entry, hit) in [
            ("q_proj", true),
            ("self_attn.q_proj", true),
            (at, true),
            ("proj", false),
            ("attn.q_proj", false),
            ("q_proj.x", false),
            ("", false),
        ] {
            assert_eq!(list(&[entry]).matches(at).unwrap(), hit, "{entry}");
        }
        assert!(!list(&[]).matches(at).unwrap());
    }

    #[test]
    fn a_string_is_matched_as_pythons_fullmatch() {
        for (pattern, text, hit) in [
            (r".*\.q_proj", "a.q_proj", true),
            (r"q_proj", "a.q_proj", false),
            (r"a|a\.b", "a.b", true), // alternatives backtrack to the whole
            (r".*(?<!layers\.0)\.q", "layers.0.q", false),
            (r".*\.(\d+)\.\1\.x", "m.3.3.x", true),
            (r"(?i)A\.B", "a.b", true),
        ] {
            assert_eq!(fullmatch(pattern, text).unwrap(), hit, "{pattern} {text}");
        }
        assert!(fullmatch("(", "x").unwrap_err().to_string().contains("`(`"));
    }

    #[test]
    fn the_first_pattern_wins_and_starts_at_a_dot() {
        let patterns: IndexMap<String, i64> = [(r"layers\.1\.q", 5), ("q", 3)]
            .map(|(k, v)| (k.to_owned(), v))
            .into();
        assert_eq!(pattern_value(&patterns, "m.layers.1.q").unwrap(), Some(5));
        assert_eq!(pattern_value(&patterns, "m.layers.11.q").unwrap(), Some(3));
        assert_eq!(pattern_value(&patterns, "m.seq").unwrap(), None);
        assert_eq!(pattern_value(&patterns, "q").unwrap(), Some(3));
    }

    #[test]
    fn few_suffixes_name_the_same_places() {
        let names = ["h.0.a.x", "h.1.a.x", "h.0.y", "h.0.b.z"];
        let others = ["h.1.y", "z"];
        let found = fewest_suffixes(&names, &others);
        for name in names {
            assert!(found.iter().any(|it| suffix_match(name, it)), "{name}");
        }
        for other in others {
            assert!(!found.iter().any(|it| suffix_match(other, it)), "{other}");
        }
        assert_eq!(found, ["x", "0.y", "b.z"]);
    }
}
