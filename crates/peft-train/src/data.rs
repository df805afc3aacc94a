//! The rows that a run learns from, or is judged by.

use std::cmp::Reverse;

use peft_data::{Batch, Dataset, Plan, Row, Side, collate};

use crate::error::{Error, Result};
use crate::settings::Settings;

/// Some rows of a data set.
#[derive(Debug, Clone)]
pub struct Rows<'d> {
    data: &'d Dataset,
    rows: Vec<usize>,
    pad_id: u32,
    multiple_of: usize,
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
            data,
            rows,
            pad_id,
            multiple_of: 1,
        })
    }

    /// The same, with batches as wide as a multiple of this.
    pub fn padded_to(mut self, multiple: usize) -> Rows<'d> {
        self.multiple_of = multiple.max(1);
        self
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

    /// The first of them.
    pub fn first(&self) -> Option<Row<'_>> {
        self.data.get(*self.rows.first()?)
    }

    /// The order of training.
    pub fn plan(&self, settings: &Settings) -> Result<Plan> {
        let size = settings.per_device_train_batch_size;
        let plan = Plan::new(self.rows.clone(), size, settings.seed)?.shuffled();
        Ok(match settings.group_by_length {
            true => plan.grouped_by_length(&self.data.lengths())?,
            false => plan,
        })
    }

    /// The batches of an evaluation: longest rows first, so that what fits at first fits to the end.
    pub(crate) fn by_length(&self, size: usize) -> Vec<Vec<usize>> {
        let length = |at: &usize| self.data.get(*at).map_or(0, |row| row.ids.len());
        let mut rows = self.rows.clone();
        rows.sort_by_key(|at| Reverse(length(at)));
        rows.chunks(size.max(1)).map(<[usize]>::to_vec).collect()
    }

    /// These rows as a rectangle as wide as the longest of them, rounded up.
    pub fn batch(&self, indices: &[usize]) -> Batch {
        let rows: Vec<_> = indices.iter().filter_map(|at| self.data.get(*at)).collect();
        let mut batch = collate(&rows, self.pad_id, Side::Right, self.multiple_of);
        batch.indices = indices.to_vec();
        batch
    }

    /// Where a row of the data set comes from, for messages: `train.jsonl, row 812`.
    pub fn origin(&self, at: usize) -> String {
        let files = self.data.files();
        let Some(file) = self
            .data
            .file_of(at)
            .and_then(|file| Some((file, files.get(file)?)))
        else {
            return format!("row {}", at + 1);
        };
        let before: usize = files[..file.0].iter().map(|it| it.rows).sum();
        format!("{}, row {}", file.1.path.display(), at - before + 1)
    }
}
