//! What the model will see of a row, token by token.
//!
//! A token is not always a piece of text: a character may be spread over
//! several. So a token shows the text that becomes certain with it, and the
//! texts of all tokens joined are the text of the row.

use crate::error::Result;
use crate::prepare::Row;
use crate::tokenizer::Tokenizer;

/// One token of a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Its id.
    pub id: u32,
    /// The text that it completes; empty for the first parts of a character.
    pub text: String,
    /// Whether the model is to learn to say it.
    pub trained: bool,
}

/// The tokens of a row with their texts.
pub fn pieces(tokenizer: &Tokenizer, row: Row<'_>) -> Result<Vec<Piece>> {
    let mut stream = tokenizer.stream(false);
    let mut pieces = Vec::with_capacity(row.ids.len());
    for (id, trained) in row.ids.iter().zip(row.mask()) {
        pieces.push(Piece {
            id: *id,
            text: stream.push(*id)?.unwrap_or_default(),
            trained,
        });
    }
    if let (Some(rest), Some(last)) = (stream.finish()?, pieces.last_mut()) {
        last.text.push_str(&rest);
    }
    Ok(pieces)
}
