//! From data files to a tokenised data set on disk, in parallel, once.
//!
//! Rows are independent, so they are parsed, rendered and tokenised in chunks
//! on all cores; the results are written in the order of the files. The outcome
//! depends on four things (the files' content, the tokenizer with its template,
//! the options, this code's version), and their joint digest is the name of the
//! cache file: a second run finds it, any change makes another one, and nobody
//! ever has to clear a stale cache.
//!
//! The first error stops: a row that cannot be read is one that somebody meant
//! to train on.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::batch::{Batch, Side, collate};
use crate::cache::{Cache, VERSION, Writer};
use crate::error::{Error, Result};
use crate::format::{Format, detect_in, parse};
use crate::sample::{Rules, Sample, Turns, sample};
use crate::source::{RawRow, Source};
use crate::tokenizer::Tokenizer;

/// How data files become training rows.
#[derive(Debug, Clone)]
pub struct Options {
    /// The rows' format; found out for each file where it is not given.
    pub format: Option<Format>,
    /// Tokens after which a row is cut off, and the length of plain text windows.
    pub max_length: usize,
    /// Train on prompts, system texts and users' turns as well.
    pub train_on_prompt: bool,
    /// Which of the assistant's turns are trained.
    pub turns: Turns,
    /// End rows without a chat template by the tokenizer's end token.
    pub add_eos: bool,
    /// Further variables for the chat template, such as `enable_thinking`.
    pub template_variables: Map<String, Value>,
    /// Where tokenised data is kept; nowhere beyond this run if not given.
    pub cache_dir: Option<PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            format: None,
            max_length: 1024,
            train_on_prompt: false,
            turns: Turns::All,
            add_eos: true,
            template_variables: Map::new(),
            cache_dir: None,
        }
    }
}

/// How far [`prepare`] is.
#[derive(Debug, Clone, Copy)]
pub struct Progress<'a> {
    /// The file that is being read.
    pub file: &'a Path,
    /// Rows done in all files.
    pub rows: usize,
    /// Bytes done in all files.
    pub bytes: usize,
    /// Bytes of all files.
    pub total_bytes: usize,
}

/// What a data set holds, and what happened to it on the way.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Rows in all files.
    pub rows: usize,
    /// Tokens in all rows.
    pub tokens: usize,
    /// Tokens that count in the loss: trained, and not the first of their row,
    /// which nothing predicts.
    pub trained_tokens: usize,
    /// The longest row, in tokens.
    pub longest: usize,
    /// Rows that were cut off at `max_length`.
    pub truncated: usize,
    /// Rows in which nothing is left to train on after they were cut off.
    pub untrained: usize,
    /// Whether rows went through the tokenizer's chat template.
    pub chat_template: bool,
    /// Each file on its own.
    pub files: Vec<FileReport>,
}

/// One file of a data set.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FileReport {
    /// Where it is.
    pub path: PathBuf,
    /// The format of its rows.
    pub format: String,
    /// How many rows it gave.
    pub rows: usize,
    /// Keys that nothing reads, each with the number of rows that have it.
    pub ignored: BTreeMap<String, usize>,
}

