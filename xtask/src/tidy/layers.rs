//! Rules about who knows whom.
//!
//! ```text
//! peft-cli → peft (facade) → leaves → peft-core → peft-torch
//! ```
//!
//! Leaves do not see each other, not even for their tests, and the core names none of them. It is what keeps
//! a new method to one crate and two lines.

use super::source::{code_only, line_of, words};
use super::{Finding, Repo};
use crate::{paths, run};
use anyhow::{Context, Result};
use serde::Deserialize;
use std::path::{Path, PathBuf};

/// What `cargo metadata` says, as far as it is used.
#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

/// One crate of the workspace.
#[derive(Deserialize)]
pub(crate) struct Package {
    pub(crate) name: String,
    pub(crate) description: Option<String>,
    license: Option<String>,
    manifest_path: PathBuf,
    dependencies: Vec<Dependency>,
}

#[derive(Deserialize)]
struct Dependency {
    name: String,
    /// None, "dev" or "build".
    kind: Option<String>,
    /// Only of a crate in this workspace.
    path: Option<PathBuf>,
}

/// The crates of the workspace, by name.
pub(crate) fn packages() -> Result<Vec<Package>> {
    let text = run::output(&mut run::cargo(&[
        "metadata",
        "--no-deps",
        "--format-version",
        "1",
    ]))?;
    let metadata: Metadata =
        serde_json::from_str(&text).context("`cargo metadata` speaks another dialect")?;
    let mut packages = metadata.packages;
    packages.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(packages)
}

pub(super) fn check(repo: &Repo) -> Result<Vec<Finding>> {
    let packages = packages()?;
    let mut findings: Vec<Finding> = packages.iter().flat_map(manifest).collect();
    findings.extend(packages.iter().flat_map(edges));
    findings.extend(names_in_core(repo));
    Ok(findings)
}

fn manifest(package: &Package) -> Vec<Finding> {
    let needed = [
        ("description", &package.description),
        ("license", &package.license),
    ];
    let missing = needed
        .iter()
        .filter(|(_, value)| value.as_deref().unwrap_or_default().is_empty());
    missing
        .map(|(key, _)| package.finding(key, format!("`{}` has no {key}", package.name)))
        .collect()
}

/// Dependencies inside the workspace, and all of the core's.
fn edges(package: &Package) -> Vec<Finding> {
    let mut findings = Vec::new();
    for Dependency { name, kind, path } in &package.dependencies {
        let inside = path.is_some();
        let dev = kind.as_deref() == Some("dev");
        let from = package.name.as_str();
        if inside && !may_know(from, name, dev) {
            let message = format!(
                "`{from}` must not know `{name}`: crates beside each other meet in the facade"
            );
            findings.push(package.finding(name, message));
        }
        if from == "peft-core" && !dev && !inside && !CORE_MAY_USE.contains(&name.as_str()) {
            let message = format!(
                "`peft-core` may use [{}]; `{name}` must earn its place",
                CORE_MAY_USE.join(", ")
            );
            findings.push(package.finding(name, message));
        }
    }
    findings
}

/// Whether one crate of the workspace may depend on another.
fn may_know(from: &str, to: &str, dev: bool) -> bool {
    match (from, to) {
        // The top of the house, and what measures it.
        ("peft" | "peft-cli" | "benches", _) => true,
        // The ground floor.
        ("peft-torch" | "xtask", _) => false,
        (_, "peft-torch") => true,
        ("peft-core", _) => false,
        (_, "peft-core") => true,
        // The conformance suite serves every leaf's tests.
        (_, "peft-testing") => dev,
        _ => NEIGHBOURS.contains(&(from, to)),
    }
}

