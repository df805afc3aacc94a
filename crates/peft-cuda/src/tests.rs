//! The kernels' own text, compiled for this processor (`tests/emulate.h`), launched with the arguments that the driver would get, against
//! `peft-codec`.

use std::{
    ffi::{CString, c_char, c_int, c_uint, c_void},
    fmt::Debug,
    process::Command,
    sync::{Mutex, OnceLock},
};

use half::{bf16, f16};
use libloading::Library;
use peft_codec::{
    Block, Compat, Element, Map, Nested, Scales as Known, Type, View, quantise_blockwise,
};

use crate::{
    adamw::{Betas, Moments, ROOM, Rate, Tensor, step_scalar, stepped},
    encode::{encoded, nested},
    error::Error,
    kernels::{Launch, Source, THREADS},
    memory::{Managed, Memory, Number},
    weight::{Scales, Weight},
};

const NUMBERS: [&str; 3] = ["f32", "bf16", "f16"];
const KINDS: [Type; 2] = [Type::Nf4, Type::Fp4];

/// The names of a file's kernels.
pub(crate) fn kernels(source: Source) -> Vec<String> {
    let forms: &[&str] = match source {
        Source::Dequantise => &[
            "dequantise_",
            "dequantise_nested_",
            "dequantise_any_",
            "dequantise_any_nested_",
        ],
        Source::Multiply => &[
            "multiply_1_",
            "multiply_2_",
            "multiply_4_",
            "multiply_8_",
            "multiply_any_",
            "multiply_1_nested_",
            "multiply_2_nested_",
            "multiply_4_nested_",
            "multiply_8_nested_",
            "multiply_any_nested_",
        ],
        Source::Quantise => &["quantise_nf4_", "quantise_fp4_"],
        Source::AdamW => &["adamw_"],
    };
    let mut all: Vec<String> = forms
        .iter()
        .flat_map(|form| NUMBERS.map(|number| format!("{form}{number}")))
        .collect();
    if source == Source::Quantise {
        all.push("nest".into());
    }
    all
}

type Launcher = unsafe extern "C" fn(*const c_char, c_uint, c_uint, *mut *mut c_void) -> c_int;

struct Emulator(Vec<(Source, Launcher)>);

/// Compiles all files once; none where there is no C++ compiler.
fn emulator() -> Option<&'static Mutex<Emulator>> {
    static BUILT: OnceLock<Option<Mutex<Emulator>>> = OnceLock::new();
    let built = BUILT.get_or_init(|| {
        let compiler = std::env::var("CXX").unwrap_or("c++".into());
        if Command::new(&compiler).arg("--version").output().is_err() {
            eprintln!("skipped: no C++ compiler `{compiler}` to run the kernels' text with; install g++ or name one in CXX");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let all = Source::ALL.map(|source| {
            let text = folder.path().join(source.file()).with_extension("cpp");
            let names: Vec<String> = kernels(source).iter().map(|it| format!("NAMED({it})")).collect();
            let program = format!(
                "{}\n{}\nconst Named KERNELS[] = {{{}}};\nconst size_t COUNT = {};\n",
                include_str!("../tests/emulate.h"),
                source.text(),
                names.join("\n"),
                names.len()
            );
            std::fs::write(&text, program).unwrap();
            let library = text.with_extension("so");
            let done = Command::new(&compiler)
                .args(["-std=c++17", "-O2", "-ffp-contract=off", "-fno-strict-aliasing", "-shared", "-fPIC"])
                .arg("-o").args([&library, &text]).output().unwrap();
            assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
            // SAFETY: made just now, of `emulate.h`.
            let library = Box::leak(Box::new(unsafe { Library::new(&library) }.unwrap()));
            // SAFETY: the signature of `launch` in `emulate.h`.
            (source, *unsafe { library.get::<Launcher>(c"launch") }.unwrap())
        });
        Some(Mutex::new(Emulator(all.into())))
    });
    built.as_ref()
}

