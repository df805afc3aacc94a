//! Bytes, scales and values against those of `bitsandbytes` (`fixtures/quant`, made by `fixtures/quant.py`).

use std::{collections::BTreeMap, path::Path};

use half::{bf16, f16};
use peft_codec::*;
use safetensors::{SafeTensors, tensor::TensorView};

fn file(name: &str) -> Vec<u8> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/quant");
    std::fs::read(folder.join(name)).unwrap()
}

/// A number of a file: fp32, bf16 or fp16 in little-endian bytes.
trait Stored: Element {
    const BYTES: usize;
    fn of(bytes: &[u8]) -> Self;
    fn bits(self) -> u32;
}

impl Stored for f32 {
    const BYTES: usize = 4;
    fn of(b: &[u8]) -> f32 {
        f32::from_le_bytes([b[0], b[1], b[2], b[3]])
    }
    fn bits(self) -> u32 {
        self.to_bits()
    }
}

impl Stored for bf16 {
    const BYTES: usize = 2;
    fn of(b: &[u8]) -> bf16 {
        bf16::from_le_bytes([b[0], b[1]])
    }
    fn bits(self) -> u32 {
        self.to_bits().into()
    }
}

impl Stored for f16 {
    const BYTES: usize = 2;
    fn of(b: &[u8]) -> f16 {
        f16::from_le_bytes([b[0], b[1]])
    }
    fn bits(self) -> u32 {
        self.to_bits().into()
    }
}

fn numbers<T: Stored>(view: &TensorView<'_>) -> Vec<T> {
    view.data().chunks_exact(T::BYTES).map(T::of).collect()
}

/// Equal to the bit, but that one zero is as good as the other.
fn same<T: Stored>(what: &str, ours: &[T], python: &[T]) {
    assert_eq!(ours.len(), python.len(), "{what}");
    for (i, (a, b)) in ours.iter().zip(python).enumerate() {
        let zeros = a.wide() == 0.0 && b.wide() == 0.0;
        let nans = a.wide().is_nan() && b.wide().is_nan();
        assert!(
            a.bits() == b.bits() || zeros || nans,
            "{what}, number {i}: {} is not {}",
            a.wide(),
            b.wide()
        );
    }
}

#[derive(serde::Deserialize)]
struct Case {
    r#type: String,
    block: usize,
    dtype: String,
    nested: bool,
}

fn check<T: Stored>(name: &str, case: &Case, tensors: &SafeTensors<'_>) {
    let get = |part: &str| tensors.tensor(&format!("{name}.{part}")).unwrap();
    let kind = match case.r#type.as_str() {
        "nf4" => Type::Nf4,
        _ => Type::Fp4,
    };
    let block = Block::of(case.block).unwrap();
    let input: Vec<T> = numbers(&get("input"));
    for level in Level::all() {
        let what = format!("{name} at {level:?}");
        let packed = quantise_at(level, &input, kind, block, Compat::Cpu);
        assert_eq!(packed.bytes, get("bytes").data(), "{what}");
        let absmax = match case.nested {
            false => {
                same(&what, &packed.absmax, &numbers::<f32>(&get("absmax")));
                packed.absmax
            }
            true => {
                let nested = Nested::of(&packed.absmax, Compat::Cpu);
                same(&what, &[nested.offset], &numbers::<f32>(&get("offset")));
                assert_eq!(nested.codes, get("codes").data(), "{what}");
                same(&what, &nested.absmax, &numbers::<f32>(&get("absmax")));
                nested.absmax().unwrap()
            }
        };
        let mut out = vec![T::default(); input.len()];
        dequantise_at(level, &packed.bytes, &absmax, kind, block, &mut out).unwrap();
        same(&what, &out, &numbers::<T>(&get("out")));
    }
}

#[test]
fn four_bits_are_those_of_bitsandbytes() {
    let bytes = file("four.safetensors");
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let cases = header.metadata().as_ref().unwrap()["cases"].clone();
    let cases: BTreeMap<String, Case> = serde_json::from_str(&cases).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    assert!(cases.len() > 80);
    for (name, case) in &cases {
        match case.dtype.as_str() {
            "float32" => check::<f32>(name, case, &tensors),
            "bfloat16" => check::<bf16>(name, case, &tensors),
            _ => check::<f16>(name, case, &tensors),
        }
    }
}

#[test]
fn eight_bits_are_those_of_bitsandbytes() {
    let bytes = file("eight.safetensors");
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    for (name, map) in [("signed", Map::signed()), ("unsigned", Map::unsigned())] {
        let stored: Vec<f32> = numbers(&tensors.tensor(&format!("map.{name}")).unwrap());
        same(name, map.values(), &stored);
        for block in [64, 256] {
            let get = |part: &str| tensors.tensor(&format!("{name}-{block}.{part}")).unwrap();
            let input: Vec<f32> = numbers(&get("input"));
            let what = format!("{name}, {block} a block");
            let ours = quantise_blockwise(&input, map, block, Compat::Cpu);
            same(&what, &ours.absmax, &numbers::<f32>(&get("absmax")));
            assert_eq!(ours.codes, get("codes").data(), "{what}");
            let mut out = vec![0.0; input.len()];
            dequantise_blockwise(&ours.codes, &ours.absmax, map, block, &mut out).unwrap();
            same(&what, &out, &numbers::<f32>(&get("out")));
        }
    }
}

/// The steps of `AdamW8bit` on a CPU, which are torch's operations on whole tensors. States are equal to the bit. Parameters are but
/// for torch's square roots: those are MKL's, which rounds one in two hundred the other way.
#[test]
fn steps_of_adamw_are_those_of_bitsandbytes() {
    let bytes = file("adamw8.safetensors");
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let with = AdamW8 {
        lr: 1e-2,
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weight_decay: 0.1,
    };
    for name in ["whole", "rest"] {
        let get = |part: &str| tensors.tensor(&format!("{name}.{part}")).unwrap();
        let mut params: Vec<f32> = numbers(&get("start"));
        let n = params.len();
        let gradients: Vec<bf16> = numbers(&get("gradients"));
        let (mut c1, mut c2) = (vec![0; n], vec![0; n]);
        let (mut a1, mut a2) = (vec![0.0; n.div_ceil(256)], vec![0.0; n.div_ceil(256)]);
        for t in 1..=20 {
            let at = (t as usize - 1) % 5 * n;
            let g = &gradients[at..at + n];
            let compat = Compat::Cpu;
            with.step(
                t,
                &mut params,
                g,
                &mut c1,
                &mut c2,
                &mut a1,
                &mut a2,
                compat,
                1.0,
            )
            .unwrap();
            if !matches!(t, 1 | 2 | 20) {
                continue;
            }
            let get = |part: &str| get(&format!("{t}.{part}"));
            let wanted: Vec<f32> = numbers(&get("parameter"));
            let what = format!("{name}, step {t}");
            assert_eq!(c1, get("state1").data(), "{what}");
            assert_eq!(c2, get("state2").data(), "{what}");
            same(&what, &a1, &numbers::<f32>(&get("absmax1")));
            same(&what, &a2, &numbers::<f32>(&get("absmax2")));
            let mut others = 0;
            for (ours, python) in params.iter().zip(&wanted) {
                let step = f32::EPSILON * ours.abs().max(python.abs());
                assert!(
                    (ours - python).abs() <= step * t as f32,
                    "{what}: {ours} is not {python}"
                );
                others += usize::from(ours != python);
            }
            assert!(
                others * 100 < n,
                "{what}: {others} of {n} parameters are others"
            );
        }
    }
}
