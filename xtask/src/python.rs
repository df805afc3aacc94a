//! Python's own stack in `target/python`: what `fixtures`, `interop` and `bench --python` compare with.
//!
//! Building and testing never need it. Its packages are pinned one by one (`xtask/python/requirements.txt`) and
//! installed without letting pip resolve anything, so that two machines compare with the same Python. An
//! environment that was made by hand and has these versions is adopted.

use crate::{paths, run, ui, wheel};
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Makes `target/python` ready and gives its interpreter.
pub(crate) fn ensure() -> Result<PathBuf> {
    let python = paths::python();
    let list = paths::root().join("xtask/python/requirements.txt");
    let wanted = wheel::sha256(&list)?;
    let stamp = paths::target().join("python/.stamp");
    if python.exists() && fs::read_to_string(&stamp).is_ok_and(|stamp| stamp == wanted) {
        return Ok(python);
    }
    if !missing(&python, &list).is_ok_and(|packages| packages.is_empty()) {
        install(&python, &list)?;
    }
    fs::write(&stamp, wanted).with_context(|| format!("at `{}`", paths::short(&stamp)))?;
    Ok(python)
}

/// The packages that are not there in the right version.
fn missing(python: &Path, list: &Path) -> Result<Vec<String>> {
    let script = paths::root().join("xtask/python/missing.py");
    let lines = run::output(Command::new(python).arg(script).arg(list))?;
    Ok(lines.lines().map(ToOwned::to_owned).collect())
}

fn install(python: &Path, list: &Path) -> Result<()> {
    let folder = paths::target().join("python");
    ui::say(
        "Python's torch, transformers and peft are not in target/python yet: fetching them, once",
    );
    ui::say(format!(
        "({} to download, {} on the disk)",
        ui::bytes(DOWNLOAD),
        ui::bytes(INSTALLED)
    ));
    fs::create_dir_all(paths::target()).context("at `target`")?;
    wheel::need_space(&paths::target(), DOWNLOAD + INSTALLED, "Python's stack")?;
    if !run::works(Command::new(python).args(["-m", "pip", "--version"])) {
        make_environment(&folder)?;
    }
    let mut pip = Command::new(python);
    pip.args([
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--only-binary=:all:",
        "--requirement",
    ])
    .arg(list);
    let downloads = paths::target().join("downloads");
    fs::create_dir_all(&downloads)?;
    let (success, complaint) = wheel::watched(pip.env("TMPDIR", &downloads))?;
    if !success {
        let (what, next) = wheel::explain(
            "cannot install Python's stack into target/python",
            &complaint,
        );
        return Err(ui::problem(what, next));
    }
    Ok(())
}

fn make_environment(folder: &Path) -> Result<()> {
    let next = format!(
        "install Python {}.{} or newer with venv (Debian and Ubuntu: `apt install python3 python3-venv`)",
        OLDEST.0, OLDEST.1
    );
    let version = "import sys; print(*sys.version_info[:2])";
    let found = run::output(Command::new("python3").args(["-c", version]))
        .map_err(|_| ui::problem("`python3` is not on the PATH", &next))?;
    let mut parts = found
        .split_whitespace()
        .filter_map(|part| part.parse::<u32>().ok());
    if (parts.next(), parts.next()) < (Some(OLDEST.0), Some(OLDEST.1)) {
        return Err(ui::problem(
            format!("`python3` is version {}", found.trim().replace(' ', ".")),
            next,
        ));
    }
    run::output(
        Command::new("python3")
            .args(["-m", "venv", "--clear"])
            .arg(folder),
    )
    .map(drop)
    .map_err(|error| ui::problem(format!("{error:#}"), next))
}

/// The oldest Python for which all pinned packages have wheels.
const OLDEST: (u32, u32) = (3, 11);
const DOWNLOAD: u64 = 1_800_000_000;
const INSTALLED: u64 = 4_100_000_000;
