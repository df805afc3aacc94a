//! The same with NEON, which every processor of 64-bit Arm has.
//!
//! Encoding: the thresholds below a number are counted. Decoding: the 16 possible results of a block are kept by bytes, the lowest
//! of each in one register, the next in another; 16 codes at a time choose in each, and the bytes are put together.

use std::arch::aarch64::*;

use half::f16;

use crate::{
    element::{Element, private::Format},
    four::{LEAST, Level},
    table::Decision,
};

/// Encodes a whole block, unless it holds something unusual; gives its scale.
pub(crate) fn encode<T: Element>(
    level: Level,
    decision: &Decision,
    values: &[T],
    bytes: &mut [u8],
) -> Option<f32> {
    assert!(level > Level::Scalar);
    assert!(values.len().is_multiple_of(32) && bytes.len() == values.len() / 2);
    // SAFETY: every processor of this architecture has the instructions; the lengths are checked.
    unsafe { encode_neon(decision, values, bytes) }
}

/// Four numbers as fp32.
///
/// # Safety
/// The numbers are there.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn load<T: Element>(from: *const T) -> float32x4_t {
    // SAFETY: the caller's; one format has one type.
    unsafe {
        match T::FORMAT {
            Format::Single => vld1q_f32(from.cast()),
            Format::Brain => {
                let wide = vmovl_u16(vld1_u16(from.cast()));
                vreinterpretq_f32_u32(vshlq_n_u32::<16>(wide))
            }
            Format::Half => {
                let four = from.cast::<[f16; 4]>().read_unaligned();
                vld1q_f32(four.map(f16::to_f32).as_ptr())
            }
        }
    }
}

/// # Safety
/// A byte for two numbers, whole 16s.
#[target_feature(enable = "neon")]
unsafe fn encode_neon<T: Element>(
    decision: &Decision,
    values: &[T],
    bytes: &mut [u8],
) -> Option<f32> {
    let mut most = vdupq_n_f32(0.0);
    for part in values.chunks_exact(4) {
        // SAFETY: four numbers.
        let x = unsafe { load(part.as_ptr()) };
        most = vmaxq_f32(most, vabsq_f32(x)); // what is no number stays none
    }
    let absmax = vmaxvq_f32(most);
    if !(LEAST..f32::INFINITY).contains(&absmax) {
        return None;
    }
    let scale = 1.0 / absmax;
    // SAFETY: 16 bytes.
    let order = unsafe { vld1q_u8(decision.order.as_ptr()) };
    for (part, bytes) in values.chunks_exact(16).zip(bytes.chunks_exact_mut(8)) {
        let rank = |i: usize| {
            // SAFETY: 16 numbers.
            let v = vmulq_n_f32(unsafe { load(part.as_ptr().add(4 * i)) }, scale);
            let mut rank = vdupq_n_u32(0);
            for t in &decision.thresholds[..15] {
                rank = vsubq_u32(rank, vcgtq_f32(v, vdupq_n_f32(*t))); // true is −1
            }
            vmovn_u32(rank)
        };
        let (first, second) = (
            vmovn_u16(vcombine_u16(rank(0), rank(1))),
            vmovn_u16(vcombine_u16(rank(2), rank(3))),
        );
        let codes = vqtbl1q_u8(order, vcombine_u8(first, second));
        let (first, second) = (vuzp1q_u8(codes, codes), vuzp2q_u8(codes, codes));
        let pairs = vorrq_u8(vshlq_n_u8::<4>(first), second);
        // SAFETY: eight bytes.
        unsafe { vst1_u8(bytes.as_mut_ptr(), vget_low_u8(pairs)) };
    }
    Some(absmax)
}

/// Bytes of 16 numbers, the lowest of each, the next of each, and so on.
pub(crate) struct Planes<const SIZE: usize>([uint8x16_t; SIZE]);

