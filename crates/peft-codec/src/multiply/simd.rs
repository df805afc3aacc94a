//! Products of a tile with AVX2 and AVX-512.

#![expect(
    clippy::needless_range_loop,
    reason = "rows and lookups are indices into several arrays of registers"
)]

use std::{arch::x86_64::*, sync::LazyLock};

use super::{
    CHUNK, Floats, Words,
    tile::{Tile, W, X, by_rows},
};
use crate::{four::Level, simd::ahead};

/// Whether products of pairs in bf16 with `m` rows are faster than those in fp32: where a pair takes as long as one number, always,
/// and otherwise where looking values up costs more than multiplying them, which is once for all rows.
pub(super) fn pairs_pay(m: usize) -> bool {
    // Asked once: on a virtual machine the question takes longer than a thousand products.
    static AMD: LazyLock<bool> = LazyLock::new(|| {
        let vendor = __cpuid(0);
        [vendor.ebx, vendor.edx, vendor.ecx] == [0x6874_7541, 0x6974_6e65, 0x444d_4163] // AuthenticAMD
    });
    m == 1 || *AMD
}

/// In bf16.
pub(super) fn words(tile: &Tile<'_, Words>, sums: &mut [[f32; X]; W]) {
    let rows = tile.rows(4);
    assert!(tile.level >= Level::Avx512Bf16);
    // SAFETY: `Level` says that the processor has the instructions; the lengths are checked.
    unsafe { by_rows!(rows, words_of, tile, sums) }
}

/// In fp32, with AVX-512.
pub(super) fn floats_512(tile: &Tile<'_, Floats>, sums: &mut [[f32; X]; W]) {
    let rows = tile.rows(8);
    assert!(tile.level >= Level::Avx512);
    // SAFETY: `Level` says that the processor has the instructions; the lengths are checked.
    unsafe { by_rows!(rows, floats_512_of, tile, sums) }
}

/// In fp32, with AVX2.
pub(super) fn floats_256(tile: &Tile<'_, Floats>, sums: &mut [[f32; X]; W]) {
    let rows = tile.rows(8);
    assert!(tile.level >= Level::Avx2);
    // SAFETY: `Level` says that the processor has the instructions; the lengths are checked.
    unsafe { by_rows!(rows, floats_256_of, tile, sums) }
}

/// Where a chunk of 512 bits is, and what is in registers beside the sums.
struct Chunk<'a, L> {
    tile: &'a Tile<'a, L>,
    /// Its first code in each row.
    at: usize,
    /// The values of the codes.
    table: __m512i,
    /// [`over_lanes`].
    over: __m512i,
}

impl<L> Chunk<'_, L> {
    /// Codes of a row, and the scales of its 16 lanes. The last chunk of a row may have fewer, and zeros for the others.
    ///
    /// # Safety
    /// AVX-512 F; the row is there, and so are all 128 codes if it is `WHOLE`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn load<const WHOLE: bool>(&self, row: usize) -> (__m512i, __m512) {
        let inp = self.tile.inp;
        // SAFETY: a row has inp / 2 bytes, and `BEYOND` more scales than blocks.
        unsafe {
            let bytes = self.tile.bytes.as_ptr().add(row * (inp / 2) + self.at / 2);
            ahead(bytes);
            let codes = match WHOLE {
                true => _mm512_loadu_si512(bytes.cast()),
                false => _mm512_maskz_loadu_epi32(self.lanes(), bytes.cast()),
            };
            let scales = self.tile.scales[row].as_ptr();
            let four = _mm_loadu_ps(scales.add((self.at - self.tile.from) >> self.tile.shift));
            let scales = _mm512_permutevar_ps(_mm512_broadcast_f32x4(four), self.over);
            (codes, scales)
        }
    }

    /// Which lanes have codes, if not all.
    fn lanes(&self) -> __mmask16 {
        (1 << ((self.tile.inp - self.at) / 8)) - 1
    }
}

