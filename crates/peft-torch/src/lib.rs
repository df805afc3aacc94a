//! What tch lacks of libtorch, behind safe Rust.
//!
//! tch binds nearly every operation of libtorch and stops there. Fine-tuning
//! wants a little more: autograd functions of one's own ([`Function`]), parts
//! that are computed again instead of being kept ([`checkpoint`]), the
//! optimiser step over all tensors at once ([`AdamW`]), products that use the
//! faster of the two libraries inside libtorch ([`linear`]), a few kernels
//! that read memory once instead of five times ([`rms_norm`], [`rope`],
//! [`swiglu`], [`gelu_tanh`], [`add_low_rank`], [`scale`], [`cross_entropy_`], [`gemv`]), the state of the random generators
//! ([`rng`]), memory figures and memory that is lent ([`memory`], [`with_scratch`]), its threads ([`for_each_chunk`]) and the CUDA half of libtorch found
//! at run time ([`cuda`]), so that one program serves both.
//!
//! Why a shim in C++ and not a fork of tch: three small files against public
//! headers survive an update of either; a fork does not. All of the C++ of
//! the workspace and its `unsafe` outside of SIMD kernels live here.

mod adamw;
mod attention;
mod checkpoint;
pub mod cuda;
mod ffi;
mod function;
mod linear;
mod low_rank;
pub mod memory;
mod ops;
pub mod rng;
mod scratch;
pub mod thin;
mod threads;

pub use adamw::{AdamW, Moments};
pub use attention::attention;
pub use checkpoint::{Pass, checkpoint};
pub use function::{Function, apply, backward, drop_grad, vjp};
pub use linear::{add_product, fast_fp32, linear, linear_unread, set_fast_fp32, unread};
pub use low_rank::add_low_rank;
pub use ops::{
    add_, add_row_, cross_entropy_, gelu_tanh, gemv, rms_norm, rope, scale, scale_, swiglu,
};
pub use scratch::{kept, with_scratch};
pub use threads::{end_process, for_each_chunk};