impl Launch {
    /// With so many blocks, or as many as it wants.
    fn emulate(&self, grid: Option<u32>) {
        let emulator = emulator().unwrap().lock().unwrap();
        let (_, launch) = emulator
            .0
            .iter()
            .find(|(it, _)| *it == self.source)
            .unwrap();
        let name = CString::new(self.kernel.as_str()).unwrap();
        // SAFETY: the kernel's arguments, whose addresses are those of buffers as long as they were said to be.
        let code = unsafe {
            launch(
                name.as_ptr(),
                grid.unwrap_or(self.grid),
                THREADS,
                self.places().as_mut_ptr(),
            )
        };
        assert_eq!(code, 0, "no kernel {}", self.kernel);
    }
}

/// Bytes that begin `off` a multiple of 16, between others that must not change.
struct Buffer {
    all: Vec<u8>,
    begin: usize,
    len: usize,
}

const MARK: u8 = 0xa5;

impl Buffer {
    fn new(len: usize, off: usize) -> Buffer {
        let all = vec![MARK; len + 128];
        let begin = (64..80)
            .find(|i| all[*i..].as_ptr().addr().is_multiple_of(16))
            .unwrap()
            + off;
        Buffer { all, begin, len }
    }

    fn of<T: Copy>(values: &[T], off: usize) -> Buffer {
        let mut buffer = Buffer::new(size_of_val(values), off);
        // SAFETY: any number is bytes.
        let bytes = unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), buffer.len) };
        buffer.all[buffer.begin..][..buffer.len].copy_from_slice(bytes);
        buffer
    }

    fn memory(&self) -> Memory<'_> {
        let address = self.all[self.begin..].as_ptr().expose_provenance();
        // SAFETY: so many bytes, of a buffer that is alive.
        unsafe { Memory::of(address as u64, self.len) }
    }

    /// What is in it now. Nothing around it has changed.
    fn read<T: Copy + Default>(&self) -> Vec<T> {
        let (before, rest) = self.all.split_at(self.begin);
        let (bytes, after) = rest.split_at(self.len);
        assert!(
            before.iter().chain(after).all(|it| *it == MARK),
            "written beyond the end"
        );
        let mut values = vec![T::default(); self.len / size_of::<T>()];
        // SAFETY: any bytes are a number of the three formats, or a byte.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), values.as_mut_ptr().cast(), self.len);
        }
        values
    }
}

trait Format: Element + Debug {
    const NUMBER: Number;
}
impl Format for f32 {
    const NUMBER: Number = Number::F32;
}
impl Format for bf16 {
    const NUMBER: Number = Number::Bf16;
}
impl Format for f16 {
    const NUMBER: Number = Number::F16;
}

/// Equal to the bit, all that are no numbers being one.
#[track_caller]
fn same<T: Element>(what: &str, ours: &[T], wanted: &[T]) {
    assert_eq!(ours.len(), wanted.len(), "{what}");
    for (i, (a, b)) in ours.iter().zip(wanted).enumerate() {
        let (a, b) = (a.wide(), b.wide());
        assert!(
            a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan(),
            "{what}, {i} of {}: {a:e}, wanted {b:e}",
            ours.len()
        );
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

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// Between -1 and 1.
    fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    /// Mostly ordinary numbers.
    fn any(&mut self) -> f32 {
        match self.below(40) {
            0 => 0.0,
            1 => -0.0,
            2 => f32::from_bits(self.next() as u32),
            3 => self.unit() * 1e-39,
            4 => self.unit() * 1e-6,
            5 => self.unit() * 1e5,
            _ => self.unit() * 3.0,
        }
    }

    fn bytes(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| self.next() as u8).collect()
    }
}

const LENGTHS: [usize; 13] = [1, 2, 7, 8, 9, 31, 64, 65, 255, 1000, 1027, 4096, 20_005];
const BLOCKS: [usize; 5] = [32, 64, 128, 512, 4096];

