//! `peft train`: from a model and a file of rows to an adapter, with everything said on the way.
//!
//! ```text
//! resolve settings ─► data ─► model + method ─► overview ─► answers ─► train ─► answers ─► what next
//! ```
//!
//! Nothing is written before the overview, and `--dry-run` ends there. The loop
//! is `peft_train::train`; here is only what a person gives and sees.

pub(crate) mod recipe;
pub(crate) mod screen;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Parser;
use console::style;
use indicatif::{ProgressBar, ProgressStyle};
use peft::{
    Ctx, LoraConfig, ModelExt, Residual, Sampling, Tokenizer, Tuner, begin_at_residual,
    begin_prefix_at,
    core::Param,
    data::{
        Columns, Dataset, Format, Message, Options, Pass, TaskDataset, TaskOptions, detect_task,
        pieces, prepare, prepare_task, split,
    },
    models::{HeadOptions, Network, Problem, Task, parameters, save},
    quant::Format as BaseFormat,
    torch::memory,
    train::{
        Checkpoint, Data, Ending, Part, Rows, Run, RunInfo, Status, Summary, Tuned, loss, widest,
    },
};
use serde_json::Value;
use tch::Device;

use self::recipe::{Plan, Validation};
use self::screen::{Screen, duration, paint, row};
use crate::{
    answer::{Writer, answers, conversation},
    args::{Compute, Placement, kind_name},
    error::{of_settings, usage},
    methods::PREFIX_INIT_TEXT,
    metrics::{figures, judge},
    quantization::{QUANTIZATION, Quantization, in_bits},
    sources::{
        BaseArgs, CLASSES, FINGERPRINT, FULL, PROBLEM, Sources, TASK, changed, left_at_random,
    },
    terminal::{bytes, grouped, plural},
};

/// Flags of `peft train`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The method: lora, qlora, adalora, vera, ia3, bitfit, ln, prefix, prompt, p-tuning, full [default: lora]
    #[arg(long, value_name = "METHOD", help_heading = "Method")]
    method: Option<String>,
    #[command(flatten)]
    setup: Setup,
    /// The run folder, which must not exist [default: runs/NAME-OF-MODEL]
    #[arg(long, value_name = "RUN")]
    out: Option<PathBuf>,
    /// Go on with an interrupted run, with the settings it began with
    #[arg(long, value_name = "RUN", conflicts_with_all = ["config", "model", "data", "out", "overwrite", "set"])]
    resume: Option<PathBuf>,
    /// Remove an earlier run in the run folder
    #[arg(long)]
    overwrite: bool,
    /// Print everything as it would be, and stop
    #[arg(long)]
    dry_run: bool,
}

/// What decides a run, whatever its method.
#[derive(Debug, clap::Args)]
pub(crate) struct Setup {
    /// Settings in YAML; flags go before them
    #[arg(value_name = "CONFIG.yaml")]
    config: Option<PathBuf>,
    /// The base: a model folder, a hub id or a .gguf file
    #[arg(long, value_name = "MODEL")]
    model: Option<String>,
    /// What it is to learn: CAUSAL_LM, SEQ_CLS, TOKEN_CLS, QUESTION_ANS, SEQ_2_SEQ_LM, MASKED_LM [default: found out]
    #[arg(long, value_name = "TASK")]
    task: Option<String>,
    /// Rows to train on: .jsonl, .json, .csv, .tsv or .txt; several files may be given
    #[arg(long, value_name = "FILE", num_args = 1..)]
    data: Vec<PathBuf>,
    /// Any setting by its name, the value in YAML: --set r=32 --set target_modules=[q_proj,v_proj]
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,

    /// What the method's settings begin with: ours, or those of Python's peft [default: ours]
    #[arg(long, value_name = "WHOSE", help_heading = "Method")]
    defaults: Option<String>,
    /// Rank [default for LoRA: 16]
    #[arg(long, short, value_name = "N", help_heading = "Method")]
    r: Option<u32>,
    /// α of LoRA; the update is scaled by α / r [default: 32]
    #[arg(long, value_name = "X", help_heading = "Method")]
    lora_alpha: Option<f64>,
    /// Virtual tokens of prefix, prompt and P-tuning [default: 20]
    #[arg(long, value_name = "N", help_heading = "Method")]
    num_virtual_tokens: Option<u32>,
    /// Layers: `all-linear`, one expression, or names with commas between [default for LoRA: all-linear]
    #[arg(long, value_name = "NAMES", help_heading = "Method")]
    target_modules: Option<String>,

    /// What is held out: a part (0.1), a number of rows, or a file [default: 0.1]
    #[arg(long, value_name = "WHAT", help_heading = "Data")]
    validation: Option<String>,
    /// Format of the rows [default: found out]
    #[arg(long, value_name = "FORMAT", help_heading = "Data")]
    format: Option<String>,
    /// Tokens after which a row is cut [default: what the model takes, at most 1024]
    #[arg(long, value_name = "N", help_heading = "Data")]
    max_length: Option<usize>,
    /// Learn the prompts, too
    #[arg(long, help_heading = "Data")]
    train_on_prompt: bool,
    /// Where tokenised data is kept [default: the user's cache folder]
    #[arg(long, value_name = "DIR", help_heading = "Data")]
    cache_dir: Option<PathBuf>,
    /// A question that is answered before and after; may be given several times
    #[arg(long, value_name = "TEXT", help_heading = "Data")]
    prompt: Vec<String>,
    /// A file of such questions, one a line
    #[arg(long, value_name = "FILE", help_heading = "Data")]
    prompts: Option<PathBuf>,

