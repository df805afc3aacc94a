//! `config.json`: every key that changes numbers is read, or refused by name.
//!
//! A key that the classes of `transformers` do not read either has no effect
//! there and none here. A key that they read and that this build has not
//! learnt is an error: a model that computes almost the right thing is worse
//! than none.

use std::path::{Path, PathBuf};

use peft_core::{Error, Result};
use serde_json::Value;

use crate::{activation::Activation, rope::Rope};

mod bert;
mod t5;

pub(crate) use bert::BertConfig;
pub(crate) use t5::T5Config;

/// A `config.json` and where it lies, for error messages.
#[derive(Debug, Clone)]
pub(crate) struct Keys {
    pub(crate) json: Value,
    pub(crate) path: PathBuf,
}

impl Keys {
    pub(crate) fn new(json: Value, path: &Path) -> Result<Keys> {
        if !json.is_object() {
            return Err(Error::file(path, "not a JSON object"));
        }
        let path = path.to_owned();
        Ok(Keys { json, path })
    }

    /// Part of this configuration, as `rope_parameters` is.
    fn inner(&self, key: &str) -> Option<Keys> {
        let json = self.json.get(key).filter(|it| it.is_object())?.clone();
        let path = self.path.clone();
        Some(Keys { json, path })
    }

    pub(crate) fn fault(&self, key: &str, wanted: &str) -> Error {
        let found = match self.json.get(key) {
            None => "is missing".to_owned(),
            Some(value) => {
                let text: String = value.to_string().chars().take(80).collect();
                format!("is {text}")
            }
        };
        Error::file(&self.path, format!("`{key}` {found}, {wanted}"))
    }

    pub(crate) fn get(&self, key: &str) -> Option<&Value> {
        self.json.get(key).filter(|it| !it.is_null())
    }

    pub(crate) fn text(&self, key: &str) -> Result<Option<&str>> {
        let text = |it: &'static str| it;
        self.get(key)
            .map(|it| {
                it.as_str()
                    .ok_or_else(|| self.fault(key, text("expected a string")))
            })
            .transpose()
    }

    pub(crate) fn flag(&self, key: &str, default: bool) -> Result<bool> {
        match self.get(key) {
            None => Ok(default),
            Some(it) => it
                .as_bool()
                .ok_or_else(|| self.fault(key, "expected true or false")),
        }
    }

    pub(crate) fn float(&self, key: &str) -> Result<Option<f64>> {
        self.get(key)
            .map(|it| {
                let number = it.as_f64().filter(|it| it.is_finite());
                number.ok_or_else(|| self.fault(key, "expected a number"))
            })
            .transpose()
    }

    /// A size: a whole number above zero that fits a tensor.
    pub(crate) fn size(&self, key: &str) -> Result<Option<i64>> {
        self.get(key)
            .map(|it| {
                let size = it.as_i64().filter(|it| (1..=1 << 31).contains(it));
                size.ok_or_else(|| self.fault(key, "expected a whole number above zero"))
            })
            .transpose()
    }

    /// A whole number, whatever its sign.
    pub(crate) fn whole(&self, key: &str) -> Result<Option<i64>> {
        self.get(key)
            .map(|it| {
                it.as_i64()
                    .ok_or_else(|| self.fault(key, "expected a whole number"))
            })
            .transpose()
    }

    /// The number of a token, below the size of the vocabulary.
    pub(crate) fn id(&self, key: &str, vocab: i64) -> Result<Option<i64>> {
        self.get(key)
            .map(|it| {
                let id = it.as_i64().filter(|it| (0..vocab).contains(it));
                id.ok_or_else(|| self.fault(key, &format!("expected a token below {vocab}")))
            })
            .transpose()
    }

    /// `pad_token_id`, the row of the embedding that being looked up does not train: `default` where the key is missing, none where
    /// it is null. Counts from the end if it is negative.
    pub(crate) fn padding_idx(&self, vocab: i64, default: Option<i64>) -> Result<Option<i64>> {
        const KEY: &str = "pad_token_id";
        let Some(value) = self.json.get(KEY) else {
            return Ok(default.filter(|it| *it < vocab));
        };
        if value.is_null() {
            return Ok(None);
        }
        match value.as_i64() {
            Some(id) if (0..vocab).contains(&id) => Ok(Some(id)),
            Some(id) if (-vocab..0).contains(&id) => Ok(Some(vocab + id)),
            _ => Err(self.fault(KEY, &format!("expected a token below {vocab}"))),
        }
    }

