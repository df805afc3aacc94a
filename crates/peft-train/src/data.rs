//! The rows that a run learns from, or is judged by: of a text to go on with, or of any other task.

use std::cmp::Reverse;

use peft_data::{Dataset, Pass, Plan, Row, Side, Targets, TaskBatch, TaskDataset, collate};

use crate::error::{Error, Result};
use crate::settings::Settings;

/// A batch of any task.
#[derive(Debug, Clone)]
pub enum Batch {
    /// Texts to go on with.
    Text(peft_data::Batch),
    /// Anything else.
    Task(TaskBatch),
}

impl Batch {
    /// What the sum of its losses is divided by for their mean: tokens, rows or numbers that have a label.
    pub fn labels(&self) -> usize {
        let marked = |all: &[i64]| all.iter().filter(|it| **it != peft_data::IGNORED).count();
        match self {
            Batch::Text(batch) => batch.trained_tokens(),
            Batch::Task(batch) => match &batch.targets {
                Targets::Classes(all) => all.len(),
                Targets::Flags { values, .. } | Targets::Numbers { values, .. } => values.len(),
                Targets::Tokens(all) | Targets::Hidden(all) => marked(all),
                Targets::Spans { starts, .. } => starts.len(),
                Targets::Decoder { labels, .. } => marked(labels),
                Targets::None => 0,
            },
        }
    }

    /// Its tokens, without padding.
    pub fn tokens(&self) -> u64 {
        let mask = match self {
            Batch::Text(batch) => &batch.attention_mask,
            Batch::Task(batch) => &batch.attention_mask,
        };
        mask.iter().sum::<i64>() as u64
    }

    /// Which rows of the data set these are.
    pub fn indices(&self) -> &[usize] {
        match self {
            Batch::Text(batch) => &batch.indices,
            Batch::Task(batch) => &batch.indices,
        }
    }
}

/// Where rows come from.
#[derive(Debug, Clone, Copy)]
enum Source<'d> {
    Text { data: &'d Dataset, pad_id: u32 },
    Task(&'d TaskDataset),
}

/// Some rows of a data set.
#[derive(Debug, Clone)]
pub struct Rows<'d> {
    data: Source<'d>,
    rows: Vec<usize>,
    multiple_of: usize,
    /// What a batch may be as wide as; rows alone are never cut.
    widest: usize,
}

