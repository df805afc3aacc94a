//! Which places a method acts on: Python's rules for `target_modules` and its company.
//!
//! The order is Python's: what is excluded is out; what is saved whole is no
//! target; then the targets. A list names suffixes, a string is one expression
//! for whole names, and the number of the block counts only where a suffix of
//! a list matched.
//!
//! A setting that matches nothing is a typing error nearly always, and a
//! training run that quietly does less than it says costs hours: it is an
//! error with the nearest real name.

use serde::{Deserialize, Serialize};

use crate::{Common, Error, Names, Outline, Pattern, Result, Site, SiteKind, closest};

/// One block or several: `layers_to_transform`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Layers {
    /// One block.
    One(i64),
    /// Several; an empty list means all.
    Many(Vec<i64>),
}

impl Layers {
    /// The blocks.
    pub fn list(&self) -> &[i64] {
        match self {
            Layers::One(one) => std::slice::from_ref(one),
            Layers::Many(many) => many,
        }
    }
}

/// The settings of a configuration that select places, borrowed from it.
#[derive(Debug, Clone, Copy, Default)]
pub struct Selection<'a> {
    /// `target_modules`
    pub targets: Option<&'a Names>,
    /// `exclude_modules`
    pub exclude: Option<&'a Names>,
    /// `layers_to_transform`
    pub layers: Option<&'a Layers>,
    /// `layers_pattern`: the name of the list of blocks.
    pub layers_pattern: Option<&'a Names>,
    /// `modules_to_save`
    pub save: Option<&'a [String]>,
}

impl Selection<'_> {
    /// Whether the place called `at` is a target, whatever its kind.
    pub fn targets(&self, at: &str) -> Result<bool> {
        Ok(!self.excludes(at)? && self.names(at)? && self.in_layers(at)?)
    }

    /// Whether `target_modules` names a place, and nothing else asked.
    pub fn names(&self, at: &str) -> Result<bool> {
        self.targets.map_or(Ok(false), |it| it.matches(at))
    }

    /// Whether `exclude_modules` takes a place out.
    pub fn excludes(&self, at: &str) -> Result<bool> {
        match self.exclude {
            Some(names) if !names.is_empty() => names.matches(at),
            _ => Ok(false),
        }
    }

    /// Whether `modules_to_save` names a place or a module that it is in.
    pub fn saves(&self, at: &str) -> bool {
        self.save
            .into_iter()
            .flatten()
            .any(|entry| saves(entry, at))
    }

    /// Whether `layers_to_transform` lets this place in.
    fn in_layers(&self, at: &str) -> Result<bool> {
        let layers = self.layers.map_or(&[][..], Layers::list);
        let spelt_out = match self.targets {
            Some(Names::List(list)) => list.iter().any(|entry| entry == at),
            _ => true,
        };
        if layers.is_empty() || spelt_out {
            return Ok(true);
        }
        Ok(self.layer(at)?.is_some_and(|n| layers.contains(&n)))
    }

    /// The number of the block that a place is in.
    fn layer(&self, at: &str) -> Result<Option<i64>> {
        let lists: &[String] = match self.layers_pattern {
            Some(Names::List(list)) => list,
            Some(Names::Regex(one)) if !one.is_empty() => std::slice::from_ref(one),
            _ => &[],
        };
        let number = |source: String, shown: &str| -> Result<Option<i64>> {
            let groups = Pattern::new(&source, shown)?.groups(at)?;
            // The number is the last group, whatever groups the user's pattern has.
            let last = groups.and_then(|groups| groups.into_iter().next_back().flatten());
            Ok(last.and_then(|digits| digits.parse().ok()))
        };
        if lists.is_empty() {
            return number(r"\A.*?\.[^.]*\.(\d+)\.".to_owned(), "layers_pattern");
        }
        for list in lists {
            let found = number(format!(r"\A(?:^|.*?\.)(?:{list})\.(\d+)\."), list)?;
            if found.is_some() {
                return Ok(found);
            }
        }
        Ok(None)
    }

    /// What no model is needed to see: expressions that do not compile, settings that contradict each other.
    pub fn check(&self, peft_type: &str) -> Result<()> {
        let fault = |reason: &str| {
            Err(Error::Config {
                peft_type: peft_type.to_owned(),
                reason: reason.to_owned(),
            })
        };
        let regex = matches!(self.targets, Some(Names::Regex(_)));
        if regex && (self.layers.is_some() || self.layers_pattern.is_some()) {
            return fault(
                "layers_to_transform and layers_pattern need target_modules as a list: an expression says itself which blocks it means",
            );
        }
        let pattern = self.layers_pattern.is_some_and(|it| !it.is_empty());
        if pattern && self.layers.is_none() {
            return fault(
                "layers_pattern says where the numbers of layers_to_transform stand, and that is not set",
            );
        }
        for names in [self.targets, self.exclude].into_iter().flatten() {
            names.matches("")?;
        }
        Ok(())
    }

    /// That something is a target, of a kind that `fits` the method.
    pub fn check_targets(&self, outline: &Outline, fits: &dyn Fn(&Site) -> bool) -> Result<()> {
        let mut missed = "target_modules";
        for site in &outline.sites {
            if !self.names(&site.at)? {
                continue;
            }
            let saved = self.saves(&site.at);
            if self.targets(&site.at)? && !saved && fits(site) {
                return Ok(());
            }
            missed = match (self.excludes(&site.at)?, saved) {
                (true, _) => "target_modules without exclude_modules",
                (_, true) => "target_modules without modules_to_save",
                _ if !fits(site) => "target_modules, of the kinds that the method goes on,",
                _ => "target_modules within layers_to_transform",
            };
        }
        let wanted = match self.targets {
            Some(Names::List(list)) => format!("{list:?}"),
            Some(Names::Regex(text)) => format!("`{text}`"),
            None => String::new(),
        };
        let fit = outline.sites.iter().filter(|site| fits(site));
        Err(Error::NoTarget {
            examples: closest(&wanted, fit.map(|site| site.at.as_str()), 4),
            what: format!("{missed} {wanted}"),
        })
    }

    /// The targets of a method that goes on linear layers and nothing else; an error that names a target of another kind.
    pub fn linear_targets<'o>(
        &self,
        peft_type: &str,
        outline: &'o Outline,
    ) -> Result<Vec<&'o Site>> {
        let mut found = Vec::new();
        for site in &outline.sites {
            if site.kind == SiteKind::Prompt || self.saves(&site.at) || !self.targets(&site.at)? {
                continue;
            }
            if site.kind != SiteKind::Linear {
                return Err(Error::Config {
                    peft_type: peft_type.to_owned(),
                    reason: format!(
                        "target_modules names `{}`, which is {}; the method goes on linear layers, others into modules_to_save",
                        site.at, site.kind
                    ),
                });
            }
            found.push(site);
        }
        if found.is_empty() {
            self.check_targets(outline, &|site| site.kind == SiteKind::Linear)?;
        }
        Ok(found)
    }

    /// That every entry of `modules_to_save` names something. Of the heads that Python adds by the task a model has one.
    pub fn check_saved(&self, outline: &Outline) -> Result<()> {
        let there = |entry: &str| outline.sites.iter().any(|site| saves(entry, &site.at));
        for entry in self.save.into_iter().flatten() {
            let another = || HEADS.contains(&entry.as_str()) && HEADS.iter().any(|it| there(it));
            if !(there(entry) || another()) {
                return Err(Error::NoTarget {
                    what: format!("modules_to_save `{entry}`"),
                    examples: closest(entry, outline.sites.iter().map(|it| it.at.as_str()), 4),
                });
            }
        }
        Ok(())
    }
}

