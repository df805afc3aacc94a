//! `peft compare`: several methods on the same data, seed and budget; one table and one picture.
//!
//! ```text
//! candidates ─► a dry run of each ─► train each in a process of its own ─► compare.md, .json, .png, .svg
//! ```
//!
//! Each method is a run like any other, in a folder of its own: its memory is its own, since a process has
//! one peak, and every other command takes its folder. What cannot be right is found in the dry runs, before anything is trained.

use std::{
    fs,
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use console::style;
use indicatif::{ProgressBar, ProgressStyle};
use peft::{
    core::files,
    data::TaskOptions,
    models::Task,
    train::{Curve, Record, Run, Status, draw_several, read_log},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    check::plain_table,
    train::{
        INTERRUPTED, Setup, TRAINABLE, USUAL_LENGTH, complete, name_of_model,
        recipe::{Plan, Recipe, Validation},
        screen::row,
        task_of,
    },
};
use crate::{
    error::usage,
    methods::{METHODS, Method},
    sources::BaseArgs,
    terminal::{bytes, grouped},
};

/// Flags of `peft compare`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The methods, with commas between [default: every one that fits the model]
    #[arg(
        long,
        value_name = "NAMES",
        value_delimiter = ',',
        help_heading = "Method"
    )]
    methods: Vec<String>,
    #[command(flatten)]
    setup: Setup,
    /// The folder of the comparison, which must not exist [default: runs/NAME-OF-MODEL-compared]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Go on with a comparison that was interrupted
    #[arg(long, value_name = "DIR", conflicts_with_all = ["config", "model", "data", "out", "set", "methods"])]
    resume: Option<PathBuf>,
}

const EXAMPLES: &str = "\
Examples:
  peft compare --model MODEL --data rows.jsonl --methods lora,ia3,prompt,full --max-steps 100 --out DIR
  peft compare settings.yaml --out DIR
  peft compare --resume DIR

The file has the settings of `peft train`. `methods` is a list of names, or of settings that only one of them has:
  methods: [lora, full, {name: lora-4, method: lora, r: 4, learning_rate: 1e-3}]
A setting that only some methods have goes to those.";

/// The key of the list of methods.
const LIST: &str = "methods";

/// One row of the comparison.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Candidate {
    /// Its name in the table, and of its folder.
    name: String,
    /// Settings in the order of their precedence.
    settings: Vec<(String, Value)>,
    /// Somebody named it; else it is left out where it does not fit the model.
    asked: bool,
}

/// What `compare.json` holds.
#[derive(Debug, Serialize, Deserialize)]
struct Comparison {
    candidates: Vec<Candidate>,
    /// Methods that do not fit the model, and why.
    left_out: Vec<(String, String)>,
    /// Each file of rows with its length and the time of its last change in seconds: others would be another comparison.
    files: Vec<(PathBuf, u64, u64)>,
    /// One for each candidate, once all are trained.
    outcomes: Vec<Outcome>,
}

/// What came out for one method.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Outcome {
    name: String,
    /// Parameters that were trained.
    trainable: i64,
    /// Bytes of the weights that are saved.
    saved: u64,
    /// The number format that it computed in.
    dtype: String,
    /// Bytes in use at most, where the system tells.
    peak_memory: Option<u64>,
    /// Of a step, the median.
    seconds: Option<f64>,
    /// (step, held-out loss).
    losses: Vec<(usize, f64)>,
    /// (step, value) of what the task is judged by besides, by name.
    figures: std::collections::BTreeMap<String, Vec<(usize, f64)>>,
}

/// Trains and compares.
pub(crate) fn run(args: Args) -> Result<()> {
    // Asked now: a file that is replaced meanwhile has no place any more.
    let program = std::env::current_exe().context("where this program lies")?;
    let (dir, mut comparison) = match &args.resume {
        Some(dir) => {
            if let Some((key, _)) = args.setup.pairs()?.first() {
                return Err(usage(format!(
                    "`--resume` goes on with the settings of the comparison, and `{key}` is given besides"
                )));
            }
            let comparison = read(dir)?;
            for file in &comparison.files {
                if stamp(&file.0)? != *file {
                    return Err(usage(format!(
                        "`{}` has changed since the comparison began: compare anew in another folder",
                        file.0.display()
                    )));
                }
            }
            (dir.clone(), comparison)
        }
        None => begin(&program, &args)?,
    };
    let candidates = comparison.candidates.clone();
    let stop = watch_ctrl_c()?;
    for (at, candidate) in (1..).zip(&candidates) {
        let title = format!("{} ({at} of {})", candidate.name, candidates.len());
        println!("\n{}", style(title).bold());
        let run = Run::at(&dir.join(&candidate.name));
        if !train(&program, candidate, &run, stop)? {
            println!(
                "\n{}; go on with\n  peft compare --resume {}",
                style("Interrupted").yellow().bold(),
                dir.display()
            );
            std::process::exit(INTERRUPTED);
        }
        comparison.outcomes.push(Outcome::of(candidate, &run)?);
    }
    comparison.write(&dir)?;
    comparison.report(&dir)
}

