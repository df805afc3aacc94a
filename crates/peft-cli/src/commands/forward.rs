//! `peft forward`: logits, loss and gradients into a file, to be compared with another framework.
//!
//! Everything is as in evaluation (no dropout), in fp32 unless another format is asked for, and the loss is
//! the mean over the labelled positions, shifted by one, as `transformers` computes it. Gradients
//! stand under `grad.` and the key that the tensor has in the adapter's file; with several adapters the adapter's name
//! goes between.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use peft::{
    core::{Adapter, Ctx, ModelExt, State, nearest, tensors},
    models::{Decoder, Input, causal_loss},
};
use tch::{Device, Kind, Tensor};

use crate::{
    args::Compute,
    error::usage,
    sources::{BaseArgs, Sources},
};

/// Flags of `peft forward`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    base: BaseArgs,
    /// A safetensors file with input_ids and, if wanted, attention_mask, position_ids, labels
    #[arg(long, value_name = "FILE")]
    inputs: PathBuf,
    /// The safetensors file to write: logits, loss, grad.*
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Merge the adapters into the base first
    #[arg(long, conflicts_with = "backward")]
    merged: bool,
    /// Write the gradient of the loss for each trainable tensor
    #[arg(long)]
    backward: bool,
    #[command(flatten)]
    compute: Compute,
}

/// Computes and writes.
pub(crate) fn run(args: Args) -> Result<()> {
    let sources = args.base.find()?;
    if args.backward && sources.adapters.is_empty() {
        return Err(usage(
            "`--backward` wants an `--adapter`: nothing else is trainable",
        ));
    }
    if args.merged && sources.adapters.is_empty() {
        return Err(usage("`--merged` wants an `--adapter` to merge"));
    }
    let at = args.compute.place_exact()?;
    let inputs = tensors::read(&args.inputs)?;
    let mut model = sources.load_at(at)?;
    let batch = Batch::read(&args.inputs, &inputs, &*model)?;
    if args.backward && batch.labels.is_none() {
        bail!(
            "{}: no `labels`, and `--backward` wants a loss",
            args.inputs.display()
        );
    }
    if args.merged {
        model.merge()?;
    }
    let state = match args.backward {
        true => backward(&mut *model, &sources, &batch)?,
        false => tch::no_grad(|| forward(&*model, &batch)),
    };
    tensors::write(&args.out, &state)?;
    for (name, tensor) in &state {
        println!("{name} {:?}", tensor.size());
    }
    Ok(())
}

fn forward(model: &dyn Decoder, batch: &Batch) -> State {
    let logits = model
        .forward(&batch.input(), Ctx::EVAL)
        .to_kind(Kind::Float);
    let mut state = State::from([("logits".to_owned(), logits)]);
    if let Some(loss) = batch.loss(model) {
        state.insert("loss".to_owned(), loss);
    }
    state
}

fn backward(model: &mut dyn Decoder, sources: &Sources, batch: &Batch) -> Result<State> {
    let mut state = tch::no_grad(|| forward(model, batch));
    let loss = batch.loss(model).context("no labels")?;
    if loss.requires_grad() {
        peft::torch::backward(&[&loss], &[&loss.ones_like()])?;
    }
    let several = sources.adapters.len() > 1;
    for (name, dir) in &sources.adapters {
        let tuner = Adapter::load(dir, &peft::builtin())?
            .tuner
            .resolve(&model.outline())?;
        for param in model.trainable(name) {
            let key = tuner.key(&param.at, &param.name);
            let key = if several {
                format!("grad.{name}.{key}")
            } else {
                format!("grad.{key}")
            };
            let grad = param.tensor.grad();
            let grad = if grad.defined() {
                grad
            } else {
                param.tensor.zeros_like()
            };
            state.insert(key, grad.detach().to_kind(Kind::Float));
        }
    }
    Ok(state)
}

/// The inputs, checked.
struct Batch {
    ids: Tensor,
    mask: Option<Tensor>,
    positions: Option<Tensor>,
    labels: Option<Tensor>,
}

