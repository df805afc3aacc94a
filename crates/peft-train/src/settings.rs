//! What a person can set about training, under the names that Hugging Face's `TrainingArguments` gives them.
//!
//! One flat struct that is read from and written to YAML or JSON. The defaults
//! are for LoRA and a beginner, so they differ from Hugging Face's where those
//! are for pre-training: a learning rate of 2e-4, ten times what full
//! fine-tuning wants, along half a cosine after a warm-up of 3 % of the steps,
//! and every step is logged.
//!
//! A misspelt key would silently train something else; it is an error that
//! names the nearest one.

use peft_codec::STATE_BLOCK;
use peft_core::Ctx;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tch::{Device, Tensor};

use crate::eight_bits::SMALLEST;
use crate::error::{Error, Result};
use crate::schedule::{Schedule, ScheduleType};

/// The settings of the loop.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Peak of the learning rate.
    pub learning_rate: f64,
    /// Rows in a batch that is held in memory at once. `batch_size` is understood, too.
    #[serde(alias = "batch_size")]
    pub per_device_train_batch_size: usize,
    /// Rows in a batch of evaluation. `eval_batch_size` is understood, too.
    #[serde(alias = "eval_batch_size")]
    pub per_device_eval_batch_size: usize,
    /// Batches whose gradients are added up for one step.
    pub gradient_accumulation_steps: usize,
    /// Blocks of the model are computed again in the backward pass instead of being kept: the same numbers to the bit, in
    /// less memory, for one forward pass through the blocks more.
    pub gradient_checkpointing: bool,
    /// How often all rows are seen; may be a fraction. `epochs` is understood, too.
    #[serde(alias = "epochs")]
    pub num_train_epochs: f64,
    /// Stops after so many steps, whatever the epochs; -1: never.
    pub max_steps: i64,
    /// How the learning rate moves.
    pub lr_scheduler_type: ScheduleType,
    /// Further settings of the schedule, such as `num_cycles`.
    pub lr_scheduler_kwargs: Map<String, Value>,
    /// Steps over which the learning rate rises; below 1: that part of all steps.
    pub warmup_steps: Option<f64>,
    /// The part of all steps over which the learning rate rises; 0.03 if neither is given.
    pub warmup_ratio: Option<f64>,
    /// How AdamW keeps its moments.
    pub optim: Optim,
    /// λ of AdamW, for all but biases and norms.
    pub weight_decay: f64,
    /// Decay of AdamW's running mean.
    pub adam_beta1: f64,
    /// Decay of AdamW's running mean of squares.
    pub adam_beta2: f64,
    /// Added to AdamW's root.
    pub adam_epsilon: f64,
    /// Gradients are scaled down to this norm; 0: never.
    pub max_grad_norm: f64,
    /// Steps between two lines of the log.
    pub logging_steps: usize,
    /// Steps between two evaluations on held-out rows; about a fifth of the run if not given.
    pub eval_steps: Option<usize>,
    /// Evaluates before the first step as well.
    pub eval_on_start: bool,
    /// Steps between two checkpoints; 0: only when interrupted.
    pub save_steps: usize,
    /// Stops after so many evaluations in a row without a better one.
    pub early_stopping_patience: Option<usize>,
    /// By how much the loss must fall to count as better.
    pub early_stopping_threshold: f64,
    /// Puts rows of like length together, so that less is padding.
    pub group_by_length: bool,
    /// Batches are made as wide as the next multiple of this. Kernels for bf16 on processors are
    /// compiled and kept for each shape, so with every width a shape of its own memory would grow for long.
    pub pad_to_multiple_of: usize,
    /// Of everything random: initial values, order, dropout.
    pub seed: u64,
}

/// How AdamW keeps its moments, by the names of `transformers`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Optim {
    /// In the dtype of what is trained.
    #[default]
    #[serde(rename = "adamw_torch", alias = "adamw_torch_fused")]
    AdamwTorch,
    /// In 8 bits, of tensors with 4096 numbers or more.
    #[serde(rename = "adamw_8bit", alias = "adamw_bnb_8bit")]
    Adamw8bit,
    /// As [`Optim::AdamwTorch`], in pages that leave a GPU that is full.
    #[serde(rename = "paged_adamw_32bit", alias = "paged_adamw")]
    PagedAdamw32bit,
    /// As [`Optim::Adamw8bit`], in pages that leave a GPU that is full.
    #[serde(rename = "paged_adamw_8bit")]
    PagedAdamw8bit,
    /// As [`Optim::AdamwTorch`], but in main memory, wherever the model is. Of our own.
    #[serde(rename = "offloaded_adamw_32bit")]
    OffloadedAdamw32bit,
    /// As [`Optim::Adamw8bit`], but in main memory, wherever the model is. Of our own.
    #[serde(rename = "offloaded_adamw_8bit")]
    OffloadedAdamw8bit,
}