    pub(crate) fn need<T>(&self, key: &str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| self.fault(key, "which this model needs"))
    }

    pub(crate) fn size_of(&self, key: &str) -> Result<i64> {
        self.need(key, self.size(key)?)
    }

    pub(crate) fn share(&self, key: &str, default: f64) -> Result<f64> {
        let p = self.float(key)?.unwrap_or(default);
        if (0.0..1.0).contains(&p) {
            return Ok(p);
        }
        Err(self.fault(key, "expected a probability from 0 up to 1"))
    }

    pub(crate) fn positive(&self, key: &str, default: f64) -> Result<f64> {
        let x = self.float(key)?.unwrap_or(default);
        if x > 0.0 {
            return Ok(x);
        }
        Err(self.fault(key, "expected a number above zero"))
    }

    pub(crate) fn activation(&self, key: &str, default: &str) -> Result<Activation> {
        let name = self.text(key)?.unwrap_or(default);
        Activation::named(name).ok_or_else(|| {
            let known: Vec<&str> = Activation::NAMES.iter().map(|(name, _)| *name).collect();
            self.fault(key, &format!("known are {known:?}"))
        })
    }
}

/// What tells one member of the Llama family from another.
#[derive(Debug, Clone)]
pub(crate) struct LlamaConfig {
    pub(crate) model_type: String,
    pub(crate) vocab: i64,
    pub(crate) hidden: i64,
    pub(crate) intermediate: i64,
    pub(crate) layers: usize,
    pub(crate) heads: i64,
    pub(crate) kv_heads: i64,
    pub(crate) head_dim: i64,
    pub(crate) activation: Activation,
    pub(crate) max_positions: i64,
    pub(crate) eps: f64,
    pub(crate) rope: Rope,
    /// Biases on the projections of queries, keys and values.
    pub(crate) qkv_bias: bool,
    /// A bias on the output of attention.
    pub(crate) output_bias: bool,
    pub(crate) mlp_bias: bool,
    /// RMSNorm on each head of queries and keys (Qwen 3).
    pub(crate) qk_norm: bool,
    /// For each layer, how many positions it looks back, itself included; `None`: all.
    pub(crate) windows: Vec<Option<i64>>,
    pub(crate) attention_dropout: f64,
    /// [`Keys::padding_idx`].
    pub(crate) padding_idx: Option<i64>,
    pub(crate) json: Value,
}

impl LlamaConfig {
    pub(crate) fn read(keys: &Keys) -> Result<LlamaConfig> {
        let model_type = keys
            .need("model_type", keys.text("model_type")?)?
            .to_owned();
        let (qwen2, qwen3) = (model_type == "qwen2", model_type == "qwen3");
        let vocab = keys.size_of("vocab_size")?;
        let hidden = keys.size_of("hidden_size")?;
        let heads = keys.size_of("num_attention_heads")?;
        let kv_heads = match keys.size("num_key_value_heads")? {
            Some(n) => n,
            None if model_type == "mistral" => 8,
            None => heads,
        };
        if heads % kv_heads != 0 {
            return Err(keys.fault(
                "num_key_value_heads",
                "which does not divide num_attention_heads",
            ));
        }
        let head_dim = match keys.size("head_dim")? {
            Some(d) => d,
            None if qwen3 => 128,
            None if hidden % heads == 0 => hidden / heads,
            None => {
                return Err(keys.fault("hidden_size", "which num_attention_heads does not divide"));
            }
        };
        if head_dim % 2 != 0 {
            return Err(keys.fault("head_dim", "but rotary embeddings need an even width"));
        }
        let layers = keys.size_of("num_hidden_layers")? as usize;
        let max_positions = match keys.size("max_position_embeddings")? {
            Some(n) => n,
            None => match model_type.as_str() {
                "llama" => 2048,
                "mistral" => 4096 * 32,
                _ => 32768,
            },
        };
        let attention_bias =
            !qwen2 && model_type != "mistral" && keys.flag("attention_bias", false)?;
        Ok(LlamaConfig {
            vocab,
            hidden,
            intermediate: keys.size_of("intermediate_size")?,
            layers,
            heads,
            kv_heads,
            head_dim,
            activation: keys.activation("hidden_act", "silu")?,
            max_positions,
            eps: keys.positive("rms_norm_eps", 1e-6)?,
            rope: rope(keys, head_dim, max_positions)?,
            qkv_bias: qwen2 || attention_bias,
            output_bias: attention_bias,
            mlp_bias: model_type == "llama" && keys.flag("mlp_bias", false)?,
            qk_norm: qwen3,
            windows: windows(keys, &model_type, layers)?,
            attention_dropout: keys.share("attention_dropout", 0.0)?,
            padding_idx: keys.padding_idx(vocab, None)?,
            model_type,
            json: keys.json.clone(),
        })
    }
}

