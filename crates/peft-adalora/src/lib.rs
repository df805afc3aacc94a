//! AdaLoRA: a low-rank update that shares out its ranks as it learns where they are needed.
//!
//! ```text
//! y = W x + b + s·B (E ∘ (A x))      A [r, in]   E [r, 1]   B [out, r]   s = α / (r + 1e-5)
//! ```
//!
//! LoRA gives every layer the same rank. Layers are not alike, so here the update has the shape of a singular value
//! decomposition (2303.10512): B and A are held near orthogonal by a term of the loss, E is what a singular value is, and an
//! entry of E set to zero takes one rank away without a trace of it in the others. Training begins with `init_r` ranks a
//! layer; while it goes on, the triplets (a row of A, an entry of E, a column of B) that matter least are set to zero, over
//! all layers together, until `target_r` a layer are left on average.
//!
//! How much a triplet matters is |w · ∂L/∂w|, what the loss would change by if w were nothing, smoothed over steps and multiplied by
//! how unsure that is: `schedule.rs` has the formulas and the budget.
//!
//! s is that of `init_r` for ever, also when ranks are gone. With A normal, E zero and B normal at the start the update is zero.
//!
//! | file | what is in it |
//! | --- | --- |
//! | `config.rs` | the settings, and what of them can be wrong without a model |
//! | `tuner.rs` | where it acts, and what the file says of the ranks that are left |
//! | `triplets.rs` | what it does at a layer |
//! | `schedule.rs` | the term of the loss, importance, budget and masks |
//! | `tables.rs` | default targets by the type of the model |
//!
//! # Training
//!
//! A loop asks [`peft_core::Tuner::schedule`] and calls it; that of `peft-train` does. `total_step` must be the
//! number of steps of the run. In Python it is the user who calls `update_and_allocate`.
//!
//! ```
//! use peft_adalora::AdaLoraConfig;
//! use peft_core::Tuner;
//! let adalora = AdaLoraConfig { tinit: 100, tfinal: 300, ..AdaLoraConfig::on(["q_proj", "v_proj"], 1000) };
//! let mut schedule = adalora.schedule().expect("ranks are shared out");
//! # let params: Vec<peft_core::Param> = Vec::new();
//! # for step in 1..=3 {
//! // loss.backward(); schedule.penalty(&params).backward(); optimizer.step();
//! schedule.after_step(&params, step)?;
//! // optimizer.zero_grad();
//! # }
//! # Ok::<(), peft_core::Error>(())
//! ```
//!
//! # The file
//!
//! `rank_pattern` says which ranks are left (`"<place>.lora_E": [true, false, …]`), and the tensors have those only. A rank is
//! left out that is masked and zero: between two masks a masked entry of E can grow again, and a file must give
//! what the model gave. (Python leaves it out, so its file gives something else then.)
//!
//! # Where this differs from Python
//!
//! - The base is never changed.
//! - Python's `fan_in_fan_out` and `r` change nothing; so here.
//! - A mask that would take away all ranks (`target_r` 0) is possible; the layer is then the base.
//! - A budget of all ranks takes none away. Python asks for the smallest of no scores and stops with an error.

mod config;
mod schedule;
mod tables;
mod triplets;
mod tuner;

pub use config::{AdaLoraConfig, Bias};
pub use schedule::Allocator;