/// Scales of every size, and some that spoil their block.
fn scales(random: &mut Random, n: usize) -> Vec<f32> {
    let scale = |random: &mut Random| match random.below(12) {
        0 => f32::from_bits(random.next() as u32 & 0x7fff_ffff),
        1 => random.unit().abs() * 1e-39,
        2 => random.unit().abs() * 6e4, // around the largest of fp16
        3 => random.unit().abs() * 1e-7,
        _ => random.unit().abs(),
    };
    (0..n).map(|_| scale(random)).collect()
}

fn decodes<T: Format>(
    random: &mut Random,
    len: usize,
    block: usize,
    off: (usize, usize),
    grid: Option<u32>,
) {
    let block = Block::of(block).unwrap();
    let kind = KINDS[random.below(2)];
    let codes = random.bytes(len.div_ceil(2));
    let absmax = scales(random, block.count(len));
    let own = Nested {
        codes: random.bytes(block.count(len)),
        absmax: scales(random, block.count(len).div_ceil(256)),
        offset: random.unit(),
        map: Map::signed().clone(),
    };
    let (codes_, absmax_) = (Buffer::of(&codes, off.0), Buffer::of(&absmax, 4));
    let (own_, shared_, map_) = (
        Buffer::of(&own.codes, 1),
        Buffer::of(&own.absmax, 4),
        Buffer::of(own.map.values(), 4),
    );
    let of_own = Scales::Nested {
        codes: own_.memory(),
        absmax: shared_.memory(),
        map: map_.memory(),
        offset: own.offset,
    };
    for (known, given) in [
        (Known::Plain(&absmax), Scales::Plain(absmax_.memory())),
        (Known::from(&own), of_own),
    ] {
        let mut wanted = vec![T::default(); len];
        View::new(&codes, known, kind.table(), block, len)
            .unwrap()
            .dequantise(&mut wanted)
            .unwrap();
        let weight = Weight::new(codes_.memory(), given, *kind.table(), block, len).unwrap();
        let out = Buffer::new(len * size_of::<T>(), off.1);
        let launch = weight.decoded(out.memory(), T::NUMBER).unwrap().unwrap();
        launch.emulate(grid);
        let what = format!("{} of {len} by {}, {grid:?}", launch.kernel, block.size());
        same(&what, &out.read::<T>(), &wanted);
    }
}

#[test]
fn decoding_has_the_bits_of_the_codec() {
    if emulator().is_none() {
        return;
    }
    let mut random = Random(1);
    for len in LENGTHS {
        for block in BLOCKS {
            for (off, grid) in [
                ((0, 0), None),
                ((0, 0), Some(1)),
                ((4, 0), Some(3)),
                ((1, 0), None),
                ((0, 4), Some(2)),
                ((2, 8), None),
            ] {
                decodes::<f32>(&mut random, len, block, off, grid);
                decodes::<bf16>(&mut random, len, block, off, grid);
                decodes::<f16>(&mut random, len, block, off, grid);
            }
        }
    }
}

#[test]
fn aligned_memory_takes_the_wide_form() {
    let codes = Buffer::new(500, 0);
    let absmax = Buffer::new(64, 0);
    let form = |number: Number, codes: &Buffer, off: usize| {
        let block = Block::of(64).unwrap();
        let weight = Weight::new(
            codes.memory(),
            Scales::Plain(absmax.memory()),
            *Type::Nf4.table(),
            block,
            1000,
        )
        .unwrap();
        let out = Buffer::new(1000 * number.bytes(), off);
        let launch = weight.decoded(out.memory(), number).unwrap().unwrap();
        (launch.kernel, launch.grid)
    };
    assert_eq!(form(Number::Bf16, &codes, 0), ("dequantise_bf16".into(), 1));
    assert_eq!(form(Number::F32, &codes, 0), ("dequantise_f32".into(), 1));
    assert_eq!(
        form(Number::Bf16, &codes, 2),
        ("dequantise_any_bf16".into(), 2)
    );
    let two = Buffer::new(500, 2); // enough for four results of 4 bytes, not for eight of 2
    assert_eq!(form(Number::F32, &two, 0).0, "dequantise_f32");
    assert_eq!(form(Number::F16, &two, 0).0, "dequantise_any_f16");
}

