//! Single rows of an embedding that are trained: `trainable_token_indices`.
//!
//! The rows are whole new rows, not shifts, and begin as the base's. On a table
//! y = E'[ids] is a look-up in the base in which the chosen tokens are replaced,
//! so that no copy of the table is made. On an output embedding the scores of
//! the chosen tokens are computed anew: y[.., t] = x·E'ₜ + bₜ. A head that
//! shares the table shares the rows.

use peft_core::{
    Beneath, BeneathEmbedding, Ctx, EmbeddingAdapter, LinearAdapter, LinearOp, Params, Plain, Visit,
};
use tch::{Kind, Tensor};

use crate::{factors::leaf, in_place::replace_columns};

/// The on-disk name below the layer.
const ROWS: &str = "token_adapter.trainable_tokens_delta";

/// Rows `[n, hidden]` in place of those of `tokens`, as a tensor `indices` `[n]`.
#[derive(Debug)]
pub(crate) struct Tokens {
    tokens: Vec<i64>,
    indices: Tensor,
    rows: Tensor,
    /// For each token of the vocabulary its row, or −1; made for tables only.
    place: Option<Tensor>,
    /// They are somebody else's: the input embedding's.
    borrowed: bool,
}

impl Tokens {
    /// The rows that `table` `[vocab, hidden]` has now.
    pub(crate) fn new(table: &Tensor, indices: &[i64]) -> Tokens {
        let on = Tensor::from_slice(indices).to_device(table.device());
        let rows = leaf(&tch::no_grad(|| table.detach().index_select(0, &on)));
        Tokens {
            tokens: indices.to_vec(),
            indices: on,
            rows,
            place: None,
            borrowed: false,
        }
    }

    /// The same, for looking up.
    pub(crate) fn of_table(table: &Tensor, indices: &[i64]) -> Tokens {
        let tokens = Tokens::new(table, indices);
        let at = (Kind::Int64, table.device());
        let place = Tensor::full([table.size()[0]], -1, at);
        let count = Tensor::arange(indices.len() as i64, at);
        let place = Some(place.index_copy(0, &tokens.indices, &count));
        Tokens { place, ..tokens }
    }

    /// Rows that belong to another place.
    pub(crate) fn borrowed(rows: &Tensor, indices: &[i64]) -> Tokens {
        Tokens {
            tokens: indices.to_vec(),
            indices: Tensor::from_slice(indices).to_device(rows.device()),
            rows: rows.shallow_clone(),
            place: None,
            borrowed: true,
        }
    }

    /// Where a token's row is, if it is trained.
    fn row_of(&self, id: i64) -> Option<i64> {
        let at = self.tokens.iter().position(|&it| it == id)?;
        Some(at as i64)
    }

    /// The trained rows.
    pub(crate) fn rows(&self) -> &Tensor {
        &self.rows
    }

    fn replaced(&self, weight: &Tensor) -> Tensor {
        weight.index_copy(0, &self.indices, &self.rows.to_kind(weight.kind()))
    }
}

impl EmbeddingAdapter for Tokens {
    fn forward(&self, ids: &Tensor, beneath: BeneathEmbedding<'_>, _: Ctx) -> Tensor {
        let y = beneath.forward(ids);
        let Some(place) = &self.place else {
            return beneath.look_up(&self.replaced(beneath.base()), ids);
        };
        let row = place.index_select(0, &ids.reshape([-1])); // [n]
        let chosen = row.ge(0).nonzero().view([-1]);
        let row = row.index_select(0, &chosen);
        let padding = beneath.padding_idx().and_then(|id| self.row_of(id));
        let rows = self.rows.to_kind(y.kind());
        let rows = Tensor::embedding(&rows, &row, padding.unwrap_or(-1), false, false);
        let flat = y.reshape([-1, y.size()[y.dim() - 1]]);
        flat.index_copy(0, &chosen, &rows).view_as(&y)
    }

    fn merge(&self, weight: Tensor, _: &Tensor) -> Option<Tensor> {
        Some(self.replaced(&weight))
    }
}

impl LinearAdapter for Tokens {
    fn forward(&self, x: &Tensor, beneath: Beneath<'_>, _: Ctx) -> Tensor {
        let bias = beneath.bias().map(|b| b.index_select(0, &self.indices));
        let rows = self.rows.to_kind(x.kind());
        let scores = peft_torch::linear(x, &rows, bias.as_ref()); // [.., n]
        replace_columns(beneath.forward(x), &self.indices, &scores)
    }

    fn merge(&self, plain: Plain, _: &dyn LinearOp) -> Option<Plain> {
        Some(Plain {
            weight: self.replaced(&plain.weight),
            bias: plain.bias,
        })
    }
}

impl Params for Tokens {
    fn params(&self, visit: Visit<'_>) {
        if !self.borrowed {
            visit(ROWS, &self.rows);
        }
    }
}
