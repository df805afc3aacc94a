//! In which bits, and which layers: what `quantization_config` says in `config.json`.

use peft_codec::{Block, Compat, Type};
use peft_core::{BaseFormat, Error, Result, Weights, nearest};
use serde_json::{Value, json};
use tch::Kind;

use crate::source::Quantised;

/// In which bits a weight is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheme {
    /// 4 bits in blocks.
    Four(Four),
    /// 8 bits, a scale for each row: LLM.int8.
    Eight(Eight),
}

/// How numbers become 4 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Four {
    /// Which 16 values.
    pub kind: Type,
    /// How many numbers share a scale.
    pub block: Block,
    /// The scales are quantised as well.
    pub double_quant: bool,
    /// Which of the two behaviours of `bitsandbytes` encodes.
    pub compat: Compat,
}

/// How numbers become 8 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Eight;

impl Four {
    /// NF4, blocks of 64, scales quantised: what the QLoRA paper trains with.
    pub const NF4: Four = Four {
        kind: Type::Nf4,
        block: Block::USUAL,
        double_quant: true,
        compat: Compat::Cuda,
    };
}

impl Scheme {
    /// [`Four::NF4`].
    pub const NF4: Scheme = Scheme::Four(Four::NF4);

    /// 8 bits.
    pub const INT8: Scheme = Scheme::Eight(Eight);

    /// `quantization_config` of a model that is kept so, as `transformers` writes it.
    ///
    /// There is no place for the block size: each tensor says it of itself.
    pub fn config(&self) -> Value {
        let four = match self {
            Scheme::Four(four) => Some(four),
            Scheme::Eight(_) => None,
        };
        json!({
            "_load_in_4bit": four.is_some(),
            "_load_in_8bit": four.is_none(),
            "bnb_4bit_compute_dtype": "float32",
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": four.map_or("fp4", |it| it.kind.name()),
            "bnb_4bit_use_double_quant": four.is_some_and(|it| it.double_quant),
            "llm_int8_enable_fp32_cpu_offload": false,
            "llm_int8_has_fp16_weight": false,
            "llm_int8_skip_modules": null,
            "llm_int8_threshold": 6.0,
            "load_in_4bit": four.is_some(),
            "load_in_8bit": four.is_none(),
            "quant_method": "bitsandbytes",
        })
    }
}

/// What becomes of the linear layers of a source.
#[derive(Debug, Clone, PartialEq)]
pub struct Format {
    /// In which bits layers are kept that the source has dense; `None`: as they are.
    pub scheme: Option<Scheme>,
    /// Layers that stay dense, by their names or parts of them between dots: what `llm_int8_skip_modules` lists.
    pub skip: Vec<String>,
    /// The dtype of products; `None`: that of their input. The output has the dtype of the input.
    pub compute: Option<Kind>,
    /// Which of the two behaviours of `bitsandbytes` encodes again what the source has in 4 bits, after a merge.
    pub compat: Compat,
}

impl Format {
    /// The source as it is: layers that it keeps in few bits stay so, others stay dense.
    pub fn as_stored() -> Format {
        Format {
            scheme: None,
            skip: Vec::new(),
            compute: None,
            compat: Compat::default(),
        }
    }

    /// Every linear layer in this scheme but the heads, and but T5's `wo`, which `transformers` keeps in fp32.
    pub fn of(scheme: Scheme) -> Format {
        let dense = ["lm_head", "classifier", "score", "qa_outputs", "wo"];
        Format {
            scheme: Some(scheme),
            skip: dense.map(str::to_owned).to_vec(),
            compute: None,
            compat: Compat::default(),
        }
    }

    /// Whether the layer called `at` stays dense.
    pub fn keeps_dense(&self, at: &str) -> bool {
        // A part of the path between dots: of a module it means all that is in it.
        let path = format!(".{at}.");
        self.skip
            .iter()
            .any(|name| path.contains(&format!(".{name}.")))
    }
}

impl BaseFormat for Format {
    /// Refuses formats of others (GPTQ, AWQ, torchao), and a model that is to be quantised twice.
    fn check(&self, config: &Value) -> Result<()> {
        let fault = |reason: String| Error::Config {
            peft_type: "quantization".into(),
            reason,
        };
        let Some(found) = config.get("quantization_config").filter(|it| !it.is_null()) else {
            return Ok(());
        };
        let flag = |key: &str| found.get(key).and_then(Value::as_bool).unwrap_or(false);
        match found.get("quant_method").and_then(Value::as_str) {
            Some("bitsandbytes") => {}
            None if flag("load_in_4bit") || flag("load_in_8bit") => {}
            Some(other) => {
                return Err(fault(format!(
                    "`quant_method` is `{other}`, which this build does not read; it reads `bitsandbytes`{}",
                    nearest(other, ["bitsandbytes"].into_iter())
                )));
            }
            None => {
                return Err(fault(
                    "`quantization_config` names no `quant_method`".into(),
                ));
            }
        }
        if flag("load_in_4bit") && flag("load_in_8bit") {
            return Err(fault(
                "`load_in_4bit` and `load_in_8bit` are both true".into(),
            ));
        }
        match self.scheme {
            Some(_) => Err(fault(
                "the model is quantised already; it is used as it is, or quantised anew from its dense original".into(),
            )),
            None => Ok(()),
        }
    }

    fn over<'a>(&'a self, weights: &'a mut dyn Weights) -> Box<dyn Weights + 'a> {
        Box::new(Quantised::new(weights, self))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_formats_are_named() {
        let stored = Format::as_stored();
        for method in ["gptq", "awq", "torchao", "compressed-tensors"] {
            let config = json!({"quantization_config": {"quant_method": method}});
            let error = stored.check(&config).unwrap_err().to_string();
            assert!(error.contains(method), "{error}");
        }
        assert!(stored.check(&json!({"quantization_config": null})).is_ok());
        let four = json!({"quantization_config": Scheme::NF4.config()});
        assert!(stored.check(&four).is_ok());
        assert!(Format::of(Scheme::NF4).check(&four).is_err());
        let both = json!({"quantization_config": {"load_in_4bit": true, "load_in_8bit": true}});
        assert!(stored.check(&both).is_err());
    }

    #[test]
    fn names_that_stay_dense() {
        let format = Format {
            skip: vec![
                "lm_head".into(),
                "model.layers.0".into(),
                "down_proj".into(),
            ],
            ..Format::of(Scheme::NF4)
        };
        for at in [
            "lm_head",
            "model.layers.0.mlp.up_proj",
            "model.layers.1.mlp.down_proj",
        ] {
            assert!(format.keeps_dense(at), "{at}");
        }
        for at in ["model.layers.10.mlp.up_proj", "model.my_lm_head"] {
            assert!(!format.keeps_dense(at), "{at}");
        }
    }
}