    /// Peak of the learning rate [default: what fits the method; 2e-4 for LoRA]
    #[arg(
        long,
        value_name = "X",
        help_heading = "Training",
        allow_negative_numbers = true
    )]
    learning_rate: Option<f64>,
    /// How it moves: linear, cosine, constant, … [default: cosine]
    #[arg(long, value_name = "NAME", help_heading = "Training")]
    lr_scheduler_type: Option<String>,
    /// Steps over which it rises; below 1, that part of all [default: 0.03]
    #[arg(long, value_name = "N", help_heading = "Training")]
    warmup_steps: Option<f64>,
    /// How often all rows are seen [default: 3]
    #[arg(long, value_name = "N", help_heading = "Training")]
    epochs: Option<f64>,
    /// Stop after so many steps; -1: go by epochs
    #[arg(
        long,
        value_name = "N",
        help_heading = "Training",
        allow_negative_numbers = true
    )]
    max_steps: Option<i64>,
    /// Rows that are held in memory at once [default: 8]
    #[arg(long, value_name = "N", help_heading = "Training")]
    batch_size: Option<usize>,
    /// Batches that make one step [default: 1]
    #[arg(long, value_name = "N", help_heading = "Training")]
    gradient_accumulation_steps: Option<usize>,
    /// Compute blocks again in the backward pass instead of keeping them: the same numbers in less memory and more time
    #[arg(
        long,
        value_name = "BOOL",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        help_heading = "Training"
    )]
    gradient_checkpointing: Option<bool>,
    /// λ of AdamW [default: 0]
    #[arg(long, value_name = "X", help_heading = "Training")]
    weight_decay: Option<f64>,
    /// Steps between evaluations [default: a fifth of the run]
    #[arg(long, value_name = "N", help_heading = "Training")]
    eval_steps: Option<usize>,
    /// Steps between checkpoints; 0: only when interrupted [default: 100]
    #[arg(long, value_name = "N", help_heading = "Training")]
    save_steps: Option<usize>,
    /// Stop after so many evaluations without a better one
    #[arg(long, value_name = "N", help_heading = "Training")]
    early_stopping_patience: Option<usize>,
    /// Put rows of like length together
    #[arg(long, help_heading = "Training")]
    group_by_length: bool,
    /// Of everything random [default: 42]
    #[arg(long, value_name = "N", help_heading = "Training")]
    seed: Option<u64>,

    /// cpu, cuda, cuda:N, or auto: a GPU where there is one [default: auto]
    #[arg(long, value_name = "DEVICE", help_heading = "Computing")]
    device: Option<String>,
    /// Number format of the base: auto, fp32, bf16, fp16 [default: auto]
    #[arg(long, value_name = "DTYPE", help_heading = "Computing")]
    dtype: Option<String>,
    /// Keep the linear layers of the base in few bits: nf4, fp4, int8, none [default: nf4 for qlora, else none]
    #[arg(long, value_name = "TYPE", help_heading = "Computing")]
    quantization: Option<String>,
}

const EXAMPLES: &str = "\
Examples:
  peft train --model MODEL --data rows.jsonl --out RUN
  peft train --model MODEL --data rows.jsonl --prompt 'Who are you?' --epochs 2 --set use_dora=true
  peft train RUN/config.yaml --learning-rate 1e-4 --out RUN2
  peft train --resume RUN";

/// The exit code of a run that Ctrl-C stopped, as shells have it.
pub(crate) const INTERRUPTED: i32 = 130;

/// The name of the adapter in the model.
const NAME: &str = "default";

/// The key of `run.json` for the number of parameters that were trained.
pub(crate) const TRAINABLE: &str = "trainable_parameters";

/// The folder of a run with a base of its own: the one in 4 bits that LoftQ or QPiSSA makes up for.
pub(crate) const BASE: &str = "base";

/// Tokens after which a row is cut where nothing is said.
pub(crate) const USUAL_LENGTH: usize = 1024;

/// Trains.
pub(crate) fn run(args: Args) -> Result<()> {
    let mut plan = args.plan()?;
    plan.settings.check().map_err(usage)?;
    let own_base = args.resume.as_ref().map(|it| it.join(BASE));
    let own_base = own_base.filter(|it| it.is_dir());
    let model = match &own_base {
        Some(dir) => dir.to_string_lossy().into_owned(),
        None => plan.recipe.model.clone(),
    };
    let sources = BaseArgs {
        model: Some(model),
        adapter: Vec::new(),
    }
    .find()?;
    let tokenizer = sources.tokenizer()?;
    let stored = Quantization::stored(&sources.base.config()?).is_some();
    plan.quantize(stored && own_base.is_none())?;
    if plan.residual()?.is_some() {
        let run = args.resume.clone().unwrap_or_else(|| args.folder(&plan));
        let base = std::path::absolute(run.join(BASE))?;
        plan.own_base = Some(base.to_string_lossy().into_owned());
    }
    let (place, mut format) = placement(&plan, &sources)?;
    if own_base.is_some() {
        format.scheme = None; // it is in few bits already
    }
    if let Some(run) = &args.resume {
        let of = Run::open(run)?.info()?.more;
        if own_base.is_none() && changed(&of, &sources.base)? {
            anyhow::bail!(
                "the base `{}` is not the one that the run `{}` began with: its weights or its config.json have changed",
                sources.base.path().display(),
                run.display()
            );
        }
    }
    let task = task_of(&plan, &sources)?;
    if let Some(wish) = plan.quantization() {
        wish.must_fit(&sources.base, task)?;
    }
    if matches!(task, Task::SeqCls | Task::TokenCls | Task::QuestionAns) {
        plan.for_heads()?;
    }
    let head = sources.classes_of(task)?;
    let rows = Loaded::read(&plan, &sources, &tokenizer, task, head)?;
    let data = rows.data(&plan, &tokenizer)?;
    let total = plan
        .settings
        .total_steps(data.train.plan(&plan.settings)?.batches_per_epoch());
    let tuner = plan.tuner(task.task_type(), total, &tokenizer)?;

    let sources = Sources {
        head: rows.head(&plan, &tokenizer),
        format,
        ..sources
    };
    let mut model = sources
        .load_task(task, place)
        .map_err(|error| of_outputs(error, sources.head.num_labels))?;
    let all = parameters(&mut *model);
    tch::manual_seed(plan.settings.seed as i64); // the values that the adapter begins with
    let (mut thawed, mut tuner) = (Vec::new(), tuner);
    let mut new_base = false;
    match &tuner {
        Some(it) => {
            model.inject(NAME, &**it).map_err(of_settings)?;
            let left = left_at_random(&mut *model, &[NAME]);
            if !left.is_empty() {
                model.delete(NAME)?;
                plan.also_save(left)?;
                let again = plan.tuner(task.task_type(), total, &tokenizer)?;
                let again = again.context("the method has gone")?;
                tch::manual_seed(plan.settings.seed as i64);
                model.inject(NAME, &*again).map_err(of_settings)?;
                tuner = Some(again);
            }
            if let (Some(how), None) = (plan.residual()?, &own_base) {
                begin_at(how, &sources, task, &mut *model, tuner.as_deref())?;
                new_base = true;
            }
            if let Some(ids) = plan.prefix_text(&tokenizer)? {
                begin_prefix_at(&mut *model, NAME, &ids)
                    .map_err(|error| usage(format!("setting `{PREFIX_INIT_TEXT}`: {error}")))?;
            }
        }
        None => {
            thawed = model
                .thaw(plan.train_modules()?.as_ref())
                .map_err(of_settings)?
        }
    }

    data.fitted(&plan.settings, widest(&*model))
        .map_err(usage)?; // before anything is written

    let run = match &args.resume {
        Some(dir) => Run::open(dir)?,
        None => Run::at(&args.folder(&plan)),
    };
    println!(
        "{}",
        style(format!("Train {}", run.dir().display()))
            .bold()
            .underlined()
    );
    overview(&plan, &rows, &data, place, &mut *model, all, &thawed)?;
    rows.first_row(&tokenizer, &data)?;
    forecast(&plan, &data, &*model)?;
    if args.dry_run {
        println!(
            "\n{}\n\n{}",
            style("Every setting, as it would be used:").bold(),
            plan.to_yaml()?
        );
        return Ok(());
    }
    let from = match &args.resume {
        Some(_) => {
            let from = resumable(&run)?;
            run.remove_partial()?;
            Some(from)
        }
        None => {
            Run::create(run.dir(), args.overwrite).map_err(|error| {
                anyhow::Error::from(error).context("`--out` names the run folder")
            })?;
            None
        }
    };
    if new_base {
        save(&mut *model, &run.dir().join(BASE), &[])?;
        tokenizer.save(&run.dir().join(BASE))?;
    }
    let trained = model.trainable(NAME).into_iter().chain(thawed.clone());
    let trainable: i64 = trained.map(|it| it.tensor.numel() as i64).sum();
    let mut more = more(task, &sources.head);
    more.insert(TRAINABLE.into(), trainable.into());
    if !new_base && own_base.is_none() {
        more.insert(FINGERPRINT.into(), sources.base.fingerprint()?.into());
    }
    if let (Some(wish), false) = (plan.quantization(), new_base || own_base.is_some()) {
        more.insert(QUANTIZATION.into(), serde_json::to_value(wish)?);
    }
    begin(
        &run,
        &plan,
        &sources,
        &tokenizer,
        tuner.as_deref(),
        place,
        more,
    )?;
    let before = ask("before", &plan, &*model, &tokenizer)?;

    println!();
    let stop = stop_on_ctrl_c()?;
    let mut screen = Screen::new(stop);
    let part = match &tuner {
        Some(tuner) => Part::Adapter {
            name: NAME,
            tuner: &**tuner,
        },
        None => Part::Base {
            params: thawed,
            besides: beside(&run),
        },
    };
    let judge = |model: &dyn Network, held_out: &Rows<'_>| rows.figures(model, held_out, &plan);
    let mut objective = Tuned {
        model: &mut *model,
        part,
        judge: Some(&judge),
    };
    let result = peft::train::train(
        &mut objective,
        &plan.settings,
        &data,
        &run,
        from,
        &mut screen,
    );
    screen.end();
    let summary = match result {
        Ok(summary) => summary,
        Err(error) => {
            note(&run, Status::Failed, None)?;
            return Err(error.into());
        }
    };
    let status = match summary.ending {
        Ending::Interrupted => Status::Interrupted,
        Ending::Done | Ending::EarlyStopped => Status::Finished,
    };
    note(&run, status, Some(&summary))?;
    if status == Status::Interrupted {
        println!(
            "\n{} after step {} of {}; go on with",
            style("Interrupted").yellow().bold(),
            summary.steps,
            summary.planned
        );
        println!("  peft train --resume {}", run.dir().display());
        std::process::exit(INTERRUPTED);
    }
    if !before.is_empty() {
        ask("after", &plan, &*model, &tokenizer)?;
    }
    outcome(&run, &summary, tuner.is_some());
    rows.judged(&run, &*model, &data, &plan)?;
    next(&run, &plan, task);
    Ok(())
}

