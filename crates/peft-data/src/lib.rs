//! From a file of conversations to batches of token ids.
//!
//! Five steps, each of which can be looked at on its own:
//!
//! ```text
//! file ──► row ──► text and what of it is trained ──► ids and mask ──► batches
//!      format      chat template                  tokenizer        plan, collate
//! ```
//!
//! Every one of them can quietly ruin a training run: a row that is dropped, a
//! blank too many in a template, an end token that is never learnt, a mask that
//! is off by one. So the rules of this crate are: formats are read off the
//! keys and never guessed, rows that disagree are errors with file and line,
//! templates give Python's text to the byte, masks go by position, and what the
//! model will see can be shown token by token ([`pieces`]).
//!
//! Nothing in here knows about tensors; a [`Batch`] is three vectors of
//! integers in the shape that Hugging Face's models take.
//!
//! Conversations and prose are for causal models. What the other tasks need
//! (texts with classes, words with tags, questions with answers, pairs of
//! source and target, words to fill in) takes the same way with rows of its own:
//! see [`Task`] and [`prepare_task`].
//!
//! ```no_run
//! use peft_data::{Options, Plan, Side, Tokenizer, prepare};
//!
//! # fn main() -> peft_data::Result<()> {
//! let tokenizer = Tokenizer::open("SmolLM2-135M-Instruct".as_ref())?;
//! let data = prepare(&["train.jsonl".into()], &tokenizer, &Options::default(), &|_| {})?;
//! println!("{} rows, {} trained tokens", data.len(), data.report().trained_tokens);
//!
//! let plan = Plan::new((0..data.len()).collect(), 8, 42)?.shuffled();
//! for batch in plan.epoch(0) {
//!     let batch = data.batch(&batch, tokenizer.pad_id(), Side::Right, 8)?;
//!     assert_eq!(batch.labels.len(), batch.rows * batch.cols);
//! }
//! # Ok(())
//! # }
//! ```

// A list of one byte range is what it says, not a list of numbers.
#![allow(clippy::single_range_in_vec_init)]

mod batch;
mod bpe;
mod cache;
mod error;
mod format;
mod map;
mod message;
mod prepare;
mod python;
mod sample;
mod show;
mod source;
mod table;
mod task;
mod template;
mod tokenizer;

pub use batch::{Batch, Holdout, IGNORED, Plan, Side, collate, split};
pub use error::{Error, Result};
pub use format::{Format, detect};
pub use message::Message;
pub use prepare::{Dataset, FileReport, Options, Progress, Report, Row, prepare};
pub use sample::Turns;
pub use show::{Piece, pieces};
pub use task::{
    Columns, Detected, Found, Pass, Problem, Question, Search, Shown, Target, Targets, Task,
    TaskBatch, TaskDataset, TaskOptions, TaskPiece, TaskReport, TaskRow, detect_task, prepare_task,
};
pub use template::{ChatTemplate, RenderOptions};
pub use tokenizer::{DecodeStream, Offsets, Tokenizer};
