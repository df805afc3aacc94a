//! Every set of instructions gives the bits of the scalar form, on ordinary blocks and on those that are not.

use half::{bf16, f16};
use peft_codec::*;
use proptest::prelude::*;

const KINDS: [Type; 2] = [Type::Nf4, Type::Fp4];
const COMPATS: [Compat; 2] = [Compat::Cuda, Compat::Cpu];

fn bits<T: Element>(values: &[T]) -> Vec<u32> {
    values.iter().map(|it| it.wide().to_bits()).collect()
}

/// Quantises and dequantises at every level; all must agree.
fn agree<T: Element>(values: &[T], block: usize) {
    let block = Block::of(block).unwrap();
    for kind in KINDS {
        for compat in COMPATS {
            let scalar = quantise_at(Level::Scalar, values, kind, block, compat);
            let mut wanted = vec![T::default(); values.len()];
            let (bytes, absmax) = (&scalar.bytes, &scalar.absmax);
            dequantise_at(Level::Scalar, bytes, absmax, kind, block, &mut wanted).unwrap();
            for level in Level::all() {
                let what = format!("{level:?} {kind} {compat:?}");
                let packed = quantise_at(level, values, kind, block, compat);
                assert_eq!(packed.bytes, scalar.bytes, "{what}");
                assert_eq!(bits(&packed.absmax), bits(&scalar.absmax), "{what}");
                let mut out = vec![T::default(); values.len()];
                dequantise_at(level, bytes, absmax, kind, block, &mut out).unwrap();
                assert_eq!(bits(&out), bits(&wanted), "{what}");
            }
        }
    }
}

fn number() -> impl Strategy<Value = f32> {
    prop_oneof![
        40 => -3.0f32..3.0,
        2 => Just(0.0f32),
        1 => Just(-0.0f32),
        2 => any::<f32>(), // anything, NaN and infinities among it
        1 => -1e-39f32..1e-39,
    ]
}

proptest! {
    #[test]
    fn all_levels_agree(
        values in prop::collection::vec(number(), 0..700),
        block in prop::sample::select(vec![32usize, 64, 128, 256]),
        scale in prop::sample::select(vec![1.0f32, 1e-30, 1e-38, 1e30, 0.37]),
    ) {
        let scaled: Vec<f32> = values.iter().map(|it| it * scale).collect();
        agree(&scaled, block);
        agree(&scaled.iter().map(|it| bf16::from_f32(*it)).collect::<Vec<_>>(), block);
        agree(&scaled.iter().map(|it| f16::from_f32(*it)).collect::<Vec<_>>(), block);
    }

    #[test]
    fn a_number_comes_back_as_the_nearest_of_its_block(
        values in prop::collection::vec(-5.0f32..5.0, 1..400),
        block in prop::sample::select(vec![32usize, 64, 128]),
    ) {
        let size = Block::of(block).unwrap();
        for kind in KINDS {
            for compat in COMPATS {
                let packed = quantise(&values, kind, size, compat);
                let mut out = vec![0f32; values.len()];
                dequantise(&packed.bytes, &packed.absmax, kind, size, &mut out).unwrap();
                for (i, (x, y)) in values.iter().zip(&out).enumerate() {
                    let absmax = packed.absmax[i / block];
                    let best = kind.table().iter().map(|c| (c * absmax - x).abs()).fold(f32::MAX, f32::min);
                    prop_assert!((x - y).abs() <= best + absmax * 2e-6, "{} became {}", x, y);
                }
            }
        }
    }
}