/// Lets LoRA begin with what quantisation took away.
fn begin_at(
    how: Residual,
    sources: &Sources,
    task: Task,
    model: &mut dyn Network,
    tuner: Option<&dyn Tuner>,
) -> Result<()> {
    let tuner = tuner.context("the method has gone")?;
    let lora: LoraConfig = serde_json::from_value(tuner.to_json())?;
    let dense = Sources {
        format: BaseFormat::as_stored(),
        head: sources.head.clone(),
        ..sources.base_alone()
    };
    let mut dense = dense.load_stored(task, None)?;
    begin_at_residual(model, NAME, &lora, &mut *dense, how).map_err(of_settings)?;
    Ok(())
}

/// What the model is to learn: as asked, or what both the data and the model are for.
pub(crate) fn task_of(plan: &Plan, sources: &Sources) -> Result<Task> {
    let recipe = &plan.recipe;
    if recipe.task.is_none() && recipe.format.is_some() {
        return Ok(Task::CausalLm); // the formats that can be named are those of texts to go on with
    }
    task_for(recipe.task.as_deref(), &recipe.data, sources)
}

/// The task that was asked for, or what both the data and the model are for.
pub(crate) fn task_for(asked: Option<&str>, data: &[PathBuf], sources: &Sources) -> Result<Task> {
    let (kind, offered) = sources.offered()?;
    let names = |all: &[Task]| {
        all.iter()
            .map(|it| it.name())
            .collect::<Vec<_>>()
            .join(", ")
    };
    if let Some(asked) = asked {
        let task: Task = asked.parse().map_err(usage)?;
        if task == Task::FeatureExtraction {
            return Err(usage(
                "FEATURE_EXTRACTION has no loss, so there is nothing to train",
            ));
        }
        if !offered.is_empty() && !offered.contains(&task) {
            return Err(usage(format!(
                "`--task {task}`: a model of type `{kind}` is for {}",
                names(offered)
            )));
        }
        return Ok(task);
    }
    let found = match detect_task(data, &Columns::default()) {
        Ok(found) => found,
        // What is wrong with a file of texts is said where such files are read.
        Err(_) if offered.contains(&Task::CausalLm) => return Ok(Task::CausalLm),
        Err(error) => return Err(error.into()),
    };
    let fits: Vec<Task> = found.fits.iter().filter_map(|it| model_task(*it)).collect();
    let meant = found.task.and_then(model_task);
    // Texts alone are for hidden words; of a classifier they are rows whose labels are missing, which is said of the first.
    let own = crate::sources::task_of(&sources.base.config()?);
    if let (Some(Task::MaskedLm), Some(own @ (Task::SeqCls | Task::TokenCls))) = (meant, own) {
        return Ok(own);
    }
    if let Some(task) = meant.filter(|it| offered.contains(it)) {
        return Ok(task);
    }
    let both: Vec<Task> = fits
        .iter()
        .copied()
        .filter(|it| offered.contains(it))
        .collect();
    match (both.as_slice(), meant) {
        ([one], _) => Ok(*one),
        ([], _) => Err(usage(format!(
            "the data is for {} ({}), a model of type `{kind}` is for {}",
            names(&fits),
            found.why,
            names(offered)
        ))),
        (several, _) => Err(usage(format!(
            "the data does not say what it is for; choose with `--task`: {}",
            names(several)
        ))),
    }
}

/// A task of the data crate as one of a model.
fn model_task(task: peft::data::Task) -> Option<Task> {
    task.name().parse().ok()
}

/// Files of the run folder that go into a whole model that is saved: the tokenizer and generation settings.
fn beside(run: &Run) -> Vec<PathBuf> {
    let names = [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "generation_config.json",
    ];
    let paths = names.iter().map(|name| run.dir().join(name));
    paths.filter(|path| path.is_file()).collect()
}

impl Args {
    /// Defaults, then the file, then `--set`, then flags.
    fn plan(&self) -> Result<Plan> {
        let (mut pairs, mut began) = (Vec::new(), None);
        if let Some(run) = &self.resume {
            let path = Run::open(run)?.config();
            Plan::read(&path)?; // what is wrong in the file is said of the file
            pairs = Plan::pairs(&path)?;
            let plan = complete(&pairs).with_context(|| path.display().to_string())?;
            began = Some((run, plan));
        }
        if let Some(path) = self.setup.config() {
            Plan::read(path)?;
        }
        pairs.extend(self.setup.pairs()?);
        let method = self.method.clone();
        pairs.extend(method.map(|it| ("method".to_owned(), it.into())));
        let plan = complete(&pairs)?;
        if let Some((run, began)) = began {
            plan.must_go_on(&began, run)?;
        }
        Ok(plan)
    }

