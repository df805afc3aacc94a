//! `cargo xtask new-method NAME`: a crate for a new method that compiles and obeys the laws.
//!
//! It copies `xtask/templates/method`, a small method that is a whole one, under new names. Starting from
//! something that works and changing it beats filling in blanks: after every change the tests say whether it
//! still is a method. The template is real Rust, so it is compiled, formatted and checked like the rest.

use crate::{paths, run, ui};
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::Path;

/// Flags of `cargo xtask new-method`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The method's name, in small letters: `bitfit` makes the crate peft-bitfit with a BitfitConfig
    name: String,
}

/// `cargo xtask new-method`.
pub(crate) fn new_method(args: &Args) -> Result<()> {
    let names = Names::new(&args.name)?;
    let folder = paths::root().join("crates").join(&names.package);
    if folder.exists() {
        bail!("`{}` is there already", paths::short(&folder));
    }
    write(&folder, &names)?;
    register(&names)?;
    // Names of another length break lines elsewhere; without rustfmt the crate is only less tidy.
    run::works(&mut run::cargo(&["fmt", "--package", &names.package]));
    explain(&names);
    Ok(())
}

/// The spellings of one name.
struct Names {
    /// `peft-bitfit`
    package: String,
    /// `bitfit`, as a module.
    module: String,
    /// `Bitfit`, as a type.
    kind: String,
    /// `BITFIT`, the `peft_type`.
    tag: String,
}

impl Names {
    fn new(name: &str) -> Result<Names> {
        let name = name.strip_prefix("peft-").unwrap_or(name);
        let small = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        let starts = name.starts_with(|c: char| c.is_ascii_lowercase());
        if !starts || name.ends_with('-') || name.contains("--") || !name.chars().all(small) {
            let next = "use small letters, digits and single dashes, as in `cargo xtask new-method bitfit`";
            return Err(ui::problem(
                format!("`{name}` is no name for a method"),
                next,
            ));
        }
        let module = name.replace('-', "_");
        let kind = name.split('-').map(capital).collect();
        Ok(Names {
            package: format!("peft-{name}"),
            tag: module.to_uppercase(),
            module,
            kind,
        })
    }

    /// A file of the template under these names.
    fn apply(&self, template: &str) -> String {
        let text = template
            .replace("peft-scale", &self.package)
            .replace("peft_scale", &format!("peft_{}", self.module));
        text.replace("SCALE", &self.tag)
            .replace("ScaleConfig", &format!("{}Config", self.kind))
            .replace("Scale", &self.kind)
    }
}

fn capital(word: &str) -> String {
    let mut letters = word.chars();
    letters.next().map_or_else(String::new, |first| {
        first.to_ascii_uppercase().to_string() + letters.as_str()
    })
}

const TEMPLATE: [(&str, &str); 3] = [
    (
        "Cargo.toml",
        include_str!("../templates/method/Cargo.toml.template"),
    ),
    ("src/lib.rs", include_str!("../templates/method/src/lib.rs")),
    (
        "tests/laws.rs",
        include_str!("../templates/method/tests/laws.rs"),
    ),
];

fn write(folder: &Path, names: &Names) -> Result<()> {
    for (name, template) in TEMPLATE {
        let path = folder.join(name);
        let write = || {
            fs::create_dir_all(path.parent().unwrap_or(folder))?;
            fs::write(&path, names.apply(template))
        };
        write().with_context(|| format!("at `{}`", paths::short(&path)))?;
    }
    Ok(())
}

/// Adds the crate to the workspace's list, where the facade finds it.
fn register(names: &Names) -> Result<()> {
    let path = paths::root().join("Cargo.toml");
    let text = fs::read_to_string(&path).context("at `Cargo.toml`")?;
    fs::write(&path, with_member(&text, &names.package)?).context("at `Cargo.toml`")
}

/// The workspace's manifest with one more `peft-…` line, in the order of the alphabet.
fn with_member(manifest: &str, package: &str) -> Result<String> {
    let new = format!("{package} = {{ path = \"crates/{package}\" }}");
    let mut lines: Vec<&str> = manifest.lines().collect();
    let ours = |line: &str| line.starts_with("peft") && line.contains("path = \"crates/");
    let last = lines
        .iter()
        .rposition(|line| ours(line))
        .context("`Cargo.toml` lists no crate of this workspace")?;
    let place = lines
        .iter()
        .position(|line| ours(line) && *line > new.as_str())
        .unwrap_or(last + 1);
    lines.insert(place, &new);
    Ok(lines.join("\n") + "\n")
}

fn explain(names: &Names) {
    let Names {
        package,
        module,
        kind,
        ..
    } = names;
    println!(
        "{} is ready: a method that learns one factor for each output, to be changed\n",
        ui::bold(package)
    );
    println!("  crates/{package}/src/lib.rs     the settings and the mathematics");
    println!("  crates/{package}/tests/laws.rs  what must hold");
    println!("\nTry it:            cargo test --package {package}");
    println!(
        "\nMake it known to `peft` in two lines (and its dependency in crates/peft/Cargo.toml: {package}.workspace = true):"
    );
    println!("  crates/peft/src/lib.rs   pub use peft_{module} as {module};");
    println!("  crates/peft/src/lib.rs   .with::<{module}::{kind}Config>()    in `builtin()`");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_name_in_all_its_spellings() -> Result<()> {
        let names = Names::new("ln-tuning")?;
        let made = names.apply("peft-scale peft_scale SCALE ScaleConfig Scale scale");
        assert_eq!(
            made,
            "peft-ln-tuning peft_ln_tuning LN_TUNING LnTuningConfig LnTuning scale"
        );
        assert_eq!(Names::new("peft-ia3")?.package, "peft-ia3");
        for wrong in ["", "3d", "LoRA", "a_b", "a--b", "a-", "../a"] {
            assert!(Names::new(wrong).is_err(), "{wrong}");
        }
        Ok(())
    }

    #[test]
    fn the_workspace_lists_it_in_order() -> Result<()> {
        let old = "[workspace.dependencies]\npeft = { path = \"crates/peft\" }\npeft-core = { path = \"crates/peft-core\" }\npeft-data = { path = \"crates/peft-data\" }\n\n[lints]\n";
        let new = with_member(old, "peft-critic")?;
        let at = |name: &str| new.find(name).unwrap();
        assert!(
            at("peft-core") < at("peft-critic")
                && at("peft-critic") < at("peft-data")
                && new.ends_with("[lints]\n")
        );
        let last = with_member(old, "peft-zoo")?;
        assert!(
            last.contains("peft-data\" }\npeft-zoo = { path = \"crates/peft-zoo\" }\n\n[lints]")
        );
        Ok(())
    }
}
