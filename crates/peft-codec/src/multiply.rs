//! Few rows times a matrix in 4 bits, which is never unpacked.
//!
//! ```text
//! out[r][i] = Σ_b absmax[i, b] · Σ_{k in b} table[code[i, k]] · x[r][k]        in fp32
//! ```
//!
//! A chunk of 128 codes is 64 bytes, one load. A lookup takes the low bits of a lane and looks at no others, so that shifts
//! by 0, 4, 8 … bits make all codes of a lane its low bits in turn, without a mask: those of the first lookup are codes 1, 5,
//! 9 …, those of the second 0, 4, 8 …. Not the codes are put in order, but once the numbers of `x` out of theirs.
//!
//! With `x` in bf16 the values of the table are rounded to bf16 as well (the kernels of `bitsandbytes` do so). Sums are in fp32
//! either way. Newer processors multiply such numbers in pairs, by an instruction that takes denormal ones for zero. On those of
//! Intel it takes longer than one of fp32 does (Emerald Rapids: 2.2 cycles), so that it pays for one row of x alone: there the
//! product takes 0.83 of the time, with four rows 1.18.

#[cfg(target_arch = "x86_64")]
mod simd;
#[cfg(target_arch = "aarch64")]
#[path = "multiply/neon.rs"]
mod simd;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod tile;

use std::ops::Range;

use half::bf16;

use crate::{
    element::{Element, private::Format},
    error::{Error, Result, length},
    four::Level,
    view::{Scales, View},
};

/// Codes in 64 bytes.
const CHUNK: usize = 128;

/// So many numbers beyond the scales of some rows may be read with them.
const BEYOND: usize = 3;

/// `x`: [m, inp], in the order in which codes are looked up.
#[derive(Debug, Clone)]
pub struct Activations {
    m: usize,
    inp: usize,
    /// Whether the values of a table are rounded to bf16.
    brain: bool,
    lines: Lines,
}

/// A row is a whole number of chunks, filled up with zeros.
#[derive(Debug, Clone)]
enum Lines {
    /// Four a chunk; in the j-th of them the numbers (j ^ 1) + 4 i.
    Words(Vec<Words>),
    /// Eight a chunk; in the j-th of them the numbers (j ^ 1) + 8 i.
    Floats(Vec<Floats>),
}

#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
struct Words([bf16; 32]);

#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
struct Floats([f32; 16]);

impl Activations {
    /// Takes `x`: [m, inp], of which there must be so many.
    pub fn new<T: Element>(x: &[T], m: usize, inp: usize) -> Activations {
        let level = match Level::best() {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Bf16 if !simd::pairs_pay(m) => Level::Avx512,
            best => best,
        };
        Activations::new_at(level, x, m, inp)
    }

    /// [`Activations::new`] for given instructions.
    pub fn new_at<T: Element>(level: Level, x: &[T], m: usize, inp: usize) -> Activations {
        assert!(
            m.checked_mul(inp) == Some(x.len()),
            "{} numbers are no [{m}, {inp}]",
            x.len()
        );
        let brain = T::FORMAT == Format::Brain;
        let lines = match brain && level.here() == Level::Avx512Bf16 {
            true => {
                let mut lines = vec![Words([bf16::ZERO; 32]); m * inp.div_ceil(CHUNK) * 4];
                arrange(
                    x,
                    inp,
                    &mut lines,
                    |line| &mut line.0,
                    |it| bf16::from_f32(it.wide()),
                );
                Lines::Words(lines)
            }
            false => {
                let mut lines = vec![Floats([0.0; 16]); m * inp.div_ceil(CHUNK) * 8];
                arrange(x, inp, &mut lines, |line| &mut line.0, Element::wide);
                Lines::Floats(lines)
            }
        };
        Activations {
            m,
            inp,
            brain,
            lines,
        }
    }

    /// How many rows.
    pub fn rows(&self) -> usize {
        self.m
    }

    /// How long they are.
    pub fn width(&self) -> usize {
        self.inp
    }

    /// All numbers in their own order.
    fn straight(&self) -> Vec<f32> {
        let chunks = self.inp.div_ceil(CHUNK);
        let mut x = Vec::with_capacity(self.m * self.inp);
        for row in 0..self.m {
            for k in 0..self.inp {
                let chunk = row * chunks + k / CHUNK;
                let k = k % CHUNK;
                x.push(match &self.lines {
                    Lines::Words(lines) => lines[4 * chunk + ((k % 4) ^ 1)].0[k / 4].to_f32(),
                    Lines::Floats(lines) => lines[8 * chunk + ((k % 8) ^ 1)].0[k / 8],
                });
            }
        }
        x
    }
}

/// Puts rows of `inp` numbers into lines of `N`, of which a chunk has 128 / N.
fn arrange<T: Copy, L, U: Copy + Default, const N: usize>(
    x: &[T],
    inp: usize,
    lines: &mut [L],
    within: impl Fn(&mut L) -> &mut [U; N],
    convert: impl Fn(T) -> U,
) {
    if inp == 0 {
        return;
    }
    let a_chunk = CHUNK / N;
    let rows = lines.chunks_mut(inp.div_ceil(CHUNK) * a_chunk);
    for (x, lines) in x.chunks(inp).zip(rows) {
        for (x, lines) in x.chunks(CHUNK).zip(lines.chunks_mut(a_chunk)) {
            let mut straight = [U::default(); CHUNK];
            let converted = straight.iter_mut().zip(x);
            converted.for_each(|(to, x)| *to = convert(*x));
            for (j, line) in lines.iter_mut().enumerate() {
                for (i, to) in within(line).iter_mut().enumerate() {
                    *to = straight[a_chunk * i + (j ^ 1)];
                }
            }
        }
    }
}

