//! VeRA: one pair of random matrices for the whole model, and two trained vectors a layer.
//!
//! ```text
//! y = W x + b + λ_b ∘ (B (λ_d ∘ (A x)))      A [r, in]   λ_d [r]   B [out, r]   λ_b [out]
//! ```
//!
//! What LoRA learns for a layer is mostly how much of which direction, so the directions can be anything: here they are
//! drawn once, the same for every layer, and never trained (2310.11454). A layer costs r + out numbers, ten times fewer than
//! LoRA of rank 8, at ranks in the hundreds.
//!
//! A and B are as wide as the widest target; a layer takes the first columns of A and the first rows of B. They are
//! drawn from libtorch's generator, seeded with `projection_prng_key`, so that the same key gives Python's very bits. λ_d begins at
//! `d_initial` and λ_b at zero, so training begins at the base.
//!
//! [`VeraConfig`] is the configuration of Python's `peft`. With `save_projection` the file has A and B, once for the
//! model, under names without a place (`base_model.vera_A`); without, the reader draws them again.
//!
//! # Where this differs from Python
//!
//! - Each adapter has matrices of its own. Python's adapters share those of the first, so their keys must agree and the widths of
//!   the first must suffice.
//! - Drawing them leaves libtorch's generator as it was.
//! - The base is never changed, and a trained bias switches off with its adapter.

mod config;
mod scaled;
mod tables;
mod tuner;

pub use config::{Bias, VeraConfig};
