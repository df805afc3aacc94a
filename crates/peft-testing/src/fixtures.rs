//! Python's numbers, as `fixtures/make.py` wrote them down.

use std::path::{Path, PathBuf};

use peft_core::{State, files, tensors};
use serde_json::Value;
use tch::Tensor;

/// The folder `fixtures` of the repository.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures")
}

/// One measured adapter: a folder as Python's `peft` wrote it, and what Python computes with it.
#[derive(Debug)]
pub struct Case {
    /// `<model>__<case>`
    pub name: String,
    /// The adapter folder.
    pub dir: PathBuf,
    /// The folder of the base.
    pub model: PathBuf,
    /// `meta.json`: facts about Python's live model.
    pub meta: Value,
    /// `io.safetensors`: inputs and results.
    pub io: State,
}

impl Case {
    /// A tensor of `io`.
    ///
    /// # Panics
    /// If there is none.
    pub fn tensor(&self, key: &str) -> &Tensor {
        let found = self.io.get(key);
        found.unwrap_or_else(|| panic!("{}: io.safetensors has no `{key}`", self.name))
    }
}

/// Every case of a method's folder below `fixtures`, in order of name.
///
/// # Panics
/// If a file cannot be read.
pub fn cases(method: &str) -> Vec<Case> {
    let folder = root().join(method);
    let entries =
        std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut dirs: Vec<PathBuf> = entries.flatten().map(|it| it.path()).collect();
    dirs.retain(|dir| dir.join("meta.json").exists());
    dirs.sort();
    dirs.into_iter().map(case).collect()
}

fn case(dir: PathBuf) -> Case {
    let read = || -> peft_core::Result<(Value, State)> {
        let meta = files::read_json(&dir.join("meta.json"))?;
        Ok((meta, tensors::read(&dir.join("io.safetensors"))?))
    };
    let (meta, io) = read().unwrap_or_else(|error| panic!("{error}"));
    let name = dir
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let base = meta["model"].as_str().unwrap_or_default();
    let base = match meta["base"].as_str() {
        Some(path) => root().join(path),
        None => root().join("models").join(base),
    };
    Case {
        model: base,
        name,
        dir,
        meta,
        io,
    }
}