/// Whether an entry of `modules_to_save` names `at` or a module that it is in. As Python does it, without regard to dots:
/// `norm` also names `input_layernorm`.
fn saves(entry: &str, at: &str) -> bool {
    let ends = at.match_indices('.').map(|(i, _)| i).chain([at.len()]);
    !at.is_empty() && ends.into_iter().any(|end| at[..end].ends_with(entry))
}

/// Heads that Python adds to `modules_to_save` by the task; a model has one of them.
const HEADS: [&str; 3] = ["classifier", "score", "qa_outputs"];

/// The heads that Python trains and saves beside an adapter for this `task_type`.
fn heads(task_type: &str) -> &'static [&'static str] {
    match task_type {
        "SEQ_CLS" | "TOKEN_CLS" => &HEADS[..2],
        "QUESTION_ANS" => &HEADS[2..],
        _ => &[],
    }
}

/// `modules_to_save` as Python completes it: with the heads of the task, on a model that has one.
pub fn with_heads(
    asked: Option<Vec<String>>,
    common: &Common,
    outline: &Outline,
) -> Option<Vec<String>> {
    let heads = heads(common.task_type.as_deref().unwrap_or_default());
    let there = |it: &&str| outline.sites.iter().any(|site| saves(it, &site.at));
    if !heads.iter().any(there) {
        return asked;
    }
    let mut all = asked.unwrap_or_default();
    for head in heads {
        if !all.iter().any(|it| it == head) {
            all.push((*head).to_owned());
        }
    }
    Some(all)
}

/// The names of a table by `model_type`: which layers a method goes on where nothing is said.
pub fn default_targets(
    table: &'static [(&'static [&'static str], &'static [&'static str])],
    model_type: &str,
) -> Option<Names> {
    let row = table.iter().find(|(types, _)| types.contains(&model_type));
    row.map(|(_, names)| Names::List(names.iter().map(|&it| it.to_owned()).collect()))
}
