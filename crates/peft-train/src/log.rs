//! `log.jsonl`: what happened, a line each, for people, plots and scripts.
//!
//! A line is written whole and at once. A checkpoint remembers how long the log
//! was, and a resumed run cuts it there: no step is in it twice.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    number::{self, named},
};

/// A line of the log.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Record {
    /// An evaluation.
    Eval(EvalRecord),
    /// A step of training, or the mean of some.
    Step(StepRecord),
}

/// What a step of training did; with `logging_steps` above 1, the mean since the last line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// How many steps were taken.
    pub step: usize,
    /// How often all rows were seen.
    pub epoch: f64,
    /// Mean loss of the labelled tokens.
    pub loss: f64,
    /// Of this step.
    pub learning_rate: f64,
    /// Before clipping.
    pub grad_norm: f64,
    /// Tokens seen since the start of the run, without padding.
    pub tokens: u64,
    /// Since the last line.
    pub tokens_per_second: f64,
    /// Bytes in use, where the system tells.
    pub memory: Option<u64>,
}

/// An evaluation on held-out rows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvalRecord {
    /// After how many steps.
    pub step: usize,
    /// How often all rows were seen.
    pub epoch: f64,
    /// Mean loss of the labelled tokens.
    #[serde(with = "number")]
    pub eval_loss: f64,
    /// e to the power of the loss.
    #[serde(with = "number")]
    pub perplexity: f64,
    /// What the task is judged by besides, by name: `accuracy`, `f1`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty", with = "named")]
    pub figures: BTreeMap<String, f64>,
    /// The lowest loss so far.
    pub best: bool,
    /// How long it took.
    pub seconds: f64,
}

/// The log of a run, open for writing.
#[derive(Debug)]
pub(crate) struct Log {
    file: File,
    path: PathBuf,
    bytes: u64,
}

impl Log {
    /// Opens the log and cuts it to its first `bytes`.
    pub(crate) fn open(path: &Path, bytes: u64) -> Result<Log> {
        let mut options = OpenOptions::new();
        let options = options.create(true).append(true).truncate(false);
        let file = options.open(path).map_err(Error::io(path))?;
        if file.metadata().map_err(Error::io(path))?.len() < bytes {
            return Err(Error::run(
                path,
                "is shorter than when the checkpoint was made",
            ));
        }
        file.set_len(bytes).map_err(Error::io(path))?;
        let path = path.to_owned();
        Ok(Log { file, path, bytes })
    }

    pub(crate) fn write(&mut self, record: &Record) -> Result<()> {
        let json =
            serde_json::to_string(record).map_err(|e| Error::run(&self.path, e.to_string()))?;
        let line = format!("{json}\n");
        self.file
            .write_all(line.as_bytes())
            .map_err(Error::io(&self.path))?;
        self.bytes += line.len() as u64;
        Ok(())
    }

    /// How long it is.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// Reads a log; a last line that is not whole is left out, as after a kill.
pub fn read_log(path: &Path) -> Result<Vec<Record>> {
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    let whole = text.rfind('\n').map_or(0, |end| end + 1);
    let lines = text[..whole]
        .lines()
        .enumerate()
        .filter(|(_, line)| !line.is_empty());
    lines
        .map(|(at, line)| {
            serde_json::from_str(line)
                .map_err(|error| Error::run(path, format!("line {}: {error}", at + 1)))
        })
        .collect()
}
