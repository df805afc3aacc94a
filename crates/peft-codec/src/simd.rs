//! The same on AVX2 and AVX-512.
//!
//! Encoding: a number's rank among the 15 thresholds is found by a search of four comparisons (AVX-512, a threshold being a
//! lane of a register) or by counting (AVX2). Decoding: a block has 16 possible results, which are in a register; codes choose
//! among them, 32 or 16 at a time.

use std::arch::x86_64::*;

use half::{bf16, f16};

use crate::{
    element::{Element, private::Format},
    four::Level,
    table::Decision,
};

/// Scales below this, or not finite, are left to the scalar form: their reciprocals are no ordinary numbers.
const LEAST: f32 = 1e-30;

/// The slice as what it is by its format.
fn same<T: Element, U: Element>(slice: &[T]) -> &[U] {
    assert!(T::FORMAT == U::FORMAT);
    // SAFETY: one format has one type.
    unsafe { std::slice::from_raw_parts(slice.as_ptr().cast(), slice.len()) }
}

fn same_mut<T: Element, U: Element>(slice: &mut [T]) -> &mut [U] {
    assert!(T::FORMAT == U::FORMAT);
    // SAFETY: one format has one type.
    unsafe { std::slice::from_raw_parts_mut(slice.as_mut_ptr().cast(), slice.len()) }
}

/// Encodes a whole block, unless it holds something unusual; gives its scale.
pub(crate) fn encode<T: Element>(
    level: Level,
    decision: &Decision,
    values: &[T],
    bytes: &mut [u8],
) -> Option<f32> {
    assert!(values.len().is_multiple_of(32) && bytes.len() == values.len() / 2);
    // SAFETY: `Level` says that the processor has the instructions.
    unsafe {
        match (level, T::FORMAT) {
            (Level::Avx512, Format::Single) => {
                encode_512(decision, same(values), bytes, |p: *const f32| {
                    _mm512_loadu_ps(p)
                })
            }
            (Level::Avx512, Format::Brain) => {
                encode_512(decision, same(values), bytes, |p: *const bf16| {
                    let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
                    _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))
                })
            }
            (Level::Avx512, Format::Half) => {
                encode_512(decision, same(values), bytes, |p: *const f16| {
                    _mm512_cvtph_ps(_mm256_loadu_si256(p.cast()))
                })
            }
            (_, Format::Single) => encode_256(decision, same(values), bytes, |p: *const f32| {
                _mm256_loadu_ps(p)
            }),
            (_, Format::Brain) => encode_256(decision, same(values), bytes, |p: *const bf16| {
                let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))
            }),
            (_, Format::Half) => encode_256(decision, same(values), bytes, |p: *const f16| {
                _mm256_cvtph_ps(_mm_loadu_si128(p.cast()))
            }),
        }
    }
}

/// # Safety
/// AVX-512 F, BW, DQ, VL; `load` reads 16 numbers.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn encode_512<T>(
    decision: &Decision,
    values: &[T],
    bytes: &mut [u8],
    load: impl Fn(*const T) -> __m512,
) -> Option<f32> {
    let (mut most, mut strange) = (_mm512_setzero_ps(), 0u16);
    for part in values.chunks_exact(16) {
        let x = load(part.as_ptr());
        strange |= _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
        most = _mm512_max_ps(_mm512_abs_ps(x), most);
    }
    let absmax = _mm512_reduce_max_ps(most);
    if strange != 0 || !(LEAST..f32::INFINITY).contains(&absmax) {
        return None;
    }
    let scale = _mm512_set1_ps(1.0 / absmax);
    // SAFETY: both hold 16 elements.
    let (thresholds, order) = unsafe {
        (
            _mm512_loadu_ps(decision.thresholds.as_ptr()),
            _mm512_cvtepu8_epi32(_mm_loadu_si128(decision.order.as_ptr().cast())),
        )
    };
    let middle = _mm512_permutexvar_ps(_mm512_set1_epi32(7), thresholds);
    let both = _mm_set1_epi16(0x0110); // 16 · first + 1 · second
    for (part, bytes) in values.chunks_exact(16).zip(bytes.chunks_exact_mut(8)) {
        let v = _mm512_mul_ps(load(part.as_ptr()), scale);
        let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(v, middle);
        let mut rank = _mm512_maskz_mov_epi32(above, _mm512_set1_epi32(8));
        for step in [4, 2, 1] {
            let at = _mm512_add_epi32(rank, _mm512_set1_epi32(step - 1));
            let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(v, _mm512_permutexvar_ps(at, thresholds));
            rank = _mm512_mask_add_epi32(rank, above, rank, _mm512_set1_epi32(step));
        }
        let codes = _mm512_cvtepi32_epi8(_mm512_permutexvar_epi32(rank, order));
        let pairs = _mm_maddubs_epi16(codes, both);
        // SAFETY: eight bytes.
        unsafe { _mm_storel_epi64(bytes.as_mut_ptr().cast(), _mm_packus_epi16(pairs, pairs)) };
    }
    Some(absmax)
}

