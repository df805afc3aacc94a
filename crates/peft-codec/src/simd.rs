//! The same on AVX2 and AVX-512.
//!
//! Encoding: a number's rank among the 15 thresholds is found by a search of four comparisons (AVX-512, a threshold being a
//! lane of a register) or by counting (AVX2). Decoding: a block has 16 possible results, which are in a register; codes choose
//! among them, 32 or 16 at a time.

use std::arch::x86_64::*;

use half::{bf16, f16};

use crate::{
    element::{Element, private::Format},
    four::{LEAST, Level},
    table::{Bins, Decision},
};

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
            (Level::Avx512Bf16, _)
                if values.len().is_multiple_of(64) && decision.bins.is_some() =>
            {
                encode_bins(decision, values, bytes)
            }
            (Level::Avx512 | Level::Avx512Bf16, Format::Single) => {
                encode_512(decision, same(values), bytes, |p: *const f32| {
                    _mm512_loadu_ps(p)
                })
            }
            (Level::Avx512 | Level::Avx512Bf16, Format::Brain) => {
                encode_512(decision, same(values), bytes, |p: *const bf16| {
                    let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
                    _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))
                })
            }
            (Level::Avx512 | Level::Avx512Bf16, Format::Half) => {
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

/// Encodes 64 numbers at a time, by [`Bins`](crate::table::Bins): the bin and whether the threshold is exceeded make an index
/// of six bits for a lookup of bytes.
///
/// # Safety
/// AVX-512 F, BW, DQ, VL, VBMI, VBMI2; whole 64s.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2")]
unsafe fn encode_bins<T: Element>(
    decision: &Decision,
    values: &[T],
    bytes: &mut [u8],
) -> Option<f32> {
    let bins = decision.bins.as_ref()?;
    // As integers, what is no number is more than infinity.
    let magnitude = _mm512_set1_epi32(i32::MAX);
    let mut most = [_mm512_setzero_si512(); 2];
    for part in values.chunks_exact(32) {
        for (i, most) in most.iter_mut().enumerate() {
            ahead(part[16 * i..].as_ptr());
            // SAFETY: 32 numbers.
            let x = unsafe { load_512(part.as_ptr().add(16 * i)) };
            let x = _mm512_and_si512(_mm512_castps_si512(x), magnitude);
            *most = _mm512_max_epu32(*most, x);
        }
    }
    let absmax = f32::from_bits(_mm512_reduce_max_epu32(_mm512_max_epu32(most[0], most[1])));
    if !(LEAST..f32::INFINITY).contains(&absmax) {
        return None;
    }
    let scale = _mm512_set1_ps(1.0 / absmax);
    let (by, shift) = (_mm512_set1_ps(Bins::SCALE), _mm512_set1_ps(Bins::SHIFT));
    let lower = _mm512_set1_epi32(0xff_ffff);
    // SAFETY: 32 numbers, and 64 bytes twice.
    let (below, above, codes, pairs) = unsafe {
        (
            _mm512_loadu_ps(bins.thresholds.as_ptr()),
            _mm512_loadu_ps(bins.thresholds.as_ptr().add(16)),
            _mm512_loadu_si512(bins.codes.as_ptr().cast()),
            _mm512_loadu_si512(PAIRS.as_ptr().cast()),
        )
    };
    for (part, bytes) in values.chunks_exact(64).zip(bytes.chunks_exact_mut(32)) {
        let index = |i: usize| {
            // SAFETY: 64 numbers.
            let v = _mm512_mul_ps(unsafe { load_512(part.as_ptr().add(16 * i)) }, scale);
            let bin = _mm512_castps_si512(_mm512_fmadd_ps(v, by, shift));
            let under = _mm512_sub_ps(_mm512_permutex2var_ps(below, bin, above), v);
            // The sign of that becomes the last bit; bits 8 to 23 are zero.
            _mm512_shldi_epi32::<1>(bin, _mm512_castps_si512(under))
        };
        let (second, third) = (
            _mm512_slli_epi32::<8>(index(1)),
            _mm512_slli_epi32::<16>(index(2)),
        );
        let all = _mm512_ternarylogic_epi32::<0xfe>(index(0), second, third); // or
        let fourth = _mm512_slli_epi32::<24>(index(3));
        let all = _mm512_ternarylogic_epi32::<0xf8>(fourth, all, lower); // fourth | all & lower
        let all = _mm512_permutexvar_epi8(pairs, _mm512_permutexvar_epi8(all, codes));
        let first = _mm256_slli_epi16::<4>(_mm512_castsi512_si256(all));
        let second = _mm512_extracti64x4_epi64::<1>(all);
        // SAFETY: 32 bytes.
        unsafe { _mm256_storeu_si256(bytes.as_mut_ptr().cast(), _mm256_or_si256(first, second)) };
    }
    Some(absmax)
}

/// Of 64 numbers, the (16 j + i)-th being byte 4 i + j, first the even ones, then the odd ones.
const PAIRS: [u8; 64] = {
    let mut from = [0; 64];
    let mut at = 0;
    while at < 64 {
        let number = 2 * (at % 32) + at / 32;
        from[at] = (4 * (number % 16) + number / 16) as u8;
        at += 1;
    }
    from
};

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
///
/// With `past`, the numbers go to memory past the caches, if `out` begins at a multiple of 64 bytes; [`fence`] ends that.
pub(crate) fn decode_blocks<T: Element>(
    level: Level,
    table: &[f32; 16],
    absmax: &[f32],
    bytes: &[u8],
    out: &mut [T],
    size: usize,
    past: bool,
) -> usize {
    let whole = out.len() / size;
    assert!(absmax.len() >= whole && bytes.len() >= whole * size / 2 && size.is_multiple_of(32));
    assert!(level >= Level::Avx512);
    let absmax = &absmax[..whole];
    let past = past && out.as_ptr().addr().is_multiple_of(64);
    let words = out.as_mut_ptr().cast();
    // SAFETY: `Level` says that the processor has the instructions; the lengths and the alignment are checked.
    unsafe {
        match (T::FORMAT, past) {
            (Format::Single, false) => {
                singles_512::<false>(table, absmax, bytes, same_mut(out), size)
            }
            (Format::Single, true) => {
                singles_512::<true>(table, absmax, bytes, same_mut(out), size)
            }
            (Format::Half, false) => halves_512::<false>(table, absmax, bytes, words, size),
            (Format::Half, true) => halves_512::<true>(table, absmax, bytes, words, size),
            (Format::Brain, past) => {
                let instruction = level >= Level::Avx512Bf16 && ordinary(table, absmax);
                match (instruction, past) {
                    (false, false) => brains_512::<false>(table, absmax, bytes, words, size),
                    (false, true) => brains_512::<true>(table, absmax, bytes, words, size),
                    (true, false) => brains_bf16::<false>(table, absmax, bytes, words, size),
                    (true, true) => brains_bf16::<true>(table, absmax, bytes, words, size),
                }
            }
        }
    }
    whole
}

/// Whether no product of the two is a number that `vcvtneps2bf16` would flush to zero, or none at all.
fn ordinary(table: &[f32; 16], absmax: &[f32]) -> bool {
    let magnitudes = table.iter().map(|it| it.abs()).filter(|it| *it != 0.0);
    let (least, most) = magnitudes.fold((f32::MAX, 0f32), |(a, b), it| (a.min(it), b.max(it)));
    // Scales of zero and of one sign only are the rule; with the bits as integers, a comparison does it all.
    let bits = |x: f32| x.to_bits();
    let (from, to) = (
        bits(f32::MIN_POSITIVE / least),
        bits(f32::MAX / most.max(1.0)),
    );
    most < f32::INFINITY
        && least >= f32::MIN_POSITIVE
        && absmax
            .iter()
            .all(|it| bits(*it) == 0 || (from + 1..to).contains(&bits(*it)))
}

/// So many bytes before they are needed, numbers are asked for: the next page, which the processor does not look into by itself.
const AHEAD: usize = 4096;

/// Asks for the 64 bytes that are [`AHEAD`] of an address, if there are any.
#[inline]
pub(crate) fn ahead<T>(of: *const T) {
    let address = of.wrapping_byte_add(AHEAD).cast();
    // SAFETY: every processor of this architecture has it; it reads nothing that the program sees, and faults nowhere.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(address) };
}

/// What went past the caches is there for other cores.
pub(crate) fn fence() {
    // SAFETY: every processor of this architecture has it.
    unsafe { _mm_sfence() };
}

/// Stores 64 bytes.
///
/// # Safety
/// AVX-512 F; there is room for them, at a multiple of 64 if they go past the caches.
#[inline(always)]
unsafe fn store<const PAST: bool>(to: *mut __m512i, value: __m512i) {
    // SAFETY: the caller's.
    unsafe {
        match PAST {
            true => _mm512_stream_si512(to, value),
            false => _mm512_storeu_si512(to, value),
        }
    }
}

/// To bf16: to the nearest, ties to even, what is no number stays none. The instruction for it would flush the smallest numbers.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn brain(x: __m512) -> __m256i {
    let bits = _mm512_castps_si512(x);
    let upper = _mm512_srli_epi32::<16>(bits);
    let odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
    let half = _mm512_add_epi32(_mm512_set1_epi32(0x7fff), odd);
    let rounded = _mm512_srli_epi32::<16>(_mm512_add_epi32(bits, half));
    let none = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
    let quiet = _mm512_or_si512(upper, _mm512_set1_epi32(0x40));
    _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, none, quiet))
}