/// Decodes pieces of a view at every level; all must be the same pieces of what is decoded of plain scales as a whole.
fn pieces<T: Element>(values: &[T], block: Block, kind: Type, cuts: &[(usize, usize)]) {
    let packed = quantise(values, kind, block, Compat::Cuda);
    let nested = Nested::of(&packed.absmax, Compat::Cuda);
    let computed = nested.absmax().unwrap();
    let plain = [&packed.absmax, &computed];
    let views = [Scales::Plain(&packed.absmax), Scales::from(&nested)];
    for (absmax, scales) in plain.into_iter().zip(views) {
        let mut whole = vec![T::default(); values.len()];
        let (bytes, scalar) = (&packed.bytes, Level::Scalar);
        dequantise_at(scalar, bytes, absmax, kind, block, &mut whole).unwrap();
        for level in Level::all() {
            let view = View::new(bytes, scales, kind.table(), block, values.len()).unwrap();
            let view = view.at(level);
            let mut out = vec![T::default(); values.len()];
            view.dequantise(&mut out).unwrap();
            assert_eq!(bits(&out), bits(&whole), "{level:?}");
            for (from, to) in cuts {
                let mut out = vec![T::default(); to - from];
                view.decode(*from, &mut out).unwrap();
                assert_eq!(
                    bits(&out),
                    bits(&whole[*from..*to]),
                    "{level:?} {from}..{to}"
                );
                // Past the caches what begins at a multiple of 64 bytes can go.
                let mut room = vec![T::default(); to - from + 64];
                let begin = room.as_ptr().align_offset(64);
                let out = &mut room[begin..begin + to - from];
                view.decode_past(*from, out).unwrap();
                assert_eq!(
                    bits(out),
                    bits(&whole[*from..*to]),
                    "{level:?} {from}..{to}"
                );
            }
        }
    }
}

proptest! {
    #[test]
    fn a_piece_is_what_it_is_in_the_whole(
        values in prop::collection::vec(number(), 1..900),
        block in prop::sample::select(vec![32usize, 64, 256]),
        kind in prop::sample::select(KINDS.to_vec()),
        cuts in prop::collection::vec((0usize..900, 0usize..900), 1..6),
    ) {
        let n = values.len();
        let cut = |(a, b): &(usize, usize)| {
            let (a, b) = (a % (n + 1), b % (n + 1));
            (a.min(b) / 2 * 2, a.max(b))
        };
        let cuts: Vec<_> = cuts.iter().map(cut).collect();
        let block = Block::of(block).unwrap();
        pieces(&values, block, kind, &cuts);
        pieces(&values.iter().map(|it| bf16::from_f32(*it)).collect::<Vec<_>>(), block, kind, &cuts);
        pieces(&values.iter().map(|it| f16::from_f32(*it)).collect::<Vec<_>>(), block, kind, &cuts);
    }
}

#[test]
fn pieces_of_many_scales_of_scales_and_past_the_caches() {
    let values: Vec<f32> = (0..1_200_000u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / 1e7 - 0.8)
        .collect();
    let cuts = [
        (0, 1_200_000),
        (2, 1_199_999),
        (63 * 64, 900_000),
        (16_384, 32_768),
    ];
    for block in [32, 64] {
        let block = Block::of(block).unwrap();
        pieces(&values, block, Type::Nf4, &cuts);
        let brain: Vec<_> = values.iter().map(|it| bf16::from_f32(*it)).collect();
        pieces(&brain, block, Type::Nf4, &cuts);
    }
    // What begins at a multiple of 64 bytes, and what does not.
    let packed = quantise(&values, Type::Nf4, Block::of(64).unwrap(), Compat::Cuda);
    let scales = Scales::Plain(&packed.absmax);
    let table = Type::Nf4.table();
    let view = View::new(
        &packed.bytes,
        scales,
        table,
        Block::of(64).unwrap(),
        1_200_000,
    )
    .unwrap();
    let mut wanted = vec![0f32; 1_200_000];
    view.at(Level::Scalar).dequantise(&mut wanted).unwrap();
    let mut room = vec![0f32; 1_200_000 + 32];
    let aligned = (0..16).find(|i| room[*i..].as_ptr().addr().is_multiple_of(64));
    for begin in [aligned.unwrap(), aligned.unwrap() + 1] {
        let out = &mut room[begin..][..1_200_000];
        out.fill(9.0);
        view.decode(0, out).unwrap();
        assert_eq!(bits(out), bits(&wanted));
        out.fill(9.0);
        view.dequantise(out).unwrap();
        assert_eq!(bits(out), bits(&wanted));
    }
}