/// Where moments are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// Where the model is.
    Here,
    /// As [`Keep::Here`]; from a GPU that is full the driver moves them to main memory, and back for the step (CUDA's unified
    /// memory, as `bitsandbytes` has it).
    Paged,
    /// In main memory, where the step is taken by the processor: of a few million numbers it takes milliseconds.
    MainMemory,
}

/// Moments of tensors with fewer numbers are not worth pages of their own (the rule of `bitsandbytes`).
const PAGED: usize = 100_000;

impl Keep {
    /// Whether moments of this tensor get pages that move. Main memory's do anyway.
    pub(crate) fn pages(self, tensor: &Tensor) -> bool {
        self == Keep::Paged && tensor.device() != Device::Cpu && tensor.numel() >= PAGED
    }
}

impl Optim {
    /// Whether moments are in 8 bits.
    pub fn in_8_bits(self) -> bool {
        matches!(
            self,
            Optim::Adamw8bit | Optim::PagedAdamw8bit | Optim::OffloadedAdamw8bit
        )
    }

    /// Bytes of both moments of a tensor of so many numbers, each of `size` bytes.
    pub fn moments(self, numbers: usize, size: usize) -> usize {
        match self.in_8_bits() && numbers >= SMALLEST {
            true => 2 * (numbers + 4 * numbers.div_ceil(STATE_BLOCK)),
            false => 2 * numbers * size,
        }
    }

    /// Where moments are kept.
    pub fn keep(self) -> Keep {
        match self {
            Optim::AdamwTorch | Optim::Adamw8bit => Keep::Here,
            Optim::PagedAdamw32bit | Optim::PagedAdamw8bit => Keep::Paged,
            Optim::OffloadedAdamw32bit | Optim::OffloadedAdamw8bit => Keep::MainMemory,
        }
    }
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            learning_rate: 2e-4,
            per_device_train_batch_size: 8,
            per_device_eval_batch_size: 8,
            gradient_accumulation_steps: 1,
            gradient_checkpointing: false,
            optim: Optim::AdamwTorch,
            num_train_epochs: 3.0,
            max_steps: -1,
            lr_scheduler_type: ScheduleType::Cosine,
            lr_scheduler_kwargs: Map::new(),
            warmup_steps: None,
            warmup_ratio: None,
            weight_decay: 0.0,
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            adam_epsilon: 1e-8,
            max_grad_norm: 1.0,
            logging_steps: 1,
            eval_steps: None,
            eval_on_start: true,
            save_steps: 100,
            early_stopping_patience: None,
            early_stopping_threshold: 0.0,
            group_by_length: false,
            pad_to_multiple_of: 8,
            seed: 42,
        }
    }
}

/// Short names that are understood, each with the setting that it means.
const ALIASES: [(&str, &str); 3] = [
    ("batch_size", "per_device_train_batch_size"),
    ("eval_batch_size", "per_device_eval_batch_size"),
    ("epochs", "num_train_epochs"),
];

/// The part of the steps over which the learning rate rises where nothing is said.
const WARMUP: f64 = 0.03;
/// A batch is at most so wide for its width's sake.
const WIDEST: usize = 1 << 16;

