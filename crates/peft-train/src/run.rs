//! The folder of a run: everything that a later command needs travels in it.
//!
//! ```text
//! RUN/run.json          what this is: status, base model, method, versions, summary
//!     config.yaml       every setting as it was used; can be fed back
//!     tokenizer.json …  the tokenizer with its chat template
//!     log.jsonl         a line for each logged step and evaluation
//!     loss.png, .svg    the curve
//!     adapter/          the adapter as it is at the end
//!     best/             the adapter with the lowest held-out loss
//!     checkpoint/       from where an interrupted run goes on
//! ```
//!
//! Each file is there whole or not at all, and `run.json` says how far the run
//! came: a folder without it is no run.

use std::fs;
use std::path::{Path, PathBuf};

use peft_core::files;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::train::Summary;

/// What a run is, as `run.json` holds it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunInfo {
    /// How far it came.
    pub status: Status,
    /// The base model: a folder (absolute), a file or a hub id.
    pub base_model: String,
    /// The dtype of the base model while training: `fp32`, `bf16`, `fp16`.
    pub dtype: String,
    /// The method: `LORA`.
    pub method: String,
    /// What made it, such as `peft` and `libtorch`, with versions.
    pub versions: std::collections::BTreeMap<String, String>,
    /// What came out, once it ended.
    pub summary: Option<Summary>,
    /// Keys that a later version added.
    #[serde(flatten)]
    pub more: serde_json::Map<String, Value>,
}

/// How far a run came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// It is running, or was killed.
    Running,
    /// It was stopped and can be resumed.
    Interrupted,
    /// It ended with an error.
    Failed,
    /// It is done.
    Finished,
}

/// The folder of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    dir: PathBuf,
}

const INFO: &str = "run.json";

/// The process that writes a file of this name.
fn writer(name: &str) -> Option<u32> {
    let (begin, _) = name.rsplit_once(".partial")?;
    begin.rsplit_once('.')?.1.parse().ok()
}

/// Where processes cannot be looked up, none is.
fn is_running(process: u32) -> bool {
    Path::new("/proc").join(process.to_string()).exists()
}

/// What a run writes: what `overwrite` may remove.
const OURS: [&str; 9] = [
    INFO,
    "config.yaml",
    "log.jsonl",
    "loss.png",
    "loss.svg",
    "adapter",
    "best",
    "checkpoint",
    "base",
];

impl Run {
    /// A new run in `dir`, which must not exist or be empty; with `overwrite` an old run there is removed.
    pub fn create(dir: &Path, overwrite: bool) -> Result<Run> {
        let run = Run::at(dir);
        let occupied = match fs::read_dir(dir) {
            Ok(mut entries) => entries.next().is_some(),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => false,
            Err(error) => return Err(Error::io(dir)(error)),
        };
        if occupied && !overwrite {
            let reason = match run.info() {
                Ok(info) if info.status != Status::Finished => {
                    "holds a run that did not finish: resume it, overwrite it, or take another folder"
                }
                Ok(_) => "holds a finished run: overwrite it, or take another folder",
                Err(_) => "is not empty: take another folder",
            };
            return Err(Error::run(dir, reason));
        }
        if occupied {
            if run.info().is_err() {
                return Err(Error::run(
                    dir,
                    "is not empty and no run, it will not be overwritten",
                ));
            }
            for name in OURS {
                remove(&dir.join(name))?;
            }
        }
        fs::create_dir_all(dir).map_err(Error::io(dir))?;
        Ok(run)
    }

    /// The paths of a run in `dir`, whatever is there.
    pub fn at(dir: &Path) -> Run {
        let dir = dir.to_owned();
        Run { dir }
    }

    /// A run that is there.
    pub fn open(dir: &Path) -> Result<Run> {
        let run = Run::at(dir);
        run.info().map(|_| run)
    }

    /// Removes what processes that were killed left half-written: `.NAME.PROCESS.partial`.
    pub fn remove_partial(&self) -> Result<()> {
        for dir in ["", "adapter", "best", "checkpoint"] {
            let Ok(entries) = fs::read_dir(self.dir.join(dir)) else {
                continue;
            };
            for path in entries.flatten().map(|it| it.path()) {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                let left = name.starts_with('.') && writer(&name).is_some_and(|it| !is_running(it));
                if left && path.is_file() {
                    fs::remove_file(&path).map_err(Error::io(&path))?;
                }
            }
        }
        Ok(())
    }

    /// Whether a folder looks like that of a run.
    pub fn is_run(dir: &Path) -> bool {
        dir.join(INFO).is_file()
    }

    /// What `run.json` says.
    pub fn info(&self) -> Result<RunInfo> {
        let path = self.dir.join(INFO);
        if !path.exists() {
            let reason = format!("no `{INFO}` in this folder, so it holds no run");
            return Err(Error::run(&self.dir, reason));
        }
        let json = files::read_json(&path)?;
        serde_json::from_value(json).map_err(|error| Error::run(&path, error.to_string()))
    }

    /// Writes `run.json`.
    pub fn set_info(&self, info: &RunInfo) -> Result<()> {
        let path = self.dir.join(INFO);
        let json = serde_json::to_value(info).map_err(|e| Error::run(&path, e.to_string()))?;
        Ok(files::write_json(&path, &json)?)
    }

    /// The folder; the tokenizer lies right in it.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The settings of the run.
    pub fn config(&self) -> PathBuf {
        self.dir.join("config.yaml")
    }

    /// The log.
    pub fn log(&self) -> PathBuf {
        self.dir.join("log.jsonl")
    }

    /// The curve as a picture: `png` or `svg`.
    pub fn curve(&self, kind: &str) -> PathBuf {
        self.dir.join(format!("loss.{kind}"))
    }

    /// The adapter as it is at the end.
    pub fn adapter(&self) -> PathBuf {
        self.dir.join("adapter")
    }

    /// The adapter with the lowest held-out loss.
    pub fn best(&self) -> PathBuf {
        self.dir.join("best")
    }

    /// From where the run can go on.
    pub fn checkpoint(&self) -> PathBuf {
        self.dir.join("checkpoint").join("state.safetensors")
    }
}

fn remove(path: &Path) -> Result<()> {
    let gone = match path.is_dir() {
        true => fs::remove_dir_all(path),
        false => fs::remove_file(path),
    };
    match gone {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io(path)(error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_killed_processes_left_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::create_dir(path("best")).unwrap();
        let mine = format!(".log.{}.partial", std::process::id());
        // No process has the largest number.
        let left = [
            ".loss.4294967295.partial.png",
            "best/.a.b.4294967295.partial",
        ];
        let kept = [
            &mine,
            "config.yaml",
            "best/.a.partial",
            "loss.4294967295.partial",
        ];
        for name in left.iter().chain(&kept) {
            fs::write(path(name), "x").unwrap();
        }
        Run::at(dir.path()).remove_partial().unwrap();
        assert!(left.iter().all(|name| !path(name).exists()));
        assert!(kept.iter().all(|name| path(name).exists()));
    }
}
