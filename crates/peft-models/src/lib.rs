//! GPT-2 and the Llama family, built from any source of weights.

mod decoder;
mod loss;

pub use decoder::{Cache, Decoder, Input};
pub use loss::{IGNORE, causal_loss, head_loss, labelled};