/// 16-bit lanes: four lookups a chunk. A lookup takes five bits, so the table is there twice.
///
/// # Safety
/// AVX-512 F, BW, DQ, VL, BF16; a tile of so many rows, and this chunk in it.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn words_chunk<const ROWS: usize, const COUNT: usize, const WHOLE: bool>(
    it: &Chunk<'_, Words>,
    all: &mut [[__m512; COUNT]; ROWS],
) {
    let lines_a_row = it.tile.inp.div_ceil(CHUNK) * 4;
    let mut looked = [[_mm512_setzero_si512(); 4]; ROWS];
    let mut scales = [_mm512_setzero_ps(); ROWS];
    for row in 0..ROWS {
        // SAFETY: the caller's.
        let (codes, scale) = unsafe { it.load::<WHOLE>(row) };
        looked[row] = [
            _mm512_permutexvar_epi16(codes, it.table),
            _mm512_permutexvar_epi16(_mm512_srli_epi16::<4>(codes), it.table),
            _mm512_permutexvar_epi16(_mm512_srli_epi16::<8>(codes), it.table),
            _mm512_permutexvar_epi16(_mm512_srli_epi16::<12>(codes), it.table),
        ];
        scales[row] = scale;
    }
    for r in 0..COUNT {
        let mut of = [_mm512_setzero_ps(); ROWS];
        for j in 0..4 {
            // SAFETY: each row of `x` has four lines for each chunk. Both types are 512 bits.
            unsafe {
                let line = it
                    .tile
                    .x
                    .as_ptr()
                    .add(r * lines_a_row + it.at / CHUNK * 4 + j);
                let x = std::mem::transmute::<__m512i, __m512bh>(_mm512_load_si512(line.cast()));
                for row in 0..ROWS {
                    let w = std::mem::transmute::<__m512i, __m512bh>(looked[row][j]);
                    of[row] = _mm512_dpbf16_ps(of[row], w, x);
                }
            }
        }
        for row in 0..ROWS {
            all[row][r] = match WHOLE {
                true => _mm512_fmadd_ps(of[row], scales[row], all[row][r]),
                false => _mm512_mask3_fmadd_ps(of[row], scales[row], all[row][r], it.lanes()),
            };
        }
    }
}

/// # Safety
/// As [`words_chunk`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn words_of<const ROWS: usize, const COUNT: usize>(
    tile: &Tile<'_, Words>,
    sums: &mut [[f32; X]; W],
) {
    // SAFETY: 16 numbers each; both types are 256 bits.
    let (table, over) = unsafe {
        let table = _mm512_cvtneps_pbh(_mm512_loadu_ps(tile.table.as_ptr()));
        let table = _mm512_broadcast_i64x4(std::mem::transmute::<__m256bh, __m256i>(table));
        let over = _mm512_loadu_si512(tile.over.as_ptr().cast());
        (table, over)
    };
    let chunk = |at| Chunk {
        tile,
        at,
        table,
        over,
    };
    let mut all = [[_mm512_setzero_ps(); COUNT]; ROWS];
    let rest = tile.to % CHUNK;
    for at in (tile.from..tile.to - rest).step_by(CHUNK) {
        // SAFETY: the instructions are the caller's; a whole chunk is there.
        unsafe { words_chunk::<ROWS, COUNT, true>(&chunk(at), &mut all) };
    }
    if rest > 0 {
        // SAFETY: the instructions are the caller's.
        unsafe { words_chunk::<ROWS, COUNT, false>(&chunk(tile.to - rest), &mut all) };
    }
    for (sums, all) in sums.iter_mut().zip(all) {
        sums.iter_mut()
            .zip(all)
            .for_each(|(sum, all)| *sum = _mm512_reduce_add_ps(all));
    }
}

/// 32-bit lanes: eight lookups a chunk. With `FAR`, three bytes more than the chunk's are there: what begins a byte later has
/// the codes of a shift by eight.
///
/// # Safety
/// AVX-512 F, BW, DQ, VL; a tile of so many rows, and this chunk in it.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn floats_chunk<
    const ROWS: usize,
    const COUNT: usize,
    const WHOLE: bool,
    const FAR: bool,