fn encodes<T: Format>(values: &[f32], block: usize, off: (usize, usize), most: u64) {
    let values: Vec<T> = values.iter().map(|it| T::round(*it)).collect();
    let size = Block::of(block).unwrap();
    let from = Buffer::of(&values, off.0);
    for kind in KINDS {
        let wanted = peft_codec::quantise(&values, kind, size, Compat::Cuda);
        let (codes, absmax) = (
            Buffer::new(wanted.bytes.len(), off.1),
            Buffer::new(wanted.absmax.len() * 4, 4),
        );
        let launch = encoded(
            from.memory(),
            T::NUMBER,
            values.len(),
            kind,
            size,
            (codes.memory(), absmax.memory()),
            most,
        );
        let launch = launch.unwrap().unwrap();
        launch.emulate(None);
        let what = format!(
            "{} of {} by {block}, at most {most}",
            launch.kernel,
            values.len()
        );
        same(&what, &absmax.read::<f32>(), &wanted.absmax);
        assert_eq!(codes.read::<u8>(), wanted.bytes, "{what}");
    }
}

#[test]
fn encoding_has_the_bits_of_the_codec() {
    if emulator().is_none() {
        return;
    }
    let mut random = Random(2);
    for len in LENGTHS {
        for block in BLOCKS {
            for (off, most) in [((0, 0), 9999), ((0, 0), 1), ((4, 0), 9999), ((0, 1), 2)] {
                let scale = [1.0, 1e-30, 1e-38, 1e30, 0.37][random.below(5)];
                let mut values: Vec<f32> = (0..len).map(|_| random.any() * scale).collect();
                if random.below(3) == 0 {
                    values[..len.min(block)].fill(0.0);
                }
                encodes::<f32>(&values, block, off, most);
                encodes::<bf16>(&values, block, off, most);
                encodes::<f16>(&values, block, off, most);
            }
        }
    }
}

#[test]
fn numbers_around_every_threshold_fall_as_in_the_codec() {
    if emulator().is_none() {
        return;
    }
    // The thresholds are in no interface: where neighbours of the table meet, some ulps to each side.
    let mut values = Vec::new();
    for kind in KINDS {
        let mut table = *kind.table();
        table.sort_by(f32::total_cmp);
        for scale in [1.0f32, 0.5, 3.0, 0.1, 1e-6, 7e8] {
            for pair in table.windows(2) {
                let middle = (pair[0] + pair[1]) / 2.0;
                let mut row = vec![scale];
                row.extend((-31i32..32).map(|i| {
                    let bits = middle.to_bits().wrapping_add_signed(i);
                    let near = f32::from_bits(bits);
                    if near.is_nan() || near.abs() > 1.0 {
                        0.0
                    } else {
                        near * scale
                    }
                }));
                values.extend(row);
            }
        }
    }
    encodes::<f32>(&values, 64, (0, 0), 9999);
}

#[test]
fn every_pattern_of_16_bits_alone() {
    if emulator().is_none() {
        return;
    }
    let patterns: Vec<u16> = (0..=u16::MAX)
        .flat_map(|pattern| {
            let mut row = [0u16; 32];
            row[usize::from(pattern) % 32] = pattern;
            row
        })
        .collect();
    fn check<T: Format>(values: Vec<T>) {
        let from = Buffer::of(&values, 0);
        let block = Block::of(32).unwrap();
        let wanted = peft_codec::quantise(&values, Type::Fp4, block, Compat::Cuda);
        let (codes, absmax) = (
            Buffer::new(wanted.bytes.len(), 0),
            Buffer::new(wanted.absmax.len() * 4, 0),
        );
        let launch = encoded(
            from.memory(),
            T::NUMBER,
            values.len(),
            Type::Fp4,
            block,
            (codes.memory(), absmax.memory()),
            9999,
        );
        launch.unwrap().unwrap().emulate(None);
        same("scales", &absmax.read::<f32>(), &wanted.absmax);
        assert!(codes.read::<u8>() == wanted.bytes);
    }
    check(patterns.iter().copied().map(bf16::from_bits).collect());
    check(patterns.iter().copied().map(f16::from_bits).collect());
}

