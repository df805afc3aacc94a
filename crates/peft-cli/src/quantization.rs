//! In which bits a base is kept: as flags, as a setting, and in `run.json`.

use std::path::Path;

use anyhow::{Context, Result};
use clap::ValueEnum;
use peft::core::{Model, Slot, nearest};
use peft::models::{Source, Task, linear_layers};
use peft::quant::{Block, Compat, Format, Four, Scheme, Type};
use peft::tch::Device;
use peft::train::Run;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::error::usage;

/// The key of `config.json`.
pub(crate) const CONFIG: &str = "quantization_config";

/// The key of `run.json`, and the setting.
pub(crate) const QUANTIZATION: &str = "quantization";

/// A way to keep linear layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Bits {
    /// 4-bit NormalFloat
    Nf4,
    /// 4-bit floating point
    Fp4,
    /// 8-bit integers with a scale a row
    Int8,
}

impl Bits {
    /// As it is written in a sentence.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Bits::Nf4 => "NF4",
            Bits::Fp4 => "FP4",
            Bits::Int8 => "8 bits",
        }
    }
}

/// How the linear layers of a dense base are kept.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, into = "Value")]
pub(crate) struct Quantization {
    /// In which bits.
    #[serde(rename = "type")]
    pub(crate) bits: Bits,
    /// The scales of 4-bit blocks are quantised, too.
    pub(crate) double_quant: bool,
    /// Numbers that share a scale, of 4 bits.
    pub(crate) block_size: usize,
    /// Layers that stay dense.
    pub(crate) skip: Vec<String>,
}

impl Default for Quantization {
    fn default() -> Quantization {
        Quantization {
            bits: Bits::Nf4,
            double_quant: true,
            block_size: 64,
            skip: Format::of(Scheme::NF4).skip,
        }
    }
}

impl From<Quantization> for Value {
    /// The keys that the type has: [`Wish::check`] reads them again.
    fn from(it: Quantization) -> Value {
        match it.bits {
            Bits::Int8 => json!({"type": it.bits, "skip": it.skip}),
            Bits::Nf4 | Bits::Fp4 => json!({
                "type": it.bits,
                "double_quant": it.double_quant,
                "block_size": it.block_size,
                "skip": it.skip,
            }),
        }
    }
}

/// `quantization` in a recipe: a word, or keys and values.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub(crate) enum Wish {
    /// `nf4`, `fp4`, `int8`, or `none`: the base as it is stored.
    Word(Word),
    /// All of it.
    Whole(Quantization),
}

/// A wish in a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Word {
    Nf4,
    Fp4,
    Int8,
    None,
}

impl Wish {
    /// Says what is wrong with a value of the setting, and where.
    pub(crate) fn check(value: &Value) -> Result<()> {
        const WORDS: [&str; 4] = ["nf4", "fp4", "int8", "none"];
        const KEYS: [&str; 4] = ["type", "double_quant", "block_size", "skip"];
        match value {
            Value::Null => Ok(()),
            Value::String(word) if WORDS.contains(&word.as_str()) => Ok(()),
            Value::String(word) => Err(usage(format!(
                "setting `{QUANTIZATION}`: `{word}` is none of {}{}",
                WORDS.join(", "),
                nearest(&word.to_lowercase(), WORDS)
            ))),
            Value::Object(map) => {
                if let Some(key) = map.keys().find(|key| !KEYS.contains(&key.as_str())) {
                    return Err(usage(format!(
                        "setting `{QUANTIZATION}`: unknown key `{key}`{}",
                        nearest(key, KEYS)
                    )));
                }
                let all: Quantization = serde_json::from_value(value.clone())
                    .map_err(|error| usage(format!("setting `{QUANTIZATION}`: {error}")))?;
                let four = ["double_quant", "block_size"];
                match four.iter().find(|key| map.contains_key(**key)) {
                    Some(key) if all.bits == Bits::Int8 => Err(usage(format!(
                        "setting `{QUANTIZATION}`: `{key}` is of 4 bits; int8 has one scale a row"
                    ))),
                    _ => all.format().map(drop),
                }
            }
            other => Err(usage(format!(
                "setting `{QUANTIZATION}`: {other} is none of {}, or keys and values such as `{{type: nf4, block_size: 128}}`",
                WORDS.join(", ")
            ))),
        }
    }

