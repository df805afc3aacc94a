//! Everything that decides a run: from a YAML file, `--set` and flags, the later winning.
//!
//! ```yaml
//! model: SmolLM2-135M-Instruct      # where from
//! task: CAUSAL_LM                   # what it is to learn; found out where not given
//! data: [rows.jsonl]
//! validation: 0.1                   # a part, a number of rows, or files
//! method: lora
//! lora: {r: 16, lora_alpha: 32}     # the method's own settings, as in adapter_config.json
//! learning_rate: 2e-4               # and every setting of training, by Hugging Face's names
//! ```
//!
//! There is one namespace: a key is one of this file's, one of training's or
//! one of the method's, and anything else is an error with the nearest name.
//! The method is looked for first, wherever it is said, since it decides which keys there are and what
//! they begin with. What was resolved is written to the run folder and can be fed back.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use peft::{
    PromptConfig, Residual, Settings, Tokenizer, Tuner,
    core::{nearest, parse},
    data::Holdout,
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{
    error::usage,
    methods::{
        LOFTQ_CONFIG, METHODS, Method, PREFIX_INIT_TEXT, PYTHONS_RATE, QLORA, TRAIN_MODULES,
    },
    quantization::{Bits, QUANTIZATION, Quantization, Wish},
};

/// The decisions about a run, but for the loop's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Recipe {
    /// The base: a folder, a GGUF file or a hub id.
    pub(crate) model: String,
    /// The task, by the name that `peft` has for it; found out where not given.
    pub(crate) task: Option<String>,
    /// What labels of whole texts are: `single_label_classification`, `multi_label_classification` or `regression`; read off the
    /// model and the labels where not given.
    pub(crate) problem_type: Option<String>,
    /// Files to train on.
    pub(crate) data: Vec<PathBuf>,
    /// What is held out.
    pub(crate) validation: Validation,
    /// The rows' format; found out where not given.
    pub(crate) format: Option<String>,
    /// Tokens after which a row is cut; what the model takes, but at most 1024, where not given.
    pub(crate) max_length: Option<usize>,
    /// Learns prompts, too.
    pub(crate) train_on_prompt: bool,
    /// Where tokenised data is kept.
    pub(crate) cache_dir: Option<PathBuf>,
    /// Where to compute: `auto`, `cpu`, `cuda:0`.
    pub(crate) device: String,
    /// The base's number format: `auto`, `fp32`, `bf16`, `fp16`.
    pub(crate) dtype: String,
    /// In which bits the linear layers of a dense base are kept: `nf4`, `fp4`, `int8`, or all of it
    /// (`{type: nf4, double_quant: true, block_size: 64, skip: [lm_head]}`); NF4 for QLoRA where not given.
    pub(crate) quantization: Option<Wish>,
    /// With a base in few bits, norms, tables and the head are in fp32, as Python's `prepare_model_for_kbit_training`
    /// leaves them; else they are in `dtype`, which saves memory.
    pub(crate) keep_in_fp32: bool,
    /// Questions that are answered before and after.
    pub(crate) prompts: Vec<String>,
    /// The method, by its name.
    pub(crate) method: String,
    /// What the method's settings begin with.
    pub(crate) defaults: Defaults,
    /// The settings of the method; written under its name.
    #[serde(skip)]
    pub(crate) options: Map<String, Value>,
}

/// What the settings of a method begin with.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Defaults {
    /// With what learns well, see [`METHODS`].
    #[default]
    Ours,
    /// With those of Python's `peft`, and the learning rate of `transformers`.
    Python,
}

/// What is held out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub(crate) enum Validation {
    /// So many rows of the data.
    Rows(usize),
    /// This part of the rows of the data.
    Part(f64),
    /// Files of their own.
    Files(Vec<PathBuf>),
}

impl Validation {
    /// How much of the data is held out, if it is of the data.
    pub(crate) fn holdout(&self) -> Option<Holdout> {
        match self {
            Validation::Rows(rows) => Some(Holdout::Count(*rows)),
            Validation::Part(part) => Some(Holdout::Fraction(*part)),
            Validation::Files(_) => None,
        }
    }
}

