//! A model from wherever it lies: a folder, a GGUF file, or the hub.

use std::path::{Path, PathBuf};

use peft_core::{AsStored, BaseFormat, Error, Result, files};
use peft_gguf::{Gguf, HfView};
use peft_torch::memory;
use serde_json::Value;
use tch::{Device, Kind};

use crate::{
    Decoder, Network, Task,
    assemble::{self, HeadOptions},
    checkpoint::Checkpoint,
    config::Keys,
    hub,
};

/// How a model is to be loaded.
#[derive(Debug, Clone, Copy)]
pub struct OpenOptions {
    /// The dtype to compute in; `None`: the folder's own, as [`crate::Checkpoint::open`] finds it; fp32 for GGUF.
    pub kind: Option<Kind>,
    /// Where to.
    pub device: Device,
}

impl Default for OpenOptions {
    fn default() -> OpenOptions {
        OpenOptions {
            kind: None,
            device: Device::Cpu,
        }
    }
}

/// Where a model lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A Hugging Face folder.
    Folder(PathBuf),
    /// A GGUF file.
    Gguf(PathBuf),
}

impl Source {
    /// Finds what `name` means: a folder, a `.gguf` file, or an id on the hub, which is fetched into the usual cache.
    pub fn find(name: &str) -> Result<Source> {
        let path = Path::new(name);
        if path.is_dir() {
            return Ok(Source::Folder(path.to_owned()));
        }
        if path.is_file() {
            if path
                .extension()
                .is_some_and(|it| it.eq_ignore_ascii_case("gguf"))
            {
                return Ok(Source::Gguf(path.to_owned()));
            }
            return Err(Error::file(path, "neither a model folder nor a .gguf file"));
        }
        if hub::is_id(name) {
            return hub::fetch(name).map(Source::Folder);
        }
        Err(Error::file(
            path,
            "no such folder or file, and no hub id of the form OWNER/NAME",
        ))
    }

    /// The folder or file.
    pub fn path(&self) -> &Path {
        match self {
            Source::Folder(path) | Source::Gguf(path) => path,
        }
    }

    /// `config.json`, or what it would be.
    pub fn config(&self) -> Result<Value> {
        match self {
            Source::Folder(dir) => files::read_json(&dir.join("config.json")),
            Source::Gguf(path) => Ok(view(path)?.config().clone()),
        }
    }
}

/// Loads a decoder from a folder, a GGUF file or the hub.
pub fn open(name: &str, options: OpenOptions) -> Result<Box<dyn Decoder>> {
    open_source(&Source::find(name)?, options)
}

/// Loads a decoder from where it lies.
pub fn open_source(source: &Source, options: OpenOptions) -> Result<Box<dyn Decoder>> {
    open_source_in(source, options, &AsStored)
}

/// [`open_source`], its layers kept in a format.
pub fn open_source_in(
    source: &Source,
    options: OpenOptions,
    format: &dyn BaseFormat,
) -> Result<Box<dyn Decoder>> {
    let keys = keys(source)?;
    // Before the weights: a model of a kind that is not known says so, whatever its files.
    assemble::offers(&keys, Task::CausalLm)?;
    format.check(&keys.json)?;
    let mut weights = weights(source, options)?;
    let mut model = assemble::decoder(&keys, &mut *format.over(&mut weights))?;
    memory::give_back();
    model.origin.aside = weights.finish(assemble::aside(Task::CausalLm))?;
    Ok(Box::new(model))
}

/// Loads a model for a task from where it lies. What the checkpoint lacks of a head is made at random
/// ([`Network::fresh`] says what), and what belongs to another head is left aside.
pub fn open_task(
    source: &Source,
    task: Task,
    options: OpenOptions,
    head: &HeadOptions,
) -> Result<Box<dyn Network>> {
    open_task_in(source, task, options, head, &AsStored)
}

/// [`open_task`], its layers kept in a format.
pub fn open_task_in(
    source: &Source,
    task: Task,
    options: OpenOptions,
    head: &HeadOptions,
    format: &dyn BaseFormat,
) -> Result<Box<dyn Network>> {
    let keys = keys(source)?;
    assemble::offers(&keys, task)?;
    format.check(&keys.json)?;
    let mut weights = weights(source, options)?;
    let mut built = assemble::network(&keys, &mut *format.over(&mut weights), task, head)?;
    memory::give_back();
    *built.aside() = weights.finish(assemble::aside(task))?;
    Ok(built.network())
}

pub(crate) fn keys(source: &Source) -> Result<Keys> {
    match source {
        Source::Folder(dir) => {
            let path = dir.join("config.json");
            Keys::new(files::read_json(&path)?, &path)
        }
        Source::Gguf(path) => Keys::new(view(path)?.config().clone(), path),
    }
}

pub(crate) fn weights(
    source: &Source,
    OpenOptions { kind, device }: OpenOptions,
) -> Result<Checkpoint> {
    match source {
        Source::Folder(dir) => Checkpoint::open(dir, kind, device),
        Source::Gguf(path) => {
            let kind = kind.or(Some(Kind::Float));
            Ok(Checkpoint::gguf(view(path)?, path, kind, device))
        }
    }
}

fn view(path: &Path) -> Result<HfView> {
    let fault = |error| Error::file(path, error);
    HfView::new(Gguf::open(path).map_err(fault)?).map_err(fault)
}
