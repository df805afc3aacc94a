//! A weight in 4 bits on a GPU: decoded, and multiplied without being decoded into memory.
//!
//! ```text
//! x' = round(table[code] · scale)        y = x · (table[code] · scale)ᵀ
//! scale = absmax, or map[code₂] · absmax₂ + offset, each operation rounded
//! ```

use peft_codec::{Block, NESTED_BLOCK};

use crate::{
    error::{Error, Result},
    kernels::{Arg, Launch, Source},
    memory::{Memory, Number},
    stream::Stream,
};

/// The scales of the blocks, as they are kept.
#[derive(Debug, Clone, Copy)]
pub enum Scales<'a> {
    /// fp32, one a block.
    Plain(Memory<'a>),
    /// In 8 bits.
    Nested {
        /// An index a block.
        codes: Memory<'a>,
        /// fp32: a scale for each [`NESTED_BLOCK`] of them.
        absmax: Memory<'a>,
        /// fp32: the 256 values that an index means.
        map: Memory<'a>,
        /// What is added.
        offset: f32,
    },
}

/// A tensor in 4 bits, borrowed.
#[derive(Debug, Clone)]
pub struct Weight<'a> {
    codes: Memory<'a>,
    /// The kernels' arguments from `scales` to `offset`.
    scales: [Arg; 4],
    nested: bool,
    table: [f32; 16],
    block: Block,
    len: usize,
}

/// Rows of x that a product takes at most.
pub const MOST_ROWS: usize = 8;

impl<'a> Weight<'a> {
    /// Takes `len` numbers, two a byte, whose codes mean the values of `table`.
    pub fn new(
        codes: Memory<'a>,
        scales: Scales<'a>,
        table: [f32; 16],
        block: Block,
        len: usize,
    ) -> Result<Weight<'a>> {
        codes.holds("packed bytes", len.div_ceil(2), 1)?;
        let blocks = block.count(len);
        let (nested, scales) = match scales {
            Scales::Plain(absmax) => {
                let absmax = absmax.holds("scales", blocks, 4)?;
                (
                    false,
                    [absmax, 0, 0]
                        .map(Arg::Long)
                        .into_iter()
                        .chain([Arg::Float(0.0)]),
                )
            }
            Scales::Nested {
                codes,
                absmax,
                map,
                offset,
            } => {
                let codes = codes.holds("scales", blocks, 1)?;
                let shared = blocks.div_ceil(NESTED_BLOCK);
                let absmax = absmax.holds("scales of scales", shared, 4)?;
                let map = map.holds("values of a map", 256, 4)?;
                (
                    true,
                    [codes, absmax, map]
                        .map(Arg::Long)
                        .into_iter()
                        .chain([Arg::Float(offset)]),
                )
            }
        };
        let mut all = [Arg::Long(0); 4];
        all.iter_mut().zip(scales).for_each(|(to, it)| *to = it);
        Ok(Weight {
            codes,
            scales: all,
            nested,
            table,
            block,
            len,
        })
    }

    /// Decodes all of it. Writes `out`: `len` numbers.
    pub fn dequantise(&self, out: Memory<'_>, number: Number, stream: &Stream) -> Result<()> {
        match self.decoded(out, number)? {
            Some(launch) => launch.run(stream),
            None => Ok(()),
        }
    }

    /// x: [rows, inp], of 1 to [`MOST_ROWS`] -> y: [rows, len / inp], which is written. Sums are fp32.
    pub fn multiply(
        &self,
        x: Memory<'_>,
        rows: usize,
        inp: usize,
        y: Memory<'_>,
        number: Number,
        stream: &Stream,
    ) -> Result<()> {
        match self.multiplied(x, rows, inp, y, number)? {
            Some(launch) => launch.run(stream),
            None => Ok(()),
        }
    }

    pub(crate) fn decoded(&self, out: Memory<'_>, number: Number) -> Result<Option<Launch>> {
        let to = out.holds("numbers", self.len, number.bytes())?;
        if self.len == 0 {
            return Ok(None);
        }
        let per = 16 / number.bytes() as u64; // numbers of a lane, and half as many bytes of codes
        let fits = out.aligned(16) && self.codes.aligned(per / 2);
        let (form, each) = match fits {
            true => ("", per * STEPS * THREADS),
            false => ("any_", 2 * THREADS),
        };
        let kernel = format!("dequantise_{form}{}{}", self.kind(), number.name());
        let mut args = vec![Arg::Long(self.codes.address())];
        args.extend(self.scales);
        args.extend([
            Arg::Table(self.table),
            Arg::Word(self.block.size().ilog2()),
            Arg::Long(self.len as u64),
            Arg::Long(to),
        ]);
        let (source, len) = (Source::Dequantise, self.len as u64);
        Ok(Some(Launch::of(source, kernel, len, each, u64::MAX, args)))
    }

    pub(crate) fn multiplied(
        &self,
        x: Memory<'_>,
        rows: usize,
        inp: usize,
        y: Memory<'_>,
        number: Number,
    ) -> Result<Option<Launch>> {
        let len = self.len;
        if !(1..=MOST_ROWS).contains(&rows) || inp == 0 || !len.is_multiple_of(inp) {
            return Err(Error::Shape { rows, inp, len });
        }
        let out = len / inp;
        let from = x.holds("x", rows.saturating_mul(inp), number.bytes())?;
        let to = y.holds("y", rows.saturating_mul(out), number.bytes())?;
        if out == 0 {
            return Ok(None);
        }
        let fits = inp.is_multiple_of(8) && x.aligned(16) && self.codes.aligned(4);
        // The form, and the columns that a warp of it makes.
        let (form, columns) = match rows {
            _ if !fits => ("any", 1),
            1 => ("1", 1),
            2 => ("2", 2),
            3 | 4 => ("4", 2),
            _ => ("8", 4),
        };
        let kernel = format!("multiply_{form}_{}{}", self.kind(), number.name());
        let mut args = vec![Arg::Long(from), Arg::Long(self.codes.address())];
        args.extend(self.scales);
        args.extend([
            Arg::Table(self.table),
            Arg::Word(self.block.size().ilog2()),
            Arg::Word(rows as u32),
            Arg::Long(inp as u64),
            Arg::Long(out as u64),
            Arg::Long(to),
        ]);
        let (source, each) = (Source::Multiply, columns * WARPS);
        Ok(Some(Launch::of(
            source,
            kernel,
            out as u64,
            each,
            u64::MAX,
            args,
        )))
    }

    fn kind(&self) -> &'static str {
        match self.nested {
            true => "nested_",
            false => "",
        }
    }
}

/// Of a block, as in [`crate::kernels`].
const THREADS: u64 = crate::kernels::THREADS as u64;
const WARPS: u64 = THREADS / 32;
/// As in `dequantise.cu`.
const STEPS: u64 = 4;