/// What an input file may hold.
const KNOWN: [&str; 4] = ["input_ids", "attention_mask", "position_ids", "labels"];

impl Batch {
    fn read(path: &Path, state: &State, model: &dyn Decoder) -> Result<Batch> {
        let at = path.display();
        if let Some(other) = state.keys().find(|it| !KNOWN.contains(&it.as_str())) {
            bail!(
                "{at}: unknown tensor `{other}`, known are {KNOWN:?}{}",
                nearest(other, KNOWN)
            );
        }
        let Some(ids) = state.get("input_ids") else {
            bail!("{at}: no `input_ids`");
        };
        let shape = ids.size();
        if shape.len() != 2 || shape.contains(&0) {
            bail!("{at}: `input_ids` has shape {shape:?}, expected [batch, sequence]");
        }
        let longest = model.max_positions();
        let learned = model.spec().model_type == "gpt2";
        if learned && shape[1] > longest {
            bail!(
                "{at}: `input_ids` has {} positions, the model has {longest}",
                shape[1]
            );
        }
        // Positions beyond what the model was made for are fine where they are computed, not looked up.
        let last = if learned { longest } else { i64::MAX };
        let take =
            |name: &str, allowed: &dyn Fn(i64) -> bool, what: &str| -> Result<Option<Tensor>> {
                let Some(tensor) = state.get(name) else {
                    return Ok(None);
                };
                let size = tensor.size();
                let one_for_all = name == "position_ids" && size == [1, shape[1]];
                if size != shape && !one_for_all {
                    bail!("{at}: `{name}` has shape {size:?}, expected {shape:?} like `input_ids`");
                }
                integers(tensor, allowed)
                    .with_context(|| format!("{at}: `{name}` {what}"))
                    .map(|it| Some(it.to_device(model.device())))
            };
        let vocab = model.vocab();
        let ids = take(
            "input_ids",
            &|id| (0..vocab).contains(&id),
            &format!("must be below {vocab}"),
        )?;
        Ok(Batch {
            ids: ids.context("no `input_ids`")?,
            mask: take("attention_mask", &|it| it == 0 || it == 1, "must be 0 or 1")?,
            positions: take(
                "position_ids",
                &|it| (0..last).contains(&it),
                &format!("must be 0 to {}", last - 1),
            )?,
            labels: take(
                "labels",
                &|it| it == peft::models::IGNORE || (0..vocab).contains(&it),
                &format!("must be below {vocab}, or -100 to be ignored"),
            )?,
        })
    }

    fn input(&self) -> Input {
        Input {
            attention_mask: self.mask.as_ref().map(Tensor::shallow_clone),
            position_ids: self.positions.as_ref().map(Tensor::shallow_clone),
            ..Input::new(self.ids.shallow_clone())
        }
    }

    /// The mean over labelled positions: a scalar, NaN where there is none.
    fn loss(&self, model: &dyn Decoder) -> Option<Tensor> {
        let labels = self.labels.as_ref()?;
        let (sum, count) = causal_loss(model, &self.input(), labels, Ctx::EVAL);
        Some(sum / count as f64)
    }
}

/// A tensor of whole numbers as int64, each of them allowed.
fn integers(tensor: &Tensor, allowed: &dyn Fn(i64) -> bool) -> Result<Tensor> {
    let kind = tensor.kind();
    if !matches!(
        kind,
        Kind::Int64 | Kind::Int | Kind::Int16 | Kind::Int8 | Kind::Uint8 | Kind::Bool
    ) {
        bail!("it is of type {kind:?}, not of whole numbers");
    }
    let tensor = tensor
        .to_device(Device::Cpu)
        .to_kind(Kind::Int64)
        .contiguous();
    let values = Vec::<i64>::try_from(tensor.view([-1]))?;
    if let Some(at) = values.iter().position(|&it| !allowed(it)) {
        let cols = tensor.size().get(1).copied().unwrap_or(1).max(1);
        bail!(
            "it holds {} at [{}, {}]",
            values[at],
            at as i64 / cols,
            at as i64 % cols
        );
    }
    Ok(tensor)
}
