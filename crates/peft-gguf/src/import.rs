//! Writing a GGUF file out as a Hugging Face folder.
//!
//! A safetensors file starts with a JSON header that says where each tensor will lie. All sizes are
//! known before any value is decoded, so the header goes first and the tensors are streamed behind
//! it: no more than one of them is in memory. Above 5 GB the weights become several files with an
//! index, as `transformers` does it.
//!
//! The folder is written beside its final place and renamed at the end. Whoever finds a folder with
//! that name finds a whole one.

use crate::error::{Error, Result};
use crate::file::Gguf;
use crate::tokenizer::{kind, write_tokenizer};
use crate::view::HfView;
use half::{bf16, f16};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

/// The largest shard, as in `transformers`: "5GB".
const SHARD_BYTES: u64 = 5_000_000_000;

/// How values are stored. Rounding is to the nearest, ties to even.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    /// 32-bit floats: exactly the values of the file.
    F32,
    /// 16-bit floats of IEEE 754; values above 65504 would become infinite and are refused.
    F16,
    /// The upper half of a 32-bit float.
    BF16,
}

/// What was imported.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Imported {
    /// The folder.
    pub folder: PathBuf,
    /// `model_type` of `config.json`.
    pub model_type: String,
    /// How many tensors were written.
    pub tensors: usize,
    /// How many values they have.
    pub parameters: u64,
    /// How many bytes of weights were written.
    pub bytes: u64,
    /// How many tensors of each ggml format were read.
    pub formats: BTreeMap<&'static str, usize>,
    /// The kind of tokenizer; `None` if the file has none, and then none was written.
    pub tokenizer: Option<String>,
}

/// Writes the Hugging Face folder `out` from the GGUF file `file`.
///
/// `out` must not exist or be empty. `progress` is called after each tensor with how many are done,
/// how many there are, and the name of the one just written.
pub fn import(
    file: &Path,
    out: &Path,
    dtype: Dtype,
    progress: &mut dyn FnMut(usize, usize, &str),
) -> Result<Imported> {
    let view = HfView::new(Gguf::open(file)?)?;
    let tokenizer = kind(view.gguf().metadata())?.map(str::to_owned);
    check_free(out)?;
    let staging = Staging::beside(out)?;
    let mut config = view.config().clone();
    config["torch_dtype"] = dtype.torch().into();
    write_json(&staging.path.join("config.json"), &config)?;
    let generation = view.generation_config();
    write_json(&staging.path.join("generation_config.json"), &generation)?;
    if tokenizer.is_some() {
        write_tokenizer(view.gguf(), &staging.path)?;
    }
    let bytes = write_weights(&view, &staging.path, dtype, SHARD_BYTES, progress)?;
    staging.rename(out)?;

    let mut formats = BTreeMap::new();
    for info in view.gguf().tensors() {
        *formats.entry(info.kind.name()).or_default() += 1;
    }
    Ok(Imported {
        folder: out.into(),
        model_type: config["model_type"].as_str().unwrap_or_default().into(),
        tensors: view.names().len(),
        parameters: bytes / dtype.bytes(),
        bytes,
        formats,
        tokenizer,
    })
}

impl Dtype {
    /// Bytes of one value.
    fn bytes(self) -> u64 {
        match self {
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::BF16 => 2,
        }
    }

    /// What safetensors calls it.
    fn tag(self) -> &'static str {
        match self {
            Dtype::F32 => "F32",
            Dtype::F16 => "F16",
            Dtype::BF16 => "BF16",
        }
    }

    /// What PyTorch calls it.
    fn torch(self) -> &'static str {
        match self {
            Dtype::F32 => "float32",
            Dtype::F16 => "float16",
            Dtype::BF16 => "bfloat16",
        }
    }

    /// Appends `values` to `out`.
    fn encode(self, values: &[f32], out: &mut Vec<u8>) {
        match self {
            Dtype::F32 => append(values, out, f32::to_le_bytes),
            Dtype::F16 => append(values, out, |x| f16::from_f32(x).to_le_bytes()),
            Dtype::BF16 => append(values, out, |x| bf16::from_f32(x).to_le_bytes()),
        }
    }
}

fn append<const N: usize>(values: &[f32], out: &mut Vec<u8>, encode: impl Fn(f32) -> [u8; N]) {
    let start = out.len();
    out.resize(start + values.len() * N, 0);
    for (value, bytes) in values.iter().zip(out[start..].as_chunks_mut().0) {
        *bytes = encode(*value);
    }
}

