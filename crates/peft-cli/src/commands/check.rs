//! `peft check`: an adapter doctor.
//!
//! Loading says the first thing that is wrong. This looks at everything: whether the files are whole, whether every
//! setting is understood, whether the adapter fits its base to the last key and shape, whether it does anything
//! at all, whether the tokenizer beside it is the base's, and whether runtimes that serve plain LoRA and
//! nothing else will take it. Exit code 1 where something fails; a warning is none.

use std::{
    collections::BTreeMap,
    fmt::Display,
    io::{IsTerminal, stdout},
    path::{Path, PathBuf},
};

use anyhow::{Result, bail};
use comfy_table::{Cell, Color, ContentArrangement, Table, presets};
use peft::{
    core::{Adapter, ModelExt, State, files, tensors},
    data::Tokenizer,
    models::{Network, Source, Task},
    train::Run,
};
use serde_json::Value;
use tch::{Kind, Tensor};

use crate::{
    args::kind_name,
    sources::{BaseArgs, TASK, adapter_folder, base_of},
    terminal::{bytes, grouped},
};

/// Flags of `peft check`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// An adapter folder, or a run
    #[arg(value_name = "ADAPTER")]
    adapter: PathBuf,
    /// The base, if it is not the one that the adapter names
    #[arg(long, value_name = "MODEL")]
    model: Option<String>,
}

