//! What a model's answers are worth.
//!
//! | answers | numbers | as in |
//! | --- | --- | --- |
//! | a class each | [`Confusion`]: accuracy, precision, recall, F1 | scikit-learn |
//! | several classes each | [`Flags`]: F1, exact rows, Hamming loss | scikit-learn |
//! | a class for each word | [`entities`]: F1 over entities | seqeval |
//! | a piece of a text | [`exact_match`], [`answer_f1`] | SQuAD |
//! | numbers | [`Numbers`]: errors and correlations | scikit-learn, scipy |
//! | a text | [`bleu`], [`rouge`] | sacreBLEU, rouge-score |
//! | probabilities of tokens | [`perplexity`] | – |
//!
//! A number under a famous name must be that number: two programs that both
//! print "F1" and disagree are worth less than one. So each is compared with
//! the Python package that people quote (`fixtures/metrics`), down to how it
//! breaks words and what it makes of a class without rows. Inputs are indices,
//! numbers and strings; nothing in here knows a model, a tensor or a file of
//! data.
//!
//! ```
//! use peft_metrics::Confusion;
//!
//! let classes = ["cat".to_string(), "dog".to_string()];
//! let seen = Confusion::of(&classes, &[0, 0, 1, 1], &[0, 1, 1, 1])?;
//! assert_eq!(seen.accuracy(), 0.75);
//! assert_eq!(seen.class(1).precision, 2.0 / 3.0);
//! println!("{}\n{}", seen.report(), seen.table());
//! # Ok::<(), peft_metrics::Error>(())
//! ```

mod answers;
mod bleu;
mod confusion;
mod entities;
mod error;
mod flags;
mod numbers;
mod picture;
mod rouge;
mod table;

pub use answers::{answer_f1, exact_match};
pub use bleu::{Bleu, bleu};
pub use confusion::{Confusion, Score};
pub use entities::{Entities, Entity, entities, token_accuracy};
pub use error::{Error, Result};
pub use flags::Flags;
pub use numbers::Numbers;
pub use rouge::{Overlap, Rouge, Words, rouge};

/// exp of the mean loss in nats: as many words as the model hesitates between.
pub fn perplexity(mean_loss: f64) -> f64 {
    mean_loss.exp()
}
