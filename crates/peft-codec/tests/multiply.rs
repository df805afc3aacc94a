//! Products of few rows with a matrix in 4 bits against the same in f64.

use half::{bf16, f16};
use peft_codec::*;
use proptest::prelude::*;

/// A matrix, its codes and scales at hand, with the values of the codes as given.
struct Matrix {
    bytes: Vec<u8>,
    absmax: Vec<f32>,
    table: [f32; 16],
    block: Block,
    rows: usize,
    inp: usize,
}

impl Matrix {
    fn view(&self) -> View<'_> {
        let scales = Scales::Plain(&self.absmax);
        let n = self.rows * self.inp;
        View::new(&self.bytes, scales, &self.table, self.block, n).unwrap()
    }

    /// Code and scale of a number.
    fn at(&self, row: usize, k: usize) -> (usize, f64) {
        let at = row * self.inp + k;
        let code = self.bytes[at / 2] >> (4 * (1 - at % 2)) & 15;
        (code.into(), self.absmax[at / self.block.size()].into())
    }

    /// Products in f64, and the sum of the magnitudes of their terms.
    fn products<T: Element>(&self, x: &[T], m: usize, brain: bool) -> Vec<(f64, f64)> {
        let table = self.table.map(|it| match brain {
            true => bf16::from_f32(it).to_f64(),
            false => it.into(),
        });
        let mut all = Vec::new();
        for x in (0..m).map(|r| &x[r * self.inp..][..self.inp]) {
            for row in 0..self.rows {
                let terms = x.iter().enumerate().map(|(k, x)| {
                    let (code, scale) = self.at(row, k);
                    table[code] * scale * f64::from(x.wide())
                });
                let of = |(sum, size), term: f64| (sum + term, size + term.abs());
                all.push(terms.fold((0.0, 0.0), of));
            }
        }
        all
    }
}

/// Numbers in turn, from a generator of one line.
fn turns(seed: u32) -> impl FnMut(u32) -> u32 {
    let mut state = seed | 1;
    move |below| {
        state = state.wrapping_mul(747_796_405).wrapping_add(2_891_336_453);
        ((state >> 9) ^ (state >> 21)) % below
    }
}

fn matrix(seed: u32, table: [f32; 16], rows: usize, inp: usize, block: usize) -> Matrix {
    let mut next = turns(seed);
    let block = Block::of(block).unwrap();
    let n = rows * inp;
    Matrix {
        bytes: (0..n.div_ceil(2)).map(|_| next(256) as u8).collect(),
        absmax: (0..block.count(n))
            .map(|_| [0.25, 0.5, 1.0, 2.0][next(4) as usize])
            .collect(),
        table,
        block,
        rows,
        inp,
    }
}

const SHAPES: [(usize, usize); 22] = [
    (3, 32),
    (5, 64),
    (4, 96),
    (1, 128),
    (7, 160),
    (2, 192),
    (5, 224),
    (3, 256),
    (6, 320),
    (3, 576),
    (2, 1024),
    (3, 4096),
    (5, 1),
    (4, 3),
    (9, 7),
    (3, 33),
    (8, 50),
    (3, 100),
    (2, 1000),
    (0, 64),
    (4, 0),
    (1, 12288),
];

/// At every level, for all of the rows and for some.
fn everywhere<T: Element>(it: &Matrix, x: &[T], m: usize, check: impl Fn(f32, (f64, f64), &str)) {
    let brain = std::any::type_name::<T>().ends_with("bf16");
    let wanted = it.products(x, m, brain);
    for arranged in Level::all() {
        let activations = Activations::new_at(arranged, x, m, it.inp);
        for level in Level::all() {
            for rows in [0..it.rows, it.rows / 3..it.rows, it.rows / 2..it.rows / 2] {
                let mut out = vec![f32::NAN; m * rows.len()];
                it.view()
                    .at(level)
                    .multiply(&activations, rows.clone(), &mut out)
                    .unwrap();
                for r in 0..m {
                    for (i, row) in rows.clone().enumerate() {
                        let what = format!(
                            "{level:?} of {arranged:?}, [{}, {}] in {:?}, x {r} of {m}, row {row}",
                            it.rows, it.inp, it.block
                        );
                        check(out[r * rows.len() + i], wanted[r * it.rows + row], &what);
                    }
                }
            }
        }
    }
}

#[test]
fn whole_numbers_are_multiplied_exactly() {
    let table = std::array::from_fn(|i| [-8.0, 7.0, 3.0, -5.0][i % 4] + (i / 4) as f32);
    let mut cases = 0;
    for (rows, inp) in SHAPES {
        for block in [32, 64, 128, 256, 1024, 4096] {
            for m in [1, 2, 3, 5, 8, 15] {
                cases += 1;
                let it = matrix(cases, table, rows, inp, block);
                let mut next = turns(cases + 7);
                let x: Vec<f32> = (0..m * inp).map(|_| next(9) as f32 - 4.0).collect();
                // Sums stay below 11 · 2 · 4 · 12288 < 2^23 in steps of a quarter: some round.
                let exact = |got: f32, (sum, size): (f64, f64), what: &str| {
                    assert!(size < f64::from(1 << 22), "{what}");
                    assert_eq!(f64::from(got), sum, "{what}");
                };
                everywhere(&it, &x, m, exact);
                let brain: Vec<_> = x.iter().map(|it| bf16::from_f32(*it)).collect();
                everywhere(&it, &brain, m, exact);
                if m < 3 {
                    let half: Vec<_> = x.iter().map(|it| f16::from_f32(*it)).collect();
                    everywhere(&it, &half, m, exact);
                }
            }
        }
    }
}

