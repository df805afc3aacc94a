//! A step of a block with AVX-512.

use std::arch::x86_64::*;

use super::{Block, STATE_BLOCK, Step};
use crate::{
    element::{Element, private::Format},
    four::Level,
    map::Map,
    nearest::{LEAST, MEAN, Nearest, SQUARES},
    simd::{ahead, load_512, store_512},
};

/// A step by the rules of the CUDA kernel, of a whole block.
pub(super) fn step<P: Element, G: Element>(
    level: Level,
    step: &Step,
    signed: &Nearest,
    unsigned: &Nearest,
    params: &mut [P],
    grads: &[G],
    block: Block<'_>,
) {
    assert!(level >= Level::Avx512);
    assert!(params.len() == STATE_BLOCK && grads.len() == STATE_BLOCK);
    assert!(block.codes1.len() == STATE_BLOCK && block.codes2.len() == STATE_BLOCK);
    // SAFETY: `Level` says that the processor has the instructions; the lengths are checked.
    unsafe { step_512(level, step, signed, unsigned, params, grads, block) }
}

/// # Safety
/// AVX-512 F, BW, DQ, VL; all of a block.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn step_512<P: Element, G: Element>(
    level: Level,
    step: &Step,
    signed: &Nearest,
    unsigned: &Nearest,
    params: &mut [P],
    grads: &[G],
    block: Block<'_>,
) {
    let maps = [Map::signed().values(), Map::unsigned().values()];
    let (absmax1, absmax2) = (
        _mm512_set1_ps(*block.absmax1),
        _mm512_set1_ps(*block.absmax2),
    );
    let (beta1, beta2) = (_mm512_set1_ps(step.beta1), _mm512_set1_ps(step.beta2));
    let (rest1, rest2) = (_mm512_set1_ps(step.rest1), _mm512_set1_ps(step.rest2));
    let (grad_scale, eps) = (_mm512_set1_ps(step.grad_scale), _mm512_set1_ps(step.eps));
    let (size, infinity) = (_mm512_set1_ps(step.size), _mm512_set1_ps(f32::INFINITY));
    let (mut s1, mut s2) = ([_mm512_setzero_ps(); 16], [_mm512_setzero_ps(); 16]);
    let (mut most1, mut most2) = (_mm512_setzero_ps(), _mm512_setzero_ps());
    for i in 0..STATE_BLOCK / 16 {
        ahead(params[16 * i..].as_ptr());
        ahead(grads[16 * i..].as_ptr());
        if i % 4 == 0 {
            ahead(block.codes1[16 * i..].as_ptr());
            ahead(block.codes2[16 * i..].as_ptr());
        }
        // SAFETY: there are 16 more of each; a byte is an index into 256 values.
        unsafe {
            let look = |codes: &[u8], map: &[f32; 256]| {
                let codes = _mm_loadu_si128(codes.as_ptr().add(16 * i).cast());
                _mm512_i32gather_ps::<4>(_mm512_cvtepu8_epi32(codes), map.as_ptr())
            };
            let m = _mm512_mul_ps(look(block.codes1, maps[0]), absmax1);
            let v = _mm512_mul_ps(look(block.codes2, maps[1]), absmax2);
            let g = load_512(grads.as_ptr().add(16 * i));
            let finite = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(_mm512_abs_ps(g), infinity);
            let g = _mm512_mul_ps(g, grad_scale);
            let square = _mm512_mul_ps(_mm512_mul_ps(rest2, g), g);
            let v = _mm512_maskz_fmadd_ps(finite, v, beta2, square);
            let m = _mm512_maskz_fmadd_ps(finite, m, beta1, _mm512_mul_ps(rest1, g));
            let p = load_512(params.as_ptr().add(16 * i));
            let quotient = _mm512_div_ps(m, _mm512_add_ps(_mm512_sqrt_ps(v), eps));
            let to = params.as_mut_ptr().add(16 * i);
            let mut moved = _mm512_mask3_fmadd_ps(size, quotient, p, finite);
            if let Some(decay) = step.decay {
                if P::FORMAT != Format::Single {
                    store_512(to, moved);
                    moved = load_512(to); // rounded
                }
                moved = _mm512_mask_mul_ps(moved, finite, moved, _mm512_set1_ps(decay));
            }
            store_512(to, moved);
            (s1[i], s2[i]) = (m, v);
            // The greater magnitude; of a number and of what is none, the number.
            most1 = _mm512_range_ps::<0b1011>(most1, m);
            most2 = _mm512_range_ps::<0b1011>(most2, v);
        }
    }
    *block.absmax1 = _mm512_reduce_max_ps(most1);
    *block.absmax2 = _mm512_reduce_max_ps(most2);
    let scales = [1.0 / *block.absmax1, 1.0 / *block.absmax2];
    if level >= Level::Avx512Bf16 && scales.iter().all(|it| it.is_normal()) {
        // SAFETY: `level` says that the instructions are there.
        return unsafe { encode(&s1, &s2, scales, block) };
    }
    let [scale1, scale2] = scales.map(|it| _mm512_set1_ps(it));
    let (zero, one) = (_mm512_set1_epi32(127), _mm512_set1_epi32(1));
    for i in 0..STATE_BLOCK / 16 {
        let v = _mm512_mul_ps(s1[i], scale1);
        let number = _mm512_cmp_ps_mask::<_CMP_ORD_Q>(v, v);
        let below = _mm512_movepi32_mask(_mm512_castps_si512(v));
        // SAFETY: the instructions are the caller's.
        let steps = unsafe { rank::<17>(signed, _mm512_castps_si512(_mm512_abs_ps(v))) };
        let mut codes = _mm512_add_epi32(zero, steps);
        codes = _mm512_mask_sub_epi32(codes, below, zero, _mm512_min_epi32(steps, zero));
        codes = _mm512_maskz_mov_epi32(number, codes);
        // The sign of the code, and that of the state.
        let negative = _mm512_cmplt_epi32_mask(codes, zero);
        let wrong = negative ^ _mm512_movepi32_mask(_mm512_castps_si512(s1[i]));
        if wrong != 0 {
            let up = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(s1[i], _mm512_setzero_ps());
            codes = _mm512_mask_add_epi32(codes, wrong & up, codes, one);
            codes = _mm512_mask_sub_epi32(codes, wrong & !up, codes, one);
        }
        // What is no number, or negative, is zero.
        let v = _mm512_max_ps(_mm512_mul_ps(s2[i], scale2), _mm512_setzero_ps());
        // SAFETY: the instructions are the caller's; there are 16 more codes of each.
        unsafe {
            let ranks = rank::<16>(unsigned, _mm512_castps_si512(v));
            let at = 16 * i;
            _mm_storeu_si128(
                block.codes1.as_mut_ptr().add(at).cast(),
                _mm512_cvtepi32_epi8(codes),
            );
            _mm_storeu_si128(
                block.codes2.as_mut_ptr().add(at).cast(),
                _mm512_cvtepi32_epi8(ranks),
            );
        }
    }
}