impl View<'_> {
    /// Multiplies rows of this, [.., inp], with `x`, [m, inp], on the caller's core.
    ///
    /// `out[r][i] = Σ_k W[rows.start + i][k] x[r][k]`: `[m, rows.len()]`
    pub fn multiply(&self, x: &Activations, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        let count = rows.len();
        length("products", x.m * count, out.len())?;
        let end = rows.end.max(rows.start).checked_mul(x.inp);
        if end.is_none_or(|end| end > self.len) {
            return Err(Error::Piece {
                from: rows.start.saturating_mul(x.inp),
                count: count.saturating_mul(x.inp),
                len: self.len,
            });
        }
        let table = match x.brain {
            true => self.table.map(|it| bf16::from_f32(it).to_f32()),
            false => *self.table,
        };
        let view = View {
            table: &table,
            ..*self
        };
        #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
        if x.inp > 0 && x.inp.is_multiple_of(self.block.size()) {
            let done = match &x.lines {
                #[cfg(target_arch = "x86_64")]
                Lines::Words(lines) if self.level >= Level::Avx512Bf16 => {
                    view.tiles(x, rows.clone(), out, lines, simd::words)
                }
                #[cfg(target_arch = "x86_64")]
                Lines::Floats(lines) if self.level >= Level::Avx512 => {
                    view.tiles(x, rows.clone(), out, lines, simd::floats_512)
                }
                #[cfg(target_arch = "x86_64")]
                Lines::Floats(lines) if self.level == Level::Avx2 => {
                    view.tiles(x, rows.clone(), out, lines, simd::floats_256)
                }
                #[cfg(target_arch = "aarch64")]
                Lines::Floats(lines) if self.level == Level::Neon => {
                    view.tiles(x, rows.clone(), out, lines, simd::floats)
                }
                _ => false,
            };
            if done {
                return Ok(());
            }
        }
        view.multiply_any(x, rows, out)
    }

    /// Of any shape: a row is decoded, then multiplied.
    fn multiply_any(&self, x: &Activations, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        let (count, inp) = (rows.len(), x.inp);
        let mut room = vec![0.0; inp + 1];
        let straight = x.straight();
        for (i, row) in rows.enumerate() {
            let (from, odd) = (row * inp / 2 * 2, row * inp % 2);
            let w = &mut room[..inp + odd];
            self.decode(from, w)?;
            for r in 0..x.m {
                out[r * count + i] = dot(&w[odd..], &straight[r * inp..][..inp]);
            }
        }
        Ok(())
    }

    /// Of rows that are whole blocks: few rows at a time, so that what was loaded of `x` serves them all. Of many rows of `x`
    /// only a panel that stays in the first cache, times all rows of this.
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    fn tiles<L>(
        &self,
        x: &Activations,
        rows: Range<usize>,
        out: &mut [f32],
        lines: &[L],
        kernel: impl Fn(&tile::Tile<'_, L>, &mut [[f32; tile::X]; tile::W]),
    ) -> bool {
        let (count, inp, block) = (rows.len(), x.inp, self.block.size());
        let (shift, over) = (block.trailing_zeros(), tile::over_lanes(block));
        let (a_row, lines_a_row) = (inp / block, lines.len() / x.m.max(1));
        let mut rooms = [(); tile::W].map(|()| vec![0.0; a_row + BEYOND]);
        out.fill(0.0);
        let mut r = 0;
        while r < x.m {
            let (n, panel) = match x.m - r {
                8.. => (8, 1024),
                4.. => (4, 2048),
                2.. => (2, 4096),
                _ => (1, inp),
            };
            let panel = panel.max(block);
            for from in (0..inp).step_by(panel) {
                let to = inp.min(from + panel);
                for i in (0..count).step_by(tile::W) {
                    let w = (count - i).min(tile::W);
                    let row = rows.start + i;
                    let mut scales = [&[][..]; tile::W];
                    for (j, room) in rooms[..w].iter_mut().enumerate() {
                        let first = (row + j) * a_row + (from >> shift);
                        scales[j] = self.scales_and_beyond(first, (to - from) >> shift, room);
                    }
                    let tile = tile::Tile {
                        rows: w,
                        count: n,
                        bytes: &self.bytes[row * inp / 2..],
                        scales,
                        table: self.table,
                        shift,
                        over,
                        inp,
                        from,
                        to,
                        x: &lines[r * lines_a_row..(r + n) * lines_a_row],
                        level: self.level,
                    };
                    let mut sums = [[0.0; tile::X]; tile::W];
                    kernel(&tile, &mut sums);
                    for (j, sums) in sums[..w].iter().enumerate() {
                        for (k, sum) in sums[..n].iter().enumerate() {
                            out[(r + k) * count + i + j] += *sum;
                        }
                    }
                }
            }
            r += n;
        }
        true
    }

    /// The scales of `count` blocks, and [`BEYOND`] numbers more.
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    fn scales_and_beyond<'b>(
        &'b self,
        first: usize,
        count: usize,
        room: &'b mut [f32],
    ) -> &'b [f32] {
        if let Scales::Plain(absmax) = self.scales {
            if let Some(all) = absmax.get(first..first + count + BEYOND) {
                return all;
            }
            room[..count].copy_from_slice(&absmax[first..first + count]);
        } else {
            self.scales_of(first, count, room);
        }
        &room[..count + BEYOND]
    }
}

/// In 16 sums, and these in turn.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0f32; 16];
    for (a, b) in a.chunks(16).zip(b.chunks(16)) {
        for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += a * b;
        }
    }
    sums.iter().sum()
}
