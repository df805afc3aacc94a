//! Rules about single files.

use super::source::{code_only, line_of, without_tests, words};
use super::{Finding, Repo};
use crate::paths;
use std::path::Path;

/// Every source file opens with what it is; a crate opens with an essay.
pub(super) fn essays(repo: &Repo) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (path, text) in repo.texts_of("rs").filter(|(path, _)| in_src(path)) {
        let essay = text
            .lines()
            .take_while(|line| line.starts_with("//!"))
            .count();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let is_crate = ["lib.rs", "main.rs"].contains(&name.as_ref())
            && path.parent().is_some_and(|src| src.ends_with("src"));
        let least = if is_crate { 5 } else { 1 };
        if essay < least {
            let what = if is_crate { "a crate" } else { "a file" };
            findings.push(Finding::new(path, 1, format!("{what} opens with at least {least} lines of `//!`: what it is and why this way; this has {essay}")));
        }
    }
    findings
}

/// Nothing unfinished and nothing left over from looking for a mistake.
pub(super) fn leftovers(repo: &Repo) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (path, text) in repo.texts_of("rs") {
        let code = code_only(text);
        for name in ["todo", "unimplemented", "dbg"] {
            let calls = words(&code, name).filter(|at| code[at + name.len()..].starts_with('!'));
            findings.extend(calls.map(|at| {
                Finding::new(
                    path,
                    line_of(&code, at),
                    format!("`{name}!` is unfinished work"),
                )
            }));
        }
    }
    // Spelt in two halves, so that this file does not find itself.
    for mark in [concat!("TO", "DO"), concat!("FIX", "ME")] {
        let readable = repo
            .texts
            .iter()
            .filter(|(path, _)| !path.starts_with("fixtures/data"));
        for (path, text) in readable {
            findings.extend(words(text, mark).map(|at| {
                Finding::new(
                    path,
                    line_of(text, at),
                    format!("{mark}: do it, or open an issue"),
                )
            }));
        }
    }
    findings
}

/// Library code says why a value is there (`expect`), or returns an error.
pub(super) fn bare_unwraps(repo: &Repo) -> Vec<Finding> {
    let mut findings = Vec::new();
    let helpers = |path: &Path| path.starts_with("crates/peft-testing");
    for (path, text) in repo
        .texts_of("rs")
        .filter(|(path, _)| in_src(path) && !helpers(path) && !is_test_file(path))
    {
        let code = without_tests(&code_only(text));
        let found = code.match_indices(".unwrap()").map(|(at, _)| at);
        findings.extend(found.map(|at| {
            Finding::new(
                path,
                line_of(&code, at),
                "bare `.unwrap()`: return an error, or `expect(\"why it cannot be\")`",
            )
        }));
    }
    findings
}

/// `unsafe` stays in few places, each with its reason.
pub(super) fn unsafe_places(repo: &Repo) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (path, text) in repo.texts_of("rs") {
        let code = code_only(text);
        let lines: Vec<&str> = text.lines().collect();
        let allowed = may_be_unsafe(path);
        for at in words(&code, "unsafe") {
            let line = line_of(&code, at);
            if !allowed {
                findings.push(Finding::new(path, line, UNSAFE_PLACES));
            } else if !is_declaration(&code[at..]) && !has_reason(&lines, line) {
                findings.push(Finding::new(
                    path,
                    line,
                    "`unsafe` without a `SAFETY:` line above it",
                ));
            }
        }
    }
    findings
}

const UNSAFE_PLACES: &str = "`unsafe` belongs into peft-torch, peft-cuda, peft-dist, or a file named `ffi.rs`, `simd.rs`, `neon.rs` or `map.rs`";

fn may_be_unsafe(path: &Path) -> bool {
    let places = [
        "crates/peft-torch",
        "crates/peft-cuda",
        "crates/peft-dist",
        "crates/peft-core/src/tensors.rs",
    ];
    // C interfaces, processor instructions, memory-mapped files.
    let names = ["ffi.rs", "simd.rs", "neon.rs", "map.rs"];
    places.iter().any(|place| path.starts_with(place))
        || names.iter().any(|name| path.ends_with(name))
}