/// Both states of a block, by tables of every number. A scale is no infinity, for of a block of zeros the signs would be lost.
///
/// # Safety
/// AVX-512 F, BW, DQ, VL, VBMI, VBMI2.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2")]
unsafe fn encode(means: &[__m512; 16], squares: &[__m512; 16], scales: [f32; 2], block: Block<'_>) {
    let (of_means, of_squares) = (MEAN.entries(), SQUARES.entries());
    assert!(block.codes1.len() == STATE_BLOCK && block.codes2.len() == STATE_BLOCK);
    let [scale1, scale2] = scales.map(|it| _mm512_set1_ps(it));
    // Byte j of number i of four vectors is byte i of the j-th.
    let order: [u8; 64] = std::array::from_fn(|at| (4 * (at % 16) + at / 16) as u8);
    let (limit, turn) = (_mm512_set1_epi8(127), _mm512_set1_epi8(126));
    // SAFETY: an index has 32 bits less those that are shifted away, and an entry each is there; of each code there are 64 more.
    unsafe {
        let order = _mm512_loadu_si512(order.as_ptr().cast());
        for i in 0..4 {
            let (mut c1, mut c2) = (_mm512_setzero_si512(), _mm512_setzero_si512());
            for j in (0..4).rev() {
                let u = _mm512_castps_si512(_mm512_mul_ps(means[4 * i + j], scale1));
                let at = _mm512_srli_epi32::<17>(u);
                let entry = _mm512_i32gather_epi32::<4>(at, of_means.as_ptr().cast());
                c1 = _mm512_shldi_epi32::<8>(c1, _mm512_add_epi32(entry, u));
                let u = _mm512_castps_si512(_mm512_mul_ps(squares[4 * i + j], scale2));
                let at = _mm512_srli_epi32::<16>(u);
                let entry = _mm512_i32gather_epi32::<4>(at, of_squares.as_ptr().cast());
                c2 = _mm512_shldi_epi32::<8>(c2, _mm512_add_epi32(entry, u));
            }
            let c1 = _mm512_permutexvar_epi8(order, c1);
            let negative = _mm512_cmplt_epu8_mask(c1, limit);
            let c1 = _mm512_mask_sub_epi8(c1, negative, turn, c1);
            _mm512_storeu_si512(block.codes1.as_mut_ptr().add(64 * i).cast(), c1);
            let c2 = _mm512_permutexvar_epi8(order, c2);
            _mm512_storeu_si512(block.codes2.as_mut_ptr().add(64 * i).cast(), c2);
        }
    }
}

/// As [`Nearest::rank`], `REST` bits being compared.
///
/// # Safety
/// AVX-512 F, BW, DQ, VL.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn rank<const REST: u32>(nearest: &Nearest, bits: __m512i) -> __m512i {
    let (least, one) = (
        _mm512_set1_epi32(LEAST as i32),
        _mm512_set1_epi32(1f32.to_bits() as i32),
    );
    let bits = _mm512_min_epu32(_mm512_max_epu32(bits, least), one);
    assert!(nearest.rest == REST);
    assert!(nearest.entries.len() > ((1f32.to_bits() - LEAST) >> REST) as usize);
    let entries = nearest
        .entries
        .as_ptr()
        .wrapping_sub((LEAST >> REST) as usize);
    let at = _mm512_srli_epi32::<REST>(bits);
    // SAFETY: the bits are at least the least and at most those of one.
    let entries = unsafe { _mm512_i32gather_epi32::<4>(at, entries.cast()) };
    _mm512_srli_epi32::<24>(_mm512_add_epi32(entries, bits))
}
