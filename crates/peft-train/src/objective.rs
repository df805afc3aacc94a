//! What is trained: something that gives a loss for a batch.
//!
//! The loop knows nothing of models. It asks for the sum of the
//! losses of a batch and over how many labels it goes, and it is told which
//! tensors there are. [`CausalLm`] is an adapter on a decoder that predicts the next token; [`Tuned`] is what `peft train`
//! trains: a model of any task, with an adapter or with its own parameters.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use peft_core::{Adapter, Ctx, ModelExt, Param, Schedule, Tuner};
use peft_data::{Targets, TaskBatch};
use peft_models::{Decoder, Input, Labels, Network, causal_loss, save};
use tch::{Device, Tensor};

use crate::data::{Batch, Rows};
use crate::error::{Error, Result};

/// Something that can be trained on batches.
pub trait Objective {
    /// The sum of the losses of the batch's labelled tokens, a scalar in fp32, and their number.
    fn loss(&mut self, batch: &Batch, ctx: Ctx) -> Result<(Tensor, i64)>;
    /// Every tensor that belongs to what is trained; those that require a gradient are stepped.
    fn params(&mut self) -> Vec<Param>;
    /// What the method does besides being stepped, if it does something.
    fn schedule(&self) -> Option<Box<dyn Schedule>> {
        None
    }
    /// What it is judged by on held-out rows besides the loss, by name: `accuracy`, `f1`.
    fn figures(&mut self, held_out: &Rows<'_>) -> Result<BTreeMap<String, f64>> {
        let _ = held_out;
        Ok(BTreeMap::new())
    }
    /// Writes what was trained as a folder that can be loaded again.
    fn save(&mut self, dir: &Path) -> Result<()>;
    /// Where it computes.
    fn device(&self) -> Device;
    /// Tokens that a row may have at most, where there is such a bound.
    fn widest(&self) -> Option<usize> {
        None
    }
}

/// Tokens that a row may have at most: a model that looks positions up has no more than its table, less its virtual tokens.
pub fn widest(model: &dyn Network) -> Option<usize> {
    let most = model.max_positions().max(0) as usize;
    model.learned_positions().then_some(most)
}

/// An adapter on a language model that learns to predict the next token.
#[allow(missing_debug_implementations)] // a model has none
pub struct CausalLm<'a> {
    /// The model, dressed.
    pub model: &'a mut dyn Decoder,
    /// The name of the adapter that is trained.
    pub name: &'a str,
    /// The method that made it.
    pub tuner: &'a dyn Tuner,
}

impl Objective for CausalLm<'_> {
    fn loss(&mut self, batch: &Batch, ctx: Ctx) -> Result<(Tensor, i64)> {
        match batch {
            Batch::Text(batch) => next_token_loss(&*self.model, batch, ctx),
            Batch::Task(_) => Err(Error::Nothing(
                "rows of another task, but this objective goes on with texts".to_owned(),
            )),
        }
    }

    fn params(&mut self) -> Vec<Param> {
        self.model.params(self.name)
    }

    fn schedule(&self) -> Option<Box<dyn Schedule>> {
        self.tuner.schedule()
    }

    fn save(&mut self, dir: &Path) -> Result<()> {
        Ok(Adapter::of(self.name, self.tuner, self.model)?.save(dir)?)
    }

    fn device(&self) -> Device {
        self.model.device()
    }

    fn widest(&self) -> Option<usize> {
        widest(&*self.model)
    }
}

/// What of a model is trained.
#[allow(missing_debug_implementations)]
pub enum Part<'a> {
    /// An adapter.
    Adapter {
        /// Its name on the model.
        name: &'a str,
        /// The method that made it.
        tuner: &'a dyn Tuner,
    },
    /// Parameters of the base itself, as [`ModelExt::thaw`] gave them.
    Base {
        /// The parameters.
        params: Vec<Param>,
        /// Files that are saved with the model: the tokenizer, generation settings.
        besides: Vec<PathBuf>,
    },
}

