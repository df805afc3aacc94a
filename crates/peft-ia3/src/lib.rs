//! (IA)³: learned factors for what flows through linear layers.
//!
//! ```text
//! y = l ∘ (W x + b)     l [out]    keys, values
//! y = W (l ∘ x) + b     l [in]     feed-forward: the activations within
//! ```
//!
//! Infused Adapter by Inhibiting and Amplifying Inner Activations (2205.05638): nothing is added to a
//! weight, it only says how loud each key, value and activation is. That is one number a column where LoRA has
//! 2r, so it learns little and needs little: a few examples, a high learning rate, a file of some hundred
//! kilobytes. l = 1 at the start, so training begins at the base, and afterwards l goes into the rows (or
//! columns) of W and, on the output, into b: the layer costs nothing more.
//!
//! [`Ia3Config`] is the configuration of Python's `peft`, keys and defaults. It is also the method that
//! CONTRIBUTING.md walks through, since it is the smallest that has everything.
//!
//! | file | what is in it |
//! | --- | --- |
//! | `config.rs` | the settings, and what of them can be wrong without a model |
//! | `tuner.rs` | where it acts |
//! | `factors.rs` | what it does |
//! | `combine.rs` | several adapters as one: Σ wᵢ lᵢ |
//! | `tables.rs` | default targets by the type of the model |
//!
//! # Where this differs from Python
//!
//! - The base is never changed, so unmerging gives back its very bits; Python divides by l + 1e-8.
//! - On targets given as a list, `feedforward_modules` that is left out is filled in as an expression where the default names are
//!   no entries of that list: Python writes a list there which it then refuses to read.
//! - A setting that matches nothing is an error; `feedforward_modules` only where they are typed, not in a file.

mod combine;
mod config;
mod factors;
mod tables;
mod tuner;

pub use combine::combine;
pub use config::Ia3Config;
