//! From where a run can go on to the same bits.
//!
//! One safetensors file, so that it is there whole or not at all:
//!
//! ```text
//! param.<name>  m.<name>  v.<name>  step.<name>   what is trained, and AdamW's memory of it
//! method.<name>                                   what the method remembers from step to step
//! rng.cpu, rng.device                             libtorch's random generators
//! progress                                        everything else, JSON as bytes
//! ```
//!
//! The order of the data and most schedules are functions of the step; they
//! need no state.

use std::path::Path;

use peft_core::{Param, Schedule, State, tensors};
use peft_torch::rng;
use serde::{Deserialize, Serialize};
use tch::{Device, Tensor};

use crate::error::{Error, Result};
use crate::objective::Objective;
use crate::optimizer::{Optimizer, key};
use crate::schedule::Plateau;
use crate::settings::Settings;
use crate::train::Best;

/// Where a run is, but for its tensors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Steps taken.
    pub step: usize,
    /// Steps of the whole run.
    pub total: usize,
    /// The settings that it runs with.
    pub settings: Settings,
    /// How many rows there are to train on.
    pub rows: usize,
    /// The lowest held-out loss so far.
    pub best: Option<Best>,
    /// Held-out loss before the first step.
    pub first_eval: Option<f64>,
    /// Held-out loss of the last evaluation.
    pub last_eval: Option<f64>,
    /// What the held-out rows were judged by at the last evaluation besides the loss.
    #[serde(default, with = "crate::number::named")]
    pub figures: std::collections::BTreeMap<String, f64>,
    /// Loss of the last step.
    pub last_loss: Option<f64>,
    /// Evaluations in a row that were not better.
    pub not_better: usize,
    /// State of `reduce_on_plateau`.
    pub plateau: Option<Plateau>,
    /// Tokens seen, without padding.
    pub tokens: u64,
    /// Time spent, in all parts of the run.
    pub seconds: f64,
    /// What was measured since the last line of the log.
    pub since: Interval,
    /// How long the log is.
    pub log_bytes: u64,
}

/// What was measured since the last line of the log.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// Sum of the losses.
    pub loss: f64,
    /// Labelled tokens.
    pub labels: u64,
    /// All tokens without padding.
    pub tokens: u64,
    /// Time spent on the steps.
    pub seconds: f64,
}

/// A checkpoint that was read.
#[derive(Debug)]
pub struct Checkpoint {
    /// Where the run is.
    pub progress: Progress,
    state: State,
    path: std::path::PathBuf,
}

const PROGRESS: &str = "progress";
const METHOD: &str = "method.";

impl Checkpoint {
    /// Reads a checkpoint.
    pub fn load(path: &Path) -> Result<Checkpoint> {
        let mut state = tensors::read(path)?;
        let fault = |reason: String| Error::run(path, format!("no checkpoint: {reason}"));
        let json = state
            .remove(PROGRESS)
            .ok_or_else(|| fault("no `progress` in it".into()))?;
        let json = Vec::<u8>::try_from(json).map_err(|error| fault(error.to_string()))?;
        let progress = serde_json::from_slice(&json).map_err(|error| fault(error.to_string()))?;
        Ok(Checkpoint {
            progress,
            state,
            path: path.to_owned(),
        })
    }

    /// Puts everything back. `params` and `optimizer` must be those of the same model and method.
    pub(crate) fn restore(
        &self,
        params: &[Param],
        optimizer: &Optimizer,
        device: Device,
    ) -> Result<()> {
        for param in params {
            self.copy("param", &key(param), &param.tensor)?;
        }
        for entry in optimizer.entries() {
            for (name, tensor) in entry.moments.tensors() {
                self.copy(name, &entry.key, tensor)?;
            }
        }
        rng::set_state(Device::Cpu, self.get("rng.cpu")?)?;
        if device != Device::Cpu {
            rng::set_state(device, self.get("rng.device")?)?;
        }
        Ok(())
    }

    /// Puts back what the method remembers.
    pub(crate) fn restore_method(&self, method: &mut dyn Schedule) -> Result<()> {
        let all = self.state.iter();
        let own = all.filter_map(|(key, t)| Some((key.strip_prefix(METHOD)?.to_owned(), t.copy())));
        Ok(method.restore(own.collect())?)
    }

    fn get(&self, key: &str) -> Result<&Tensor> {
        self.state.get(key).ok_or_else(|| {
            let hint = peft_core::nearest(key, self.state.keys().map(String::as_str));
            let reason = format!("lacks `{key}`{hint}: it was made for another model or method");
            Error::run(&self.path, reason)
        })
    }

    fn copy(&self, part: &str, name: &str, to: &Tensor) -> Result<()> {
        let key = format!("{part}.{name}");
        let from = self.get(&key)?;
        if from.size() != to.size() {
            let (expected, got) = (to.size(), from.size());
            return Err(peft_core::Error::Shape { key, expected, got }.into());
        }
        tch::no_grad(|| to.shallow_clone().f_copy_(from))?;
        Ok(())
    }
}

/// Writes a checkpoint.
pub(crate) fn save(
    path: &Path,
    progress: &Progress,
    objective: &mut dyn Objective,
    optimizer: &Optimizer,
    method: Option<&dyn Schedule>,
) -> Result<()> {
    let mut state = State::new();
    for (key, tensor) in method.map(Schedule::state).unwrap_or_default() {
        state.insert(format!("{METHOD}{key}"), tensor);
    }
    for param in objective.params() {
        state.insert(format!("param.{}", key(&param)), param.tensor.detach());
    }
    for entry in optimizer.entries() {
        for (name, tensor) in entry.moments.tensors() {
            state.insert(format!("{name}.{}", entry.key), tensor.shallow_clone());
        }
    }
    state.insert("rng.cpu".into(), rng::state(Device::Cpu)?);
    if objective.device() != Device::Cpu {
        state.insert("rng.device".into(), rng::state(objective.device())?);
    }
    let json = serde_json::to_vec(progress).map_err(|e| Error::run(path, e.to_string()))?;
    state.insert(PROGRESS.into(), Tensor::from_slice(&json));
    Ok(tensors::write(path, &state)?)
}