/// Which layers look back how far, as each configuration class of `transformers` decides it.
fn windows(keys: &Keys, model_type: &str, layers: usize) -> Result<Vec<Option<i64>>> {
    let window = || keys.size("sliding_window");
    let whole = vec![None; layers];
    match model_type {
        "mistral" => {
            let default =
                (!keys.json.get("sliding_window").is_some_and(Value::is_null)).then_some(4096);
            return Ok(vec![window()?.or(default); layers]);
        }
        "qwen2" | "qwen3" => {}
        _ => return Ok(whole),
    }
    let sliding = match keys.flag("use_sliding_window", false)? {
        true => Some(window()?.unwrap_or(4096)),
        false => None,
    };
    let Some(types) = keys.get("layer_types") else {
        let first = match keys.get("max_window_layers") {
            None => 28,
            Some(n) => n
                .as_u64()
                .ok_or_else(|| keys.fault("max_window_layers", "expected a whole number"))?,
        } as usize;
        return Ok((0..layers)
            .map(|i| sliding.filter(|_| i >= first))
            .collect());
    };
    let bad = || {
        keys.fault(
            "layer_types",
            "expected one `full_attention` or `sliding_attention` a layer",
        )
    };
    let types = types
        .as_array()
        .filter(|it| it.len() == layers)
        .ok_or_else(bad)?;
    let one = |it: &Value| match it.as_str() {
        Some("full_attention") => Ok(None),
        Some("sliding_attention") if sliding.is_some() => Ok(sliding),
        _ => Err(bad()),
    };
    types.iter().map(one).collect()
}

