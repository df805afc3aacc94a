//! Every method on a real model and real text: our half of the table in `REAL.md`; `real.py` is Python's half.
//!
//! `plan` reads the text once and writes down everything that both sides must have in common: batches in their order,
//! held-out rows, the learning rate at each step as a part of its peak. `train` trains on such a file, a method after
//! the other, and prints one line of JSON each; with `--starts` it also writes what each method began with, for
//! Python to begin with the same.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};
use peft::quant::{Compat, Format, Four, Scheme};
use peft_core::{Ctx, ModelExt, Param, State, Tuner, files, tensors};
use peft_data::{Holdout, Pass, Plan, Side, Targets, TaskOptions, Tokenizer};
use peft_models::{HeadOptions, Input, Labels, Network, OpenOptions, Source, Task, open_task_in};
use peft_torch::memory;
use peft_train::{Optimizer, Schedule, Settings};
use serde_json::{Map, Value, json};
use tch::{Kind, Tensor};

#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    job: Job,
    /// The settings: tasks, methods, learning rates
    #[arg(long, global = true, default_value = "benches/real.json")]
    settings: PathBuf,
    /// Threads of libtorch
    #[arg(long, global = true, default_value_t = 2)]
    threads: i32,
}

#[derive(Subcommand)]
enum Job {
    /// Writes the batches of a task in the order of a seed
    Plan {
        #[arg(long)]
        task: String,
        /// The folder of the model
        #[arg(long)]
        model: PathBuf,
        #[arg(long)]
        seed: u64,
        #[arg(long)]
        out: PathBuf,
    },
    /// Trains every method on a plan
    Train {
        #[arg(long)]
        task: String,
        /// The folder of the model
        #[arg(long)]
        model: PathBuf,
        #[arg(long)]
        seed: u64,
        #[arg(long)]
        plan: PathBuf,
        /// Only these methods, separated by commas
        #[arg(long, value_delimiter = ',')]
        methods: Vec<String>,
        /// Writes what each method begins with into this folder
        #[arg(long)]
        starts: Option<PathBuf>,
    },
}

fn main() -> Result<()> {
    let args = Args::parse();
    memory::keep_freed_blocks();
    tch::set_num_threads(args.threads);
    let settings = files::read_json(&args.settings)?;
    match args.job {
        Job::Plan {
            task,
            model,
            seed,
            out,
        } => {
            let batches = plan(&settings["tasks"][&task], &model, seed)
                .with_context(|| format!("planning `{task}`"))?;
            Ok(tensors::write(&out, &batches)?)
        }
        Job::Train {
            task,
            model,
            seed,
            plan,
            methods,
            starts,
        } => {
            let plan = tensors::read(&plan)?;
            let kind = settings["tasks"][&task]["model"]
                .as_str()
                .with_context(|| format!("no task `{task}`"))?;
            for (name, method) in settings["methods"].as_object().into_iter().flatten() {
                let here = &method[kind];
                if here.is_null() || !(methods.is_empty() || methods.contains(name)) {
                    continue;
                }
                let start = starts
                    .as_ref()
                    .map(|dir| dir.join(format!("{name}.safetensors")));
                let mut line = train(here, &model, &plan, seed, start.as_deref())
                    .with_context(|| format!("{name} on {task}"))?;
                line["task"] = json!(task);
                line["method"] = json!(name);
                line["seed"] = json!(seed);
                println!("{line}");
            }
            Ok(())
        }
    }
}

/// `train.000.input_ids` and so on `[rows, cols]`, `held.000.…`, `factors [steps]`, `classes` (0: a language model).
fn plan(task: &Value, model: &Path, seed: u64) -> Result<State> {
    let number = |key: &str| {
        let found = task[key].as_u64().map(|it| it as usize);
        found.with_context(|| format!("`{key}` is no number"))
    };
    let (batch, steps) = (number("batch")?, number("steps")?);
    let data = Data::read(task, model, number("max_length")?)?;
    // The same rows are held out whatever the seed.
    let lengths = data.lengths();
    let held_out = Holdout::Count(number("held_out")?);
    let (rows, mut held) = peft_data::split(lengths.len(), held_out, 0)?;
    let plan = Plan::new(rows, batch, seed)?
        .shuffled()
        .grouped_by_length(&lengths)?;

    let mut state = State::new();
    let whole = |epoch: usize| plan.epoch(epoch).into_iter().filter(|it| it.len() == batch);
    for (step, rows) in (0..).flat_map(whole).take(steps).enumerate() {
        data.batch(&rows, &format!("train.{step:03}"), &mut state)?;
    }
    held.sort_by_key(|row| lengths[*row]);
    for (i, rows) in held.chunks(2 * batch).enumerate() {
        data.batch(rows, &format!("held.{i:03}"), &mut state)?;
    }
    let unit = Settings {
        learning_rate: 1.0,
        ..Settings::default()
    };
    let schedule = Schedule::new(&unit, steps)?;
    let factors: Vec<f64> = (0..steps)
        .map(|step| schedule.learning_rate(step))
        .collect();
    state.insert("factors".into(), Tensor::from_slice(&factors));
    state.insert("classes".into(), Tensor::from(data.classes() as i64));
    Ok(state)
}