/// Resolves the candidates, tries each without training, and makes the folder.
fn begin(program: &Path, args: &Args) -> Result<(PathBuf, Comparison)> {
    let candidates = candidates(args.setup.pairs()?, &args.methods)?;
    let mut plans = Vec::new();
    for candidate in &candidates {
        let plan = complete(&candidate.settings)
            .map_err(|error| usage(format!("{}: {error}", candidate.name)))?;
        plans.push(plan);
    }
    let length = length_for_all(&plans)?.map(|it| ("max_length".to_owned(), it.into()));
    let candidates = candidates.into_iter().map(|mut it| {
        it.settings.extend(length.clone());
        it
    });
    let recipe = &plans.first().context("no method")?.recipe;
    let dir = args.out.clone().unwrap_or_else(|| {
        let name = name_of_model(&recipe.model);
        Path::new("runs").join(format!("{name}-compared"))
    });
    if dir.read_dir().is_ok_and(|mut it| it.next().is_some()) || dir.is_file() {
        return Err(usage(format!(
            "`{}` is not empty: take another folder with `--out`, or go on there with `--resume`",
            dir.display()
        )));
    }
    println!(
        "{}",
        style(format!("Compare {}", dir.display()))
            .bold()
            .underlined()
    );
    row("model", &recipe.model);
    for path in &recipe.data {
        row("data", path.display());
    }
    row("seed", plans[0].settings.seed);
    let mut files = recipe.data.clone();
    match &recipe.validation {
        Validation::Files(others) => files.extend(others.iter().cloned()),
        Validation::Rows(0) => return Err(nothing_held_out()),
        Validation::Part(part) if *part == 0.0 => return Err(nothing_held_out()),
        _ => {}
    }
    let mut comparison = Comparison {
        candidates: Vec::new(),
        left_out: Vec::new(),
        files: files.iter().map(|it| stamp(it)).collect::<Result<_>>()?,
        outcomes: Vec::new(),
    };
    println!();
    for (candidate, plan) in candidates.zip(&plans) {
        let candidate = Candidate {
            settings: whole_paths(candidate.settings, &plan.recipe),
            ..candidate
        };
        match rehearse(program, &candidate, &dir)? {
            Rehearsal::Fits(said) => {
                row(&candidate.name, said);
                comparison.candidates.push(candidate);
            }
            Rehearsal::Refused(why) if !candidate.asked => {
                row(&candidate.name, style(format!("left out: {why}")).dim());
                comparison.left_out.push((candidate.name, why));
            }
            Rehearsal::Refused(why) => {
                return Err(usage(format!("{}: {why}", candidate.name)));
            }
        }
    }
    if comparison.candidates.is_empty() {
        let why = comparison.left_out.first().map(|it| it.1.as_str());
        bail!("no method fits: {}", why.unwrap_or_default());
    }
    fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
    comparison.write(&dir)?;
    Ok((dir, comparison))
}

/// Where rows are cut, if one of the methods has virtual tokens for which rows must be shorter: all are compared on the same rows.
fn length_for_all(plans: &[Plan]) -> Result<Option<usize>> {
    let first = plans.first().context("no method")?;
    let most = plans.iter().map(Plan::virtual_tokens).max().unwrap_or(0);
    if first.recipe.max_length.is_some() {
        return Ok(None);
    }
    let sources = BaseArgs {
        model: Some(first.recipe.model.clone()),
        adapter: Vec::new(),
    }
    .find()?;
    let usual = match task_of(first, &sources)? {
        Task::CausalLm => USUAL_LENGTH,
        task => TaskOptions::of(task.name().parse()?).max_length,
    };
    let length = |virtual_tokens| sources.row_length(virtual_tokens, None, usual);
    let (alone, shared) = (length(0)?, length(most)?);
    Ok((shared < alone).then_some(shared))
}

