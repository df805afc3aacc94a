//! Every format against the `gguf` package, bit for bit.

use crate::support::{file, fixture};
use peft_gguf::{GgmlType, Gguf};
use safetensors::SafeTensors;

#[test]
fn every_format_decodes_to_pythons_bits() {
    let bytes = std::fs::read(fixture("formats.safetensors")).unwrap();
    let expected = SafeTensors::deserialize(&bytes).unwrap();
    let gguf = Gguf::open(&fixture("formats.gguf")).unwrap();
    let mut kinds = Vec::new();
    for info in gguf.tensors() {
        let python = expected.tensor(&info.name).unwrap();
        assert_eq!(info.shape, python.shape(), "{}", info.name);
        let got = gguf.dequantise(&info.name).unwrap();
        let want = python
            .data()
            .as_chunks()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b));
        assert_eq!(got.len(), want.len());
        for (i, (got, want)) in got.iter().zip(want).enumerate() {
            let same = got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan();
            assert!(
                same,
                "{} value {i}: {got:e}, Python has {want:e}",
                info.name
            );
        }
        kinds.push(info.kind);
    }
    use GgmlType::*;
    let all = [
        F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K,
    ];
    assert_eq!(kinds, all);
}

#[test]
fn version_2_has_the_same_layout() {
    let mut bytes = std::fs::read(fixture("llama.gguf")).unwrap();
    bytes[4] = 2;
    let (_dir, path) = file(&bytes);
    let (old, new) = (
        Gguf::open(&path).unwrap(),
        Gguf::open(&fixture("llama.gguf")).unwrap(),
    );
    assert_eq!((old.version(), new.version()), (2, 3));
    assert_eq!(
        old.dequantise("token_embd.weight").unwrap(),
        new.dequantise("token_embd.weight").unwrap()
    );
}
