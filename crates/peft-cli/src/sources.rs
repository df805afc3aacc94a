//! What a command works on: a run folder, an adapter folder, or a model with adapters named by flags.
//!
//! ```text
//! peft chat RUN                      the base, adapter and tokenizer of a run
//! peft chat ADAPTER                  an adapter folder; it names its base
//! peft chat MODEL                    a model folder, a hub id, a .gguf file
//! peft chat --model MODEL --adapter DIR --adapter NAME=DIR
//! ```
//!
//! The tag decides, never the look of the path: `run.json` makes a run, `adapter_config.json` an adapter.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use peft::{
    core::{Adapter, Model, ModelExt, Param, files, nearest, tensors::Mapped},
    data::Tokenizer,
    models::{
        Decoder, HeadOptions, Network, OpenOptions, Problem, Source, Task, open_source_in,
        open_task_in, tasks,
    },
    quant::Format,
    train::Run,
};
use tch::{Device, Kind};
use tempfile::TempDir;

use crate::{
    args::Placement,
    commands::train::BASE,
    error::usage,
    quantization::{Quantization, say_what_decodes},
};

/// On-disk name of an adapter's configuration.
const ADAPTER_CONFIG: &str = "adapter_config.json";

/// Which model, with which adapters.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct SourceArgs {
    /// A run folder, an adapter folder, or a model
    #[arg(value_name = "RUN")]
    pub(crate) run: Option<String>,
    #[command(flatten)]
    base: BaseArgs,
    /// The adapter with the lowest held-out loss instead of the last one
    #[arg(long, conflicts_with = "adapter", help_heading = "Model")]
    best: bool,
    /// The base alone, without the adapter
    #[arg(long, conflicts_with_all = ["adapter", "best"], help_heading = "Model")]
    no_adapter: bool,
}

/// A model and adapters, by flags alone.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct BaseArgs {
    /// The base: a model folder, a hub id or a .gguf file
    #[arg(long, value_name = "MODEL", help_heading = "Model")]
    pub(crate) model: Option<String>,
    /// An adapter folder, with a name if wanted; several work together
    #[arg(long, value_name = "[NAME=]DIR", help_heading = "Model")]
    pub(crate) adapter: Vec<NamedFolder>,
}

/// `DIR` or `NAME=DIR`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NamedFolder {
    /// The name, if one was given.
    pub(crate) name: Option<String>,
    /// The folder.
    pub(crate) dir: PathBuf,
}

impl std::str::FromStr for NamedFolder {
    type Err = String;

    fn from_str(text: &str) -> Result<NamedFolder, String> {
        let whole = |dir: &str| NamedFolder {
            name: None,
            dir: dir.into(),
        };
        match text.split_once('=') {
            // A folder may have an equals sign in its name.
            Some((name, dir)) if !Path::new(text).exists() => {
                if name.is_empty() || dir.is_empty() || name.contains(['.', '/']) {
                    return Err("expected DIR or NAME=DIR, the name without dots".into());
                }
                Ok(NamedFolder {
                    name: Some(name.into()),
                    dir: dir.into(),
                })
            }
            _ if text.is_empty() => Err("a folder is wanted".into()),
            _ => Ok(whole(text)),
        }
    }
}

/// What was meant, found and named.
#[derive(Debug)]
pub(crate) struct Sources {
    /// The base, as it was named.
    pub(crate) model: String,
    /// Where the base lies.
    pub(crate) base: Source,
    /// Adapters in the order they are stacked.
    pub(crate) adapters: Vec<(String, PathBuf)>,
    /// A folder with a tokenizer that goes before the base's own: that of a run or adapter.
    pub(crate) tokenizer: Option<PathBuf>,
    /// The task of the run that was named.
    pub(crate) task: Option<Task>,
    /// What a head should be like, where a run says so.
    pub(crate) head: HeadOptions,
    /// How the base's layers are kept.
    pub(crate) format: Format,
}

