//! A tile: few rows of the matrix with few rows of `x`, and what the kernels for it have in common.

use super::{BEYOND, CHUNK};
use crate::four::Level;

/// Most rows of the matrix.
pub(super) const W: usize = 2;
/// Most rows of `x`: 1, 2, 4 or 8 of them.
pub(super) const X: usize = 8;

/// What is multiplied.
pub(super) struct Tile<'a, L> {
    /// Of the matrix: one or two.
    pub(super) rows: usize,
    /// Of `x`.
    pub(super) count: usize,
    /// Codes of these rows of `inp`, whole blocks, and perhaps of more.
    pub(super) bytes: &'a [u8],
    /// Of each block from `from` on, and [`BEYOND`] more, for each row.
    pub(super) scales: [&'a [f32]; W],
    pub(super) table: &'a [f32; 16],
    /// Two to the power of this is a block.
    pub(super) shift: u32,
    /// [`over_lanes`].
    pub(super) over: [i32; 16],
    pub(super) inp: usize,
    /// Which numbers of a row: blocks, and chunks but for a row's end.
    pub(super) from: usize,
    pub(super) to: usize,
    /// Rows of as many chunks as `inp` begins.
    pub(super) x: &'a [L],
    pub(super) level: Level,
}

impl<L> Tile<'_, L> {
    /// How many rows there are of both, all lengths being as they should.
    pub(super) fn rows(&self, lines_a_chunk: usize) -> (usize, usize) {
        let (inp, from, to) = (self.inp, self.from, self.to);
        assert!((5..32).contains(&self.shift));
        let block = 1usize << self.shift;
        let whole = block.max(CHUNK) - 1; // as a mask
        assert!(from < to && to <= inp && inp & (block - 1) == 0 && from & whole == 0);
        assert!(to == inp || to & whole == 0);
        assert!(self.rows <= W && self.bytes.len() >= self.rows * (inp / 2));
        let scales = self.scales[..self.rows].iter();
        assert!(
            scales
                .map(|it| it.len())
                .all(|n| n >= ((to - from) >> self.shift) + BEYOND)
        );
        assert!(self.x.len() == self.count * inp.div_ceil(CHUNK) * lines_a_chunk);
        (self.rows, self.count)
    }
}

/// Calls a kernel for as many rows as there are.
macro_rules! by_rows {
    ($rows:expr, $kernel:ident, $tile:expr, $sums:expr) => {
        match $rows {
            (1, 1) => $kernel::<1, 1>($tile, $sums),
            (1, 2) => $kernel::<1, 2>($tile, $sums),
            (1, 4) => $kernel::<1, 4>($tile, $sums),
            (1, 8) => $kernel::<1, 8>($tile, $sums),
            (2, 1) => $kernel::<2, 1>($tile, $sums),
            (2, 2) => $kernel::<2, 2>($tile, $sums),
            (2, 4) => $kernel::<2, 4>($tile, $sums),
            (2, 8) => $kernel::<2, 8>($tile, $sums),
            other => unreachable!("a tile of {other:?} rows"),
        }
    };
}

pub(super) use by_rows;

/// How the scales of a chunk, up to four, come to lie over its 16 lanes of eight codes.
pub(super) fn over_lanes(block: usize) -> [i32; 16] {
    std::array::from_fn(|lane| (8 * lane / block) as i32)
}