impl Default for Recipe {
    fn default() -> Recipe {
        let method = &METHODS[0];
        Recipe {
            model: String::new(),
            task: None,
            problem_type: None,
            data: Vec::new(),
            validation: Validation::Part(0.1),
            format: None,
            max_length: None,
            train_on_prompt: false,
            cache_dir: None,
            device: "auto".into(),
            dtype: "auto".into(),
            quantization: None,
            keep_in_fp32: true,
            prompts: Vec::new(),
            method: method.name.to_owned(),
            defaults: Defaults::Ours,
            options: method.ours(),
        }
    }
}

/// A recipe with the settings of the loop.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Plan {
    /// What, on what, with which method.
    pub(crate) recipe: Recipe,
    /// How.
    pub(crate) settings: Settings,
    /// Somebody said which learning rate.
    pub(crate) rate_given: bool,
    /// Where the base will be that LoftQ or QPiSSA makes of the model: the adapter means nothing without it.
    pub(crate) own_base: Option<String>,
}

impl Plan {
    /// Reads a YAML file (JSON is YAML, too) over the defaults.
    pub(crate) fn read(path: &Path) -> Result<Plan> {
        Plan::of(&Plan::pairs(path)?).map_err(|error| usage(format!("{}: {error}", path.display())))
    }

    /// The keys and values of a YAML file.
    pub(crate) fn pairs(path: &Path) -> Result<Vec<(String, Value)>> {
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        let value: Value = serde_saphyr::from_str(&text)
            .map_err(|error| usage(format!("{}: {error}", path.display())))?;
        match value {
            Value::Object(map) => Ok(map.into_iter().collect()),
            Value::Null => Ok(Vec::new()),
            _ => Err(usage(format!(
                "{}: expected keys and values",
                path.display()
            ))),
        }
    }

    /// A plan out of keys and values, the later winning; the method first.
    pub(crate) fn of(pairs: &[(String, Value)]) -> Result<Plan> {
        let mut plan = Plan::default();
        plan.begin(pairs)?;
        for (key, value) in pairs {
            plan.set(key, value.clone())?;
        }
        plan.rate_given = pairs.iter().any(|(key, _)| key == "learning_rate");
        Ok(plan)
    }

    /// Whether a setting is one of every method: of the run, or of the loop.
    pub(crate) fn is_shared(key: &str) -> bool {
        let own = as_map(&Recipe::default());
        own.is_ok_and(|it| it.contains_key(key)) || Settings::keys().iter().any(|it| it == key)
    }

    /// Takes the learning rate that fits a new head, where nobody said another.
    pub(crate) fn for_heads(&mut self) -> Result<()> {
        if !self.rate_given && self.recipe.defaults == Defaults::Ours {
            self.settings.learning_rate = self.method()?.learning_rate_of_heads;
        }
        Ok(())
    }

    /// Finds the method and the defaults, and begins with its settings.
    fn begin(&mut self, pairs: &[(String, Value)]) -> Result<()> {
        let last = |wanted: &str| pairs.iter().rev().find(|(key, _)| key == wanted);
        let section = || {
            let named = pairs.iter().rev().find_map(|(key, _)| {
                let key = key.split('.').next().unwrap_or(key);
                METHODS.iter().find(|it| it.name == key)
            });
            named.unwrap_or(&METHODS[0])
        };
        let method = match last("method") {
            Some((_, Value::String(name))) => Method::named(name)?,
            Some((_, other)) => return Err(usage(format!("setting `method`: {other} is no name"))),
            None => section(),
        };
        if let Some((_, value)) = last("defaults") {
            self.recipe.defaults = serde_json::from_value(value.clone()).map_err(|_| {
                usage(format!(
                    "setting `defaults`: {value} is not `ours` or `python`"
                ))
            })?;
        }
        self.recipe.method = method.name.to_owned();
        self.settings.gradient_checkpointing = method.checkpoints();
        (self.recipe.options, self.settings.learning_rate) = match self.recipe.defaults {
            Defaults::Ours => (method.ours(), method.learning_rate),
            Defaults::Python => (Map::new(), PYTHONS_RATE),
        };
        Ok(())
    }

