//! From a GGUF architecture to a Hugging Face one: configuration, names, layouts.
//!
//! For each architecture a table says which tensors there must be, what `transformers` calls them,
//! which shape the configuration gives them, and how the values were rearranged on the way into
//! the GGUF file. The whole file has to match the table: a tensor that is missing, left over or
//! mis-shaped is an error, because a model with one matrix too few still generates text.
//!
//! Two rearrangements occur:
//!
//! - *Rotary* (`llama`, not `qwen2` and `qwen3`): `transformers` rotates value i of a head together
//!   with i + d/2, ggml rotates 2i with 2i + 1; so the rows of the query and key projections are
//!   interleaved in the file. Row `2i + p` of a head there is row `p · d/2 + i` here.
//! - *Transposed* (`gpt2`): GPT-2's `Conv1D` keeps its weight as [in, out], GGUF as [out, in].
//!
//! Metadata keys of the architecture that are not in a list here are refused by name: each key that
//! llama.cpp ever added under an architecture changes what the model computes.

mod gpt2;
mod llama;

use crate::error::{Error, Result, nearest, shown};
use crate::file::Gguf;
use crate::metadata::{Array, Metadata, Value as Meta};
use serde_json::{Map, Value, json};
use std::collections::HashSet;
use std::path::Path;

/// A GGUF file understood as a Hugging Face checkpoint.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) config: Value,
    pub(crate) generation: Value,
    pub(crate) tensors: Vec<Mapped>,
}

/// One tensor under both of its names.
#[derive(Debug)]
pub(crate) struct Mapped {
    pub(crate) hf: String,
    pub(crate) gguf: String,
    /// The shape that Hugging Face expects.
    pub(crate) shape: Vec<usize>,
    pub(crate) layout: Layout,
}

/// How the values in the file relate to those that Hugging Face expects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layout {
    Same,
    /// Rows are interleaved within each of so many heads.
    Rotary {
        heads: usize,
    },
    Transposed,
}

/// Architecture keys that are understood in every architecture, without their `llama.` prefix.
const KNOWN: &[&str] = &[
    "attention.causal",
    "attention.head_count",
    "attention.head_count_kv",
    "block_count",
    "context_length",
    "embedding_length",
    "expert_count",
    "expert_used_count",
    "feed_forward_length",
    "pooling_type",
    "tensor_data_layout",
    "use_parallel_residual",
    "vocab_size",
];

/// The configuration and the tensors of one architecture.
type Build = fn(&Gguf, &Keys<'_>) -> Result<(Map<String, Value>, Table)>;

/// Understands the file, or says what about it cannot be.
pub(crate) fn plan(gguf: &Gguf) -> Result<Plan> {
    let meta = gguf.metadata();
    refuse_other_kinds(meta)?;
    let key = "general.architecture";
    let keys = Keys {
        meta,
        arch: meta.required(key, meta.text(key)?)?,
    };
    let build: Build = match keys.arch {
        "llama" => |gguf, keys| llama::build(gguf, keys, llama::LLAMA),
        "qwen2" => |gguf, keys| llama::build(gguf, keys, llama::QWEN2),
        "qwen3" => |gguf, keys| llama::build(gguf, keys, llama::QWEN3),
        "gpt2" => gpt2::build,
        other => {
            let known = ["llama", "qwen2", "qwen3", "gpt2"];
            let problem = format!(
                "unknown architecture `{}`, this build knows {}{}",
                shown(other),
                known.join(", "),
                nearest(other, known)
            );
            return Err(Error::key(meta.path(), key, problem));
        }
    };
    let (mut config, table) = build(gguf, &keys)?;
    check(gguf, &table)?;
    let vocab = gguf.tensor("token_embd.weight")?.shape[0];
    let generation = token_ids(meta, vocab, &mut config)?;
    Ok(Plan {
        config: Value::Object(config),
        generation,
        tensors: table.tensors,
    })
}

/// A GGUF file can also hold a LoRA adapter, a vision tower, blocks of another age, or the third part
/// of seven.
fn refuse_other_kinds(meta: &Metadata) -> Result<()> {
    if let Some(kind) = meta.text("general.type")?
        && kind != "model"
    {
        let problem = format!("expected `model`, got `{}`", shown(kind));
        return Err(Error::key(meta.path(), "general.type", problem));
    }
    if let Some(version) = meta.integer("general.quantization_version")?
        && version != 2
    {
        let problem = format!("block formats of version {version}, this build reads version 2");
        return Err(Error::key(
            meta.path(),
            "general.quantization_version",
            problem,
        ));
    }
    match meta.integer("split.count")? {
        None | Some(0 | 1) => Ok(()),
        Some(parts) => {
            let problem =
                format!("one of {parts} parts; join them with `llama-gguf-split --merge`");
            Err(Error::key(meta.path(), "split.count", problem))
        }
    }
}

/// The metadata below the name of the architecture.
struct Keys<'a> {
    meta: &'a Metadata,
    arch: &'a str,
}

