//! Rows of a task, and batches of them.
//!
//! They are kept in memory, end to end: data with labels is small beside the
//! prose that causal models eat, and takes a second to tokenise.

use std::ops::Range;

use super::batch::{Frame, Targets, TaskBatch};
use super::mask::{EVALUATION, Masking};
use super::spans::{Found, Places, Question, Scored, Search, search};
use super::{Problem, Task};
use crate::batch::{Holdout, IGNORED, Side, split};
use crate::error::{Error, Result};
use crate::prepare::FileReport;

/// A tokenised data set of a task.
#[derive(Debug)]
pub struct TaskDataset {
    pub(super) task: Task,
    pub(super) rows: Rows,
    pub(super) labels: Labels,
    /// The windows of contexts, a row each, for `question-ans`.
    pub(super) windows: Vec<Window>,
    /// Where words begin in a row: word and token, for `token-cls`.
    pub(super) words: Vec<Vec<(u32, u32)>>,
    pub(super) classes: Vec<String>,
    /// The example that each row is of.
    pub(super) example: Vec<usize>,
    pub(super) report: TaskReport,
    pub(super) pad_id: u32,
    pub(super) side: Side,
    pub(super) segments: bool,
    pub(super) masking: Option<Masking>,
    pub(super) questions: Vec<Question>,
    /// The texts that are to be said, for `seq-2-seq-lm`.
    pub(super) references: Vec<String>,
}

/// Sequences of tokens, end to end.
#[derive(Debug, Default)]
pub(super) struct Rows {
    ids: Vec<u32>,
    segments: Vec<u8>,
    ends: Vec<usize>,
}

impl Rows {
    pub(super) fn push(&mut self, ids: &[u32], segments: &[u32]) {
        self.ids.extend(ids);
        // Tokenizers give 0, 1, and in one family 2.
        self.segments.extend(
            segments
                .iter()
                .map(|it| u8::try_from(*it).unwrap_or(u8::MAX)),
        );
        self.ends.push(self.ids.len());
    }

    fn range(&self, at: usize) -> Range<usize> {
        let start = if at == 0 { 0 } else { self.ends[at - 1] };
        start..self.ends[at]
    }
}

/// The labels of all rows, in the sort of the task.
#[derive(Debug)]
pub(super) enum Labels {
    Classes(Vec<usize>),
    Flags(Vec<f32>),
    Numbers {
        outputs: usize,
        values: Vec<f32>,
    },
    /// As long as the ids of all rows.
    Tokens(Vec<i64>),
    /// Those of the windows.
    Spans,
    Decoder(Rows),
    Hidden,
    None,
}

/// A window of a context.
#[derive(Debug)]
pub(super) struct Window {
    pub(super) places: Places,
    pub(super) null: usize,
    pub(super) span: (usize, usize),
}

/// One row of a [`TaskDataset`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TaskRow<'a> {
    /// Token ids.
    pub ids: &'a [u32],
    /// Which text of a pair each token is of; empty where the tokenizer gives none.
    pub segments: &'a [u8],
    /// What the model is to say.
    pub target: Target<'a>,
}

