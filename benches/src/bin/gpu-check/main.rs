//! Every kernel for CUDA on a GPU: its bits beside those of `peft-codec`, its time beside that of a copy.
//!
//! Wants this program, libtorch with its CUDA half, and a driver; ends with 1 if a result differs, or without a GPU. Results must be
//! equal to the bit, but for products, whose sums have an order of their own: those are compared with sums in fp64. Every buffer lies
//! between bytes that must not change. Layers in 4 bits and the optimiser are compared besides, as a run uses them. Times are medians of 50 runs by the device's clock, over several weights in turn, so that
//! none is in a cache; "of copy" is bytes read and written a second over those of a copy on the device in the same minute.

mod layers;

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use benches::ffi;
use half::{bf16, f16};
use peft_codec::{Block, Compat, Element, Map, Nested, Scales as Known, Type, View};
use peft_cuda::{
    Memory, Number, Scales, Stream, Weight,
    adamw::{self, Betas, Moments, Rate},
    nest, quantise,
};
use tch::{Device, Kind, Tensor};

fn main() -> ExitCode {
    let stream = match start() {
        Ok(stream) => stream,
        Err(error) => {
            eprintln!("The kernels cannot be checked here: {error:#}.");
            return ExitCode::FAILURE;
        }
    };
    let mut table = Table::default();
    let done = checks(&stream, &mut table).and_then(|()| times(&stream, &mut table));
    table.print();
    match (done, table.failed) {
        (Ok(()), 0) => ExitCode::SUCCESS,
        (Ok(()), failed) => {
            eprintln!("{failed} checks failed");
            ExitCode::FAILURE
        }
        (Err(error), _) => {
            eprintln!("Ended early: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Loads CUDA as the program does and compiles all kernels.
fn start() -> Result<Stream> {
    peft_torch::cuda::load()?;
    let device = Tensor::zeros([1], (Kind::Float, Device::Cuda(0))); // libtorch's context
    let begin = Instant::now();
    peft_cuda::prepare(0)?;
    println!("kernels ready in {:.1?}", begin.elapsed());
    drop(device);
    Ok(Stream::current(0)?)
}

/// What is printed: checks, then times.
#[derive(Default)]
struct Table {
    checks: Vec<(String, usize, Option<String>)>,
    times: Vec<(String, Duration, f64)>,
    copy: f64, // bytes a second
    failed: usize,
}

impl Table {
    /// Adds a case of a check.
    fn case(&mut self, name: &str, result: Result<()>) {
        let at = match self.checks.iter().position(|it| it.0 == name) {
            Some(at) => at,
            None => {
                self.checks.push((name.to_owned(), 0, None));
                self.checks.len() - 1
            }
        };
        let check = &mut self.checks[at];
        check.1 += 1;
        if let Err(error) = result {
            self.failed += 1;
            check.2.get_or_insert(format!("{error:#}"));
        }
    }

    fn print(&self) {
        println!("\n{:<44} {:>7}  result", "check", "cases");
        for (name, cases, failure) in &self.checks {
            let result = failure.as_deref().unwrap_or("equal");
            println!("{name:<44} {cases:>7}  {result}");
        }
        println!(
            "\n{:<44} {:>9} {:>9} {:>8}",
            "kernel", "us", "GB/s", "of copy"
        );
        for (name, time, bytes) in &self.times {
            let rate = bytes / time.as_secs_f64();
            let (us, share) = (time.as_secs_f64() * 1e6, rate / self.copy * 100.0);
            println!("{name:<44} {us:>9.2} {:>9.0} {share:>7.0}%", rate / 1e9);
        }
    }
}

// --- memory ----------------------------------------------------------------------------------------------------------

const MARK: u8 = 0xa5;
const MARGIN: usize = 64;

/// Bytes on the GPU that begin `off` a multiple of 16, between others that must not change.
struct Buffer {
    tensor: Tensor,
    begin: usize,
    len: usize,
}

impl Buffer {
    fn of<T: Plain>(values: &[T], off: usize) -> Buffer {
        let mut bytes = Vec::with_capacity(size_of_val(values));
        values.iter().for_each(|it| it.put(&mut bytes));
        let mut all = vec![MARK; bytes.len() + 2 * MARGIN + off];
        all[MARGIN + off..][..bytes.len()].copy_from_slice(&bytes);
        Buffer {
            tensor: Tensor::from_slice(&all).to_device(Device::Cuda(0)),
            begin: MARGIN + off, // libtorch's allocator gives multiples of 512
            len: bytes.len(),
        }
    }

    fn new(len: usize, off: usize) -> Buffer {
        Buffer::of(&vec![MARK; len], off)
    }

    fn memory(&self) -> Memory<'_> {
        ffi::memory(&self.tensor, self.begin, self.len)
    }

    fn read<T: Plain>(&self) -> Result<Vec<T>> {
        let all = Vec::<u8>::try_from(self.tensor.to_device(Device::Cpu))?;
        let (before, rest) = all.split_at(self.begin);
        let (bytes, after) = rest.split_at(self.len);
        ensure!(
            before.iter().chain(after).all(|it| *it == MARK),
            "wrote beyond the end"
        );
        Ok(bytes.chunks_exact(T::SIZE).map(T::of_bytes).collect())
    }
}

/// What a buffer holds.
trait Plain: Copy + Default {
    const SIZE: usize;
    fn put(self, to: &mut Vec<u8>);
    fn of_bytes(bytes: &[u8]) -> Self;
}

macro_rules! plain {
    ($($type:ty),*) => {$(
        impl Plain for $type {
            const SIZE: usize = size_of::<$type>();
            fn put(self, to: &mut Vec<u8>) {
                to.extend_from_slice(&self.to_ne_bytes());
            }
            fn of_bytes(bytes: &[u8]) -> $type {
                <$type>::from_ne_bytes(bytes.try_into().expect("as many bytes as it has"))
            }
        }
    )*};
}
plain!(u8, f32, bf16, f16);

trait Format: Plain + Element {
    const NUMBER: Number;
    const NAME: &'static str;
    /// Half the distance of neighbours over the smaller of them, at most.
    const ULP: f64;
}
impl Format for f32 {
    const NUMBER: Number = Number::F32;
    const NAME: &'static str = "fp32";
    const ULP: f64 = 0.0;
}
impl Format for bf16 {
    const NUMBER: Number = Number::Bf16;
    const NAME: &'static str = "bf16";
    const ULP: f64 = 1.0 / 256.0;
}
impl Format for f16 {
    const NUMBER: Number = Number::F16;
    const NAME: &'static str = "fp16";
    const ULP: f64 = 1.0 / 2048.0;
}

/// Equal to the bit, all that are no numbers being one.
fn same<T: Element>(what: &str, ours: &[T], wanted: &[T]) -> Result<()> {
    ensure!(ours.len() == wanted.len(), "{what}: {} numbers", ours.len());
    for (i, (a, b)) in ours.iter().zip(wanted).enumerate() {
        let (a, b) = (a.wide(), b.wide());
        let equal = a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
        ensure!(
            equal,
            "{what}, {i} of {}: {a:e}, expected {b:e}",
            ours.len()
        );
    }
    Ok(())
}

fn same_codes(what: &str, ours: &[u8], wanted: &[u8]) -> Result<()> {
    let differ = ours.iter().zip(wanted).position(|(a, b)| a != b);
    match differ {
        Some(i) => anyhow::bail!(
            "{what}, byte {i}: {:#04x}, expected {:#04x}",
            ours[i],
            wanted[i]
        ),
        None => Ok(()),
    }
}

/// Numbers of a seed (SplitMix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Between -1 and 1.
    fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    /// Mostly ordinary numbers.
    fn any(&mut self) -> f32 {
        match self.next() % 40 {
            0 => 0.0,
            1 => -0.0,
            2 => f32::from_bits(self.next() as u32),
            3 => self.unit() * 1e-39,
            4 => self.unit() * 1e5,
            _ => self.unit() * 3.0,
        }
    }

    fn bytes(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| self.next() as u8).collect()
    }

    /// Scales of every size, and some that spoil their block.
    fn scales(&mut self, n: usize) -> Vec<f32> {
        let scale = |random: &mut Random| match random.next() % 12 {
            0 => f32::from_bits(random.next() as u32 & 0x7fff_ffff),
            1 => random.unit().abs() * 1e-39,
            2 => random.unit().abs() * 6e4, // around the largest of fp16
            _ => random.unit().abs(),
        };
        (0..n).map(|_| scale(self)).collect()
    }
}

// --- checks ----------------------------------------------------------------------------------------------------------

const LENGTHS: [usize; 9] = [1, 2, 7, 64, 65, 1027, 20_005, 1 << 20, (1 << 22) + 3];
const BLOCKS: [usize; 4] = [32, 64, 512, 4096];

fn checks(stream: &Stream, table: &mut Table) -> Result<()> {
    checks_of::<f32>(stream, table)?;
    checks_of::<bf16>(stream, table)?;
    checks_of::<f16>(stream, table)?;
    let mut random = Random(3);
    for n in [1, 255, 256, 257, 5000, 700_000] {
        for strange in [false, true] {
            let scales: Vec<f32> = match strange {
                true => (0..n).map(|_| random.any()).collect(),
                false => random.scales(n).iter().map(|it| it.min(1.0)).collect(),
            };
            table.case("nest", nests(stream, &scales));
        }
    }
    layers::checks(Device::Cuda(stream.device() as usize), table);
    Ok(())
}

fn checks_of<T: Format>(stream: &Stream, table: &mut Table) -> Result<()> {
    let mut random = Random(1);
    for len in LENGTHS {
        for block in BLOCKS {
            let block = Block::of(block)?;
            for kind in [Type::Nf4, Type::Fp4] {
                for off in [0, T::SIZE] {
                    let name = format!("dequantise {}, plain and nested", T::NAME);
                    table.case(
                        &name,
                        decodes::<T>(&mut random, stream, len, kind, block, off),
                    );
                }
                let name = format!("quantise {}", T::NAME);
                table.case(&name, encodes::<T>(&mut random, stream, len, kind, block));
            }
        }
    }
    for rows in 1..=8 {
        for (inp, out, block) in [
            (64, 9, 64),
            (80, 5, 64),
            (33, 7, 32),
            (1, 3, 32),
            (2056, 130, 256),
            (4096, 300, 64),
            (77, 40, 4096),
        ] {
            let shape = (rows, inp, out);
            let name = format!("multiply {}, 1 to 8 rows", T::NAME);
            table.case(
                &name,
                multiplies::<T>(&mut random, stream, shape, Block::of(block)?),
            );
        }
    }
    for lens in [
        &[1usize][..],
        &[256, 0, 257, 1000, 5000, 255],
        &[1 << 20, 300, 20_000],
    ] {
        let name = format!("adamw {}, 5 steps", T::NAME);
        table.case(&name, steps::<T>(&mut random, stream, lens));
    }
    Ok(())
}

/// A tensor's scales on the GPU, and those of its scales.
struct Kept {
    absmax: Buffer,
    own: [Buffer; 3],
    offset: f32,
}

impl Kept {
    fn of(absmax: &[f32], nested: &Nested) -> Kept {
        let own = [
            Buffer::of(&nested.codes, 1),
            Buffer::of(&nested.absmax, 4),
            Buffer::of(nested.map.values(), 4),
        ];
        Kept {
            absmax: Buffer::of(absmax, 4),
            own,
            offset: nested.offset,
        }
    }

    fn plain(&self) -> Scales<'_> {
        Scales::Plain(self.absmax.memory())
    }

    fn nested(&self) -> Scales<'_> {
        let [codes, absmax, map] = self.own.each_ref().map(Buffer::memory);
        Scales::Nested {
            codes,
            absmax,
            map,
            offset: self.offset,
        }
    }
}