impl Keys<'_> {
    fn full(&self, key: &str) -> String {
        format!("{}.{key}", self.arch)
    }

    fn path(&self) -> &Path {
        self.meta.path()
    }

    fn wrong<T>(&self, key: &str, problem: impl Into<String>) -> Result<T> {
        Err(Error::key(self.path(), &self.full(key), problem))
    }

    fn refuse_unknown(&self, own: &[&str]) -> Result<()> {
        let prefix = self.full("");
        let known = || KNOWN.iter().chain(own).copied();
        for (key, value) in self.meta.iter() {
            if let Some(name) = key.strip_prefix(&prefix)
                && !known().any(|k| k == name)
            {
                let problem = format!(
                    "{} is not understood and may change what the model computes{}",
                    value.describe(),
                    nearest(name, known())
                );
                return Err(Error::key(self.path(), key, problem));
            }
        }
        if self.integer("expert_count")?.unwrap_or(0) != 0 {
            return self.wrong("expert_count", "mixture-of-experts models cannot be read");
        }
        if self.meta.flag(&self.full("attention.causal"))? == Some(false) {
            return self.wrong("attention.causal", "only causal models can be read");
        }
        if self.meta.flag(&self.full("use_parallel_residual"))? == Some(true) {
            return self.wrong("use_parallel_residual", "cannot be honoured");
        }
        Ok(())
    }

    fn integer(&self, key: &str) -> Result<Option<u64>> {
        self.meta.integer(&self.full(key))
    }

    fn float(&self, key: &str) -> Result<Option<f64>> {
        self.meta.float(&self.full(key))
    }

    /// A size that has to be there, is not 0 and leaves room for products.
    fn size(&self, key: &str) -> Result<usize> {
        let size = self.meta.required(&self.full(key), self.integer(key)?)?;
        match size {
            1..=0x7fff_ffff => Ok(size as usize),
            _ => self.wrong(key, format!("expected 1 to 2147483647, got {size}")),
        }
    }

    fn size_or(&self, key: &str, default: usize) -> Result<usize> {
        match self.integer(key)? {
            None => Ok(default),
            Some(_) => self.size(key),
        }
    }

    /// A number greater than 0 that has to be there.
    fn positive(&self, key: &str) -> Result<f64> {
        let number = self.meta.required(&self.full(key), self.float(key)?)?;
        match number > 0.0 {
            true => Ok(number),
            false => self.wrong(key, format!("expected a number above 0, got {number}")),
        }
    }
}

/// The tensors of a model, as its configuration says they must be.
#[derive(Default)]
struct Table {
    tensors: Vec<Mapped>,
    /// Tensors of the file that became part of the configuration.
    consumed: Vec<&'static str>,
}

impl Table {
    /// One tensor that is stored as it is.
    fn add(&mut self, hf: impl Into<String>, gguf: impl Into<String>, shape: &[usize]) {
        self.tensors.push(Mapped {
            hf: hf.into(),
            gguf: gguf.into(),
            shape: shape.into(),
            layout: Layout::Same,
        });
    }

    /// The weight [out, in] of a linear layer (of a transposed one: [in, out]), and its bias [out].
    fn linear(&mut self, hf: &str, gguf: &str, linear: &Linear) {
        let Linear {
            out,
            inp,
            bias,
            layout,
        } = *linear;
        let shape = match layout {
            Layout::Transposed => [inp, out],
            _ => [out, inp],
        };
        self.tensors.push(Mapped {
            hf: format!("{hf}.weight"),
            gguf: format!("{gguf}.weight"),
            shape: shape.into(),
            layout,
        });
        if bias {
            self.tensors.push(Mapped {
                hf: format!("{hf}.bias"),
                gguf: format!("{gguf}.bias"),
                shape: vec![out],
                // the bias of a transposed layer has nothing to transpose
                layout: match layout {
                    Layout::Transposed => Layout::Same,
                    other => other,
                },
            });
        }
    }
}

/// The shape of a linear layer, and how its weight is stored.
struct Linear {
    out: usize,
    inp: usize,
    bias: bool,
    layout: Layout,
}

