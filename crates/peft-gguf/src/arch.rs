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

/// Keys that GPT-2 has besides.
const KNOWN_GPT2: &[&str] = &["attention.layer_norm_epsilon"];

/// Keys that the Llama family has besides.
const KNOWN_LLAMA: &[&str] = &[
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "attention.value_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.attn_factor",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "rope.scaling.yarn_ext_factor",
];

/// Understands the file, or says what about it cannot be.
pub(crate) fn plan(gguf: &Gguf) -> Result<Plan> {
    let meta = gguf.metadata();
    refuse_other_kinds(meta)?;
    let key = "general.architecture";
    let keys = Keys {
        meta,
        arch: meta.required(key, meta.text(key)?)?,
    };
    let family = match keys.arch {
        "llama" => Some(Family::LLAMA),
        "qwen2" => Some(Family::QWEN2),
        "qwen3" => Some(Family::QWEN3),
        "gpt2" => None,
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
    keys.refuse_unknown(match family {
        Some(_) => KNOWN_LLAMA,
        None => KNOWN_GPT2,
    })?;
    let (mut config, table) = match family {
        Some(family) => llama(gguf, &keys, family)?,
        None => gpt2(gguf, &keys)?,
    };
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
}

impl Table {
    fn add(&mut self, hf: impl Into<String>, gguf: impl Into<String>, shape: &[usize]) {
        self.lay(hf, gguf, shape, Layout::Same);
    }

    fn lay(
        &mut self,
        hf: impl Into<String>,
        gguf: impl Into<String>,
        shape: &[usize],
        layout: Layout,
    ) {
        self.tensors.push(Mapped {
            hf: hf.into(),
            gguf: gguf.into(),
            shape: shape.to_vec(),
            layout,
        });
    }
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
    // consumed by the configuration
    let read = |name: &str| wanted.contains(name) || name == ROPE_FREQS;
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

/// What sets the members of the Llama family apart.
#[derive(Clone, Copy)]
struct Family {
    model_type: &'static str,
    class: &'static str,
    /// Rows of query and key are interleaved in the file.
    rotary: bool,
    /// Query, key and value have biases (and the output projection has none).
    qkv_bias: bool,
    /// Query and key are normalised per head.
    qk_norm: bool,
}

impl Family {
    const LLAMA: Family = Family {
        model_type: "llama",
        class: "LlamaForCausalLM",
        rotary: true,
        qkv_bias: false,
        qk_norm: false,
    };
    /// A Llama with a window over its attention; GGUF has no architecture of its own for it.
    const MISTRAL: Family = Family {
        model_type: "mistral",
        class: "MistralForCausalLM",
        ..Family::LLAMA
    };
    const QWEN2: Family = Family {
        model_type: "qwen2",
        class: "Qwen2ForCausalLM",
        rotary: false,
        qkv_bias: true,
        qk_norm: false,
    };
    const QWEN3: Family = Family {
        model_type: "qwen3",
        class: "Qwen3ForCausalLM",
        rotary: false,
        qkv_bias: false,
        qk_norm: true,
    };
}

fn llama(gguf: &Gguf, keys: &Keys<'_>, family: Family) -> Result<(Map<String, Value>, Table)> {
    let window = keys.integer("attention.sliding_window")?.filter(|n| *n > 0);
    let family = match window {
        None => family,
        Some(_) if family.model_type == "llama" => Family::MISTRAL,
        Some(n) => {
            return keys.wrong(
                "attention.sliding_window",
                format!("{n} cannot be honoured"),
            );
        }
    };
    let layers = blocks(gguf, keys)?;
    let hidden = keys.size("embedding_length")?;
    let inner = keys.size("feed_forward_length")?;
    let heads = keys.size("attention.head_count")?;
    let kv_heads = keys.size_or("attention.head_count_kv", heads)?;
    let head_dim = head_dim(keys, hidden, heads)?;
    let vocab = vocab_size(gguf, keys, hidden)?;
    if !heads.is_multiple_of(kv_heads) {
        let problem = format!("{kv_heads} heads cannot serve {heads} query heads evenly");
        return keys.wrong("attention.head_count_kv", problem);
    }

    let tied = !gguf.has("output.weight");
    let attention_bias = !family.qkv_bias && gguf.has("blk.0.attn_q.bias");
    let mlp_bias = gguf.has("blk.0.ffn_gate.bias");
    let mut config = object(json!({
        "architectures": [family.class],
        "model_type": family.model_type,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": keys.size("context_length")?,
        "rms_norm_eps": keys.positive("attention.layer_norm_rms_epsilon")?,
        "rope_theta": rope_theta(keys)?,
        "rope_scaling": rope_scaling(gguf, keys, head_dim)?,
        "tie_word_embeddings": tied,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": true,
    }));
    match family.model_type {
        "llama" => {
            config.insert("attention_bias".into(), attention_bias.into());
            config.insert("mlp_bias".into(), mlp_bias.into());
        }
        "mistral" => {
            config.insert("sliding_window".into(), window.into());
        }
        // Qwen's window is off unless a configuration turns it on, which GGUF cannot say
        _ => {
            config.insert("use_sliding_window".into(), false.into());
            config.insert("sliding_window".into(), Value::Null);
        }
    }
    if family.model_type == "qwen3" {
        config.insert("attention_bias".into(), attention_bias.into());
    }

    let rotary = |heads| match family.rotary {
        true => Layout::Rotary { heads },
        false => Layout::Same,
    };
    // which of the optional biases there are, where `transformers` has a setting for them
    let bias_q = family.qkv_bias || attention_bias && family.model_type != "mistral";
    let bias_o = attention_bias && family.model_type != "mistral";
    let bias_mlp = mlp_bias && family.model_type == "llama";
    let (q, kv) = (
        product(keys, heads, head_dim)?,
        product(keys, kv_heads, head_dim)?,
    );
    let mut table = Table::default();
    table.add(
        "model.embed_tokens.weight",
        "token_embd.weight",
        &[vocab, hidden],
    );
    for n in 0..layers {
        let hf = format!("model.layers.{n}");
        let blk = format!("blk.{n}");
        let mut linear = |to: &str, from: &str, out, inp, bias: bool, layout| {
            table.lay(
                format!("{hf}.{to}.weight"),
                format!("{blk}.{from}.weight"),
                &[out, inp],
                layout,
            );
            if bias {
                table.lay(
                    format!("{hf}.{to}.bias"),
                    format!("{blk}.{from}.bias"),
                    &[out],
                    layout,
                );
            }
        };
        linear(
            "self_attn.q_proj",
            "attn_q",
            q,
            hidden,
            bias_q,
            rotary(heads),
        );
        linear(
            "self_attn.k_proj",
            "attn_k",
            kv,
            hidden,
            bias_q,
            rotary(kv_heads),
        );
        linear(
            "self_attn.v_proj",
            "attn_v",
            kv,
            hidden,
            bias_q,
            Layout::Same,
        );
        linear(
            "self_attn.o_proj",
            "attn_output",
            hidden,
            q,
            bias_o,
            Layout::Same,
        );
        linear(
            "mlp.gate_proj",
            "ffn_gate",
            inner,
            hidden,
            bias_mlp,
            Layout::Same,
        );
        linear(
            "mlp.up_proj",
            "ffn_up",
            inner,
            hidden,
            bias_mlp,
            Layout::Same,
        );
        linear(
            "mlp.down_proj",
            "ffn_down",
            hidden,
            inner,
            bias_mlp,
            Layout::Same,
        );
        let mut norm = |to: &str, from: &str, size| {
            table.add(
                format!("{hf}.{to}.weight"),
                format!("{blk}.{from}.weight"),
                &[size],
            );
        };
        if family.qk_norm {
            norm("self_attn.q_norm", "attn_q_norm", head_dim);
            norm("self_attn.k_norm", "attn_k_norm", head_dim);
        }
        norm("input_layernorm", "attn_norm", hidden);
        norm("post_attention_layernorm", "ffn_norm", hidden);
    }
    table.add("model.norm.weight", "output_norm.weight", &[hidden]);
    if !tied {
        table.add("lm_head.weight", "output.weight", &[vocab, hidden]);
    }
    Ok((config, table))
}

/// Values of all heads together.
fn product(keys: &Keys<'_>, heads: usize, head_dim: usize) -> Result<usize> {
    match heads.checked_mul(head_dim) {
        Some(n) => Ok(n),
        None => keys.wrong(
            "attention.key_length",
            format!("{heads} × {head_dim} is too much"),
        ),
    }
}

/// Values of one head, all of which must be rotated.
fn head_dim(keys: &Keys<'_>, hidden: usize, heads: usize) -> Result<usize> {
    let head_dim = match keys.integer("attention.key_length")? {
        Some(_) => keys.size("attention.key_length")?,
        None if hidden.is_multiple_of(heads) => hidden / heads,
        None => {
            let problem = format!("{heads} heads do not divide {hidden} values");
            return keys.wrong("attention.head_count", problem);
        }
    };
    if !head_dim.is_multiple_of(2) {
        let problem = format!("{head_dim} values in a head cannot be rotated in pairs");
        return keys.wrong("attention.head_count", problem);
    }
    for (key, what) in [
        ("attention.value_length", "values of another size"),
        (
            "rope.dimension_count",
            "a rotary embedding of part of a head",
        ),
    ] {
        let size = keys.size_or(key, head_dim)?;
        if size != head_dim {
            let problem = format!("{size}, where a head has {head_dim}: {what} cannot be honoured");
            return keys.wrong(key, problem);
        }
    }
    Ok(head_dim)
}

fn rope_theta(keys: &Keys<'_>) -> Result<f64> {
    match keys.float("rope.freq_base")? {
        None => Ok(10_000.0),
        Some(_) => keys.positive("rope.freq_base"),
    }
}

/// Llama 3 keeps its RoPE scaling as one factor for each pair of a head.
const ROPE_FREQS: &str = "rope_freqs.weight";

/// `rope_scaling` of `config.json`: null, or what changes the rotary embedding and how.
fn rope_scaling(gguf: &Gguf, keys: &Keys<'_>, head_dim: usize) -> Result<Value> {
    for (key, neutral) in [
        ("rope.scaling.attn_factor", 1.0),
        ("rope.scaling.yarn_attn_factor", 1.0),
        ("rope.scaling.yarn_ext_factor", 1.0),
        ("rope.scale_linear", 1.0),
    ] {
        let value = keys.float(key)?.unwrap_or(neutral);
        // ggml writes -1 for "as the scaling type has it"
        if value != neutral && !(key.ends_with("ext_factor") && value < 0.0) {
            return keys.wrong(key, format!("{value} cannot be honoured"));
        }
    }
    let key = "rope.scaling.type";
    let kind = keys.meta.text(&keys.full(key))?.unwrap_or("none");
    if gguf.has(ROPE_FREQS) {
        if kind != "none" {
            let problem = format!("`{}` and the tensor `{ROPE_FREQS}` at once", shown(kind));
            return keys.wrong(key, problem);
        }
        return llama3_scaling(gguf, keys, head_dim);
    }
    let factor = || keys.positive("rope.scaling.factor");
    match kind {
        "none" => Ok(Value::Null),
        "linear" => Ok(json!({"rope_type": "linear", "factor": factor()?})),
        "yarn" => {
            let original = keys.size("rope.scaling.original_context_length")?;
            let mut yarn = object(json!({
                "rope_type": "yarn",
                "factor": factor()?,
                "original_max_position_embeddings": original,
            }));
            for beta in ["beta_fast", "beta_slow"] {
                if let Some(value) = keys.float(&format!("rope.scaling.yarn_{beta}"))? {
                    yarn.insert(beta.into(), value.into());
                }
            }
            Ok(Value::Object(yarn))
        }
        other => {
            let problem = format!("`{}`, this build knows none, linear, yarn", shown(other));
            keys.wrong(key, problem)
        }
    }
}

/// Llama 3's scaling, recovered from its factors. `config.json` has the four numbers they were
/// computed from: `factor` is the largest of them; the others have been 1, 4 and 8192 in every
/// Llama release. They are written only if they yield the very factors of the file.
fn llama3_scaling(gguf: &Gguf, keys: &Keys<'_>, head_dim: usize) -> Result<Value> {
    let found = gguf.dequantise(ROPE_FREQS)?;
    let wrong = |problem: String| Err(Error::tensor(gguf.path(), ROPE_FREQS, problem));
    if found.len() != head_dim / 2 {
        return wrong(format!(
            "expected {} factors, got {}",
            head_dim / 2,
            found.len()
        ));
    }
    if found.iter().all(|f| *f == 1.0) {
        return Ok(Value::Null);
    }
    let factor = found.iter().copied().fold(1.0, f32::max);
    let (low, high) = (1.0, 4.0);
    let original = keys.size_or("rope.scaling.original_context_length", 8192)?;
    let theta = rope_theta(keys)?;
    let expected = |i: usize| {
        let frequency = theta.powf(-2.0 * i as f64 / head_dim as f64);
        let turns = original as f64 * frequency / std::f64::consts::TAU;
        let smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0);
        1.0 / ((1.0 - smooth) / f64::from(factor) + smooth)
    };
    // written so that NaN does not agree
    let agrees = |i: usize| (f64::from(found[i]) / expected(i) - 1.0).abs() < 1e-3;
    match (0..found.len()).find(|i| !agrees(*i)) {
        None => Ok(json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        })),
        Some(i) => wrong(format!(
            "factor {i} is {}, where a Llama 3 scaling of {factor} over {original} positions has {}; \
             `config.json` cannot express other ones",
            found[i],
            expected(i)
        )),
    }
}