    fn folder(&self, plan: &Plan) -> PathBuf {
        let name = name_of_model(&plan.recipe.model);
        self.out
            .clone()
            .unwrap_or_else(|| Path::new("runs").join(name))
    }
}

/// The last part of a model's name or path.
pub(crate) fn name_of_model(model: &str) -> String {
    let path = Path::new(model);
    let name = path.file_stem().unwrap_or(path.as_os_str());
    name.to_string_lossy().into_owned()
}

/// A plan with a model and data, which is the same wherever it is read.
pub(crate) fn complete(pairs: &[(String, Value)]) -> Result<Plan> {
    let mut plan = Plan::of(pairs)?;
    let recipe = &mut plan.recipe;
    if recipe.model.is_empty() {
        return Err(usage("no model: name one with `--model`"));
    }
    if recipe.data.is_empty() {
        return Err(usage("no data: name a file with `--data`"));
    }
    // What is found from here must be found from elsewhere, too.
    let whole = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    if Path::new(&recipe.model).exists() {
        recipe.model = whole(Path::new(&recipe.model))
            .to_string_lossy()
            .into_owned();
    }
    recipe.data.iter_mut().for_each(|path| *path = whole(path));
    if let Validation::Files(files) = &mut recipe.validation {
        files.iter_mut().for_each(|path| *path = whole(path));
    }
    Ok(plan)
}

impl Setup {
    /// The file, then `--set`, then flags.
    pub(crate) fn pairs(&self) -> Result<Vec<(String, Value)>> {
        let mut pairs = Vec::new();
        if let Some(path) = &self.config {
            pairs = Plan::pairs(path)?;
        }
        for text in &self.set {
            pairs.push(Plan::pair(text)?);
        }
        let flags = self.flags()?.into_iter();
        pairs.extend(flags.map(|(key, value)| (key.to_owned(), value)));
        Ok(pairs)
    }

    /// The file of settings.
    pub(crate) fn config(&self) -> Option<&Path> {
        self.config.as_deref()
    }

    /// The flags that were given, by the names of their settings.
    fn flags(&self) -> Result<Vec<(&'static str, Value)>> {
        let mut given: Vec<(&'static str, Value)> = Vec::new();
        let mut add = |key, value: Option<Value>| given.extend(value.map(|value| (key, value)));
        let texts = |paths: &[PathBuf]| {
            let texts: Vec<Value> = paths.iter().map(|it| it.to_string_lossy().into()).collect();
            (!texts.is_empty()).then_some(Value::Array(texts))
        };
        add("model", self.model.clone().map(Value::from));
        add("task", self.task.clone().map(Value::from));
        add("data", texts(&self.data));
        add("defaults", self.defaults.clone().map(Value::from));
        add(
            "num_virtual_tokens",
            self.num_virtual_tokens.map(Value::from),
        );
        add("r", self.r.map(Value::from));
        add("lora_alpha", self.lora_alpha.map(Value::from));
        add("target_modules", self.target_modules.as_deref().map(names));
        add("validation", self.validation.as_deref().map(held_out));
        add("format", self.format.clone().map(Value::from));
        add("max_length", self.max_length.map(Value::from));
        add(
            "train_on_prompt",
            self.train_on_prompt.then_some(true.into()),
        );
        add(
            "cache_dir",
            self.cache_dir
                .as_ref()
                .map(|it| it.to_string_lossy().into()),
        );
        add("prompts", self.questions()?);
        add("learning_rate", self.learning_rate.map(Value::from));
        add(
            "lr_scheduler_type",
            self.lr_scheduler_type.clone().map(Value::from),
        );
        add("warmup_steps", self.warmup_steps.map(Value::from));
        add("num_train_epochs", self.epochs.map(Value::from));
        add("max_steps", self.max_steps.map(Value::from));
        add(
            "per_device_train_batch_size",
            self.batch_size.map(Value::from),
        );
        add(
            "gradient_accumulation_steps",
            self.gradient_accumulation_steps.map(Value::from),
        );
        add(
            "gradient_checkpointing",
            self.gradient_checkpointing.map(Value::from),
        );
        add("weight_decay", self.weight_decay.map(Value::from));
        add("eval_steps", self.eval_steps.map(Value::from));
        add("save_steps", self.save_steps.map(Value::from));
        add(
            "early_stopping_patience",
            self.early_stopping_patience.map(Value::from),
        );
        add(
            "group_by_length",
            self.group_by_length.then_some(true.into()),
        );
        add("seed", self.seed.map(Value::from));
        add("device", self.device.clone().map(Value::from));
        add("dtype", self.dtype.clone().map(Value::from));
        add("quantization", self.quantization.clone().map(Value::from));
        Ok(given)
    }

    /// The questions of `--prompt` and `--prompts`.
    fn questions(&self) -> Result<Option<Value>> {
        let mut all = self.prompt.clone();
        if let Some(path) = &self.prompts {
            let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
            all.extend(
                text.lines()
                    .filter(|line| !line.trim().is_empty())
                    .map(str::to_owned),
            );
        }
        Ok((!all.is_empty()).then_some(all.into()))
    }
}

/// `q_proj,v_proj` as a list; one word or expression as it is.
fn names(text: &str) -> Value {
    let plain = text
        .chars()
        .all(|c| c.is_alphanumeric() || "_.,- ".contains(c));
    match plain && (text.contains(',') || text != "all-linear") {
        true => text
            .split(',')
            .map(|name| Value::from(name.trim()))
            .collect(),
        false => text.into(),
    }
}

/// `0.1`, `20` or a file.
fn held_out(text: &str) -> Value {
    let rows = text.parse::<usize>().map(Value::from);
    rows.or_else(|_| text.parse::<f64>().map(Value::from))
        .unwrap_or_else(|_| text.into())
}

/// Where and in what the model computes, and how its base is kept.
fn placement(plan: &Plan, sources: &Sources) -> Result<(Placement, BaseFormat)> {
    let placed = placement_of(plan)?;
    let wish = plan.quantization();
    let mut format = match &wish {
        Some(wish) => wish.format()?,
        None => BaseFormat::as_stored(),
    };
    let stored = Quantization::stored(&sources.base.config()?).is_some();
    if (wish.is_some() || stored) && plan.recipe.keep_in_fp32 && placed.kind != tch::Kind::Float {
        format.compute = Some(placed.kind);
        let why = "and products with quantised layers in the format asked for";
        let kind = tch::Kind::Float;
        return Ok((
            Placement {
                kind,
                why,
                ..placed
            },
            format,
        ));
    }
    Ok((unrounded(plan, placed)?, format))
}

/// The place, in fp32 if weights are trained and nothing else is asked for.
fn unrounded(plan: &Plan, placed: Placement) -> Result<Placement> {
    if plan.method()?.peft_type.is_some() {
        return Ok(placed);
    }
    // A step is far smaller than a weight: of bf16's eight bits it would move none.
    Ok(match plan.recipe.dtype.as_str() {
        "auto" => Placement {
            kind: tch::Kind::Float,
            why: "so that small steps are not rounded away",
            ..placed
        },
        _ => placed,
    })
}

fn placement_of(plan: &Plan) -> Result<Placement> {
    #[derive(Debug, Parser)]
    struct Words {
        #[command(flatten)]
        compute: Compute,
    }
    let words = [
        "peft",
        "--device",
        &plan.recipe.device,
        "--dtype",
        &plan.recipe.dtype,
    ];
    let words = Words::try_parse_from(words).map_err(|error| {
        // The value and what it can be; usage and hints are those of another command line.
        let text = error.to_string();
        let said: Vec<&str> = text
            .lines()
            .take_while(|line| !line.is_empty())
            .map(str::trim)
            .collect();
        usage(said.join(" ").trim_start_matches("error: "))
    })?;
    words.compute.place()
}

/// The data sets of a run.
struct Loaded {
    kind: Kind,
    max_length: usize,
}

/// Data, and held-out data of files of its own.
#[allow(clippy::large_enum_variant)] // there is one of it
enum Kind {
    Text(Dataset, Option<Dataset>),
    Task(TaskDataset, Option<TaskDataset>),
}

impl Loaded {
    fn read(
        plan: &Plan,
        sources: &Sources,
        tokenizer: &Tokenizer,
        task: Task,
        classes: Option<Vec<String>>,
    ) -> Result<Loaded> {
        let recipe = &plan.recipe;
        if let Some(name) = recipe
            .problem_type
            .as_ref()
            .filter(|_| task != Task::SeqCls)
        {
            return Err(usage(format!(
                "setting `problem_type`: {name} says what is predicted of a text (SEQ_CLS), the task is {task}"
            )));
        }
        let virtual_tokens = plan.virtual_tokens();
        let length = |usual: usize| sources.row_length(virtual_tokens, recipe.max_length, usual);
        let own_files = match &recipe.validation {
            Validation::Files(files) => Some(files),
            _ => None,
        };
        if task == Task::CausalLm {
            let max_length = length(USUAL_LENGTH)?;
            let options = Options {
                format: format(recipe.format.as_deref())?,
                max_length,
                train_on_prompt: recipe.train_on_prompt,
                cache_dir: recipe.cache_dir.clone().or_else(cache_dir),
                ..Options::default()
            };
            let held_out = own_files.map(|files| load(files, tokenizer, &options));
            return Ok(Loaded {
                kind: Kind::Text(
                    load(&recipe.data, tokenizer, &options)?,
                    held_out.transpose()?,
                ),
                max_length,
            });
        }
        let wanted: peft::data::Task = task.name().parse()?;
        let options = TaskOptions::of(wanted);
        let length = length(options.max_length)?;
        let mut options = options.with_max_length(length);
        options.mask_seed = plan.settings.seed;
        options.problem = match (&recipe.problem_type, sources.predicts_numbers(task)?) {
            (Some(name), _) => Some(
                name.parse()
                    .map_err(|error| setting("problem_type", error))?,
            ),
            (None, true) => Some(peft::data::Problem::Regression),
            (None, false) => None,
        };
        options.classes =
            classes.filter(|_| options.problem != Some(peft::data::Problem::Regression));
        let data = prepare_task(&recipe.data, tokenizer, &options, &|_| {})?;
        // What is held out has the classes of what is learnt, and is of its kind.
        options.classes = (!data.classes().is_empty()).then(|| data.classes().to_vec());
        options.problem = data.problem();
        let held_out = own_files.map(|files| prepare_task(files, tokenizer, &options, &|_| {}));
        Ok(Loaded {
            max_length: options.max_length,
            kind: Kind::Task(data, held_out.transpose()?),
        })
    }