#[test]
fn scales_are_nested_as_in_the_codec() {
    if emulator().is_none() {
        return;
    }
    let mut random = Random(3);
    let map = Buffer::of(Map::signed().values(), 0);
    for n in [1usize, 2, 255, 256, 257, 1000, 5000] {
        for (case, most) in [(0, 9999), (1, 1), (2, 3), (3, 9999)] {
            let mut absmax: Vec<f32> = (0..n).map(|_| random.unit().abs() * 0.1).collect();
            let mean = match case {
                0 | 1 => absmax.iter().sum::<f32>() / n as f32,
                2 => absmax[0],
                _ => {
                    absmax.iter_mut().for_each(|it| *it = random.any());
                    0.05
                }
            };
            if case == 2 {
                absmax[..n.min(300)].fill(mean); // blocks of zeros
            }
            let wanted = Nested::around(&absmax, mean, Compat::Cuda);
            let (from, codes, shared) = (
                Buffer::of(&absmax, 4),
                Buffer::new(n, 1),
                Buffer::new(n.div_ceil(256) * 4, 4),
            );
            let launch = nested(
                from.memory(),
                n,
                mean,
                map.memory(),
                (codes.memory(), shared.memory()),
                most,
            );
            launch.unwrap().unwrap().emulate(None);
            same("scales of scales", &shared.read::<f32>(), &wanted.absmax);
            assert_eq!(codes.read::<u8>(), wanted.codes, "{n}, case {case}");
        }
    }
}

#[test]
fn ties_of_the_map_are_even() {
    if emulator().is_none() {
        return;
    }
    let values = Map::signed().values();
    let mut near = vec![1.0f32];
    for pair in values.windows(2) {
        let middle = (pair[0] + pair[1]) * 0.5;
        near.extend([
            middle.next_down(),
            middle,
            middle.next_up(),
            pair[0],
            pair[0].next_up(),
        ]);
    }
    // Each block has a 1, so that nothing is scaled.
    let near: Vec<f32> = near
        .chunks(255)
        .flat_map(|it| [&[1.0], it].concat())
        .collect();
    let wanted = quantise_blockwise(&near, Map::signed(), 256, Compat::Cuda);
    let n = near.len();
    let map = Buffer::of(values, 0);
    let (from, codes, shared) = (
        Buffer::of(&near, 0),
        Buffer::new(n, 0),
        Buffer::new(n.div_ceil(256) * 4, 0),
    );
    nested(
        from.memory(),
        n,
        0.0,
        map.memory(),
        (codes.memory(), shared.memory()),
        1,
    )
    .unwrap()
    .unwrap()
    .emulate(None);
    assert_eq!(codes.read::<u8>(), wanted.codes);
}

