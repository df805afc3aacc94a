//! LoRA and its relatives on linear and embedding layers.
//!
//! ```text
//! y = W x + b + s·B(A x)        A [r, in]   B [out, r]   s = α/r
//! ```
//!
//! A pretrained weight is good nearly everywhere; what a task wants of it lies
//! in few directions. So W stays as it is and a product of rank r is trained
//! beside it (2106.09685): at r = 8 that is 12,288 numbers for a layer of 768 × 768
//! instead of 589,824, the file is some megabytes, the optimiser has nearly nothing to
//! keep, and after training W + s·BA is one weight again.
//!
//! [`LoraConfig`] is all there is to it from outside: the keys of Python's
//! `LoraConfig` with their meaning and their defaults. Injected into a model it puts
//! an adapter on each target.
//!
//! | setting | what it does | file |
//! | --- | --- | --- |
//! | plain, `use_rslora`, `lora_bias`, `lora_dropout` | 2106.09685, 2312.03732 | `lora.rs`, `in_place.rs` |
//! | `use_dora` | magnitude and direction, 2402.09353 | `dora.rs` |
//! | embeddings as targets | factors that are looked up | `embedding.rs` |
//! | `init_lora_weights` | PiSSA 2404.02948, OLoRA 2406.01775, … | `init.rs`, `factors.rs` |
//! | `modules_to_save`, `bias` | parts of the base, trained whole | `saved.rs` of `peft-core` |
//! | `trainable_token_indices` | rows of the embedding | `tokens.rs` |
//! | `target_modules` and all that selects | Python's matching | `selection.rs` of `peft-core`, `plan.rs`, `tables.rs` |
//!
//! # Where this differs from Python
//!
//! - The base is never changed. PiSSA and OLoRA keep what they took from it
//!   beside the factors, so switching the adapter off gives the base, and
//!   the file is always plain LoRA of twice the rank (what Python calls
//!   `path_initial_model_for_weight_conversion`).
//! - A trained bias switches off with its adapter, too.
//! - `lora_bias` merges into a layer without a bias by giving it one.
//! - `ensure_weight_tying` on a model without a shared table, or without an embedding among the targets,
//!   does nothing, as in Python.
//! - An adapter over an embedding or head is saved without the copy of the base's own weight that Python adds
//!   (`base_layer.weight`); Python loads it so, and we load files with the copy.
//! - A setting that matches nothing, a token that does not exist, a pattern without a layer: errors, not warnings.
//!
//! # Your own network
//!
//! ```
//! use peft_core::*;
//! use peft_lora::LoraConfig;
//! use tch::{Device, Kind, Tensor};
//!
//! /// Two layers of one's own; what a method needs to know of them is their names.
//! struct Mlp { up: Linear, down: Linear }
//!
//! impl Model for Mlp {
//!     fn spec(&self) -> Spec { Spec::default() }
//!     fn slots(&mut self, visit: &mut dyn FnMut(&str, Slot<'_>)) {
//!         visit("up", Slot::Linear(&mut self.up));
//!         visit("down", Slot::Linear(&mut self.down));
//!     }
//! }
//!
//! let dense = |out, inp| Linear::new(Dense::new(Tensor::randn([out, inp], (Kind::Float, Device::Cpu)), None));
//! let mut mlp = Mlp { up: dense(32, 8), down: dense(1, 32) };
//! let lora = LoraConfig { r: 4, lora_alpha: 8.0, ..LoraConfig::on(["up", "down"]) };
//! mlp.inject("default", &lora)?;
//!
//! let x = Tensor::randn([16, 8], (Kind::Float, Device::Cpu));
//! let y = mlp.down.forward(&mlp.up.forward(&x, Ctx::TRAIN).relu(), Ctx::TRAIN);
//! y.square().mean(Kind::Float).backward(); // gradients for A and B, none for the base
//! assert_eq!(mlp.trainable("default").len(), 4);
//! # assert!(mlp.trainable("default").iter().all(|it| it.tensor.grad().defined()));
//! # Ok::<(), Error>(())
//! ```

mod combine;
mod config;
mod convert;
mod dora;
mod embedding;
mod factors;
mod hotswap;
mod in_place;
mod init;
mod lora;
mod low_rank;
mod plan;
mod tables;
pub mod task_vectors;
mod tokens;
mod tuner;

pub use combine::{Combination, CombinationType, Rules, combine};
pub use config::{Bias, Init, LoraConfig, Tokens};
pub use convert::{Converted, ConvertedLayer, Rank, to_lora};
pub use hotswap::hotswap;
pub use peft_core::Layers;
pub use tables::default_targets;