fn decodes<T: Format>(
    random: &mut Random,
    stream: &Stream,
    len: usize,
    kind: Type,
    block: Block,
    off: usize,
) -> Result<()> {
    let (codes, absmax) = (
        random.bytes(len.div_ceil(2)),
        random.scales(block.count(len)),
    );
    let own = Nested {
        codes: random.bytes(absmax.len()),
        absmax: random.scales(absmax.len().div_ceil(256)),
        offset: random.unit(),
        map: Map::signed().clone(),
    };
    let (codes_, kept) = (Buffer::of(&codes, off), Kept::of(&absmax, &own));
    for (known, given) in [
        (Known::Plain(&absmax), kept.plain()),
        (Known::from(&own), kept.nested()),
    ] {
        let mut wanted = vec![T::default(); len];
        View::new(&codes, known, kind.table(), block, len)?.dequantise(&mut wanted)?;
        let out = Buffer::new(len * T::SIZE, off);
        Weight::new(codes_.memory(), given, *kind.table(), block, len)?.dequantise(
            out.memory(),
            T::NUMBER,
            stream,
        )?;
        same(
            &format!("{kind} of {len} by {}", block.size()),
            &out.read::<T>()?,
            &wanted,
        )?;
    }
    Ok(())
}

fn encodes<T: Format>(
    random: &mut Random,
    stream: &Stream,
    len: usize,
    kind: Type,
    block: Block,
) -> Result<()> {
    let mut values: Vec<T> = (0..len).map(|_| T::round(random.any())).collect();
    values[..len.min(block.size())].fill(T::round(0.0));
    let wanted = peft_codec::quantise(&values, kind, block, Compat::Cuda);
    let from = Buffer::of(&values, 0);
    let (codes, absmax) = (
        Buffer::new(wanted.bytes.len(), 0),
        Buffer::new(wanted.absmax.len() * 4, 0),
    );
    quantise(
        from.memory(),
        T::NUMBER,
        len,
        kind,
        block,
        (codes.memory(), absmax.memory()),
        stream,
    )?;
    let what = format!("{kind} of {len} by {}", block.size());
    same(&what, &absmax.read::<f32>()?, &wanted.absmax)?;
    same_codes(&what, &codes.read::<u8>()?, &wanted.bytes)
}

