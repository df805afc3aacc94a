//! Everything that decides a run: from a YAML file, `--set` and flags, the later winning.
//!
//! ```yaml
//! model: SmolLM2-135M-Instruct      # where from
//! data: [rows.jsonl]
//! validation: 0.1                   # a part, a number of rows, or files
//! lora: {r: 16, lora_alpha: 32}     # the method's own settings, as in adapter_config.json
//! learning_rate: 2e-4               # and every setting of training, by Hugging Face's names
//! ```
//!
//! There is one namespace: a key is one of this file's, one of training's or
//! one of the method's, and anything else is an error with the nearest name.
//! What was resolved is written to the run folder and can be fed back.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use peft::{
    LoraConfig, Settings, Tuner,
    core::{nearest, parse},
    data::Holdout,
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::error::usage;

/// The decisions about a run, but for the loop's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Recipe {
    /// The base: a folder, a GGUF file or a hub id.
    pub(crate) model: String,
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
    /// Questions that are answered before and after.
    pub(crate) prompts: Vec<String>,
    /// The method.
    pub(crate) method: Method,
    /// The settings of LoRA.
    pub(crate) lora: Map<String, Value>,
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

/// The methods that `--method` knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Method {
    /// Low-rank adaptation
    Lora,
}

impl Default for Recipe {
    fn default() -> Recipe {
        // An adapter on every linear layer learns like full fine-tuning at most sizes of data; on the
        // attention alone it does not ("LoRA without regret", 2025).
        let lora = json!({"r": 16, "lora_alpha": 32, "target_modules": "all-linear"});
        Recipe {
            model: String::new(),
            data: Vec::new(),
            validation: Validation::Part(0.1),
            format: None,
            max_length: None,
            train_on_prompt: false,
            cache_dir: None,
            device: "auto".into(),
            dtype: "auto".into(),
            prompts: Vec::new(),
            method: Method::Lora,
            lora: lora.as_object().cloned().unwrap_or_default(),
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
}

impl Plan {
    /// Reads a YAML file (JSON is YAML, too) over the defaults.
    pub(crate) fn read(path: &Path) -> Result<Plan> {
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        let value: Value = serde_saphyr::from_str(&text)
            .map_err(|error| usage(format!("{}: {error}", path.display())))?;
        let map = match value {
            Value::Object(map) => map,
            Value::Null => Map::new(),
            _ => {
                return Err(usage(format!(
                    "{}: expected keys and values",
                    path.display()
                )));
            }
        };
        let mut plan = Plan::default();
        for (key, value) in map {
            plan.set(&key, value)
                .map_err(|error| usage(format!("{}: {error}", path.display())))?;
        }
        Ok(plan)
    }

    /// Changes one thing by its name.
    pub(crate) fn set(&mut self, key: &str, value: Value) -> Result<()> {
        let own = as_map(&self.recipe)?;
        if key == "lora" {
            let Value::Object(map) = value else {
                return Err(usage("`lora` holds keys and values, such as `{r: 16}`"));
            };
            for (key, value) in map {
                self.set_method(&key, value)?;
            }
            return Ok(());
        }
        if let Some(key) = key.strip_prefix("lora.") {
            return self.set_method(key, value);
        }
        if own.contains_key(key) {
            let mut own = own;
            own.insert(key.to_owned(), listed(key, value));
            self.recipe = serde_json::from_value(Value::Object(own))
                .map_err(|error| usage(format!("setting `{key}`: {error}")))?;
            return Ok(());
        }
        if method_keys()?.contains_key(key) {
            return self.set_method(key, value);
        }
        if Settings::keys().iter().any(|known| known == key) {
            return self.settings.set(key, value).map_err(usage);
        }
        let mut known: Vec<String> = own.keys().cloned().collect();
        known.extend(Settings::keys());
        known.extend(method_keys()?.keys().cloned());
        let hint = nearest(key, known.iter().map(String::as_str));
        Err(usage(format!("unknown setting `{key}`{hint}")))
    }

    /// `key=value`, the value in YAML.
    pub(crate) fn set_text(&mut self, text: &str) -> Result<()> {
        let Some((key, value)) = text.split_once('=') else {
            return Err(usage(format!("`--set {text}`: expected KEY=VALUE")));
        };
        let value = serde_saphyr::from_str(value)
            .map_err(|error| usage(format!("`--set {text}`: {error}")))?;
        self.set(key.trim(), value)
    }

    fn set_method(&mut self, key: &str, value: Value) -> Result<()> {
        let known = method_keys()?;
        if !known.contains_key(key) {
            let hint = nearest(key, known.keys().map(String::as_str));
            return Err(usage(format!("unknown setting `{key}` of LoRA{hint}")));
        }
        self.recipe.lora.insert(key.to_owned(), value);
        Ok(())
    }

    /// The method, configured; checks all of its settings.
    pub(crate) fn tuner(&self, base: &str) -> Result<Box<dyn Tuner>> {
        let mut json = self.recipe.lora.clone();
        json.insert("peft_type".into(), "LORA".into());
        json.insert("task_type".into(), "CAUSAL_LM".into());
        json.insert("base_model_name_or_path".into(), base.into());
        let config: LoraConfig = parse(Value::Object(json)).map_err(usage)?;
        Ok(Box::new(config))
    }

    /// The whole plan as YAML that [`Plan::read`] reads.
    pub(crate) fn to_yaml(&self) -> Result<String> {
        let mut map = as_map(&self.recipe)?;
        map.extend(as_map(&self.settings)?);
        let body = serde_saphyr::to_string(&Value::Object(map)).context("writing the settings")?;
        Ok(format!(
            "# Every setting of this run; feed it back with: peft train config.yaml --out OTHER\n{body}"
        ))
    }
}

/// The settings of LoRA with their defaults, but for what says whose file it is.
fn method_keys() -> Result<Map<String, Value>> {
    let mut map = as_map(&LoraConfig::default())?;
    for key in [
        "task_type",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "auto_mapping",
        "peft_version",
    ] {
        map.shift_remove(key);
    }
    Ok(map)
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

    fn set(text: &str) -> Result<Plan> {
        let mut plan = Plan::default();
        plan.set_text(text).map(|()| plan)
    }

    #[test]
    fn one_namespace_for_all_settings() {
        assert_eq!(set("r=4").unwrap().recipe.lora["r"], 4);
        assert_eq!(set("lora.r=4").unwrap().recipe.lora["r"], 4);
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
            set("target_modules=[q_proj, v_proj]").unwrap().recipe.lora["target_modules"],
            json!(["q_proj", "v_proj"])
        );
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

    #[test]
    fn what_is_written_can_be_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.yaml");
        let mut plan = set("rank_pattern={q_proj: 4}").unwrap();
        plan.recipe.prompts = vec!["say: \"no\" # really".into(), "two\nlines".into()];
        plan.recipe.data = vec!["a b.jsonl".into()];
        plan.set_text("lr_scheduler_kwargs={num_cycles: 0.4}")
            .unwrap();
        std::fs::write(&path, plan.to_yaml().unwrap()).unwrap();
        assert_eq!(Plan::read(&path).unwrap(), plan);
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