/// 16 numbers as fp32.
///
/// # Safety
/// AVX-512 F, BW, DQ, VL; the numbers are there.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(crate) unsafe fn load_512<T: Element>(from: *const T) -> __m512 {
    // SAFETY: the caller's.
    unsafe {
        match T::FORMAT {
            Format::Single => _mm512_loadu_ps(from.cast()),
            Format::Brain => {
                let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
            }
            Format::Half => _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())),
        }
    }
}

/// 16 numbers from fp32, rounded.
///
/// # Safety
/// AVX-512 F, BW, DQ, VL; there is room for them.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(crate) unsafe fn store_512<T: Element>(to: *mut T, value: __m512) {
    // SAFETY: the caller's.
    unsafe {
        match T::FORMAT {
            Format::Single => _mm512_storeu_ps(to.cast(), value),
            Format::Brain => _mm256_storeu_si256(to.cast(), brain(value)),
            Format::Half => {
                const HOW: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
                _mm256_storeu_si256(to.cast(), _mm512_cvtps_ph::<HOW>(value));
            }
        }
    }
}

/// # Safety
/// AVX-512 F, BW, DQ, VL; `bytes` and `out` hold `absmax.len()` blocks of `size`; see [`store`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn halves_512<const PAST: bool>(
    table: &[f32; 16],
    absmax: &[f32],
    bytes: &[u8],
    out: *mut u16,
    size: usize,
) {
    let round = |x| _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x);
    // SAFETY: the caller's.
    unsafe { words_512::<PAST>(table, absmax, bytes, out, size, round) }
}

