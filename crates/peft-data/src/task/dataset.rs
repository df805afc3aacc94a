//! From data files to rows of a task: read, understand the labels, tokenise.
//!
//! In this order, because the labels of all rows together say what they are and
//! tokens do not depend on it. Rows are kept in memory: data with labels is
//! small beside the prose that causal models eat, and takes a second to
//! tokenise. One example is one row, but for a context that is too long, and a
//! text to fill in: they go on in further rows, and nothing of them is lost.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use tokenizers::Encoding;

use super::batch::{Frame, Targets, TaskBatch};
use super::encode::Cutter;
use super::labels::{Understood, tags, understand};
use super::mask::{EVALUATION, Masking};
use super::row::{Answer, Label, Layout, Said};
use super::spans::{Found, Places, Question, Scored, Search, search, span};
use super::{Problem, Task, TaskOptions};
use crate::batch::{Holdout, IGNORED, Side, split};
use crate::error::{Error, Result};
use crate::format::{first_row, object};
use crate::prepare::{FileReport, Progress};
use crate::source::{RawRow, Shape, Source};
use crate::tokenizer::Tokenizer;

/// A tokenised data set of a task.
#[derive(Debug)]
pub struct TaskDataset {
    task: Task,
    rows: Rows,
    labels: Labels,
    classes: Vec<String>,
    /// The example that each row is of.
    example: Vec<usize>,
    report: TaskReport,
    pad_id: u32,
    side: Side,
    segments: bool,
    masking: Option<Masking>,
    questions: Vec<Question>,
    /// The texts that are to be said, for `seq-2-seq-lm`.
    references: Vec<String>,
}

/// Sequences of tokens, end to end.
#[derive(Debug, Default)]
struct Rows {
    ids: Vec<u32>,
    segments: Vec<u8>,
    ends: Vec<usize>,
}