fn nothing_held_out() -> anyhow::Error {
    usage("`validation` is 0: methods are compared by rows that are held out")
}

fn stamp(path: &Path) -> Result<(PathBuf, u64, u64)> {
    let about = fs::metadata(path).with_context(|| path.display().to_string())?;
    let changed = about.modified().context("the time of its last change")?;
    let since = changed.duration_since(std::time::UNIX_EPOCH);
    let seconds = since.map_or(0, |it| it.as_secs());
    Ok((path.to_owned(), about.len(), seconds))
}

/// The candidates out of all settings, each with those that are its own.
fn candidates(pairs: Vec<(String, Value)>, flags: &[String]) -> Result<Vec<Candidate>> {
    let (lists, shared): (Vec<_>, Vec<_>) = pairs.into_iter().partition(|(key, _)| key == LIST);
    if let Some((_, value)) = shared.iter().find(|(key, _)| key == "method") {
        return Err(usage(format!(
            "`method: {value}` names one method; to compare, name several with `{LIST}`"
        )));
    }
    let listed = !lists.is_empty();
    let given: Vec<Value> = match (flags, lists.into_iter().next_back()) {
        ([], None) => Vec::new(),
        ([], Some((_, Value::Array(all)))) => all,
        ([], Some((_, other))) => {
            return Err(usage(format!("setting `{LIST}`: {other} is no list")));
        }
        (flags, _) => flags.iter().map(|it| it.as_str().into()).collect(),
    };
    if listed && given.is_empty() {
        return Err(usage(format!("setting `{LIST}` is an empty list")));
    }
    let asked = !given.is_empty();
    let given = match asked {
        true => given,
        false => METHODS.iter().map(|it| it.name.into()).collect(),
    };
    let mut entries = given.iter().map(entry).collect::<Result<Vec<_>>>()?;
    for at in 0..entries.len() {
        let name = entries[at].0.clone();
        if entries[..at].iter().any(|it| it.0 == name) {
            return Err(usage(format!(
                "`{name}` twice in `{LIST}`: give one of them another `name`"
            )));
        }
    }
    // A setting of methods goes to those that have it; one that nobody has is kept, so that it is refused.
    let mut keys = Vec::new();
    for (_, method, _) in &entries {
        keys.push(method.keys()?);
    }
    let sections: Vec<&str> = METHODS.iter().map(|it| it.name).collect();
    let wanted = |at: usize, key: &str| -> bool {
        let section = key.split('.').next().unwrap_or(key);
        if sections.contains(&section) {
            return section == entries[at].1.name;
        }
        let somebody = keys.iter().any(|it| it.contains_key(key));
        !somebody || keys[at].contains_key(key) || Plan::is_shared(key)
    };
    let mut settings: Vec<Vec<(String, Value)>> = Vec::new();
    for at in 0..entries.len() {
        let own = shared.iter().filter(|(key, _)| wanted(at, key)).cloned();
        settings.push(own.collect());
    }
    for (key, _) in &shared {
        let section = key.split('.').next().unwrap_or(key);
        if sections.contains(&section) && !entries.iter().any(|it| it.1.name == section) {
            return Err(usage(format!(
                "settings of `{section}`, which is not among the methods"
            )));
        }
    }
    let all = entries.drain(..).zip(settings);
    Ok(all
        .map(|((name, method, own), mut settings)| {
            settings.push(("method".to_owned(), method.name.into()));
            settings.extend(own);
            Candidate {
                name,
                settings,
                asked,
            }
        })
        .collect())
}

/// Whether a setting makes two runs two experiments: model, data, seed and budget.
fn is_of_all(key: &str) -> bool {
    let budget = [
        "seed",
        "max_steps",
        "num_train_epochs",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "group_by_length",
        "eval_steps",
        "model",
        "task",
        "problem_type",
        "data",
        "validation",
        "format",
        "max_length",
        "train_on_prompt",
        "device",
        "prompts",
    ];
    budget.contains(&key)
}

