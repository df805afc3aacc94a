//! `cargo xtask real`: every method on real models and real text, beside Python's `peft`.
//!
//! Both sides train on the same batches in the same order, at the same learning rates, for as many steps, and are
//! measured on the same held-out rows, once for each of three seeds; the seed decides the order and what a method
//! begins with. Python runs the first seed a second time from our first values, and then the two must not differ by
//! more than rounding. Raw results go to `benches/results/real-*.jsonl`, and `benches/REAL.md` is made of those files
//! alone.

use crate::{files, libtorch, model, paths, python, run, ui};
use anyhow::{Context, Result};
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Flags of `cargo xtask real`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only make the table anew from the raw results
    #[arg(long)]
    table: bool,
    /// Only this task
    #[arg(long, value_name = "NAME")]
    task: Option<String>,
    /// Threads of each side; where other programs keep the cores busy, 1 is faster
    #[arg(long, value_name = "N", default_value_t = 2)]
    threads: u16,
    /// Only these methods, separated by commas; they are written nowhere
    #[arg(long, value_name = "NAMES")]
    methods: Option<String>,
}

/// `cargo xtask real`.
pub(crate) fn real(args: &Args) -> Result<()> {
    let settings: Settings =
        serde_json::from_str(&fs::read_to_string(paths::root().join(SETTINGS))?)
            .with_context(|| format!("in `{SETTINGS}`"))?;
    if !args.table {
        measure(args, &settings)?;
    }
    if args.methods.is_none() {
        fs::write(paths::root().join(TABLE), table(&settings)?)
            .with_context(|| format!("at `{TABLE}`"))?;
        ui::say(format!("the table is in {TABLE}"));
    }
    Ok(())
}

const SETTINGS: &str = "benches/real.json";
const TABLE: &str = "benches/REAL.md";

/// What `real.json` says, as far as this program reads it.
#[derive(Deserialize)]
struct Settings {
    seeds: Vec<u64>,
    models: BTreeMap<String, String>,
    tasks: serde_json::Map<String, Value>,
    methods: serde_json::Map<String, Value>,
}

fn measure(args: &Args, settings: &Settings) -> Result<()> {
    libtorch::ensure()?;
    let python = python::ensure()?;
    run::build_peft()?;
    run::run(&mut run::build("real"))?;
    let folder = paths::target().join("real");
    fs::create_dir_all(&folder).context("at `target/real`")?;
    let models = BTreeMap::from([
        (
            "minilm",
            without_dropout(&model::ensure_encoder()?, &folder)?,
        ),
        ("smollm2", model::ensure()?),
        ("in-bits", model::ensure()?),
    ]);
    for (name, task) in &settings.tasks {
        if args.task.as_ref().is_some_and(|it| it != name) {
            continue;
        }
        ui::say(format!("{name}: {}", text(task, "title")));
        let model = &models[text(task, "model")];
        let mut lines = String::new();
        for seed in &settings.seeds {
            let job = Job {
                name,
                model,
                seed: *seed,
                folder: &folder,
                methods: args.methods.as_deref(),
                threads: args.threads,
            };
            lines += &job.all(&python, seed == &settings.seeds[0])?;
            if args.methods.is_none() {
                fs::write(raw(name), &lines)
                    .with_context(|| format!("at `{}`", paths::short(&raw(name))))?;
            }
        }
        if args.methods.is_some() {
            print!("{lines}");
        }
    }
    Ok(())
}

fn raw(task: &str) -> PathBuf {
    paths::root().join(format!("benches/results/real-{task}.jsonl"))
}

/// One task in the order of one seed.
struct Job<'a> {
    name: &'a str,
    model: &'a Path,
    seed: u64,
    folder: &'a Path,
    methods: Option<&'a str>,
    threads: u16,
}

impl Job<'_> {
    /// All runs of this order, a line of JSON each.
    fn all(&self, python: &Path, first: bool) -> Result<String> {
        let plan = self
            .folder
            .join(format!("{}-{}.safetensors", self.name, self.seed));
        let starts = self.folder.join(format!("{}-starts", self.name));
        fs::create_dir_all(&starts)?;
        let ours = paths::cargo_target().join("debug/real");
        run::run(
            self.flags(Command::new(&ours).arg("plan"))
                .arg("--out")
                .arg(&plan),
        )?;
        let mut lines = String::new();
        let mut run = |command: &mut Command| -> Result<()> {
            let command = self.flags(command).arg("--plan").arg(&plan);
            command.args(self.methods.iter().flat_map(|it| ["--methods", it]));
            lines += &run::output(command)?;
            Ok(())
        };
        run(Command::new(&ours)
            .arg("train")
            .arg("--starts")
            .arg(&starts))?;
        run(Command::new(python).arg("benches/real.py"))?;
        if first {
            run(Command::new(python)
                .arg("benches/real.py")
                .arg("--starts")
                .arg(&starts))?;
        }
        Ok(lines)
    }

    fn flags<'c>(&self, command: &'c mut Command) -> &'c mut Command {
        command
            .args(["--task", self.name])
            .arg("--model")
            .arg(self.model);
        command
            .args(["--seed", &self.seed.to_string()])
            .args(["--threads", &self.threads.to_string()])
            .current_dir(paths::root())
    }
}