impl Rows {
    fn push(&mut self, ids: &[u32], segments: &[u32]) {
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
enum Labels {
    Classes(Vec<usize>),
    Flags(Vec<f32>),
    Numbers {
        outputs: usize,
        values: Vec<f32>,
    },
    /// As long as the ids of all rows.
    Tokens(Vec<i64>),
    Spans(Vec<Window>),
    Decoder(Rows),
    Hidden,
}

/// A window of a context.
#[derive(Debug)]
struct Window {
    places: Places,
    null: usize,
    span: (usize, usize),
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
            Labels::Spans(_) => Some(2),
            Labels::Decoder(_) | Labels::Hidden => None,
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
                Labels::Spans(windows) => {
                    let (start, end) = windows[at].span;
                    Target::Span(start, end)
                }
                Labels::Decoder(targets) => Target::Sequence(&targets.ids[targets.range(at)]),
                Labels::Hidden => Target::Hidden,
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
            Labels::Spans(windows) => {
                // Padding on the left moves the tokens, and the answer with them.
                let moved = |at: &usize, place: usize| {
                    (frame.start(self.rows.range(*at).len()) + place) as i64
                };
                let span = |at: &usize| windows[*at].span;
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
        let (Labels::Spans(windows), Some(question)) = (&self.labels, self.questions.get(example))
        else {
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
                    places: &windows[row].places,
                    null: windows[row].null,
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

/// An example and the place in its file.
struct Read {
    file: usize,
    line: usize,
    said: Said,
}

/// Reads `files` as rows of a task.
pub fn prepare_task(
    files: &[PathBuf],
    tokenizer: &Tokenizer,
    options: &TaskOptions,
    progress: &(dyn Fn(Progress<'_>) + Sync),
) -> Result<TaskDataset> {
    check(files, options)?;
    let mut report = TaskReport::default();
    let mut examples: Vec<Read> = Vec::new();
    let sources = files.iter().map(|path| Source::open(path));
    let sources = sources.collect::<Result<Vec<Source>>>()?;
    let total_bytes = sources.iter().map(|source| source.bytes().len()).sum();
    let mut bytes = 0;
    for (at, source) in sources.iter().enumerate() {
        report.files.push(read(source, at, options, &mut examples)?);
        bytes += source.bytes().len();
        progress(Progress {
            file: &source.path,
            rows: examples.len(),
            bytes,
            total_bytes,
        });
    }
    report.examples = examples.len();
    Maker {
        tokenizer,
        options,
        files,
        examples,
        report,
    }
    .make()
}

fn check(files: &[PathBuf], options: &TaskOptions) -> Result<()> {
    let refuse = |what: String| Err(Error::Option(what));
    if files.is_empty() {
        return refuse("no data file is given".into());
    }
    if options.task == Task::CausalLm {
        return refuse(format!(
            "{} has formats of its own, which `prepare` reads",
            options.task
        ));
    }
    if options.problem.is_some() && options.task != Task::SeqCls {
        return refuse(format!(
            "a problem type is for {}, the task is {}",
            Task::SeqCls,
            options.task
        ));
    }
    if !(options.mask_probability > 0.0 && options.mask_probability < 1.0) {
        return refuse(format!(
            "mask_probability is {}, it must lie between 0 and 1",
            options.mask_probability
        ));
    }
    if let Some(classes) = &options.classes {
        let mut sorted: Vec<&String> = classes.iter().collect();
        sorted.sort();
        if let Some(twice) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
            return refuse(format!("the class `{}` is given twice", twice[0]));
        }
        if classes.is_empty() {
            return refuse("an empty list of classes".into());
        }
    }
    Ok(())
}

/// Reads all rows of one file.
fn read(
    source: &Source,
    file: usize,
    options: &TaskOptions,
    examples: &mut Vec<Read>,
) -> Result<FileReport> {
    let mut report = FileReport {
        path: source.path.clone(),
        format: "plain-text".into(),
        rows: 0,
        ignored: BTreeMap::new(),
    };
    if source.shape == Shape::Text {
        if options.task != Task::MaskedLm {
            return Err(Error::file(
                &source.path,
                format!(
                    "a text file has no rows, so it is not for {}: text without any label",
                    options.task
                ),
            ));
        }
        let said = Said::Raw(source.text()?.to_owned());
        examples.push(Read {
            file,
            line: 1,
            said,
        });
        report.rows = 1;
        return Ok(report);
    }
    let (first, row) = first_row(source)?;
    let layout = Layout::of(options.task, &row, &options.columns).map_err(|what| {
        let labels = ["label", "labels", "tags", "answers", "target"];
        let bare = options.task == Task::SeqCls && !labels.iter().any(|key| row.contains_key(*key));
        let what = match bare && options.columns.label.is_none() {
            true => format!("text without any label: {what}"),
            false => what,
        };
        Error::row(
            &source.path,
            first.line,
            format!("{}: {what}", options.task),
        )
    })?;
    report.format = layout.name();
    let rows: Vec<RawRow<'_>> = source.rows()?.collect();
    let table = source.table.is_some();
    let made: Vec<Result<(Said, Vec<String>)>> = rows
        .par_iter()
        .with_min_len(64)
        .map(|row| {
            let mut object = object(source, *row)?;
            let said = layout.read(&mut object, table);
            let said = said.map_err(|what| Error::row(&source.path, row.line, what))?;
            Ok((said, object.into_iter().map(|(key, _)| key).collect()))
        })
        .collect();
    for (row, made) in rows.iter().zip(made) {
        let (said, ignored) = made?;
        examples.push(Read {
            file,
            line: row.line,
            said,
        });
        report.rows += 1;
        for key in ignored {
            *report.ignored.entry(key).or_default() += 1;
        }
    }
    Ok(report)
}

/// Making in progress.
struct Maker<'a> {
    tokenizer: &'a Tokenizer,
    options: &'a TaskOptions,
    files: &'a [PathBuf],
    examples: Vec<Read>,
    report: TaskReport,
}

/// What one example became: its rows, and whether something was cut off.
struct Made {
    rows: Vec<MadeRow>,
    truncated: bool,
    lost_words: usize,
    lost_answer: bool,
}

struct MadeRow {
    ids: Vec<u32>,
    segments: Vec<u32>,
    extra: Extra,
}

/// What a row has besides its ids, where its label lies among them.
enum Extra {
    None,
    Tokens(Vec<i64>),
    Window(Window),
    Target(Vec<u32>),
}

impl MadeRow {
    fn of(encoding: &Encoding, extra: Extra) -> Self {
        Self {
            ids: encoding.get_ids().to_vec(),
            segments: encoding.get_type_ids().to_vec(),
            extra,
        }
    }
}

impl Made {
    fn one(encoding: &Encoding, extra: Extra) -> Self {
        Self {
            rows: vec![MadeRow::of(encoding, extra)],
            truncated: !encoding.get_overflowing().is_empty(),
            lost_words: 0,
            lost_answer: false,
        }
    }
}

impl Maker<'_> {
    fn make(mut self) -> Result<TaskDataset> {
        match self.options.task {
            Task::SeqCls => self.texts(),
            Task::TokenCls => self.words(),
            Task::QuestionAns => self.questions(),
            Task::Seq2SeqLm => self.targets(),
            Task::MaskedLm => self.hidden(),
            Task::CausalLm => Err(Error::Option("causal-lm has rows of its own".into())),
        }
    }

    /// An error at an example.
    fn at(&self, example: usize, what: impl Into<String>) -> Error {
        match self.examples.get(example) {
            Some(read) => self.place(read, what),
            None => Error::Option(what.into()),
        }
    }

    fn place(&self, read: &Read, what: impl Into<String>) -> Error {
        let path = self
            .files
            .get(read.file)
            .map_or(Path::new(""), PathBuf::as_path);
        Error::row(path, read.line, what)
    }

    /// Tokenises all examples, in parallel, in order.
    fn encode(&self, make: impl Fn(usize, &Said) -> Result<Made> + Sync) -> Result<Vec<Made>> {
        let made: Vec<Result<Made>> = self
            .examples
            .par_iter()
            .enumerate()
            .with_min_len(16)
            .map(|(at, read)| {
                let made = make(at, &read.said);
                let made = made.map_err(|error| self.place(read, error.to_string()))?;
                match made.rows.iter().any(|row| row.ids.is_empty()) || made.rows.is_empty() {
                    true => {
                        Err(self.place(read, "an empty row: the tokenizer makes nothing of it"))
                    }
                    false => Ok(made),
                }
            })
            .collect();
        made.into_iter().collect()
    }

    /// Puts rows and labels together.
    fn finish(
        &mut self,
        made: Vec<Made>,
        labels: impl FnOnce(Vec<Extra>) -> Labels,
    ) -> TaskDataset {
        let mut rows = Rows::default();
        let mut example = Vec::new();
        let mut extras = Vec::new();
        let report = &mut self.report;
        for (at, made) in made.into_iter().enumerate() {
            report.truncated += usize::from(made.truncated);
            report.lost_words += made.lost_words;
            report.lost_answers += usize::from(made.lost_answer);
            for row in made.rows {
                report.rows += 1;
                report.tokens += row.ids.len();
                report.longest = report.longest.max(row.ids.len());
                rows.push(&row.ids, &row.segments);
                example.push(at);
                extras.push(row.extra);
            }
        }
        TaskDataset {
            task: self.options.task,
            rows,
            labels: labels(extras),
            classes: Vec::new(),
            example,
            report: std::mem::take(report),
            pad_id: self.tokenizer.pad_id(),
            side: self.tokenizer.padding_side(),
            segments: self.tokenizer.has_segments(),
            masking: None,
            questions: Vec::new(),
            references: Vec::new(),
        }
    }

    /// A class, several, or numbers for a text.
    fn texts(&mut self) -> Result<TaskDataset> {
        let cutter = Cutter::texts(self.tokenizer, "max_length", self.options.max_length)?;
        let placed: Vec<(usize, &Label)> = self
            .examples
            .iter()
            .enumerate()
            .filter_map(|(at, read)| match &read.said {
                Said::Text { label, .. } => Some((at, label)),
                _ => None,
            })
            .collect();
        let classes = self.options.classes.as_deref();
        let understood = understand(&placed, self.options.problem, classes)
            .map_err(|(at, what)| self.at(at, what))?;
        if classes.is_some() && matches!(understood, Understood::Numbers { .. }) {
            return Err(self.at(
                0,
                "the labels are numbers to predict, but classes are given",
            ));
        }
        let made = self.encode(|_, said| match said {
            Said::Text { text, pair, .. } => {
                let encoding = match pair {
                    Some(pair) => cutter.pair(text, pair)?,
                    None => cutter.single(text)?,
                };
                Ok(Made::one(&encoding, Extra::None))
            }
            _ => Err(wrong_row()),
        })?;
        let (labels, names, counts) = match understood {
            Understood::Classes { names, ids } => {
                let mut counts = vec![0; names.len()];
                for id in &ids {
                    counts[*id] += 1;
                }
                (Labels::Classes(ids), names, counts)
            }
            Understood::Flags { names, flags } => {
                let mut counts = vec![0; names.len()];
                for row in flags.chunks(names.len().max(1)) {
                    for (count, flag) in counts.iter_mut().zip(row) {
                        *count += usize::from(*flag == 1.0);
                    }
                }
                (Labels::Flags(flags), names, counts)
            }
            Understood::Numbers { outputs, values } => {
                (Labels::Numbers { outputs, values }, Vec::new(), Vec::new())
            }
        };
        let one = matches!(labels, Labels::Classes(_)) && names.len() < 2;
        if one && self.options.classes.is_none() {
            let name = names.first().cloned().unwrap_or_default();
            return Err(self.at(
                0,
                format!("every row has the label `{name}`, so there is nothing to tell apart"),
            ));
        }
        let mut data = self.finish(made, |_| labels);
        data.report.classes = names.iter().cloned().zip(counts).collect();
        data.classes = names;
        Ok(data)
    }

    /// A class for each word.
    fn words(&mut self) -> Result<TaskDataset> {
        let cutter = Cutter::texts(self.tokenizer, "max_length", self.options.max_length)?;
        let mut placed: Vec<(usize, &Label)> = Vec::new();
        let mut starts = Vec::new();
        for (at, read) in self.examples.iter().enumerate() {
            starts.push(placed.len());
            if let Said::Words { tags, .. } = &read.said {
                placed.extend(tags.iter().map(|tag| (at, tag)));
            }
        }
        let (names, ids) = tags(&placed, self.options.classes.as_deref())
            .map_err(|(at, what)| self.at(at, what))?;
        let inner = inner_tags(&names);
        let all = self.options.label_all_tokens;
        let made = self.encode(|at, said| match said {
            Said::Words { words, .. } => {
                let encoding = cutter.words(words)?;
                let tags = &ids[starts[at]..][..words.len()];
                Ok(label_words(&encoding, tags, &inner, all))
            }
            _ => Err(wrong_row()),
        })?;
        let mut counts = vec![0; names.len()];
        for id in &ids {
            counts[*id] += 1;
        }
        let mut data = self.finish(made, |extras| {
            let tokens = extras.into_iter().flat_map(|extra| match extra {
                Extra::Tokens(labels) => labels,
                _ => Vec::new(),
            });
            Labels::Tokens(tokens.collect())
        });
        data.report.classes = names.iter().cloned().zip(counts).collect();
        data.classes = names;
        Ok(data)
    }

    /// First and last token of an answer.
    fn questions(&mut self) -> Result<TaskDataset> {
        let (length, stride) = (self.options.max_length, self.options.doc_stride);
        let cutter = Cutter::windows(self.tokenizer, "max_length", length, stride)?;
        let cls = self.tokenizer.special_id("cls_token");
        let bos = self.tokenizer.bos_id();
        let made = self.encode(|_, said| match said {
            Said::Question {
                question,
                context,
                answers,
            } => {
                // Blanks before a question only take room.
                let encoding = cutter.question(question.trim_start(), context)?;
                Ok(windows(&encoding, answers.first(), &[cls, bos]))
            }
            _ => Err(wrong_row()),
        })?;
        let mut data = self.finish(made, |extras| {
            let windows = extras.into_iter().filter_map(|extra| match extra {
                Extra::Window(window) => Some(window),
                _ => None,
            });
            Labels::Spans(windows.collect())
        });
        for read in std::mem::take(&mut self.examples) {
            if let Said::Question {
                question,
                context,
                answers,
            } = read.said
            {
                data.questions.push(Question {
                    question,
                    context,
                    answers: answers.into_iter().map(|answer| answer.text).collect(),
                });
            }
        }
        Ok(data)
    }

    /// Another text.
    fn targets(&mut self) -> Result<TaskDataset> {
        let sources = Cutter::texts(self.tokenizer, "max_length", self.options.max_length)?;
        let length = self.options.max_target_length;
        let targets = Cutter::texts(self.tokenizer, "max_target_length", length)?;
        let made = self.encode(|_, said| match said {
            Said::Target { source, target } => {
                let source = sources.single(source)?;
                let target = targets.single(target)?;
                let cut = !target.get_overflowing().is_empty();
                let mut made = Made::one(&source, Extra::Target(target.get_ids().to_vec()));
                made.truncated |= cut;
                Ok(made)
            }
            _ => Err(wrong_row()),
        })?;
        let mut data = self.finish(made, |extras| {
            let mut rows = Rows::default();
            for extra in extras {
                if let Extra::Target(ids) = extra {
                    rows.push(&ids, &[]);
                }
            }
            Labels::Decoder(rows)
        });
        for read in std::mem::take(&mut self.examples) {
            if let Said::Target { target, .. } = read.said {
                data.references.push(target);
            }
        }
        Ok(data)
    }

    /// Words to fill in.
    fn hidden(&mut self) -> Result<TaskDataset> {
        let Some(mask_id) = self.tokenizer.special_id("mask_token") else {
            return Err(Error::Tokenizer(format!(
                "no mask_token, which {} needs",
                Task::MaskedLm
            )));
        };
        let cutter = Cutter::texts(self.tokenizer, "max_length", self.options.max_length)?;
        let made = self.encode(|_, said| match said {
            Said::Raw(text) => {
                let encoding = cutter.single(text)?;
                let mut made = Made::one(&encoding, Extra::None);
                made.truncated = false;
                let rest = encoding.get_overflowing().iter();
                made.rows
                    .extend(rest.map(|it| MadeRow::of(it, Extra::None)));
                Ok(made)
            }
            _ => Err(wrong_row()),
        })?;
        let mut special: Vec<u32> = self
            .tokenizer
            .special_tokens()
            .values()
            .chain(self.tokenizer.special_contents())
            .filter_map(|token| self.tokenizer.id(token))
            .collect();
        special.sort_unstable();
        special.dedup();
        let masking = Masking {
            probability: self.options.mask_probability,
            seed: self.options.mask_seed,
            mask_id,
            vocab_size: self.tokenizer.vocab_size(),
            special,
        };
        let mut data = self.finish(made, |_| Labels::Hidden);
        data.masking = Some(masking);
        Ok(data)
    }
}

/// Only if a layout reads what its task does not take.
fn wrong_row() -> Error {
    Error::Option("a row of another task".into())
}

/// For each class `B-X` the class `I-X`, for every other the class itself.
fn inner_tags(names: &[String]) -> Vec<usize> {
    let inner = |(at, name): (usize, &String)| {
        let inside = name.strip_prefix("B-").map(|rest| format!("I-{rest}"));
        let place = inside.and_then(|inside| names.iter().position(|name| *name == inside));
        place.unwrap_or(at)
    };
    names.iter().enumerate().map(inner).collect()
}

/// Lays the tags of words over their tokens.
fn label_words(encoding: &Encoding, tags: &[usize], inner: &[usize], all: bool) -> Made {
    let mut seen = vec![false; tags.len()];
    let labels = encoding.get_word_ids().iter().map(|word| {
        let Some(word) = word
            .map(|word| word as usize)
            .filter(|word| *word < tags.len())
        else {
            return IGNORED;
        };
        match (std::mem::replace(&mut seen[word], true), all) {
            (false, _) => tags[word] as i64,
            (true, true) => inner[tags[word]] as i64,
            (true, false) => IGNORED,
        }
    });
    let labels = labels.collect();
    let mut made = Made::one(encoding, Extra::Tokens(labels));
    made.lost_words = seen.iter().filter(|seen| !**seen).count();
    made
}

/// The windows of a context, each with the span of the answer.
fn windows(encoding: &Encoding, answer: Option<&Answer>, null: &[Option<u32>]) -> Made {
    let all = std::iter::once(encoding).chain(encoding.get_overflowing());
    let mut held = answer.is_none();
    let rows = all.map(|window| {
        let sequence = window.get_sequence_ids();
        let places: Places = sequence
            .iter()
            .zip(window.get_offsets())
            .map(|(sequence, (start, end))| {
                // In range: a row of a file has far fewer bytes than 4 GiB.
                (*sequence == Some(1)).then_some((*start as u32, *end as u32))
            })
            .collect();
        let ids = window.get_ids();
        let null = null
            .iter()
            .flatten()
            .find_map(|id| ids.iter().position(|it| it == id));
        let null = null.unwrap_or(0);
        let found = answer.and_then(|answer| span(&places, &(answer.start..answer.end)));
        held |= found.is_some();
        let window_of = Window {
            places,
            null,
            span: found.unwrap_or((null, null)),
        };
        MadeRow::of(window, Extra::Window(window_of))
    });
    let rows = rows.collect();
    Made {
        rows,
        truncated: false,
        lost_words: 0,
        lost_answer: !held,
    }
}
