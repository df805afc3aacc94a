//! Running the program, and folders to run it on.

#![allow(dead_code, reason = "not every test file needs everything")]

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use peft::core::{State, tensors};

/// What the program said.
#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Said {
    /// The standard output of a run that went well.
    #[track_caller]
    pub(crate) fn ok(self) -> String {
        assert_eq!(self.code, Some(0), "{}{}", self.out, self.err);
        self.out
    }

    /// The error of a run that did not, which says all of `words` and is no bug.
    #[track_caller]
    pub(crate) fn fails(self, code: i32, words: &[&str]) -> String {
        assert_eq!(self.code, Some(code), "{}{}", self.out, self.err);
        for word in words {
            assert!(self.err.contains(word), "`{word}` is not in: {}", self.err);
        }
        assert!(
            !self.err.contains("internal error") && !self.err.contains("panicked"),
            "{}",
            self.err
        );
        self.err
    }
}

/// Runs `peft`, on one thread: tiny tensors gain nothing by more.
pub(crate) fn peft<S: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = S>) -> Said {
    fed(args, "")
}

/// Runs `peft` with something on its standard input.
pub(crate) fn fed<S: AsRef<std::ffi::OsStr>>(
    args: impl IntoIterator<Item = S>,
    input: &str,
) -> Said {
    let mut child = Command::new(env!("CARGO_BIN_EXE_peft"))
        .args(args)
        .env("OMP_NUM_THREADS", "1")
        .env("HF_HUB_OFFLINE", "1")
        .env("COLUMNS", "100")
        .current_dir(root())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // The program may end without reading.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    let output = child.wait_with_output().unwrap();
    Said {
        code: output.status.code(),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}

/// The root of the repository, from which adapters name their bases.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

pub(crate) fn fixture(path: &str) -> PathBuf {
    root().join("fixtures").join(path)
}

/// The tiny model that has a tokenizer, as typed in the root.
pub(crate) const TEXT: &str = "fixtures/models/llama-text";

/// A copy of a folder that a test may damage.
pub(crate) fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
        }
    }
}

/// The tensors under `prefix.`, without it.
pub(crate) fn under(state: &State, prefix: &str) -> State {
    let inner = state.iter().filter_map(|(key, it)| {
        let key = key.strip_prefix(prefix)?.strip_prefix('.')?;
        Some((key.to_owned(), it.shallow_clone()))
    });
    inner.collect()
}

/// Equal within 1e-5 of the largest, where `mask` is 1.
#[track_caller]
pub(crate) fn close(
    what: &str,
    ours: &tch::Tensor,
    python: &tch::Tensor,
    mask: Option<&tch::Tensor>,
) {
    assert_eq!(ours.size(), python.size(), "{what}");
    let ours = ours.to_kind(tch::Kind::Double);
    let python = python.to_kind(tch::Kind::Double);
    let mut difference = (&ours - &python).abs();
    if let Some(mask) = mask {
        difference *= mask.to_kind(tch::Kind::Double).unsqueeze(-1);
    }
    let distance =
        difference.max().double_value(&[]) / python.abs().max().double_value(&[]).max(1e-30);
    assert!(
        distance <= 1e-5,
        "{what} is off by {distance:.1e} of the largest"
    );
}

pub(crate) fn read(path: &Path) -> State {
    tensors::read(path).unwrap()
}
