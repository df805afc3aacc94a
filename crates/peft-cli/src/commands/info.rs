//! `peft info`: what a model is, or an adapter, and what a method would train.

mod budget;

use std::path::Path;

use anyhow::{Context, Result, bail};
use peft::{
    core::{Adapter, ModelExt, Tuner, files},
    models::{HeadOptions, MODEL_TYPES, Network, OpenOptions, Source, Task, parameters, tasks},
    train::{Optim, Run},
};
use serde_json::{Value, json};
use tch::Kind;

use self::budget::{Budget, Step};
use crate::{
    args::{DtypeChoice, kind_name},
    commands::{check::plain_table, train::recipe::Plan},
    error::{of_settings, usage},
    methods::{METHODS, Method, QLORA},
    quantization::{Quantization, in_bits},
    sources::{FULL, base_of, task_of},
    terminal::{bytes, grouped},
};

/// Flags of `peft info`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A model (folder, hub id, .gguf file), an adapter folder, or a run
    #[arg(value_name = "MODEL|ADAPTER")]
    what: String,
    /// What this method would train, instead of a table of usual settings
    #[arg(long, value_name = "NAME")]
    method: Option<String>,
    /// A setting of the method; the value is JSON or a word
    #[arg(long = "set", value_name = "KEY=VALUE", requires = "method")]
    set: Vec<String>,
    /// Rows of a training step, to say what it would hold in memory; of the model only config.json is read
    #[arg(long, value_name = "N", requires = "seq", value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    batch: Option<u64>,
    /// Tokens in each of its rows
    #[arg(long, value_name = "N", requires = "batch", value_parser = clap::value_parser!(u64).range(1..=1 << 24))]
    seq: Option<u64>,
    /// Number format of its products
    #[arg(long, value_name = "DTYPE", default_value = "bf16", requires = "batch")]
    dtype: DtypeChoice,
    /// With a base in few bits, what is not quantised is in the format of products, too
    #[arg(long, requires = "batch")]
    no_fp32: bool,
}

/// Describes.
pub(crate) fn run(args: Args) -> Result<()> {
    let dir = Path::new(&args.what);
    let (run, adapted) = (Run::is_run(dir), dir.join("adapter_config.json").is_file());
    if (run || adapted) && (args.method.is_some() || args.batch.is_some()) {
        return Err(usage(format!(
            "`--method` and `--batch` are asked of a model, and `{}` is {}",
            args.what,
            if run { "a run" } else { "an adapter" }
        )));
    }
    if run {
        return run_folder(&Run::open(dir)?);
    }
    if adapted {
        return adapter(dir);
    }
    if dir.is_dir() && !dir.join("config.json").is_file() {
        bail!(
            "`{}` holds no run (run.json), no adapter (adapter_config.json) and no model (config.json)",
            args.what
        );
    }
    let source = Source::find(&args.what)?;
    // A mistake in what was typed is said before anything is loaded.
    let (optim, of_method) = optim(&args)?;
    let tuner = args
        .method
        .as_ref()
        .map(|name| configured(name, &of_method))
        .transpose()?;
    let config = source.config()?;
    let kind = config.get("model_type").and_then(Value::as_str);
    let offered = tasks(kind.unwrap_or_default()).first().copied();
    let task = task_of(&config).or(offered).unwrap_or(Task::CausalLm);
    if let (Some(batch), Some(seq)) = (args.batch, args.seq) {
        return step(&args, &source, task, tuner.flatten(), (batch, seq, optim));
    }
    let mut model = peft::open_task(
        &source,
        task,
        OpenOptions::default(),
        &HeadOptions::default(),
    )
    .with_context(|| format!("model `{}`", args.what))?;
    describe(&source, &mut *model);
    match tuner {
        None => usual(&mut *model),
        Some(Some(tuner)) => one(tuner.peft_type(), &counted(&mut *model, &*tuner)?),
        Some(None) => one("full fine-tuning", &Count::whole(&mut *model)),
    }
}

