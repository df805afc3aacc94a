//! Rows of a task as a rectangle, with labels in the sort that its loss takes.

use crate::batch::Side;

/// Rows as a rectangle: each field is `[rows, cols]`, row by row.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct TaskBatch {
    /// How many rows.
    pub rows: usize,
    /// How many columns: the longest row, rounded up.
    pub cols: usize,
    /// Token ids, `[rows, cols]`.
    pub input_ids: Vec<i64>,
    /// 1 where there is a token, 0 where there is padding, `[rows, cols]`.
    pub attention_mask: Vec<i64>,
    /// Which text of a pair a token is of, `[rows, cols]`; empty where the tokenizer gives none.
    pub token_type_ids: Vec<i64>,
    /// What the model is to say.
    pub targets: Targets,
    /// Which rows of the data set these are.
    pub indices: Vec<usize>,
}

/// The labels of a batch.
#[derive(Debug, Clone, PartialEq, Default)]
pub enum Targets {
    /// A class each, `[rows]`.
    Classes(Vec<i64>),
    /// A 0 or 1 for each class, `[rows, outputs]`.
    Flags {
        /// How many classes.
        outputs: usize,
        /// Row by row.
        values: Vec<f32>,
    },
    /// Numbers, `[rows, outputs]`.
    Numbers {
        /// How many numbers a row has.
        outputs: usize,
        /// Row by row.
        values: Vec<f32>,
    },
    /// A class for each token or [`IGNORED`](crate::IGNORED), `[rows, cols]`.
    Tokens(Vec<i64>),
    /// The columns of an answer's first and last token, `[rows]` each.
    Spans {
        /// First tokens.
        starts: Vec<i64>,
        /// Last tokens.
        ends: Vec<i64>,
    },
    /// The tokens of a target, [`IGNORED`](crate::IGNORED) after its end, `[rows, cols]`. Not
    /// shifted: what the decoder reads is made of them by the model.
    Decoder {
        /// How many columns, which is not the number of the inputs' columns.
        cols: usize,
        /// Row by row.
        labels: Vec<i64>,
    },
    /// The token that was hidden, elsewhere [`IGNORED`](crate::IGNORED), `[rows, cols]`.
    Hidden(Vec<i64>),
    /// Nothing: the rows are only to be answered.
    #[default]
    None,
}

/// How rows are laid out.
#[derive(Debug, Clone, Copy)]
pub(super) struct Frame {
    pub(super) rows: usize,
    pub(super) cols: usize,
    side: Side,
}

impl Frame {
    /// Room for rows of these lengths, the width a multiple of `multiple_of` (0 and 1: any).
    pub(super) fn new(
        lengths: impl Iterator<Item = usize>,
        side: Side,
        multiple_of: usize,
    ) -> Self {
        let (mut rows, mut longest) = (0, 0);
        for length in lengths {
            rows += 1;
            longest = longest.max(length);
        }
        Self {
            rows,
            cols: longest.next_multiple_of(multiple_of.max(1)),
            side,
        }
    }

    /// The column where a row of this length starts.
    pub(super) fn start(&self, length: usize) -> usize {
        match self.side {
            Side::Right => 0,
            Side::Left => self.cols - length,
        }
    }

    /// Rows filled up with `fill`: `[rows, cols]`.
    pub(super) fn fill<R: ExactSizeIterator<Item = i64>>(
        &self,
        rows: impl Iterator<Item = R>,
        fill: i64,
    ) -> Vec<i64> {
        let mut all = vec![fill; self.rows * self.cols];
        for (row, cells) in rows.zip(all.chunks_mut(self.cols.max(1))) {
            let start = self.start(row.len());
            for (cell, value) in cells[start..].iter_mut().zip(row) {
                *cell = value;
            }
        }
        all
    }
}
