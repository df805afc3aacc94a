//! How the rows of a prompt begin.
//!
//! ```text
//! RANDOM        N(0, 1)
//! SAMPLE_VOCAB  E[t], t uniform over the vocabulary
//! words         mean of E[t] over the tokens t of word i mod count      text: a word is one token
//! ```
//!
//! The random numbers are drawn in Python's order, so that on a processor a seed gives what it gives there.

use peft_core::Result;
use tch::{Kind, Tensor};

use crate::PromptConfig;

/// Normal numbers `[rows, width]`.
pub(crate) fn random(words: &Tensor, rows: i64, width: i64) -> Result<Tensor> {
    Ok(Tensor::f_randn(
        [rows, width],
        (Kind::Float, words.device()),
    )?)
}

/// Embeddings of random tokens `[rows, width]`; words: `[vocab, width]`.
pub(crate) fn sampled(words: &Tensor, rows: i64, width: i64) -> Result<Tensor> {
    drop(random(words, rows, width)?); // Python's table exists before its rows are replaced.
    let vocab = words.size()[0];
    let ids = Tensor::f_randint(vocab, [rows], (Kind::Int64, words.device()))?;
    Ok(words.detach().f_index_select(0, &ids)?.to_kind(Kind::Float))
}

/// For each row the mean of the embeddings of one word, the words over and over `[rows, width]`.
pub(crate) fn at_words(words: &Tensor, rows: i64, ids: &[Vec<i64>]) -> Result<Tensor> {
    let vocab = words.size()[0];
    let all = ids.iter().flatten();
    for id in all {
        if !(0..vocab).contains(id) {
            return Err(PromptConfig::fault(format!(
                "token {id} to begin with is not in the vocabulary of {vocab}"
            )));
        }
    }
    if ids.is_empty() || ids.iter().any(Vec::is_empty) {
        return Err(PromptConfig::fault(
            "a text or word to begin with has no tokens",
        ));
    }
    let words = words.detach();
    let one = |word: &Vec<i64>| -> Result<Tensor> {
        let at = Tensor::from_slice(word).to_device(words.device());
        let tokens = words.f_index_select(0, &at)?.to_kind(Kind::Float);
        Ok(match word.len() {
            1 => tokens.squeeze_dim(0),
            _ => tokens.mean_dim(0, false, Kind::Float),
        })
    };
    let means: Vec<Tensor> = ids.iter().map(one).collect::<Result<_>>()?;
    let cycle = means.iter().cycle().take(rows as usize);
    Ok(Tensor::f_stack(&cycle.collect::<Vec<_>>(), 0)?)
}
