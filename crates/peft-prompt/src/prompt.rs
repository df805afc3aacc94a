//! `adapter_config.json` of a prompt: every key of Python's `PromptTuningConfig`, with its default.

use peft_core::{
    Common, Config, Error, Form, Injection, Outline, Result, Site, Slot, Start, Tuner, Unmodelled,
    VirtualTokens, save_whole,
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tch::{Kind, Tensor};

use crate::{begin, table::Table};

/// Prompt tuning (2104.08691), as it is configured and saved.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct PromptConfig {
    /// How many tokens, and the sizes of the model.
    #[serde(flatten)]
    pub tokens: VirtualTokens,
    /// How the rows begin.
    pub prompt_tuning_init: PromptInit,
    /// The text to begin at.
    pub prompt_tuning_init_text: Option<String>,
    /// The folder or hub id of the tokenizer of that text. Python refuses a file with a text and without it.
    pub tokenizer_name_or_path: Option<String>,
    /// What Python passes to that tokenizer besides.
    pub tokenizer_kwargs: Option<Map<String, Value>>,
    /// The words of the classes to begin at, one row each; not in Python, which passes over it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub label_words: Option<Vec<String>>,
    /// The tokens of each word to begin at, which a tokenizer knows; a text is words of one token. Not saved.
    #[serde(skip)]
    pub init_ids: Option<Vec<Vec<i64>>>,
    /// What every method's file has.
    #[serde(flatten)]
    pub common: Common,
    /// The keys that this crate does not read.
    #[serde(flatten)]
    pub rest: Unmodelled,
}

/// How the rows begin: `prompt_tuning_init`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum PromptInit {
    /// At the tokens of a text.
    Text,
    /// At random tokens.
    SampleVocab,
    /// At random, or at `label_words`.
    #[default]
    Random,
}

impl PromptConfig {
    /// The defaults of Python's `peft` with this many virtual tokens.
    pub fn of(tokens: i64) -> PromptConfig {
        PromptConfig {
            tokens: VirtualTokens::new(tokens),
            ..PromptConfig::default()
        }
    }

    /// Beginning at a text, whose tokens a tokenizer gives; `tokenizer`: where Python finds it.
    pub fn with_text(mut self, text: &str, tokenizer: &str, ids: &[i64]) -> PromptConfig {
        self.prompt_tuning_init = PromptInit::Text;
        self.prompt_tuning_init_text = Some(text.to_owned());
        self.tokenizer_name_or_path = Some(tokenizer.to_owned());
        self.init_ids = Some(ids.iter().map(|&id| vec![id]).collect());
        self
    }

    /// Beginning at the words of the classes, each with its tokens. Without a number of virtual tokens there is one a class.
    pub fn with_labels(mut self, labels: &[(&str, &[i64])]) -> PromptConfig {
        self.prompt_tuning_init = PromptInit::Random;
        self.label_words = Some(labels.iter().map(|it| it.0.to_owned()).collect());
        self.init_ids = Some(labels.iter().map(|it| it.1.to_vec()).collect());
        self
    }

    pub(crate) fn fault(reason: impl Into<String>) -> Error {
        Error::Config {
            peft_type: PromptConfig::PEFT_TYPE.to_owned(),
            reason: reason.into(),
        }
    }

    /// The rows as they begin `[rows, width]`; words: `[vocab, width]`.
    fn begin(&self, words: &Tensor) -> Result<Tensor> {
        let (rows, width) = (self.tokens.rows(), self.tokens.width());
        let ids = |what: &str, call: &str| {
            self.init_ids.as_deref().ok_or_else(|| {
                PromptConfig::fault(format!(
                    "{what}, whose tokens a tokenizer has to give: call `PromptConfig::{call}` or set `init_ids`"
                ))
            })
        };
        match (self.prompt_tuning_init, &self.label_words) {
            (PromptInit::Random, None) => begin::random(words, rows, width),
            (PromptInit::SampleVocab, _) => begin::sampled(words, rows, width),
            (PromptInit::Text, _) => {
                let ids = ids(
                    "prompt_tuning_init TEXT begins at prompt_tuning_init_text",
                    "with_text",
                )?;
                begin::at_words(words, rows, ids)
            }
            (PromptInit::Random, Some(labels)) => {
                let ids = ids("label_words are words to begin at", "with_labels")?;
                if ids.len() != labels.len() {
                    return Err(PromptConfig::fault(format!(
                        "there are {} label_words, and init_ids for {}",
                        labels.len(),
                        ids.len()
                    )));
                }
                if (rows as usize) < ids.len() {
                    return Err(PromptConfig::fault(format!(
                        "{} label_words do not begin {rows} virtual tokens; leave out num_virtual_tokens, or take more",
                        ids.len()
                    )));
                }
                begin::at_words(words, rows, ids)
            }
        }
    }
}

