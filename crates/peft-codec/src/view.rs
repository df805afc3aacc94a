//! A tensor in 4 bits that lies somewhere else, and the way back from it.
//!
//! ```text
//! x' = round(table[code] · scale)        scale = absmax, or map[code₂] · absmax₂ + offset, each operation rounded
//! ```
//!
//! A piece of it is decoded on the core that asks: who has threads of its own uses those, and no second set of threads waits
//! beside them.

use rayon::prelude::*;

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use crate::simd;
use crate::{
    element::Element,
    error::{Error, Result, length},
    four::{Level, PIECE},
    nested::{NESTED_BLOCK, Nested},
    table::Block,
};

/// The scales of the blocks, as they are kept.
#[derive(Debug, Clone, Copy)]
pub enum Scales<'a> {
    /// One a block.
    Plain(&'a [f32]),
    /// In 8 bits.
    Nested {
        /// An index a block.
        codes: &'a [u8],
        /// A scale for each [`NESTED_BLOCK`] of them.
        absmax: &'a [f32],
        /// What an index means.
        map: &'a [f32; 256],
        /// What is added.
        offset: f32,
    },
}

impl<'a> From<&'a Nested> for Scales<'a> {
    fn from(it: &'a Nested) -> Scales<'a> {
        Scales::Nested {
            codes: &it.codes,
            absmax: &it.absmax,
            map: it.map.values(),
            offset: it.offset,
        }
    }
}

/// A tensor in 4 bits, borrowed.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    pub(crate) bytes: &'a [u8],
    pub(crate) scales: Scales<'a>,
    pub(crate) table: &'a [f32; 16],
    pub(crate) block: Block,
    pub(crate) len: usize,
    pub(crate) level: Level,
}

/// Scales of so many blocks are computed at a time.
const RUN: usize = NESTED_BLOCK;

/// Results larger than a second-level cache (bytes) do not go through it.
const PAST: usize = 2 << 20;