/// Nothing is overwritten.
fn check_free(out: &Path) -> Result<()> {
    let taken = |problem: &str| {
        Err(Error::Target {
            path: out.into(),
            problem: problem.into(),
        })
    };
    match fs::read_dir(out) {
        Ok(mut entries) => match entries.next() {
            Some(_) => taken("the folder is not empty"),
            None => Ok(()),
        },
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(_) if out.exists() => taken("exists and is not a folder"),
        Err(e) => Err(Error::io(out, "open", e)),
    }
}

/// A folder that disappears unless it is renamed.
struct Staging {
    path: PathBuf,
}

impl Staging {
    fn beside(out: &Path) -> Result<Staging> {
        let Some(name) = out.file_name() else {
            return Err(Error::Target {
                path: out.into(),
                problem: "expected the name of a new folder".into(),
            });
        };
        let parent = out.parent().filter(|p| !p.as_os_str().is_empty());
        let parent = parent.unwrap_or(Path::new("."));
        fs::create_dir_all(parent).map_err(|e| Error::io(parent, "create", e))?;
        // what an interrupted process left behind may be in the way
        (0..)
            .find_map(|n: u32| {
                let name = name.to_string_lossy();
                let path = parent.join(format!(".{name}.{}.{n}.partial", std::process::id()));
                match fs::create_dir(&path) {
                    Ok(()) => Some(Ok(Staging { path })),
                    Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => None,
                    Err(e) => Some(Err(Error::io(&path, "create", e))),
                }
            })
            .expect("some number is free")
    }

    fn rename(self, out: &Path) -> Result<()> {
        fs::rename(&self.path, out).map_err(|e| Error::io(out, "rename into place", e))
    }
}

impl Drop for Staging {
    /// After a rename there is nothing left to remove; otherwise this is the clean-up of an error
    /// that is already on its way, and its own failure would only hide that one.
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// Writes all tensors, in shards of at most `limit` bytes; how many bytes they have.
fn write_weights(
    view: &HfView,
    dir: &Path,
    dtype: Dtype,
    limit: u64,
    progress: &mut dyn FnMut(usize, usize, &str),
) -> Result<u64> {
    let names = view.names();
    let shards = shards(view, &names, dtype, limit);
    let mut weight_map = Map::new();
    let (mut done, mut total) = (0, 0);
    for (n, shard) in shards.iter().enumerate() {
        let file = match shards.len() {
            1 => "model.safetensors".to_owned(),
            count => format!("model-{:05}-of-{count:05}.safetensors", n + 1),
        };
        total += write_shard(view, &dir.join(&file), shard, dtype, &mut |name| {
            done += 1;
            progress(done, names.len(), name);
        })?;
        weight_map.extend(
            shard
                .iter()
                .map(|t| (t.name.to_owned(), file.as_str().into())),
        );
    }
    if shards.len() > 1 {
        let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
        write_json(&dir.join("model.safetensors.index.json"), &index)?;
    }
    Ok(total)
}

/// One tensor to be written.
struct Entry<'a> {
    name: &'a str,
    shape: &'a [usize],
    bytes: u64,
}

/// Fills shards in the order of the model; a tensor above the limit gets one of its own.
fn shards<'a>(
    view: &'a HfView,
    names: &'a [String],
    dtype: Dtype,
    limit: u64,
) -> Vec<Vec<Entry<'a>>> {
    let mut shards: Vec<Vec<Entry<'_>>> = Vec::new();
    let mut room = 0;
    for name in names {
        let shape = view.shape(name).expect("the name is the view's own");
        let bytes = shape.iter().product::<usize>() as u64 * dtype.bytes();
        let entry = Entry { name, shape, bytes };
        match shards.last_mut() {
            Some(shard) if bytes <= room => {
                shard.push(entry);
                room -= bytes;
            }
            _ => {
                shards.push(vec![entry]);
                room = limit.saturating_sub(bytes);
            }
        }
    }
    shards
}

