//! Products of a tile with NEON.

use std::arch::aarch64::*;

use super::{
    CHUNK, Floats,
    tile::{Tile, W, X, by_rows},
};
use crate::{
    four::Level,
    simd::{Planes, halves},
};

/// Codes in 16 bytes.
const CODES: usize = 32;

/// In fp32.
pub(super) fn floats(tile: &Tile<'_, Floats>, sums: &mut [[f32; X]; W]) {
    let rows = tile.rows(8);
    assert!(tile.level > Level::Scalar);
    // SAFETY: every processor of this architecture has the instructions; the lengths are checked.
    unsafe { by_rows!(rows, floats_of, tile, sums) }
}

/// A quarter of a chunk at a time. Byte k of a lane of 32 bits holds the codes 2 k and 2 k + 1 of eight: what they mean is four
/// registers of bytes, which are put together so that each result has the k-th bytes of four lanes.
///
/// # Safety
/// A tile of so many rows.
#[target_feature(enable = "neon")]
unsafe fn floats_of<const ROWS: usize, const COUNT: usize>(
    tile: &Tile<'_, Floats>,
    sums: &mut [[f32; X]; W],
) {
    let (inp, shift) = (tile.inp, tile.shift);
    let lines_a_row = inp.div_ceil(CHUNK) * 8;
    let table = Planes::of(tile.table);
    for (row, sums) in sums.iter_mut().enumerate().take(ROWS) {
        let mut all = [vdupq_n_f32(0.0); COUNT];
        for at in (tile.from..tile.to).step_by(CODES) {
            let scale = tile.scales[row][(at - tile.from) >> shift];
            // SAFETY: a row is whole blocks, each whole 32s of codes.
            let bytes = unsafe { vld1q_u8(tile.bytes.as_ptr().add(row * (inp / 2) + at / 2)) };
            let [first, second] = halves(bytes).map(|codes| by_bytes(table.look(codes)));
            for (r, all) in all.iter_mut().enumerate() {
                let mut of = vdupq_n_f32(0.0);
                for j in 0..8 {
                    // Line j has the numbers (j ^ 1) + 8 i: of even lines those are second codes.
                    let looked = match j % 2 {
                        0 => second[j / 2],
                        _ => first[j / 2],
                    };
                    // SAFETY: each row of `x` has eight lines of 16 numbers for each chunk.
                    let x = unsafe {
                        let line = tile.x.as_ptr().add(r * lines_a_row + at / CHUNK * 8 + j);
                        vld1q_f32(line.cast::<f32>().add(at % CHUNK / 8))
                    };
                    of = vfmaq_f32(of, looked, x);
                }
                *all = vfmaq_n_f32(*all, of, scale);
            }
        }
        for (sum, all) in sums.iter_mut().zip(all) {
            *sum = vaddvq_f32(all);
        }
    }
}

/// Of 16 numbers by bytes the k-th of each four, for each k.
#[inline]
#[target_feature(enable = "neon")]
fn by_bytes([b0, b1, b2, b3]: [uint8x16_t; 4]) -> [float32x4_t; 4] {
    let word = |it| vreinterpretq_u16_u8(it);
    let (low, high) = (word(vtrn1q_u8(b0, b1)), word(vtrn1q_u8(b2, b3)));
    let (low2, high2) = (word(vtrn2q_u8(b0, b1)), word(vtrn2q_u8(b2, b3)));
    let all = [
        vtrn1q_u16(low, high),
        vtrn1q_u16(low2, high2),
        vtrn2q_u16(low, high),
        vtrn2q_u16(low2, high2),
    ];
    all.map(|it| vreinterpretq_f32_u16(it))
}
