//! The parts of the README that are made from the tree, so that they cannot claim what is not there.
//!
//! A part stands between two comments:
//!
//! ```text
//! <!-- generated:crates -->
//! …
//! <!-- /generated -->
//! ```
//!
//! `cargo xtask tidy` compares them with what would be made now, `--fix` writes it. What works is told by the
//! fixtures: a model or an option is listed if Python's numbers for it are committed, because the tests
//! compare with every fixture that is there.

use crate::tidy::{Finding, layers::packages};
use crate::{paths, tasks};
use anyhow::{Context, Result};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

const DOCUMENTS: [&str; 3] = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"];
const OPEN: &str = "<!-- generated:";
const CLOSE: &str = "<!-- /generated -->";
const KNOWN: [&str; 4] = ["tasks", "crates", "models", "methods"];

/// Compares the generated parts with what they should be.
pub(crate) fn check() -> Result<Vec<Finding>> {
    let mut findings = Vec::new();
    for name in DOCUMENTS {
        let Ok(text) = fs::read_to_string(paths::root().join(name)) else {
            continue;
        };
        let (_, found) = renewed(name, &text)?;
        findings.extend(found);
    }
    Ok(findings)
}

/// Writes the generated parts.
pub(crate) fn fix() -> Result<()> {
    for name in DOCUMENTS {
        let path = paths::root().join(name);
        let Ok(text) = fs::read_to_string(&path) else {
            continue;
        };
        let (new, _) = renewed(name, &text)?;
        if new != text {
            fs::write(&path, new).with_context(|| format!("at `{name}`"))?;
            println!("rewrote the generated parts of {name}");
        }
    }
    Ok(())
}

/// The document with its generated parts made anew, and where it differed.
fn renewed(document: &str, text: &str) -> Result<(String, Vec<Finding>)> {
    let (mut new, mut findings) = (String::new(), Vec::new());
    let mut rest = text;
    while let Some(at) = rest.find(OPEN) {
        let line = 1 + new.lines().count() + rest[..at].lines().count();
        let opening = rest[at..].find('\n').map_or(rest.len(), |end| at + end + 1);
        let name = rest[at + OPEN.len()..opening]
            .trim()
            .trim_end_matches("-->")
            .trim();
        let Some(length) = rest[opening..].find(CLOSE) else {
            findings.push(Finding::new(
                document,
                line,
                format!("`{OPEN}{name} -->` is not closed by `{CLOSE}`"),
            ));
            break;
        };
        new += &rest[..opening];
        let old = &rest[opening..opening + length];
        match generate(name)? {
            Some(made) => {
                if made != old {
                    let message = format!(
                        "the generated part `{name}` is out of date: `cargo xtask tidy --fix`"
                    );
                    findings.push(Finding::new(document, line, message));
                }
                new += &made;
            }
            None => {
                let message = format!(
                    "unknown generated part `{name}`, known are [{}]",
                    KNOWN.join(", ")
                );
                findings.push(Finding::new(document, line, message));
                new += old;
            }
        }
        rest = &rest[opening + length..];
    }
    Ok((new + rest, findings))
}

fn generate(name: &str) -> Result<Option<String>> {
    let fixtures = paths::root().join("fixtures");
    Ok(Some(match name {
        "tasks" => table(
            ["command", "what it does"],
            tasks()
                .into_iter()
                .map(|(task, about)| [format!("`cargo xtask {task}`"), about]),
        ),
        "crates" => crates()?,
        "models" => models(&["models", "tasks"].map(|it| fixtures.join(it)))?,
        "methods" => methods(&fixtures)?,
        _ => return Ok(None),
    }))
}

fn crates() -> Result<String> {
    let packages = packages()?;
    let rows = packages.iter().map(|package| {
        let folder = package.folder();
        let name = format!("[`{}`]({})", package.name, folder.display());
        [name, package.description.clone().unwrap_or_default()]
    });
    Ok(table(["crate", "what it is"], rows))
}

/// Model types, with the checkpoints of each that Python's numbers are here for.
fn models(all: &[PathBuf]) -> Result<String> {
    let mut types: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for folder in all {
        for name in folders(folder)? {
            let path = folder.join(&name).join("config.json");
            let Ok(text) = fs::read_to_string(&path) else {
                continue;
            };
            let config: Value = serde_json::from_str(&text)
                .with_context(|| format!("at `{}`", paths::short(&path)))?;
            let kind = config["model_type"]
                .as_str()
                .unwrap_or("unknown")
                .to_owned();
            types.entry(kind).or_default().insert(name);
        }
    }
    let rows = types
        .into_iter()
        .map(|(kind, names)| [format!("`{kind}`"), joined(names)]);
    Ok(table(["`model_type`", "compared with Python on"], rows))
}