/// The adapter of a run, or the folder itself, which must hold one.
pub(crate) fn adapter_folder(path: &Path) -> Result<PathBuf> {
    let mut dir = path.to_owned();
    if Run::is_run(path) {
        let run = Run::open(path)?;
        dir = run.adapter();
        if run.info()?.method == FULL {
            return Err(usage(format!(
                "the run `{}` trained the model itself, so there is no adapter; the model is {}",
                path.display(),
                dir.display()
            )));
        }
    }
    if !dir.is_dir() {
        anyhow::bail!("{}: no such folder", dir.display());
    }
    if !dir.join(ADAPTER_CONFIG).exists() {
        anyhow::bail!(
            "{}: no `{ADAPTER_CONFIG}` in this folder, so it holds no adapter",
            dir.display()
        );
    }
    Ok(dir)
}

impl SourceArgs {
    /// Finds everything; nothing is loaded yet.
    pub(crate) fn find(&self) -> Result<Sources> {
        let Some(run) = &self.run else {
            if self.best {
                return Err(usage(
                    "`--best` chooses among the adapters of a run; name the run",
                ));
            }
            return self.base.find();
        };
        let dir = Path::new(run);
        if Run::is_run(dir) {
            return self.of_run(&Run::open(dir)?);
        }
        if self.best {
            return Err(usage(format!(
                "`--best` chooses among the adapters of a run, and `{run}` holds none"
            )));
        }
        if dir.join(ADAPTER_CONFIG).is_file() {
            return self.of_adapter(dir);
        }
        if dir.is_dir() && !dir.join("config.json").is_file() {
            anyhow::bail!(
                "`{run}` holds no run (run.json), no adapter ({ADAPTER_CONFIG}) and no model (config.json)"
            );
        }
        if let Some(model) = &self.base.model {
            return Err(usage(format!(
                "`{run}` and `--model {model}` both name a base; give one"
            )));
        }
        let base = BaseArgs {
            model: Some(run.clone()),
            adapter: self.base.adapter.clone(),
        };
        base.find()
    }

    fn of_run(&self, run: &Run) -> Result<Sources> {
        let info = run.info()?;
        let whole = info.method == FULL;
        let own = match (whole, self.best) {
            (true, true) => Some(run.best()),
            (true, false) => Some(run.adapter()),
            // Wherever the run is now.
            (false, _) => Some(run.dir().join(BASE)).filter(|it| it.is_dir()),
        };
        let has_own = own.is_some();
        let own = own.map(|dir| dir.to_string_lossy().into_owned());
        let model = self.base.model.clone().or(own).unwrap_or(info.base_model);
        let of = format!("the base of the run `{}`", run.dir().display());
        let mut found =
            found(&model).with_context(|| format!("{of}; name another place with `--model`"))?;
        let (task, head) = of_more(&info.more);
        (found.task, found.head) = (task, head);
        if !has_own && changed(&info.more, &found.base)? {
            eprintln!(
                "note: `{}` is not the base that the run `{}` was trained over: other weights or another config.json",
                found.base.path().display(),
                run.dir().display()
            );
        }
        found.format = format_of(&info.more)?;
        found.adapters = match (self.base.adapter.is_empty(), self.no_adapter, self.best) {
            (false, _, _) => named(&self.base.adapter)?,
            (_, _, _) if whole => Vec::new(),
            (_, true, _) => Vec::new(),
            (_, _, true) => vec![(
                "default".into(),
                there(run.best(), "no best adapter: the run was not evaluated")?,
            )],
            _ => vec![(
                "default".into(),
                there(run.adapter(), "no adapter yet: the run has not ended")?,
            )],
        };
        // A run has its own; one that lost it is damaged, and the base's may be another.
        found.tokenizer = Some(run.dir().to_owned());
        Ok(found)
    }