/// What a step would hold in memory.
fn step(
    args: &Args,
    source: &Source,
    task: Task,
    tuner: Option<Box<dyn Tuner>>,
    (batch, seq, optim): (u64, u64, Optim),
) -> Result<()> {
    let (Some(name), Some(tuner)) = (&args.method, tuner) else {
        return Err(usage(
            "`--batch` and `--seq` go with `--method` and a method that leaves the base as it is",
        ));
    };
    let method = Method::named(name)?;
    let compute = args.dtype.kind().unwrap_or(Kind::BFloat16);
    let stored = Quantization::stored(&source.config()?);
    let quantization = stored.or((method.name == QLORA).then(Quantization::default));
    let rest = match &quantization {
        Some(_) if !args.no_fp32 => Kind::Float,
        _ => compute,
    };
    let step = Step {
        batch,
        seq,
        compute,
        rest,
        quantization,
        checkpoint: method.checkpoints(),
        optim,
    };
    let held = tempfile::tempdir().context("a temporary folder")?;
    let config = match source {
        Source::Folder(dir) => dir.join("config.json"),
        Source::Gguf(_) => {
            let path = held.path().join("config.json");
            files::write_json(&path, &source.config()?)?;
            path
        }
    };
    let budget = Budget::of(&config, task, &*tuner, &step)?;
    line("model", source.path().display());
    line("method", method.title);
    budget.print(&step);
    Ok(())
}

fn line(name: &str, value: impl std::fmt::Display) {
    println!("{name:<14}{value}");
}

fn describe(source: &Source, model: &mut dyn Network) {
    let spec = model.spec();
    let count = parameters(model);
    let bits = in_bits(model);
    let size = |kind: Kind| bytes(count.unsigned_abs() * kind.elt_size_in_bytes() as u64);
    line("model", source.path().display());
    line(
        "type",
        format!("{} (known: {})", spec.model_type, MODEL_TYPES.join(", ")),
    );
    line(
        "parameters",
        format!("{} in {}", grouped(count), kind_name(model.kind())),
    );
    line(
        "weights",
        format!(
            "{} in fp32, {} in bf16",
            size(Kind::Float),
            size(Kind::BFloat16)
        ),
    );
    if let Some(bits) = bits {
        line("as they are", bits);
    }
    line(
        "layers",
        format!("{} of width {}", spec.layers, spec.hidden),
    );
    line(
        "heads",
        format!(
            "{} for keys and values, of width {}",
            spec.kv_heads, spec.head_dim
        ),
    );
    let tied = if spec.tied {
        ", the output head is the input embedding"
    } else {
        ""
    };
    line("vocabulary", format!("{}{tied}", grouped(model.vocab())));
    let context = match model.max_positions() {
        i64::MAX => "any: it only knows how far two tokens are apart".to_owned(),
        most => grouped(most),
    };
    line("context", context);
    let layers = i64::try_from(spec.layers).unwrap_or(i64::MAX);
    let cache = 2
        * layers.saturating_mul(spec.kv_heads * spec.head_dim)
        * model.kind().elt_size_in_bytes() as i64;
    line("cache", format!("{} a token", bytes(cache.unsigned_abs())));
    println!();
}

/// Settings that people use, and what they would train.
fn usual(model: &mut dyn Network) -> Result<()> {
    let mut table = plain_table();
    table.set_header([
        "method",
        "targets",
        "trainable",
        "of all",
        "file",
        "optimiser",
    ]);
    for (targets, shown) in [
        (Value::Null, "usual for this type"),
        (json!("all-linear"), "all linear layers"),
    ] {
        for r in [8, 16, 64] {
            let settings = json!({"peft_type": "LORA", "r": r, "target_modules": targets});
            let tuner = peft::builtin().parse(settings)?;
            let mut row = vec![format!("LoRA, r {r}"), shown.to_owned()];
            row.extend(counted(model, &*tuner)?.cells());
            table.add_row(row);
        }
    }
    for method in METHODS.iter().filter(|it| it.name != "lora") {
        // A method that cannot go on this model has no row.
        let Ok(tuner) = configured(method.name, &[]) else {
            continue;
        };
        let counted = match tuner {
            Some(tuner) => counted(model, &*tuner),
            None => Ok(Count::whole(model)),
        };
        if let Ok(counted) = counted {
            let mut row = vec![method.title.to_owned(), "usual for this type".to_owned()];
            row.extend(counted.cells());
            table.add_row(row);
        }
    }
    println!("{}", table.trim_fmt());
    Ok(())
}

/// Who keeps the moments of a step, and the other settings.
fn optim(args: &Args) -> Result<(Optim, Vec<String>)> {
    let (optim, others): (Vec<_>, Vec<_>) = args
        .set
        .iter()
        .cloned()
        .partition(|it| it.starts_with("optim="));
    let Some(set) = optim.last() else {
        return Ok((Optim::default(), others));
    };
    if args.batch.is_none() || args.seq.is_none() {
        return Err(usage(format!(
            "`--set {set}`: moments are counted for a step; give `--batch` and `--seq`"
        )));
    }
    let name = Value::from(set.trim_start_matches("optim="));
    let optim = serde_json::from_value(name).map_err(|e| usage(format!("`--set {set}`: {e}")))?;
    Ok((optim, others))
}

