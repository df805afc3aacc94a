//! ggml's block formats, decoded to `f32`.
//!
//! A row of a quantised matrix is a sequence of blocks, each with its own scale:
//!
//! | format | values | bytes | layout | value |
//! | --- | --- | --- | --- | --- |
//! | `Q4_0` | 32 | 18 | d, 16 × two nibbles | d (q − 8) |
//! | `Q4_1` | 32 | 20 | d, m, 16 × two nibbles | d q + m |
//! | `Q5_0` | 32 | 22 | d, 32 fifth bits, nibbles | d (q − 16) |
//! | `Q5_1` | 32 | 24 | d, m, 32 fifth bits, nibbles | d q + m |
//! | `Q8_0` | 32 | 34 | d, 32 × i8 | d q |
//! | `Q4_K` | 256 | 144 | d, m, 8 × (s, t) in 6 bits, nibbles | (d s) q − m t |
//! | `Q5_K` | 256 | 176 | the same, and 256 fifth bits | (d s) q − m t |
//! | `Q6_K` | 256 | 210 | low nibbles, high two bits, 16 × i8 s, d | (d s) (q − 32) |
//!
//! d and m are `f16`. In the 32-value formats byte i holds value i in its low nibble and value
//! i + 16 in its high one; in the K formats nibbles are 32 apart.
//!
//! The order of operations is that of ggml's reference code and nothing is fused, so values agree
//! with it in every bit; where it yields NaN (an infinite scale times zero), so does this.

use half::{bf16, f16, slice::HalfFloatSliceExt};

/// A tensor format that can be decoded. The names are ggml's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs, non_camel_case_types)]
pub enum GgmlType {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4_K,
    Q5_K,
    Q6_K,
}

use GgmlType::*;

/// Every supported format: its number in the file, its name, values per block, bytes per block.
const FORMATS: [(GgmlType, u32, &str, usize, usize); 11] = [
    (F32, 0, "F32", 1, 4),
    (F16, 1, "F16", 1, 2),
    (BF16, 30, "BF16", 1, 2),
    (Q4_0, 2, "Q4_0", 32, 18),
    (Q4_1, 3, "Q4_1", 32, 20),
    (Q5_0, 6, "Q5_0", 32, 22),
    (Q5_1, 7, "Q5_1", 32, 24),
    (Q8_0, 8, "Q8_0", 32, 34),
    (Q4_K, 12, "Q4_K", 256, 144),
    (Q5_K, 13, "Q5_K", 256, 176),
    (Q6_K, 14, "Q6_K", 256, 210),
];