    fn of_adapter(&self, dir: &Path) -> Result<Sources> {
        let model = match &self.base.model {
            Some(model) => model.clone(),
            None => base_of(dir)?,
        };
        let mut found = found(&model).with_context(|| {
            format!(
                "the base of `{}`; name another place with `--model`",
                dir.display()
            )
        })?;
        if !self.no_adapter {
            let this = NamedFolder {
                name: None,
                dir: dir.to_owned(),
            };
            let all: Vec<NamedFolder> = std::iter::once(this)
                .chain(self.base.adapter.clone())
                .collect();
            found.adapters = named(&all)?;
        }
        found.tokenizer = has_tokenizer(dir);
        Ok(found)
    }
}

impl BaseArgs {
    /// A model with adapters; the first adapter names the model where no flag does.
    pub(crate) fn find(&self) -> Result<Sources> {
        let model = match (&self.model, self.adapter.first()) {
            (Some(model), _) => model.clone(),
            (None, Some(first)) => base_of(&first.dir)?,
            (None, None) => {
                return Err(usage(
                    "nothing to work on: give a RUN, or a model with `--model`",
                ));
            }
        };
        let mut found = found(&model)?;
        found.adapters = named(&self.adapter)?;
        found.tokenizer = self.adapter.first().and_then(|it| has_tokenizer(&it.dir));
        Ok(found)
    }
}

/// How many outputs the head has that an adapter brings along.
fn outputs_of(dir: &Path) -> Option<i64> {
    let heads = [
        "classifier.weight",
        "classifier.out_proj.weight",
        "score.weight",
        "qa_outputs.weight",
    ];
    let file = Mapped::open(&dir.join("adapter_model.safetensors")).ok()?;
    let key = file
        .names()
        .find(|key| heads.iter().any(|head| key.ends_with(head)))?;
    file.info(key)?.0.first().copied()
}

impl Sources {
    /// With the head that an adapter brings, or that the run knows in which it lies.
    pub(crate) fn for_adapter(mut self, run: &Path, dir: &Path) -> Sources {
        if let Some(info) = Run::open(run).ok().and_then(|it| it.info().ok()) {
            self.head = of_more(&info.more).1;
        }
        if self.head.num_labels.is_none() {
            self.head.num_labels = outputs_of(dir);
        }
        self
    }

    /// The base without what is put on it.
    pub(crate) fn base_alone(&self) -> Sources {
        Sources {
            model: self.model.clone(),
            base: self.base.clone(),
            adapters: Vec::new(),
            tokenizer: self.tokenizer.clone(),
            task: self.task,
            head: self.head.clone(),
            format: self.format.clone(),
        }
    }

    /// What the model is for: as asked, as its adapters say, or the first that it can do.
    pub(crate) fn task(&self, asked: Option<&str>) -> Result<Task> {
        if let Some(asked) = asked {
            return asked.parse().map_err(usage);
        }
        if let Some(task) = self.task {
            return Ok(task);
        }
        for (_, dir) in &self.adapters {
            let json = files::read_json(&dir.join(ADAPTER_CONFIG))?;
            if let Some(task) = json.get("task_type").and_then(|it| it.as_str()) {
                return task
                    .parse()
                    .map_err(usage)
                    .with_context(|| format!("adapter `{}`", dir.display()));
            }
        }
        match task_of(&self.base.config()?) {
            Some(own) => Ok(own),
            None => Ok(self.offered()?.1.first().copied().unwrap_or(Task::CausalLm)),
        }
    }