/// Every tensor of the table is in the file with its shape, and the file has no other.
fn check(gguf: &Gguf, table: &Table) -> Result<()> {
    for mapped in &table.tensors {
        let info = gguf.tensor(&mapped.gguf)?;
        let mut expected = mapped.shape.clone();
        if mapped.layout == Layout::Transposed {
            expected.reverse();
        }
        if info.shape != expected {
            let problem = format!("expected {expected:?}, got {:?}", info.shape);
            return Err(Error::tensor(gguf.path(), &info.name, problem));
        }
    }
    let wanted: HashSet<&str> = table.tensors.iter().map(|t| t.gguf.as_str()).collect();
    let read = |name: &str| wanted.contains(name) || table.consumed.contains(&name);
    match gguf.tensors().find(|info| !read(&info.name)) {
        None => Ok(()),
        Some(extra) => {
            let near = nearest(&extra.name, wanted.iter().copied());
            let problem = format!("is not part of this model{near}");
            Err(Error::tensor(gguf.path(), &extra.name, problem))
        }
    }
}

/// Refuses more blocks than the file could have, before a table of them is made.
fn blocks(gguf: &Gguf, keys: &Keys<'_>) -> Result<usize> {
    let (blocks, tensors) = (keys.size("block_count")?, gguf.tensors().len());
    match blocks <= tensors {
        true => Ok(blocks),
        false => keys.wrong(
            "block_count",
            format!("says {blocks} blocks, but the file has only {tensors} tensors"),
        ),
    }
}

/// The embedding's rows; where the file also states them as a number, both must agree.
fn vocab_size(gguf: &Gguf, keys: &Keys<'_>, width: usize) -> Result<usize> {
    let embedding = gguf.tensor("token_embd.weight")?;
    let &[rows, columns] = embedding.shape.as_slice() else {
        let problem = format!("expected two dimensions, got {:?}", embedding.shape);
        return Err(Error::tensor(gguf.path(), &embedding.name, problem));
    };
    if columns != width {
        let problem = format!("expected [_, {width}], got {:?}", embedding.shape);
        return Err(Error::tensor(gguf.path(), &embedding.name, problem));
    }
    match keys.integer("vocab_size")? {
        Some(stated) if stated != rows as u64 => keys.wrong(
            "vocab_size",
            format!("says {stated}, but `token_embd.weight` has {rows} rows"),
        ),
        _ => Ok(rows),
    }
}

/// Puts the special ids into `config` and returns `generation_config.json`. The end of a turn (`eot`)
/// and of a message (`eom`) stop generation like the end of the text (`eos`).
fn token_ids(meta: &Metadata, vocab: usize, config: &mut Map<String, Value>) -> Result<Value> {
    let tokens = meta.texts("tokenizer.ggml.tokens")?.unwrap_or_default();
    if tokens.len() > vocab {
        let problem = format!(
            "{} tokens, but the embedding has {vocab} rows",
            tokens.len()
        );
        return Err(Error::key(meta.path(), "tokenizer.ggml.tokens", problem));
    }
    let mut generation = object(json!({"_from_model_config": true}));
    for (role, name) in [
        ("bos", "bos_token_id"),
        ("eos", "eos_token_id"),
        ("padding", "pad_token_id"),
    ] {
        let id = token_id(meta, role, vocab)?;
        config.insert(name.into(), id.into());
        if let Some(id) = id {
            generation.insert(name.into(), id.into());
        }
    }
    let mut ends = Vec::new();
    for role in ["eos", "eot", "eom"] {
        ends.extend(token_id(meta, role, vocab)?.filter(|id| !ends.contains(id)));
    }
    if ends.len() > 1 {
        generation.insert("eos_token_id".into(), ends.into());
    }
    Ok(Value::Object(generation))
}

/// `tokenizer.ggml.<name>_token_id`, which must be below `vocab`.
pub(crate) fn token_id(meta: &Metadata, name: &str, vocab: usize) -> Result<Option<u64>> {
    let key = format!("tokenizer.ggml.{name}_token_id");
    match meta.integer(&key)? {
        Some(id) if id >= vocab as u64 => {
            let problem = format!("{id} is outside the vocabulary of {vocab}");
            Err(Error::key(meta.path(), &key, problem))
        }
        id => Ok(id),
    }
}

/// The numbers of an integer array, as the tokenizer's `token_type` is one.
pub(crate) fn integers(value: &Meta) -> Option<Vec<i64>> {
    match value {
        Meta::Array(Array::I32(v)) => Some(v.iter().map(|n| i64::from(*n)).collect()),
        Meta::Array(Array::U32(v)) => Some(v.iter().map(|n| i64::from(*n)).collect()),
        Meta::Array(Array::I64(v)) => Some(v.clone()),
        _ => None,
    }
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => unreachable!("only called on object literals"),
    }
}