/// Any order of summation that a form uses has a term rounded no more often than this: the scaled value and the product; a
/// sum for each 16 numbers of a row; the sums of up to 16 lanes.
fn roundings(inp: usize) -> f64 {
    (2 + inp.div_ceil(16) + 16) as f64
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    #[test]
    fn products_are_within_their_roundings(
        seed in any::<u32>(),
        shape in prop::sample::select(SHAPES.to_vec()),
        block in prop::sample::select(vec![32usize, 64, 128, 512]),
        m in 1usize..12,
        kind in prop::sample::select(vec![Type::Nf4, Type::Fp4]),
    ) {
        let (rows, inp) = shape;
        let mut it = matrix(seed, *kind.table(), rows, inp, block);
        let mut next = turns(seed ^ 0x5555);
        it.absmax.iter_mut().for_each(|it| *it *= 1.0 + next(1000) as f32 / 1000.0);
        let x: Vec<f32> = (0..m * inp).map(|_| (next(100_000) as f32 - 5e4) / 3e4).collect();
        // (1 + u)^n - 1 < 1.01 n u; f64 adds 2^-53 for each term.
        let close = |got: f32, (sum, size): (f64, f64), what: &str| {
            let bound = 1.01 * roundings(inp) * 2f64.powi(-24) * size + inp as f64 * 2f64.powi(-52) * size;
            assert!((f64::from(got) - sum).abs() <= bound, "{what}: {got}, not {sum}, off by more than {bound:e}");
        };
        everywhere(&it, &x, m, close);
        let brain: Vec<_> = x.iter().map(|it| bf16::from_f32(*it)).collect();
        everywhere(&it, &brain, m, close);
    }
}

#[test]
fn nested_scales_multiply_as_if_they_were_plain() {
    let values: Vec<f32> = (0..40 * 576)
        .map(|i| (i as f32 * 0.37).sin() * (i % 91) as f32)
        .collect();
    let block = Block::of(64).unwrap();
    let packed = quantise(&values, Type::Nf4, block, Compat::Cuda);
    let nested = Nested::of(&packed.absmax, Compat::Cuda);
    let absmax = nested.absmax().unwrap();
    let x: Vec<bf16> = (0..3 * 576)
        .map(|i| bf16::from_f32((i as f32 * 0.7).cos()))
        .collect();
    for level in Level::all() {
        let of = |scales| {
            let view = View::new(
                &packed.bytes,
                scales,
                Type::Nf4.table(),
                block,
                values.len(),
            );
            let x = Activations::new_at(level, &x, 3, 576);
            let mut out = vec![0.0; 3 * 31];
            view.unwrap()
                .at(level)
                .multiply(&x, 9..40, &mut out)
                .unwrap();
            out
        };
        assert_eq!(
            of(Scales::from(&nested)),
            of(Scales::Plain(&absmax)),
            "{level:?}"
        );
    }
}

/// Lanes beyond the end of a row have the scale of the next.
#[test]
fn an_infinite_row_stays_alone() {
    let mut it = matrix(3, *Type::Nf4.table(), 3, 96, 32);
    it.absmax[3] = f32::INFINITY;
    it.absmax[4] = f32::NAN;
    for x in [vec![1f32; 96], vec![0f32; 96]] {
        let wanted = it.products(&x, 1, false);
        for level in Level::all() {
            let mut out = [0.0; 3];
            let x = Activations::new_at(level, &x, 1, 96);
            it.view().at(level).multiply(&x, 0..3, &mut out).unwrap();
            for row in [0, 2] {
                assert!(
                    (f64::from(out[row]) - wanted[row].0).abs() < 1e-4,
                    "{level:?}"
                );
            }
            assert!(out[1].is_nan());
        }
    }
}

#[test]
fn products_that_do_not_fit_are_refused() {
    let it = matrix(5, *Type::Nf4.table(), 4, 64, 64);
    let x = Activations::new(&[1f32; 128], 2, 64);
    assert_eq!((x.rows(), x.width()), (2, 64));
    let mut out = [0.0; 8];
    assert!(it.view().multiply(&x, 0..4, &mut out).is_ok());
    for (rows, n) in [(0..4, 7), (0..3, 8), (1..5, 8), (4..5, 2)] {
        assert!(
            it.view().multiply(&x, rows.clone(), &mut out[..n]).is_err(),
            "{rows:?}"
        );
    }
    let huge = usize::MAX - 1..usize::MAX;
    assert!(it.view().multiply(&x, huge, &mut out[..2]).is_err());
}