/// Figures of a model on held-out rows, by name.
pub type Judge<'a> = &'a dyn Fn(&dyn Network, &Rows<'_>) -> Result<BTreeMap<String, f64>>;

/// A model of any task, of which a part is trained.
#[allow(missing_debug_implementations)] // a model has none
pub struct Tuned<'a> {
    /// The model, dressed or thawed.
    pub model: &'a mut dyn Network,
    /// What is trained.
    pub part: Part<'a>,
    /// What it is judged by besides the loss, if by anything.
    pub judge: Option<Judge<'a>>,
}

impl Objective for Tuned<'_> {
    fn loss(&mut self, batch: &Batch, ctx: Ctx) -> Result<(Tensor, i64)> {
        loss(&*self.model, batch, ctx)
    }

    fn params(&mut self) -> Vec<Param> {
        match &self.part {
            Part::Adapter { name, .. } => self.model.params(name),
            Part::Base { params, .. } => params.clone(),
        }
    }

    fn schedule(&self) -> Option<Box<dyn Schedule>> {
        match &self.part {
            Part::Adapter { tuner, .. } => tuner.schedule(),
            Part::Base { .. } => None,
        }
    }

    fn figures(&mut self, held_out: &Rows<'_>) -> Result<BTreeMap<String, f64>> {
        match self.judge {
            Some(judge) => judge(self.model, held_out),
            None => Ok(BTreeMap::new()),
        }
    }

    fn save(&mut self, dir: &Path) -> Result<()> {
        match &self.part {
            Part::Adapter { name, tuner } => Ok(Adapter::of(name, *tuner, self.model)?.save(dir)?),
            Part::Base { besides, .. } => {
                replace(dir, &mut |to| Ok(save(self.model, to, besides)?))
            }
        }
    }

    fn device(&self) -> Device {
        self.model.device()
    }

    fn widest(&self) -> Option<usize> {
        widest(&*self.model)
    }
}

/// Writes a folder beside its place and puts it there when it is whole; an older one goes only then.
fn replace(dir: &Path, write: &mut dyn FnMut(&Path) -> Result<()>) -> Result<()> {
    let beside = |what: &str| {
        let name = dir.file_name().unwrap_or_default().to_string_lossy();
        dir.with_file_name(format!(".{name}.{what}"))
    };
    let (new, old) = (beside("new"), beside("old"));
    for left in [&new, &old] {
        if left.exists() {
            fs::remove_dir_all(left).map_err(Error::io(left))?;
        }
    }
    write(&new)?;
    if dir.exists() {
        fs::rename(dir, &old).map_err(Error::io(dir))?;
    }
    fs::rename(&new, dir).map_err(Error::io(dir))?;
    if old.exists() {
        fs::remove_dir_all(&old).map_err(Error::io(&old))?;
    }
    Ok(())
}

/// The sum of a batch's losses under a model of its task, and the number of its labels.
pub fn loss(model: &dyn Network, batch: &Batch, ctx: Ctx) -> Result<(Tensor, i64)> {
    match (batch, model.decoder()) {
        (Batch::Text(batch), Some(decoder)) => next_token_loss(decoder, batch, ctx),
        (Batch::Text(_), None) => Err(Error::Nothing(format!(
            "texts to go on with, but the model is one for {}",
            model.task()
        ))),
        (Batch::Task(batch), _) => {
            let (input, labels) = task_tensors(batch, model.device())?;
            Ok(model.loss(&input, &labels, ctx)?)
        }
    }
}

