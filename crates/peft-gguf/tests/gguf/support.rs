//! The fixtures, and a writer for files that no honest program writes.

use std::path::{Path, PathBuf};

/// A file of `fixtures/gguf`.
pub(crate) fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../fixtures/gguf")
        .join(name)
}

/// The names of the model fixtures.
pub(crate) const MODELS: [&str; 5] = ["llama", "mistral", "qwen2", "qwen3", "gpt2"];

/// Value `i` of the tensor `name` in every model fixture, as `make.py` has it.
pub(crate) fn values(name: &str, count: usize) -> Vec<f32> {
    let hash = name.bytes().fold(2_166_136_261u32, |h, byte| {
        (h ^ u32::from(byte)).wrapping_mul(16_777_619)
    });
    let bits = |i: u32| hash.wrapping_add(i.wrapping_mul(2_654_435_761)) >> 21;
    (0..count as u32)
        .map(|i| (bits(i) as f32 - 1024.0) / 1024.0)
        .collect()
}

/// A value type of the format, with its bytes.
pub(crate) enum Kv<'a> {
    U32(u32),
    F32(f32),
    Bool(bool),
    Text(&'a str),
    Texts(Vec<String>),
    Ints(Vec<i32>),
    Floats(Vec<f32>),
    /// Type and bytes as they come.
    Raw(u32, Vec<u8>),
}

/// A tensor: dims as in the file (fastest first), type, offset, bytes.
pub(crate) struct Row {
    pub(crate) name: String,
    pub(crate) dims: Vec<u64>,
    pub(crate) kind: u32,
    pub(crate) offset: Option<u64>,
    pub(crate) data: Vec<u8>,
}

/// A GGUF file to be. Everything about it can be a lie.
pub(crate) struct Writer {
    pub(crate) magic: [u8; 4],
    pub(crate) version: u32,
    pub(crate) tensor_count: Option<u64>,
    pub(crate) key_count: Option<u64>,
    pub(crate) keys: Vec<(String, u32, Vec<u8>)>,
    pub(crate) tensors: Vec<Row>,
    pub(crate) alignment: usize,
}

impl Writer {
    pub(crate) fn new() -> Self {
        Writer {
            magic: *b"GGUF",
            version: 3,
            tensor_count: None,
            key_count: None,
            keys: Vec::new(),
            tensors: Vec::new(),
            alignment: 32,
        }
    }

    pub(crate) fn key(mut self, key: &str, value: Kv<'_>) -> Self {
        let (kind, bytes) = match value {
            Kv::U32(n) => (4, n.to_le_bytes().to_vec()),
            Kv::F32(x) => (6, x.to_le_bytes().to_vec()),
            Kv::Bool(flag) => (7, vec![flag.into()]),
            Kv::Text(text) => (8, string(text)),
            Kv::Texts(texts) => (9, array(8, texts.iter().map(|t| string(t)))),
            Kv::Ints(ints) => (9, array(5, ints.iter().map(|n| n.to_le_bytes().to_vec()))),
            Kv::Floats(all) => (9, array(6, all.iter().map(|x| x.to_le_bytes().to_vec()))),
            Kv::Raw(kind, bytes) => (kind, bytes),
        };
        self.keys.push((key.into(), kind, bytes));
        self
    }

    pub(crate) fn f32(mut self, name: &str, dims: &[u64], values: &[f32]) -> Self {
        self.tensors.push(Row {
            name: name.into(),
            dims: dims.into(),
            kind: 0,
            offset: None,
            data: values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        });
        self
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut out = self.magic.to_vec();
        out.extend(self.version.to_le_bytes());
        let count = self.tensor_count.unwrap_or(self.tensors.len() as u64);
        out.extend(count.to_le_bytes());
        let count = self.key_count.unwrap_or(self.keys.len() as u64);
        out.extend(count.to_le_bytes());
        for (key, kind, bytes) in &self.keys {
            out.extend(string(key));
            out.extend(kind.to_le_bytes());
            out.extend(bytes);
        }
        let mut at = 0;
        for row in &self.tensors {
            out.extend(string(&row.name));
            out.extend((row.dims.len() as u32).to_le_bytes());
            row.dims.iter().for_each(|d| out.extend(d.to_le_bytes()));
            out.extend(row.kind.to_le_bytes());
            out.extend(row.offset.unwrap_or(at).to_le_bytes());
            at += row.data.len().next_multiple_of(self.alignment) as u64;
        }
        for row in &self.tensors {
            out.resize(out.len().next_multiple_of(self.alignment), 0);
            out.extend(&row.data);
        }
        out
    }

    /// The file, in a folder that lives as long as the first value.
    pub(crate) fn file(&self) -> (tempfile::TempDir, PathBuf) {
        file(&self.bytes())
    }
}

/// A file with these bytes, in a folder that lives as long as the first value.
pub(crate) fn file(bytes: &[u8]) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    std::fs::write(&path, bytes).unwrap();
    (dir, path)
}

pub(crate) fn string(text: &str) -> Vec<u8> {
    let mut out = (text.len() as u64).to_le_bytes().to_vec();
    out.extend(text.bytes());
    out
}

fn array(kind: u32, items: impl ExactSizeIterator<Item = Vec<u8>>) -> Vec<u8> {
    let mut out = kind.to_le_bytes().to_vec();
    out.extend((items.len() as u64).to_le_bytes());
    out.extend(items.flatten());
    out
}