/// A copy of the encoder without dropout, whose random numbers no two programs share.
fn without_dropout(model: &Path, folder: &Path) -> Result<PathBuf> {
    let copy = folder.join("minilm");
    files::copy_tree(model, &copy)?;
    let path = copy.join("config.json");
    let mut config: Value = serde_json::from_str(&fs::read_to_string(&path)?)?;
    for key in ["hidden_dropout_prob", "attention_probs_dropout_prob"] {
        config[key] = json!(0.0);
    }
    fs::write(&path, config.to_string())?;
    Ok(copy)
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

/// The table, from the raw results that are there.
fn table(settings: &Settings) -> Result<String> {
    let mut page = String::from(HEAD);
    for (name, task) in &settings.tasks {
        let Some(runs) = read(&raw(name))? else {
            continue;
        };
        page += &section(settings, task, &runs);
        page += &beside(settings, task, &runs);
        if let Some(more) = read(&raw(&format!("{name}-more")))? {
            page += &more_seeds(settings, &runs, &more);
        }
    }
    Ok(page)
}

/// The runs of a file of raw results, if it is there.
fn read(path: &Path) -> Result<Option<Vec<Value>>> {
    let Ok(raw) = fs::read_to_string(path) else {
        return Ok(None);
    };
    let runs = raw.lines().map(serde_json::from_str);
    let runs: Result<Vec<Value>, _> = runs.collect();
    Ok(Some(
        runs.with_context(|| format!("at `{}`", paths::short(path)))?,
    ))
}

/// How two methods of a task, `beside`, compare on each side: the quotient of their mean losses.
fn beside(settings: &Settings, task: &Value, runs: &[Value]) -> String {
    let names: Vec<&str> = task["beside"].as_array().map_or(Vec::new(), |all| {
        all.iter().filter_map(Value::as_str).collect()
    });
    let [one, other] = names[..] else {
        return String::new();
    };
    let quotient = |who: &str| {
        let loss = |method| Some(mean(&Side::of(runs, method, who)?.losses));
        Some(loss(one)? / loss(other)?)
    };
    let (Some(python), Some(ours)) = (quotient("python"), quotient("ours")) else {
        return String::new();
    };
    let title = |method: &str| text(&settings.methods[method], "title").to_owned();
    format!(
        "\nThe loss of {} over that of {}: Python {python:.3}, ours {ours:.3}.\n",
        title(one),
        title(other)
    )
}

/// Where three seeds were too few to tell two sides apart: all seeds that were run.
fn more_seeds(settings: &Settings, runs: &[Value], more: &[Value]) -> String {
    let all: Vec<Value> = runs.iter().chain(more).cloned().collect();
    let mut out = String::new();
    for (method, titles) in &settings.methods {
        let sides = ["python", "ours"].map(|who| Side::of(&all, method, who));
        let [Some(python), Some(ours)] = sides else {
            continue;
        };
        if more.iter().any(|it| text(it, "method") == method) {
            let _ = writeln!(
                out,
                "\n{} with {} seeds: Python {}, standard deviation {:.3}; ours {}, {:.3}.",
                text(titles, "title"),
                python.losses.len(),
                python.spread(),
                deviation(&python.losses),
                ours.spread(),
                deviation(&ours.losses),
            );
        }
    }
    out
}

const HEAD: &str = "<!-- made by `cargo xtask real` from benches/results/real-*.jsonl -->

# Every method on real models, beside Python's `peft`

`cargo xtask real` trains each method three times (seeds 0, 1, 2) with this library and three times with Python's `peft` on
the same batches in the same order, with the same optimiser (AdamW, gradients clipped to norm 1), the same learning
rates (half a cosine after a short rise) and as many steps, and measures the loss on the same held-out rows.
Settings are in [real.json](real.json), every single run with its losses is in [results](results).

- **Python**, **ours**: held-out loss after training, the mean over the seeds and in brackets the lowest and the highest.
  Each side draws its own first values.
- **apart**: how far the two means are apart, in standard deviations of Python's seeds.
- **same start**: how far the two losses of seed 0 are apart where Python begins with our first values. What is left is
  rounding, carried through all steps.
  Prompt and P-tuning amplify it: their losses agree to 1e-6 for the first steps and drift apart from there. In bf16 each product
  is rounded to three digits, in an order of its own.
- Python's part of BitFit is written out in [real.py](real.py), since `peft` has no such method.
";

/// What the runs of one method by one side gave.
struct Side {
    losses: Vec<f64>,
    right: f64,
}

impl Side {
    fn of(runs: &[Value], method: &str, who: &str) -> Option<Side> {
        let of = |it: &&Value| text(it, "method") == method && text(it, "who") == who;
        let runs: Vec<&Value> = runs.iter().filter(of).collect();
        let all = |get: &dyn Fn(&Value) -> Option<f64>| -> Vec<f64> {
            runs.iter().filter_map(|it| get(it)).collect()
        };
        let losses = all(&|it| it["after"]["loss"].as_f64());
        (!losses.is_empty()).then(|| Side {
            right: mean(&all(&|it| it["after"]["accuracy"].as_f64())),
            losses,
        })
    }

    /// The mean, and the lowest and the highest.
    fn spread(&self) -> String {
        let low = self.losses.iter().copied().fold(f64::INFINITY, f64::min);
        let high = self
            .losses
            .iter()
            .copied()
            .fold(f64::NEG_INFINITY, f64::max);
        format!("{:.3} ({low:.3} to {high:.3})", mean(&self.losses))
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

fn deviation(values: &[f64]) -> f64 {
    let middle = mean(values);
    let squares: f64 = values.iter().map(|it| (it - middle).powi(2)).sum();
    (squares / (values.len() as f64 - 1.0)).sqrt()
}

fn section(settings: &Settings, task: &Value, runs: &[Value]) -> String {
    let model = text(task, "model");
    let classes = task["classes"] == json!(true);
    let mut out = format!(
        "\n## {}: {}\n\n`{}`, {} steps of {} rows, {} rows held out.{}\n\n",
        text(task, "title"),
        settings.models.get(model).map_or(model, String::as_str),
        text(task, "data"),
        task["steps"],
        task["batch"],
        task["held_out"],
        before(runs, classes),
    );
    let accuracy = if classes {
        " right: Python | ours |"
    } else {
        ""
    };
    let _ = writeln!(
        out,
        "| method | trained | learning rate | Python | ours | apart | same start |{accuracy}"
    );
    let _ = writeln!(
        out,
        "{}",
        if classes {
            "| --- | ---: | ---: | --- | --- | ---: | ---: | ---: | ---: |"
        } else {
            "| --- | ---: | ---: | --- | --- | ---: | ---: |"
        }
    );
    for (method, titles) in &settings.methods {
        let sides =
            ["python", "ours", "python from our start"].map(|who| Side::of(runs, method, who));
        let [Some(python), Some(ours), same] = sides else {
            continue;
        };
        let any = runs.iter().find(|it| text(it, "method") == method);
        let any = any.unwrap_or(&Value::Null);
        let apart = (mean(&ours.losses) - mean(&python.losses)).abs() / deviation(&python.losses);
        let same = same.map_or_else(String::new, |it| {
            format!("{:.1e}", (it.losses[0] - ours.losses[0]).abs())
        });
        let right = match classes {
            true => format!(
                " {:.0} % | {:.0} % |",
                100.0 * python.right,
                100.0 * ours.right
            ),
            false => String::new(),
        };
        let _ = writeln!(
            out,
            "| {} | {} | {} | {} | {} | {apart:.1} | {same} |{right}",
            text(titles, "title"),
            any["parameters"],
            any["learning_rate"],
            python.spread(),
            ours.spread(),
        );
    }
    out
}

/// The loss before training, which is much the same for all methods that begin at the base.
fn before(runs: &[Value], classes: bool) -> String {
    let lora = runs.iter().find(|it| text(it, "method") == "lora");
    let Some(loss) = lora.and_then(|it| it["before"]["loss"].as_f64()) else {
        return String::new();
    };
    match lora
        .and_then(|it| it["before"]["accuracy"].as_f64())
        .filter(|_| classes)
    {
        Some(right) => format!(
            " Before training: loss {loss:.3}, {:.0} % right.",
            100.0 * right
        ),
        None => format!(" Before training: loss {loss:.3}."),
    }
}