/// The rows of a task.
enum Data {
    Text(peft_data::Dataset, u32),
    Labelled(peft_data::TaskDataset),
}

impl Data {
    fn read(task: &Value, model: &Path, max_length: usize) -> Result<Data> {
        let tokenizer = Tokenizer::open(model)?;
        let files = [PathBuf::from(task["data"].as_str().context("no `data`")?)];
        if task["classes"] == json!(true) {
            let options = TaskOptions {
                max_length,
                ..TaskOptions::of(peft_data::Task::SeqCls)
            };
            let rows = peft_data::prepare_task(&files, &tokenizer, &options, &|_| {})?;
            return Ok(Data::Labelled(rows));
        }
        let options = peft_data::Options {
            max_length,
            ..peft_data::Options::default()
        };
        let rows = peft_data::prepare(&files, &tokenizer, &options, &|_| {})?;
        let pad = tokenizer.pad_id();
        Ok(Data::Text(rows, pad))
    }

    fn lengths(&self) -> Vec<usize> {
        match self {
            Data::Text(rows, _) => rows.lengths(),
            Data::Labelled(rows) => rows.lengths(),
        }
    }

    fn classes(&self) -> usize {
        match self {
            Data::Text(..) => 0,
            Data::Labelled(rows) => rows.classes().len(),
        }
    }

    fn batch(&self, rows: &[usize], name: &str, state: &mut State) -> Result<()> {
        let mut put = |key: &str, values: &[i64], shape: &[i64]| {
            let tensor = Tensor::from_slice(values).view(shape);
            state.insert(format!("{name}.{key}"), tensor);
        };
        match self {
            Data::Text(data, pad) => {
                let batch = data.batch(rows, *pad, Side::Right, 1)?;
                let shape = [batch.rows as i64, batch.cols as i64];
                put("input_ids", &batch.input_ids, &shape);
                put("attention_mask", &batch.attention_mask, &shape);
                put("labels", &batch.labels, &shape);
            }
            Data::Labelled(data) => {
                let batch = data.batch(rows, Pass::Eval, 1)?;
                let shape = [batch.rows as i64, batch.cols as i64];
                let Targets::Classes(classes) = &batch.targets else {
                    bail!("labels that are no classes");
                };
                put("input_ids", &batch.input_ids, &shape);
                put("attention_mask", &batch.attention_mask, &shape);
                put("labels", classes, &shape[..1]);
            }
        }
        Ok(())
    }
}

/// One batch as the model takes it.
struct Batch {
    input: Input,
    labels: Labels,
}

/// The batches whose names begin so, in order.
fn batches(plan: &State, prefix: &str) -> Vec<Batch> {
    let names = plan.keys().filter(|it| it.starts_with(prefix));
    let names = names.filter_map(|it| it.strip_suffix(".input_ids"));
    let get = |name: &str, key: &str| plan[&format!("{name}.{key}")].shallow_clone();
    names
        .map(|name| {
            let labels = get(name, "labels");
            Batch {
                input: Input {
                    attention_mask: Some(get(name, "attention_mask")),
                    ..Input::new(get(name, "input_ids"))
                },
                labels: match labels.dim() {
                    1 => Labels::Classes(labels),
                    _ => Labels::Tokens(labels),
                },
            }
        })
        .collect()
}