/// A method by name, with settings; `None`: full fine-tuning.
fn configured(method: &str, sets: &[String]) -> Result<Option<Box<dyn Tuner>>> {
    let method = Method::named(method)?;
    let Some(tag) = method.peft_type else {
        return match sets {
            [] => Ok(None),
            [set, ..] => Err(usage(format!(
                "`--set {set}`: of full fine-tuning the whole is counted here; `peft train --dry-run` counts a part"
            ))),
        };
    };
    let mut settings = method.ours();
    settings.insert("peft_type".to_owned(), tag.into());
    for set in sets {
        let (key, value) = set
            .split_once('=')
            .ok_or_else(|| usage(format!("`--set {set}`: expected KEY=VALUE")))?;
        let value = serde_json::from_str(value).unwrap_or_else(|_| Value::String(value.to_owned()));
        if Plan::is_shared(key) {
            return Err(usage(format!(
                "`--set {set}`: `{key}` is no setting of the method; what is counted here does not depend on it"
            )));
        }
        settings.insert(key.to_owned(), value);
    }
    if method.keys()?.contains_key("total_step") {
        settings.entry("total_step").or_insert_with(|| 1000.into());
    }
    let tuner = peft::builtin()
        .parse(Value::Object(settings))
        .map_err(usage)?;
    Ok(Some(tuner))
}

/// One method with given settings.
fn one(method: &str, count: &Count) -> Result<()> {
    let [trainable, part, file, optimiser] = count.cells();
    line("method", method);
    line("trainable", format!("{trainable} ({part})"));
    line("file", file);
    line("optimiser", optimiser);
    Ok(())
}

/// A value on one line: of a long list its beginning and its length.
fn short(value: &Value) -> String {
    match value.as_array() {
        Some(list) if list.len() > 8 => {
            let first: Vec<String> = list.iter().take(2).map(Value::to_string).collect();
            format!("[{}, … {} in all]", first.join(","), list.len())
        }
        _ => value.to_string(),
    }
}

/// How many numbers a method trains here, of how many.
struct Count {
    trainable: i64,
    all: i64,
}

fn counted(model: &mut dyn Network, tuner: &dyn Tuner) -> Result<Count> {
    let base = parameters(model);
    model.inject("default", tuner).map_err(of_settings)?;
    let trainable = model
        .trainable("default")
        .iter()
        .map(|it| it.tensor.numel() as i64)
        .sum();
    model.delete("default")?;
    Ok(Count {
        trainable,
        all: base + trainable,
    })
}

impl Count {
    /// Of full fine-tuning.
    fn whole(model: &mut dyn Network) -> Count {
        let all = parameters(model);
        Count {
            trainable: all,
            all,
        }
    }

    /// Trainable, their part, the size of the file in fp32, and of gradients and moments while training.
    fn cells(&self) -> [String; 4] {
        let n = self.trainable.unsigned_abs();
        [
            grouped(self.trainable),
            format!("{:.3} %", 100.0 * self.trainable as f64 / self.all as f64),
            bytes(4 * n),
            bytes(12 * n),
        ]
    }
}

fn run_folder(run: &Run) -> Result<()> {
    let info = run.info()?;
    line("run", run.dir().display());
    line("status", format!("{:?}", info.status).to_lowercase());
    line("base", &info.base_model);
    line("dtype", &info.dtype);
    println!();
    if info.method == FULL {
        line("model", run.adapter().display());
        line("trained", "the model itself (full fine-tuning)");
        return Ok(());
    }
    adapter(&run.adapter())
}

fn adapter(dir: &Path) -> Result<()> {
    let adapter = Adapter::load(dir, &peft::builtin())?;
    let json = adapter.tuner.to_json();
    let numbers: i64 = adapter.state.values().map(|it| it.numel() as i64).sum();
    line("adapter", dir.display());
    line("method", adapter.tuner.peft_type());
    line("base", base_of(dir).unwrap_or_else(|_| "not named".into()));
    line(
        "parameters",
        format!("{} in {} tensors", grouped(numbers), adapter.state.len()),
    );
    // Of the settings, those that say something.
    let plain = peft::builtin()
        .parse(json!({"peft_type": adapter.tuner.peft_type()}))
        .map(|it| it.to_json());
    let plain = plain.unwrap_or_default();
    let hidden = [
        "peft_type",
        "base_model_name_or_path",
        "inference_mode",
        "peft_version",
    ];
    for (key, value) in json.as_object().into_iter().flatten() {
        let usual = plain.get(key).is_none_or(|it| it == value);
        if !hidden.contains(&key.as_str()) && (!usual || key == "r" || key == "lora_alpha") {
            println!("  {key}: {}", short(value));
        }
    }
    Ok(())
}
