//! `cargo xtask tidy`: the house rules that a program can check.
//!
//! ARCHITECTURE.md says what holds in this workspace; a rule that nobody checks holds until the first hurry.
//! Each rule is one function from the repository to findings, and a finding is `file:line: message`, so that
//! an editor can jump to it. `--fix` rewrites the generated parts of the README and nothing else.

pub(crate) mod layers;
mod lean;
mod source;
mod text;

use crate::{paths, readme, ui};
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};

/// Flags of `cargo xtask tidy`.
#[derive(clap::Args, Default)]
pub(crate) struct Args {
    /// Rewrite the generated parts of the README
    #[arg(long)]
    fix: bool,
}

/// A broken rule.
pub(crate) struct Finding {
    pub(crate) path: PathBuf,
    pub(crate) line: usize,
    pub(crate) message: String,
}

impl Finding {
    pub(crate) fn new(
        path: impl Into<PathBuf>,
        line: usize,
        message: impl Into<String>,
    ) -> Finding {
        Finding {
            path: path.into(),
            line,
            message: message.into(),
        }
    }
}

/// The files of the repository that are meant to be read, by their paths from its root.
struct Repo {
    texts: Vec<(PathBuf, String)>,
    /// All files, with their sizes.
    files: Vec<(PathBuf, u64)>,
}

/// `cargo xtask tidy`.
pub(crate) fn tidy(args: &Args) -> Result<()> {
    if args.fix {
        readme::fix()?;
    }
    let repo = Repo::read(&paths::root())?;
    let mut findings = Vec::new();
    findings.extend(text::essays(&repo));
    findings.extend(text::leftovers(&repo));
    findings.extend(text::bare_unwraps(&repo));
    findings.extend(text::unsafe_places(&repo));
    findings.extend(text::machine_paths(&repo));
    findings.extend(text::broken_links(&repo));
    findings.extend(text::sizes(&repo));
    findings.extend(text::origins(&repo));
    findings.extend(layers::check(&repo)?);
    findings.extend(lean::check()?);
    findings.extend(readme::check()?);
    findings.sort_by(|a, b| (&a.path, a.line).cmp(&(&b.path, b.line)));
    for Finding {
        path,
        line,
        message,
    } in &findings
    {
        println!("{}:{line}: {message}", path.display());
    }
    match findings.len() {
        0 => {
            println!("tidy: {} files, nothing to say", repo.files.len());
            Ok(())
        }
        1 => Err(ui::problem("a house rule is broken", WHY)),
        n => Err(ui::problem(
            format!("house rules are broken in {n} places"),
            WHY,
        )),
    }
}

const WHY: &str = "the rules and their reasons are in ARCHITECTURE.md; `cargo xtask tidy --fix` rewrites generated parts";

impl Repo {
    fn read(root: &Path) -> Result<Repo> {
        let mut repo = Repo {
            texts: Vec::new(),
            files: Vec::new(),
        };
        repo.walk(root, Path::new(""))?;
        Ok(repo)
    }

    fn walk(&mut self, root: &Path, below: &Path) -> Result<()> {
        let folder = root.join(below);
        let entries =
            fs::read_dir(&folder).with_context(|| format!("at `{}`", folder.display()))?;
        for entry in entries {
            let entry = entry?;
            let name = entry.file_name();
            let path = below.join(&name);
            if entry.file_type()?.is_dir() {
                if !NOT_OURS.contains(&name.to_string_lossy().as_ref()) {
                    self.walk(root, &path)?;
                }
                continue;
            }
            self.files.push((path.clone(), entry.metadata()?.len()));
            if is_text(&path) {
                let text =
                    fs::read(entry.path()).with_context(|| format!("at `{}`", path.display()))?;
                self.texts
                    .push((path, String::from_utf8_lossy(&text).into_owned()));
            }
        }
        Ok(())
    }

    /// The texts whose names end with `.extension`.
    fn texts_of(&self, extension: &'static str) -> impl Iterator<Item = (&Path, &str)> {
        let wanted = move |path: &Path| path.extension().is_some_and(|found| found == extension);
        self.texts
            .iter()
            .map(|(path, text)| (path.as_path(), text.as_str()))
            .filter(move |(path, _)| wanted(path))
    }
}

const NOT_OURS: [&str; 5] = ["target", ".git", ".venv", "__pycache__", "corpus"];

fn is_text(path: &Path) -> bool {
    let texts = [
        "rs", "md", "toml", "py", "sh", "json", "jsonl", "yml", "yaml", "txt", "cpp", "h", "jinja",
        "template",
    ];
    let extension = path
        .extension()
        .map(|extension| extension.to_string_lossy().into_owned());
    extension.is_some_and(|extension| texts.contains(&extension.as_str()))
}