/// The label of one row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Target<'a> {
    /// A class.
    Class(usize),
    /// A 0 or 1 for each class.
    Flags(&'a [f32]),
    /// Numbers.
    Numbers(&'a [f32]),
    /// A class for each token, or [`IGNORED`].
    Tokens(&'a [i64]),
    /// First and last token of the answer.
    Span(usize, usize),
    /// Another sequence.
    Sequence(&'a [u32]),
    /// Whatever is hidden: see [`TaskDataset::batch`].
    Hidden,
    /// Nothing: the row is only to be answered.
    None,
}

/// What a batch is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    /// Training: `masked-lm` hides other tokens each epoch.
    Train {
        /// Counted from 0.
        epoch: usize,
    },
    /// Evaluation: always the same.
    Eval,
}

/// What a data set holds, and what happened to it on the way.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TaskReport {
    /// Examples in all files.
    pub examples: usize,
    /// Rows: more than the examples where long ones go on in further rows.
    pub rows: usize,
    /// Tokens in all rows.
    pub tokens: usize,
    /// The longest row, in tokens.
    pub longest: usize,
    /// Examples that were cut off at `max_length` (`max_target_length`).
    pub truncated: usize,
    /// Words whose tag no token carries: cut off, or nothing to the tokenizer.
    pub lost_words: usize,
    /// Rows of nothing but special tokens, none of which could be hidden; they are left out.
    pub nothing_to_hide: usize,
    /// Questions none of whose windows holds an answer, of those that have one.
    pub lost_answers: usize,
    /// How often each class is a label, in the order of the classes.
    pub classes: Vec<(String, usize)>,
    /// Each file on its own.
    pub files: Vec<FileReport>,
}

impl TaskReport {
    /// What a person should know before training on this, a sentence each.
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        if self.truncated > 0 {
            warnings.push(format!(
                "{} of {} examples were cut off (raise max_length to keep them whole)",
                self.truncated, self.examples
            ));
        }
        if self.lost_words > 0 {
            warnings.push(format!(
                "the tags of {} words are lost: they were cut off, or are nothing to the tokenizer",
                self.lost_words
            ));
        }
        if self.nothing_to_hide > 0 {
            warnings.push(format!(
                "{} rows are left out: of special tokens alone, there is no word to hide",
                self.nothing_to_hide
            ));
        }
        if self.lost_answers > 0 {
            warnings.push(format!(
                "no window holds the whole answer of {} questions (raise max_length or doc_stride)",
                self.lost_answers
            ));
        }
        let empty = self.classes.iter().filter(|(_, count)| *count == 0);
        let empty: Vec<&String> = empty.map(|(name, _)| name).collect();
        if !empty.is_empty() && empty.len() < self.classes.len() {
            warnings.push(format!(
                "no row has the classes {}",
                crate::message::quoted(empty)
            ));
        }
        for file in self.files.iter().filter(|file| !file.ignored.is_empty()) {
            let keys = crate::message::quoted(file.ignored.keys());
            warnings.push(format!(
                "{}: nothing reads the keys {keys}",
                file.path.display()
            ));
        }
        warnings
    }
}

impl TaskDataset {
    /// What it is for.
    pub fn task(&self) -> Task {
        self.task
    }

    /// What is predicted of a text, for `seq-cls`.
    pub fn problem(&self) -> Option<Problem> {
        match self.labels {
            Labels::Classes(_) => Some(Problem::SingleLabel),
            Labels::Flags(_) => Some(Problem::MultiLabel),
            Labels::Numbers { .. } => Some(Problem::Regression),
            _ => None,
        }
    }

    /// The classes in the order of a model's outputs; none where classes are not predicted.
    pub fn classes(&self) -> &[String] {
        &self.classes
    }

    /// How many outputs a head needs: classes, or numbers of a regression, or 2 for answers.
    pub fn outputs(&self) -> Option<usize> {
        match &self.labels {
            Labels::Classes(_) | Labels::Flags(_) | Labels::Tokens(_) => Some(self.classes.len()),
            Labels::Numbers { outputs, .. } => Some(*outputs),
            Labels::Spans => Some(2),
            Labels::Decoder(_) | Labels::Hidden | Labels::None => None,
        }
    }

