//! What is trained: something that gives a loss for a batch.
//!
//! The loop knows nothing of language models. It asks for the sum of the
//! losses of a batch and over how many tokens it goes, and it is told which
//! tensors there are. [`CausalLm`] is the objective of `peft train`: an adapter
//! on a decoder, predicting the next token.

use std::path::Path;

use peft_core::{Adapter, Ctx, ModelExt, Param, Schedule, Tuner};
use peft_data::Batch;
use peft_models::{Decoder, Input, causal_loss};
use tch::{Device, Tensor};

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
    /// Writes what was trained as a folder that can be loaded again.
    fn save(&mut self, dir: &Path) -> Result<()>;
    /// Where it computes.
    fn device(&self) -> Device;
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
        next_token_loss(&*self.model, batch, ctx)
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
}

/// Sum of the losses of predicting each labelled token, and their number; every id is checked first.
pub fn next_token_loss(model: &dyn Decoder, batch: &Batch, ctx: Ctx) -> Result<(Tensor, i64)> {
    known(batch, model.vocab())?;
    let (input, labels) = tensors(batch, model.device())?;
    Ok(causal_loss(model, &input, &labels, ctx))
}

/// A batch on a device: ids and labels `[rows, cols]`.
///
/// Padding behind a row needs no mask, as no token looks ahead; attention is faster without one.
pub fn tensors(batch: &Batch, device: Device) -> Result<(Input, Tensor)> {
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
fn known(batch: &Batch, vocab: i64) -> Result<()> {
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