fn nests(stream: &Stream, scales: &[f32]) -> Result<()> {
    let (n, mean) = (scales.len(), 0.3);
    let wanted = Nested::around(scales, mean, Compat::Cuda);
    let (from, map) = (Buffer::of(scales, 4), Buffer::of(Map::signed().values(), 4));
    let (codes, absmax) = (Buffer::new(n, 1), Buffer::new(wanted.absmax.len() * 4, 4));
    nest(
        from.memory(),
        n,
        mean,
        map.memory(),
        (codes.memory(), absmax.memory()),
        stream,
    )?;
    same("scales of scales", &absmax.read::<f32>()?, &wanted.absmax)?;
    same_codes(&format!("{n} scales"), &codes.read::<u8>()?, &wanted.codes)
}

fn multiplies<T: Format>(
    random: &mut Random,
    stream: &Stream,
    (rows, inp, out): (usize, usize, usize),
    block: Block,
) -> Result<()> {
    let dense: Vec<f32> = (0..inp * out).map(|_| random.unit()).collect();
    let x: Vec<T> = (0..rows * inp).map(|_| T::round(random.unit())).collect();
    let packed = peft_codec::quantise(&dense, Type::Nf4, block, Compat::Cuda);
    let own = Nested::of(&packed.absmax, Compat::Cuda);
    let (x_, codes, kept) = (
        Buffer::of(&x, 0),
        Buffer::of(&packed.bytes, 0),
        Kept::of(&packed.absmax, &own),
    );
    let table = Type::Nf4.table();
    for (known, given) in [
        (Known::Plain(&packed.absmax), kept.plain()),
        (Known::from(&own), kept.nested()),
    ] {
        let mut w = vec![0f32; inp * out];
        View::new(&packed.bytes, known, table, block, w.len())?.dequantise(&mut w)?;
        let y = Buffer::new(rows * out * T::SIZE, 0);
        let weight = Weight::new(codes.memory(), given, *table, block, w.len())?;
        weight.multiply(x_.memory(), rows, inp, y.memory(), T::NUMBER, stream)?;
        for (at, y) in y.read::<T>()?.iter().enumerate() {
            let (x, w) = (&x[at / out * inp..][..inp], &w[at % out * inp..][..inp]);
            let products = x
                .iter()
                .zip(w)
                .map(|(x, w)| f64::from(x.wide()) * f64::from(*w));
            let (sum, size) =
                products.fold((0.0, 0.0), |(sum, size), it| (sum + it, size + it.abs()));
            let allowed = sum.abs() * T::ULP * 1.01 + size * 1e-6 + 1e-7;
            let far = (f64::from(y.wide()) - sum).abs();
            ensure!(
                far <= allowed,
                "[{rows}, {inp}] x [{inp}, {out}], {at}: {} from {sum}",
                y.wide()
            );
        }
    }
    Ok(())
}