    /// What is trained on and what is held out.
    fn data(&self, plan: &Plan, tokenizer: &Tokenizer) -> Result<Data<'_>> {
        let wrong = |error: peft::data::Error| usage(format!("`validation`: {error}"));
        let (holdout, seed) = (plan.recipe.validation.holdout(), plan.settings.seed);
        let (train, held_out) = match &self.kind {
            Kind::Text(data, other) => {
                let pad = tokenizer.pad_id();
                let all = (0..data.len()).collect();
                let (train, held) = match (other, holdout) {
                    (None, Some(holdout)) => split(data.len(), holdout, seed).map_err(wrong)?,
                    _ => (all, Vec::new()),
                };
                let held = match other {
                    Some(other) => Some((other, (0..other.len()).collect())),
                    None => (!held.is_empty()).then_some((data, held)),
                };
                let held = held.map(|(data, rows)| Rows::new(data, rows, pad));
                (Rows::new(data, train, pad), held)
            }
            Kind::Task(data, other) => {
                let all = (0..data.len()).collect();
                let (train, held) = match (other, holdout) {
                    (None, Some(holdout)) => data.split(holdout, seed).map_err(wrong)?,
                    _ => (all, Vec::new()),
                };
                let held = match other {
                    Some(other) => Some((other, (0..other.len()).collect())),
                    None => (!held.is_empty()).then_some((data, held)),
                };
                let held = held.map(|(data, rows)| Rows::of_task(data, rows));
                (Rows::of_task(data, train), held)
            }
        };
        let of = |files: &[PathBuf]| {
            let names: Vec<String> = files.iter().map(|it| it.display().to_string()).collect();
            names.join(", ")
        };
        let learnt = || format!("the rows to train on, of {}", of(&plan.recipe.data));
        let kept = || match &plan.recipe.validation {
            Validation::Files(files) => format!("the held-out rows, of {}", of(files)),
            _ => format!("the held-out rows, of {}", of(&plan.recipe.data)),
        };
        Ok(Data {
            train: train.with_context(learnt)?,
            held_out: held_out.transpose().with_context(kept)?,
        })
    }

    /// What the head of the model should be like.
    fn head(&self, plan: &Plan, tokenizer: &Tokenizer) -> HeadOptions {
        let Kind::Task(data, _) = &self.kind else {
            return HeadOptions::default();
        };
        let classes = data.classes();
        let outputs = data.outputs().and_then(|it| i64::try_from(it).ok());
        HeadOptions {
            num_labels: outputs,
            id2label: (!classes.is_empty()).then(|| classes.to_vec()),
            problem_type: data.problem().and_then(|it| Problem::named(it.name())),
            pad_token_id: Some(i64::from(tokenizer.pad_id())),
            seed: plan.settings.seed,
        }
    }

    fn describe(&self, data: &Data<'_>) {
        let length = self.max_length;
        match &self.kind {
            Kind::Text(all, other) => {
                describe("data", all, length);
                if let Some(other) = other {
                    return describe("held out", other, length);
                }
            }
            Kind::Task(all, other) => {
                describe_task("data", all, length);
                if let Some(other) = other {
                    return describe_task("held out", other, length);
                }
            }
        }
        match &data.held_out {
            Some(rows) => row(
                "held out",
                format!("{} of these rows", grouped(rows.len() as i64)),
            ),
            None => row("held out", "nothing: no evaluation, no best adapter"),
        }
    }