fn gpt2(gguf: &Gguf, keys: &Keys<'_>) -> Result<(Map<String, Value>, Table)> {
    let layers = blocks(gguf, keys)?;
    let hidden = keys.size("embedding_length")?;
    let inner = keys.size("feed_forward_length")?;
    let heads = keys.size("attention.head_count")?;
    let positions = keys.size("context_length")?;
    let vocab = vocab_size(gguf, keys, hidden)?;
    if !hidden.is_multiple_of(heads) {
        let problem = format!("{heads} heads do not divide {hidden} values");
        return keys.wrong("attention.head_count", problem);
    }
    if keys.size_or("attention.head_count_kv", heads)? != heads {
        return keys.wrong(
            "attention.head_count_kv",
            "GPT-2 has as many as query heads",
        );
    }
    let tied = !gguf.has("output.weight");
    let config = object(json!({
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": vocab,
        "n_positions": positions,
        "n_ctx": positions,
        "n_embd": hidden,
        "n_layer": layers,
        "n_head": heads,
        "n_inner": inner,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": keys.positive("attention.layer_norm_epsilon")?,
        "attn_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "resid_pdrop": 0.1,
        "initializer_range": 0.02,
        "tie_word_embeddings": tied,
        "use_cache": true,
    }));

    let mut table = Table::default();
    table.add(
        "transformer.wte.weight",
        "token_embd.weight",
        &[vocab, hidden],
    );
    table.add(
        "transformer.wpe.weight",
        "position_embd.weight",
        &[positions, hidden],
    );
    for n in 0..layers {
        let (hf, blk) = (format!("transformer.h.{n}"), format!("blk.{n}"));
        let conv = [
            ("attn.c_attn", "attn_qkv", hidden, 3 * hidden),
            ("attn.c_proj", "attn_output", hidden, hidden),
            ("mlp.c_fc", "ffn_up", hidden, inner),
            ("mlp.c_proj", "ffn_down", inner, hidden),
        ];
        for (to, from, inp, out) in conv {
            let (to, from) = (format!("{hf}.{to}"), format!("{blk}.{from}"));
            table.lay(
                format!("{to}.weight"),
                format!("{from}.weight"),
                &[inp, out],
                Layout::Transposed,
            );
            table.add(format!("{to}.bias"), format!("{from}.bias"), &[out]);
        }
        for (to, from) in [("ln_1", "attn_norm"), ("ln_2", "ffn_norm")] {
            for part in ["weight", "bias"] {
                table.add(
                    format!("{hf}.{to}.{part}"),
                    format!("{blk}.{from}.{part}"),
                    &[hidden],
                );
            }
        }
    }
    table.add("transformer.ln_f.weight", "output_norm.weight", &[hidden]);
    table.add("transformer.ln_f.bias", "output_norm.bias", &[hidden]);
    if !tied {
        table.add("lm_head.weight", "output.weight", &[vocab, hidden]);
    }
    Ok((config, table))
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
