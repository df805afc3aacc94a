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