/// The pairs beside each other that know each other, each with its reason.
const NEIGHBOURS: [(&str, &str); 10] = [
    // A GGUF file is one of the containers that a model is read from.
    ("peft-models", "peft-gguf"),
    // The loop is where a model meets data; what it trains, it does not know.
    ("peft-train", "peft-models"),
    ("peft-train", "peft-data"),
    // What a trained model is worth is measured while it is trained.
    ("peft-train", "peft-metrics"),
    // The formats that the kernels read and write.
    ("peft-cuda", "peft-codec"),
    // Numbers in few bits are arithmetic on slices: of weights, and of the optimiser's moments.
    ("peft-quant", "peft-codec"),
    ("peft-train", "peft-codec"),
    // Both have kernels of their own on a GPU.
    ("peft-quant", "peft-cuda"),
    ("peft-train", "peft-cuda"),
    // Sharded training is training.
    ("peft-dist", "peft-train"),
];

const CORE_MAY_USE: [&str; 9] = [
    "tch",
    "serde",
    "serde_json",
    "safetensors",
    "thiserror",
    "indexmap",
    "fancy-regex",
    "strsim",
    "memmap2",
];

/// The core names no method and no model. Its documentation may, for examples.
fn names_in_core(repo: &Repo) -> Vec<Finding> {
    let mut findings = Vec::new();
    let core = repo
        .texts_of("rs")
        .filter(|(path, _)| path.starts_with("crates/peft-core/src"));
    for (path, text) in core {
        let code = super::source::without_tests(&code_only(text)).to_lowercase();
        for name in METHODS.iter().chain(&MODELS) {
            // Also as a part of an identifier: `LoraConfig`, `is_llama`.
            let found = code.match_indices(name).map(|(at, _)| at);
            findings.extend(found.map(|at| {
                Finding::new(
                    path,
                    line_of(&code, at),
                    format!("`peft-core` names no method and no model, this names `{name}`"),
                )
            }));
        }
    }
    findings
}

const METHODS: [&str; 14] = [
    "lora",
    "dora",
    "adalora",
    "loha",
    "lokr",
    "boft",
    "vera",
    "ia3",
    "bitfit",
    "ptuning",
    "pissa",
    "olora",
    "prefixtuning",
    "prompttuning",
];
const MODELS: [&str; 6] = ["gpt2", "llama", "mistral", "qwen", "gemma", "bert"];

impl Package {
    /// A finding at the line of the manifest that starts with `key`.
    pub(super) fn finding(&self, key: &str, message: String) -> Finding {
        let text = std::fs::read_to_string(&self.manifest_path).unwrap_or_default();
        let line = words(&text, key).next().map_or(1, |at| line_of(&text, at));
        let path = self
            .manifest_path
            .strip_prefix(paths::root())
            .unwrap_or(&self.manifest_path);
        Finding::new(path, line, message)
    }

    /// The crate's folder, from the root of the repository.
    pub(crate) fn folder(&self) -> PathBuf {
        let folder = self.manifest_path.parent().unwrap_or(Path::new(""));
        folder
            .strip_prefix(paths::root())
            .unwrap_or(folder)
            .to_path_buf()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leaves_do_not_know_each_other() {
        assert!(may_know("peft-lora", "peft-core", false));
        assert!(may_know("peft-lora", "peft-testing", true));
        assert!(!may_know("peft-lora", "peft-testing", false));
        assert!(!may_know("peft-lora", "peft-models", true));
        assert!(!may_know("peft-core", "peft-lora", true));
        assert!(!may_know("peft-core", "peft-testing", true));
        assert!(may_know("peft", "peft-lora", false));
        assert!(!may_know("xtask", "peft-core", false));
    }

    #[test]
    fn the_core_may_speak_of_a_method_but_not_name_it() {
        let path: PathBuf = "crates/peft-core/src/a.rs".into();
        let text = "/// As in LoRA.\nstruct Plain;\nstruct LoraPlain;\n".to_owned();
        let repo = Repo {
            texts: vec![(path, text)],
            files: Vec::new(),
        };
        let found: Vec<_> = names_in_core(&repo)
            .iter()
            .map(|finding| finding.line)
            .collect();
        assert_eq!(found, [3]);
    }
}