/// Examines and reports.
pub(crate) fn run(args: Args) -> Result<()> {
    let dir = adapter_folder(&args.adapter)?;
    let mut report = Report::default();
    examine(&mut report, &args, &dir);
    println!("{}\n{}", dir.display(), report.table().trim_fmt());
    let (warnings, failures) = (report.count(Level::Warn), report.count(Level::Fail));
    println!(
        "{} ok, {warnings} warnings, {failures} failed",
        report.count(Level::Ok)
    );
    if failures > 0 {
        bail!("{}: this adapter cannot be used as it is", dir.display());
    }
    Ok(())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Level {
    Ok,
    Warn,
    Fail,
}

/// What was found, in the order in which it was looked for.
#[derive(Debug, Default)]
struct Report(Vec<(Level, &'static str, String)>);

impl Report {
    fn add(&mut self, level: Level, what: &'static str, text: impl Display) {
        self.0.push((level, what, text.to_string()));
    }

    fn count(&self, level: Level) -> usize {
        self.0.iter().filter(|it| it.0 == level).count()
    }

    fn table(&self) -> Table {
        let mut table = plain_table();
        for (level, what, text) in &self.0 {
            let (word, color) = match level {
                Level::Ok => ("ok", Color::Green),
                Level::Warn => ("warn", Color::Yellow),
                Level::Fail => ("FAIL", Color::Red),
            };
            let level = Cell::new(word);
            let level = if console::colors_enabled() {
                level.fg(color)
            } else {
                level
            };
            table.add_row(vec![level, Cell::new(what), Cell::new(text)]);
        }
        table
    }
}

/// A table without frames, as wide as the terminal.
pub(crate) fn plain_table() -> Table {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Dynamic);
    if console::colors_enabled() {
        table.enforce_styling();
    }
    if !stdout().is_terminal() {
        table.set_width(120);
    }
    table
}

fn examine(report: &mut Report, args: &Args, dir: &Path) {
    let json = match files::read_json(&dir.join("adapter_config.json")) {
        Ok(json) => json,
        Err(error) => return report.add(Level::Fail, "configuration", error),
    };
    let loaded = Adapter::load(dir, &peft::builtin());
    match &loaded {
        Ok(adapter) => report.add(
            Level::Ok,
            "configuration",
            describe(adapter.tuner.peft_type(), &json),
        ),
        Err(error) => report.add(Level::Fail, "configuration", error),
    }
    // What the tensors are can be said even where the configuration is not understood.
    match tensors::read(&dir.join("adapter_model.safetensors")) {
        Ok(state) => weights(report, &state),
        Err(error) if loaded.is_ok() => report.add(Level::Fail, "tensors", error),
        Err(_) => {}
    }
    let base = args.model.clone().map_or_else(|| base_of(dir), Ok);
    let task = json.get("task_type").and_then(Value::as_str);
    let task = task
        .and_then(|it| it.parse().ok())
        .or(run_task(&args.adapter));
    let model = match base.and_then(|name| open(&name, task, &args.adapter, dir)) {
        Ok(model) => Some(model),
        Err(error) => {
            let text = format!("cannot be looked at, so fit and targets are unchecked: {error:#}");
            report.add(
                if args.model.is_some() {
                    Level::Fail
                } else {
                    Level::Warn
                },
                "base",
                text,
            );
            None
        }
    };
    let mut ends = false;
    if let Some((source, mut model)) = model {
        report.add(
            Level::Ok,
            "base",
            format!("{} ({})", source.path().display(), model.spec().model_type),
        );
        if let Ok(adapter) = &loaded {
            ends = fit(report, adapter, &mut *model);
        }
        voice(report, &[dir, &args.adapter], &source, &*model);
    }
    servable(report, &json, ends);
}

/// The task of a run.
fn run_task(path: &Path) -> Option<Task> {
    let info = Run::open(path).ok()?.info().ok()?;
    info.more.get(TASK)?.as_str()?.parse().ok()
}

/// The base with the head of its adapter's task.
fn open(
    name: &str,
    task: Option<Task>,
    given: &Path,
    dir: &Path,
) -> Result<(Source, Box<dyn Network>)> {
    let sources = BaseArgs {
        model: Some(name.to_owned()),
        adapter: Vec::new(),
    }
    .find()?
    .for_adapter(given, dir);
    let task = task.map_or_else(|| sources.task(None), Ok)?;
    let model = sources.load_stored(task, None)?;
    Ok((sources.base, model))
}

/// The settings that one asks for first.
fn describe(peft_type: &str, json: &Value) -> String {
    let shown = ["r", "lora_alpha", "lora_dropout", "bias", "task_type"];
    let value = |key: &&str| {
        json.get(*key)
            .filter(|it| !it.is_null())
            .map(|it| format!("{key} {it}"))
    };
    let all: Vec<String> = shown.iter().filter_map(value).collect();
    format!("{peft_type}: {}", all.join(", ").replace('"', ""))
}

/// Whether the numbers are numbers, and do anything.
fn weights(report: &mut Report, state: &State) {
    let numbers: i64 = state.values().map(|it| it.numel() as i64).sum();
    let size: usize = state
        .values()
        .map(|it| it.numel() * it.kind().elt_size_in_bytes())
        .sum();
    let mut kinds: BTreeMap<String, usize> = BTreeMap::new();
    for tensor in state.values() {
        *kinds
            .entry(kind_name(tensor.kind()).to_owned())
            .or_default() += 1;
    }
    let kinds: Vec<String> = kinds
        .iter()
        .map(|(kind, n)| format!("{n} × {kind}"))
        .collect();
    let text = format!(
        "{}, {} numbers, {}",
        kinds.join(", "),
        grouped(numbers),
        bytes(size as u64)
    );
    let odd = state.iter().find(|(_, it)| !is_float(it));
    match odd {
        _ if state.is_empty() => report.add(Level::Fail, "tensors", "the file holds none"),
        Some((key, it)) => report.add(
            Level::Fail,
            "tensors",
            format!("`{key}` is of type {:?}", it.kind()),
        ),
        None => report.add(Level::Ok, "tensors", text),
    }
    let float = || state.iter().filter(|(_, it)| is_float(it));
    let broken: Vec<&String> = float()
        .filter(|(_, it)| !finite(it))
        .map(|(key, _)| key)
        .collect();
    match broken.first() {
        Some(first) => {
            let text = format!(
                "{} tensors hold NaN or infinite numbers, first `{first}`",
                broken.len()
            );
            report.add(Level::Fail, "finite", text);
        }
        None => report.add(Level::Ok, "finite", "every number"),
    }
    let zero = float()
        .filter(|(_, it)| it.numel() > 0 && it.abs().max().double_value(&[]) == 0.0)
        .count();
    if zero > 0 {
        let text = format!(
            "{zero} of {} tensors are all zero: was it trained?",
            state.len()
        );
        report.add(Level::Warn, "trained", text);
    }
}

fn is_float(tensor: &Tensor) -> bool {
    matches!(
        tensor.kind(),
        Kind::Float | Kind::BFloat16 | Kind::Half | Kind::Double
    )
}

pub(crate) fn finite(tensor: &Tensor) -> bool {
    tensor.isfinite().all().int64_value(&[]) != 0
}

/// Whether every key and shape is what the base wants, and where the adapter acts. Says whether it does so
/// on the input or output embedding.
fn fit(report: &mut Report, adapter: &Adapter, model: &mut dyn Network) -> bool {
    if let Err(error) = adapter.apply("default", model) {
        report.add(Level::Fail, "fit", error);
        return false;
    }
    report.add(
        Level::Ok,
        "fit",
        "every key and shape is what the base wants",
    );
    let mut at: Vec<String> = model
        .params("default")
        .into_iter()
        .map(|it| it.at)
        .collect();
    at.dedup();
    let mut places: BTreeMap<&str, usize> = BTreeMap::new();
    for place in &at {
        *places
            .entry(place.rsplit('.').next().unwrap_or(place))
            .or_default() += 1;
    }
    let places: Vec<String> = places
        .iter()
        .map(|(name, n)| match name.is_empty() {
            true => "the input".to_owned(),
            false => format!("{n} × {name}"),
        })
        .collect();
    report.add(Level::Ok, "targets", places.join(", "));
    let spec = model.spec();
    let ends = [Some(spec.input_embedding), spec.output_embedding];
    ends.iter().flatten().any(|end| at.contains(end))
}

/// Whether the tokenizer beside the adapter is the base's.
fn voice(report: &mut Report, dirs: &[&Path], source: &Source, model: &dyn Network) {
    let open = |dir: &Path| {
        dir.join("tokenizer.json")
            .is_file()
            .then(|| Tokenizer::open(dir))
    };
    let own = dirs.iter().find_map(|dir| open(dir));
    let base = match source {
        Source::Folder(dir) => open(dir),
        Source::Gguf(_) => None,
    };
    let (own, base) = match (own.transpose(), base.transpose()) {
        (Ok(own), Ok(base)) => (own, base),
        (Err(error), _) | (_, Err(error)) => return report.add(Level::Fail, "tokenizer", error),
    };
    let Some(used) = own.as_ref().or(base.as_ref()) else {
        return report.add(
            Level::Warn,
            "tokenizer",
            "none beside the adapter or the base",
        );
    };
    let (ids, rows) = (used.vocab_size(), model.vocab());
    if ids as i64 > rows {
        let text = format!("has {ids} tokens, the base has an embedding for {rows}");
        return report.add(Level::Fail, "tokenizer", text);
    }
    match (&own, &base) {
        (Some(own), Some(base)) if own.chat_template() != base.chat_template() => {
            let text = "the chat template is not the base's: serve it with the adapter's own";
            report.add(Level::Warn, "template", text);
        }
        (Some(own), Some(base)) if own.fingerprint() != base.fingerprint() => {
            report.add(
                Level::Warn,
                "tokenizer",
                "is not the base's: serve it with the adapter's own",
            );
        }
        (Some(_), Some(_)) => report.add(
            Level::Ok,
            "tokenizer",
            "that of the base, template included",
        ),
        _ => {
            let template = if used.chat_template().is_some() {
                "with"
            } else {
                "without"
            };
            report.add(
                Level::Ok,
                "tokenizer",
                format!("{ids} tokens, {template} a chat template"),
            );
        }
    }
}

/// Whether a runtime that knows `W + s·BA` on linear layers and nothing else can serve it (vLLM, mistral.rs, llama.cpp).
fn servable(report: &mut Report, json: &Value, ends: bool) {
    let mut reasons = not_plain(json);
    if ends && reasons.is_empty() {
        reasons.push(ENDS.to_owned());
    }
    match reasons.is_empty() {
        true => report.add(Level::Ok, "serving", "plain LoRA: any runtime takes it"),
        false => {
            let kind = json.get("peft_type").and_then(Value::as_str);
            let virtual_tokens = ["PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"];
            let help = match kind.is_some_and(|it| virtual_tokens.contains(&it)) {
                true => "it has no form as a weight, so there is no merged model",
                false => "`peft merge` makes a model for the others",
            };
            let text = format!("only runtimes that know {}; {help}", reasons.join(", "));
            report.add(Level::Warn, "serving", text);
        }
    }
}

/// What an adapter may have that many runtimes refuse.
const ENDS: &str = "adapted embeddings or heads";

/// What is in an adapter besides plain LoRA on linear layers.
fn not_plain(json: &Value) -> Vec<String> {
    let on = |key: &str| match json.get(key) {
        None | Some(Value::Null | Value::Bool(false)) => false,
        Some(Value::Array(list)) => !list.is_empty(),
        Some(Value::Object(map)) => !map.is_empty(),
        Some(_) => true,
    };
    if json.get("peft_type").and_then(Value::as_str) != Some("LORA") {
        let kind = json.get("peft_type").and_then(Value::as_str);
        return vec![kind.unwrap_or("its method").to_owned()];
    }
    let mut reasons: Vec<String> = Vec::new();
    let named = [
        ("use_dora", "DoRA"),
        ("lora_bias", "biases in LoRA"),
        ("modules_to_save", "whole saved modules"),
        ("trainable_token_indices", "trained tokens"),
        ("layer_replication", "replicated layers"),
        ("target_parameters", "adapted parameters"),
        ("alora_invocation_tokens", "activated LoRA"),
    ];
    reasons.extend(
        named
            .iter()
            .filter(|(key, _)| on(key))
            .map(|(_, name)| (*name).to_owned()),
    );
    if json
        .get("bias")
        .and_then(Value::as_str)
        .is_some_and(|it| it != "none")
    {
        reasons.push("trained biases".into());
    }
    if let Some(init) = json.get("init_lora_weights").and_then(Value::as_str)
        && !matches!(init, "gaussian" | "orthogonal" | "eva")
    {
        reasons.push(format!(
            "the initialisation `{init}` (save it converted to plain LoRA)"
        ));
    }
    let targets = json.get("target_modules").and_then(Value::as_array);
    let ends = ["embed_tokens", "lm_head", "wte", "wpe"];
    let is_end = |it: &Value| {
        it.as_str()
            .and_then(|it| it.rsplit('.').next())
            .is_some_and(|it| ends.contains(&it))
    };
    if targets.is_some_and(|all| all.iter().any(is_end)) {
        reasons.push(ENDS.to_owned());
    }
    reasons
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_is_not_plain_lora_is_named() {
        let plain = json!({"peft_type": "LORA", "bias": "none", "use_dora": false, "target_modules": ["q_proj"],
            "init_lora_weights": true, "modules_to_save": null, "loftq_config": {}});
        assert!(not_plain(&plain).is_empty());
        for (key, value, word) in [
            ("use_dora", json!(true), "DoRA"),
            ("bias", json!("all"), "biases"),
            ("modules_to_save", json!(["lm_head"]), "modules"),
            ("init_lora_weights", json!("pissa_niter_4"), "pissa_niter_4"),
            (
                "target_modules",
                json!(["model.embed_tokens"]),
                "embeddings",
            ),
            ("peft_type", json!("IA3"), "IA3"),
        ] {
            let mut other = plain.clone();
            other[key] = value;
            assert!(not_plain(&other).join(" ").contains(word), "{key}");
        }
    }
}
