//! Damaged adapter folders: every mutation is an error or an adapter, never a panic.
//!
//! 256 cases a test by default; `PROPTEST_CASES=100000` for a long run.

use std::{fs, path::Path};

use peft_core::{Names, files, fullmatch, tensors};
use proptest::prelude::*;

fn weights() -> Vec<u8> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/lora");
    fs::read(root.join("llama__r3/adapter_model.safetensors")).expect("a fixture")
}

proptest! {
    #[test]
    fn tensors_of_damaged_files(sets in prop::collection::vec((any::<usize>(), any::<u8>()), 1..8), cut in any::<usize>(), short in any::<bool>()) {
        let mut bytes = weights();
        for (at, byte) in sets {
            let at = at % bytes.len().min(1500);
            bytes[at] = byte;
        }
        if short {
            let end = cut % bytes.len();
            bytes.truncate(end);
        }
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("adapter_model.safetensors");
        fs::write(&path, bytes).expect("a file");
        if let Err(error) = tensors::read(&path) {
            prop_assert!(error.to_string().contains("adapter_model.safetensors"), "{error}");
        }
    }

    #[test]
    fn headers_that_lie(begin in any::<u64>(), end in any::<u64>(), dim in any::<u64>(), len in any::<u64>(), honest in any::<bool>()) {
        let header = format!(r#"{{"a":{{"dtype":"F32","shape":[{dim},{dim}],"data_offsets":[{begin},{end}]}}}}"#);
        let mut bytes = if honest { header.len() as u64 } else { len }.to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend([0; 64]);
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("x.safetensors");
        fs::write(&path, bytes).expect("a file");
        let _ = tensors::read(&path);
    }

    #[test]
    fn any_expression_on_any_name(pattern in ".{0,40}", name in "[a-z0-9._]{0,40}") {
        let _ = fullmatch(&pattern, &name);
        let _ = Names::Regex(pattern.clone()).matches(&name);
        let _ = Names::List(vec![pattern]).matches(&name);
    }

    #[test]
    fn any_text_as_json(text in ".{0,200}") {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("x.json");
        fs::write(&path, text).expect("a file");
        if let Err(error) = files::read_json(&path) {
            prop_assert!(error.to_string().contains("x.json"));
        }
    }
}

#[test]
fn json_that_nests_too_deep_is_an_error() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("deep.json");
    fs::write(&path, "[".repeat(1_000_000)).expect("a file");
    assert!(files::read_json(&path).is_err());
}

#[test]
fn a_file_that_cannot_be_written_leaves_the_old_one() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("x.txt");
    files::write_text(&path, "old").expect("written");
    let failed = files::write(&path, |file| {
        file.write_all(b"half of the ne")?;
        Err(std::io::Error::other("no space left"))
    });
    let error = failed.expect_err("failed").to_string();
    assert!(error.contains("no space left"));
    assert_eq!(fs::read_to_string(&path).expect("there"), "old");
    let left = fs::read_dir(dir.path()).expect("a folder").count();
    assert_eq!(left, 1, "nothing half is left");
}