impl<const SIZE: usize> Planes<SIZE> {
    /// Of numbers that have so many bytes.
    pub(crate) fn of<T: Element>(numbers: &[T; 16]) -> Planes<SIZE> {
        assert!(size_of::<T>() == SIZE);
        Planes(std::array::from_fn(|byte| {
            let of = |number: &T| {
                // SAFETY: a plain number of so many bytes.
                unsafe { std::ptr::from_ref(number).cast::<u8>().add(byte).read() }
            };
            let plane = numbers.each_ref().map(of);
            // SAFETY: every processor of this architecture has the instruction; 16 bytes.
            unsafe { vld1q_u8(plane.as_ptr()) }
        }))
    }

    /// The bytes of the numbers that 16 codes mean.
    #[inline]
    #[target_feature(enable = "neon")]
    pub(crate) fn look(&self, codes: uint8x16_t) -> [uint8x16_t; SIZE] {
        self.0.map(|plane| vqtbl1q_u8(plane, codes))
    }
}

/// The first and the second codes of 16 bytes.
#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn halves(bytes: uint8x16_t) -> [uint8x16_t; 2] {
    [vshrq_n_u8::<4>(bytes), vandq_u8(bytes, vdupq_n_u8(15))]
}

/// Decodes as many numbers as fit its width, and says how many that were; always an even number.
pub(crate) fn decode<T: Element>(products: &[T; 16], bytes: &[u8], out: &mut [T]) -> usize {
    assert!(bytes.len() == out.len().div_ceil(2));
    let whole = out.len() / 32;
    // SAFETY: every processor of this architecture has the instructions; 16 bytes are 32 codes, of which there are so many.
    unsafe {
        match T::FORMAT {
            Format::Single => {
                decode_singles(&Planes::of(products), bytes, out.as_mut_ptr().cast(), whole)
            }
            _ => decode_words(&Planes::of(products), bytes, out.as_mut_ptr().cast(), whole),
        }
    }
    32 * whole
}

/// # Safety
/// `bytes` holds 16, `out` has room for 32 numbers, `whole` times.
#[target_feature(enable = "neon")]
unsafe fn decode_words(products: &Planes<2>, bytes: &[u8], out: *mut u8, whole: usize) {
    for i in 0..whole {
        // SAFETY: the caller's.
        unsafe {
            let [first, second] = halves(vld1q_u8(bytes.as_ptr().add(16 * i)));
            let codes = [vzip1q_u8(first, second), vzip2q_u8(first, second)]; // in order
            for (j, codes) in codes.into_iter().enumerate() {
                let [lower, upper] = products.look(codes);
                let to = out.add(64 * i + 32 * j);
                vst1q_u8(to, vzip1q_u8(lower, upper));
                vst1q_u8(to.add(16), vzip2q_u8(lower, upper));
            }
        }
    }
}

/// # Safety
/// As [`decode_words`].
#[target_feature(enable = "neon")]
unsafe fn decode_singles(products: &Planes<4>, bytes: &[u8], out: *mut u16, whole: usize) {
    for i in 0..whole {
        // SAFETY: the caller's.
        unsafe {
            let [first, second] = halves(vld1q_u8(bytes.as_ptr().add(16 * i)));
            let codes = [vzip1q_u8(first, second), vzip2q_u8(first, second)]; // in order
            for (j, codes) in codes.into_iter().enumerate() {
                let [b0, b1, b2, b3] = products.look(codes);
                let lower =
                    [vzip1q_u8(b0, b1), vzip2q_u8(b0, b1)].map(|it| vreinterpretq_u16_u8(it));
                let upper =
                    [vzip1q_u8(b2, b3), vzip2q_u8(b2, b3)].map(|it| vreinterpretq_u16_u8(it));
                for (k, (lower, upper)) in lower.into_iter().zip(upper).enumerate() {
                    let to = out.add(64 * i + 32 * j + 16 * k);
                    vst1q_u16(to, vzip1q_u16(lower, upper));
                    vst1q_u16(to.add(8), vzip2q_u16(lower, upper));
                }
            }
        }
    }
}
