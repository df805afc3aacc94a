//! The number formats of quantised weights: NF4 and FP4, their scales quantised once more, and 8-bit dynamic.
//!
//! A tensor is cut into blocks of `block` numbers, whatever its shape (blocks straddle rows). Each block is divided by its largest
//! magnitude, and each quotient becomes the index of the nearest of 16 (or 256) values:
//!
//! ```text
//! absmax = max |x|        code = #{ thresholds < x · (1 / absmax) }        x' = round(table[code] · absmax)
//! ```
//!
//! NF4 (QLoRA, 2305.14314) has the quantiles of a normal distribution as its table, so that normal weights use all codes alike.
//! "Double quantisation" takes the scales as numbers of their own: less their mean, 256 a block, in 8 bits.
//!
//! The bytes are those of `bitsandbytes` 0.50. It has two behaviours, which differ where a block is zero, not finite or cut short,
//! and in the thresholds of FP4: [`Compat::Cuda`], by which the checkpoints that people share were made, and [`Compat::Cpu`].
//! Reading is one: the product in fp32, rounded once.
//!
//! The crate knows no tensors and no libtorch: slices in, slices out, on all cores. Each operation has a scalar form that says what
//! it is, and forms for AVX2, AVX-512 and NEON that give the same bits; [`Level`] chooses.
//!
//! ```
//! use peft_codec::{Block, Compat, Type, dequantise, quantise};
//! let weights: Vec<f32> = (0..200).map(|i| (i as f32 * 0.37).sin()).collect();
//! let packed = quantise(&weights, Type::Nf4, Block::of(64)?, Compat::Cuda);
//! assert_eq!((packed.bytes.len(), packed.absmax.len()), (100, 4));
//! let mut again = vec![0f32; 200];
//! dequantise(&packed.bytes, &packed.absmax, Type::Nf4, Block::of(64)?, &mut again)?;
//! assert!(weights.iter().zip(&again).all(|(x, y)| (x - y).abs() < 0.16));
//! # Ok::<(), peft_codec::Error>(())
//! ```

#![cfg_attr(
    not(target_arch = "x86_64"),
    allow(
        dead_code,
        unused_imports,
        unused_mut,
        reason = "tables that only vector instructions read"
    )
)]

mod adamw8;
mod element;
mod error;
mod four;
mod map;
mod multiply;
mod nearest;
mod nested;
#[cfg(target_arch = "x86_64")]
mod simd;
#[cfg(target_arch = "aarch64")]
#[path = "neon.rs"]
mod simd;
mod state;
mod table;
mod view;

pub use adamw8::{AdamW8, STATE_BLOCK};
pub use element::Element;
pub use error::{Error, Result};
pub use four::{Level, Packed, dequantise, dequantise_at, quantise, quantise_at, quantise_piece};
pub use map::{Map, Quantised, dequantise_blockwise, quantise_blockwise};
pub use multiply::Activations;
pub use nested::{NESTED_BLOCK, Nested};
pub use state::{NestedState, State};
pub use table::{Block, Compat, Type};
pub use view::{Scales, View};