/// Writes one safetensors file: u64 length of the header, header, data.
fn write_shard(
    view: &HfView,
    path: &Path,
    shard: &[Entry<'_>],
    dtype: Dtype,
    done: &mut dyn FnMut(&str),
) -> Result<u64> {
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut at = 0;
    for tensor in shard {
        let offsets = [at, at + tensor.bytes];
        header.insert(
            tensor.name.into(),
            json!({"dtype": dtype.tag(), "shape": tensor.shape, "data_offsets": offsets}),
        );
        at += tensor.bytes;
    }
    let mut header = Value::Object(header).to_string();
    while !header.len().is_multiple_of(8) {
        header.push(' ');
    }

    let failed = |e| Error::io(path, "write", e);
    let mut file = File::create(path).map_err(failed)?;
    file.write_all(&(header.len() as u64).to_le_bytes())
        .map_err(failed)?;
    file.write_all(header.as_bytes()).map_err(failed)?;
    let mut buffer = Vec::new();
    for tensor in shard {
        let values = view.tensor(tensor.name)?;
        if dtype == Dtype::F16 {
            check_f16(view, tensor.name, &values)?;
        }
        for values in values.chunks(1 << 20) {
            buffer.clear();
            dtype.encode(values, &mut buffer);
            file.write_all(&buffer).map_err(failed)?;
        }
        done(tensor.name);
    }
    file.sync_all().map_err(failed)?;
    Ok(at)
}

/// A finite value that f16 can only call infinite must not get lost without a word.
fn check_f16(view: &HfView, name: &str, values: &[f32]) -> Result<()> {
    match values.iter().find(|x| x.is_finite() && x.abs() >= 65520.0) {
        None => Ok(()),
        Some(x) => {
            let problem = format!("has the value {x}, too large for f16; use bf16 or f32");
            Err(Error::tensor(view.gguf().path(), name, problem))
        }
    }
}

pub(crate) fn write_json(path: &Path, value: &Value) -> Result<()> {
    let write = || -> std::io::Result<()> {
        let mut file = BufWriter::new(File::create(path)?);
        serde_json::to_writer_pretty(&mut file, value)?;
        file.write_all(b"\n")?;
        file.flush()
    };
    write().map_err(|e| Error::io(path, "write", e))
}

pub(crate) fn write_text(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).map_err(|e| Error::io(path, "write", e))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rounds to the nearest of two neighbours that are `step` apart, ties to the even multiple.
    fn nearest_even(x: f64, step: f64) -> f64 {
        (x / step).round_ties_even() * step
    }

    #[test]
    fn sixteen_bits_are_rounded_to_nearest_even() {
        // ties in both directions, their neighbours, and values all over the range
        let mut values: Vec<f32> = (0..4096).map(|i| 1.0 + i as f32 / 16384.0).collect();
        values.extend([0.0, -0.0, 1e-7, 3.1e-5, -6.1e-5, 65504.0, 65519.9, -1.5e-8]);
        let noise = (0..20_000u32).map(|i| f32::from_bits(i.wrapping_mul(2_654_435_761)));
        values.extend(noise.filter(|x| x.abs() < 65519.0));
        let check = |dtype: Dtype, bits: i32, smallest: i32, decode: fn([u8; 2]) -> f32| {
            let mut bytes = Vec::new();
            dtype.encode(&values, &mut bytes);
            for (x, b) in values.iter().zip(bytes.as_chunks().0) {
                let exponent = (f64::from(x.abs()).log2().floor() as i32).max(smallest);
                let want = nearest_even(f64::from(*x), 2f64.powi(exponent - bits));
                let got = f64::from(decode(*b));
                assert_eq!(got.to_bits(), want.to_bits(), "{x:e} as {dtype:?}");
            }
        };
        check(Dtype::F16, 10, -14, |b| f16::from_le_bytes(b).to_f32());
        check(Dtype::BF16, 7, -126, |b| bf16::from_le_bytes(b).to_f32());
    }

    #[test]
    fn large_models_become_shards_with_an_index() {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/gguf");
        let view = HfView::new(Gguf::open(&fixtures.join("qwen3.gguf")).unwrap()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        // the embedding (333 × 16 values) alone is above the limit
        let mut seen = 0;
        let bytes = write_weights(&view, dir.path(), Dtype::BF16, 5000, &mut |done, _, _| {
            seen += 1;
            assert_eq!(done, seen);
        })
        .unwrap();
        let read = |name: &str| fs::read(dir.path().join(name)).unwrap();
        let index: Value = serde_json::from_slice(&read("model.safetensors.index.json")).unwrap();
        assert_eq!(index["metadata"]["total_size"], bytes);
        let map = index["weight_map"].as_object().unwrap();
        assert_eq!(map.len(), view.names().len());
        let files: std::collections::BTreeSet<_> =
            map.values().map(|v| v.as_str().unwrap()).collect();
        assert!(files.len() > 2);
        for file in files {
            let bytes = read(file);
            let shard = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            assert!(shard.len() == 1 || bytes.len() < 5000 + 2000);
            assert!(shard.names().iter().all(|name| map[*name] == *file));
        }
    }
}
