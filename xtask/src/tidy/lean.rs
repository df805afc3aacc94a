//! Who depends on the core and on methods alone gets nothing else.
//!
//! Somebody adapts a network of their own with `peft-core` and `peft-lora`. That must bring them no tokenizer, no
//! command line, no downloads, no pictures and no models: such a thing comes in by one careless line in a manifest, and nobody
//! sees it until a build takes minutes longer. So the whole tree below each of these crates is looked at, as cargo
//! resolves it, without what only tests and build scripts need.

use super::Finding;
use super::layers::{Package, packages};
use crate::run;
use anyhow::Result;

pub(super) fn check() -> Result<Vec<Finding>> {
    let mut findings = Vec::new();
    for package in packages()?.iter().filter(|it| is_lean(&it.name)) {
        let tree = run::output(&mut run::cargo(&[
            "tree",
            "--edges",
            "normal",
            "--prefix",
            "none",
            "--format",
            "{p}",
            "--package",
            &package.name,
        ]))?;
        findings.extend(of_tree(package, &tree));
    }
    Ok(findings)
}

fn of_tree(package: &Package, tree: &str) -> Vec<Finding> {
    let unwanted = names(tree)
        .into_iter()
        .filter_map(|name| Some((name, why(name)?)));
    unwanted
        .map(|(name, why)| {
            let lean = &package.name;
            package.finding("dependencies", format!("`{lean}` brings `{name}` with it ({why}); a network of one's own needs none of that"))
        })
        .collect()
}

/// The crates of a tree as `cargo tree --prefix none --format {p}` prints it, each once.
fn names(tree: &str) -> Vec<&str> {
    let mut names: Vec<&str> = tree
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    names.sort_unstable();
    names.dedup();
    names
}

/// Whether a crate of the workspace is one of those that a network of one's own is adapted with: the core, and every method.
fn is_lean(name: &str) -> bool {
    name.starts_with("peft-") && !RICH.contains(&name)
}

/// The crates that know models, data or a terminal.
const RICH: [&str; 8] = [
    "peft-cli",
    "peft-data",
    "peft-dist",
    "peft-gguf",
    "peft-metrics",
    "peft-models",
    "peft-testing",
    "peft-train",
];

/// What a crate would bring that does not belong there.
fn why(name: &str) -> Option<&'static str> {
    let found = UNWANTED.iter().find(|(_, names)| names.contains(&name));
    found.map(|(why, _)| *why)
}

const UNWANTED: &[(&str, &[&str])] = &[
    (
        "tokenizers and templates",
        &[
            "tokenizers",
            "onig",
            "minijinja",
            "minijinja-contrib",
            "peft-data",
        ],
    ),
    (
        "a command line",
        &[
            "clap",
            "clap_builder",
            "indicatif",
            "console",
            "comfy-table",
            "rustyline",
            "ctrlc",
            "anyhow",
            "peft-cli",
        ],
    ),
    (
        "downloads",
        &["hf-hub", "ureq", "reqwest", "hyper", "tokio"],
    ),
    ("models", &["peft", "peft-models", "peft-gguf"]),
    ("a training loop", &["peft-train", "peft-dist", "plotters"]),
    ("tests", &["peft-testing", "proptest", "criterion"]),
];

#[cfg(test)]
mod tests {
    use super::*;

    const TREE: &str = "\
peft-lora v0.1.0 (/somewhere/crates/peft-lora)
peft-core v0.1.0 (/somewhere/crates/peft-core)
serde v1.0.228
tch v0.24.0
serde v1.0.228 (*)
";

    fn package() -> Package {
        serde_json::from_value(serde_json::json!({
            "name": "peft-lora", "description": null, "license": null,
            "manifest_path": "/somewhere/crates/peft-lora/Cargo.toml", "dependencies": [],
        }))
        .expect("as cargo writes it")
    }

    #[test]
    fn a_lean_tree_has_nothing_to_say() {
        assert_eq!(names(TREE), ["peft-core", "peft-lora", "serde", "tch"]);
        assert!(of_tree(&package(), TREE).is_empty());
    }

    #[test]
    fn what_comes_in_below_a_method_is_named() {
        for (name, why) in [
            ("tokenizers", "tokenizers"),
            ("clap", "command line"),
            ("peft-models", "models"),
            ("hf-hub", "downloads"),
        ] {
            let tree = format!("{TREE}{name} v1.2.3\n{name} v1.2.3 (*)\n");
            let found = of_tree(&package(), &tree);
            assert_eq!(found.len(), 1, "{name}");
            let message = &found[0].message;
            assert!(
                message.contains("`peft-lora`") && message.contains(name) && message.contains(why),
                "{message}"
            );
        }
    }

    #[test]
    fn methods_and_the_core_are_lean() {
        for name in [
            "peft-core",
            "peft-torch",
            "peft-lora",
            "peft-method-of-tomorrow",
        ] {
            assert!(is_lean(name), "{name}");
        }
        for name in ["peft", "peft-cli", "peft-models", "xtask", "benches"] {
            assert!(!is_lean(name), "{name}");
        }
    }

    /// The trees as they are.
    #[test]
    fn this_workspace_keeps_the_rule() {
        let found = check().expect("cargo tells its tree");
        let messages: Vec<&str> = found.iter().map(|it| it.message.as_str()).collect();
        assert!(messages.is_empty(), "{messages:?}");
    }
}