/// Whether it only says that calling something is unsafe: the reason is due where it is called.
fn is_declaration(code: &str) -> bool {
    let next = code.split_whitespace().nth(1).unwrap_or_default();
    next == "fn" || next == "extern"
}

/// Whether line `line` or the comment and attributes above it say why it is sound.
fn has_reason(lines: &[&str], line: usize) -> bool {
    let explains = |text: &str| text.contains("SAFETY:") || text.contains("# Safety");
    let own = lines.get(line - 1).is_some_and(|text| explains(text));
    let above = lines[..line - 1].iter().rev().take(12);
    let mut above =
        above.take_while(|text| !text.trim().is_empty() && !text.trim_end().ends_with('}'));
    own || above.any(|text| explains(text))
}

/// No path of somebody's machine.
pub(super) fn machine_paths(repo: &Repo) -> Vec<Finding> {
    let mut findings = Vec::new();
    // Spelt in two halves, so that this file does not find itself.
    let homes = [
        concat!("/ho", "me/"),
        concat!("/ro", "ot/"),
        concat!("/Us", "ers/"),
        concat!("/wo", "rk/"),
        concat!("/var/fol", "ders/"),
    ];
    for (path, text) in &repo.texts {
        let temporary =
            path.starts_with("fixtures") && path.extension().is_some_and(|kind| kind == "json");
        let folders = homes.iter().copied().chain(temporary.then_some("/tmp/"));
        for folder in folders {
            let absolute = text
                .match_indices(folder)
                .map(|(at, _)| at)
                .filter(|at| starts_a_path(text, *at));
            findings.extend(absolute.map(|at| {
                Finding::new(
                    path,
                    line_of(text, at),
                    format!("`{folder}…` is a path of one machine"),
                )
            }));
        }
    }
    findings
}

/// Whether the slash at `at` is the first of its path, as in `"/x` and not in `crates/x`.
fn starts_a_path(text: &str, at: usize) -> bool {
    let before = text[..at].chars().next_back();
    before.is_none_or(|before| before.is_whitespace() || "\"'`(=:,[".contains(before))
}

/// Links between our documents lead somewhere.
pub(super) fn broken_links(repo: &Repo) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (path, text) in repo.texts_of("md") {
        let mut fenced = false;
        for (index, line) in text.lines().enumerate() {
            fenced ^= line.trim_start().starts_with("```");
            for target in links(line).filter(|_| !fenced) {
                let file = target.split('#').next().unwrap_or_default();
                let folder = path.parent().unwrap_or(Path::new(""));
                if !file.is_empty() && !paths::root().join(folder).join(file).exists() {
                    findings.push(Finding::new(
                        path,
                        index + 1,
                        format!("the link `{target}` leads nowhere"),
                    ));
                }
            }
        }
    }
    findings
}

/// The targets of a line's `[text](target)` that are files.
fn links(line: &str) -> impl Iterator<Item = &str> {
    let targets = line
        .split("](")
        .skip(1)
        .filter_map(|rest| rest.split([')', ' ']).next());
    targets.filter(|target| !target.contains("://") && !target.starts_with("mailto:"))
}

/// The repository stays small enough to clone without thinking.
pub(super) fn sizes(repo: &Repo) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (path, bytes) in repo.files.iter().filter(|(_, bytes)| *bytes > LARGEST_FILE) {
        findings.push(Finding::new(
            path,
            1,
            format!("{bytes} bytes; a file here has at most {LARGEST_FILE}"),
        ));
    }
    let fixtures: u64 = repo
        .files
        .iter()
        .filter(|(path, _)| path.starts_with("fixtures"))
        .map(|(_, bytes)| bytes)
        .sum();
    if fixtures > LARGEST_FIXTURES {
        findings.push(Finding::new(
            "fixtures",
            1,
            format!("{fixtures} bytes in all; fixtures have at most {LARGEST_FIXTURES}"),
        ));
    }
    findings
}

const LARGEST_FILE: u64 = 2_000_000;
const LARGEST_FIXTURES: u64 = 24_000_000;