    /// How many rows there are.
    pub fn len(&self) -> usize {
        self.rows.ends.len()
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many tokens each row has.
    pub fn lengths(&self) -> Vec<usize> {
        (0..self.len())
            .map(|at| self.rows.range(at).len())
            .collect()
    }

    /// The example that row `at` is of, counted over all files.
    pub fn example_of(&self, at: usize) -> Option<usize> {
        self.example.get(at).copied()
    }

    /// Splits the rows into those to train on and those held out; windows of one example stay
    /// together.
    pub fn split(&self, holdout: Holdout, seed: u64) -> Result<(Vec<usize>, Vec<usize>)> {
        let (_, held_out) = split(self.report.examples, holdout, seed)?;
        let is_held_out = |row: &usize| held_out.binary_search(&self.example[*row]).is_ok();
        Ok((0..self.len()).partition(|row| !is_held_out(row)))
    }

    /// What it holds.
    pub fn report(&self) -> &TaskReport {
        &self.report
    }

    /// The questions of `question-ans`, an example each.
    pub fn questions(&self) -> &[Question] {
        &self.questions
    }

    /// The targets of `seq-2-seq-lm` as they were written, an example each.
    pub fn references(&self) -> &[String] {
        &self.references
    }

    /// Where the words of row `at` begin, for `token-cls`: the word in its example and its first
    /// token in the row. Words that were cut off are not among them.
    pub fn words(&self, at: usize) -> &[(u32, u32)] {
        self.words.get(at).map_or(&[], Vec::as_slice)
    }

    /// Row `at`, or nothing beyond the end.
    pub fn get(&self, at: usize) -> Option<TaskRow<'_>> {
        (at < self.len()).then(|| self.row(at))
    }

