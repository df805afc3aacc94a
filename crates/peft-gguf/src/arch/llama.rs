//! The Llama family: `llama` (and Mistral, which is one in GGUF), `qwen2`, `qwen3`.

use super::{Keys, Layout, Linear, Table, blocks, object, vocab_size};
use crate::error::{Error, Result, shown};
use crate::file::Gguf;
use serde_json::{Map, Value, json};

/// What sets the members of the family apart.
#[derive(Clone, Copy)]
pub(super) struct Family {
    model_type: &'static str,
    class: &'static str,
    /// Rows of query and key are interleaved in the file.
    rotary: bool,
    attention_bias: Bias,
    /// Whether `mlp_bias` is a setting.
    mlp_bias: bool,
    /// Query and key are normalised per head.
    qk_norm: bool,
}

/// Which of the attention's projections have a bias.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Bias {
    None,
    /// Query, key and value.
    Qkv,
    /// All four or none: the setting `attention_bias`.
    Setting,
}

pub(super) const LLAMA: Family = Family {
    model_type: "llama",
    class: "LlamaForCausalLM",
    rotary: true,
    attention_bias: Bias::Setting,
    mlp_bias: true,
    qk_norm: false,
};

/// A Llama with a window over its attention; GGUF has no architecture of its own for it.
const MISTRAL: Family = Family {
    model_type: "mistral",
    class: "MistralForCausalLM",
    attention_bias: Bias::None,
    mlp_bias: false,
    ..LLAMA
};

pub(super) const QWEN2: Family = Family {
    model_type: "qwen2",
    class: "Qwen2ForCausalLM",
    rotary: false,
    attention_bias: Bias::Qkv,
    mlp_bias: false,
    qk_norm: false,
};

pub(super) const QWEN3: Family = Family {
    model_type: "qwen3",
    class: "Qwen3ForCausalLM",
    attention_bias: Bias::Setting,
    qk_norm: true,
    ..QWEN2
};

/// Keys that the Llama family has besides.
const KNOWN: &[&str] = &[
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

pub(super) fn build(
    gguf: &Gguf,
    keys: &Keys<'_>,
    family: Family,
) -> Result<(Map<String, Value>, Table)> {
    keys.refuse_unknown(KNOWN)?;
    let window = keys.integer("attention.sliding_window")?.filter(|n| *n > 0);
    let family = match window {
        None => family,
        Some(_) if family.model_type == "llama" => MISTRAL,
        Some(n) => {
            let problem = format!("{n} cannot be honoured");
            return keys.wrong("attention.sliding_window", problem);
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
    let attention_bias = family.attention_bias == Bias::Setting && gguf.has("blk.0.attn_q.bias");
    let mlp_bias = family.mlp_bias && gguf.has("blk.0.ffn_gate.bias");

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
    if family.attention_bias == Bias::Setting {
        config.insert("attention_bias".into(), attention_bias.into());
    }
    if family.mlp_bias {
        config.insert("mlp_bias".into(), mlp_bias.into());
    }
    match family.model_type {
        "llama" => {}
        "mistral" => {
            config.insert("sliding_window".into(), window.into());
        }
        // Qwen's window is off unless a configuration turns it on, which GGUF cannot say
        _ => {
            config.insert("use_sliding_window".into(), false.into());
            config.insert("sliding_window".into(), Value::Null);
        }
    }

    let plain = |out, inp, bias| Linear {
        out,
        inp,
        bias,
        layout: Layout::Same,
    };
    let rotary = |heads, bias| Linear {
        out: heads * head_dim,
        inp: hidden,
        bias,
        layout: match family.rotary {
            true => Layout::Rotary { heads },
            false => Layout::Same,
        },
    };
    let qkv_bias = attention_bias || family.attention_bias == Bias::Qkv;
    let linears = [
        ("self_attn.q_proj", "attn_q", rotary(heads, qkv_bias)),
        ("self_attn.k_proj", "attn_k", rotary(kv_heads, qkv_bias)),
        (
            "self_attn.v_proj",
            "attn_v",
            plain(kv_heads * head_dim, hidden, qkv_bias),
        ),
        (
            "self_attn.o_proj",
            "attn_output",
            plain(hidden, heads * head_dim, attention_bias),
        ),
        ("mlp.gate_proj", "ffn_gate", plain(inner, hidden, mlp_bias)),
        ("mlp.up_proj", "ffn_up", plain(inner, hidden, mlp_bias)),
        ("mlp.down_proj", "ffn_down", plain(hidden, inner, mlp_bias)),
    ];
    let mut norms = vec![
        ("input_layernorm", "attn_norm", hidden),
        ("post_attention_layernorm", "ffn_norm", hidden),
    ];
    if family.qk_norm {
        norms.push(("self_attn.q_norm", "attn_q_norm", head_dim));
        norms.push(("self_attn.k_norm", "attn_k_norm", head_dim));
    }

    let mut table = Table::default();
    table.add(
        "model.embed_tokens.weight",
        "token_embd.weight",
        &[vocab, hidden],
    );
    for n in 0..layers {
        let (hf, blk) = (format!("model.layers.{n}"), format!("blk.{n}"));
        for (to, from, linear) in &linears {
            table.linear(&format!("{hf}.{to}"), &format!("{blk}.{from}"), linear);
        }
        for (to, from, size) in &norms {
            table.add(
                format!("{hf}.{to}.weight"),
                format!("{blk}.{from}.weight"),
                &[*size],
            );
        }
    }
    table.add("model.norm.weight", "output_norm.weight", &[hidden]);
    if !tied {
        table.add("lm_head.weight", "output.weight", &[vocab, hidden]);
    }
    table.consumed.push(ROPE_FREQS);
    Ok((config, table))
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
    let kind = match keys.meta.text(&keys.full(key))? {
        Some(kind) => kind,
        // A factor without a type is a linear one to ggml, and none is a factor of 0.
        None => match keys.float("rope.scaling.factor")? {
            None | Some(0.0 | 1.0) => "none",
            Some(_) => "linear",
        },
    };
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