    /// The first row of the first batch, as the model will see it.
    fn first_row(&self, tokenizer: &Tokenizer, data: &Data<'_>) -> Result<()> {
        let Kind::Task(all, _) = &self.kind else {
            return first_row(tokenizer, data);
        };
        println!("\n{}", style("The first row as the model sees it").bold());
        match data.train.indices().first() {
            Some(&at) => show_row(all, tokenizer, at, FIRST_TOKENS),
            None => Ok(()),
        }
    }

    /// What a model is judged by at each evaluation besides the loss.
    fn figures(
        &self,
        model: &dyn Network,
        held_out: &Rows<'_>,
        plan: &Plan,
    ) -> peft::train::Result<BTreeMap<String, f64>> {
        let Kind::Task(all, other) = &self.kind else {
            return Ok(BTreeMap::new());
        };
        let data = other.as_ref().unwrap_or(all);
        let size = plan.settings.per_device_eval_batch_size;
        figures(model, data, held_out.indices(), size)
            .map_err(|error| peft::train::Error::Judge(format!("{error:#}")))
    }

    /// What the trained model is worth on what was held out, in figures and, for classes, as a picture.
    fn judged(&self, run: &Run, model: &dyn Network, data: &Data<'_>, plan: &Plan) -> Result<()> {
        let (Kind::Task(all, other), Some(rows)) = (&self.kind, &data.held_out) else {
            return Ok(());
        };
        let size = plan.settings.per_device_eval_batch_size;
        let judged = judge(model, other.as_ref().unwrap_or(all), rows.indices(), size)?;
        row("judged", judged.line());
        if let Some(confusion) = &judged.confusion {
            println!("\n{}", confusion.table());
            let title = format!("{} – what was taken for what", run.dir().display());
            for kind in ["png", "svg"] {
                confusion.draw(&run.dir().join(format!("confusion.{kind}")), &title)?;
            }
            row("picture", run.dir().join("confusion.png").display());
        } else if let Some(report) = &judged.report {
            println!("\n{report}");
        }
        Ok(())
    }
}

/// A row of a task: its tokens, with labels where they have some, its label or its target.
pub(crate) fn show_row(
    data: &TaskDataset,
    tokenizer: &Tokenizer,
    at: usize,
    most: usize,
) -> Result<()> {
    let shown = data.show(tokenizer, at)?;
    let token = |piece: &peft::data::TaskPiece| match &piece.label {
        Some(label) => format!("{}⟨{label}⟩", piece.token),
        None => piece.token.clone(),
    };
    let line = |pieces: &[peft::data::TaskPiece]| {
        let all = pieces.iter().take(most).map(token);
        all.collect::<Vec<_>>().join(" ")
    };
    println!("  {}", line(&shown.pieces));
    if let Some(label) = &shown.label {
        println!("  {} {}", style("label").dim(), style(label).green());
    }
    if !shown.target.is_empty() {
        println!(
            "  {} {}",
            style("target").dim(),
            style(line(&shown.target)).green()
        );
    }
    Ok(())
}

/// Tokens of a first row that are shown.
const FIRST_TOKENS: usize = 60;

/// Data of a task on a line, and what there is to say about it.
pub(crate) fn describe_task(name: &str, data: &TaskDataset, max_length: usize) {
    let report = data.report();
    for file in &report.files {
        let rows = grouped(file.rows as i64);
        row(name, format!("{} · {rows} rows", file.path.display()));
    }
    let count = |n: usize| grouped(n as i64);
    row(
        "",
        format!(
            "{} tokens · longest {}, {} cut at {}",
            count(report.tokens),
            count(report.longest),
            count(report.truncated),
            count(max_length),
        ),
    );
    if !report.classes.is_empty() {
        let shown: Vec<String> = report
            .classes
            .iter()
            .take(12)
            .map(|(name, times)| format!("{name} {times}"))
            .collect();
        let more = match report.classes.len() > shown.len() {
            true => ", …",
            false => "",
        };
        row(
            "classes",
            format!("{}: {}{more}", report.classes.len(), shown.join(", ")),
        );
    }
    report.warnings().iter().for_each(|text| warn(text));
}

/// A format by its name; an unknown one names the nearest.
pub(crate) fn format(name: Option<&str>) -> Result<Option<Format>> {
    name.map(|name| name.parse().map_err(usage)).transpose()
}

/// Reads and tokenises files, with a bar where there is a terminal.
pub(crate) fn load(files: &[PathBuf], tokenizer: &Tokenizer, options: &Options) -> Result<Dataset> {
    let bar = ProgressBar::new(0); // hidden where there is no terminal
    if let Ok(look) =
        ProgressStyle::with_template("reading {bar:24.cyan/dim} {bytes}/{total_bytes} {msg}")
    {
        bar.set_style(look.progress_chars("━━─"));
    }
    let data = prepare(files, tokenizer, options, &|progress| {
        bar.set_length(progress.total_bytes as u64);
        bar.set_position(progress.bytes as u64);
        bar.set_message(format!("{} rows", grouped(progress.rows as i64)));
    });
    bar.finish_and_clear();
    data.map_err(|error| match error {
        peft::data::Error::Option(_) => usage(error),
        error => error.into(),
    })
}

/// Where tokenised data is kept between runs.
pub(crate) fn cache_dir() -> Option<PathBuf> {
    let named = |name| {
        std::env::var_os(name)
            .filter(|it| !it.is_empty())
            .map(PathBuf::from)
    };
    let user = named("XDG_CACHE_HOME").or_else(|| named("HOME").map(|home| home.join(".cache")))?;
    let dir = user.join("peft").join("data");
    let writable = std::fs::create_dir_all(&dir).and_then(|()| tempfile::tempfile_in(&dir));
    match writable {
        Ok(_) => Some(dir),
        Err(error) => {
            eprintln!(
                "note: tokenised data is not kept for the next time: {}: {error}; XDG_CACHE_HOME names another place",
                dir.display()
            );
            None
        }
    }
}

