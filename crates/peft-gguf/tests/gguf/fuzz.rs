//! Real files with a few bytes changed. Anything may come out but a panic, a hang or a huge
//! allocation; a half-written folder may not.
//!
//! Few cases by default; `PROPTEST_CASES=1000000 cargo nextest run -p peft-gguf fuzz` for a long run.

use crate::support::{MODELS, fixture};
use peft_gguf::{Dtype, Gguf, HfView, import, write_tokenizer};
use proptest::prelude::*;
use std::path::Path;

/// One change at a place given as a fraction of the file, mostly in its header.
#[derive(Debug, Clone)]
enum Change {
    Byte(u8),
    Word(u32),
    Long(u64),
    Remove(usize),
    Repeat(usize),
    Truncate,
}

fn interesting() -> impl Strategy<Value = u64> {
    prop_oneof![
        Just(0),
        Just(1),
        Just(u64::MAX),
        Just(u64::from(u32::MAX)),
        Just(1 << 63),
        Just(1 << 31),
        (0u32..64).prop_map(|bit| 1 << bit),
        0u64..300,
        any::<u64>(),
    ]
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        4 => any::<u8>().prop_map(Change::Byte),
        3 => interesting().prop_map(|n| Change::Word(n as u32)),
        3 => interesting().prop_map(Change::Long),
        1 => (1usize..40).prop_map(Change::Remove),
        1 => (1usize..40).prop_map(Change::Repeat),
        1 => Just(Change::Truncate),
    ]
}

fn apply(bytes: &mut Vec<u8>, place: f64, change: &Change) {
    let at = (bytes.len() as f64 * place) as usize;
    let upto = |n: usize, len: usize| (at + n).min(len);
    let len = bytes.len();
    match change {
        Change::Byte(b) => bytes[at..upto(1, len)].fill(*b),
        Change::Word(n) => {
            let end = upto(4, len);
            bytes[at..end].copy_from_slice(&n.to_le_bytes()[..end - at]);
        }
        Change::Long(n) => {
            let end = upto(8, len);
            bytes[at..end].copy_from_slice(&n.to_le_bytes()[..end - at]);
        }
        Change::Remove(n) => drop(bytes.drain(at..upto(*n, len))),
        Change::Repeat(n) => {
            let again = bytes[at..upto(*n, len)].to_vec();
            bytes.splice(at..at, again);
        }
        Change::Truncate => bytes.truncate(at),
    }
}

/// Everything that the crate does with a file.
fn exercise(path: &Path, dir: &Path) {
    let Ok(gguf) = Gguf::open(path) else { return };
    for (_, value) in gguf.metadata().iter() {
        value.describe();
    }
    let names: Vec<_> = gguf.tensors().map(|t| t.name.clone()).collect();
    for name in names {
        // ranges were checked when the file was opened
        gguf.dequantise(&name).unwrap();
    }
    let _ = write_tokenizer(&gguf, dir);
    if let Ok(view) = HfView::new(gguf) {
        for name in view.names() {
            let count: usize = view.shape(&name).unwrap().iter().product();
            assert_eq!(view.tensor(&name).unwrap().len(), count);
        }
    }
    let out = dir.join("out");
    if import(path, &out, Dtype::BF16, &mut |_, _, _| {}).is_err() {
        assert!(!out.exists());
    }
}

proptest! {
    #[test]
    fn mutated_files_are_read_or_refused(
        model in 0..MODELS.len(),
        changes in prop::collection::vec((0.0..1.0f64, change()), 1..4),
        // metadata, vocabulary or data: most of what can go wrong is in the first kilobyte
        focus in prop_oneof![Just(0.02), Just(0.2), Just(0.5), Just(1.0)],
    ) {
        let source = fixture(&format!("{}.gguf", MODELS[model]));
        let mut bytes = std::fs::read(source).unwrap();
        for (place, change) in &changes {
            apply(&mut bytes, place * focus, change);
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.gguf");
        std::fs::write(&path, bytes).unwrap();
        exercise(&path, dir.path());
    }
}