impl Config for PromptConfig {
    const PEFT_TYPE: &'static str = "PROMPT_TUNING";

    fn unmodelled(&self) -> &Unmodelled {
        &self.rest
    }

    /// Python's rules, so that a file written here can be read there.
    fn check(&self) -> Result<()> {
        self.tokens.check(PromptConfig::PEFT_TYPE)?;
        let must = |fine: bool, reason: &str| match fine {
            true => Ok(()),
            false => Err(PromptConfig::fault(reason)),
        };
        let text = self.prompt_tuning_init == PromptInit::Text;
        let tokenizer = self.tokenizer_name_or_path.as_deref().unwrap_or_default();
        must(
            !text || !tokenizer.is_empty(),
            "prompt_tuning_init TEXT wants tokenizer_name_or_path",
        )?;
        must(
            !text || self.prompt_tuning_init_text.is_some(),
            "prompt_tuning_init TEXT wants prompt_tuning_init_text",
        )?;
        must(
            text || self.tokenizer_kwargs.as_ref().is_none_or(Map::is_empty),
            "tokenizer_kwargs are for prompt_tuning_init TEXT",
        )?;
        let Some(labels) = &self.label_words else {
            return Ok(());
        };
        must(!labels.is_empty(), "label_words is empty")?;
        must(
            self.prompt_tuning_init == PromptInit::Random,
            "label_words go with prompt_tuning_init RANDOM, under which Python loads them",
        )
    }
}

impl Tuner for PromptConfig {
    fn peft_type(&self) -> &'static str {
        PromptConfig::PEFT_TYPE
    }

    fn resolve(&self, outline: &Outline) -> Result<Box<dyn Tuner>> {
        self.check()?;
        let mut resolved = self.clone();
        let labels = self.label_words.as_ref().map(|it| it.len() as i64);
        resolved.tokens.num_virtual_tokens = self.tokens.num_virtual_tokens.or(labels);
        let tag = PromptConfig::PEFT_TYPE;
        resolved.tokens = resolved
            .tokens
            .resolved(tag, Form::Embeds, &self.common, outline)?;
        Ok(Box::new(resolved))
    }

    fn wants(&self, site: &Site, _: &Outline) -> Result<bool> {
        Ok(self.tokens.wants(site))
    }

    fn attach(&self, _: &str, slot: Slot<'_>, injection: &mut Injection<'_>) -> Result<()> {
        let Slot::Prompt(slot) = slot else {
            save_whole(injection.name, slot);
            return Ok(());
        };
        let (words, tokens) = (slot.words(), &self.tokens);
        let rows = match injection.start {
            Start::Fresh => self.begin(words)?,
            Start::Saved | Start::Resumed => {
                let shape = [tokens.rows(), tokens.width()];
                Tensor::f_zeros(shape, (Kind::Float, words.device()))?
            }
        };
        let table = Table::new(&rows, tokens.tokens(), true);
        slot.attach(injection.name, Box::new(table));
        Ok(())
    }

    fn to_json(&self) -> Value {
        // Strings, numbers and lists of them: there is nothing that could fail to be written.
        let mut json = serde_json::to_value(self).unwrap_or_default();
        json["peft_type"] = PromptConfig::PEFT_TYPE.into();
        json
    }

    fn key(&self, at: &str, param: &str) -> String {
        VirtualTokens::key(at, param)
    }

    fn live_key(&self, at: &str, param: &str) -> String {
        VirtualTokens::live_key(at, param)
    }
}