fn multiplies<T: Format>(
    random: &mut Random,
    rows: usize,
    inp: usize,
    out: usize,
    block: usize,
    off: usize,
    grid: Option<u32>,
) {
    let (len, size) = (inp * out, Block::of(block).unwrap());
    let dense: Vec<f32> = (0..len).map(|_| random.unit()).collect();
    let kind = KINDS[random.below(2)];
    let packed = peft_codec::quantise(&dense, kind, size, Compat::Cuda);
    let own = Nested::of(&packed.absmax, Compat::Cuda);
    let x: Vec<T> = (0..rows * inp).map(|_| T::round(random.unit())).collect();
    let (x_, codes_, absmax_) = (
        Buffer::of(&x, off),
        Buffer::of(&packed.bytes, 0),
        Buffer::of(&packed.absmax, 0),
    );
    let (own_, shared_, map_) = (
        Buffer::of(&own.codes, 0),
        Buffer::of(&own.absmax, 0),
        Buffer::of(own.map.values(), 0),
    );
    let of_own = Scales::Nested {
        codes: own_.memory(),
        absmax: shared_.memory(),
        map: map_.memory(),
        offset: own.offset,
    };
    for (known, given) in [
        (
            Known::Plain(&packed.absmax),
            Scales::Plain(absmax_.memory()),
        ),
        (Known::from(&own), of_own),
    ] {
        let mut w = vec![0f32; len];
        View::new(&packed.bytes, known, kind.table(), size, len)
            .unwrap()
            .dequantise(&mut w)
            .unwrap();
        let weight = Weight::new(codes_.memory(), given, *kind.table(), size, len).unwrap();
        let y = Buffer::new(rows * out * size_of::<T>(), 0);
        let launch = weight
            .multiplied(x_.memory(), rows, inp, y.memory(), T::NUMBER)
            .unwrap()
            .unwrap();
        launch.emulate(grid);
        let what = format!("{} {rows} x {inp} x {out} by {block}", launch.kernel);
        for (at, y) in y.read::<T>().iter().enumerate() {
            let (m, o) = (at / out, at % out);
            let products =
                (0..inp).map(|i| f64::from(x[m * inp + i].wide()) * f64::from(w[o * inp + i]));
            let (sum, size): (f64, f64) =
                products.fold((0.0, 0.0), |(a, b), it| (a + it, b + it.abs()));
            // One rounding to the format, and those of the sum in fp32.
            let ulp = match T::NUMBER {
                Number::F32 => 0.0,
                Number::Bf16 => 2f64.powi(-8),
                Number::F16 => 2f64.powi(-11),
            };
            let allowed = sum.abs() * ulp * 1.01 + size * 1e-6 + 1e-7;
            assert!(
                (f64::from(y.wide()) - sum).abs() <= allowed,
                "{what}, {m}, {o}: {y:?}, wanted {sum}"
            );
        }
    }
}

#[test]
fn products_are_those_of_the_decoded_weight() {
    if emulator().is_none() {
        return;
    }
    let mut random = Random(4);
    for rows in 1..=8 {
        // Rows of whole blocks, rows that end in one, of odd lengths, shorter than a block, longer than a step of a warp.
        for (inp, out, block) in [
            (64, 9, 64),
            (80, 5, 64),
            (96, 3, 128),
            (33, 7, 32),
            (8, 17, 64),
            (1, 3, 32),
            (1000, 6, 64),
            (2056, 3, 256),
            (77, 4, 4096),
        ] {
            let (off, grid) = [(0, None), (0, Some(1)), (4, Some(1))][random.below(3)];
            multiplies::<f32>(&mut random, rows, inp, out, block, off, grid);
            multiplies::<bf16>(&mut random, rows, inp, out, block, off, grid);
            multiplies::<f16>(&mut random, rows, inp, out, block, off, grid);
        }
    }
    multiplies::<bf16>(&mut random, 3, 64, 200, 64, 0, None);
}