/// # Safety
/// As [`halves_512`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn brains_512<const PAST: bool>(
    table: &[f32; 16],
    absmax: &[f32],
    bytes: &[u8],
    out: *mut u16,
    size: usize,
) {
    let round = |x| brain(x);
    // SAFETY: the caller's.
    unsafe { words_512::<PAST>(table, absmax, bytes, out, size, round) }
}

/// For products that are [`ordinary`].
///
/// # Safety
/// As [`halves_512`], and AVX-512 BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn brains_bf16<const PAST: bool>(
    table: &[f32; 16],
    absmax: &[f32],
    bytes: &[u8],
    out: *mut u16,
    size: usize,
) {
    let round = |x| {
        // SAFETY: both are 256 bits.
        unsafe { std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(x)) }
    };
    // SAFETY: the caller's.
    unsafe { words_512::<PAST>(table, absmax, bytes, out, size, round) }
}

/// Each of 16 bytes as two words, within lanes of 128 bits.
const SPREAD: [u8; 64] = {
    let mut bytes = [0x80; 64]; // gives zero
    let mut word = 0;
    while word < 32 {
        bytes[2 * word] = (word / 2) as u8;
        word += 1;
    }
    bytes
};

/// 16-bit numbers, 32 at a time: each byte is spread over two words, one of them is shifted, and what is above the low
/// four bits of an index does not matter, as the products are there twice.
///
/// # Safety
/// As [`halves_512`].
#[inline(always)]
unsafe fn words_512<const PAST: bool>(
    table: &[f32; 16],
    absmax: &[f32],
    bytes: &[u8],
    out: *mut u16,
    size: usize,
    round: impl Fn(__m512) -> __m256i,
) {
    // SAFETY: the instructions are the caller's; 16 bytes are 32 codes, of which there are so many.
    unsafe {
        let table = _mm512_loadu_ps(table.as_ptr());
        let spread = _mm512_loadu_si512(SPREAD.as_ptr().cast());
        let shift = _mm512_set1_epi32(4); // of the first word of two
        for (block, absmax) in absmax.iter().enumerate() {
            let products = round(_mm512_mul_ps(table, _mm512_set1_ps(*absmax)));
            let products = _mm512_broadcast_i64x4(products);
            for i in 0..size / 32 {
                let at = block * size + 32 * i;
                let codes = _mm_loadu_si128(bytes.as_ptr().add(at / 2).cast());
                let codes = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(codes), spread);
                let codes = _mm512_srlv_epi16(codes, shift);
                let chosen = _mm512_permutexvar_epi16(codes, products);
                store::<PAST>(out.add(at).cast(), chosen);
            }
        }
    }
}

