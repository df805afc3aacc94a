//! `peft forward`: outputs, loss and gradients into a file, to be compared with another framework.
//!
//! Everything is as in evaluation (no dropout), in fp32 unless another format is asked for. Outputs stand under the
//! names that Python's model gives them, and are as long as Python's: with virtual tokens in front, where a method puts
//! some. The loss is the mean that `transformers` computes for the task. Gradients stand under `grad.` and the key that
//! the tensor has in the adapter's file, or, where the file does not hold what is trained, the name that it has in
//! Python's live model without the adapter's; with several adapters the adapter's name goes between.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use peft::{
    core::{Adapter, Ctx, ModelExt, Rows, State, nearest, tensors},
    models::{IGNORE, Input, Labels, Network, Problem, Task},
};
use tch::{Device, Kind, Tensor};

use crate::{
    args::{Compute, Placement},
    error::usage,
    sources::{BaseArgs, Sources, left_at_random},
};

/// Flags of `peft forward`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    base: BaseArgs,
    /// What the model is for [default: what the adapter says, else what the model can do]
    #[arg(long, value_name = "TASK")]
    task: Option<String>,
    /// A safetensors file with input_ids and, if wanted, attention_mask, position_ids, token_type_ids, labels,
    /// start_positions and end_positions, decoder_input_ids, decoder_attention_mask
    #[arg(long, value_name = "FILE")]
    inputs: PathBuf,
    /// The safetensors file to write: logits (or start_logits, end_logits, last_hidden_state), loss, grad.*
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// A safetensors file with what the adapter trains, by the names of Python's live model without the adapter's:
    /// `prompt_encoder.mlp_head.0.weight`
    #[arg(long, value_name = "FILE")]
    state: Option<PathBuf>,
    /// The adapter of each row of the batch, `__base__` for none: a,b,__base__
    #[arg(long, value_name = "NAMES", value_delimiter = ',', conflicts_with_all = ["merged", "backward", "state"])]
    adapter_names: Vec<String>,
    /// Merge the adapters into the base first
    #[arg(long, conflicts_with_all = ["backward", "state"])]
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
    for (given, what) in [
        (
            args.backward,
            "`--backward` wants an `--adapter`: nothing else is trainable",
        ),
        (args.merged, "`--merged` wants an `--adapter` to merge"),
        (
            args.state.is_some(),
            "`--state` wants an `--adapter`, whose tensors it holds",
        ),
        (
            !args.adapter_names.is_empty(),
            "`--adapter-names` wants adapters with names: `--adapter a=DIR`",
        ),
    ] {
        if given && sources.adapters.is_empty() {
            return Err(usage(what));
        }
    }
    let task = sources.task(args.task.as_deref())?;
    let at = args.compute.place_exact()?;
    let inputs = tensors::read(&args.inputs)?;
    let (mut model, given) = load(&sources, task, at, args.state.as_deref())?;
    let names: Vec<&str> = sources.adapters.iter().map(|it| it.0.as_str()).collect();
    let random = left_at_random(&mut *model, &names);
    if !random.is_empty() {
        eprintln!(
            "note: the model has no `{}`; for {task} it was drawn at random",
            random.join("`, `")
        );
    }
    let batch = Batch::read(&args.inputs, inputs, &*model)?;
    if args.backward && batch.labels.is_none() {
        bail!(
            "{}: no `labels`, and `--backward` wants a loss",
            args.inputs.display()
        );
    }
    if args.merged {
        model.merge()?;
    }
    let state = match (args.backward, args.adapter_names.is_empty()) {
        (true, _) => backward(&mut *model, &sources, &batch, &given)?,
        (false, true) => tch::no_grad(|| forward(&*model, &batch, Ctx::EVAL))?,
        (false, false) => {
            let names: Vec<&str> = args.adapter_names.iter().map(String::as_str).collect();
            let rows = batch.input.ids.size()[0];
            if names.len() as i64 != rows {
                return Err(usage(format!(
                    "`--adapter-names` has {} names, the batch {rows} rows",
                    names.len()
                )));
            }
            let rows = Rows::new(&mut *model, &names)?;
            tch::no_grad(|| forward(&*model, &batch, Ctx::mixed(&rows)))?
        }
    };
    tensors::write(&args.out, &state)?;
    for (name, tensor) in &state {
        println!("{name} {:?}", tensor.size());
    }
    Ok(())
}

