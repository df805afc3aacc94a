//! Which tasks a file is for, by the keys of its first row.
//!
//! A row with labels is for the task that reads them, though one could train on
//! its text alone as well. Where several readings are as good as each other
//! (`text` alone is for a causal model and for one that fills gaps), the file
//! does not say, and whoever knows the model must.

use std::path::PathBuf;

use serde_json::Value;

use super::row::{Layout, Object};
use super::{Columns, Task};
use crate::error::{Error, Result};
use crate::format::{Format, first_row};
use crate::message::quoted;
use crate::source::{Shape, Source};

/// The tasks that files can be used for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Detected {
    /// Every task that could read the files, in the order of [`Task::ALL`].
    pub fits: Vec<Task>,
    /// The one that is meant, where the files say so.
    pub task: Option<Task>,
    /// Why, in a few words.
    pub why: String,
}

/// Finds out what data files are for; all must be for the same.
pub fn detect_task(files: &[PathBuf], columns: &Columns) -> Result<Detected> {
    let mut all: Option<Detected> = None;
    for path in files {
        let found = detect_in(&Source::open(path)?, columns)?;
        match &all {
            None => all = Some(found),
            Some(first) if first.task == found.task && first.fits == found.fits => {}
            Some(first) => {
                return Err(Error::file(
                    path,
                    format!(
                        "is for {}, and {} is for {}",
                        quoted(&found.fits),
                        files[0].display(),
                        quoted(&first.fits)
                    ),
                ));
            }
        }
    }
    all.ok_or_else(|| Error::Option("no data file is given".into()))
}

fn detect_in(source: &Source, columns: &Columns) -> Result<Detected> {
    if source.shape == Shape::Text {
        return Ok(Detected {
            fits: vec![Task::CausalLm, Task::MaskedLm],
            task: None,
            why: "a file of prose".into(),
        });
    }
    let (first, row) = first_row(source)?;
    let fits: Vec<Task> = Task::ALL
        .into_iter()
        .filter(|task| fits(*task, &row, columns))
        .collect();
    if fits.is_empty() {
        let mut what = format!("no task reads rows with the keys {}", quoted(row.keys()));
        // The likeliest task is the one whose words the file uses.
        let near = [
            (Task::QuestionAns, "context"),
            (Task::TokenCls, "tokens"),
            (Task::TokenCls, "words"),
            (Task::Seq2SeqLm, "source"),
            (Task::SeqCls, "text"),
            (Task::SeqCls, "sentence"),
        ];
        let near = near.iter().find(|(_, key)| row.contains_key(*key));
        let task = near.map_or(Task::SeqCls, |(task, _)| *task);
        if let Err(reason) = Layout::of(task, &row, columns, true) {
            what.push_str(&format!("; for {task}: {reason}"));
        }
        return Err(Error::row(&source.path, first.line, what));
    }
    let labelled: Vec<Task> = fits
        .iter()
        .copied()
        .filter(|task| matches!(task, Task::SeqCls | Task::TokenCls | Task::QuestionAns))
        .collect();
    let task = match (labelled.as_slice(), fits.as_slice()) {
        ([task], _) => Some(*task),
        ([], [task]) => Some(*task),
        _ => None,
    };
    Ok(Detected {
        fits,
        task,
        why: format!("rows with the keys {}", quoted(row.keys())),
    })
}

fn fits(task: Task, row: &Object, columns: &Columns) -> bool {
    match task {
        Task::CausalLm => Format::of(row).is_some(),
        Task::Seq2SeqLm if row.get("prompt").is_some_and(Value::is_array) => false,
        _ => Layout::of(task, row, columns, true).is_ok(),
    }
}