impl Settings {
    /// Training mode, as these settings have it.
    pub fn ctx(&self) -> Ctx<'static> {
        Ctx {
            checkpoint: self.gradient_checkpointing,
            ..Ctx::TRAIN
        }
    }

    /// The names of all settings, long ones first, then the short ones.
    pub fn keys() -> Vec<String> {
        let json = serde_json::to_value(Settings::default()).unwrap_or_default();
        let long = json.as_object().into_iter().flat_map(Map::keys).cloned();
        long.chain(ALIASES.iter().map(|(short, _)| (*short).to_owned()))
            .collect()
    }

    /// Reads settings from a map. Unknown keys and impossible values are errors that name them.
    pub fn from_map(map: Map<String, Value>) -> Result<Settings> {
        let mut settings = Settings::default();
        for (key, value) in map {
            settings.set(&key, value)?;
        }
        settings.check()?;
        Ok(settings)
    }

    /// Changes one setting by its name. Ranges are not looked at before [`Settings::check`].
    pub fn set(&mut self, key: &str, value: Value) -> Result<()> {
        let long = ALIASES
            .iter()
            .find(|(short, _)| *short == key)
            .map_or(key, |(_, long)| long);
        let as_json = |error: serde_json::Error| {
            let names = [
                ("usize", "a whole number"),
                ("u64", "a whole number"),
                ("f64", "a number"),
                ("a map", "keys and values"),
            ];
            let text = names
                .iter()
                .fold(error.to_string(), |text, (of_rust, plain)| {
                    text.replace(&format!("expected {of_rust}"), &format!("expected {plain}"))
                });
            Error::setting(key, text)
        };
        let Value::Object(mut map) = serde_json::to_value(&*self).map_err(as_json)? else {
            return Err(Error::setting(key, "settings are a map"));
        };
        if !map.contains_key(long) {
            let keys = Settings::keys();
            return Err(Error::UnknownSetting {
                key: key.to_owned(),
                hint: peft_core::nearest(key, keys.iter().map(String::as_str)),
            });
        }
        let value = match (long, value) {
            // As Python's arguments are printed and read.
            ("lr_scheduler_kwargs", Value::Null) => Value::Object(Map::new()),
            ("max_grad_norm", Value::Null) => Value::from(0.0),
            (_, value) => whole(value),
        };
        map.insert(long.to_owned(), value);
        *self = serde_json::from_value(Value::Object(map)).map_err(as_json)?;
        Ok(())
    }

    /// Checks every range, and whether the schedule's own settings fit it.
    pub fn check(&self) -> Result<()> {
        let within = |key: &str, value: f64, ok: bool, want: &str| {
            if ok {
                Ok(())
            } else {
                Err(Error::setting(key, format!("{value} is not {want}")))
            }
        };
        let at_least_one =
            |key: &str, value: usize| within(key, value as f64, value > 0, "1 or more");
        let not_negative = |key: &str, value: f64| {
            within(key, value, value >= 0.0 && value.is_finite(), "0 or more")
        };
        let part = |key: &str, value: f64| {
            within(
                key,
                value,
                (0.0..1.0).contains(&value),
                "at least 0 and below 1",
            )
        };
        let rate = self.learning_rate;
        within(
            "learning_rate",
            rate,
            rate > 0.0 && rate.is_finite(),
            "more than 0",
        )?;
        at_least_one(
            "per_device_train_batch_size",
            self.per_device_train_batch_size,
        )?;
        at_least_one(
            "per_device_eval_batch_size",
            self.per_device_eval_batch_size,
        )?;
        at_least_one(
            "gradient_accumulation_steps",
            self.gradient_accumulation_steps,
        )?;
        let epochs = self.num_train_epochs;
        within(
            "num_train_epochs",
            epochs,
            epochs > 0.0 && epochs.is_finite(),
            "more than 0",
        )?;
        let steps = self.max_steps;
        within(
            "max_steps",
            steps as f64,
            steps > 0 || steps == -1,
            "1 or more, or -1 for none",
        )?;
        if let (Some(_), Some(_)) = (self.warmup_steps, self.warmup_ratio) {
            let reason = "give this or `warmup_steps`, not both";
            return Err(Error::setting("warmup_ratio", reason));
        }
        not_negative("warmup_steps", self.warmup_steps.unwrap_or(0.0))?;
        part("warmup_ratio", self.warmup_ratio.unwrap_or(0.0))?;
        not_negative("weight_decay", self.weight_decay)?;
        part("adam_beta1", self.adam_beta1)?;
        part("adam_beta2", self.adam_beta2)?;
        not_negative("adam_epsilon", self.adam_epsilon)?;
        not_negative("max_grad_norm", self.max_grad_norm)?;
        at_least_one("logging_steps", self.logging_steps)?;
        at_least_one("eval_steps", self.eval_steps.unwrap_or(1))?;
        at_least_one(
            "early_stopping_patience",
            self.early_stopping_patience.unwrap_or(1),
        )?;
        not_negative("early_stopping_threshold", self.early_stopping_threshold)?;
        at_least_one("pad_to_multiple_of", self.pad_to_multiple_of)?;
        if self.pad_to_multiple_of > WIDEST {
            let reason = format!("{} is beyond {WIDEST}", self.pad_to_multiple_of);
            return Err(Error::setting("pad_to_multiple_of", reason));
        }
        if i64::try_from(self.seed).is_err() {
            return Err(Error::setting(
                "seed",
                format!("{} is beyond {}", self.seed, i64::MAX),
            ));
        }
        Schedule::new(self, 1).map(drop)
    }

    /// How many of `total` steps the learning rate rises.
    pub fn warmup(&self, total: usize) -> usize {
        match (self.warmup_steps, self.warmup_ratio) {
            (Some(steps), _) if steps >= 1.0 => steps as usize,
            (Some(part), _) | (None, Some(part)) => (total as f64 * part).ceil() as usize,
            (None, None) => (total as f64 * WARMUP).ceil() as usize,
        }
    }

    /// How many steps an epoch of so many batches has; the last may be of fewer batches.
    pub fn steps_per_epoch(&self, batches: usize) -> usize {
        batches.div_ceil(self.gradient_accumulation_steps.max(1))
    }

    /// How many steps a run has whose epoch is of so many batches.
    pub fn total_steps(&self, batches: usize) -> usize {
        match usize::try_from(self.max_steps) {
            Ok(steps) => steps,
            Err(_) => {
                (self.num_train_epochs * self.steps_per_epoch(batches) as f64).ceil() as usize
            }
        }
    }

    /// Steps between two evaluations in a run of `total` steps.
    pub fn evaluate_every(&self, total: usize) -> usize {
        self.eval_steps.unwrap_or_else(|| total.div_ceil(5).max(1))
    }
}