/// Text that others wrote has its origin and licence beside it.
pub(super) fn origins(repo: &Repo) -> Vec<Finding> {
    let folder = Path::new("fixtures/data");
    let readme = folder.join("README.md");
    let said = repo
        .texts
        .iter()
        .find(|(path, _)| *path == readme)
        .map_or("", |(_, text)| text);
    let foreign = repo
        .files
        .iter()
        .map(|(path, _)| path)
        .filter(|path| path.parent() == Some(folder) && **path != readme);
    let unnamed = foreign.filter(|path| {
        !said.contains(
            path.file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .as_ref(),
        )
    });
    unnamed
        .map(|path| {
            Finding::new(
                path,
                1,
                "fixtures/data/README.md does not say where this is from and under which licence",
            )
        })
        .collect()
}

fn in_src(path: &Path) -> bool {
    path.components().any(|part| part.as_os_str() == "src")
}

fn is_test_file(path: &Path) -> bool {
    path.components().any(|part| part.as_os_str() == "tests") || path.ends_with("tests.rs")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn repo(path: &str, text: &str) -> Repo {
        Repo {
            texts: vec![(path.into(), text.into())],
            files: vec![(path.into(), text.len() as u64)],
        }
    }

    /// The lines that a rule finds.
    fn lines(findings: &[Finding]) -> Vec<usize> {
        findings.iter().map(|finding| finding.line).collect()
    }

    #[test]
    fn a_crate_needs_an_essay_and_a_file_a_line() {
        let short = "//! A crate.\n\nfn a() {}\n";
        assert_eq!(lines(&essays(&repo("crates/x/src/lib.rs", short))), [1]);
        assert!(essays(&repo("crates/x/src/a.rs", short)).is_empty());
        assert!(essays(&repo("crates/x/tests/a.rs", "fn a() {}")).is_empty());
    }

    #[test]
    fn unfinished_work_is_found_in_code_and_marks_everywhere() {
        let text = format!(
            "let todo = 1;\n// todo!() in words\ntodo!();\n// {}: later\n",
            concat!("TO", "DO")
        );
        assert_eq!(lines(&leftovers(&repo("crates/x/src/a.rs", &text))), [3, 4]);
    }

    #[test]
    fn unwraps_count_outside_tests_only() {
        let text = "fn a() { b.unwrap() }\n#[cfg(test)]\nmod tests {\n fn c() { d.unwrap() }\n}\n";
        assert_eq!(lines(&bare_unwraps(&repo("crates/x/src/a.rs", text))), [1]);
        assert!(bare_unwraps(&repo("crates/x/tests/a.rs", text)).is_empty());
    }

    #[test]
    fn unsafe_needs_a_place_and_a_reason() {
        let text = "// SAFETY: alive\nunsafe { a() }\n\nunsafe { b() }\n\nunsafe fn c() {}\n";
        assert_eq!(
            lines(&unsafe_places(&repo("crates/peft-torch/src/ffi.rs", text))),
            [4]
        );
        assert_eq!(
            lines(&unsafe_places(&repo("crates/peft-lora/src/lib.rs", text))),
            [2, 4, 6]
        );
    }

    #[test]
    fn a_path_of_one_machine_is_found() {
        let home = concat!("/ho", "me/");
        let text = format!("open(\"{home}me/x\")\nsee docs{home}page\n");
        assert_eq!(lines(&machine_paths(&repo("a.py", &text))), [1]);
    }

    #[test]
    fn links_outside_fences_are_followed() {
        let text = "[a](Cargo.toml) [b](gone.md#x) [c](https://x.y/z.md)\n```\n[d](gone.md)\n```\n";
        assert_eq!(lines(&broken_links(&repo("README.md", text))), [1]);
    }

    #[test]
    fn foreign_data_names_its_origin() {
        let mut repo = repo("fixtures/data/README.md", "`a.txt`: public domain");
        repo.files.extend([
            ("fixtures/data/a.txt".into(), 1),
            ("fixtures/data/b.txt".into(), 1),
        ]);
        let found = origins(&repo);
        assert_eq!(found.len(), 1);
        assert!(found[0].path.ends_with("b.txt"));
    }
}