/// # Safety
/// AVX2 and F16C; `load` reads 8 numbers.
#[target_feature(enable = "avx2,f16c")]
unsafe fn encode_256<T>(
    decision: &Decision,
    values: &[T],
    bytes: &mut [u8],
    load: impl Fn(*const T) -> __m256,
) -> Option<f32> {
    let sign = _mm256_set1_ps(-0.0);
    let (mut most, mut strange) = (_mm256_setzero_ps(), _mm256_setzero_ps());
    for part in values.chunks_exact(8) {
        let x = load(part.as_ptr());
        strange = _mm256_or_ps(strange, _mm256_cmp_ps::<_CMP_UNORD_Q>(x, x));
        most = _mm256_max_ps(_mm256_andnot_ps(sign, x), most);
    }
    let mut lanes = [0f32; 8];
    // SAFETY: eight lanes.
    unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), most) };
    let absmax = lanes.into_iter().fold(0.0, f32::max);
    if _mm256_movemask_ps(strange) != 0 || !(LEAST..f32::INFINITY).contains(&absmax) {
        return None;
    }
    let scale = _mm256_set1_ps(1.0 / absmax);
    for (part, bytes) in values.chunks_exact(8).zip(bytes.chunks_exact_mut(4)) {
        let v = _mm256_mul_ps(load(part.as_ptr()), scale);
        let mut rank = _mm256_setzero_si256();
        for t in &decision.thresholds[..15] {
            let above = _mm256_cmp_ps::<_CMP_GT_OQ>(v, _mm256_set1_ps(*t));
            rank = _mm256_sub_epi32(rank, _mm256_castps_si256(above)); // true is −1
        }
        let mut ranks = [0u32; 8];
        // SAFETY: eight lanes.
        unsafe { _mm256_storeu_si256(ranks.as_mut_ptr().cast(), rank) };
        for (byte, pair) in bytes.iter_mut().zip(ranks.chunks_exact(2)) {
            let code = |rank: u32| decision.order[rank as usize & 15];
            *byte = code(pair[0]) << 4 | code(pair[1]);
        }
    }
    Some(absmax)
}

/// Decodes as many numbers as fit its width, and says how many that were; always an even number.
pub(crate) fn decode<T: Element>(products: &[T; 16], bytes: &[u8], out: &mut [T]) -> usize {
    assert!(bytes.len() == out.len().div_ceil(2));
    // SAFETY: `Level` says that the processor has the instructions; 16-bit formats are looked up as bits.
    unsafe {
        match T::FORMAT {
            Format::Single => singles_256(&floats(products), bytes, same_mut(out)),
            _ => words_256(&words(products), bytes, out.as_mut_ptr().cast(), out.len()),
        }
    }
}

fn floats<T: Element>(products: &[T; 16]) -> [f32; 16] {
    let mut all = [0.0; 16];
    all.copy_from_slice(same(products));
    all
}