/// The dressed model, and the names by which `--state` gave each trained tensor.
fn load(
    sources: &Sources,
    task: Task,
    at: Placement,
    state: Option<&Path>,
) -> Result<(Box<dyn Network>, Vec<String>)> {
    let Some(path) = state else {
        return Ok((sources.load_task(task, at)?, Vec::new()));
    };
    let [(name, dir)] = sources.adapters.as_slice() else {
        return Err(usage("`--state` goes with one adapter"));
    };
    let mut model = sources.bare(task, at)?;
    let mut adapter = Adapter::load(dir, &peft::builtin())?;
    let given = tensors::read(path)?;
    let names = given.keys().cloned().collect();
    adapter.trained = given
        .into_iter()
        .map(|(key, it)| (plain(&key), it))
        .collect();
    adapter
        .resume(name, &mut *model)
        .with_context(|| format!("adapter `{}` with `{}`", dir.display(), path.display()))?;
    let tuner = adapter.tuner.resolve(&model.outline())?;
    let trained = model.params(name);
    let known: Vec<String> = trained
        .iter()
        .flat_map(|it| {
            [
                tuner.live_key(&it.at, &it.name),
                tuner.key(&it.at, &it.name),
            ]
        })
        .collect();
    if let Some(other) = adapter.trained.keys().find(|it| !known.contains(it)) {
        bail!(
            "{}: nothing takes `{other}`{}",
            path.display(),
            nearest(other, known.iter().map(String::as_str))
        );
    }
    Ok((model, names))
}

/// A name of Python's live model as files spell it: a module that is trained whole is wrapped there.
fn plain(name: &str) -> String {
    name.replace(".modules_to_save.", ".")
}

fn forward(model: &dyn Network, batch: &Batch, ctx: Ctx) -> Result<State> {
    let outputs = model.outputs(&batch.input, ctx)?;
    let wide = outputs
        .into_iter()
        .map(|(name, it)| (name, it.to_kind(Kind::Float)));
    let mut state: State = wide.collect();
    if let Some(loss) = batch.loss(model, ctx)? {
        state.insert("loss".to_owned(), loss);
    }
    Ok(state)
}

fn backward(
    model: &mut dyn Network,
    sources: &Sources,
    batch: &Batch,
    given: &[String],
) -> Result<State> {
    let mut state = tch::no_grad(|| forward(&*model, batch, Ctx::EVAL))?;
    let loss = batch.loss(&*model, Ctx::EVAL)?.context("no labels")?;
    if loss.requires_grad() {
        peft::torch::backward(&[&loss], &[&loss.ones_like()])?;
    }
    let several = sources.adapters.len() > 1;
    for (name, dir) in &sources.adapters {
        let tuner = Adapter::load(dir, &peft::builtin())?
            .tuner
            .resolve(&model.outline())?;
        let filed: Vec<(String, Tensor)> = model
            .saved(name)
            .into_iter()
            .map(|it| (tuner.key(&it.at, &it.name), it.tensor))
            .collect();
        for param in model.trainable(name) {
            let (key, live) = (
                tuner.key(&param.at, &param.name),
                tuner.live_key(&param.at, &param.name),
            );
            let in_file = filed.iter().any(|(other, _)| *other == key);
            let asked = given.iter().find(|it| [&key, &live].contains(&&plain(it)));
            // By its name in the file, by the name that `--state` had for it, by both where they differ.
            let mut names: Vec<String> = in_file.then(|| key.clone()).into_iter().collect();
            names.extend(
                asked
                    .cloned()
                    .or_else(|| (!in_file || live != key).then_some(live)),
            );
            let grad = param.tensor.grad();
            let grad = if grad.defined() {
                grad
            } else {
                param.tensor.zeros_like()
            };
            let grad = grad.detach().to_kind(Kind::Float);
            for it in names {
                let it = if several {
                    format!("grad.{name}.{it}")
                } else {
                    format!("grad.{it}")
                };
                state.insert(it, grad.shallow_clone());
            }
        }
    }
    Ok(state)
}