impl Report {
    /// What a person should know before training on this, a sentence each.
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        if self.untrained > 0 {
            warnings.push(format!(
                "{} of {} rows have no trained token left: they were cut off before the reply \
                 (raise max_length)",
                self.untrained, self.rows
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

/// A tokenised data set, read where it lies on disk.
#[derive(Debug)]
pub struct Dataset {
    cache: Cache,
    report: Report,
}

/// One row of a [`Dataset`].
#[derive(Debug, Clone, Copy)]
pub struct Row<'a> {
    /// Token ids.
    pub ids: &'a [u32],
    /// The half-open ranges of `ids` that are trained, in order.
    pub trained: &'a [[u32; 2]],
}

impl Row<'_> {
    /// Whether token `at` is trained.
    pub fn is_trained(&self, at: usize) -> bool {
        self.trained
            .iter()
            .any(|[start, end]| (*start as usize..*end as usize).contains(&at))
    }

    /// For each token whether it is trained.
    pub fn mask(&self) -> Vec<bool> {
        let mut mask = vec![false; self.ids.len()];
        for [start, end] in self.trained {
            if let Some(run) = mask.get_mut(*start as usize..*end as usize) {
                run.fill(true);
            }
        }
        mask
    }

    /// How many tokens count in the loss: trained, and not the first.
    pub fn trained_tokens(&self) -> usize {
        let length = |[start, end]: &[u32; 2]| end.saturating_sub((*start).max(1)) as usize;
        self.trained.iter().map(length).sum()
    }
}

impl Dataset {
    /// How many rows there are.
    pub fn len(&self) -> usize {
        self.cache.len()
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Row `at`, or nothing beyond the end.
    pub fn get(&self, at: usize) -> Option<Row<'_>> {
        (at < self.len()).then(|| {
            let (ids, trained) = self.cache.row(at);
            Row { ids, trained }
        })
    }

    /// The rows in order.
    pub fn rows(&self) -> impl ExactSizeIterator<Item = Row<'_>> {
        (0..self.len()).map(|at| {
            let (ids, trained) = self.cache.row(at);
            Row { ids, trained }
        })
    }

    /// Some of the rows as a rectangle; see [`collate`].
    pub fn batch(
        &self,
        rows: &[usize],
        pad_id: u32,
        side: Side,
        multiple_of: usize,
    ) -> Result<Batch> {
        let row = |at: &usize| {
            self.get(*at)
                .ok_or_else(|| Error::Option(format!("no row {at}, there are {}", self.len())))
        };
        let seen = rows.iter().map(row).collect::<Result<Vec<_>>>()?;
        let mut batch = collate(&seen, pad_id, side, multiple_of);
        batch.indices = rows.to_vec();
        Ok(batch)
    }

    /// How many tokens each row has.
    pub fn lengths(&self) -> Vec<usize> {
        (0..self.len()).map(|at| self.cache.row_len(at)).collect()
    }

    /// What it holds.
    pub fn report(&self) -> &Report {
        &self.report
    }

    /// The files it was made from, and what each gave.
    pub fn files(&self) -> &[FileReport] {
        &self.report.files
    }

    /// Which file row `at` is from, as an index into [`Dataset::files`].
    pub fn file_of(&self, at: usize) -> Option<usize> {
        let mut before = 0;
        self.report.files.iter().position(|file| {
            before += file.rows;
            at < before
        })
    }
}

/// Reads, renders and tokenises `files`; or finds the result of doing so in the cache.
pub fn prepare(
    files: &[PathBuf],
    tokenizer: &Tokenizer,
    options: &Options,
    progress: &(dyn Fn(Progress<'_>) + Sync),
) -> Result<Dataset> {
    if files.is_empty() {
        return Err(Error::Option("no data file is given".into()));
    }
    if options.max_length < 2 {
        return Err(Error::Option(format!(
            "max_length is {}, a row needs 2 tokens at least",
            options.max_length
        )));
    }
    let sources = files.iter().map(|path| Source::open(path));
    let sources = sources.collect::<Result<Vec<Source>>>()?;
    let formats = sources.iter().map(|source| match options.format {
        Some(format) => Ok(format),
        None => detect_in(source),
    });
    let formats = formats.collect::<Result<Vec<Format>>>()?;
    let key = key(&sources, &formats, tokenizer, options);
    let name = format!("{}.tokens", &blake3::Hash::from(key).to_hex()[..32]);
    let place = options.cache_dir.as_deref().map(|dir| dir.join(name));

    let found = place.as_deref().and_then(|place| Cache::open(place, &key));
    let cache = match found {
        Some(cache) => cache,
        None => {
            let mut work = Work {
                tokenizer,
                options,
                rules: Rules {
                    train_on_prompt: options.train_on_prompt,
                    add_eos: options.add_eos,
                    turns: options.turns,
                    template_variables: options.template_variables.clone(),
                },
                progress,
                total_bytes: sources.iter().map(|source| source.bytes().len()).sum(),
                bytes: 0,
                writer: Writer::new(options.cache_dir.as_deref())?,
                report: Report::default(),
            };
            for (source, format) in sources.iter().zip(formats) {
                work.file(source, format)?;
            }
            let place = place.as_deref().unwrap_or(Path::new("tokens"));
            work.writer.finish(&key, &work.report, place)?
        }
    };
    // The same content may lie elsewhere now.
    let mut report = cache.report.clone();
    for (file, path) in report.files.iter_mut().zip(files) {
        file.path = path.clone();
    }
    Ok(Dataset { cache, report })
}

/// Everything that decides the outcome.
fn key(
    sources: &[Source],
    formats: &[Format],
    tokenizer: &Tokenizer,
    options: &Options,
) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&VERSION.to_le_bytes());
    hasher.update(&tokenizer.fingerprint());
    let mut settings = serde_json::json!({
        "max_length": options.max_length,
        "train_on_prompt": options.train_on_prompt,
        "last_turn_only": options.turns == Turns::Last,
        "add_eos": options.add_eos,
        "template_variables": options.template_variables,
        "formats": formats.iter().map(|format| format.name()).collect::<Vec<_>>(),
    });
    // A template that writes the date makes other text tomorrow.
    if tokenizer
        .template(true)
        .is_some_and(|template| template.reads_clock())
    {
        settings["day"] = chrono::Local::now().date_naive().to_string().into();
    }
    hasher.update(settings.to_string().as_bytes());
    for source in sources {
        let mut content = blake3::Hasher::new();
        content.update_rayon(source.bytes());
        hasher.update(content.finalize().as_bytes());
    }
    *hasher.finalize().as_bytes()
}

/// Rows that are held in memory at once, and that one thread takes at a time.
const WINDOW: usize = 8192;
const CHUNK: usize = 64;

/// Reading in progress.
struct Work<'a> {
    tokenizer: &'a Tokenizer,
    options: &'a Options,
    rules: Rules,
    progress: &'a (dyn Fn(Progress<'_>) + Sync),
    total_bytes: usize,
    bytes: usize,
    writer: Writer,
    report: Report,
}