/// A batch of a task on a device, as a model takes it.
///
/// A batch without padding has no mask: attention is faster without one.
pub fn task_tensors(batch: &TaskBatch, device: Device) -> Result<(Input, Labels)> {
    let (rows, cols) = (batch.rows as i64, batch.cols as i64);
    let load = |values: &[i64], shape: &[i64]| -> Result<Tensor> {
        Ok(Tensor::from_slice(values)
            .f_view(shape)?
            .f_to_device(device)?)
    };
    let numbers = |values: &[f32], outputs: usize| -> Result<Tensor> {
        Ok(Tensor::from_slice(values)
            .f_view([rows, outputs as i64])?
            .f_to_device(device)?)
    };
    let padded = batch.attention_mask.contains(&0);
    let mask = padded.then(|| load(&batch.attention_mask, &[rows, cols]));
    let types = (!batch.token_type_ids.is_empty()
        && batch.token_type_ids.iter().any(|it| *it != 0))
    .then(|| load(&batch.token_type_ids, &[rows, cols]));
    let input = Input {
        attention_mask: mask.transpose()?,
        token_type_ids: types.transpose()?,
        ..Input::new(load(&batch.input_ids, &[rows, cols])?)
    };
    let labels = match &batch.targets {
        Targets::Classes(all) => Labels::Classes(load(all, &[rows])?),
        Targets::Flags { outputs, values } => Labels::MultiLabel(numbers(values, *outputs)?),
        Targets::Numbers { outputs, values } => Labels::Values(numbers(values, *outputs)?),
        Targets::Tokens(all) | Targets::Hidden(all) => Labels::Tokens(load(all, &[rows, cols])?),
        Targets::Spans { starts, ends } => Labels::Spans {
            start: load(starts, &[rows])?,
            end: load(ends, &[rows])?,
        },
        Targets::Decoder { cols, labels } => Labels::Tokens(load(labels, &[rows, *cols as i64])?),
        Targets::None => return Err(Error::Nothing("rows without labels".to_owned())),
    };
    Ok((input, labels))
}

/// Sum of the losses of predicting each labelled token, and their number; every id and the width are checked first.
pub fn next_token_loss(
    model: &dyn Decoder,
    batch: &peft_data::Batch,
    ctx: Ctx,
) -> Result<(Tensor, i64)> {
    known(batch, model.vocab())?;
    if let Some(most) = widest(model).filter(|most| batch.cols > *most) {
        let row = batch.indices.first().copied().unwrap_or(0);
        return Err(Error::TooLong {
            row: format!("the batch of row {row}"),
            tokens: batch.cols,
            most,
        });
    }
    let (input, labels) = tensors(batch, model.device())?;
    Ok(causal_loss(model, &input, &labels, ctx))
}

/// A batch on a device: ids and labels `[rows, cols]`.
///
/// Padding behind a row needs no mask, as no token looks ahead; attention is faster without one.
pub fn tensors(batch: &peft_data::Batch, device: Device) -> Result<(Input, Tensor)> {
    let shape = [batch.rows as i64, batch.cols as i64];
    let load = |values: &[i64]| -> Result<Tensor> {
        Ok(Tensor::from_slice(values)
            .f_view(shape)?
            .f_to_device(device)?)
    };
    let mut rows = batch.attention_mask.chunks(batch.cols.max(1));
    let before = rows.any(|row| row.is_sorted() && row.first() == Some(&0));
    let mask = before.then(|| load(&batch.attention_mask)).transpose()?;
    let input = Input {
        attention_mask: mask,
        ..Input::new(load(&batch.input_ids)?)
    };
    Ok((input, load(&batch.labels)?))
}

/// Checks that a model of `vocab` tokens knows every token of the batch.
fn known(batch: &peft_data::Batch, vocab: i64) -> Result<()> {
    match batch
        .input_ids
        .iter()
        .position(|id| !(0..vocab).contains(id))
    {
        None => Ok(()),
        Some(at) => Err(Error::Token {
            row: batch
                .indices
                .get(at / batch.cols)
                .copied()
                .unwrap_or(at / batch.cols),
            id: batch.input_ids[at],
            vocab,
        }),
    }
}
