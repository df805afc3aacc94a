//! A training loop that one can read.
//!
//! [`train`] is a function, not a class with eighty flags: it takes something
//! that gives a loss ([`Objective`]), [`Settings`] under Hugging Face's names,
//! rows ([`Data`]), a folder ([`Run`]) and somebody who watches ([`Observer`]).
//! What it promises:
//!
//! - a window of accumulated batches gives the gradient of the big batch;
//! - a seed means one result: two runs give the same bits, and so does a run
//!   that was killed and goes on from its checkpoint;
//! - a loss or gradient that is no number stops the run before it changes
//!   anything, and says which rows it came from;
//! - every file of the run's folder is there whole or not at all.
//!
//! ```no_run
//! use peft_train::{CausalLm, Data, Result, Rows, Run, Settings, train};
//!
//! # fn example(model: &mut dyn peft_models::Decoder, tuner: &dyn peft_core::Tuner) -> Result<()> {
//! let tokenizer = peft_data::Tokenizer::open("model".as_ref())?;
//! let options = peft_data::Options::default();
//! let rows = peft_data::prepare(&["train.jsonl".into()], &tokenizer, &options, &|_| {})?;
//! let all = (0..rows.len()).collect();
//! let data = Data { train: Rows::new(&rows, all, tokenizer.pad_id())?, held_out: None };
//!
//! let run = Run::create("run".as_ref(), false)?;
//! let mut objective = CausalLm { model, name: "default", tuner };
//! let summary = train(&mut objective, &Settings::default(), &data, &run, None, &mut ())?;
//! println!("{} steps, loss {:?}", summary.steps, summary.loss);
//! # Ok(())
//! # }
//! ```

mod checkpoint;
mod cuda;
mod curve;
mod data;
mod eight_bits;
mod error;
mod ffi;
mod log;
mod number;
mod objective;
mod optimizer;
mod run;
mod schedule;
mod settings;
mod train;

pub use checkpoint::{Checkpoint, Interval, Progress};
pub use curve::{Curve, draw, draw_several};
pub use data::{Batch, Rows};
pub use error::{Error, Result};
pub use log::{EvalRecord, Record, StepRecord, read_log};
pub use objective::{
    CausalLm, Judge, Objective, Part, Tuned, loss, next_token_loss, task_tensors, tensors, widest,
};
pub use optimizer::{Optimizer, decays};
pub use run::{Run, RunInfo, Status};
pub use schedule::{Plateau, Schedule, ScheduleType};
pub use settings::{Keep, Optim, Settings};
pub use train::{Best, Data, Ending, Evaluation, Event, Observer, Summary, evaluate, train};