/// Everything that was resolved.
fn overview(
    plan: &Plan,
    rows: &Loaded,
    data: &Data<'_>,
    place: Placement,
    model: &mut dyn Network,
    all: i64,
    thawed: &[Param],
) -> Result<()> {
    let kind = model.spec().model_type;
    let device = match place.device {
        Device::Cuda(i) => format!("cuda:{i}"),
        _ => format!("cpu, {}", plural(tch::get_num_threads() as usize, "thread")),
    };
    row(
        "model",
        format!(
            "{} · {kind} · {} parameters",
            plan.recipe.model,
            grouped(all)
        ),
    );
    row(
        "computes",
        format!("in {} on {device} ({})", kind_name(place.kind), place.why),
    );
    if !thawed.is_empty() && place.kind != tch::Kind::Float {
        warn(
            "weights are trained in 16 bits: steps below about 1/256 of a weight are rounded away; `--dtype fp32` keeps them",
        );
    }
    match plan.quantization() {
        Some(wish) => row("base", format!("linear layers in {}", wish.line())),
        None => {
            if let Some(bits) = in_bits(model) {
                row("base", bits);
            }
        }
    }
    row("task", model.task());
    if !model.fresh().is_empty() {
        row(
            "new",
            format!(
                "{}: drawn at random, learnt with the rest",
                model.fresh().join(", ")
            ),
        );
    }
    rows.describe(data);
    let mut trained = model.trainable(NAME);
    trained.extend(thawed.iter().cloned());
    let places: std::collections::BTreeSet<&str> =
        trained.iter().map(|it| it.at.as_str()).collect();
    row(
        "method",
        format!(
            "{} at {}{}",
            plan.method()?.title,
            plural(places.len(), "place"),
            method_line(plan)
        ),
    );
    let trainable: i64 = trained.iter().map(|it| it.tensor.numel() as i64).sum();
    let adapter = if thawed.is_empty() { trainable } else { 0 };
    println!("  {}", trainable_line(trainable, all + adapter));
    let settings = &plan.settings;
    let batches = data.train.plan(settings)?.batches_per_epoch();
    let total = settings.total_steps(batches);
    let size = settings.per_device_train_batch_size * settings.gradient_accumulation_steps;
    let epochs = total as f64 / settings.steps_per_epoch(batches) as f64;
    row(
        "steps",
        format!(
            "{} of {size} rows · {epochs:.2} epochs · evaluated every {}{}",
            grouped(total as i64),
            settings.evaluate_every(total),
            match settings.gradient_checkpointing {
                true => " · blocks computed twice, not kept",
                false => "",
            }
        ),
    );
    let schedule = serde_json::to_value(settings.lr_scheduler_type)?;
    row(
        "rate",
        format!(
            "{:e}, {}, rising for {} steps · seed {}",
            settings.learning_rate,
            schedule.as_str().unwrap_or_default(),
            settings.warmup(total),
            settings.seed
        ),
    );
    if settings.warmup(total) >= total {
        warn(&format!(
            "the rate rises for {} steps and the run has {total}: it never gets to its peak",
            settings.warmup(total)
        ));
    }
    let usual = plan.method()?.learning_rate;
    if settings.learning_rate > 20.0 * usual {
        warn(&format!(
            "a learning rate of {:e} is high: {} usually learns with about {usual:e}",
            settings.learning_rate,
            plan.method()?.title
        ));
    }
    Ok(())
}

/// A data set on a line, and what there is to say about it.
pub(crate) fn describe(name: &str, data: &Dataset, max_length: usize) {
    let report = data.report();
    for file in data.files() {
        let rows = grouped(file.rows as i64);
        row(
            name,
            format!(
                "{} · {rows} rows, format {}",
                file.path.display(),
                file.format
            ),
        );
    }
    let count = |n: usize| grouped(n as i64);
    let template = if report.chat_template {
        " · through the chat template"
    } else {
        ""
    };
    row(
        "",
        format!(
            "{} tokens, {} of them learnt · longest {}, {} cut at {}{template}",
            count(report.tokens),
            count(report.trained_tokens),
            count(report.longest),
            count(report.truncated),
            count(max_length),
        ),
    );
    report.warnings().iter().for_each(|text| warn(text));
}

fn warn(text: &str) {
    println!("  {} {text}", style("warning").yellow().bold());
}

fn method_line(plan: &Plan) -> String {
    let settings = plan.recipe.options.iter();
    let settings = settings.filter(|(_, value)| !value.is_null());
    let text = |value: &Value| {
        value
            .as_str()
            .map_or_else(|| value.to_string(), str::to_owned)
    };
    settings
        .map(|(key, value)| format!(" · {key} {}", text(value)))
        .collect()
}

/// As Python's `print_trainable_parameters` says it; all are the base's and the adapter's.
fn trainable_line(trainable: i64, all: i64) -> String {
    let part = 100.0 * trainable as f64 / all.max(1) as f64;
    format!(
        "trainable params: {} || all params: {} || trainable%: {part:.4}",
        grouped(trainable),
        grouped(all)
    )
}

/// The first row of the first batch, as the model will see it.
fn first_row(tokenizer: &Tokenizer, data: &Data<'_>) -> Result<()> {
    let marks = match console::colors_enabled() {
        true => "what is green is learnt",
        false => "what is between ⟦ and ⟧ is learnt",
    };
    println!(
        "\n{} ({marks})",
        style("The first row as the model sees it").bold()
    );
    let Some(row) = data.train.first() else {
        return Ok(());
    };
    let text = paint(&pieces(tokenizer, row)?, "");
    for line in text.trim_end().lines().take(FIRST_LINES) {
        println!("  {line}");
    }
    if text.trim_end().lines().count() > FIRST_LINES {
        println!("  {}", style("… (`peft data` shows all of it)").dim());
    }
    Ok(())
}

/// Lines of the first row that are shown.
const FIRST_LINES: usize = 24;

/// Times a forward pass, and says how long the run may take.
fn forecast(plan: &Plan, data: &Data<'_>, model: &dyn Network) -> Result<()> {
    let settings = &plan.settings;
    let order = data.train.plan(settings)?;
    let Some(rows) = order.epoch(0).into_iter().next() else {
        return Ok(());
    };
    let batch = data.train.batch(&rows, Pass::Eval)?;
    let _off = tch::no_grad_guard();
    let mut time = Duration::ZERO;
    for _ in 0..2 {
        let begun = Instant::now(); // the first pass reads the weights from the disk
        let _ = f64::try_from(loss(model, &batch, Ctx::EVAL)?.0)?;
        time = begun.elapsed();
    }
    // A backward pass through a frozen base costs about as much as the forward pass, and a little more; one that computes
    // the blocks again, a forward pass besides.
    let total = settings.total_steps(order.batches_per_epoch());
    let held_out = data.held_out.as_ref().map_or(0, Rows::len) as f64 / rows.len().max(1) as f64;
    let evaluations =
        total.div_ceil(settings.evaluate_every(total)) + usize::from(settings.eval_on_start);
    let each = if settings.gradient_checkpointing {
        3.5
    } else {
        2.5
    };
    let trained = each * (total * settings.gradient_accumulation_steps) as f64;
    let passes = trained + held_out * evaluations as f64;
    let guess = Duration::try_from_secs_f64(time.as_secs_f64() * passes).unwrap_or(Duration::MAX);
    let memory = memory::usage(model.device()).map(|it| format!(" · {} in use", bytes(it.now)));
    println!();
    row(
        "takes",
        format!("about {}{}", duration(guess), memory.unwrap_or_default()),
    );
    Ok(())
}

