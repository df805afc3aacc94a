//! What a model is for, by the names of Python's `peft`, and what every model can do whatever it is for.
//!
//! A task decides which head is on the body and what a label is. A language model alone can say more
//! ([`Decoder`](crate::Decoder)): it can be asked for the next token.

use std::{fmt, str::FromStr};

use peft_core::{Ctx, Model, Result, State, nearest};
use tch::{Device, Kind, Tensor};

use crate::{Decoder, Input, seq2seq::Seq2Seq};

/// What a model is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Task {
    /// The next token.
    CausalLm,
    /// The tokens that are hidden in a text.
    MaskedLm,
    /// A class, several, or numbers for a text.
    SeqCls,
    /// A class for each token.
    TokenCls,
    /// Where in a text the answer begins and ends.
    QuestionAns,
    /// A text for a text, by an encoder and a decoder.
    Seq2SeqLm,
    /// A vector for each token.
    FeatureExtraction,
}

impl Task {
    /// Every task with its name.
    pub const NAMES: [(&'static str, Task); 7] = [
        ("CAUSAL_LM", Task::CausalLm),
        ("MASKED_LM", Task::MaskedLm),
        ("SEQ_CLS", Task::SeqCls),
        ("TOKEN_CLS", Task::TokenCls),
        ("QUESTION_ANS", Task::QuestionAns),
        ("SEQ_2_SEQ_LM", Task::Seq2SeqLm),
        ("FEATURE_EXTRACTION", Task::FeatureExtraction),
    ];

    /// The name in capitals.
    pub fn name(self) -> &'static str {
        let found = Task::NAMES.iter().find(|(_, task)| *task == self);
        found.expect("every task is listed").0
    }

    /// The value of `task_type` in `adapter_config.json`; Python's `peft` has none for masked language models.
    pub fn task_type(self) -> Option<&'static str> {
        (self != Task::MaskedLm).then(|| self.name())
    }
}

impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A name that no task has.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown task `{found}`, known are {known:?}{hint}")]
pub struct UnknownTask {
    found: String,
    known: Vec<&'static str>,
    hint: String,
}

impl FromStr for Task {
    type Err = UnknownTask;

    /// Reads a name in any capitals, with `-` or `_`.
    fn from_str(text: &str) -> Result<Task, UnknownTask> {
        let name = text.to_ascii_uppercase().replace('-', "_");
        let found = Task::NAMES.iter().find(|(known, _)| *known == name);
        found.map(|(_, task)| *task).ok_or_else(|| {
            let known = Task::NAMES.map(|(name, _)| name);
            UnknownTask {
                found: text.to_owned(),
                hint: nearest(&name, known),
                known: known.to_vec(),
            }
        })
    }
}

/// What a batch should have got.
#[derive(Debug)]
pub enum Labels {
    /// A token or class for each position `[batch, seq]`, [`IGNORE`](crate::IGNORE) where nothing counts. For causal
    /// language models they are shifted, as `transformers` does it.
    Tokens(Tensor),
    /// A class for each row `[batch]`.
    Classes(Tensor),
    /// Which classes each row has `[batch, labels]`, 0 or 1.
    MultiLabel(Tensor),
    /// Numbers for each row, `[batch]` or `[batch, outputs]`.
    Values(Tensor),
    /// The first and the last token of each row's answer.
    Spans {
        /// `[batch]`
        start: Tensor,
        /// `[batch]`
        end: Tensor,
    },
}

impl Labels {
    /// What they are, for an error.
    pub(crate) fn sort(&self) -> &'static str {
        match self {
            Labels::Tokens(_) => "one for each token",
            Labels::Classes(_) => "one class for each row",
            Labels::MultiLabel(_) => "several classes for each row",
            Labels::Values(_) => "numbers for each row",
            Labels::Spans { .. } => "spans",
        }
    }
}

/// What the outputs of a classifier mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Problem {
    /// Exactly one class is right.
    SingleLabel,
    /// Any number of classes are right.
    MultiLabel,
    /// Outputs are numbers.
    Regression,
}

impl Problem {
    /// The values of `problem_type` in `config.json`.
    pub const NAMES: [(&'static str, Problem); 3] = [
        ("single_label_classification", Problem::SingleLabel),
        ("multi_label_classification", Problem::MultiLabel),
        ("regression", Problem::Regression),
    ];

    /// The name in `config.json`.
    pub fn name(self) -> &'static str {
        let found = Problem::NAMES.iter().find(|(_, it)| *it == self);
        found.expect("every problem is listed").0
    }

    /// The problem of this name.
    pub fn named(name: &str) -> Option<Problem> {
        let found = Problem::NAMES.iter().find(|(known, _)| *known == name);
        found.map(|(_, it)| *it)
    }
}

/// What a head tells apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Classes {
    /// A name for each output.
    pub names: Vec<String>,
    /// What an output means; `None` in `config.json` is decided by the labels: whole numbers are classes, others are
    /// marks for several, and a single output is a number.
    pub problem: Option<Problem>,
}

/// A model of any task.
pub trait Network: Model {
    /// What it is for.
    fn task(&self) -> Task;
    /// What Python's model returns, by its names: `logits`; `start_logits` and `end_logits`; `last_hidden_state`.
    ///
    /// An error where the batch does not fit the model.
    fn outputs(&self, input: &Input, ctx: Ctx) -> Result<State>;
    /// The sum of the losses, a scalar in fp32, and the number that it is divided by for Python's mean: rows, elements
    /// or labelled tokens. An error for labels of the wrong sort or out of range.
    fn loss(&self, input: &Input, labels: &Labels, ctx: Ctx) -> Result<(Tensor, i64)>;
    /// Number of tokens it knows.
    fn vocab(&self) -> i64;
    /// Where its weights are.
    fn device(&self) -> Device;
    /// The dtype it computes in.
    fn kind(&self) -> Kind;
    /// The longest row it was made for, less the virtual tokens in front of it; `i64::MAX` where it only knows how far
    /// two tokens are apart.
    fn max_positions(&self) -> i64;
    /// Positions are looked up in a table, so that there are none beyond [`Network::max_positions`].
    fn learned_positions(&self) -> bool;
    /// `config.json`, as it would be saved.
    fn config(&self) -> &serde_json::Value;
    /// What its head tells apart, where it has classes.
    fn classes(&self) -> Option<&Classes>;
    /// Tensors that the checkpoint lacked and that were drawn at random: they mean nothing until they are trained.
    fn fresh(&self) -> &[String];
    /// Tensors of the checkpoint that belong to another task's head and were left aside.
    fn aside(&self) -> &[String];
    /// The same as a language model that goes on from a text; `None` for others.
    fn decoder(&self) -> Option<&dyn Decoder>;
    /// The same as a model that writes a text for a text; `None` for others.
    fn seq2seq(&self) -> Option<&dyn Seq2Seq>;
}

/// The names of `n` classes that nobody has named.
pub(crate) fn unnamed(n: i64) -> Vec<String> {
    (0..n).map(|i| format!("LABEL_{i}")).collect()
}

/// `id2label` and `label2id`, as `config.json` has them.
pub(crate) fn label_maps(names: &[String]) -> [serde_json::Value; 2] {
    let mut ids = serde_json::Map::new();
    let mut labels = serde_json::Map::new();
    for (i, name) in names.iter().enumerate() {
        ids.insert(i.to_string(), name.as_str().into());
        labels.insert(name.clone(), i.into());
    }
    [ids.into(), labels.into()]
}