    /// Decides in which bits the base is kept; `stored`: it is in few bits already.
    pub(crate) fn quantize(&mut self, stored: bool) -> Result<()> {
        let qlora = self.method()?.name == QLORA;
        let wish = self.recipe.quantization.as_ref();
        let few = stored || wish.is_some_and(|it| it.quantization().is_some());
        if few && self.method()?.peft_type.is_none() {
            return Err(usage(
                "full fine-tuning changes every weight, and weights in few bits cannot be changed a little; take a dense base, or `--method qlora`",
            ));
        }
        match wish.map(Wish::quantization) {
            None if qlora && !stored => {
                self.recipe.quantization = Some(Wish::Whole(Quantization::default()));
            }
            Some(None) if qlora && !stored => {
                return Err(usage(
                    "`quantization: none`, but QLoRA is LoRA on a base in few bits; `--method lora` trains on it as it is",
                ));
            }
            Some(None) if stored => {
                return Err(usage(format!(
                    "`quantization: none`, but `{}` is in few bits, and is used as it is",
                    self.recipe.model
                )));
            }
            Some(Some(_)) if stored => {
                return Err(usage(format!(
                    "`quantization`: `{}` is in few bits already, and is used as it is",
                    self.recipe.model
                )));
            }
            _ => {}
        }
        Ok(())
    }

    /// Refuses to go on with other settings than a run began with. Where it computes may change, and so may the name of a base that
    /// is no longer where it was; of the data the rows are counted.
    pub(crate) fn must_go_on(&self, began: &Plan, run: &Path) -> Result<()> {
        let base = Path::new(&began.recipe.model);
        let moved = base.is_absolute() && !base.exists();
        let may_change = |key: &str| match key {
            "device" | "data" | "cache_dir" => true,
            "model" => moved,
            _ => false,
        };
        let flat = |plan: &Plan| -> Result<Map<String, Value>> {
            let mut all = as_map(&plan.recipe)?;
            all.extend(as_map(&plan.settings)?);
            all.extend(plan.recipe.options.clone());
            Ok(all)
        };
        let (now, before) = (flat(self)?, flat(began)?);
        let keys = before.keys().chain(now.keys());
        let other = |key: &&String| !may_change(key) && before.get(*key) != now.get(*key);
        let Some(key) = keys.into_iter().find(other) else {
            return Ok(());
        };
        let said = |all: &Map<String, Value>| match all.get(key) {
            None | Some(Value::Null) => "not set".to_owned(),
            Some(value) => value.to_string(),
        };
        let dir = run.display();
        Err(usage(format!(
            "a run goes on with the settings it began with: `{key}` was {}, not {}; `peft train {dir}/config.yaml` with other settings and another `--out` begins a new run",
            said(&before),
            said(&now),
        )))
    }

    /// How many virtual tokens the method puts in front of a row; none where it has no such setting.
    pub(crate) fn virtual_tokens(&self) -> usize {
        let number = self.recipe.options.get("num_virtual_tokens");
        number.and_then(Value::as_u64).unwrap_or(0) as usize
    }

    /// How factors begin that make up for what quantisation takes away: `init_lora_weights: loftq`, with `loftq_config`
    /// for the rounds, or `pissa` where the base is quantised here.
    pub(crate) fn residual(&self) -> Result<Option<Residual>> {
        let option = |key: &str| self.recipe.options.get(key).filter(|it| !it.is_null());
        let init = option("init_lora_weights").and_then(Value::as_str);
        let four = self.quantization().filter(|it| it.bits != Bits::Int8);
        match init {
            Some("loftq") if four.is_none() => Err(usage(
                "`init_lora_weights: loftq` makes up for what quantising to 4 bits takes away: it needs a dense base and `quantization: nf4` or `fp4`",
            )),
            Some("loftq") => {
                let config = match option(LOFTQ_CONFIG) {
                    None => Map::new(),
                    Some(Value::Object(map)) => map.clone(),
                    Some(other) => {
                        return Err(usage(format!(
                            "setting `loftq_config`: {other}, expected keys and values, such as `{{loftq_iter: 5}}`"
                        )));
                    }
                };
                const KNOWN: [&str; 2] = ["loftq_bits", "loftq_iter"];
                if let Some(key) = config.keys().find(|key| !KNOWN.contains(&key.as_str())) {
                    let hint = nearest(key, KNOWN);
                    return Err(usage(format!(
                        "setting `loftq_config`: unknown key `{key}`{hint}"
                    )));
                }
                let number = |key: &str, usual: u64| {
                    match config.get(key) {
                    None | Some(Value::Null) => Ok(usual),
                    Some(value) => value.as_u64().filter(|it| (1..=100).contains(it)).ok_or_else(|| {
                        usage(format!("setting `loftq_config.{key}`: {value}, expected a number from 1 to 100"))
                    }),
                }
                };
                if number("loftq_bits", 4)? != 4 {
                    return Err(usage(
                        "setting `loftq_config.loftq_bits`: the base is kept in 4",
                    ));
                }
                let rounds = number("loftq_iter", 1)? as usize;
                Ok(Some(Residual::Loftq { rounds }))
            }
            Some("pissa") if four.is_some() => Ok(Some(Residual::Pissa)),
            _ => Ok(None),
        }
    }