impl Work<'_> {
    fn file(&mut self, source: &Source, format: Format) -> Result<()> {
        self.report.files.push(FileReport {
            path: source.path.clone(),
            format: format.name().into(),
            rows: 0,
            ignored: BTreeMap::new(),
        });
        let before = self.report.rows;
        match format {
            Format::PlainText => self.prose(source)?,
            _ => self.rows(source, format)?,
        }
        let rows = self.report.rows - before;
        if let Some(file) = self.report.files.last_mut() {
            file.rows = rows;
        }
        Ok(())
    }

    fn rows(&mut self, source: &Source, format: Format) -> Result<()> {
        if source.shape == crate::source::Shape::Text {
            return Err(Error::file(
                &source.path,
                format!("a text file has no rows, so its format cannot be {format}"),
            ));
        }
        let chat = self.tokenizer.template(false).is_some();
        self.report.chat_template |= match format {
            Format::Messages | Format::ShareGpt => true,
            Format::PromptCompletion | Format::Alpaca => chat,
            Format::Text | Format::PlainText => false,
        };
        let done_before = self.bytes;
        let mut rows = source.rows()?;
        loop {
            let window: Vec<RawRow<'_>> = rows.by_ref().take(WINDOW).collect();
            let Some(last) = window.last() else {
                break;
            };
            let end = last.bytes.as_ptr() as usize + last.bytes.len();
            let made: Vec<Result<(Sample, Vec<String>)>> = window
                .par_iter()
                .with_min_len(CHUNK)
                .map(|row| self.row(source, *row, format))
                .collect();
            for row in made {
                let (sample, ignored) = row?;
                self.keep(sample)?;
                let file = self.report.files.last_mut();
                if let Some(file) = file {
                    for key in ignored {
                        *file.ignored.entry(key).or_default() += 1;
                    }
                }
            }
            self.bytes = done_before + (end - source.bytes().as_ptr() as usize);
            self.tell(source);
        }
        self.bytes = done_before + source.bytes().len();
        Ok(())
    }

    fn row(
        &self,
        source: &Source,
        row: RawRow<'_>,
        format: Format,
    ) -> Result<(Sample, Vec<String>)> {
        let parsed = parse(source, row, format)?;
        let sample = sample(self.tokenizer, &parsed.example, &self.rules)
            .map_err(|error| Error::row(&source.path, row.line, error.to_string()))?;
        if sample.ids.is_empty() {
            return Err(Error::row(&source.path, row.line, "an empty row"));
        }
        Ok((sample, parsed.ignored))
    }

    /// A whole file of prose, cut into windows.
    fn prose(&mut self, source: &Source) -> Result<()> {
        let (ids, _) = self
            .tokenizer
            .encode_with_offsets(source.text()?, true)
            .map_err(|error| Error::file(&source.path, error.to_string()))?;
        let mut all = Sample {
            trained: vec![true; ids.len()],
            ids,
        };
        if self.rules.add_eos {
            all.end(self.tokenizer.eos_ids());
        }
        for window in all.ids.chunks(self.options.max_length) {
            self.keep(Sample {
                ids: window.to_vec(),
                trained: vec![true; window.len()],
            })?;
        }
        self.bytes += source.bytes().len();
        self.tell(source);
        Ok(())
    }

    /// Cuts a row to length, counts it and writes it down.
    fn keep(&mut self, mut sample: Sample) -> Result<()> {
        let trained = |sample: &Sample| sample.trained.iter().skip(1).filter(|t| **t).count();
        let report = &mut self.report;
        if sample.ids.len() > self.options.max_length {
            sample.ids.truncate(self.options.max_length);
            sample.trained.truncate(self.options.max_length);
            report.truncated += 1;
            report.untrained += usize::from(trained(&sample) == 0);
        }
        report.rows += 1;
        report.tokens += sample.ids.len();
        report.trained_tokens += trained(&sample);
        report.longest = report.longest.max(sample.ids.len());
        self.writer.push(&sample)
    }

    fn tell(&self, source: &Source) {
        (self.progress)(Progress {
            file: &source.path,
            rows: self.report.rows,
            bytes: self.bytes,
            total_bytes: self.total_bytes,
        });
    }
}