impl<'d> Rows<'d> {
    /// The given rows, but for those without a trained token, which would teach and tell nothing.
    pub fn new(data: &'d Dataset, rows: Vec<usize>, pad_id: u32) -> Result<Rows<'d>> {
        let trained = |at: &usize| data.get(*at).is_some_and(|row| row.trained_tokens() > 0);
        let asked = rows.len();
        let rows: Vec<usize> = rows.into_iter().filter(trained).collect();
        if rows.is_empty() {
            let reason = format!("no trained token in any of {asked} rows");
            return Err(Error::Nothing(reason));
        }
        Ok(Rows {
            data: Source::Text { data, pad_id },
            rows,
            multiple_of: 1,
            widest: usize::MAX,
        })
    }

    /// Rows of another task.
    pub fn of_task(data: &'d TaskDataset, rows: Vec<usize>) -> Result<Rows<'d>> {
        if rows.is_empty() {
            return Err(Error::Nothing("there are no rows".to_owned()));
        }
        Ok(Rows {
            data: Source::Task(data),
            rows,
            multiple_of: 1,
            widest: usize::MAX,
        })
    }

    /// The same, with batches as wide as a multiple of this, where that is not wider than a model takes.
    ///
    /// # Errors
    /// If a row is wider: it is named.
    pub fn padded_to(mut self, multiple: usize, widest: Option<usize>) -> Result<Rows<'d>> {
        self.multiple_of = multiple.max(1);
        self.widest = widest.unwrap_or(usize::MAX);
        match self.rows.iter().max_by_key(|at| self.width(**at)) {
            Some(at) if self.width(*at) > self.widest => Err(Error::TooLong {
                row: self.origin(*at),
                tokens: self.width(*at),
                most: self.widest,
            }),
            _ => Ok(self),
        }
    }

    /// How many tokens a row of the data set has.
    fn width(&self, at: usize) -> usize {
        match self.data {
            Source::Text { data, .. } => data.get(at).map_or(0, |row| row.ids.len()),
            Source::Task(data) => data.get(at).map_or(0, |row| row.ids.len()),
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Never: there is at least one.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Which rows of the data set these are.
    pub fn indices(&self) -> &[usize] {
        &self.rows
    }

    /// The first of them, where they are texts to go on with.
    pub fn first(&self) -> Option<Row<'_>> {
        match self.data {
            Source::Text { data, .. } => data.get(*self.rows.first()?),
            Source::Task(_) => None,
        }
    }

    fn lengths(&self) -> Vec<usize> {
        match self.data {
            Source::Text { data, .. } => data.lengths(),
            Source::Task(data) => data.lengths(),
        }
    }

    /// The order of training.
    pub fn plan(&self, settings: &Settings) -> Result<Plan> {
        let size = settings.per_device_train_batch_size;
        let plan = Plan::new(self.rows.clone(), size, settings.seed)?.shuffled();
        Ok(match settings.group_by_length {
            true => plan.grouped_by_length(&self.lengths())?,
            false => plan,
        })
    }

    /// The batches of an evaluation: longest rows first, so that what fits at first fits to the end.
    pub(crate) fn by_length(&self, size: usize) -> Vec<Vec<usize>> {
        let lengths = self.lengths();
        let mut rows = self.rows.clone();
        rows.sort_by_key(|at| Reverse(lengths.get(*at).copied()));
        rows.chunks(size.max(1)).map(<[usize]>::to_vec).collect()
    }

    /// These rows as a rectangle as wide as the longest of them, rounded up.
    pub fn batch(&self, indices: &[usize], pass: Pass) -> Result<Batch> {
        let longest = indices.iter().map(|at| self.width(*at)).max();
        let rounded = longest.unwrap_or(0).next_multiple_of(self.multiple_of);
        let multiple_of = match rounded > self.widest {
            true => 1,
            false => self.multiple_of,
        };
        match self.data {
            Source::Text { data, pad_id } => {
                let rows: Vec<_> = indices.iter().filter_map(|at| data.get(*at)).collect();
                let mut batch = collate(&rows, pad_id, Side::Right, multiple_of);
                batch.indices = indices.to_vec();
                Ok(Batch::Text(batch))
            }
            Source::Task(data) => Ok(Batch::Task(data.batch(indices, pass, multiple_of)?)),
        }
    }

    /// Where a row of the data set comes from, for messages: `train.jsonl, row 812`.
    pub fn origin(&self, at: usize) -> String {
        let (files, row) = match self.data {
            Source::Text { data, .. } => (data.files(), Some(at)),
            Source::Task(data) => (data.report().files.as_slice(), data.example_of(at)),
        };
        let mut before = 0;
        for file in files {
            if let Some(row) = row.filter(|row| *row < before + file.rows) {
                return format!("{}, row {}", file.path.display(), row - before + 1);
            }
            before += file.rows;
        }
        format!("row {}", at + 1)
    }
}

#[cfg(test)]
mod tests {
    use peft_data::{Options, Tokenizer, prepare};

    use super::*;

    /// Batches are wide as asked where a model has room; a row for which it has none is named.
    #[test]
    fn batches_are_no_wider_than_a_model_takes() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/tokenizer");
        let tokenizer = Tokenizer::open(folder.as_ref()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("rows.jsonl");
        std::fs::write(
            &file,
            "{\"text\": \"a\"}\n{\"text\": \"aaaaaaaaaaaaaaaaaaaaaaaaaa\"}\n",
        )
        .unwrap();
        let data = prepare(&[file], &tokenizer, &Options::default(), &|_| {}).unwrap();
        let rows = || Rows::new(&data, vec![0, 1], tokenizer.pad_id()).unwrap();
        let longest = rows().width(1);
        assert!(longest > 8 && rows().width(0) < 8);
        let width = |rows: &Rows<'_>, at: usize| match rows.batch(&[at], Pass::Eval).unwrap() {
            Batch::Text(batch) => batch.cols,
            Batch::Task(batch) => batch.cols,
        };
        let most = longest.next_multiple_of(16);
        let free = rows().padded_to(16, None).unwrap();
        assert_eq!((width(&free, 0), width(&free, 1)), (16, most));
        let tight = rows().padded_to(16, Some(longest)).unwrap();
        assert_eq!(
            (width(&tight, 0), width(&tight, 1)),
            (16.min(longest), longest)
        );
        let error = rows().padded_to(16, Some(longest - 1)).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("rows.jsonl, row 2")
                && text.contains(&format!("max_length: {}", longest - 1)),
            "{text}"
        );
    }
}
