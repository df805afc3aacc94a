//! What a model is trained for, and rows for each of it.
//!
//! | task | keys of a row | a row's label |
//! | --- | --- | --- |
//! | `causal-lm` | those of [`Format`](crate::Format) | its own tokens: [`prepare`](crate::prepare) |
//! | `seq-cls` | a text, maybe a second, and `label` or `labels` | a class, several, or numbers |
//! | `token-cls` | `tokens` or `words`, and `tags`, `labels`, `ner_tags`, … | a class for each word |
//! | `question-ans` | `question`, `context`, and `answers` or `answer`, `answer_start` | first and last token of the answer |
//! | `seq-2-seq-lm` | `source`, `target`; `input`, `output`; `prompt`, `completion`; `instruction`, `input`, `output` | the tokens of the target |
//! | `masked-lm` | `text`, or a file of prose | the tokens that are hidden |
//!
//! The texts of `seq-cls` are `text` and `text_pair`; or one of `sentence`;
//! `sentence1`, `sentence2`; `premise`, `hypothesis`; `question1`,
//! `question2`; `question`, `answer`. A row in which two of these could be meant
//! is refused, and [`Columns`] says which it is.
//!
//! A label is read as what it is in JSON: a string or an integer is a class, a
//! boolean is one of `false` and `true`, a number with a fraction anywhere in
//! the file makes all of them numbers to be predicted (a regression), a list of
//! strings names several classes of one row, a list of 0 and 1 has one for
//! each class. In a table, where everything is text, the column `label` holds
//! one class, or numbers if every cell is one, and the column `labels` holds
//! several, with `|` between them; words and tags are parted by blanks.

mod batch;
mod dataset;
mod detect;
mod encode;
mod labels;
mod make;
mod mask;
mod row;
mod show;
mod spans;

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result, nearest};
use crate::message::quoted;

pub use batch::{Targets, TaskBatch};
pub use dataset::{Pass, Target, TaskDataset, TaskReport, TaskRow};
pub use detect::{Detected, detect_task};
pub use make::prepare_task;
pub use show::{Shown, TaskPiece};
pub use spans::{Found, Question, Search};

/// What a model is trained for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Task {
    /// To go on with a text; see [`prepare`](crate::prepare).
    CausalLm,
    /// A class, or several, or numbers, for a whole text or pair of texts.
    SeqCls,
    /// A class for each word.
    TokenCls,
    /// Where in a context the answer to a question stands.
    QuestionAns,
    /// Another text.
    Seq2SeqLm,
    /// Words that were hidden.
    MaskedLm,
}

impl Task {
    /// All tasks.
    pub const ALL: [Task; 6] = [
        Task::CausalLm,
        Task::SeqCls,
        Task::TokenCls,
        Task::QuestionAns,
        Task::Seq2SeqLm,
        Task::MaskedLm,
    ];

    /// The name that [`FromStr`] takes: that of Hugging Face's `TaskType` in small letters.
    pub fn name(self) -> &'static str {
        match self {
            Task::CausalLm => "causal-lm",
            Task::SeqCls => "seq-cls",
            Task::TokenCls => "token-cls",
            Task::QuestionAns => "question-ans",
            Task::Seq2SeqLm => "seq-2-seq-lm",
            Task::MaskedLm => "masked-lm",
        }
    }
}

impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Task {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let plain = name.to_ascii_lowercase().replace('_', "-");
        let found = Task::ALL.into_iter().find(|task| task.name() == plain);
        found.ok_or_else(|| unknown("task", name, &plain, &Task::ALL.map(Task::name)))
    }
}

/// What is predicted of a text: the `problem_type` of Hugging Face's configurations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Problem {
    /// One class of several.
    SingleLabel,
    /// Any number of classes.
    MultiLabel,
    /// Numbers.
    Regression,
}

impl Problem {
    /// All problems.
    pub const ALL: [Problem; 3] = [
        Problem::SingleLabel,
        Problem::MultiLabel,
        Problem::Regression,
    ];

    /// The name in a model's configuration, and the one that [`FromStr`] takes.
    pub fn name(self) -> &'static str {
        match self {
            Problem::SingleLabel => "single_label_classification",
            Problem::MultiLabel => "multi_label_classification",
            Problem::Regression => "regression",
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Problem {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let found = Problem::ALL
            .into_iter()
            .find(|problem| problem.name() == name);
        found.ok_or_else(|| unknown("problem type", name, name, &Problem::ALL.map(Problem::name)))
    }
}

fn unknown(what: &str, name: &str, plain: &str, known: &[&str]) -> Error {
    let near = nearest(plain, known.iter().copied());
    let near = near.map_or(String::new(), |near| format!(", the nearest is `{near}`"));
    Error::Option(format!(
        "unknown {what} `{name}`, this build knows {}{near}",
        quoted(known)
    ))
}

/// Which columns are read, where their usual names do not say it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Columns {
    /// The text (of `seq-cls`, `masked-lm`), the words, or the source.
    pub text: Option<String>,
    /// The second text of `seq-cls`, or the target of `seq-2-seq-lm`.
    pub pair: Option<String>,
    /// The label of `seq-cls`, or the tags of `token-cls`.
    pub label: Option<String>,
}

/// How data files become rows of a task.
#[derive(Debug, Clone, PartialEq)]
pub struct TaskOptions {
    /// What is trained.
    pub task: Task,
    /// What is predicted by `seq-cls`; read off the labels where it is not given.
    pub problem: Option<Problem>,
    /// The classes in the model's order; those of the data, sorted, where they are not given.
    pub classes: Option<Vec<String>>,
    /// Which columns are read.
    pub columns: Columns,
    /// Whether rows have labels. Where not, they are only to be answered, and labels are not read
    /// even where there are some.
    pub labelled: bool,
    /// Tokens of a row at most, special ones included. The longer text of a pair is cut first;
    /// a context, and a text for `masked-lm`, goes on in a further row.
    pub max_length: usize,
    /// Tokens of a target at most.
    pub max_target_length: usize,
    /// Tokens that two windows of one context have in common.
    pub doc_stride: usize,
    /// Give a word's tag to all its tokens (`B-X` to the first, `I-X` to the others), not to its
    /// first alone.
    pub label_all_tokens: bool,
    /// The part of the tokens that `masked-lm` hides.
    pub mask_probability: f64,
    /// What decides which tokens are hidden.
    pub mask_seed: u64,
}

impl TaskOptions {
    /// The usual for a task: Hugging Face's, in its examples.
    pub fn of(task: Task) -> Self {
        Self {
            task,
            problem: None,
            classes: None,
            columns: Columns::default(),
            labelled: true,
            max_length: if task == Task::QuestionAns { 384 } else { 512 },
            max_target_length: 128,
            doc_stride: 128,
            label_all_tokens: false,
            mask_probability: 0.15,
            mask_seed: 0,
        }
    }

    /// With rows of another length: windows have a third in common at most, as 128 of 384 tokens are.
    pub fn with_max_length(self, max_length: usize) -> Self {
        Self {
            max_length,
            doc_stride: self.doc_stride.min(max_length / 3),
            ..self
        }
    }
}