    /// Tokens of a row at most: as many as are asked for, else the usual, of which a model may have been made for less. Virtual tokens
    /// take some of those away, of the adapters here and `more` of one to come.
    pub(crate) fn row_length(
        &self,
        more: usize,
        asked: Option<usize>,
        usual: usize,
    ) -> Result<usize> {
        if let Some(asked) = asked {
            return Ok(asked);
        }
        let whole = |json: &serde_json::Value, key: &str| Some(json.get(key)?.as_u64()? as usize);
        let config = self.base.config()?;
        let keys = ["max_position_embeddings", "n_positions"];
        let places = keys.into_iter().find_map(|key| whole(&config, key));
        // RoBERTa counts from behind its padding token.
        let roberta = config.get("model_type").is_some_and(|it| it == "roberta");
        let mut taken = match roberta {
            true => whole(&config, "pad_token_id")
                .unwrap_or(1)
                .saturating_add(1),
            false => 0,
        };
        taken = taken.saturating_add(more);
        for (_, dir) in &self.adapters {
            let json = files::read_json(&dir.join(ADAPTER_CONFIG))?;
            taken = taken.saturating_add(whole(&json, "num_virtual_tokens").unwrap_or(0));
        }
        // Where no place is left, the model says so.
        let left = places.map_or(usual, |it| it.saturating_sub(taken).max(1));
        Ok(usual.min(left))
    }

    /// The type of the base, and what models of it are for; nothing of a type that is not known.
    pub(crate) fn offered(&self) -> Result<(String, &'static [Task])> {
        let config = self.base.config()?;
        let kind = config.get("model_type").and_then(|it| it.as_str());
        let kind = kind.unwrap_or_default().to_owned();
        let offered = tasks(&kind);
        Ok((kind, offered))
    }

    /// An error unless this is a model that goes on with texts.
    pub(crate) fn must_talk(&self) -> Result<()> {
        let (_, offered) = self.offered()?;
        let task = self.task(None)?;
        // What is wrong with a model that is not known is said where it is loaded.
        if offered.is_empty() || task == Task::CausalLm {
            return Ok(());
        }
        Err(usage(format!(
            "`{}` is a model for {task}, it writes no text; `peft eval` measures it",
            self.model
        )))
    }

    /// The model for a task, without adapters.
    pub(crate) fn bare(&self, task: Task, at: Placement) -> Result<Box<dyn Network>> {
        let options = OpenOptions {
            kind: Some(at.kind),
            device: at.device,
        };
        self.open(task, options)
    }

    /// The model for a task on the processor, dressed; `kind`: `None` as it is stored.
    pub(crate) fn load_stored(&self, task: Task, kind: Option<Kind>) -> Result<Box<dyn Network>> {
        let device = Device::Cpu;
        let mut model = self.open(task, OpenOptions { kind, device })?;
        self.dress(&mut *model)?;
        Ok(model)
    }

    fn open(&self, task: Task, options: OpenOptions) -> Result<Box<dyn Network>> {
        let mut head = self.head.clone();
        if head.num_labels.is_none() {
            head.num_labels = self.outputs_of_adapters();
        }
        let mut model = open_task_in(&self.base, task, options, &head, &self.format)
            .with_context(|| format!("model `{}`", self.model))?;
        say_what_decodes(options.device, &mut *model);
        Ok(model)
    }

    /// The names of the classes of a head that the checkpoint has already.
    pub(crate) fn classes_of(&self, task: Task) -> Result<Option<Vec<String>>> {
        let config = self.base.config()?;
        if task_of(&config) != Some(task) || !matches!(task, Task::SeqCls | Task::TokenCls) {
            return Ok(None);
        }
        let Some(map) = config.get("id2label").and_then(|it| it.as_object()) else {
            return Ok(None);
        };
        let name = |i: usize| map.get(&i.to_string())?.as_str().map(str::to_owned);
        let names: Option<Vec<String>> = (0..map.len()).map(name).collect();
        // Names that nobody gave say nothing of the data's.
        Ok(names.filter(|all| !all.iter().all(|it| it.starts_with("LABEL_"))))
    }

    /// Whether labels are numbers to be predicted, whole ones as well: the run says so, or the base, or its head has one output,
    /// of which `transformers` thinks the same.
    pub(crate) fn predicts_numbers(&self, task: Task) -> Result<bool> {
        if task != Task::SeqCls {
            return Ok(false);
        }
        if let Some(problem) = self.head.problem_type {
            return Ok(problem == Problem::Regression);
        }
        let config = self.base.config()?;
        if task_of(&config) != Some(task) {
            return Ok(false);
        }
        let names = config.get("id2label").and_then(|it| it.as_object());
        let outputs = match names {
            Some(names) => Some(names.len() as u64),
            None => config.get("num_labels").and_then(|it| it.as_u64()),
        };
        Ok(
            match config.get("problem_type").and_then(|it| it.as_str()) {
                Some(problem) => problem == Problem::Regression.name(),
                None => outputs == Some(1),
            },
        )
    }

