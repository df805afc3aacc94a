//! Prompt tuning and P-tuning: trained embeddings before those of the input (2104.08691, 2103.10385).
//!
//! ```text
//! x = [P; E[ids]]                                  P [n, D]: n virtual tokens of the width D of the model
//!
//! P                                                prompt tuning: it is what is trained
//! P = W₃ relu(W₂ relu(W₁ e + b₁) + b₂) + b₃        P-tuning, MLP:  e [n, D]   W₁ [h, D]  W₂ [h, h]  W₃ [D, h]
//! P = W₂ relu(W₁ lstm(e) + b₁) + b₂                P-tuning, LSTM: lstm(e) [n, 2h]  W₁ [2h, 2h]  W₂ [D, 2h]
//! ```
//!
//! An instruction before the input changes what a model does with it. Its words are points of the embedding's space, and nothing
//! says that the best instruction is among those points. So n vectors are put before the input and
//! trained, and the model stays as it is: n·D numbers, for 20 tokens of width 4096 a third of a megabyte.
//!
//! P-tuning trains a small network that computes the vectors. They then depend on each
//! other and start close together, which trains more steadily; once trained, the network is not needed any more. Python's
//! files hold its output only. So does the file here that other programs read; the network itself
//! lies beside it in a file of our own, and training goes on where it stopped
//! ([`Adapter::resume`](peft_core::Adapter::resume)), which in Python it cannot.
//!
//! | type | `peft_type` | on disk | file |
//! | --- | --- | --- | --- |
//! | [`PromptConfig`] | `PROMPT_TUNING` | `prompt_embeddings` `[rows, D]` | `prompt.rs`, `begin.rs` |
//! | [`PtuningConfig`] | `P_TUNING` | `prompt_embeddings` `[rows, D]`, computed | `ptuning.rs`, `encoder.rs` |
//!
//! rows is n, and 2n in an encoder with a decoder. There the encoder gets the first n; the others are
//! never read, as in Python, and are there because the file has them.
//!
//! # How prompt tuning begins
//!
//! | `prompt_tuning_init` | each row is |
//! | --- | --- |
//! | `RANDOM` | normal numbers |
//! | `SAMPLE_VOCAB` | the embedding of a token drawn from the whole vocabulary |
//! | `TEXT` | the embedding of a token of a text, repeated or cut to as many as there are rows |
//! | `RANDOM` with `label_words` | the mean of the embeddings of a class's word: one row a class, repeated |
//!
//! The last is not in Python. In a classification the best start of the paper is the words for the classes
//! themselves. It is saved as `RANDOM` beside a key that Python passes over (`label_words`), so Python loads the
//! file, which loses nothing: a file holds the trained rows, and how they began is history.
//!
//! This crate knows no tokenizer. Whoever has one gives the ids: [`PromptConfig::with_text`],
//! [`PromptConfig::with_labels`]. Loading needs none.
//!
//! ```
//! use peft_prompt::{PromptConfig, PtuningConfig};
//! let text = "Classify if the tweet is a complaint or not:";
//! let prompt = PromptConfig::of(8).with_text(text, "bigscience/bloomz-560m", &[17, 4, 250, 3]);
//! let labels = PromptConfig::default().with_labels(&[("complaint", &[91, 7]), ("no complaint", &[12, 91, 7])]);
//! let ptuning = PtuningConfig { encoder_hidden_size: Some(128), ..PtuningConfig::of(20) };
//! assert_eq!(labels.label_words, Some(vec!["complaint".to_owned(), "no complaint".to_owned()]));
//! # assert!(prompt.init_ids.is_some() && ptuning.encoder_num_layers == 2);
//! ```
//!
//! # Where this differs from Python
//!
//! - Several adapters may be on: the second stands behind the first. In Python one is active.
//! - A network is saved as it is in evaluation; Python computes the rows with dropout if the model is in training.
//! - `encoder_num_layers` and `encoder_dropout` do nothing in an MLP. A file may say what it likes; a training that
//!   asks for them is refused.
//! - Sizes in a file that contradict the model, and token ids beyond the vocabulary, are errors.

mod begin;
mod encoder;
mod prompt;
mod ptuning;
mod table;

pub use prompt::{PromptConfig, PromptInit};
pub use ptuning::{EncoderType, PtuningConfig};