/// Name, method and own settings of an entry of the list.
type Entry = (String, &'static Method, Vec<(String, Value)>);

fn entry(value: &Value) -> Result<Entry> {
    let (named, own) = match value {
        Value::String(name) => (name.clone(), Vec::new()),
        Value::Object(map) => {
            let method = map.get("method").or(map.get("name"));
            let method = method.and_then(Value::as_str).ok_or_else(|| {
                usage(format!(
                    "setting `{LIST}`: {value} does not say its `method`"
                ))
            })?;
            if let Some(key) = map.keys().find(|it| is_of_all(it)) {
                return Err(usage(format!(
                    "setting `{LIST}`: `{key}` must be the same for all methods, so it stands outside of the list"
                )));
            }
            if !map.contains_key("method") {
                let named = METHODS.iter().any(|it| it.name == method);
                if !named {
                    return Err(usage(format!(
                        "setting `{LIST}`: {value} does not say its `method`"
                    )));
                }
            }
            let own = map
                .iter()
                .filter(|(key, _)| *key != "method" && *key != "name");
            let own = own.map(|(key, value)| (key.clone(), value.clone()));
            (method.to_owned(), own.collect())
        }
        other => {
            return Err(usage(format!(
                "setting `{LIST}`: {other} is no name of a method and no settings"
            )));
        }
    };
    let method = Method::named(&named)?;
    let name = match value.get("name").and_then(Value::as_str) {
        Some(name) => name.to_owned(),
        None => method.name.to_owned(),
    };
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_".contains(c);
    if name.is_empty() || !name.chars().all(plain) {
        return Err(usage(format!(
            "`name: {name}`: it becomes the name of a folder, so it has letters, digits, `-` and `_`"
        )));
    }
    Ok((name, method, own))
}

/// The settings with paths that are the same from everywhere.
fn whole_paths(settings: Vec<(String, Value)>, recipe: &Recipe) -> Vec<(String, Value)> {
    let resolved = |key: &str| -> Option<Value> {
        match key {
            "model" => Some(recipe.model.as_str().into()),
            "data" => Some(json!(recipe.data)),
            "validation" => match &recipe.validation {
                Validation::Files(files) => Some(json!(files)),
                _ => None,
            },
            _ => None,
        }
    };
    let whole = |(key, value): (String, Value)| {
        let value = resolved(&key).unwrap_or(value);
        (key, value)
    };
    settings.into_iter().map(whole).collect()
}

/// This program as `peft train` with the settings of a candidate.
fn train_command(program: &Path, candidate: &Candidate, run: &Run) -> Command {
    let mut command = Command::new(program);
    let threads = tch::get_num_threads();
    command.args(["--color", "never", "--threads", &threads.to_string()]);
    command.arg("train");
    let resumes = run.info().is_ok() && run.checkpoint().exists();
    if resumes {
        command.arg("--resume").arg(run.dir());
    } else {
        command.arg("--out").arg(run.dir());
        for (key, value) in &candidate.settings {
            command.arg("--set").arg(format!("{key}={value}")); // JSON is YAML
        }
        if run.info().is_ok() {
            command.arg("--overwrite"); // it was stopped before it was saved
        }
    }
    command.stdin(Stdio::null());
    command
}

/// What a dry run gave.
enum Rehearsal {
    /// What it would train and how long that may take.
    Fits(String),
    /// Why it cannot be.
    Refused(String),
}

fn rehearse(program: &Path, candidate: &Candidate, dir: &Path) -> Result<Rehearsal> {
    let run = Run::at(&dir.join(&candidate.name));
    let output = train_command(program, candidate, &run)
        .arg("--dry-run")
        .output()
        .context("starting this program")?;
    let said = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    if output.status.success() {
        let of = |begin: &str| {
            let mut lines = said.lines().map(str::trim);
            let line = lines.find_map(|it| it.strip_prefix(begin));
            line.unwrap_or_default().trim().to_owned()
        };
        let trainable = of("trainable params: ");
        let trainable = trainable.split(" || ").next().unwrap_or_default();
        let takes = of("takes");
        let takes = takes.split(" · ").next().unwrap_or_default();
        return Ok(Rehearsal::Fits(format!("{trainable} parameters · {takes}")));
    }
    let why = reason(&errors);
    match output.status.code() {
        Some(2) => Ok(Rehearsal::Refused(why)),
        _ => bail!("{}: {why}", candidate.name),
    }
}

/// What a child said was wrong, on one line.
fn reason(errors: &str) -> String {
    let lines = errors.lines().skip_while(|it| !it.starts_with("error"));
    let lines: Vec<&str> = lines.map(str::trim).collect();
    let text = lines.join(" ");
    let text = text.strip_prefix("error:").unwrap_or(&text).trim();
    match text.is_empty() {
        true => "it ended without a word".to_owned(),
        false => text.to_owned(),
    }
}

/// Trains a candidate to its end; `false`: it was interrupted.
fn train(program: &Path, candidate: &Candidate, run: &Run, stop: &AtomicBool) -> Result<bool> {
    if run.info().is_ok_and(|it| it.status == Status::Finished) {
        row("", "trained before");
        return Ok(true);
    }
    if stop.load(Ordering::Relaxed) {
        return Ok(false);
    }
    let occupied = run.dir().read_dir().is_ok_and(|mut it| it.next().is_some());
    if occupied && run.info().is_err() {
        bail!(
            "{}: holds files and no run that is known (run.json); remove the folder and go on with `--resume`",
            run.dir().display()
        );
    }
    let mut child = train_command(program, candidate, run)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("starting this program")?;
    let mut errors = child.stderr.take().context("what the run complains of")?;
    let complaints = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = errors.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    });
    let bar = ProgressBar::new_spinner(); // hidden where there is no terminal
    if let Ok(look) = ProgressStyle::with_template("  {spinner} {wide_msg}") {
        bar.set_style(look);
    }
    bar.enable_steady_tick(Duration::from_millis(120));
    let output = child.stdout.take().context("what the run says")?;
    let mut answers = false; // to the questions of `--prompt`
    for line in BufReader::new(output).lines() {
        let line = line.context("what the run says")?;
        answers = line.starts_with("Answers ") || answers && !line.is_empty();
        let evaluated = line.starts_with("step ") && line.contains("held-out");
        if answers || evaluated {
            bar.suspend(|| println!("  {line}"));
        } else if line.starts_with("step ") {
            bar.set_message(line);
        }
    }
    bar.finish_and_clear();
    let status = child.wait().context("waiting for the run")?;
    let complaints = complaints.join().unwrap_or_default();
    if status.code() == Some(INTERRUPTED) {
        return Ok(false);
    }
    if !status.success() {
        bail!(
            "{}: {}; what was trained before is kept, go on with `--resume`",
            candidate.name,
            reason(&complaints)
        );
    }
    Ok(run.info()?.status == Status::Finished)
}

