//! Base weights in 4 and 8 bits, as QLoRA (2305.14314) and LLM.int8 (2208.07339) keep them.
//!
//! ```text
//! y = x · decode(W)ᵀ + b        dx = dy · decode(W)        dW is not wanted
//! ```
//!
//! A frozen weight is read far more often than it is written, so it may lie in memory in a form that takes an eighth of the
//! room, and be decoded for each product. Few rows are multiplied straight from the codes; for many, the weight is decoded into
//! memory that the next layer uses again ([`peft_torch::with_scratch`]), multiplied there and forgotten: no dense
//! copy outlives its product. The backward pass decodes once more and has not saved x, since a frozen weight needs
//! no gradient.
//!
//! [`Quantised`] stands between a source of weights and a model. What the source keeps in few bits, it hands on so; what
//! is dense, it encodes as soon as it is read, if told to ([`Format`]). So neither models nor methods know of it: LoRA on a
//! quantised base is LoRA.
//!
//! The codes are those of [`peft_codec`], the files those of `bitsandbytes` 0.50 and `transformers`.
//!
//! ```
//! use peft_core::{LinearOp, Plain};
//! use peft_quant::{QuantisedLinear, Scheme};
//! use tch::{Kind, Tensor};
//!
//! let weight = Tensor::randn([48, 64], (Kind::Float, tch::Device::Cpu)); // [out, in]
//! let layer = QuantisedLinear::new(&Scheme::NF4, Plain { weight: weight.copy(), bias: None })?;
//! assert!((layer.weight() - &weight).abs().max().double_value(&[]) < 0.6);
//! let x = Tensor::randn([5, 64], (Kind::Float, tch::Device::Cpu));
//! let far = layer.forward(&x) - x.matmul(&layer.weight().tr());
//! assert!(far.abs().max().double_value(&[]) < 1e-4);
//! # Ok::<(), peft_core::Error>(())
//! ```

mod config;
pub mod cuda;
mod eight;
mod ffi;
mod four;
mod layer;
mod source;

pub use config::{Eight, Format, Four, Scheme};
pub use layer::QuantisedLinear;
pub use peft_codec::{Block, Compat, Type};
pub use source::{Decoded, Quantised};