    /// How many outputs the head has that an adapter brings along: the base's own says nothing of it.
    fn outputs_of_adapters(&self) -> Option<i64> {
        self.adapters.iter().find_map(|(_, dir)| outputs_of(dir))
    }

    /// The model for a task, dressed.
    pub(crate) fn load_task(&self, task: Task, at: Placement) -> Result<Box<dyn Network>> {
        let mut model = self.bare(task, at)?;
        self.dress(&mut *model)?;
        Ok(model)
    }

    fn dress(&self, model: &mut dyn Model) -> Result<()> {
        let registry = peft::builtin();
        for (name, dir) in &self.adapters {
            Adapter::load(dir, &registry)
                .and_then(|it| it.apply(name, model))
                .with_context(|| format!("adapter `{}`", dir.display()))?;
        }
        Ok(())
    }

    /// Loads the model and dresses it.
    pub(crate) fn load(&self, device: Device, kind: Option<Kind>) -> Result<Box<dyn Decoder>> {
        let mut model = open_source_in(&self.base, OpenOptions { kind, device }, &self.format)
            .with_context(|| format!("model `{}`", self.model))?;
        say_what_decodes(device, &mut *model);
        self.dress(&mut *model)?;
        Ok(model)
    }

    /// Loads the model at a place that was chosen.
    pub(crate) fn load_at(&self, at: Placement) -> Result<Box<dyn Decoder>> {
        self.load(at.device, Some(at.kind))
    }

    /// Whether there is a tokenizer anywhere. A GGUF file has one, or says so when it is asked.
    pub(crate) fn has_tokenizer(&self) -> bool {
        let beside = |dir: &PathBuf| has_tokenizer(dir).is_some();
        self.tokenizer.is_some()
            || match &self.base {
                Source::Folder(dir) => beside(dir),
                Source::Gguf(_) => true,
            }
    }

    /// The tokenizer: that of the run or adapter, else of the base.
    pub(crate) fn tokenizer(&self) -> Result<Voice> {
        let (dir, held) = match (&self.tokenizer, &self.base) {
            (Some(dir), _) | (None, Source::Folder(dir)) => (dir.clone(), None),
            (None, Source::Gguf(file)) => {
                let held = tempfile::tempdir().context("a temporary folder for the tokenizer")?;
                peft::gguf::write_tokenizer(&peft::gguf::Gguf::open(file)?, held.path())?;
                (held.path().to_owned(), Some(held))
            }
        };
        let tokenizer = Tokenizer::open(&dir)?;
        Ok(Voice {
            tokenizer,
            _held: held,
        })
    }

    /// The base's own `generation_config.json`, if it has one.
    pub(crate) fn generation_config(&self) -> Option<PathBuf> {
        let path = self.base.path().join("generation_config.json");
        path.is_file().then_some(path)
    }
}

/// A tokenizer, and the temporary folder that it may lie in.
#[derive(Debug)]
pub(crate) struct Voice {
    pub(crate) tokenizer: Tokenizer,
    _held: Option<TempDir>,
}

impl std::ops::Deref for Voice {
    type Target = Tokenizer;

    fn deref(&self) -> &Tokenizer {
        &self.tokenizer
    }
}

fn found(model: &str) -> Result<Sources> {
    Ok(Sources {
        model: model.to_owned(),
        base: Source::find(model)
            .with_context(|| format!("model `{model}`{}", neighbour(model)))?,
        adapters: Vec::new(),
        tokenizer: None,
        task: None,
        head: HeadOptions::default(),
        format: Format::as_stored(),
    })
}