fn steps<T: Format>(random: &mut Random, lens: &[usize], most: u64) {
    let betas = Betas(0.9, 0.95);
    let maps = (
        Buffer::of(Map::signed().values(), 0),
        Buffer::of(Map::unsigned().values(), 0),
    );
    let mut parameters: Vec<Vec<T>> = lens
        .iter()
        .map(|n| (0..*n).map(|_| T::round(random.unit())).collect())
        .collect();
    let mut moments: Vec<Moments> = lens.iter().map(|n| Moments::new(*n)).collect();
    for t in 1..=4 {
        let gradients: Vec<Vec<T>> = lens
            .iter()
            .map(|n| {
                let zeros = random.below(2) * 300; // a block without any
                (0..*n)
                    .map(|i| match random.below(60) {
                        _ if i < zeros => T::round(0.0),
                        0 => T::round(f32::NAN),
                        1 => T::round(f32::INFINITY),
                        2 => T::round(random.unit() * 1e4),
                        _ => T::round(random.unit().powi(5)),
                    })
                    .collect()
            })
            .collect();
        let buffers: Vec<[Buffer; 6]> = (0..lens.len())
            .map(|i| {
                [
                    Buffer::of(&parameters[i], 4),
                    Buffer::of(&gradients[i], 0),
                    Buffer::of(&moments[i].first, 1),
                    Buffer::of(&moments[i].second, 0),
                    Buffer::of(&moments[i].first_absmax, 0),
                    Buffer::of(&moments[i].second_absmax, 4),
                ]
            })
            .collect();
        let rate = |i: usize| Rate::of(t, 1e-2 * (1 + i) as f64, 1e-8, [0.1, 0.0][i % 2], betas);
        let tensors: Vec<Tensor<'_>> = buffers
            .iter()
            .enumerate()
            .map(|(i, [p, g, first, second, a1, a2])| Tensor {
                parameter: p.memory(),
                gradient: g.memory(),
                first: first.memory(),
                second: second.memory(),
                first_absmax: a1.memory(),
                second_absmax: a2.memory(),
                len: lens[i],
                rate: rate(i),
            })
            .collect();
        let mut room = Buffer::new(tensors.len() * ROOM, 0);
        let (list, launch) = stepped(
            &tensors,
            T::NUMBER,
            betas,
            (maps.0.memory(), maps.1.memory()),
            room.memory(),
            most,
        )
        .unwrap()
        .unwrap();
        let begin = room.begin;
        room.all[begin..][..list.len()].copy_from_slice(&list);
        launch.emulate(None);
        for (i, [p, _, first, second, a1, a2]) in buffers.iter().enumerate() {
            step_scalar(
                &mut parameters[i],
                &gradients[i],
                &mut moments[i],
                betas,
                rate(i),
            );
            let what = format!("{} {t} of {}", launch.kernel, lens[i]);
            same(&what, &p.read::<T>(), &parameters[i]);
            same(&what, &a1.read::<f32>(), &moments[i].first_absmax);
            same(&what, &a2.read::<f32>(), &moments[i].second_absmax);
            assert_eq!(first.read::<u8>(), moments[i].first, "{what}");
            assert_eq!(second.read::<u8>(), moments[i].second, "{what}");
        }
    }
}

#[test]
fn a_step_of_adamw_has_the_bits_of_the_scalar_one() {
    if emulator().is_none() {
        return;
    }
    let mut random = Random(5);
    for (lens, most) in [
        (&[1usize][..], 9999),
        (&[256, 0, 257, 1000, 1, 0, 5000, 255], 9999),
        (&[700, 300, 20_000], 1),
    ] {
        steps::<f32>(&mut random, lens, most);
        steps::<bf16>(&mut random, lens, most);
        steps::<f16>(&mut random, lens, most);
    }
}

#[test]
fn moments_of_8_bits_move_as_those_of_32() {
    // A thousand steps towards a minimum: the rule itself, not its bits.
    let (n, betas) = (512, Betas(0.9, 0.999));
    let target: Vec<f32> = (0..n).map(|i| (i as f32 * 0.7).sin()).collect();
    let (mut eight, mut exact) = (vec![0f32; n], vec![0f64; n]);
    let (mut moments, mut m, mut v) = (Moments::new(n), vec![0f64; n], vec![0f64; n]);
    for t in 1..=1000 {
        let lr = 0.01 * (1.0 - f64::from(t) / 1000.0);
        let gradient: Vec<f32> = eight.iter().zip(&target).map(|(p, it)| p - it).collect();
        step_scalar(
            &mut eight,
            &gradient,
            &mut moments,
            betas,
            Rate::of(t, lr, 1e-8, 0.0, betas),
        );
        for i in 0..n {
            let g = exact[i] - f64::from(target[i]);
            m[i] = 0.9 * m[i] + 0.1 * g;
            v[i] = 0.999 * v[i] + 0.001 * g * g;
            let (m, v) = (
                m[i] / (1.0 - 0.9f64.powi(t as i32)),
                v[i] / (1.0 - 0.999f64.powi(t as i32)),
            );
            exact[i] -= lr * m / (v.sqrt() + 1e-8);
        }
    }
    let far = |p: &dyn Fn(usize) -> f64| {
        (0..n)
            .map(|i| (p(i) - f64::from(target[i])).powi(2))
            .sum::<f64>()
            / n as f64
    };
    let (eight, exact) = (far(&|i| f64::from(eight[i])), far(&|i| exact[i]));
    println!("mean square distance: 8 bits {eight:.2e}, exact {exact:.2e}");
    assert!(eight < 1e-3 && exact < 1e-3);
}

