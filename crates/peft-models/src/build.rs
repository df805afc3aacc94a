//! What every decoder does alike when it is built.

use peft_core::{Dense, Error, Linear, Result, Weights};
use tch::Tensor;

/// The output head: its own weight, or the table of the input embedding.
pub(crate) fn head(weights: &mut dyn Weights, embed: &Tensor, tied: bool) -> Result<Linear> {
    let key = "lm_head.weight";
    let size = embed.size();
    let weight = match tied {
        false => weights.tensor(key, &size)?,
        true => {
            if weights.has(key) && !weights.tensor(key, &size)?.equal(embed) {
                return Err(Error::Config {
                    peft_type: "model".into(),
                    reason: format!(
                        "`tie_word_embeddings` is true, but `{key}` differs from the input embedding"
                    ),
                });
            }
            embed.shallow_clone()
        }
    };
    Ok(Linear::new(Dense::new(weight, None)))
}