/// The bits of a 16-bit format.
fn words<T: Element>(products: &[T; 16]) -> [u16; 16] {
    match T::FORMAT {
        Format::Brain => {
            same::<T, bf16>(products)
                .iter()
                .map(|it| it.to_bits())
                .collect::<Words>()
                .0
        }
        _ => {
            same::<T, f16>(products)
                .iter()
                .map(|it| it.to_bits())
                .collect::<Words>()
                .0
        }
    }
}

struct Words([u16; 16]);

impl FromIterator<u16> for Words {
    fn from_iter<I: IntoIterator<Item = u16>>(all: I) -> Words {
        let mut words = [0; 16];
        words.iter_mut().zip(all).for_each(|(to, from)| *to = from);
        Words(words)
    }
}

/// # Safety
/// AVX2; `out` has room for `len` 16-bit numbers, `bytes` codes for as many.
#[target_feature(enable = "avx2,f16c")]
unsafe fn words_256(products: &[u16; 16], bytes: &[u8], out: *mut u16, len: usize) -> usize {
    let (mut lower, mut upper) = ([0u8; 16], [0u8; 16]);
    for (i, word) in products.iter().enumerate() {
        [lower[i], upper[i]] = word.to_le_bytes();
    }
    // SAFETY: 16 bytes each.
    let (lower, upper) = unsafe {
        (
            _mm_loadu_si128(lower.as_ptr().cast()),
            _mm_loadu_si128(upper.as_ptr().cast()),
        )
    };
    let low = _mm_set1_epi8(15);
    let whole = len / 32;
    for i in 0..whole {
        // SAFETY: 16 bytes are 32 codes, of which there are so many.
        unsafe {
            let codes = _mm_loadu_si128(bytes.as_ptr().add(16 * i).cast());
            let first = _mm_and_si128(_mm_srli_epi16::<4>(codes), low);
            let second = _mm_and_si128(codes, low);
            let halves = [
                _mm_unpacklo_epi8(first, second), // codes in order
                _mm_unpackhi_epi8(first, second),
            ];
            for (j, codes) in halves.into_iter().enumerate() {
                let (lower, upper) = (
                    _mm_shuffle_epi8(lower, codes),
                    _mm_shuffle_epi8(upper, codes),
                );
                let to = out.add(32 * i + 16 * j);
                _mm_storeu_si128(to.cast(), _mm_unpacklo_epi8(lower, upper));
                _mm_storeu_si128(to.add(8).cast(), _mm_unpackhi_epi8(lower, upper));
            }
        }
    }
    32 * whole
}

/// # Safety
/// AVX2.
#[target_feature(enable = "avx2,f16c")]
unsafe fn singles_256(products: &[f32; 16], bytes: &[u8], out: &mut [f32]) -> usize {
    // SAFETY: eight numbers each.
    let (below, above) = unsafe {
        (
            _mm256_loadu_ps(products.as_ptr()),
            _mm256_loadu_ps(products.as_ptr().add(8)),
        )
    };
    let low = _mm256_set1_epi64x(15);
    let whole = out.len() / 8;
    for i in 0..whole {
        let four = [0, 1, 2, 3].map(|j| bytes[4 * i + j]);
        let codes = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(i32::from_le_bytes(four)));
        let first = _mm256_srli_epi64::<4>(codes);
        let second = _mm256_slli_epi64::<32>(_mm256_and_si256(codes, low));
        let at = _mm256_or_si256(first, second);
        // The lookup takes three bits, the fourth chooses the table.
        let which = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(at));
        let chosen = _mm256_blendv_ps(
            _mm256_permutevar8x32_ps(below, at),
            _mm256_permutevar8x32_ps(above, at),
            which,
        );
        // SAFETY: eight numbers.
        unsafe { _mm256_storeu_ps(out.as_mut_ptr().add(8 * i), chosen) };
    }
    8 * whole
}