#[test]
fn what_does_not_fit_is_refused() {
    let (codes, absmax, out) = (Buffer::new(50, 0), Buffer::new(8, 0), Buffer::new(198, 0));
    let (block, table) = (Block::of(64).unwrap(), *Type::Nf4.table());
    fn of<'a>(codes: &'a Buffer, absmax: &'a Buffer, len: usize) -> Result<Weight<'a>, Error> {
        let scales = Scales::Plain(absmax.memory());
        let (block, table) = (Block::of(64).unwrap(), *Type::Nf4.table());
        Weight::new(codes.memory(), scales, table, block, len)
    }
    let bytes = |what, expected, got| {
        Some(Error::Bytes {
            what,
            expected,
            got,
        })
    };
    assert_eq!(
        of(&codes, &absmax, 101).err(),
        bytes("packed bytes", 51, 50)
    );
    assert_eq!(
        of(&codes, &Buffer::new(12, 0), 99).err(),
        bytes("scales", 8, 12)
    );
    let error = of(&codes, &Buffer::new(8, 2), 99).unwrap_err();
    assert!(matches!(error, Error::Address { align: 4, .. }), "{error}");
    let weight = of(&codes, &absmax, 99).unwrap();
    assert!(weight.decoded(out.memory(), Number::Bf16).is_ok());
    assert_eq!(
        weight.decoded(out.memory(), Number::F32).err(),
        bytes("numbers", 396, 198)
    );
    let (x, y) = (Buffer::new(66, 0), Buffer::new(6, 0)); // [1, 33] and [1, 3] in bf16
    assert!(
        weight
            .multiplied(x.memory(), 1, 33, y.memory(), Number::Bf16)
            .is_ok()
    );
    for (rows, inp) in [(0, 33), (9, 33), (1, 34), (1, 0)] {
        let error = weight
            .multiplied(x.memory(), rows, inp, y.memory(), Number::Bf16)
            .unwrap_err();
        assert_eq!(error, Error::Shape { rows, inp, len: 99 });
    }
    assert!(
        weight
            .multiplied(x.memory(), 2, 33, y.memory(), Number::Bf16)
            .is_err()
    );
    let empty = Buffer::new(0, 0);
    let nothing = Weight::new(
        empty.memory(),
        Scales::Plain(empty.memory()),
        table,
        block,
        0,
    )
    .unwrap();
    assert!(
        nothing
            .decoded(empty.memory(), Number::F32)
            .unwrap()
            .is_none()
    );
}

/// On a machine with a GPU it gives pages, on all others it says what is missing.
#[test]
fn managed_memory_is_had_or_refused() {
    match crate::devices() {
        Ok(count) if count > 0 => {
            let pages: Vec<Managed> = (0..3).map(|_| Managed::new(5000, 0).unwrap()).collect();
            assert!(
                pages
                    .iter()
                    .all(|it| it.address() != 0 && it.bytes() == 5000)
            );
            assert_ne!(pages[0].address(), pages[1].address());
        }
        Ok(count) => {
            let none = Error::NoDevice { ordinal: 0, count };
            assert_eq!(Managed::new(8, 0).unwrap_err(), none);
        }
        Err(error) => assert_eq!(Managed::new(8, 0).unwrap_err(), error),
    }
}