/// A tensor and its moments on the GPU.
struct Held([Buffer; 6]);

impl Held {
    fn of<T: Format>(parameter: &[T], gradient: &[T], moments: &Moments) -> Held {
        Held([
            Buffer::of(parameter, 0),
            Buffer::of(gradient, 0),
            Buffer::of(&moments.first, 0),
            Buffer::of(&moments.second, 0),
            Buffer::of(&moments.first_absmax, 0),
            Buffer::of(&moments.second_absmax, 0),
        ])
    }

    fn tensor(&self, len: usize, rate: Rate) -> adamw::Tensor<'_> {
        let [
            parameter,
            gradient,
            first,
            second,
            first_absmax,
            second_absmax,
        ] = self.0.each_ref().map(Buffer::memory);
        adamw::Tensor {
            parameter,
            gradient,
            first,
            second,
            first_absmax,
            second_absmax,
            len,
            rate,
        }
    }
}

fn steps<T: Format>(random: &mut Random, stream: &Stream, lens: &[usize]) -> Result<()> {
    let betas = Betas(0.9, 0.95);
    let maps = (
        Buffer::of(Map::signed().values(), 0),
        Buffer::of(Map::unsigned().values(), 0),
    );
    let numbers = |random: &mut Random, n: usize| -> Vec<T> {
        (0..n).map(|_| T::round(random.unit().powi(3))).collect()
    };
    let mut parameters: Vec<Vec<T>> = lens.iter().map(|n| numbers(random, *n)).collect();
    let mut moments: Vec<Moments> = lens.iter().map(|n| Moments::new(*n)).collect();
    let room = Buffer::new(lens.len() * adamw::ROOM, 0);
    for t in 1..=5 {
        let rate = Rate::of(t, 1e-2, 1e-8, 0.1, betas);
        let mut gradients: Vec<Vec<T>> = lens.iter().map(|n| numbers(random, *n)).collect();
        for gradient in gradients.iter_mut().filter(|it| it.len() > 300) {
            gradient[..256].fill(T::round(0.0));
            gradient[270] = T::round(f32::NAN);
            gradient[280] = T::round(f32::INFINITY);
        }
        let parts = || parameters.iter().zip(&gradients).zip(&moments);
        let held: Vec<Held> = parts().map(|((p, g), m)| Held::of(p, g, m)).collect();
        let tensors: Vec<_> = held
            .iter()
            .zip(lens)
            .map(|(it, len)| it.tensor(*len, rate))
            .collect();
        adamw::step(
            &tensors,
            T::NUMBER,
            betas,
            (maps.0.memory(), maps.1.memory()),
            room.memory(),
            stream,
        )?;
        for (i, Held([p, _, first, second, a1, a2])) in held.iter().enumerate() {
            adamw::step_scalar(
                &mut parameters[i],
                &gradients[i],
                &mut moments[i],
                betas,
                rate,
            );
            let what = format!("step {t} of {}", lens[i]);
            same(&what, &a1.read::<f32>()?, &moments[i].first_absmax)?;
            same(&what, &a2.read::<f32>()?, &moments[i].second_absmax)?;
            same_codes(&what, &first.read::<u8>()?, &moments[i].first)?;
            same_codes(&what, &second.read::<u8>()?, &moments[i].second)?;
            same(&what, &p.read::<T>()?, &parameters[i])?;
        }
    }
    Ok(())
}