/// Numbers in fp32, 16 at a time: each half of eight bytes is spread over eight lanes and shifted; a lookup takes four bits.
///
/// # Safety
/// As [`halves_512`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn singles_512<const PAST: bool>(
    table: &[f32; 16],
    absmax: &[f32],
    bytes: &[u8],
    out: &mut [f32],
    size: usize,
) {
    let shifts = _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24);
    // SAFETY: 16 numbers; then 8 bytes are 16 codes, of which there are so many.
    unsafe {
        let table = _mm512_loadu_ps(table.as_ptr());
        for (block, absmax) in absmax.iter().enumerate() {
            let products = _mm512_mul_ps(table, _mm512_set1_ps(*absmax));
            for i in 0..size / 16 {
                let at = block * size + 16 * i;
                let from = bytes.as_ptr().add(at / 2).cast::<i32>();
                let codes = _mm512_set1_epi32(from.read_unaligned());
                let second = from.add(1).read_unaligned();
                let codes = _mm512_mask_set1_epi32(codes, 0xff00, second);
                let chosen = _mm512_permutexvar_ps(_mm512_srlv_epi32(codes, shifts), products);
                store::<PAST>(out.as_mut_ptr().add(at).cast(), _mm512_castps_si512(chosen));
            }
        }
    }
}

/// `map[code] · absmax + offset`, each rounded, for codes that share `absmax`.
pub(crate) fn scales(
    level: Level,
    codes: &[u8],
    absmax: f32,
    map: &[f32; 256],
    offset: f32,
    out: &mut [f32],
) -> usize {
    assert!(codes.len() == out.len());
    // SAFETY: `Level` says that the processor has the instructions.
    unsafe {
        match level {
            Level::Scalar => 0,
            Level::Avx2 => scales_256(codes, absmax, map, offset, out),
            _ => scales_512(codes, absmax, map, offset, out),
        }
    }
}

/// # Safety
/// AVX2; `codes` and `out` are as long.
#[target_feature(enable = "avx2,f16c")]
unsafe fn scales_256(
    codes: &[u8],
    absmax: f32,
    map: &[f32; 256],
    offset: f32,
    out: &mut [f32],
) -> usize {
    let whole = codes.len() / 8;
    for i in 0..whole {
        // SAFETY: there are eight more; a byte is an index into 256 numbers.
        unsafe {
            let at = _mm256_cvtepu8_epi32(_mm_loadl_epi64(codes.as_ptr().add(8 * i).cast()));
            let value = _mm256_i32gather_ps::<4>(map.as_ptr(), at);
            let product = _mm256_mul_ps(value, _mm256_set1_ps(absmax));
            let sum = _mm256_add_ps(product, _mm256_set1_ps(offset));
            _mm256_storeu_ps(out.as_mut_ptr().add(8 * i), sum);
        }
    }
    8 * whole
}

/// # Safety
/// AVX-512 F, BW, DQ, VL; `codes` and `out` are as long.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn scales_512(
    codes: &[u8],
    absmax: f32,
    map: &[f32; 256],
    offset: f32,
    out: &mut [f32],
) -> usize {
    let whole = codes.len() / 16;
    for i in 0..whole {
        // SAFETY: there are 16 more; a byte is an index into 256 numbers.
        unsafe {
            let at = _mm512_cvtepu8_epi32(_mm_loadu_si128(codes.as_ptr().add(16 * i).cast()));
            let value = _mm512_i32gather_ps::<4>(at, map.as_ptr());
            let product = _mm512_mul_ps(value, _mm512_set1_ps(absmax));
            let sum = _mm512_add_ps(product, _mm512_set1_ps(offset));
            _mm512_storeu_ps(out.as_mut_ptr().add(16 * i), sum);
        }
    }
    16 * whole
}