>(
    it: &Chunk<'_, Floats>,
    all: &mut [[__m512; COUNT]; ROWS],
) {
    let lines_a_row = it.tile.inp.div_ceil(CHUNK) * 8;
    let table = _mm512_castsi512_ps(it.table);
    let mut codes = [[_mm512_setzero_si512(); 4]; ROWS];
    let mut scales = [_mm512_setzero_ps(); ROWS];
    for row in 0..ROWS {
        // SAFETY: the caller's; `FAR` says that the bytes are there.
        unsafe {
            let (first, scale) = it.load::<WHOLE>(row);
            let bytes = it
                .tile
                .bytes
                .as_ptr()
                .add(row * (it.tile.inp / 2) + it.at / 2);
            codes[row] = match FAR {
                true => [
                    first,
                    _mm512_loadu_si512(bytes.add(1).cast()),
                    _mm512_loadu_si512(bytes.add(2).cast()),
                    _mm512_loadu_si512(bytes.add(3).cast()),
                ],
                false => [
                    first,
                    _mm512_srli_epi32::<8>(first),
                    _mm512_srli_epi32::<16>(first),
                    _mm512_srli_epi32::<24>(first),
                ],
            };
            scales[row] = match WHOLE {
                true => scale,
                false => _mm512_maskz_mov_ps(it.lanes(), scale),
            };
        }
    }
    // Many rows of `x`: the scaled values are what they share. Few: the sums are scaled.
    let many = COUNT >= 4;
    let mut of = [[_mm512_setzero_ps(); COUNT]; ROWS];
    for j in 0..8 {
        let mut looked = [_mm512_setzero_ps(); ROWS];
        for row in 0..ROWS {
            let codes = codes[row][j / 2];
            looked[row] = match j % 2 {
                0 => _mm512_permutexvar_ps(codes, table),
                _ => _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(codes), table),
            };
            if many {
                looked[row] = _mm512_mul_ps(looked[row], scales[row]);
            }
        }
        for r in 0..COUNT {
            // SAFETY: each row of `x` has eight lines for each chunk.
            let x = unsafe {
                let line = it
                    .tile
                    .x
                    .as_ptr()
                    .add(r * lines_a_row + it.at / CHUNK * 8 + j);
                _mm512_load_ps(line.cast())
            };
            for row in 0..ROWS {
                if many {
                    all[row][r] = _mm512_fmadd_ps(looked[row], x, all[row][r]);
                } else if j == 0 {
                    of[row][r] = _mm512_mul_ps(looked[row], x);
                } else {
                    of[row][r] = _mm512_fmadd_ps(looked[row], x, of[row][r]);
                }
            }
        }
    }
    if !many {
        for row in 0..ROWS {
            for r in 0..COUNT {
                all[row][r] = match WHOLE {
                    true => _mm512_fmadd_ps(of[row][r], scales[row], all[row][r]),
                    false => {
                        _mm512_mask3_fmadd_ps(of[row][r], scales[row], all[row][r], it.lanes())
                    }
                };
            }
        }
    }
}

/// # Safety
/// As [`floats_chunk`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn floats_512_of<const ROWS: usize, const COUNT: usize>(
    tile: &Tile<'_, Floats>,
    sums: &mut [[f32; X]; W],
) {
    // SAFETY: 16 numbers each.
    let (table, over) = unsafe {
        (
            _mm512_loadu_si512(tile.table.as_ptr().cast()),
            _mm512_loadu_si512(tile.over.as_ptr().cast()),
        )
    };
    let chunk = |at| Chunk {
        tile,
        at,
        table,
        over,
    };
    let mut all = [[_mm512_setzero_ps(); COUNT]; ROWS];
    let rest = tile.to % CHUNK;
    if tile.bytes.len() >= ROWS * (tile.inp / 2) + 3 {
        for at in (tile.from..tile.to - rest).step_by(CHUNK) {
            // SAFETY: the instructions are the caller's; a whole chunk is there, and three bytes more.
            unsafe { floats_chunk::<ROWS, COUNT, true, true>(&chunk(at), &mut all) };
        }
    } else {
        for at in (tile.from..tile.to - rest).step_by(CHUNK) {
            // SAFETY: the instructions are the caller's; a whole chunk is there.
            unsafe { floats_chunk::<ROWS, COUNT, true, false>(&chunk(at), &mut all) };
        }
    }
    if rest > 0 {
        // SAFETY: the instructions are the caller's.
        unsafe { floats_chunk::<ROWS, COUNT, false, false>(&chunk(tile.to - rest), &mut all) };
    }
    for (sums, all) in sums.iter_mut().zip(all) {
        sums.iter_mut()
            .zip(all)
            .for_each(|(sum, all)| *sum = _mm512_reduce_add_ps(all));
    }
}