impl Outcome {
    fn of(candidate: &Candidate, run: &Run) -> Result<Outcome> {
        let info = run.info()?;
        let trainable = info.more.get(TRAINABLE).and_then(Value::as_i64);
        let (mut losses, mut seconds) = (Vec::new(), Vec::new());
        let mut figures: std::collections::BTreeMap<String, Vec<(usize, f64)>> = Default::default();
        let mut before = (0, 0);
        let records = read_log(&run.log()).with_context(|| {
            let dir = run.dir().display();
            format!(
                "the log of `{}`; to train it again, remove {dir} and go on with `--resume`",
                candidate.name
            )
        })?;
        for record in records {
            match record {
                Record::Eval(it) => {
                    losses.push((it.step, it.eval_loss));
                    for (name, value) in it.figures {
                        figures.entry(name).or_default().push((it.step, value));
                    }
                }
                Record::Step(it) => {
                    let tokens = it.tokens.saturating_sub(before.1) as f64;
                    let steps = it.step.saturating_sub(before.0).max(1) as f64;
                    seconds.push(tokens / it.tokens_per_second.max(1e-9) / steps);
                    before = (it.step, it.tokens);
                }
            }
        }
        seconds.sort_by(f64::total_cmp);
        Ok(Outcome {
            name: candidate.name.clone(),
            trainable: trainable.context("`run.json` does not say how much was trained")?,
            saved: weights(&run.adapter())?,
            dtype: info.dtype,
            peak_memory: info.summary.and_then(|it| it.peak_memory),
            seconds: seconds.get(seconds.len() / 2).copied(),
            losses,
            figures,
        })
    }

    /// Cells of the table: the figures in this order last.
    fn cells(&self, figures: &[String]) -> Vec<String> {
        let missing = || "–".to_owned();
        let last = |points: &[(usize, f64)]| {
            let last = points.last();
            last.map_or_else(missing, |it| format!("{:.4}", it.1))
        };
        let least = self.losses.iter().filter(|it| it.0 > 0);
        let least = least.min_by(|a, b| a.1.total_cmp(&b.1));
        let mut cells = vec![
            self.name.clone(),
            grouped(self.trainable),
            bytes(self.saved),
            self.dtype.clone(),
            self.peak_memory.map_or_else(missing, bytes),
            self.seconds.map_or_else(missing, |it| format!("{it:.3} s")),
            last(&self.losses),
            least.map_or_else(missing, |it| format!("{:.4} at {}", it.1, it.0)),
        ];
        let of = |name: &String| self.figures.get(name).map_or_else(missing, |it| last(it));
        cells.extend(figures.iter().map(of));
        cells
    }
}

