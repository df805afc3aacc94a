//! LoRA and its relatives on linear layers, embeddings and convolutions.
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
//! | convolutions as targets | over one, two or three axes | `conv.rs` |
//! | `init_lora_weights` | PiSSA 2404.02948, OLoRA 2406.01775, … | `init.rs`, `factors.rs` |
//! | `modules_to_save`, `bias` | parts of the base, trained whole | `saved.rs` of `peft-core` |
//! | `trainable_token_indices` | rows of the embedding | `tokens.rs` |
//! | `target_modules` and all that selects | Python's matching | `selection.rs` of `peft-core`, `plan.rs`, `tables.rs` |
//!
//! [`MergedLora`] is LoRA on parts of a merged projection (`loralib`'s `MergedLinear`), which Python's `peft` has not.
//!
//! # Where this differs from Python
//!
//! - The base is never changed. PiSSA and OLoRA keep what they took from it
//!   beside the factors, so switching the adapter off gives the base, and
//!   the file is always plain LoRA of twice the rank (what Python calls
//!   `path_initial_model_for_weight_conversion`).
//! - A trained bias switches off with its adapter, too.
//! - `lora_bias` merges into a layer without a bias by giving it one, if `config.json` of the model's type can say so.
//! - `ensure_weight_tying` on a model without a shared table, or without an embedding among the targets,
//!   does nothing, as in Python.
//! - An adapter over an embedding or head is saved without the copy of the base's own weight that Python adds
//!   (`base_layer.weight`); Python loads it so, and we load files with the copy. Over a head begun by PiSSA or OLoRA the copy is
//!   of what those left of the base, and the file is refused.
//! - A GPT-2 with the head in `modules_to_save` under `ensure_weight_tying`: Python's file says in its tensors alone that the head
//!   was trained, and is refused.
//! - A of a dilated convolution is dilated as its base is; Python's is not, and fails or disagrees with its own merged
//!   weight. DoRA on a convolution with groups is refused: the norm that Python takes there is of no weight.
//! - A setting that matches nothing, a token that does not exist: errors, not warnings. A pattern for ranks or alphas that no
//!   target has is one where it is typed, and ignored in a file that is read, which works in Python.
//!
//! # Your own network
//!
//! A network needs [`Model`](peft_core::Model): names for its places. A layer of `tch` becomes a place with `into`
//! ([`Linear`](peft_core::Linear), [`Embedding`](peft_core::Embedding)) or [`Conv::of`](peft_core::Conv::of). The folder
//! `examples` has whole programs: `mlp`, `convnet` and `fused_attention`.
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
//!
//! The same on a convolution; its LoRA merges into a weight of the same shape:
//!
//! ```
//! # use peft_core::*;
//! # use peft_lora::LoraConfig;
//! # use tch::{Device, Kind, Tensor, nn};
//! struct Edges(Conv);
//!
//! impl Model for Edges {
//!     fn spec(&self) -> Spec { Spec::default() }
//!     fn slots(&mut self, visit: &mut dyn FnMut(&str, Slot<'_>)) {
//!         visit("conv", Slot::Conv(&mut self.0));
//!     }
//! }
//!
//! let (vs, config) = (nn::VarStore::new(Device::Cpu), nn::ConvConfig { stride: 2, ..Default::default() });
//! let mut edges = Edges(Conv::of(nn::conv2d(vs.root(), 3, 8, 5, config), &config)?);
//! edges.inject("default", &LoraConfig { r: 2, ..LoraConfig::on(["conv"]) })?;
//! # for it in edges.params("default") { let mut t = it.tensor; tch::no_grad(|| t += 0.1); }
//! let x = Tensor::randn([1, 3, 20, 20], (Kind::Float, Device::Cpu));
//! let y = edges.0.forward(&x, Ctx::EVAL); // [1, 8, 8, 8]
//! edges.merge_and_unload()?;
//! assert!(edges.0.forward(&x, Ctx::EVAL).allclose(&y, 1e-4, 1e-4, false));
//! # Ok::<(), Error>(())
//! ```

mod combine;
mod config;
mod conv;
mod convert;
mod dora;
mod embedding;
mod factors;
mod hotswap;
mod in_place;
mod init;
mod lora;
mod low_rank;
mod merged;
mod plan;
mod tables;
pub mod task_vectors;
mod tokens;
mod tuner;

pub use combine::{Combination, CombinationType, Rules, combine};
pub use config::{Bias, Init, LoraConfig, Tokens};
pub use convert::{Converted, ConvertedLayer, Rank, to_lora};
pub use hotswap::hotswap;
pub use merged::MergedLora;
pub use peft_core::Layers;
pub use tables::default_targets;