#[test]
fn pieces_that_are_not_there_are_refused() {
    let (bytes, absmax) = ([0x12; 50], [1.0; 2]);
    let block = Block::of(64).unwrap();
    let (scales, table) = (Scales::Plain(&absmax), Type::Nf4.table());
    let view = View::new(&bytes, scales, table, block, 99).unwrap();
    for (from, count) in [(1, 4), (0, 100), (98, 2), (100, 0), (usize::MAX - 1, 4)] {
        let error = view.decode(from, &mut vec![0f32; count]).unwrap_err();
        assert!(matches!(error, Error::Piece { .. }), "{error}");
    }
    assert!(view.decode::<f32>(98, &mut []).is_ok());
    assert!(view.dequantise(&mut [0f32; 98]).is_err());
    assert!(View::new(&bytes, scales, table, block, 101).is_err());
    assert!(View::new(&bytes, scales, table, Block::of(32).unwrap(), 99).is_err());
    let map = Map::signed().values();
    for (codes, absmax) in [(3, 1), (2, 0), (2, 2)] {
        let (codes, absmax) = (vec![0; codes], vec![0.0; absmax]);
        let scales = Scales::Nested {
            codes: &codes,
            absmax: &absmax,
            map,
            offset: 0.0,
        };
        assert!(View::new(&bytes, scales, table, block, 99).is_err());
    }
}

#[test]
fn quantised_by_pieces() {
    let values: Vec<f32> = (0..1003).map(|i| (i as f32 * 0.61).sin()).collect();
    for kind in KINDS {
        for compat in COMPATS {
            let block = Block::of(64).unwrap();
            let whole = quantise(&values, kind, block, compat);
            let (mut bytes, mut absmax) = (vec![0; 502], vec![0.0; 16]);
            for (from, to) in [(0usize, 64usize), (64, 640), (640, 1003)] {
                let bytes = &mut bytes[from / 2..to.div_ceil(2)];
                let absmax = &mut absmax[from / 64..block.count(to)];
                quantise_piece(&values[from..to], kind, block, compat, bytes, absmax).unwrap();
            }
            assert_eq!((bytes, absmax), (whole.bytes, whole.absmax));
            let mut bytes = [0; 32];
            assert!(
                quantise_piece(&values[..64], kind, block, compat, &mut bytes, &mut []).is_err()
            );
        }
    }
}

#[test]
fn every_pattern_of_16_bits_alone() {
    for pattern in 0..=u16::MAX {
        let mut row = [0u16; 64];
        row[usize::from(pattern) % 64] = pattern;
        let brain = row.map(bf16::from_bits);
        let half = row.map(f16::from_bits);
        for kind in KINDS {
            for compat in COMPATS {
                let block = Block::of(64).unwrap();
                let levels = Level::all();
                let of = |level| {
                    let (a, b) = (
                        quantise_at(level, &brain, kind, block, compat),
                        quantise_at(level, &half, kind, block, compat),
                    );
                    (a.bytes, bits(&a.absmax), b.bytes, bits(&b.absmax))
                };
                let scalar = of(Level::Scalar);
                for level in levels {
                    assert!(
                        of(level) == scalar,
                        "{pattern:#06x} {level:?} {kind} {compat:?}"
                    );
                }
            }
        }
    }
}

#[test]
fn around_every_threshold() {
    let mut rows = Vec::new();
    for kind in KINDS {
        let mut table = *kind.table();
        table.sort_by(f32::total_cmp);
        for scale in [1.0f32, 0.5, 3.0, 0.1, 1e-6, 7e8] {
            let mut row = vec![1.0f32];
            for pair in table.windows(2) {
                let middle = (pair[0] + pair[1]) / 2.0;
                row.extend([middle.next_down(), middle, middle.next_up()]);
            }
            row.resize(64, 0.0);
            rows.extend(row.iter().map(|it| it * scale));
        }
    }
    agree(&rows, 64);
}