// --- times -----------------------------------------------------------------------------------------------------------

/// Weights in turn: more than any cache holds.
const COPIES: usize = 4;
const RUNS: usize = 50;

/// The median time of one launch.
fn median(
    stream: &Stream,
    launch: impl Fn(usize) -> Result<(), peft_cuda::Error>,
) -> Result<Duration> {
    let once = || stream.time(|| (0..COPIES).try_for_each(&launch));
    for _ in 0..3 {
        once()?;
    }
    let mut times = (0..RUNS).map(|_| once()).collect::<Result<Vec<_>, _>>()?;
    times.sort();
    Ok(times[RUNS / 2] / COPIES as u32)
}

fn bytes(n: usize) -> Tensor {
    Tensor::randint(255, [n as i64], (Kind::Uint8, Device::Cuda(0)))
}

fn floats(n: usize) -> Tensor {
    Tensor::rand([n as i64], (Kind::Float, Device::Cuda(0)))
}

fn whole(tensor: &Tensor) -> Memory<'_> {
    ffi::memory(
        tensor,
        0,
        tensor.numel() * tensor.kind().elt_size_in_bytes(),
    )
}

fn times(stream: &Stream, table: &mut Table) -> Result<()> {
    let (from, to) = (bytes(1 << 30), bytes(1 << 30));
    let time = median(stream, |_| stream.copy(&whole(&from), &whole(&to)))
        .context("a copy on the device")?;
    let moved = 2.0 * f64::from(1 << 30);
    table.copy = moved / time.as_secs_f64();
    table.times.push(("copy of 1 GiB".into(), time, moved));
    drop((from, to));
    for (out, inp) in [(11008, 4096), (4096, 4096)] {
        times_of_weight(stream, table, out, inp)?;
    }
    times_of_adamw(stream, table)
}