/// Methods (a folder of adapters each): on which models, and which settings the adapters vary.
fn methods(fixtures: &Path) -> Result<String> {
    type Seen = (BTreeMap<String, Varied>, BTreeSet<String>);
    let mut methods: BTreeMap<String, Seen> = BTreeMap::new();
    for parent in [fixtures.to_owned(), fixtures.join("methods")] {
        for method in folders(&parent)? {
            let folder = parent.join(&method);
            for adapter in folders(&folder)? {
                let Some((model, _)) = adapter.split_once("__") else {
                    continue;
                };
                let path = folder.join(&adapter).join("adapter_config.json");
                let Ok(text) = fs::read_to_string(&path) else {
                    continue;
                };
                let config: BTreeMap<String, Value> = serde_json::from_str(&text)
                    .with_context(|| format!("at `{}`", paths::short(&path)))?;
                let (settings, models) = methods.entry(method.clone()).or_default();
                let config = config.into_iter();
                for (key, value) in config.filter(|(key, _)| !NO_SETTINGS.contains(&key.as_str())) {
                    settings.entry(key).or_default().add(&value);
                }
                models.insert(model.to_owned());
            }
        }
    }
    let rows = methods.into_iter().map(|(name, (settings, models))| {
        let varied = settings.into_iter().filter(|(_, it)| it.0.len() > 1);
        let varied: Vec<String> = varied.map(|(key, it)| it.shown(&key)).collect();
        [format!("`{name}`"), varied.join(", "), joined(models)]
    });
    Ok(table(
        [
            "method",
            "settings of which several values",
            "on the models",
        ],
        rows,
    ))
}

/// Keys of every adapter's file that say where it is from, not what it computes.
const NO_SETTINGS: [&str; 3] = ["base_model_name_or_path", "peft_version", "task_type"];

/// The values that one setting takes, as JSON.
#[derive(Default)]
struct Varied(BTreeSet<String>);

impl Varied {
    fn add(&mut self, value: &Value) {
        self.0.insert(value.to_string());
    }

    /// The setting, with its values where they are words.
    fn shown(&self, key: &str) -> String {
        let word = |it: &&String| it.starts_with('"') && it.len() < 20 && !it.contains('.');
        let words: Vec<&str> = self
            .0
            .iter()
            .filter(word)
            .map(|it| it.trim_matches('"'))
            .collect();
        match words.len() {
            0 | 1 => format!("`{key}`"),
            _ => format!("`{key}` ({})", words.join(", ")),
        }
    }
}

fn folders(path: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(path).into_iter().flatten() {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    names.sort();
    Ok(names)
}

fn joined(names: BTreeSet<String>) -> String {
    names.into_iter().collect::<Vec<_>>().join(", ")
}

/// A Markdown table.
fn table<const N: usize>(head: [&str; N], rows: impl IntoIterator<Item = [String; N]>) -> String {
    let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
    let mut table =
        line(&head.map(ToOwned::to_owned)) + &line(&[const { "---" }; N].map(ToOwned::to_owned));
    table.extend(rows.into_iter().map(|row| line(&row)));
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_generated_part_is_renewed_and_the_rest_kept() -> Result<()> {
        let text = format!("# A\n\n{OPEN}tasks -->\nold\n{CLOSE}\nend\n");
        let (new, findings) = renewed("README.md", &text)?;
        assert_eq!(findings.len(), 1);
        assert_eq!(findings[0].line, 3);
        assert!(new.starts_with("# A\n\n") && new.ends_with(&format!("{CLOSE}\nend\n")));
        assert!(new.contains("| `cargo xtask demo` |") && !new.contains("old"));
        let (again, findings) = renewed("README.md", &new)?;
        assert!(findings.is_empty() && again == new);
        Ok(())
    }

    #[test]
    fn a_wrong_name_or_an_open_end_is_said() -> Result<()> {
        let (_, found) = renewed("README.md", &format!("{OPEN}crate -->\n{CLOSE}"))?;
        assert!(
            found[0].message.contains("known are [tasks, crates"),
            "{}",
            found[0].message
        );
        let (_, found) = renewed("README.md", &format!("{OPEN}tasks -->\n"))?;
        assert!(found[0].message.contains("not closed"));
        Ok(())
    }
}