/// Formats that exist and are refused: here only so that the refusal can name them.
const REFUSED: [(u32, &str); 26] = [
    (4, "Q4_2"),
    (5, "Q4_3"),
    (9, "Q8_1"),
    (10, "Q2_K"),
    (11, "Q3_K"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (31, "Q4_0_4_4"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
    (40, "NVFP4"),
    (41, "Q1_0"),
];

impl GgmlType {
    /// The format with number `id`, or what to call it in a refusal.
    pub(crate) fn of(id: u32) -> Result<Self, String> {
        if let Some(known) = FORMATS.iter().find(|f| f.1 == id) {
            return Ok(known.0);
        }
        let known: Vec<_> = FORMATS.iter().map(|f| f.2).collect();
        let name = REFUSED
            .iter()
            .find(|r| r.0 == id)
            .map_or("unknown", |r| r.1);
        Err(format!(
            "has ggml type {id} ({name}), which cannot be read; this build reads {}",
            known.join(", ")
        ))
    }

    fn format(self) -> (&'static str, usize, usize) {
        let (_, _, name, values, bytes) = *FORMATS
            .iter()
            .find(|f| f.0 == self)
            .expect("the table has every variant");
        (name, values, bytes)
    }

    /// ggml's name of the format.
    pub fn name(self) -> &'static str {
        self.format().0
    }

    /// Values in one block; rows hold whole blocks.
    pub fn block_values(self) -> usize {
        self.format().1
    }

    /// Bytes of one block.
    pub fn block_bytes(self) -> usize {
        self.format().2
    }

    /// Decodes whole blocks: `bytes` [n · block_bytes] -> `out` [n · block_values].
    pub(crate) fn decode(self, bytes: &[u8], out: &mut [f32]) {
        debug_assert_eq!(
            bytes.len() / self.block_bytes(),
            out.len() / self.block_values()
        );
        match self {
            F32 => blocks(bytes, out, |b: &[u8; 4], y: &mut [f32; 1]| {
                y[0] = f32::from_le_bytes(*b);
            }),
            F16 => decode_f16(bytes, out),
            BF16 => blocks(bytes, out, |b: &[u8; 2], y: &mut [f32; 1]| {
                y[0] = bf16::from_le_bytes(*b).to_f32();
            }),
            Q4_0 => blocks(bytes, out, q4_0),
            Q4_1 => blocks(bytes, out, q4_1),
            Q5_0 => blocks(bytes, out, q5_0),
            Q5_1 => blocks(bytes, out, q5_1),
            Q8_0 => blocks(bytes, out, q8_0),
            Q4_K => blocks(bytes, out, q4_k),
            Q5_K => blocks(bytes, out, q5_k),
            Q6_K => blocks(bytes, out, q6_k),
        }
    }
}

impl std::fmt::Display for GgmlType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

fn blocks<const BYTES: usize, const VALUES: usize>(
    bytes: &[u8],
    out: &mut [f32],
    decode: impl Fn(&[u8; BYTES], &mut [f32; VALUES]),
) {
    let (bytes, out) = (bytes.as_chunks().0, out.as_chunks_mut().0);
    for (b, y) in bytes.iter().zip(out) {
        decode(b, y);
    }
}

/// Many at once, because the processor converts eight in one instruction.
fn decode_f16(bytes: &[u8], out: &mut [f32]) {
    let mut halves = [f16::ZERO; 1024];
    for (b, y) in bytes.chunks(2048).zip(out.chunks_mut(1024)) {
        let halves = &mut halves[..y.len()];
        for (half, b) in halves.iter_mut().zip(b.as_chunks().0) {
            *half = f16::from_le_bytes(*b);
        }
        halves.convert_to_f32_slice(y);
    }
}

/// The `f16` at byte `at`.
fn scale(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

fn q4_0(b: &[u8; 18], y: &mut [f32; 32]) {
    let d = scale(b, 0);
    for (i, q) in b[2..].iter().enumerate() {
        y[i] = (f32::from(q & 15) - 8.0) * d;
        y[i + 16] = (f32::from(q >> 4) - 8.0) * d;
    }
}

fn q4_1(b: &[u8; 20], y: &mut [f32; 32]) {
    let (d, m) = (scale(b, 0), scale(b, 2));
    for (i, q) in b[4..].iter().enumerate() {
        y[i] = f32::from(q & 15) * d + m;
        y[i + 16] = f32::from(q >> 4) * d + m;
    }
}

/// The fifth bits of the 32 values, value i in bit i.
fn fifth_bits(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
}

fn q5_0(b: &[u8; 22], y: &mut [f32; 32]) {
    let (d, high) = (scale(b, 0), fifth_bits(b, 2));
    for (i, q) in b[6..].iter().enumerate() {
        let (low_high, high_high) = ((high >> i) as u8 & 1, (high >> (i + 16)) as u8 & 1);
        y[i] = (f32::from(q & 15 | low_high << 4) - 16.0) * d;
        y[i + 16] = (f32::from(q >> 4 | high_high << 4) - 16.0) * d;
    }
}

fn q5_1(b: &[u8; 24], y: &mut [f32; 32]) {
    let (d, m, high) = (scale(b, 0), scale(b, 2), fifth_bits(b, 4));
    for (i, q) in b[8..].iter().enumerate() {
        let (low_high, high_high) = ((high >> i) as u8 & 1, (high >> (i + 16)) as u8 & 1);
        y[i] = f32::from(q & 15 | low_high << 4) * d + m;
        y[i + 16] = f32::from(q >> 4 | high_high << 4) * d + m;
    }
}

fn q8_0(b: &[u8; 34], y: &mut [f32; 32]) {
    let d = scale(b, 0);
    for (y, q) in y.iter_mut().zip(&b[2..]) {
        *y = f32::from(*q as i8) * d;
    }
}

/// Scale and minimum of sub-block `j` in 0..8, six bits each, packed into twelve bytes: the first
/// four pairs lie in the low six bits of bytes 0-3 and 4-7; the other four have their low nibbles
/// in bytes 8-11 and their high bits in the top of bytes 0-3 and 4-7.
fn scale_and_min(packed: &[u8], j: usize) -> (f32, f32) {
    let (s, t) = if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        (
            packed[j + 4] & 15 | packed[j - 4] >> 6 << 4,
            packed[j + 4] >> 4 | packed[j] >> 6 << 4,
        )
    };
    (f32::from(s), f32::from(t))
}

fn q4_k(b: &[u8; 144], y: &mut [f32; 256]) {
    let (d, m, packed) = (scale(b, 0), scale(b, 2), &b[4..16]);
    for (j, (q, y)) in b[16..].chunks(32).zip(y.chunks_mut(64)).enumerate() {
        let ((s1, t1), (s2, t2)) = (
            scale_and_min(packed, 2 * j),
            scale_and_min(packed, 2 * j + 1),
        );
        let (d1, m1, d2, m2) = (d * s1, m * t1, d * s2, m * t2);
        for (i, q) in q.iter().enumerate() {
            y[i] = d1 * f32::from(q & 15) - m1;
            y[i + 32] = d2 * f32::from(q >> 4) - m2;
        }
    }
}

fn q5_k(b: &[u8; 176], y: &mut [f32; 256]) {
    let (d, m, packed, high) = (scale(b, 0), scale(b, 2), &b[4..16], &b[16..48]);
    for (j, (q, y)) in b[48..].chunks(32).zip(y.chunks_mut(64)).enumerate() {
        let ((s1, t1), (s2, t2)) = (
            scale_and_min(packed, 2 * j),
            scale_and_min(packed, 2 * j + 1),
        );
        let (d1, m1, d2, m2) = (d * s1, m * t1, d * s2, m * t2);
        for (i, (q, h)) in q.iter().zip(high).enumerate() {
            y[i] = d1 * f32::from(q & 15 | (h >> (2 * j) & 1) << 4) - m1;
            y[i + 32] = d2 * f32::from(q >> 4 | (h >> (2 * j + 1) & 1) << 4) - m2;
        }
    }
}

fn q6_k(b: &[u8; 210], y: &mut [f32; 256]) {
    let d = scale(b, 208);
    for (half, y) in y.chunks_mut(128).enumerate() {
        let low = &b[half * 64..][..64];
        let high = &b[128 + half * 32..][..32];
        let scales = &b[192 + half * 8..][..8];
        let s = |i: usize| d * f32::from(scales[i] as i8);
        for i in 0..32 {
            let (a, c, h, g) = (low[i], low[i + 32], high[i], i / 16);
            y[i] = s(g) * (f32::from(a & 15 | (h & 3) << 4) - 32.0);
            y[i + 32] = s(g + 2) * (f32::from(c & 15 | (h >> 2 & 3) << 4) - 32.0);
            y[i + 64] = s(g + 4) * (f32::from(a >> 4 | (h >> 4 & 3) << 4) - 32.0);
            y[i + 96] = s(g + 6) * (f32::from(c >> 4 | (h >> 6 & 3) << 4) - 32.0);
        }
    }
}
