//! How long the codec takes, beside what memory allows: `cargo run --release -p peft-codec --example speed`.
//!
//! Each line gives the best of many runs, the bytes that have to move, and the floor: these bytes at the measured rate of
//! reading, or of copying past the caches, with as many threads. Buffers are kept, aligned and warm. Words after `speed` choose
//! the lines that contain one of them.

#[cfg(target_arch = "x86_64")]
mod simd;

use std::{hint::black_box, time::Instant};

use half::bf16;
use peft_codec::*;
use rayon::prelude::*;

/// Numbers that begin at a multiple of 64 bytes.
struct Kept<T>(Vec<T>, usize);

impl<T: Copy + Default> Kept<T> {
    fn new(n: usize) -> Kept<T> {
        let all = vec![T::default(); n + 64];
        let begin = (0..64).find(|i| all[*i..].as_ptr().addr().is_multiple_of(64));
        Kept(all, begin.unwrap_or(0))
    }

    fn all(&mut self) -> &mut [T] {
        let end = self.0.len() - 64 + self.1;
        &mut self.0[self.1..end]
    }
}

/// Seconds of the fastest run, of at least three, for half a second.
fn best(mut run: impl FnMut()) -> f64 {
    run();
    let (begin, mut best, mut count) = (Instant::now(), f64::MAX, 0);
    while count < 3 || begin.elapsed().as_secs_f64() < 0.5 {
        let now = Instant::now();
        run();
        best = best.min(now.elapsed().as_secs_f64());
        count += 1;
    }
    best
}

/// The same numbers each time, nearly normal.
fn numbers(out: &mut [f32], scale: f32) {
    let mut state = 1u64;
    let mut next = move || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    out.iter_mut()
        .for_each(|it| *it = (next() + next() + next() + next()) * 1.7 * scale);
}

/// Bytes a second.
struct Rates {
    read: f64,
    copy: f64,
    past: f64,
}

struct Table {
    threads: usize,
    rates: Rates,
    chosen: Vec<String>,
}

impl Table {
    fn line(&self, what: &str, read: usize, write: usize, run: impl FnMut()) {
        if !self.chosen.is_empty() && !self.chosen.iter().any(|it| what.contains(it.as_str())) {
            return;
        }
        let floor = match write {
            0 => read as f64 / self.rates.read,
            _ => (read + write) as f64 / self.rates.past.max(self.rates.copy),
        };
        let took = best(run);
        println!(
            "{:28} {} thread(s) {:8.3} ms, floor {:7.3} ms, {:5.2} x, {:5.1} GB/s",
            what,
            self.threads,
            took * 1e3,
            floor * 1e3,
            took / floor,
            (read + write) as f64 / took / 1e9
        );
    }
}

const MIB: usize = 1 << 20;

fn rates() -> Rates {
    let (mut from, mut to) = (Kept::<u8>::new(32 * MIB), Kept::<u8>::new(32 * MIB));
    from.all().fill(1);
    to.all().fill(2);
    let n = from.all().len();
    let part = n / rayon::current_num_threads() / 64 * 64;
    let read = best(|| {
        let parts = from.all().par_chunks(part);
        black_box(parts.map(memory::read).reduce(|| 0, u64::wrapping_add));
    });
    let pairs = |from: &mut Kept<u8>, to: &mut Kept<u8>, copy: fn(&[u8], &mut [u8])| {
        let pairs = to
            .all()
            .par_chunks_mut(part)
            .zip(from.all().par_chunks(part));
        pairs.for_each(|(to, from)| copy(from, to));
    };
    let copy = best(|| pairs(&mut from, &mut to, memory::copy));
    let past = best(|| pairs(&mut from, &mut to, memory::copy_past));
    Rates {
        read: n as f64 / read,
        copy: 2.0 * n as f64 / copy,
        past: 2.0 * n as f64 / past,
    }
}

mod memory {
    //! Reading and copying as fast as it goes.

    #[cfg(target_arch = "x86_64")]
    pub(crate) use super::simd::{copy, copy_past, read};

    #[cfg(not(target_arch = "x86_64"))]
    pub(crate) fn read(from: &[u8]) -> u64 {
        let words = from
            .chunks_exact(8)
            .map(|it| it.iter().fold(0u64, |a, b| a << 8 | u64::from(*b)));
        words.fold(0, u64::wrapping_add)
    }

    #[cfg(not(target_arch = "x86_64"))]
    pub(crate) fn copy(from: &[u8], to: &mut [u8]) {
        to.copy_from_slice(from);
    }

    #[cfg(not(target_arch = "x86_64"))]
    pub(crate) use copy as copy_past;
}

