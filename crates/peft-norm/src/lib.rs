//! LN tuning: the norms of a model, trained, and nothing else.
//!
//! ```text
//! y = (x − μ)/√(σ² + eps) · w' + b'      w', b' [hidden] in place of the norm's w, b
//! ```
//!
//! Two vectors a norm are five hundredths of a percent of a model, and they lie where all of its features pass
//! (2312.11420 tunes them so that a language model reads images). Nothing is computed that was not computed
//! before, so it costs no time, neither in training nor after, and w', b' are what a merged norm simply has.
//!
//! [`NormConfig`] is what Python's `peft` calls `LNTuningConfig`: a copy of each target is trained and saved under
//! `ln_tuning_layers`, in the dtype of the base, as everything that is a copy of a part of the base. Python takes any
//! module as a target and copies it; so linear layers and embeddings can be named here, too.
//!
//! # Several at once
//!
//! Python keeps several and runs one. Here the effects of adapters add up: with one norm's adapters a and b on,
//! the norm is w + (wₐ − w) + (w_b − w), and with one alone it is that one's very bits. For a linear layer or an embedding,
//! the adapter on top counts.
//!
//! # Learning rate
//!
//! w begins at about one and has to move by tenths, where the factors of a LoRA move by hundredths: what is good for LoRA (2e-4) leaves
//! the norms where they are. Some 1e-3 to 1e-2 is the range to look in.

mod config;
mod tables;
mod tuned;
mod tuner;

pub use config::NormConfig;
