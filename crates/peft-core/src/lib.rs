//! The contracts that every fine-tuning method, base format and model agree on.
//!
//! Fine-tuning with few parameters is one idea in many dresses: leave the base
//! model as it is and put something small at named places in it. So there are
//! three parties, and each knows only this crate:
//!
//! - a **model** owns its places ([`Linear`], [`Embedding`], [`Conv`], [`Norm`]) and shows them by
//!   the names that Python's `named_modules()` gives them ([`Model::slots`]);
//! - a **base format** says how the weight of a linear layer is kept and multiplied
//!   ([`LinearOp`]: dense, quantised, …) and where weights come from ([`Weights`]);
//! - a **method** is a configuration ([`Tuner`], [`Config`]) that puts an adapter
//!   ([`LinearAdapter`], [`EmbeddingAdapter`], [`ConvAdapter`], [`NormAdapter`], [`PromptAdapter`]) on the places it wants.
//!
//! An adapter sees the layer without itself as [`Beneath`]. That may be dense,
//! quantised or already adapted, and it cannot tell: hence methods × formats
//! needs no code for the product. The base never requires a gradient, and
//! there is no step that could be forgotten to make it so.
//!
//! ```
//! # use peft_core::*;
//! # use tch::{Tensor, Kind, Device};
//! let base = Dense::new(Tensor::randn([5, 7], (Kind::Float, Device::Cpu)), None);
//! let layer = Linear::new(base);
//! let y = layer.forward(&Tensor::randn([2, 7], (Kind::Float, Device::Cpu)), Ctx::EVAL);
//! assert_eq!(y.size(), [2, 5]);
//! ```
//!
//! [`Adapter`] is a method's configuration with its tensors, apart from any
//! model: what a folder with `adapter_config.json` and
//! `adapter_model.safetensors` holds. [`Registry`] reads the configuration of
//! any method by its tag.

mod conv;
mod ctx;
mod embedding;
mod error;
pub mod files;
mod linear;
mod model;
mod norm;
mod params;
mod prompt;
mod registry;
mod rows;
mod saved;
mod schedule;
mod selection;
mod stack;
mod store;
mod targets;
pub mod tensors;
mod thaw;
mod tuner;
mod virtual_tokens;

pub use conv::{Axes, BeneathConv, Conv, ConvAdapter, DenseConv, Geometry};
pub use ctx::Ctx;
pub use embedding::{BeneathEmbedding, Embedding, EmbeddingAdapter};
pub use error::{Error, Result, closest, nearest};
pub use linear::{
    AsStored, BaseFormat, Beneath, Dense, Linear, LinearAdapter, LinearOp, Plain, Stored, Weights,
};
pub use model::{Model, ModelExt, Slot, Spec};
pub use norm::{Affine, Norm, NormAdapter, NormKind};
pub use params::{Param, Params, Visit};
pub use prompt::{Ahead, PromptAdapter, PromptSlot};
pub use registry::{Common, Config, Registry, Unmodelled, parse};
pub use rows::{BASE, Rows};
pub use saved::{BIASES, Saved, Shift, save_whole, train_bias};
pub use schedule::Schedule;
pub use selection::{Layers, Selection, default_targets, with_heads};
pub use store::{Adapter, read_folder, write_folder};
pub use targets::{Names, Pattern, Targets, fullmatch, pattern_value, suffix_match};
pub use tensors::State;
pub use tuner::{Injection, Outline, Site, SiteKind, Start, Tuner};
pub use virtual_tokens::{Form, VirtualTokens};