/// `; nearest is …`: what lies in the same folder and is called nearly so.
fn neighbour(path: &str) -> String {
    let path = Path::new(path);
    let folder = path
        .parent()
        .filter(|it| !it.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let entries = folder.read_dir().into_iter().flatten().flatten();
    let names: Vec<String> = entries
        .map(|it| it.file_name().to_string_lossy().into_owned())
        .collect();
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    match path.exists() {
        true => String::new(),
        false => nearest(&name, names.iter().map(String::as_str)),
    }
}

/// What the class that a model was saved from is for (`BertForSequenceClassification`), if models of its type can be that here.
pub(crate) fn task_of(config: &serde_json::Value) -> Option<Task> {
    let class = config.get("architectures")?.get(0)?.as_str()?;
    let known = [
        ("ForCausalLM", Task::CausalLm),
        ("LMHeadModel", Task::CausalLm),
        ("ForMaskedLM", Task::MaskedLm),
        ("ForSequenceClassification", Task::SeqCls),
        ("ForTokenClassification", Task::TokenCls),
        ("ForQuestionAnswering", Task::QuestionAns),
        ("ForConditionalGeneration", Task::Seq2SeqLm),
        ("Model", Task::FeatureExtraction),
    ];
    let found = known.iter().find(|(end, _)| class.ends_with(end));
    let kind = config.get("model_type").and_then(|it| it.as_str());
    let offered = tasks(kind.unwrap_or_default());
    found
        .map(|(_, task)| *task)
        .filter(|it| offered.is_empty() || offered.contains(it))
}

/// Modules of a head that the checkpoint lacks, and that no adapter of these names has whole.
pub(crate) fn left_at_random(model: &mut dyn Network, adapters: &[&str]) -> Vec<String> {
    // Whole modules alone: an update of low rank does not make up for a random weight that no file has.
    let all: Vec<Param> = adapters.iter().flat_map(|it| model.params(it)).collect();
    let whole = all.into_iter().filter(|it| it.name == "weight");
    let whole: Vec<String> = whole.map(|it| it.at).collect();
    let outline = model.outline();
    let fresh = model.fresh().iter().map(|it| it.as_str());
    let mut places: Vec<String> = fresh
        .map(|name| match outline.sites.iter().any(|it| it.at == name) {
            true => name,
            false => name.rsplit_once('.').map_or(name, |it| it.0),
        })
        .filter(|at| outline.sites.iter().any(|it| it.at == *at))
        .map(str::to_owned)
        .collect();
    places.dedup();
    places.retain(|at| !whole.contains(at));
    places
}

/// What `run.json` says of the method of full fine-tuning.
pub(crate) const FULL: &str = "FULL";

/// The keys of `run.json` that say what a run was for.
pub(crate) const TASK: &str = "task";
pub(crate) const CLASSES: &str = "classes";
pub(crate) const PROBLEM: &str = "problem_type";
/// Which base it was trained over.
pub(crate) const FINGERPRINT: &str = "base_fingerprint";

/// Whether a run was trained over another base than this, as far as its `run.json` says.
pub(crate) fn changed(
    more: &serde_json::Map<String, serde_json::Value>,
    base: &Source,
) -> Result<bool> {
    match more.get(FINGERPRINT).and_then(|it| it.as_str()) {
        Some(began) => Ok(base.fingerprint()? != began),
        None => Ok(false),
    }
}

/// How the base of a run is kept; of one that `--model` names as well, since the adapter was made for it.
fn format_of(more: &serde_json::Map<String, serde_json::Value>) -> Result<Format> {
    match Quantization::of_run(more)? {
        Some(bits) => bits.format(),
        None => Ok(Format::as_stored()),
    }
}

/// Task and head of a run, from what `run.json` says besides.
fn of_more(more: &serde_json::Map<String, serde_json::Value>) -> (Option<Task>, HeadOptions) {
    let text = |key: &str| more.get(key).and_then(|it| it.as_str());
    let classes = more.get(CLASSES).and_then(|it| it.as_array());
    let classes: Option<Vec<String>> = classes.map(|all| {
        let names = all.iter().filter_map(|it| it.as_str());
        names.map(str::to_owned).collect()
    });
    let head = HeadOptions {
        num_labels: classes.as_ref().and_then(|it| i64::try_from(it.len()).ok()),
        id2label: classes,
        problem_type: text(PROBLEM).and_then(Problem::named),
        pad_token_id: more.get("pad_token_id").and_then(|it| it.as_i64()),
        ..HeadOptions::default()
    };
    (text(TASK).and_then(|it| it.parse().ok()), head)
}

/// The base that an adapter names.
pub(crate) fn base_of(dir: &Path) -> Result<String> {
    let path = dir.join(ADAPTER_CONFIG);
    if !path.exists() {
        anyhow::bail!(
            "`{}` holds no adapter: there is no {ADAPTER_CONFIG}",
            dir.display()
        );
    }
    let json = files::read_json(&path)?;
    let name = json
        .get("base_model_name_or_path")
        .and_then(|it| it.as_str());
    let name = name.filter(|it| !it.is_empty());
    // A run that was moved has taken its own base along.
    let beside = dir
        .parent()
        .map(|run| run.join(BASE))
        .filter(|it| it.is_dir());
    if let (Some(name), Some(beside)) = (name, beside)
        && Path::new(name).ends_with(BASE)
        && !Path::new(name).exists()
    {
        return Ok(beside.to_string_lossy().into_owned());
    }
    name.map(str::to_owned).with_context(|| {
        format!(
            "{}: no `base_model_name_or_path`; name the base with `--model`",
            path.display()
        )
    })
}

/// Gives names to those without: `default`, `adapter-2`, …
fn named(folders: &[NamedFolder]) -> Result<Vec<(String, PathBuf)>> {
    let mut all: Vec<(String, PathBuf)> = Vec::new();
    for (i, it) in (1..).zip(folders) {
        let fallback = || {
            if i == 1 {
                "default".to_owned()
            } else {
                format!("adapter-{i}")
            }
        };
        let name = it.name.clone().unwrap_or_else(fallback);
        if all.iter().any(|(other, _)| *other == name) {
            return Err(usage(format!("two adapters are called `{name}`")));
        }
        let dir = match Run::is_run(&it.dir) {
            true => Run::open(&it.dir)?.adapter(),
            false => it.dir.clone(),
        };
        all.push((name, dir));
    }
    Ok(all)
}

fn has_tokenizer(dir: &Path) -> Option<PathBuf> {
    dir.join("tokenizer.json").is_file().then(|| dir.to_owned())
}

fn there(dir: PathBuf, otherwise: &str) -> Result<PathBuf> {
    if dir.join(ADAPTER_CONFIG).is_file() {
        return Ok(dir);
    }
    anyhow::bail!("{}: {otherwise}", dir.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_may_have_a_name() {
        let parse = |text: &str| text.parse::<NamedFolder>();
        assert_eq!(
            parse("a/b").unwrap(),
            NamedFolder {
                name: None,
                dir: "a/b".into()
            }
        );
        let named = parse("x=a/b=c").unwrap();
        assert_eq!(
            (named.name.as_deref(), named.dir),
            (Some("x"), "a/b=c".into())
        );
        for bad in ["", "=a", "x=", "a.b=c"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn names_are_given_and_are_unique() {
        let folder = |name: Option<&str>| NamedFolder {
            name: name.map(str::to_owned),
            dir: "d".into(),
        };
        let names = |all: &[NamedFolder]| {
            named(all).map(|it| it.into_iter().map(|it| it.0).collect::<Vec<_>>())
        };
        assert_eq!(
            names(&[folder(None), folder(None)]).unwrap(),
            ["default", "adapter-2"]
        );
        assert!(names(&[folder(None), folder(Some("default"))]).is_err());
    }
}