/// Writes what later commands need before anything else happens.
fn begin(
    run: &Run,
    plan: &Plan,
    sources: &Sources,
    tokenizer: &Tokenizer,
    tuner: Option<&dyn Tuner>,
    place: Placement,
    more: serde_json::Map<String, Value>,
) -> Result<()> {
    peft::core::files::write_text(&run.config(), &plan.to_yaml()?)?;
    tokenizer.save(run.dir())?;
    if let Some(path) = sources.generation_config() {
        let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        peft::core::files::write_text(&run.dir().join("generation_config.json"), &text)?;
    }
    let own = run.dir().join(BASE);
    let base = match own.is_dir() {
        true => std::path::absolute(&own)?.to_string_lossy().into_owned(),
        false => plan.recipe.model.clone(),
    };
    let versions = BTreeMap::from([
        ("peft".to_owned(), env!("CARGO_PKG_VERSION").to_owned()),
        ("libtorch".to_owned(), "2.11.0".to_owned()),
    ]);
    Ok(run.set_info(&RunInfo {
        status: Status::Running,
        base_model: base,
        dtype: kind_name(place.kind).to_owned(),
        method: tuner.map_or(FULL, Tuner::peft_type).to_owned(),
        versions,
        summary: None,
        more,
    })?)
}

/// What later commands need to know of the task.
fn more(task: Task, head: &HeadOptions) -> serde_json::Map<String, Value> {
    let mut map = serde_json::Map::new();
    map.insert(TASK.into(), task.name().into());
    if let Some(classes) = &head.id2label {
        map.insert(CLASSES.into(), classes.clone().into());
    }
    if let Some(problem) = head.problem_type {
        map.insert(PROBLEM.into(), problem.name().into());
    }
    if let Some(pad) = head.pad_token_id {
        map.insert("pad_token_id".into(), pad.into());
    }
    map
}

fn setting(key: &str, error: peft::data::Error) -> anyhow::Error {
    usage(format!("setting `{key}`: {error}"))
}

/// Where the head has another number of outputs than the rows, that is what is wrong.
fn of_outputs(error: anyhow::Error, outputs: Option<i64>) -> anyhow::Error {
    let wanted = match error.downcast_ref::<peft::Error>() {
        Some(peft::Error::Shape { expected, .. }) => expected.first().copied(),
        _ => None,
    };
    match outputs.filter(|it| wanted == Some(*it)) {
        Some(n) => error.context(format!(
            "the rows want a head of {n} outputs, and the model brings another"
        )),
        None => error,
    }
}

/// Notes how a run ended.
fn note(run: &Run, status: Status, summary: Option<&Summary>) -> Result<()> {
    let info = run.info()?;
    let summary = summary.cloned();
    Ok(run.set_info(&RunInfo {
        status,
        summary,
        ..info
    })?)
}

fn resumable(run: &Run) -> Result<Checkpoint> {
    let path = run.checkpoint();
    if run.info()?.status == Status::Finished {
        return Err(usage(format!(
            "the run `{}` is finished, there is nothing to resume",
            run.dir().display()
        )));
    }
    if !path.exists() {
        let dir = run.dir().display();
        anyhow::bail!(
            "the run `{dir}` was not saved before it ended; begin it anew with `peft train {dir}/config.yaml --out {dir} --overwrite`"
        );
    }
    Ok(Checkpoint::load(&path)?)
}

/// Answers the questions of the plan, greedily.
fn ask(when: &str, plan: &Plan, model: &dyn Network, tokenizer: &Tokenizer) -> Result<Vec<String>> {
    let questions = &plan.recipe.prompts;
    if questions.is_empty() {
        return Ok(Vec::new());
    }
    let Some(model) = model.decoder() else {
        return Err(usage(format!(
            "`--prompt` asks a model that goes on with texts, this one is for {}",
            model.task()
        )));
    };
    let ids = |question: &String| match tokenizer.chat_template() {
        Some(_) => conversation(tokenizer, &[Message::user(question.as_str())]),
        None => Ok(tokenizer.encode(question, true)?),
    };
    let prompts = questions.iter().map(ids).collect::<Result<Vec<_>>>()?;
    let sampling = Sampling {
        max_new_tokens: 64,
        stop_ids: tokenizer.eos_ids().to_vec(),
        ..Sampling::default()
    };
    println!("\n{}", style(format!("Answers {when} training")).bold());
    let replies = answers(Writer::Decoder(model), tokenizer, &prompts, &sampling, &[])?;
    for (question, reply) in questions.iter().zip(&replies) {
        println!("  {} {question}", style(">").dim());
        reply
            .text
            .trim()
            .lines()
            .for_each(|line| println!("    {}", style(line).cyan()));
    }
    Ok(replies.into_iter().map(|it| it.text).collect())
}

/// The first Ctrl-C asks the run to stop after its step; the second ends the program.
fn stop_on_ctrl_c() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let set = stop.clone();
    ctrlc::set_handler(move || {
        if set.swap(true, Ordering::Relaxed) {
            peft::torch::end_process(INTERRUPTED);
        }
        eprintln!("\nstopping after this step; once more to stop at once");
    })
    .context("listening for Ctrl-C")?;
    Ok(stop)
}

/// What came out, where it lies, and what to type next.
fn outcome(run: &Run, summary: &Summary, adapter: bool) {
    let time = duration(Duration::from_secs_f64(summary.seconds));
    println!("\n{}", style("Done").green().bold());
    let early = if summary.ending == Ending::EarlyStopped {
        ", stopped early"
    } else {
        ""
    };
    row(
        "took",
        format!(
            "{time} for {} steps{early} · {} tokens",
            summary.steps,
            grouped(summary.tokens as i64)
        ),
    );
    if let (Some(before), Some(after)) = (summary.first_eval, summary.last_eval) {
        let loss = style(format!("{before:.4} → {after:.4}")).green().bold();
        let perplexity = match summary.figures.is_empty() {
            true => format!(" · perplexity {:.2} → {:.2}", before.exp(), after.exp()),
            false => String::new(), // classes and numbers have figures of their own
        };
        row("held out", format!("loss {loss}{perplexity}"));
    }
    if let Some(best) = summary.best {
        row(
            "best",
            format!(
                "loss {:.4} after step {} · {}",
                best.eval_loss,
                best.step,
                run.best().display()
            ),
        );
    }
    if let Some(peak) = summary.peak_memory {
        row("memory", format!("at most {}", bytes(peak)));
    }
    row(
        if adapter { "adapter" } else { "model" },
        run.adapter().display(),
    );
    row("curve", format!("{} and .svg", run.curve("png").display()));
    row("log", run.log().display());
}

/// What a person would type next.
fn next(run: &Run, plan: &Plan, task: Task) {
    let dir = run.dir().display();
    let file = plan.recipe.data.first();
    let file = file.map(|it| it.display().to_string()).unwrap_or_default();
    println!("\n{}", style("Next").bold());
    if task == Task::CausalLm {
        println!("  peft chat {dir}");
    }
    println!("  peft eval {dir} --data {file}");
    let virtual_tokens = ["prefix", "prompt", "p-tuning"];
    let method = plan.recipe.method.as_str();
    if method != "full" && !virtual_tokens.contains(&method) {
        println!("  peft merge {dir} --out {dir}-merged");
    }
}