/// The inputs, checked.
struct Batch {
    input: Input,
    labels: Option<Labels>,
}

/// What an input file may hold.
const KNOWN: [&str; 9] = [
    "input_ids",
    "attention_mask",
    "position_ids",
    "token_type_ids",
    "decoder_input_ids",
    "decoder_attention_mask",
    "labels",
    "start_positions",
    "end_positions",
];

impl Batch {
    fn read(path: &Path, state: State, model: &dyn Network) -> Result<Batch> {
        let at = path.display();
        if let Some(other) = state.keys().find(|it| !KNOWN.contains(&it.as_str())) {
            bail!(
                "{at}: unknown tensor `{other}`, known are {KNOWN:?}{}",
                nearest(other, KNOWN)
            );
        }
        let ids = state
            .get("input_ids")
            .with_context(|| format!("{at}: no `input_ids`"))?;
        let shape = ids.size();
        if shape.len() != 2 || shape.contains(&0) {
            bail!("{at}: `input_ids` has shape {shape:?}, expected [batch, sequence]");
        }
        let learned = model.learned_positions();
        let longest = model.max_positions();
        if learned && shape[1] > longest {
            bail!(
                "{at}: `input_ids` has {} positions, the model has {longest}",
                shape[1]
            );
        }
        let file = File {
            path,
            state: &state,
            device: model.device(),
        };
        let vocab = model.vocab();
        let below = format!("must be below {vocab}");
        let token = |id: i64| (0..vocab).contains(&id);
        let flag = |it: i64| it == 0 || it == 1;
        // Positions beyond what the model was made for are fine where they are computed, not looked up.
        let last = if learned { longest } else { i64::MAX };
        let position = |it: i64| (0..last).contains(&it);
        let positions = format!("must be 0 to {}", last - 1);
        let shared = state
            .get("position_ids")
            .is_some_and(|it| it.size() == [1, shape[1]]);
        let of_positions = if shared {
            vec![1, shape[1]]
        } else {
            shape.clone()
        };
        let target = state.get("decoder_input_ids").map(Tensor::size);
        let target = target.filter(|it| it.len() == 2 && it[0] == shape[0]);
        let target = target.unwrap_or_else(|| vec![shape[0], -1]);
        let mut input = Input {
            ids: file
                .take("input_ids", &shape, &token, &below)?
                .context("no `input_ids`")?,
            attention_mask: file.take("attention_mask", &shape, &flag, "must be 0 or 1")?,
            position_ids: file.take("position_ids", &of_positions, &position, &positions)?,
            token_type_ids: file.take(
                "token_type_ids",
                &shape,
                &|it| it >= 0,
                "must not be below 0",
            )?,
            decoder_ids: file.take("decoder_input_ids", &target, &token, &below)?,
            decoder_mask: file.take("decoder_attention_mask", &target, &flag, "must be 0 or 1")?,
        };
        let labels = file.labels(model, &shape)?;
        if let (Some(model), None, Some(Labels::Tokens(labels))) =
            (model.seq2seq(), &input.decoder_ids, &labels)
        {
            input.decoder_ids = Some(model.shifted(labels));
        }
        Ok(Batch { input, labels })
    }

    /// The mean that Python computes: a scalar, NaN where nothing is labelled.
    fn loss(&self, model: &dyn Network, ctx: Ctx) -> Result<Option<Tensor>> {
        let Some(labels) = &self.labels else {
            return Ok(None);
        };
        let (sum, count) = model.loss(&self.input, labels, ctx)?;
        Ok(Some(sum / count as f64))
    }
}

/// A file of inputs.
struct File<'a> {
    path: &'a Path,
    state: &'a State,
    device: Device,
}