impl<'a> View<'a> {
    /// Takes `len` numbers, two a byte, whose codes mean the values of `table`.
    pub fn new(
        bytes: &'a [u8],
        scales: Scales<'a>,
        table: &'a [f32; 16],
        block: Block,
        len: usize,
    ) -> Result<View<'a>> {
        length("packed bytes", len.div_ceil(2), bytes.len())?;
        let blocks = block.count(len);
        match scales {
            Scales::Plain(absmax) => length("scales", blocks, absmax.len())?,
            Scales::Nested { codes, absmax, .. } => {
                length("scales", blocks, codes.len())?;
                length(
                    "scales of scales",
                    blocks.div_ceil(NESTED_BLOCK),
                    absmax.len(),
                )?;
            }
        }
        Ok(View {
            bytes,
            scales,
            table,
            block,
            len,
            level: Level::best(),
        })
    }

    /// With given instructions, which the processor must have ([`Level::all`]); others are replaced by its best.
    pub fn at(self, level: Level) -> View<'a> {
        View {
            level: level.here(),
            ..self
        }
    }

    /// Decodes the numbers `from .. from + out.len()` on the caller's core. `from` is even; it need not begin a block.
    pub fn decode<T: Element>(&self, from: usize, out: &mut [T]) -> Result<()> {
        self.decode_piece(from, out, size_of_val(out) > PAST)
    }

    /// [`View::decode`] past the caches: of a piece of what is larger than they are.
    pub fn decode_past<T: Element>(&self, from: usize, out: &mut [T]) -> Result<()> {
        self.decode_piece(from, out, true)
    }

    fn decode_piece<T: Element>(&self, from: usize, out: &mut [T], past: bool) -> Result<()> {
        let fits = from.checked_add(out.len()).is_some_and(|to| to <= self.len);
        if !fits || !from.is_multiple_of(2) {
            return Err(Error::Piece {
                from,
                count: out.len(),
                len: self.len,
            });
        }
        self.decode_runs(from, out, past);
        Ok(())
    }

    /// Decodes all of it, on all cores.
    pub fn dequantise<T: Element>(&self, out: &mut [T]) -> Result<()> {
        length("numbers", self.len, out.len())?;
        let past = size_of_val(out) > PAST;
        let pieces = out.par_chunks_mut(PIECE).enumerate();
        pieces.for_each(|(i, out)| self.decode_runs(i * PIECE, out, past));
        Ok(())
    }

    /// Decodes what is known to be there; with `past`, past the caches.
    fn decode_runs<T: Element>(&self, from: usize, mut out: &mut [T], past: bool) {
        let size = self.block.size();
        let mut at = from;
        let mut room = [0.0; RUN];
        while !out.is_empty() {
            let (first, inside) = (at / size, at % size);
            let n = out.len().min(self.run(first) * size - inside);
            let (now, later) = out.split_at_mut(n);
            let scales = self.scales_of(first, self.block.count(inside + n), &mut room);
            let bytes = &self.bytes[at / 2..(at + n).div_ceil(2)];
            self.decode_run(scales, inside, bytes, now, past);
            (out, at) = (later, at + n);
        }
        #[cfg(target_arch = "x86_64")]
        if past {
            simd::fence();
        }
    }

    /// How many blocks from `first` on are decoded in one go.
    fn run(&self, first: usize) -> usize {
        match self.scales {
            Scales::Plain(_) => self.block.count(self.len) - first,
            Scales::Nested { .. } => RUN,
        }
    }

    /// The scales of `count` blocks; where they have to be computed, in `room`, which holds as many.
    pub(crate) fn scales_of<'b>(&self, first: usize, count: usize, room: &'b mut [f32]) -> &'b [f32]
    where
        'a: 'b,
    {
        match self.scales {
            Scales::Plain(absmax) => &absmax[first..first + count],
            Scales::Nested {
                codes,
                absmax,
                map,
                offset,
            } => {
                let mut done = 0;
                while done < count {
                    let at = first + done;
                    let n = (count - done).min(NESTED_BLOCK - at % NESTED_BLOCK); // share a scale
                    let absmax = absmax[at / NESTED_BLOCK];
                    let (codes, out) = (&codes[at..at + n], &mut room[done..done + n]);
                    unnest(self.level, codes, absmax, map, offset, out);
                    done += n;
                }
                &room[..count]
            }
        }
    }

    /// Decodes numbers that begin `inside` a block, the first of those that `absmax` scales.
    fn decode_run<T: Element>(
        &self,
        absmax: &[f32],
        inside: usize,
        bytes: &[u8],
        out: &mut [T],
        past: bool,
    ) {
        let size = self.block.size();
        let (mut absmax, mut bytes, mut out) = (absmax, bytes, out);
        if inside > 0 {
            let n = (size - inside).min(out.len());
            let (now, later) = out.split_at_mut(n);
            decode(
                self.level,
                self.table,
                absmax[0],
                &bytes[..n.div_ceil(2)],
                now,
            );
            (absmax, bytes, out) = (&absmax[1..], &bytes[n.div_ceil(2)..], later);
        }
        let mut done = 0; // blocks
        #[cfg(target_arch = "x86_64")]
        if self.level >= Level::Avx512 {
            done = simd::decode_blocks(self.level, self.table, absmax, bytes, out, size, past);
        }
        let _ = past;
        let (out, bytes) = (&mut out[done * size..], &bytes[done * size / 2..]);
        let blocks = out.chunks_mut(size).zip(bytes.chunks(size / 2));
        for ((out, bytes), absmax) in blocks.zip(&absmax[done..]) {
            decode(self.level, self.table, *absmax, bytes, out);
        }
    }
}

/// Decodes numbers of one block: its 16 products are computed and rounded once.
fn decode<T: Element>(level: Level, table: &[f32; 16], absmax: f32, bytes: &[u8], out: &mut [T]) {
    let products = table.map(|value| T::round(value * absmax));
    let mut done = 0;
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    if level > Level::Scalar {
        done = simd::decode(&products, bytes, out);
    }
    let _ = level;
    let rest = out[done..].chunks_mut(2).zip(&bytes[done / 2..]);
    for (pair, byte) in rest {
        pair[0] = products[usize::from(byte >> 4)];
        if let Some(second) = pair.get_mut(1) {
            *second = products[usize::from(byte & 15)];
        }
    }
}

/// Scales that share one: a product and a sum, each rounded.
fn unnest(level: Level, codes: &[u8], absmax: f32, map: &[f32; 256], offset: f32, out: &mut [f32]) {
    let mut done = 0;
    #[cfg(target_arch = "x86_64")]
    if level > Level::Scalar {
        done = simd::scales(level, codes, absmax, map, offset, out);
    }
    let _ = level;
    for (code, out) in codes[done..].iter().zip(&mut out[done..]) {
        *out = map[usize::from(*code)] * absmax + offset;
    }
}
