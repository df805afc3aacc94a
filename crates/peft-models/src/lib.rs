//! GPT-2 and the Llama family, built from any source of weights.
//!
//! A model here is written once. It asks a [`peft_core::Weights`] for its
//! layers and holds [`peft_core::Linear`], [`peft_core::Embedding`] and
//! [`peft_core::Norm`], which know nothing of it; so it is neither dense nor
//! quantised, neither plain nor adapted, but whatever was put in.
//!
//! ```no_run
//! use peft_core::Ctx;
//! use peft_models::{Input, OpenOptions, open};
//! use tch::Tensor;
//!
//! let model = open("path/to/model", OpenOptions::default())?;
//! let ids = Tensor::from_slice(&[1i64, 2, 3]).unsqueeze(0); // [batch, seq]
//! let logits = model.forward(&Input::new(ids), Ctx::EVAL); // [batch, seq, vocab]
//! # Ok::<(), peft_core::Error>(())
//! ```
//!
//! Numbers are those of `transformers`; names, shapes and files as well.

mod activation;
mod assemble;
mod attention;
mod bert;
mod biases;
mod block;
mod body;
mod cache;
mod checkpoint;
mod config;
mod convert;
mod decoder;
mod fingerprint;
mod front;
mod generate;
mod gpt2;
mod head;
mod headed;
mod hub;
mod input;
mod language_model;
mod llama;
mod loss;
mod made_up;
mod open;
mod rope;
mod save;
mod seq2seq;
mod t5;
mod task;

pub use activation::Activation;
pub use assemble::{HeadOptions, MODEL_TYPES, tasks};
pub use cache::Cache;
pub use checkpoint::Checkpoint;
pub use convert::{Converted, convert};
pub use decoder::Decoder;
pub use generate::{
    Answer, GenerateError, Memory, Sampling, Stop, asked_before, converse, generate,
    generate_seq2seq,
};
pub use input::Input;
pub use loss::{IGNORE, causal_loss, head_loss, labelled};
pub use made_up::{MadeUp, build, linear_layers};
pub use open::{OpenOptions, Source, open, open_source, open_source_in, open_task, open_task_in};
pub use rope::Rope;
pub use save::{parameters, save, save_sharded};
pub use seq2seq::{Encoded, Seq2Seq};
pub use task::{Classes, Labels, Network, Problem, Task, UnknownTask};