    /// What is wished for; `None`: the base as it is stored.
    pub(crate) fn quantization(&self) -> Option<Quantization> {
        let of = |bits| {
            Some(Quantization {
                bits,
                ..Quantization::default()
            })
        };
        match self {
            Wish::Whole(whole) => Some(whole.clone()),
            Wish::Word(Word::Nf4) => of(Bits::Nf4),
            Wish::Word(Word::Fp4) => of(Bits::Fp4),
            Wish::Word(Word::Int8) => of(Bits::Int8),
            Wish::Word(Word::None) => None,
        }
    }
}

impl Quantization {
    /// What `run.json` says besides of a run that quantised its base.
    pub(crate) fn of_run(more: &Map<String, Value>) -> Result<Option<Quantization>> {
        let Some(value) = more.get(QUANTIZATION).filter(|it| !it.is_null()) else {
            return Ok(None);
        };
        let bits = serde_json::from_value(value.clone());
        Ok(Some(bits.with_context(|| {
            format!("`{QUANTIZATION}` in run.json")
        })?))
    }

    /// The format of the base.
    pub(crate) fn format(&self) -> Result<Format> {
        let four = |kind| -> Result<Scheme> {
            Ok(Scheme::Four(Four {
                kind,
                block: Block::of(self.block_size).map_err(|it| usage(it.to_string()))?,
                double_quant: self.double_quant,
                compat: Compat::Cuda,
            }))
        };
        let scheme = match self.bits {
            Bits::Nf4 => four(Type::Nf4)?,
            Bits::Fp4 => four(Type::Fp4)?,
            Bits::Int8 => Scheme::INT8,
        };
        // That of T5 is dense in `transformers` whatever is asked for; others have none.
        let mut skip = self.skip.clone();
        if !skip.iter().any(|it| it == "wo") {
            skip.push("wo".into());
        }
        Ok(Format {
            skip,
            ..Format::of(scheme)
        })
    }

    /// How a folder keeps its layers, from `config.json`, which does not say the size of blocks; `None`: dense.
    pub(crate) fn stored(config: &Value) -> Option<Quantization> {
        let found = config.get(CONFIG)?.as_object()?;
        let flag = |key: &str| found.get(key).and_then(Value::as_bool).unwrap_or(false);
        let usual = Quantization::default();
        let skip = found.get("llm_int8_skip_modules").and_then(Value::as_array);
        let names = |all: &Vec<Value>| {
            let names = all.iter().filter_map(Value::as_str);
            names.map(str::to_owned).collect()
        };
        Some(Quantization {
            bits: match found.get("bnb_4bit_quant_type").and_then(Value::as_str) {
                _ if flag("load_in_8bit") => Bits::Int8,
                Some("fp4") => Bits::Fp4,
                _ => Bits::Nf4,
            },
            double_quant: flag("bnb_4bit_use_double_quant"),
            skip: skip.map_or(usual.skip.clone(), names),
            ..usual
        })
    }

    /// Refuses a layer that is to be skipped and is not there.
    pub(crate) fn must_fit(&self, source: &Source, task: Task) -> Result<()> {
        let usual = Quantization::default().skip;
        if self.skip.iter().all(|it| usual.contains(it)) {
            return Ok(());
        }
        let names = linear_layers(source, task)?;
        if names
            .iter()
            .all(|at| self.format().is_ok_and(|it| it.keeps_dense(at)))
        {
            return Err(usage(
                "every linear layer is to be skipped, so there is nothing to quantise",
            ));
        }
        let format = |name: &String| Format {
            skip: vec![name.clone()],
            ..Format::as_stored()
        };
        for name in self.skip.iter().filter(|it| !usual.contains(it)) {
            if !names.iter().any(|at| format(name).keeps_dense(at)) {
                let parts = names
                    .iter()
                    .flat_map(|at| at.split('.').chain([at.as_str()]));
                let hint = nearest(name, parts);
                return Err(usage(format!(
                    "no linear layer to skip is called `{name}`{hint}"
                )));
            }
        }
        Ok(())
    }