fn times_of_weight(stream: &Stream, table: &mut Table, out: usize, inp: usize) -> Result<()> {
    let (n, block) = (out * inp, Block::USUAL);
    let blocks = block.count(n);
    let own = || {
        [
            bytes(n / 2),
            floats(blocks),
            bytes(blocks),
            floats(blocks.div_ceil(256)),
        ]
    };
    let weights: Vec<[Tensor; 4]> = (0..COPIES).map(|_| own()).collect();
    let map = Tensor::from_slice(Map::signed().values()).to_device(Device::Cuda(0));
    let weight = |i: usize, nested: bool| {
        let [codes, absmax, own, shared] = weights[i].each_ref().map(whole);
        let scales = match nested {
            true => Scales::Nested {
                codes: own,
                absmax: shared,
                map: whole(&map),
                offset: 0.5,
            },
            false => Scales::Plain(absmax),
        };
        Weight::new(codes, scales, *Type::Nf4.table(), block, n)
    };
    let decoded = bytes(n * 4);
    let x = bytes(8 * inp * 4).zero_();
    let y = bytes(8 * out * 4);
    for nested in [false, true] {
        let (kind, per) = if nested {
            ("nested", 1.0 + 4.0 / 256.0)
        } else {
            ("plain", 4.0)
        };
        let read = n as f64 / 2.0 + blocks as f64 * per;
        for (number, name, size) in [
            (Number::Bf16, "bf16", 2),
            (Number::F16, "fp16", 2),
            (Number::F32, "fp32", 4),
        ] {
            let to = ffi::memory(&decoded, 0, n * size);
            let time = median(stream, |i| {
                weight(i, nested)?.dequantise(to, number, stream)
            })?;
            let name = format!("dequantise [{out}, {inp}] {name} {kind}");
            table.times.push((name, time, read + (n * size) as f64));
        }
        for rows in [1, 2, 4, 8] {
            let (x, y) = (
                ffi::memory(&x, 0, rows * inp * 2),
                ffi::memory(&y, 0, rows * out * 2),
            );
            let time = median(stream, |i| {
                weight(i, nested)?.multiply(x, rows, inp, y, Number::Bf16, stream)
            })?;
            let name = format!("multiply {rows} x [{out}, {inp}] bf16 {kind}");
            table
                .times
                .push((name, time, read + (rows * (inp + out) * 2) as f64));
        }
    }
    let dense = floats(n).to_kind(Kind::BFloat16);
    let kinds = [Type::Nf4, Type::Fp4];
    for kind in kinds {
        let time = median(stream, |i| {
            let to = (whole(&weights[i][0]), whole(&weights[i][1]));
            quantise(whole(&dense), Number::Bf16, n, kind, block, to, stream)
        })?;
        let moved = n as f64 * 2.5 + blocks as f64 * 4.0;
        table
            .times
            .push((format!("quantise [{out}, {inp}] bf16 {kind}"), time, moved));
    }
    let time = median(stream, |i| {
        let [_, scales, codes, shared] = weights[i].each_ref().map(whole);
        nest(scales, blocks, 0.5, whole(&map), (codes, shared), stream)
    })?;
    table.times.push((
        format!("nest the scales of [{out}, {inp}]"),
        time,
        blocks as f64 * 5.0,
    ));
    Ok(())
}