/// Decodes the whole blocks of a run with AVX-512, the 16 results of each block being computed together; says how many blocks.
pub(crate) fn decode_blocks<T: Element>(
    table: &[f32; 16],
    absmax: &[f32],
    bytes: &[u8],
    out: &mut [T],
    size: usize,
) -> usize {
    let whole = out.len() / size;
    assert!(absmax.len() >= whole && bytes.len() >= whole * size / 2 && size.is_multiple_of(32));
    let absmax = &absmax[..whole];
    // SAFETY: called for `Level::Avx512` alone; the lengths are checked.
    unsafe {
        match T::FORMAT {
            Format::Single => blocks_single(table, absmax, bytes, same_mut(out), size),
            Format::Brain => {
                blocks_words(table, absmax, bytes, out.as_mut_ptr().cast(), size, |x| {
                    brain(x)
                })
            }
            Format::Half => {
                blocks_words(table, absmax, bytes, out.as_mut_ptr().cast(), size, |x| {
                    _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x)
                })
            }
        }
    }
    whole
}

/// To bf16: to the nearest, ties to even, what is no number stays none. The instruction for it would flush the smallest numbers.
///
/// # Safety
/// AVX-512 F.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn brain(x: __m512) -> __m256i {
    let bits = _mm512_castps_si512(x);
    let upper = _mm512_srli_epi32::<16>(bits);
    let odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
    let half = _mm512_add_epi32(_mm512_set1_epi32(0x7fff), odd);
    let rounded = _mm512_srli_epi32::<16>(_mm512_add_epi32(bits, half));
    let none = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
    let quiet = _mm512_or_si512(upper, _mm512_set1_epi32(0x40));
    _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, none, quiet))
}

/// # Safety
/// AVX-512 F, BW, DQ, VL; `bytes` and `out` hold `absmax.len()` blocks of `size`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn blocks_words(
    table: &[f32; 16],
    absmax: &[f32],
    bytes: &[u8],
    out: *mut u16,
    size: usize,
    round: impl Fn(__m512) -> __m256i,
) {
    // SAFETY: 16 numbers.
    let table = unsafe { _mm512_loadu_ps(table.as_ptr()) };
    let low = _mm512_set1_epi32(15);
    for (block, absmax) in absmax.iter().enumerate() {
        let products = round(_mm512_mul_ps(table, _mm512_set1_ps(*absmax)));
        let products = _mm512_broadcast_i64x4(products);
        for i in 0..size / 32 {
            let at = block * size + 32 * i;
            // SAFETY: 16 bytes are 32 codes, of which there are so many.
            unsafe {
                let codes = _mm_loadu_si128(bytes.as_ptr().add(at / 2).cast());
                let codes = _mm512_cvtepu8_epi32(codes);
                let first = _mm512_srli_epi32::<4>(codes);
                let second = _mm512_slli_epi32::<16>(_mm512_and_si512(codes, low));
                let chosen = _mm512_permutexvar_epi16(_mm512_or_si512(first, second), products);
                _mm512_storeu_si512(out.add(at).cast(), chosen);
            }
        }
    }
}

/// # Safety
/// AVX-512 F, BW, DQ, VL; `bytes` and `out` hold `absmax.len()` blocks of `size`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn blocks_single(
    table: &[f32; 16],
    absmax: &[f32],
    bytes: &[u8],
    out: &mut [f32],
    size: usize,
) {
    // SAFETY: 16 numbers.
    let table = unsafe { _mm512_loadu_ps(table.as_ptr()) };
    let low = _mm512_set1_epi64(15);
    for (block, absmax) in absmax.iter().enumerate() {
        let products = _mm512_mul_ps(table, _mm512_set1_ps(*absmax));
        for i in 0..size / 16 {
            let at = block * size + 16 * i;
            // SAFETY: 8 bytes are 16 codes, of which there are so many.
            unsafe {
                let codes = _mm_loadl_epi64(bytes.as_ptr().add(at / 2).cast());
                let codes = _mm512_cvtepu8_epi64(codes);
                let first = _mm512_srli_epi64::<4>(codes);
                let second = _mm512_slli_epi64::<32>(_mm512_and_si512(codes, low));
                let chosen = _mm512_permutexvar_ps(_mm512_or_si512(first, second), products);
                _mm512_storeu_ps(out.as_mut_ptr().add(at), chosen);
            }
        }
    }
}