/// Rotary embeddings from `rope_parameters`, or the older `rope_theta` and `rope_scaling`.
fn rope(keys: &Keys, head_dim: i64, max_positions: i64) -> Result<Rope> {
    for key in ["rope_parameters", "rope_scaling"] {
        if keys.get(key).is_some_and(|it| !it.is_object()) {
            return Err(keys.fault(key, "expected an object"));
        }
    }
    let found = keys
        .inner("rope_parameters")
        .or_else(|| keys.inner("rope_scaling"));
    let inner = match found {
        Some(inner) => inner,
        None => Keys::new(serde_json::json!({}), &keys.path)?,
    };
    let theta = match inner.get("rope_theta") {
        Some(_) => inner.positive("rope_theta", 1e4)?,
        None => keys.positive("rope_theta", 1e4)?,
    };
    for at in [&inner, keys] {
        if at
            .float("partial_rotary_factor")?
            .is_some_and(|it| it != 1.0)
        {
            return Err(at.fault("partial_rotary_factor", "but these models turn whole heads"));
        }
    }
    let kind = match inner.text("rope_type")? {
        Some(kind) => kind,
        None => inner.text("type")?.unwrap_or("default"),
    };
    let factor = || {
        let factor = inner.need("factor", inner.float("factor")?)?;
        if factor >= 1.0 {
            return Ok(factor);
        }
        Err(inner.fault("factor", "expected a number from 1 up"))
    };
    let original = || -> Result<i64> {
        let outer = keys.size("original_max_position_embeddings")?;
        let own = inner.size("original_max_position_embeddings")?;
        Ok(outer.or(own).unwrap_or(max_positions))
    };
    let d = head_dim;
    Ok(match kind {
        "default" => Rope::plain(theta, d),
        "linear" => Rope::linear(theta, d, factor()?),
        "dynamic" => Rope::dynamic(theta, d, factor()?, max_positions),
        "llama3" => {
            let number = |key: &str| inner.need(key, inner.float(key)?);
            let (low, high) = (number("low_freq_factor")?, number("high_freq_factor")?);
            if low <= 0.0 || high <= low {
                return Err(inner.fault(
                    "high_freq_factor",
                    "expected more than low_freq_factor, above zero",
                ));
            }
            Rope::llama3(theta, d, factor()?, low, high, original()?)
        }
        "yarn" => {
            let original = original()?;
            let factor = match inner.get("factor") {
                Some(_) => factor()?,
                None => max_positions as f64 / original as f64,
            };
            let scale = |s: f64, m: f64| {
                if s <= 1.0 {
                    1.0
                } else {
                    0.1 * m * s.ln() + 1.0
                }
            };
            let given = |key: &str| inner.float(key).map(|it| it.filter(|&x| x != 0.0));
            let attention = match inner.float("attention_factor")? {
                Some(factor) => factor,
                None => match (given("mscale")?, given("mscale_all_dim")?) {
                    (Some(one), Some(all)) => scale(factor, one) / scale(factor, all),
                    _ => scale(factor, 1.0),
                },
            };
            let betas = (
                given("beta_fast")?.unwrap_or(32.0),
                given("beta_slow")?.unwrap_or(1.0),
            );
            let truncate = inner.flag("truncate", true)?;
            Rope::yarn(theta, d, factor, attention, betas, original, truncate)
        }
        _ => {
            return Err(inner.fault(
                if inner.get("rope_type").is_some() {
                    "rope_type"
                } else {
                    "type"
                },
                "known are [default, linear, dynamic, llama3, yarn]",
            ));
        }
    })
}

/// What tells one GPT-2 from another.
#[derive(Debug, Clone)]
pub(crate) struct Gpt2Config {
    pub(crate) vocab: i64,
    pub(crate) hidden: i64,
    pub(crate) inner: i64,
    pub(crate) layers: usize,
    pub(crate) heads: i64,
    pub(crate) max_positions: i64,
    pub(crate) activation: Activation,
    pub(crate) eps: f64,
    pub(crate) scale_by_width: bool,
    pub(crate) scale_by_layer: bool,
    pub(crate) resid_dropout: f64,
    pub(crate) embd_dropout: f64,
    pub(crate) attn_dropout: f64,
    pub(crate) json: Value,
}

impl Gpt2Config {
    pub(crate) fn read(keys: &Keys) -> Result<Gpt2Config> {
        if keys.flag("add_cross_attention", false)? {
            return Err(keys.fault(
                "add_cross_attention",
                "but this model has no encoder to attend to",
            ));
        }
        // `hidden_size` and so on are other names for the same keys.
        let named = |key: &str, other: &str, default: i64| -> Result<i64> {
            Ok(keys.size(key)?.or(keys.size(other)?).unwrap_or(default))
        };
        let hidden = named("n_embd", "hidden_size", 768)?;
        let heads = named("n_head", "num_attention_heads", 12)?;
        if hidden % heads != 0 {
            return Err(keys.fault("n_embd", "which n_head does not divide"));
        }
        Ok(Gpt2Config {
            vocab: keys.size("vocab_size")?.unwrap_or(50257),
            hidden,
            inner: keys.size("n_inner")?.unwrap_or(4 * hidden),
            layers: named("n_layer", "num_hidden_layers", 12)? as usize,
            heads,
            max_positions: named("n_positions", "max_position_embeddings", 1024)?,
            activation: keys.activation("activation_function", "gelu_new")?,
            eps: keys.positive("layer_norm_epsilon", 1e-5)?,
            scale_by_width: keys.flag("scale_attn_weights", true)?,
            scale_by_layer: keys.flag("scale_attn_by_inverse_layer_idx", false)?,
            resid_dropout: keys.share("resid_pdrop", 0.1)?,
            embd_dropout: keys.share("embd_pdrop", 0.1)?,
            attn_dropout: keys.share("attn_pdrop", 0.1)?,
            json: keys.json.clone(),
        })
    }
}