/// Trains one method and says how it went.
fn train(
    method: &Value,
    folder: &Path,
    plan: &State,
    seed: u64,
    start: Option<&Path>,
) -> Result<Value> {
    let classes = plan["classes"].int64_value(&[]);
    let task = if classes == 0 {
        Task::CausalLm
    } else {
        Task::SeqCls
    };
    let head = HeadOptions {
        num_labels: (classes > 0).then_some(classes),
        seed,
        ..HeadOptions::default()
    };
    let (kind, format) = match method["dtype"].as_str() {
        None => (Kind::Float, Format::as_stored()),
        Some("bf16") => (Kind::BFloat16, Format::as_stored()),
        // As `bitsandbytes` encodes on a processor, and `prepare_model_for_kbit_training` leaves the rest.
        Some("nf4") => {
            let four = Four {
                compat: Compat::Cpu,
                ..Four::NF4
            };
            let compute = Some(Kind::BFloat16);
            let format = Format::of(Scheme::Four(four));
            (Kind::Float, Format { compute, ..format })
        }
        Some(other) => bail!("no dtype `{other}`"),
    };
    let options = OpenOptions {
        kind: Some(kind),
        ..OpenOptions::default()
    };
    tch::manual_seed(seed as i64);
    let source = Source::Folder(folder.to_owned());
    let mut model = open_task_in(&source, task, options, &head, &format)?;
    let batches_of = |prefix| batches(plan, prefix);
    let (steps, held) = (batches_of("train."), batches_of("held."));
    let mut trained = dress(&mut *model, &method["adapter"], task, steps.len())?;
    if let Some(path) = start {
        tensors::write(path, &trained.start)?;
    }

    let peak = method["learning_rate"]
        .as_f64()
        .context("no `learning_rate`")?;
    let factors = Vec::<f64>::try_from(&plan["factors"])?;
    let mut optimizer = Optimizer::new(&trained.params, &Settings::default())?;
    let before = evaluate(&*model, &held)?;
    let begin = Instant::now();
    let mut losses = Vec::new();
    for (step, (batch, factor)) in (1..).zip(steps.iter().zip(factors)) {
        let (sum, count) = model.loss(&batch.input, &batch.labels, Ctx::TRAIN)?;
        let loss = sum / count;
        losses.push(loss.double_value(&[]));
        loss.f_backward()?;
        if let Some(term) = trained.penalty() {
            term.f_backward()?;
        }
        let norm = optimizer.grad_norm().double_value(&[]);
        optimizer.clip(norm);
        optimizer.step(peak * factor)?;
        if let Some(schedule) = &mut trained.schedule {
            schedule.after_step(&trained.params, step)?;
        }
        optimizer.zero_grad();
    }
    let seconds = begin.elapsed().as_secs_f64();
    let after = evaluate(&*model, &held)?;
    Ok(json!({
        "who": "ours", "parameters": optimizer.numel(), "learning_rate": peak,
        "before": before, "after": after, "losses": losses, "seconds": seconds,
    }))
}

/// What is trained, and what it begins with under the names of Python's live model.
struct Trained {
    /// Everything of the adapter.
    params: Vec<Param>,
    start: State,
    /// What the method does besides being stepped.
    schedule: Option<Box<dyn peft_core::Schedule>>,
}

impl Trained {
    fn penalty(&self) -> Option<Tensor> {
        self.schedule.as_ref()?.penalty(&self.params)
    }
}

fn dress(model: &mut dyn Network, adapter: &Value, task: Task, steps: usize) -> Result<Trained> {
    let copy = |it: &Param| tch::no_grad(|| it.tensor.detach().copy());
    let Some(settings) = adapter.as_object() else {
        let params = model.thaw(None)?;
        let name = |it: &Param| (format!("{}.{}", it.at, it.name), copy(it));
        return Ok(Trained {
            start: params.iter().map(name).collect(),
            params,
            schedule: None,
        });
    };
    let tuner = method(settings, task, steps)?;
    model.inject(NAME, &*tuner)?;
    let resolved = tuner.resolve(&model.outline())?;
    let name = |it: &Param| (resolved.live_key(&it.at, &it.name), copy(it));
    Ok(Trained {
        start: model.trainable(NAME).iter().map(name).collect(),
        params: model.params(NAME),
        schedule: tuner.schedule(),
    })
}

const NAME: &str = "default";

/// The method with what only the run knows filled in.
fn method(settings: &Map<String, Value>, task: Task, steps: usize) -> Result<Box<dyn Tuner>> {
    let mut settings = settings.clone();
    settings.insert("task_type".into(), json!(task.task_type()));
    if settings["peft_type"] == "ADALORA" {
        settings.insert("total_step".into(), json!(steps));
    }
    Ok(peft::builtin().parse(Value::Object(settings))?)
}

/// Mean loss over the held-out rows or tokens, and the part of the rows whose class is right.
fn evaluate(model: &dyn Network, held: &[Batch]) -> Result<Value> {
    let _off = tch::no_grad_guard();
    let (mut sum, mut count, mut right) = (0.0, 0, 0);
    for batch in held {
        let (loss, n) = model.loss(&batch.input, &batch.labels, Ctx::EVAL)?;
        sum += loss.double_value(&[]);
        count += n;
        if let Labels::Classes(classes) = &batch.labels {
            let best = model.outputs(&batch.input, Ctx::EVAL)?["logits"].argmax(-1, false);
            right += best.eq_tensor(classes).sum(Kind::Int64).int64_value(&[]);
        }
    }
    Ok(json!({"loss": sum / count as f64, "accuracy": right as f64 / count as f64}))
}