/// Bytes of the weights in a folder.
fn weights(dir: &Path) -> Result<u64> {
    let mut total = 0;
    for entry in fs::read_dir(dir).with_context(|| dir.display().to_string())? {
        let entry = entry?;
        if entry
            .path()
            .extension()
            .is_some_and(|it| it == "safetensors")
        {
            total += entry.metadata()?.len();
        }
    }
    Ok(total)
}

const FILE: &str = "compare.json";

fn read(dir: &Path) -> Result<Comparison> {
    let path = dir.join(FILE);
    if !path.is_file() {
        return Err(usage(format!(
            "`{}` holds no comparison: there is no `{FILE}` in it",
            dir.display()
        )));
    }
    let json = files::read_json(&path)?;
    let read: Comparison =
        serde_json::from_value(json).with_context(|| path.display().to_string())?;
    Ok(Comparison {
        outcomes: Vec::new(),
        ..read
    })
}

impl Comparison {
    fn write(&self, dir: &Path) -> Result<()> {
        Ok(files::write_json(
            &dir.join(FILE),
            &serde_json::to_value(self)?,
        )?)
    }

    /// The names of what the task is judged by.
    fn figures(&self) -> Vec<String> {
        let all = self.outcomes.iter().flat_map(|it| it.figures.keys());
        let mut names: Vec<String> = all.cloned().collect();
        names.sort();
        names.dedup();
        names
    }

    /// Writes and prints the table, and draws the picture.
    fn report(&self, dir: &Path) -> Result<()> {
        let figures = self.figures();
        let mut head: Vec<String> = [
            "method",
            "trained",
            "saved",
            "in",
            "memory",
            "step",
            "loss",
            "best loss",
        ]
        .map(str::to_owned)
        .to_vec();
        head.extend(figures.iter().cloned());
        let mut table = plain_table();
        table.set_header(head.clone());
        let mut page = format!(
            "# {}\n\nOne row a method: parameters trained, weights saved, the number format, memory in use at most, median time of a step, loss on \
             the held-out rows at the end and at its lowest (and after which step).\n\n| {} |\n|{}\n",
            dir.display(),
            head.join(" | "),
            " --- |".repeat(head.len()),
        );
        for outcome in &self.outcomes {
            let cells = outcome.cells(&figures);
            page += &format!("| {} |\n", cells.join(" | "));
            table.add_row(cells);
        }
        for (name, why) in &self.left_out {
            page += &format!("\nLeft out: {name}, {why}.\n");
        }
        page += "\n![held-out loss over the steps](compare.png)\n";
        files::write_text(&dir.join("compare.md"), &page)?;
        let title = format!("{} – held out", dir.display());
        for kind in ["png", "svg"] {
            let path = dir.join(format!("compare.{kind}"));
            draw_several(&path, &self.panels(&figures), &title)?;
        }
        println!("\n{}\n", table.trim_fmt());
        row("table", dir.join("compare.md").display());
        row(
            "picture",
            format!("{} and .svg", dir.join("compare.png").display()),
        );
        row("runs", format!("{}/NAME", dir.display()));
        Ok(())
    }

    /// A panel for the loss and one for each figure.
    fn panels(&self, figures: &[String]) -> Vec<(String, Vec<Curve>)> {
        let curve = |name: &str, points: &[(usize, f64)]| Curve {
            name: name.to_owned(),
            points: points
                .iter()
                .filter(|it| it.1.is_finite())
                .map(|it| (it.0 as f64, it.1))
                .collect(),
        };
        let all = self.outcomes.iter();
        let losses = all.map(|it| curve(&it.name, &it.losses)).collect();
        let mut panels = vec![("loss".to_owned(), losses)];
        for figure in figures {
            let all = self.outcomes.iter();
            let curves = all.filter_map(|it| Some(curve(&it.name, it.figures.get(figure)?)));
            panels.push((figure.clone(), curves.collect()));
        }
        panels
    }
}

/// Set by Ctrl-C, which a terminal also sends to the run that goes on; the second ends the program.
fn watch_ctrl_c() -> Result<&'static AtomicBool> {
    static STOP: AtomicBool = AtomicBool::new(false);
    ctrlc::set_handler(|| {
        if STOP.swap(true, Ordering::Relaxed) {
            std::process::exit(INTERRUPTED);
        }
    })
    .context("listening for Ctrl-C")?;
    Ok(&STOP)
}
