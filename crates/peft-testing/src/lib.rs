//! What any fine-tuning method must do, as a suite that it can be put through; and Python's numbers.
//!
//! A method crate writes one test:
//!
//! ```ignore
//! #[test]
//! fn it_keeps_the_laws() {
//!     peft_testing::conforms::<MyConfig>(&[json!({"peft_type": "MINE", "target_modules": ["q_proj"]})]);
//! }
//! ```
//!
//! Each configuration is put on four [toys](toy::Toy) (tied and untied, exact and lossy) and held against each of the
//! [laws](laws::LAWS): a fresh adapter changes nothing; gradients reach what is trained, are slopes, and reach nothing of the
//! base; a window of small batches is the big batch; off is the base to the bit; merged is forward; unmerged are the very
//! bits; several adapters leave no traces on each other; rows of a mixed batch are strangers; deleted is gone; saved is loaded; every key survives; unknown keys
//! that are on are refused; dropout is for training; a failed injection leaves nothing.
//!
//! A method of virtual tokens is put through [`conforms_prompt`]: the same laws but three (a fresh prompt is not the base, and
//! there is nothing to merge), and [its own](ahead): the tokens have the sizes that they say and stand in front of every row;
//! the second adapter's stand behind the first's; merging and mixed batches are refused by name; a loaded file is
//! saved as it was; a resumed training is the unbroken one to the bit.
//!
//! # Does it catch anything?
//!
//! `tests/planted.rs` puts a small correct method through the suite, and then the same method with one mistake each:
//!
//! | planted | caught by |
//! | --- | --- |
//! | the scale is applied to the base's output too | fresh |
//! | the scale is forgotten in the merge | merge |
//! | the merge subtracts instead of adding | merge |
//! | the merge drops the bias | merge |
//! | dropout in evaluation | dropout |
//! | a tensor of the base takes a gradient | base frozen |
//! | the base is changed in place, so that off is not off | off |
//! | a factor is cut off from its gradient | gradients arrive |
//! | the gradient of one factor is not scaled | gradient check |
//! | the gradient is a mean over the batch | accumulation |
//! | a trained tensor is not saved | save |
//! | a trained tensor is saved in fewer bits | save |
//! | a key of the configuration is lost | config survives |
//! | unknown keys are ignored | unknown keys |
//! | virtual tokens: one more is counted than there is | ahead |
//! | keys and values for one layer of two | ahead |
//! | the tokens are others at each call | dropout, in front |
//! | the tokens are put into the table of words | base frozen |
//! | the encoder's input is saved instead of its output | save |
//! | a part of the encoder is not kept | resumed |
//! | a resumed encoder is another | resumed |
//! | what an encoder computed is trained without it | file |
//! | all adapters share one table | second |

pub mod ahead;
pub mod fixtures;
pub mod laws;
mod numbers;
pub mod toy;

use peft_core::Config;
use serde_json::Value;

pub use numbers::{agree, close, distance, same_bits};
use toy::Kit;

/// Holds a method against every law, with each configuration on each toy.
///
/// # Panics
/// At the first law that is broken, with its name, the configuration and what is wrong.
pub fn conforms<C: Config>(cases: &[Value]) {
    conforms_except::<C>(&[], cases);
}

/// The same without some laws, by name, for configurations that break them by design.
///
/// # Panics
/// As [`conforms`]; also if there is no law of such a name.
pub fn conforms_except<C: Config>(laws: &[&str], cases: &[Value]) {
    for law in laws {
        assert!(
            laws::LAWS.iter().any(|(name, _)| name == law),
            "there is no law `{law}`"
        );
    }
    for case in cases {
        if let Some((law, why)) = broken::<C>(case)
            .into_iter()
            .find(|(law, _)| !laws.contains(law))
        {
            panic!("law `{law}` is broken by {case}: {why}");
        }
    }
}

/// Holds a method of virtual tokens against the laws that apply to it, with each configuration on each toy.
///
/// # Panics
/// As [`conforms`].
pub fn conforms_prompt<C: Config>(cases: &[Value]) {
    for case in cases {
        if let Some((law, why)) = broken_prompt::<C>(case).first() {
            panic!("law `{law}` is broken by {case}: {why}");
        }
    }
}

/// The laws that a configuration breaks on some toy, each with a complaint.
pub fn broken<C: Config>(case: &Value) -> Vec<(&'static str, String)> {
    broken_of::<C>(laws::LAWS, case)
}

/// [`broken`] for a method of virtual tokens.
pub fn broken_prompt<C: Config>(case: &Value) -> Vec<(&'static str, String)> {
    broken_of::<C>(&ahead::laws(), case)
}

fn broken_of<C: Config>(laws: &[laws::Law], case: &Value) -> Vec<(&'static str, String)> {
    tch::set_num_threads(1); // The toys are too small to share.
    let mut found = Vec::new();
    for (tied, lossy) in [(false, false), (true, false), (false, true), (true, true)] {
        let kit = Kit { tied, lossy };
        let trial = laws::Trial::of::<C>(case, kit);
        for (name, law) in laws {
            if let Err(why) = law(&trial) {
                found.push((*name, format!("{why} ({kit:?})")));
            }
        }
    }
    found
}