impl File<'_> {
    /// Whole numbers of a shape (-1: any), each of them allowed; `None` where there are none.
    fn take(
        &self,
        name: &str,
        shape: &[i64],
        allowed: &dyn Fn(i64) -> bool,
        what: &str,
    ) -> Result<Option<Tensor>> {
        let at = self.path.display();
        let Some(tensor) = self.state.get(name) else {
            return Ok(None);
        };
        let size = tensor.size();
        let fits = size.len() == shape.len()
            && size
                .iter()
                .zip(shape)
                .all(|(is, want)| is == want || *want == -1);
        if !fits {
            bail!("{at}: `{name}` has shape {size:?}, expected {shape:?} to fit `input_ids`");
        }
        integers(tensor, allowed)
            .with_context(|| format!("{at}: `{name}` {what}"))
            .map(|it| Some(it.to_device(self.device)))
    }

    /// The labels, of the sort that the task wants.
    fn labels(&self, model: &dyn Network, shape: &[i64]) -> Result<Option<Labels>> {
        let at = self.path.display();
        let spans = ["start_positions", "end_positions"];
        let rows = [shape[0]];
        if model.task() == Task::QuestionAns {
            let take = |name| self.take(name, &rows, &|it| it >= 0, "must not be below 0");
            return match (take(spans[0])?, take(spans[1])?) {
                (None, None) => Ok(None),
                (Some(start), Some(end)) => Ok(Some(Labels::Spans { start, end })),
                _ => bail!("{at}: `start_positions` and `end_positions` go together"),
            };
        }
        if let Some(name) = spans.iter().find(|it| self.state.contains_key(**it)) {
            bail!(
                "{at}: `{name}` is for QUESTION_ANS, and the task is {}",
                model.task()
            );
        }
        let Some(labels) = self.state.get("labels") else {
            return Ok(None);
        };
        let classes = model.classes().map_or(0, |it| it.names.len() as i64);
        let (below, what) = match model.task() {
            Task::SeqCls => return self.of_rows(labels, model, classes, &rows).map(Some),
            Task::FeatureExtraction => bail!("{at}: `labels`, but FEATURE_EXTRACTION has no loss"),
            Task::TokenCls => (classes, "a class"),
            _ => (model.vocab(), "a token"),
        };
        let wanted = match model.task() {
            Task::Seq2SeqLm => vec![shape[0], -1],
            _ => shape.to_vec(),
        };
        let allowed = |it: i64| it == IGNORE || (0..below).contains(&it);
        let what = format!("must be {what} below {below}, or {IGNORE} to be ignored");
        let labels = self.take("labels", &wanted, &allowed, &what)?;
        Ok(labels.map(Labels::Tokens))
    }

    fn of_rows(
        &self,
        labels: &Tensor,
        model: &dyn Network,
        classes: i64,
        rows: &[i64],
    ) -> Result<Labels> {
        let numbers = labels.is_floating_point();
        let problem = match model.classes().and_then(|it| it.problem) {
            Some(problem) => problem,
            // As `transformers` finds it out.
            None if classes == 1 => Problem::Regression,
            None if numbers => Problem::MultiLabel,
            None => Problem::SingleLabel,
        };
        let at = self.path.display();
        if problem == Problem::SingleLabel {
            let what = format!("must be a class below {classes}");
            let allowed = |it: i64| (0..classes).contains(&it);
            let taken = self.take("labels", rows, &allowed, &what)?;
            return Ok(Labels::Classes(taken.context("no labels")?));
        }
        let size = labels.size();
        let whole = [rows[0], classes];
        let one = classes == 1 && size == rows;
        if !(one || size == whole) {
            bail!(
                "{at}: `labels` has shape {size:?}, expected {whole:?} for {}",
                problem.name()
            );
        }
        let values = labels.to_device(self.device).to_kind(Kind::Float);
        Ok(match problem {
            Problem::MultiLabel => Labels::MultiLabel(values),
            _ => Labels::Values(values),
        })
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