/// 448 tensors, as LoRA on a model of 7B has them, 160 million numbers together.
fn times_of_adamw(stream: &Stream, table: &mut Table) -> Result<()> {
    let (count, len, betas) = (448, 4096 * 87, Betas(0.9, 0.999));
    let blocks = len / adamw::MOMENT_BLOCK;
    let own = || {
        [
            floats(len),
            floats(len),
            bytes(len).zero_(),
            bytes(len).zero_(),
            floats(blocks).zero_(),
            floats(blocks).zero_(),
        ]
    };
    let all: Vec<[Tensor; 6]> = (0..count).map(|_| own()).collect();
    let maps = [Map::signed(), Map::unsigned()]
        .map(|it| Tensor::from_slice(it.values()).to_device(Device::Cuda(0)));
    let room = bytes(count * adamw::ROOM);
    let rate = Rate::of(3, 1e-4, 1e-8, 0.01, betas);
    let tensors: Vec<_> = all
        .iter()
        .map(|it| {
            let [
                parameter,
                gradient,
                first,
                second,
                first_absmax,
                second_absmax,
            ] = it.each_ref().map(whole);
            adamw::Tensor {
                parameter,
                gradient,
                first,
                second,
                first_absmax,
                second_absmax,
                len,
                rate,
            }
        })
        .collect();
    let time = median(stream, |_| {
        adamw::step(
            &tensors,
            Number::F32,
            betas,
            (whole(&maps[0]), whole(&maps[1])),
            whole(&room),
            stream,
        )
    })?;
    let moved = (count * len) as f64 * 16.0 + (count * blocks) as f64 * 16.0;
    table
        .times
        .push((format!("adamw {count} x {len} fp32"), time, moved));
    Ok(())
}
