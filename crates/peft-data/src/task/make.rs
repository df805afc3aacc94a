//! From data files to rows of a task: read, understand the labels, tokenise.
//!
//! In this order, because the labels of all rows together say what they are and
//! tokens do not depend on it. One example is one row, but for a context that is
//! too long, and a text to fill in: they go on in further rows, and nothing of
//! them is lost.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use tokenizers::Encoding;

use super::dataset::{Labels, Rows, TaskDataset, TaskReport, Window};
use super::encode::Cutter;
use super::labels::{Understood, tags, understand};
use super::mask::Masking;
use super::row::{Answer, Label, Layout, Said};
use super::spans::{Places, Question, span};
use super::{Task, TaskOptions};
use crate::batch::IGNORED;
use crate::error::{Error, Result};
use crate::format::{first_row, object};
use crate::prepare::{FileReport, Progress};
use crate::source::{RawRow, Shape, Source};
use crate::tokenizer::Tokenizer;

impl TaskDataset {
    /// The same with classes, and how often each is a label.
    fn with_classes(mut self, classes: Vec<(String, usize)>) -> Self {
        self.classes = classes.iter().map(|(name, _)| name.clone()).collect();
        self.report.classes = classes;
        self
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
    if options.task == Task::MaskedLm && !options.labelled {
        return refuse(format!(
            "the labels of {} are its own tokens, there is nothing to leave out",
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
    let (task, columns) = (options.task, &options.columns);
    let layout = Layout::of(task, &row, columns, options.labelled).map_err(|what| {
        // What is there would do if only the label were.
        let bare = Layout::of(task, &row, columns, false).is_ok();
        let what = match bare {
            true => format!("{task}: text without any label: {what}"),
            false => format!("{task}: {what}"),
        };
        Error::row(&source.path, first.line, what)
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
    Words(Vec<i64>, Vec<(u32, u32)>),
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
            windows: Vec::new(),
            words: Vec::new(),
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
        let (labels, classes) = match self.options.labelled {
            true => self.labels()?,
            false => {
                let classes = self.options.classes.iter().flatten();
                (
                    Labels::None,
                    classes.map(|name| (name.clone(), 0)).collect(),
                )
            }
        };
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
        Ok(self.finish(made, |_| labels).with_classes(classes))
    }

    /// The labels of texts, and how often each class is one.
    fn labels(&self) -> Result<(Labels, Vec<(String, usize)>)> {
        let placed: Vec<(usize, &Label)> = self
            .examples
            .iter()
            .enumerate()
            .filter_map(|(at, read)| match &read.said {
                Said::Text {
                    label: Some(label), ..
                } => Some((at, label)),
                _ => None,
            })
            .collect();
        let classes = self.options.classes.as_deref();
        let understood = understand(&placed, self.options.problem, classes)
            .map_err(|(at, what)| self.at(at, what))?;
        match understood {
            Understood::Classes { names, ids } => {
                if names.len() < 2 && classes.is_none() {
                    let name = names.first().map_or("", String::as_str);
                    let what = "so there is nothing to tell apart";
                    return Err(self.at(0, format!("every row has the label `{name}`, {what}")));
                }
                let counts = counted(&names, &ids);
                Ok((Labels::Classes(ids), counts))
            }
            Understood::Flags { names, flags } => {
                let set = flags.iter().enumerate().filter(|(_, flag)| **flag == 1.0);
                let ids: Vec<usize> = set.map(|(at, _)| at % names.len()).collect();
                let counts = counted(&names, &ids);
                Ok((Labels::Flags(flags), counts))
            }
            Understood::Numbers { .. } if classes.is_some() => Err(self.at(
                0,
                "the labels are numbers to predict, but classes are given",
            )),
            Understood::Numbers { outputs, values } => {
                Ok((Labels::Numbers { outputs, values }, Vec::new()))
            }
        }
    }

    /// A class for each word.
    fn words(&mut self) -> Result<TaskDataset> {
        let cutter = Cutter::lists(self.tokenizer, "max_length", self.options.max_length)?;
        let mut placed: Vec<(usize, &Label)> = Vec::new();
        let mut starts = Vec::new();
        for (at, read) in self.examples.iter().enumerate() {
            starts.push(placed.len());
            if let Said::Words { tags, .. } = &read.said {
                placed.extend(tags.iter().map(|tag| (at, tag)));
            }
        }
        let given = self.options.classes.as_deref();
        let labelled = self.options.labelled;
        let (names, ids) = match labelled {
            true => tags(&placed, given).map_err(|(at, what)| self.at(at, what))?,
            false => (given.unwrap_or_default().to_vec(), Vec::new()),
        };
        let inner = inner_tags(&names);
        let all = self.options.label_all_tokens;
        let made = self.encode(|at, said| match said {
            Said::Words { words, .. } => {
                let encoding = cutter.words(words)?;
                let tags = labelled.then(|| &ids[starts[at]..][..words.len()]);
                Ok(label_words(&encoding, words.len(), tags, &inner, all))
            }
            _ => Err(wrong_row()),
        })?;
        let counts = counted(&names, &ids);
        let mut words = Vec::new();
        let data = self.finish(made, |extras| {
            let mut tokens = Vec::new();
            for extra in extras {
                if let Extra::Words(labels, starts) = extra {
                    tokens.extend(labels);
                    words.push(starts);
                }
            }
            match labelled {
                true => Labels::Tokens(tokens),
                false => Labels::None,
            }
        });
        let mut data = data.with_classes(counts);
        data.words = words;
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
                Ok(windows_of(&encoding, answers.first(), &[cls, bos]))
            }
            _ => Err(wrong_row()),
        })?;
        let mut windows = Vec::new();
        let labelled = self.options.labelled;
        let mut data = self.finish(made, |extras| {
            windows.extend(extras.into_iter().filter_map(|extra| match extra {
                Extra::Window(window) => Some(window),
                _ => None,
            }));
            match labelled {
                true => Labels::Spans,
                false => Labels::None,
            }
        });
        data.windows = windows;
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
                let Some(target) = target else {
                    return Ok(Made::one(&source, Extra::None));
                };
                let target = targets.single(target)?;
                let cut = !target.get_overflowing().is_empty();
                let mut made = Made::one(&source, Extra::Target(target.get_ids().to_vec()));
                made.truncated |= cut;
                Ok(made)
            }
            _ => Err(wrong_row()),
        })?;
        let labelled = self.options.labelled;
        let mut data = self.finish(made, |extras| {
            if !labelled {
                return Labels::None;
            }
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
                data.references.extend(target);
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
        let mut special: Vec<u32> = self
            .tokenizer
            .special_tokens()
            .values()
            .chain(self.tokenizer.special_contents())
            .filter_map(|token| self.tokenizer.id(token))
            .collect();
        special.sort_unstable();
        special.dedup();
        let mut made = self.encode(|_, said| match said {
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
        let rows = made.iter().map(|it| it.rows.len()).sum::<usize>();
        let word = |id: &u32| special.binary_search(id).is_err();
        for made in &mut made {
            made.rows.retain(|row| row.ids.iter().any(word));
        }
        let kept = made.iter().map(|it| it.rows.len()).sum::<usize>();
        if kept == 0 && rows > 0 {
            return Err(Error::Tokenizer(format!(
                "of {rows} rows none has a word that could be hidden: all their tokens are special ones"
            )));
        }
        self.report.nothing_to_hide = rows - kept;
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

/// How often each class is a label.
fn counted(names: &[String], ids: &[usize]) -> Vec<(String, usize)> {
    let mut counts = vec![0; names.len()];
    for id in ids {
        counts[*id] += 1;
    }
    names.iter().cloned().zip(counts).collect()
}

/// Lays the tags of words over their tokens, if there are any.
fn label_words(
    encoding: &Encoding,
    count: usize,
    tags: Option<&[usize]>,
    inner: &[usize],
    all: bool,
) -> Made {
    let mut seen = vec![false; count];
    let mut starts = Vec::new();
    let mut labels = Vec::with_capacity(encoding.len());
    for (token, word) in (0..).zip(encoding.get_word_ids()) {
        let word = word.filter(|word| (*word as usize) < count);
        let Some(word) = word else {
            labels.push(IGNORED);
            continue;
        };
        let first = !std::mem::replace(&mut seen[word as usize], true);
        if first {
            starts.push((word, token));
        }
        labels.push(match tags.map(|tags| tags[word as usize]) {
            Some(tag) if first => tag as i64,
            Some(tag) if all => inner[tag] as i64,
            _ => IGNORED,
        });
    }
    let mut made = Made::one(encoding, Extra::Words(labels, starts));
    made.lost_words = seen.iter().filter(|seen| !**seen).count();
    made
}

/// The windows of a context, each with the span of the answer.
fn windows_of(encoding: &Encoding, answer: Option<&Answer>, null: &[Option<u32>]) -> Made {
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
