//! The methods that `--method` knows, with the settings that each begins with here.
//!
//! Python's defaults are kept for files: a key that a file leaves out means what it means there. A
//! run that a person starts begins with the settings below instead, since some of Python's leave a method where
//! it started (virtual tokens drawn at random, one learning rate for all). `defaults: python` begins with Python's.

use anyhow::Result;
use peft::core::nearest;
use serde_json::{Map, Value, json};

use crate::error::usage;

/// One method.
#[derive(Debug)]
pub(crate) struct Method {
    /// As it is typed.
    pub(crate) name: &'static str,
    /// As it is written in a sentence.
    pub(crate) title: &'static str,
    /// The tag of its files; `None`: full fine-tuning, whose file is a model.
    pub(crate) peft_type: Option<&'static str>,
    /// In a line.
    pub(crate) about: &'static str,
    /// Settings in place of Python's, and why these.
    pub(crate) ours: fn() -> Value,
    /// The peak of the learning rate with these settings, for a model that goes on with texts.
    pub(crate) learning_rate: f64,
    /// The same for a model with a new head for classes or answers, which has to learn from nothing.
    pub(crate) learning_rate_of_heads: f64,
}

/// Every method, the usual one first.
pub(crate) const METHODS: &[Method] = &[
    Method {
        name: "lora",
        title: "LoRA",
        peft_type: Some("LORA"),
        about: "low-rank updates beside the weights (2106.09685)",
        // An adapter on every linear layer learns like full fine-tuning at most sizes of data; on the
        // attention alone it does not ("LoRA without regret", 2025).
        ours: || json!({"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}),
        learning_rate: 2e-4,
        learning_rate_of_heads: 2e-3,
    },
    Method {
        name: "qlora",
        title: "QLoRA",
        peft_type: Some("LORA"),
        about: "LoRA on a base that is kept in 4 bits (2305.14314)",
        // On all linear layers, which the paper found decisive; the rank hardly matters.
        ours: || json!({"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}),
        learning_rate: 2e-4,
        learning_rate_of_heads: 2e-3,
    },
    Method {
        name: "adalora",
        title: "AdaLoRA",
        peft_type: Some("ADALORA"),
        about: "LoRA that moves its rank to the layers that need it (2303.10512)",
        ours: || json!({"init_r": 12, "target_r": 8, "lora_alpha": 32, "target_modules": "all-linear"}),
        learning_rate: 5e-3,
        learning_rate_of_heads: 1e-2,
    },
    Method {
        name: "vera",
        title: "VeRA",
        peft_type: Some("VERA"),
        about: "two vectors a layer over random matrices that all layers share (2310.11454)",
        ours: || json!({"r": 256}),
        learning_rate: 2e-2,
        learning_rate_of_heads: 1e-2,
    },
    Method {
        name: "ia3",
        title: "(IA)³",
        peft_type: Some("IA3"),
        about: "one factor for each key, value and inner activation (2205.05638)",
        ours: || json!({}),
        learning_rate: 1e-2,
        learning_rate_of_heads: 1e-2,
    },
    Method {
        name: "bitfit",
        title: "BitFit",
        peft_type: Some("BITFIT"),
        about: "the biases alone (2106.10199)",
        ours: || json!({"add_bias": true}),
        learning_rate: 5e-3,
        learning_rate_of_heads: 1e-2,
    },
    Method {
        name: "ln",
        title: "LN tuning",
        peft_type: Some("LN_TUNING"),
        about: "the norms alone (2312.11420)",
        ours: || json!({}),
        learning_rate: 3e-3,
        learning_rate_of_heads: 1e-2,
    },
    Method {
        name: "prefix",
        title: "prefix tuning",
        peft_type: Some("PREFIX_TUNING"),
        about: "keys and values before those of every layer (2101.00190)",
        // Drawn from N(0, 1), as Python has it, they drown the text at first: SmolLM2 then starts at a loss of 8.7 instead
        // of 4.0 and is no better than its base after thirty steps. Zeros begin near the base.
        ours: || json!({"num_virtual_tokens": 20, "init_weights": "zero"}),
        learning_rate: 3e-2,
        learning_rate_of_heads: 1e-2,
    },
    Method {
        name: "prompt",
        title: "prompt tuning",
        peft_type: Some("PROMPT_TUNING"),
        about: "embeddings before those of the input (2104.08691)",
        // Drawn from N(0, 1) they are far longer than any real embedding and learn half as fast (held-out loss of SmolLM2 after
        // thirty steps 3.6, from rows of the vocabulary 3.0).
        ours: || json!({"num_virtual_tokens": 20, "prompt_tuning_init": "SAMPLE_VOCAB"}),
        learning_rate: 3e-2,
        learning_rate_of_heads: 3e-2,
    },
    Method {
        name: "p-tuning",
        title: "P-tuning",
        peft_type: Some("P_TUNING"),
        about: "such embeddings, computed by a small network (2103.10385)",
        ours: || json!({"num_virtual_tokens": 20}),
        learning_rate: 1e-3,
        learning_rate_of_heads: 1e-2,
    },
    Method {
        name: "full",
        title: "full fine-tuning",
        peft_type: None,
        about: "every parameter of the base, or those that `train_modules` names",
        ours: || json!({}),
        learning_rate: 2e-5,
        learning_rate_of_heads: 2e-4,
    },
];

/// The method whose base is kept in 4 bits where nothing else is said.
pub(crate) const QLORA: &str = "qlora";

/// The setting of full fine-tuning: which places are trained.
pub(crate) const TRAIN_MODULES: &str = "train_modules";

/// The setting of LoRA for how many rounds LoftQ takes.
pub(crate) const LOFTQ_CONFIG: &str = "loftq_config";

/// The setting of prefix tuning that no file has: the text at which it begins.
pub(crate) const PREFIX_INIT_TEXT: &str = "prefix_init_text";

/// The learning rate of `transformers`, which goes with `defaults: python`.
pub(crate) const PYTHONS_RATE: f64 = 5e-5;

impl Method {
    /// The method of this name; hyphens and capitals do not matter.
    pub(crate) fn named(name: &str) -> Result<&'static Method> {
        let plain = |text: &str| text.to_lowercase().replace(['-', '_', ' '], "");
        let wanted = plain(name);
        let alias = match wanted.as_str() {
            "prefixtuning" => "prefix",
            "prompttuning" => "prompt",
            "lntuning" | "norm" => "ln",
            "fullfinetuning" => "full",
            other => other,
        };
        let found = METHODS.iter().find(|it| plain(it.name) == alias);
        found.ok_or_else(|| {
            let names: Vec<&str> = METHODS.iter().map(|it| it.name).collect();
            let hint = nearest(name, names.iter().copied());
            let lines = METHODS
                .iter()
                .map(|it| format!("\n  {:<9} {}", it.name, it.about));
            let lines: String = lines.collect();
            usage(format!("unknown method `{name}`{hint}; known are{lines}"))
        })
    }

    /// Its settings with Python's defaults, but for what says whose file it is.
    pub(crate) fn keys(&self) -> Result<Map<String, Value>> {
        let Some(tag) = self.peft_type else {
            return Ok(Map::from_iter([(TRAIN_MODULES.to_owned(), Value::Null)]));
        };
        // What a method cannot be without; the values are replaced by those of the run.
        let least = match tag {
            "ADALORA" => json!({"peft_type": tag, "total_step": 1000}),
            "PREFIX_TUNING" | "PROMPT_TUNING" | "P_TUNING" => {
                json!({"peft_type": tag, "num_virtual_tokens": 20})
            }
            _ => json!({"peft_type": tag}),
        };
        let tuner = peft::builtin().parse(least);
        let mut map = match tuner?.to_json() {
            Value::Object(map) => map,
            other => anyhow::bail!("settings are keys and values, not {other}"),
        };
        for key in [
            "peft_type",
            "task_type",
            "base_model_name_or_path",
            "revision",
            "inference_mode",
            "auto_mapping",
            "peft_version",
        ] {
            map.shift_remove(key);
        }
        if tag == "PROMPT_TUNING" {
            map.insert("label_words".to_owned(), Value::Null); // written only where they are given
        }
        if tag == "LORA" {
            map.insert(LOFTQ_CONFIG.to_owned(), Value::Null); // read where a base is quantised
        }
        if tag == "PREFIX_TUNING" {
            map.insert(PREFIX_INIT_TEXT.to_owned(), Value::Null);
        }
        Ok(map)
    }

    /// Whether blocks are computed again in the backward pass where nobody says.
    pub(crate) fn checkpoints(&self) -> bool {
        self.name == QLORA // whose users want memory more than time
    }

    /// What a run begins with.
    pub(crate) fn ours(&self) -> Map<String, Value> {
        (self.ours)().as_object().cloned().unwrap_or_default()
    }
}