#[test]
fn every_byte_by_many_scales() {
    let bytes: Vec<u8> = (0..=255).collect();
    let scales = [
        0.0f32,
        1.0,
        -1.0,
        0.1,
        1e-40,
        1e38,
        f32::MAX,
        f32::INFINITY,
        f32::NAN,
        3.3e-3,
    ];
    for kind in KINDS {
        for scale in scales {
            let block = Block::of(64).unwrap();
            let absmax = vec![scale; 8];
            let mut single = vec![vec![0f32; 512]; Level::all().len()];
            let mut brain = vec![vec![bf16::ZERO; 512]; Level::all().len()];
            let mut half = vec![vec![f16::ZERO; 512]; Level::all().len()];
            for (i, level) in Level::all().into_iter().enumerate() {
                dequantise_at(level, &bytes, &absmax, kind, block, &mut single[i]).unwrap();
                dequantise_at(level, &bytes, &absmax, kind, block, &mut brain[i]).unwrap();
                dequantise_at(level, &bytes, &absmax, kind, block, &mut half[i]).unwrap();
                for at in 0..512 {
                    let code = bytes[at / 2] >> (4 * (1 - at % 2)) & 15;
                    let value = kind.table()[usize::from(code)] * scale;
                    let same =
                        |a: f32, b: f32| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
                    assert!(same(single[i][at], value), "{level:?} {kind} {scale}");
                    assert!(same(brain[i][at].to_f32(), bf16::from_f32(value).to_f32()));
                    assert!(same(half[i][at].to_f32(), f16::from_f32(value).to_f32()));
                }
            }
        }
    }
}

#[test]
fn the_two_behaviours_differ_where_they_are_known_to() {
    let block = Block::of(64).unwrap();
    let of = |row: &[f32], compat| quantise(row, Type::Nf4, block, compat);
    let zeros = [0f32; 64];
    assert_eq!(of(&zeros, Compat::Cuda).bytes, [0x00; 32]);
    assert_eq!(of(&zeros, Compat::Cpu).bytes, [0x77; 32]);
    let mut odd = [0.5f32; 64];
    odd[9] = f32::NAN;
    let cuda = of(&odd, Compat::Cuda);
    assert_eq!(
        (cuda.absmax[0], cuda.bytes[0], cuda.bytes[4]),
        (0.5, 0xff, 0xf0)
    );
    let cpu = of(&odd, Compat::Cpu);
    assert!(cpu.absmax[0].is_nan() && cpu.bytes == [0xff; 32]);
    let short = of(&zeros[..20], Compat::Cpu);
    assert_eq!(short.absmax[0], 1e-38);
    assert_eq!(of(&zeros[..20], Compat::Cuda).absmax[0], 0.0);
}

#[test]
fn lengths_that_do_not_fit_are_refused() {
    let block = Block::of(64).unwrap();
    let mut out = [0f32; 65];
    for (bytes, scales) in [(32, 2), (34, 2), (33, 1), (33, 3)] {
        let error = dequantise(
            &vec![0; bytes],
            &vec![0.0; scales],
            Type::Nf4,
            block,
            &mut out,
        );
        assert!(
            matches!(error, Err(Error::Length { .. })),
            "{bytes} {scales}"
        );
    }
    for size in [0, 1, 16, 63, 65, 8192] {
        assert_eq!(Block::of(size), Err(Error::Block(size)));
    }
    assert!(dequantise::<f32>(&[], &[], Type::Nf4, block, &mut []).is_ok());
    let nested = Nested::of(&[], Compat::Cuda);
    assert_eq!(nested.absmax().unwrap(), Vec::<f32>::new());
    let broken = Nested {
        absmax: Vec::new(),
        ..Nested::of(&[1.0; 300], Compat::Cuda)
    };
    assert!(broken.absmax().is_err());
}

#[test]
fn scales_come_back_nearly() {
    let scales: Vec<f32> = (0..1000)
        .map(|i| 0.02 + 0.001 * ((i * 37 % 101) as f32))
        .collect();
    for compat in COMPATS {
        let nested = Nested::of(&scales, compat);
        let again = nested.absmax().unwrap();
        assert!(
            scales
                .iter()
                .zip(&again)
                .all(|(a, b)| (a - b).abs() < 0.05 * 0.12)
        );
    }
}