/// `8.0` for `8` where a whole number is meant, as YAML's `1e3` gives it.
fn whole(value: Value) -> Value {
    match value.as_f64() {
        Some(x) if !value.is_i64() && !value.is_u64() && x.fract() == 0.0 && x.abs() < 1e15 => {
            Value::from(x as i64)
        }
        _ => value,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(json: Value) -> Result<Settings> {
        Settings::from_map(json.as_object().unwrap().clone())
    }

    #[test]
    fn a_misspelt_key_names_the_nearest() {
        let error = read(json!({"learning_rte": 1e-3})).unwrap_err().to_string();
        assert_eq!(
            error,
            "unknown setting `learning_rte`; nearest is `learning_rate`"
        );
    }

    #[test]
    fn short_names_mean_the_long_ones() {
        let it = read(json!({"batch_size": 3, "epochs": 2, "max_steps": 1e3})).unwrap();
        assert_eq!((it.per_device_train_batch_size, it.max_steps), (3, 1000));
        assert_eq!(it.num_train_epochs, 2.0);
    }

    #[test]
    fn nothing_means_what_it_means_to_python() {
        let it = read(json!({"lr_scheduler_kwargs": null, "max_grad_norm": null})).unwrap();
        assert!(it.lr_scheduler_kwargs.is_empty() && it.max_grad_norm == 0.0);
        let error = read(json!({"eval_steps": 0.5})).unwrap_err().to_string();
        assert!(
            error.contains("`eval_steps`") && error.contains("expected a whole number"),
            "{error}"
        );
    }

    #[test]
    fn impossible_values_are_refused_by_name() {
        let bad = [
            json!({"learning_rate": -1.0}),
            json!({"batch_size": 0}),
            json!({"max_steps": 0}),
            json!({"adam_beta1": 1.0}),
            json!({"warmup_steps": 3, "warmup_ratio": 0.1}),
            json!({"seed": u64::MAX}),
            json!({"lr_scheduler_type": "cosinus"}),
            json!({"lr_scheduler_kwargs": {"cycles": 2}}),
            json!({"logging_steps": "often"}),
            json!({"gradient_checkpointing": 1}),
            json!({"pad_to_multiple_of": 1u64 << 63}),
        ];
        for json in bad {
            let key = json
                .as_object()
                .unwrap()
                .keys()
                .next_back()
                .unwrap()
                .clone();
            let long = ALIASES
                .iter()
                .find(|(s, _)| *s == key)
                .map_or(key.as_str(), |(_, l)| l);
            let error = read(json).unwrap_err().to_string();
            assert!(
                error.contains(long) || error.contains(&key),
                "{key}: {error}"
            );
        }
    }

    #[test]
    fn steps_are_counted_as_hugging_face_counts() {
        let it = read(json!({"epochs": 1.5, "gradient_accumulation_steps": 4})).unwrap();
        assert_eq!((it.steps_per_epoch(10), it.total_steps(10)), (3, 5));
        assert_eq!(it.warmup(100), 3);
        assert_eq!(read(json!({"warmup_steps": 0.05})).unwrap().warmup(30), 2);
        assert_eq!(read(json!({"warmup_steps": 7})).unwrap().warmup(30), 7);
        assert_eq!(read(json!({"warmup_steps": 0})).unwrap().warmup(30), 0);
    }

    #[test]
    fn settings_survive_json() {
        let it = Settings::default();
        let map = serde_json::to_value(&it)
            .unwrap()
            .as_object()
            .unwrap()
            .clone();
        assert_eq!(Settings::from_map(map).unwrap(), it);
    }
}