    /// In a line.
    pub(crate) fn line(&self) -> String {
        let name = self.bits.name();
        if self.bits == Bits::Int8 {
            return format!("{name}, a scale a row");
        }
        let double = if self.double_quant {
            ", scales in 8 bits"
        } else {
            ""
        };
        format!("{name}, blocks of {}{double}", self.block_size)
    }
}

/// In a line, how a model keeps its linear layers, if not dense.
pub(crate) fn in_bits(model: &mut (impl Model + ?Sized)) -> Option<String> {
    let mut found = None;
    model.slots(&mut |_, slot| {
        if let (None, Slot::Linear(it)) = (&found, slot) {
            found = it.base().stored().map(|it| it.config);
        }
    });
    let stored = Quantization::stored(&json!({CONFIG: found?}))?;
    let double = if stored.double_quant {
        ", scales in 8 bits"
    } else {
        ""
    };
    Some(match stored.bits {
        Bits::Int8 => "linear layers in 8 bits".to_owned(),
        Bits::Nf4 => format!("linear layers in NF4{double}"),
        Bits::Fp4 => format!("linear layers in FP4{double}"),
    })
}

/// Says what an adapter folder does not hold of the run that it is made of: the bits of its base.
pub(crate) fn say_what_is_left(run: &Path) -> Result<()> {
    if Run::is_run(run)
        && let Some(bits) = Quantization::of_run(&Run::open(run)?.info()?.more)?
    {
        println!(
            "{} was trained over its base in {}; the new folder names the base alone, and opens over it as it is stored",
            run.display(),
            bits.line()
        );
    }
    Ok(())
}

/// Says so where libtorch's operations decode weights on a GPU, for want of the kernels.
pub(crate) fn say_what_decodes(device: Device, model: &mut dyn Model) {
    let Device::Cuda(ordinal) = device else {
        return;
    };
    let mut few = false;
    model.slots(&mut |_, slot| {
        few |= matches!(slot, Slot::Linear(it) if it.base().stored().is_some());
    });
    if few && let Err(error) = peft::quant::cuda::kernels(ordinal) {
        eprintln!(
            "warning: no kernels for weights in 4 bits ({error}); libtorch's operations decode them: the same bits, later"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `transformers` builds it dense whatever the configuration says.
    #[test]
    fn wo_stays_dense_whatever_is_skipped() {
        let wish = Quantization {
            skip: vec!["q".into()],
            ..Quantization::default()
        };
        let format = wish.format().unwrap();
        assert!(format.keeps_dense("encoder.block.0.layer.1.DenseReluDense.wo"));
        assert!(!format.keeps_dense("encoder.block.0.layer.1.DenseReluDense.wi"));
    }
    use serde_json::from_value;

    #[test]
    fn a_word_or_all_of_it() {
        let read = |value: Value| from_value::<Wish>(value).ok().map(|it| it.quantization());
        assert_eq!(read(json!("nf4")), Some(Some(Quantization::default())));
        assert_eq!(read(json!("none")), Some(None));
        let whole = read(json!({"type": "fp4", "block_size": 128}))
            .flatten()
            .unwrap();
        assert_eq!(
            (whole.bits, whole.block_size, whole.double_quant),
            (Bits::Fp4, 128, true)
        );
        for bad in [json!("nf5"), json!({"typ": "nf4"}), json!(4)] {
            assert_eq!(read(bad), None);
        }
        for (value, part) in [
            (json!("NF4"), "nearest is `nf4`"),
            (
                json!({"type": "nf4", "blok_size": 64}),
                "nearest is `block_size`",
            ),
            (
                json!({"type": "int8", "double_quant": true}),
                "`double_quant` is of 4 bits",
            ),
            (json!({"type": "nf4", "block_size": 65}), "65"),
            (json!(true), "true"),
        ] {
            let error = Wish::check(&value).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
        for good in [
            json!("nf4"),
            json!("none"),
            json!(null),
            json!({"type": "fp4"}),
        ] {
            Wish::check(&good).unwrap();
        }
        let odd = Quantization {
            block_size: 65,
            ..Quantization::default()
        };
        assert!(odd.format().is_err());
    }
}