    /// The rows in order.
    pub fn rows(&self) -> impl ExactSizeIterator<Item = TaskRow<'_>> {
        (0..self.len()).map(|at| self.row(at))
    }

    fn row(&self, at: usize) -> TaskRow<'_> {
        let range = self.rows.range(at);
        let outputs = self.classes.len();
        TaskRow {
            ids: &self.rows.ids[range.clone()],
            segments: match self.segments {
                true => &self.rows.segments[range.clone()],
                false => &[],
            },
            target: match &self.labels {
                Labels::Classes(ids) => Target::Class(ids[at]),
                Labels::Flags(flags) => Target::Flags(&flags[at * outputs..][..outputs]),
                Labels::Numbers { outputs, values } => {
                    Target::Numbers(&values[at * outputs..][..*outputs])
                }
                Labels::Tokens(labels) => Target::Tokens(&labels[range]),
                Labels::Spans => {
                    let (start, end) = self.windows[at].span;
                    Target::Span(start, end)
                }
                Labels::Decoder(targets) => Target::Sequence(&targets.ids[targets.range(at)]),
                Labels::Hidden => Target::Hidden,
                Labels::None => Target::None,
            },
        }
    }

    /// Some of the rows as a rectangle, its width a multiple of `multiple_of` (0 and 1: any).
    pub fn batch(&self, rows: &[usize], pass: Pass, multiple_of: usize) -> Result<TaskBatch> {
        let row = |at: &usize| {
            self.get(*at)
                .ok_or_else(|| Error::Option(format!("no row {at}, there are {}", self.len())))
        };
        let seen = rows.iter().map(row).collect::<Result<Vec<TaskRow<'_>>>>()?;
        let frame = Frame::new(seen.iter().map(|row| row.ids.len()), self.side, multiple_of);
        let mut ids: Vec<Vec<i64>> = seen
            .iter()
            .map(|row| row.ids.iter().map(|id| i64::from(*id)).collect())
            .collect();
        let targets = self.targets(rows, &seen, &mut ids, frame, pass, multiple_of);
        let masks = seen.iter().map(|row| row.ids.iter().map(|_| 1));
        let segments = seen
            .iter()
            .map(|row| row.segments.iter().map(|it| i64::from(*it)));
        Ok(TaskBatch {
            rows: frame.rows,
            cols: frame.cols,
            attention_mask: frame.fill(masks, 0),
            token_type_ids: match self.segments {
                true => frame.fill(segments, 0),
                false => Vec::new(),
            },
            input_ids: frame.fill(ids.into_iter().map(Vec::into_iter), i64::from(self.pad_id)),
            targets,
            indices: rows.to_vec(),
        })
    }

    /// The labels of rows; tokens that are hidden are so in `ids`.
    fn targets(
        &self,
        rows: &[usize],
        seen: &[TaskRow<'_>],
        ids: &mut [Vec<i64>],
        frame: Frame,
        pass: Pass,
        multiple_of: usize,
    ) -> Targets {
        match &self.labels {
            Labels::Classes(classes) => {
                Targets::Classes(rows.iter().map(|at| classes[*at] as i64).collect())
            }
            Labels::Flags(_) | Labels::Numbers { .. } => {
                let values = seen.iter().flat_map(|row| match row.target {
                    Target::Flags(values) | Target::Numbers(values) => values,
                    _ => &[],
                });
                let values = values.copied().collect();
                let outputs = self.outputs().unwrap_or(0);
                match self.labels {
                    Labels::Flags(_) => Targets::Flags { outputs, values },
                    _ => Targets::Numbers { outputs, values },
                }
            }
            Labels::Tokens(_) => {
                let labels = seen.iter().map(|row| match row.target {
                    Target::Tokens(labels) => labels.iter().copied(),
                    _ => [].iter().copied(),
                });
                Targets::Tokens(frame.fill(labels, IGNORED))
            }
            Labels::Spans => {
                // Padding on the left moves the tokens, and the answer with them.
                let moved = |at: &usize, place: usize| {
                    (frame.start(self.rows.range(*at).len()) + place) as i64
                };
                let span = |at: &usize| self.windows[*at].span;
                Targets::Spans {
                    starts: rows.iter().map(|at| moved(at, span(at).0)).collect(),
                    ends: rows.iter().map(|at| moved(at, span(at).1)).collect(),
                }
            }
            Labels::Decoder(targets) => {
                let lengths = rows.iter().map(|at| targets.range(*at).len());
                // A decoder's rows start at their first token whatever the encoder's do.
                let frame = Frame::new(lengths, Side::Right, multiple_of);
                let row = |at: &usize| {
                    let ids = &targets.ids[targets.range(*at)];
                    ids.iter().map(|id| i64::from(*id))
                };
                Targets::Decoder {
                    cols: frame.cols,
                    labels: frame.fill(rows.iter().map(row), IGNORED),
                }
            }
            Labels::None => Targets::None,
            Labels::Hidden => {
                let stream = match pass {
                    Pass::Train { epoch } => epoch as u64,
                    Pass::Eval => EVALUATION,
                };
                let hide = |(at, ids): (&usize, &mut Vec<i64>)| match &self.masking {
                    Some(masking) => masking.hide(ids, stream, *at),
                    None => vec![IGNORED; ids.len()],
                };
                let labels: Vec<Vec<i64>> = rows.iter().zip(ids).map(hide).collect();
                Targets::Hidden(frame.fill(labels.into_iter().map(Vec::into_iter), IGNORED))
            }
        }
    }

    /// The answer to question `example`, from the scores of its rows' tokens.
    ///
    /// `scores` gives for a row its starts and ends, `[tokens]` each, without padding.
    pub fn answer<'s>(
        &self,
        example: usize,
        scores: impl Fn(usize) -> (&'s [f32], &'s [f32]),
        how: &Search,
    ) -> Result<Found> {
        let Some(question) = self.questions.get(example) else {
            return Err(Error::Option(format!(
                "no question {example}, there are {}",
                self.questions.len()
            )));
        };
        // Windows of an example lie together.
        let start = self.example.partition_point(|it| *it < example);
        let end = self.example.partition_point(|it| *it <= example);
        let scored: Vec<Scored<'_>> = (start..end)
            .map(|row| {
                let (starts, ends) = scores(row);
                Scored {
                    places: &self.windows[row].places,
                    null: self.windows[row].null,
                    starts,
                    ends,
                }
            })
            .collect();
        search(&question.context, &scored, how)
    }

    /// The rows of question `example`.
    pub fn rows_of(&self, example: usize) -> Range<usize> {
        let start = self.example.partition_point(|it| *it < example);
        start..self.example.partition_point(|it| *it <= example)
    }
}
