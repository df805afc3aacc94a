//! Virtual tokens that are what they are: a table, trained or as a file has it.

use peft_core::{Ahead, Ctx, Params, PromptAdapter, VirtualTokens, Visit};
use tch::Tensor;

/// P `[rows, D]`
#[derive(Debug)]
pub(crate) struct Table {
    table: Tensor,
    /// How many of the rows stand in front of the input.
    tokens: i64,
}

impl Table {
    /// A leaf of its own with these values.
    pub(crate) fn new(values: &Tensor, tokens: i64, trained: bool) -> Table {
        Table {
            table: values.detach().set_requires_grad(trained),
            tokens,
        }
    }
}

impl PromptAdapter for Table {
    fn ahead(&self, _: Ctx<'_>) -> Ahead {
        Ahead::Embeds(self.table.narrow(0, 0, self.tokens))
    }

    fn tokens(&self) -> i64 {
        self.tokens
    }
}

impl Params for Table {
    fn params(&self, visit: Visit<'_>) {
        visit(VirtualTokens::TABLE, &self.table);
    }
}