    /// In which bits the layers of a dense base are kept; `None`: as they are stored.
    pub(crate) fn quantization(&self) -> Option<Quantization> {
        self.recipe.quantization.as_ref()?.quantization()
    }

    /// The method.
    pub(crate) fn method(&self) -> Result<&'static Method> {
        Method::named(&self.recipe.method)
    }

    /// Changes one thing by its name.
    pub(crate) fn set(&mut self, key: &str, value: Value) -> Result<()> {
        let method = self.method()?;
        let mut own = as_map(&self.recipe)?;
        let (section, inner) = match key.split_once('.') {
            Some((section, inner)) => (section, Some(inner)),
            None => (key, None),
        };
        if let Some(of) = METHODS.iter().find(|it| it.name == section) {
            if of.name != method.name {
                return Err(usage(format!(
                    "settings of `{}`, but the method is `{}`",
                    of.name, method.name
                )));
            }
            return match (inner, value) {
                (Some(inner), value) => self.set_option(inner, value),
                (None, Value::Object(map)) => map
                    .into_iter()
                    .try_for_each(|(key, value)| self.set_option(&key, value)),
                (None, _) => Err(usage(format!(
                    "`{section}` holds keys and values, such as `{{r: 16}}`"
                ))),
            };
        }
        if ["method", "defaults"].contains(&key) {
            return Ok(()); // looked for first, see `begin`
        }
        if key == QUANTIZATION {
            Wish::check(&value)?;
        }
        if own.contains_key(key) {
            own.insert(key.to_owned(), listed(key, value));
            let options = std::mem::take(&mut self.recipe.options);
            self.recipe = serde_json::from_value(Value::Object(own))
                .map_err(|error| usage(format!("setting `{key}`: {error}")))?;
            self.recipe.options = options;
            return Ok(());
        }
        let options = method.keys()?;
        if options.contains_key(key) {
            return self.set_option(key, value);
        }
        if Settings::keys().iter().any(|known| known == key) {
            return self.settings.set(key, value).map_err(usage);
        }
        let mut known: Vec<String> = own.keys().cloned().collect();
        known.extend(Settings::keys());
        known.extend(options.keys().cloned());
        let hint = nearest(key, known.iter().map(String::as_str));
        let of_others = || {
            let others = METHODS.iter().filter(|it| it.name != method.name);
            others
                .filter(|it| it.keys().is_ok_and(|keys| keys.contains_key(key)))
                .map(|it| it.name)
                .collect::<Vec<_>>()
        };
        if key == "methods" {
            return Err(usage(
                "`methods` is a list for `peft compare`; a run has one `method`",
            ));
        }
        let others = of_others();
        if others.is_empty() {
            return Err(usage(format!("unknown setting `{key}`{hint}")));
        }
        Err(usage(format!(
            "`{key}` is a setting of {}, but the method is `{}`",
            others.join(", "),
            method.name
        )))
    }

    /// `key=value`, the value in YAML.
    pub(crate) fn pair(text: &str) -> Result<(String, Value)> {
        let Some((key, value)) = text.split_once('=') else {
            return Err(usage(format!("`--set {text}`: expected KEY=VALUE")));
        };
        let value = serde_saphyr::from_str(value)
            .map_err(|error| usage(format!("`--set {text}`: {error}")))?;
        Ok((key.trim().to_owned(), value))
    }

    fn set_option(&mut self, key: &str, value: Value) -> Result<()> {
        let method = self.method()?;
        let known = method.keys()?;
        if !known.contains_key(key) {
            let hint = nearest(key, known.keys().map(String::as_str));
            return Err(usage(format!(
                "unknown setting `{key}` of {}{hint}",
                method.title
            )));
        }
        self.recipe.options.insert(key.to_owned(), value);
        Ok(())
    }

    /// The method, configured, and all of its settings checked; `None`: full fine-tuning.
    ///
    /// `total` is the number of steps of the run, for methods with a schedule of their own.
    pub(crate) fn tuner(
        &self,
        task_type: Option<&str>,
        total: usize,
        tokenizer: &Tokenizer,
    ) -> Result<Option<Box<dyn Tuner>>> {
        let Some(tag) = self.method()?.peft_type else {
            return Ok(None);
        };
        let mut json = self.recipe.options.clone();
        if self.method()?.keys()?.contains_key("total_step") && !json.contains_key("total_step") {
            json.insert("total_step".into(), total.into());
        }
        let number = |key: &str| json.get(key).and_then(Value::as_i64);
        if tag == "ADALORA" && number("total_step").unwrap_or(0) - number("tfinal").unwrap_or(0) < 2
        {
            return Err(usage(format!(
                "AdaLoRA takes ranks away by what it saw of them in the steps before: with {} of them (less `tfinal`) there is none",
                number("total_step").unwrap_or(0)
            )));
        }
        json.insert("peft_type".into(), tag.into());
        json.insert("task_type".into(), task_type.into());
        json.insert(
            "base_model_name_or_path".into(),
            self.own_base
                .as_ref()
                .unwrap_or(&self.recipe.model)
                .as_str()
                .into(),
        );
        json.shift_remove(PREFIX_INIT_TEXT);
        if self.residual()?.is_some() {
            // The factors are set when both the dense and the quantised weights are there.
            json.insert("init_lora_weights".into(), true.into());
        } else if json.get(LOFTQ_CONFIG).is_some_and(|it| !it.is_null()) {
            return Err(usage(
                "`loftq_config` goes with `init_lora_weights: loftq`, which is not set",
            ));
        }
        json.shift_remove(LOFTQ_CONFIG);
        if json.get("label_words").is_some_and(|it| !it.is_null()) {
            return self.begin_at_labels(json, tokenizer).map(Some);
        }
        let begins = json.get("prompt_tuning_init").and_then(Value::as_str);
        if begins != Some("TEXT")
            && json
                .get("prompt_tuning_init_text")
                .is_some_and(|it| !it.is_null())
        {
            return Err(usage(
                "`prompt_tuning_init_text` is where to begin with `prompt_tuning_init=TEXT`, which is not set",
            ));
        }
        if begins == Some("TEXT") {
            return self.begin_at_text(json, tokenizer).map(Some);
        }
        let tuner = peft::builtin().parse(Value::Object(json)).map_err(usage)?;
        Ok(Some(tuner))
    }

    /// Prompt tuning that begins at a text, which takes a tokenizer.
    fn begin_at_text(
        &self,
        json: Map<String, Value>,
        tokenizer: &Tokenizer,
    ) -> Result<Box<dyn Tuner>> {
        let text = json.get("prompt_tuning_init_text").and_then(Value::as_str);
        let text = text.map(str::to_owned).ok_or_else(|| {
            usage("`prompt_tuning_init` is TEXT: say which with `prompt_tuning_init_text`")
        })?;
        let named = json.get("tokenizer_name_or_path").and_then(Value::as_str);
        let named = named.unwrap_or(&self.recipe.model).to_owned();
        let mut json = json;
        json.insert("tokenizer_name_or_path".into(), named.as_str().into());
        let config: PromptConfig = parse(Value::Object(json)).map_err(usage)?;
        let ids = tokenizer.encode(&text, true)?; // as Python, with the tokenizer's own special tokens
        let ids: Vec<i64> = ids.into_iter().map(i64::from).collect();
        Ok(Box::new(config.with_text(&text, &named, &ids)))
    }

    /// Prompt tuning that begins at the words of the classes.
    fn begin_at_labels(
        &self,
        mut json: Map<String, Value>,
        tokenizer: &Tokenizer,
    ) -> Result<Box<dyn Tuner>> {
        let given = json.shift_remove("label_words").unwrap_or_default();
        let words: Vec<String> = serde_json::from_value(given.clone())
            .ok()
            .filter(|it: &Vec<String>| !it.is_empty())
            .ok_or_else(|| {
                usage(format!(
                    "setting `label_words`: {given} is no list of words"
                ))
            })?;
        json.insert("prompt_tuning_init".into(), "RANDOM".into());
        let config: PromptConfig = parse(Value::Object(json)).map_err(usage)?;
        let mut labels = Vec::new();
        for word in &words {
            let ids = tokenizer.encode(word, false)?;
            let ids: Vec<i64> = ids.into_iter().map(i64::from).collect();
            if ids.is_empty() {
                return Err(usage(format!(
                    "setting `label_words`: {word:?} has no tokens"
                )));
            }
            labels.push((word.as_str(), ids));
        }
        let labels: Vec<(&str, &[i64])> = labels.iter().map(|it| (it.0, &it.1[..])).collect();
        Ok(Box::new(config.with_labels(&labels)))
    }

    /// The tokens of the text at which a prefix is to begin.
    pub(crate) fn prefix_text(&self, tokenizer: &Tokenizer) -> Result<Option<Vec<u32>>> {
        match self.recipe.options.get(PREFIX_INIT_TEXT) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) if text.trim().is_empty() => {
                Err(usage(format!("setting `{PREFIX_INIT_TEXT}` is empty")))
            }
            Some(Value::String(text)) => Ok(Some(tokenizer.encode(text, true)?)),
            Some(other) => Err(usage(format!(
                "setting `{PREFIX_INIT_TEXT}`: {other} is no text"
            ))),
        }
    }

    /// Trains and saves these modules whole, besides what is saved already.
    pub(crate) fn also_save(&mut self, modules: Vec<String>) -> Result<()> {
        let asked = self.recipe.options.get("modules_to_save");
        let mut all: Vec<Value> = asked.and_then(Value::as_array).cloned().unwrap_or_default();
        all.extend(modules.into_iter().map(Value::from));
        self.set_option("modules_to_save", Value::Array(all))
    }

    /// What full fine-tuning trains; `None`: everything.
    pub(crate) fn train_modules(&self) -> Result<Option<peft::core::Names>> {
        let value = self.recipe.options.get(TRAIN_MODULES);
        let value = value.filter(|it| !it.is_null());
        let parse = |it: &Value| {
            serde_json::from_value(it.clone()).map_err(|_| {
                usage(format!(
                    "setting `{TRAIN_MODULES}`: {it} is no list of names and no expression"
                ))
            })
        };
        value.map(parse).transpose()
    }

    /// The whole plan as YAML that [`Plan::read`] reads.
    pub(crate) fn to_yaml(&self) -> Result<String> {
        let mut map = as_map(&self.recipe)?;
        let options = Value::Object(self.recipe.options.clone());
        map.insert(self.recipe.method.clone(), options);
        map.extend(as_map(&self.settings)?);
        let body = serde_saphyr::to_string(&Value::Object(map)).context("writing the settings")?;
        Ok(format!(
            "# Every setting of this run; feed it back with: peft train config.yaml --out OTHER\n{body}"
        ))
    }
}

