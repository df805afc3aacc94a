//! One batch for a model of any task.

use peft_core::{Error, Result};
use tch::{Kind, Tensor};

/// One batch.
#[derive(Debug)]
pub struct Input {
    /// Token ids `[batch, seq]`, int64, each below the vocabulary size.
    pub ids: Tensor,
    /// `[batch, past + seq]`: 1 for a token, 0 for padding; `None`: all tokens.
    pub attention_mask: Option<Tensor>,
    /// `[batch or 1, seq]`; `None`: counted as `transformers` does it (from the length of the cache; RoBERTa: behind
    /// its padding).
    pub position_ids: Option<Tensor>,
    /// `[batch, seq]`: to which of several texts a token belongs (BERT); `None`: all to the first.
    pub token_type_ids: Option<Tensor>,
    /// What the decoder of an encoder-decoder reads `[batch, target]`; `None`: the labels, shifted to the right.
    pub decoder_ids: Option<Tensor>,
    /// `[batch, target]`: 1 for a token of `decoder_ids`, 0 for padding; `None`: all tokens.
    pub decoder_mask: Option<Tensor>,
}

impl Input {
    /// A batch without padding.
    pub fn new(ids: Tensor) -> Input {
        Input {
            ids,
            attention_mask: None,
            position_ids: None,
            token_type_ids: None,
            decoder_ids: None,
            decoder_mask: None,
        }
    }

    /// Checks shapes and that every id has a row in its table, with `ahead` virtual tokens before each row.
    pub(crate) fn check(&self, sizes: &Sizes, ahead: i64) -> Result<()> {
        let size = self.ids.size();
        let &[batch, seq] = size.as_slice() else {
            return Err(fault(format!("ids are {size:?}, expected [batch, seq]")));
        };
        if batch == 0 || seq == 0 {
            return Err(fault(format!("ids are {size:?}: there is nothing to read")));
        }
        within("ids", &self.ids, sizes.vocab)?;
        shaped("attention_mask", self.attention_mask.as_ref(), batch, seq)?;
        shaped("token_type_ids", self.token_type_ids.as_ref(), batch, seq)?;
        if let Some(types) = &self.token_type_ids {
            match sizes.token_types {
                Some(types_known) => within("token_type_ids", types, types_known)?,
                None => return Err(fault("this model has no token types".to_owned())),
            }
        }
        if let Some(table) = sizes.positions {
            let longest = sizes.longest - ahead;
            if let Some(given) = &self.position_ids {
                within("position_ids", given, table - ahead)?;
            }
            if seq > longest && (self.position_ids.is_none() || ahead > 0) {
                return Err(fault(format!(
                    "a row has {seq} tokens, the model holds {longest}"
                )));
            }
        }
        if let Some(given) = &self.position_ids {
            let rows = given.size().first().copied().unwrap_or(0);
            shaped(
                "position_ids",
                Some(given),
                if rows == 1 { 1 } else { batch },
                seq,
            )?;
        }
        if let Some(ids) = &self.decoder_ids {
            let target = ids.size().get(1).copied().unwrap_or(0);
            shaped("decoder_ids", Some(ids), batch, target)?;
            within("decoder_ids", ids, sizes.vocab)?;
            shaped("decoder_mask", self.decoder_mask.as_ref(), batch, target)?;
        }
        Ok(())
    }
}

/// How large the tables of a model are.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sizes {
    /// Tokens.
    pub(crate) vocab: i64,
    /// Rows of the table of positions, where there is one.
    pub(crate) positions: Option<i64>,
    /// The longest row that the table of positions allows.
    pub(crate) longest: i64,
    /// Kinds of text.
    pub(crate) token_types: Option<i64>,
}

/// An [`Error::Batch`].
pub(crate) fn fault(reason: String) -> Error {
    Error::Batch { reason }
}

fn shaped(name: &str, tensor: Option<&Tensor>, batch: i64, seq: i64) -> Result<()> {
    match tensor.map(Tensor::size) {
        Some(size) if size != [batch, seq] => Err(fault(format!(
            "{name} is {size:?}, expected [{batch}, {seq}]"
        ))),
        _ => Ok(()),
    }
}

/// Checks that whole numbers lie in `0..below`.
pub(crate) fn within(name: &str, ids: &Tensor, below: i64) -> Result<()> {
    if ids.kind() != Kind::Int64 {
        let kind = ids.kind();
        return Err(fault(format!(
            "{name} are of type {kind:?}, expected Int64"
        )));
    }
    if ids.numel() == 0 {
        return Ok(());
    }
    let ends = Tensor::stack(&[ids.min(), ids.max()], 0);
    let ends = Vec::<i64>::try_from(ends)?;
    match ends.iter().find(|it| !(0..below).contains(*it)) {
        Some(id) => Err(fault(format!(
            "{name} has {id}, expected 0 to {}",
            below - 1
        ))),
        None => Ok(()),
    }
}