/// 32-bit lanes, half a chunk at a time. A lookup takes three bits, the fourth chooses between two halves of the table.
///
/// # Safety
/// AVX2 and FMA; a tile of so many rows.
#[target_feature(enable = "avx2,fma")]
unsafe fn floats_256_of<const ROWS: usize, const COUNT: usize>(
    tile: &Tile<'_, Floats>,
    sums: &mut [[f32; X]; W],
) {
    let (inp, shift) = (tile.inp, tile.shift);
    let (bytes_a_row, lines_a_row) = (inp / 2, inp.div_ceil(CHUNK) * 8);
    // SAFETY: the loads stay within the tile; where a row ends with a quarter of a chunk, 16 bytes are read.
    unsafe {
        let (below, above) = (
            _mm256_loadu_ps(tile.table.as_ptr()),
            _mm256_loadu_ps(tile.table.as_ptr().add(8)),
        );
        let (bytes, x) = (tile.bytes.as_ptr(), tile.x.as_ptr());
        for row in 0..ROWS {
            let scales = tile.scales[row];
            let mut all = [_mm256_setzero_ps(); COUNT];
            for at in (tile.from..tile.to).step_by(CHUNK / 2) {
                let within = at - tile.from;
                let from = bytes.add(row * bytes_a_row + at / 2);
                let quarter = tile.to - at < CHUNK / 2;
                let codes = match quarter {
                    false => _mm256_loadu_si256(from.cast()),
                    true => _mm256_zextsi128_si256(_mm_loadu_si128(from.cast())),
                };
                let scale = match quarter {
                    false => _mm256_set_m128(
                        _mm_set1_ps(scales[(within + 32) >> shift]),
                        _mm_set1_ps(scales[within >> shift]),
                    ),
                    true => _mm256_zextps128_ps256(_mm_set1_ps(scales[within >> shift])),
                };
                let mut looked = [_mm256_setzero_ps(); 8];
                for (j, looked) in looked.iter_mut().enumerate() {
                    let by = _mm_cvtsi32_si128(4 * j as i32);
                    let codes = _mm256_srl_epi32(codes, by);
                    let fourth = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(codes));
                    *looked = _mm256_blendv_ps(
                        _mm256_permutevar8x32_ps(below, codes),
                        _mm256_permutevar8x32_ps(above, codes),
                        fourth,
                    );
                }
                for (r, all) in all.iter_mut().enumerate() {
                    let line = x.add(r * lines_a_row + at / CHUNK * 8);
                    let second = at % CHUNK / 8; // numbers within a line
                    let mut of = [_mm256_setzero_ps(); 2];
                    for (j, looked) in looked.iter().enumerate() {
                        let x = _mm256_load_ps(line.add(j).cast::<f32>().add(second));
                        of[j % 2] = _mm256_fmadd_ps(*looked, x, of[j % 2]);
                    }
                    let mut of = _mm256_add_ps(of[0], of[1]);
                    if quarter {
                        of = _mm256_zextps128_ps256(_mm256_castps256_ps128(of));
                    }
                    *all = _mm256_fmadd_ps(of, scale, *all);
                }
            }
            for (sum, all) in sums[row].iter_mut().zip(all) {
                let mut lanes = [0f32; 8];
                _mm256_storeu_ps(lanes.as_mut_ptr(), all);
                *sum = lanes.iter().sum();
            }
        }
    }
}