fn as_map(value: &impl Serialize) -> Result<Map<String, Value>> {
    match serde_json::to_value(value)? {
        Value::Object(map) => Ok(map),
        other => anyhow::bail!("settings are keys and values, not {other}"),
    }
}

/// A single path or text stands for a list of one.
fn listed(key: &str, value: Value) -> Value {
    match value {
        Value::String(_) if ["data", "prompts", "validation"].contains(&key) => {
            Value::Array(vec![value])
        }
        value => value,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn set(text: &str) -> Result<Plan> {
        Plan::of(&[Plan::pair(text)?])
    }

    #[test]
    fn one_namespace_for_all_settings() {
        assert_eq!(set("r=4").unwrap().recipe.options["r"], 4);
        assert_eq!(set("lora.r=4").unwrap().recipe.options["r"], 4);
        assert_eq!(
            set("learning_rate=1e-3").unwrap().settings.learning_rate,
            1e-3
        );
        assert_eq!(
            set("validation=20").unwrap().recipe.validation,
            Validation::Rows(20)
        );
        let files = Validation::Files(vec!["held.jsonl".into()]);
        assert_eq!(
            set("validation=held.jsonl").unwrap().recipe.validation,
            files
        );
        assert_eq!(
            set("target_modules=[q_proj, v_proj]")
                .unwrap()
                .recipe
                .options["target_modules"],
            json!(["q_proj", "v_proj"])
        );
    }

    #[test]
    fn the_method_is_found_wherever_it_is_said() {
        let plan = |pairs: &[(&str, Value)]| {
            let owned: Vec<_> = pairs
                .iter()
                .map(|(k, v)| ((*k).to_owned(), v.clone()))
                .collect();
            Plan::of(&owned)
        };
        let late = plan(&[
            ("train_modules", json!(["lm_head"])),
            ("method", json!("full")),
        ])
        .unwrap();
        assert_eq!(late.recipe.options["train_modules"], json!(["lm_head"]));
        assert_eq!(late.settings.learning_rate, 2e-5);
        let rate = plan(&[("learning_rate", json!(1e-3)), ("method", json!("full"))]).unwrap();
        assert_eq!(rate.settings.learning_rate, 1e-3);
        let other = plan(&[("method", json!("full")), ("r", json!(3))])
            .unwrap_err()
            .to_string();
        assert!(
            other.contains("`r` is a setting of") && other.contains("lora"),
            "{other}"
        );
        let other = plan(&[("method", json!("full")), ("lora", json!({"r": 3}))]).unwrap_err();
        assert!(
            other.to_string().contains("the method is `full`"),
            "{other}"
        );
        let error = plan(&[("method", json!("lroa"))]).unwrap_err().to_string();
        assert!(error.contains("`lora`"), "{error}");
        let python = plan(&[("defaults", json!("python"))]).unwrap();
        assert!(python.recipe.options.is_empty());
        assert!(plan(&[("defaults", json!("mine"))]).is_err());
    }

    #[test]
    fn misspelt_keys_name_the_nearest() {
        for (text, near) in [
            ("lora_alhpa=3", "lora_alpha"),
            ("lora.rr=3", "r"),
            ("learnig_rate=3", "learning_rate"),
            ("vaildation=3", "validation"),
        ] {
            let error = set(text).unwrap_err().to_string();
            assert!(error.contains(near), "{error}");
        }
    }

    /// What a plan says when it has been written and read.
    fn written_and_read(plan: &Plan) -> Plan {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.yaml");
        std::fs::write(&path, plan.to_yaml().unwrap()).unwrap();
        Plan::read(&path).unwrap()
    }

    #[test]
    fn what_is_written_can_be_read() {
        let mut plan = set("rank_pattern={q_proj: 4}").unwrap();
        plan.recipe.prompts = vec!["say: \"no\" # really".into(), "two\nlines".into()];
        plan.recipe.data = vec!["a b.jsonl".into()];
        let (key, value) = Plan::pair("lr_scheduler_kwargs={num_cycles: 0.4}").unwrap();
        plan.set(&key, value).unwrap();
        let again = written_and_read(&plan);
        assert_eq!((again.recipe, again.settings), (plan.recipe, plan.settings));
    }

    #[test]
    fn bits_of_a_run_are_read_again() {
        for wish in [
            "int8",
            "none",
            "{type: int8}",
            "{type: int8, skip: [q_proj]}",
            "{type: nf4, double_quant: false}",
            "{type: fp4, block_size: 128, double_quant: false, skip: []}",
        ] {
            let plan = set(&format!("quantization={wish}")).unwrap();
            assert_eq!(written_and_read(&plan).recipe, plan.recipe, "{wish}");
        }
    }

    #[test]
    fn nothing_in_a_file_panics() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.yaml");
        for text in [
            "",
            "- 1",
            "a: [",
            "lora: 3",
            "data: 7",
            "r: {",
            "model: [x]",
            "&a [*a]",
            "seed: -1",
            "\u{0}",
        ] {
            std::fs::write(&path, text).unwrap();
            let _ = Plan::read(&path);
        }
    }
}