fn formats(table: &Table) -> Result<()> {
    let block = Block::of(64)?;
    for (rows, inp) in [(4096, 4096), (11008, 4096)] {
        let n = rows * inp;
        let mut values = Kept::<f32>::new(n);
        numbers(values.all(), 0.02);
        let packed = quantise(values.all(), Type::Nf4, block, Compat::Cuda);
        let nested = Nested::of(&packed.absmax, Compat::Cuda);
        if rows == 4096 {
            let (mut bytes, mut absmax) = (Kept::<u8>::new(n / 2), Kept::<f32>::new(n / 64));
            table.line("quantise 4096x4096 fp32", 4 * n, n / 2 + n / 16, || {
                let pieces = values.all().par_chunks(1 << 16);
                let pieces = pieces.zip(bytes.all().par_chunks_mut(1 << 15));
                let pieces = pieces.zip(absmax.all().par_chunks_mut(1 << 10));
                pieces.for_each(|((values, bytes), absmax)| {
                    let kind = Type::Nf4;
                    quantise_piece(values, kind, block, Compat::Cuda, bytes, absmax)
                        .expect("pieces of one length");
                });
            });
        }
        let (mut single, mut brain) = (Kept::<f32>::new(n), Kept::<bf16>::new(n));
        for (name, scales, a_block) in [
            ("plain", Scales::Plain(&packed.absmax), 4),
            ("nested", Scales::from(&nested), 1),
        ] {
            let view = View::new(&packed.bytes, scales, Type::Nf4.table(), block, n)?;
            let read = n / 2 + n / 64 * a_block;
            let what = |to: &str| format!("{to} {rows}x{inp} {name}");
            table.line(&what("dequantise bf16"), read, 2 * n, || {
                view.dequantise(brain.all()).expect("one length");
            });
            table.line(&what("dequantise fp32"), read, 4 * n, || {
                view.dequantise(single.all()).expect("one length");
            });
            if rows > 4096 {
                continue;
            }
            for m in [1, 4, 8, 16] {
                let x = &mut single.all()[..m * inp];
                numbers(x, 1.0);
                let brain: Vec<_> = x.iter().map(|it| bf16::from_f32(*it)).collect();
                product(
                    table,
                    &what(&format!("product m={m} bf16")),
                    view,
                    &brain,
                    m,
                    read,
                );
                product(
                    table,
                    &what(&format!("product m={m} fp32")),
                    view,
                    x,
                    m,
                    read,
                );
            }
        }
    }
    Ok(())
}

fn product<T: Element>(table: &Table, what: &str, view: View<'_>, x: &[T], m: usize, read: usize) {
    let inp = x.len() / m;
    let rows = 4096;
    let mut out = vec![0f32; m * rows];
    let part = rows / table.threads;
    table.line(what, read, 0, || {
        let x = Activations::new(x, m, inp); // its time belongs to a product
        let parts = out.par_chunks_mut(m * part).enumerate();
        parts.for_each(|(i, out)| {
            view.multiply(&x, i * part..(i + 1) * part, out)
                .expect("rows that are there");
        });
    });
}

fn adamw(table: &Table) {
    let n = 4096 * 4096;
    let with = AdamW8 {
        lr: 1e-4,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay: 0.01,
    };
    let (mut params, mut grads) = (Kept::<f32>::new(n), Kept::<f32>::new(n));
    numbers(params.all(), 0.02);
    numbers(grads.all(), 1e-3);
    let (mut codes1, mut codes2) = (Kept::<u8>::new(n), Kept::<u8>::new(n));
    let (mut absmax1, mut absmax2) = (vec![0f32; n / STATE_BLOCK], vec![0f32; n / STATE_BLOCK]);
    let mut t = 0;
    table.line("AdamW8 16.8M fp32", 10 * n, 6 * n, || {
        t += 1;
        let (c1, c2) = (codes1.all(), codes2.all());
        let (a1, a2) = (&mut absmax1, &mut absmax2);
        let (params, grads) = (params.all(), grads.all());
        with.step_all(t, params, grads, c1, c2, a1, a2, Compat::Cuda, 1.0)
            .expect("one length");
    });
}

fn main() -> Result<()> {
    println!("{:?}", Level::all());
    for threads in [1, 2] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        pool.expect("threads").install(|| {
            let table = Table {
                threads,
                rates: rates(),
                chosen: std::env::args().skip(1).collect(),
            };
            let Rates { read, copy, past } = table.rates;
            println!(
                "\n{threads} thread(s): read {:.1} GB/s, copy {:.1}, past the caches {:.1} (both ways counted)",
                read / 1e9,
                copy / 1e9,
                past / 1e9
            );
            adamw(&table);
            formats(&table)
        })?;
    }
    Ok(())
}
