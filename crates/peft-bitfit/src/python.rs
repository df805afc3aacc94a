//! A BitFit as Python's `peft` can load it, and back.
//!
//! ```text
//! the base has a bias      bias="all":      base_model.model.<place>.bias, or .base_layer.bias on the target
//! it has none              lora_bias=true:  base_model.model.<place>.lora_B.bias, scaled by α/r = 1
//! ```
//!
//! Python needs at least one target; where every bias is one of the base's, that is the first linear layer. A and B of the
//! targets are zero and stay so: each is the other's gradient.

use std::path::{Path, PathBuf};

use peft_core::{
    Adapter, Config, Error, Model, ModelExt, Names, Outline, Result, Site, SiteKind, Slot, State,
    nearest, parse, read_folder, write_folder,
};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use crate::config::BitfitConfig;

const ROOT: &str = "base_model.model.";
/// Names of LoRA in Python's files, below a place; the first two also of ours.
const BIAS: &str = ".bias";
const BASE_BIAS: &str = ".base_layer.bias";
const A: &str = ".lora_A.weight";
const B: &str = ".lora_B.weight";
const B_BIAS: &str = ".lora_B.bias";

/// What `adapter_config.json` and `adapter_model.safetensors` hold for Python; `model` is the base, dressed or not.
pub fn for_python(adapter: &Adapter, model: &mut dyn Model) -> Result<(Value, State)> {
    let config = of_bitfit(adapter)?;
    let outline = model.outline();
    let mut state = State::new();
    let (mut existing, mut added) = (Vec::new(), Vec::new());
    for (key, tensor) in &adapter.state {
        let at = key.strip_prefix(ROOT).and_then(|it| it.strip_suffix(BIAS));
        match at.filter(|at| !config.selection().saves(at)) {
            None =>
            // a part of a module that is trained whole
            {
                drop(state.insert(key.clone(), tensor.shallow_clone()))
            }
            Some(at) => match outline.site(at) {
                Some(site) if site.bias => existing.push((at, tensor)),
                Some(_) => added.push((at, tensor)),
                None => return Err(unknown(at, &outline)),
            },
        }
    }
    let mut targets: Vec<&str> = added.iter().map(|(at, _)| *at).collect();
    if targets.is_empty() {
        let linear = |it: &&Site| it.kind == SiteKind::Linear && !config.selection().saves(&it.at);
        let first = outline.sites.iter().find(linear);
        let none = || {
            BitfitConfig::fault("Python needs a linear layer as a target, and this model has none")
        };
        targets.push(&first.ok_or_else(none)?.at);
    }
    for at in &targets {
        let site = outline.site(at).ok_or_else(|| unknown(at, &outline))?;
        let zeros = |shape: [i64; 2]| Tensor::zeros(shape, (Kind::Float, Device::Cpu));
        state.insert(format!("{ROOT}{at}{A}"), zeros([1, site.shape[1]]));
        state.insert(format!("{ROOT}{at}{B}"), zeros([site.shape[0], 1]));
    }
    for (at, bias) in &existing {
        let name = if targets.contains(at) {
            BASE_BIAS
        } else {
            BIAS
        };
        state.insert(format!("{ROOT}{at}{name}"), bias.shallow_clone());
    }
    for (at, bias) in &added {
        state.insert(format!("{ROOT}{at}{B_BIAS}"), bias.shallow_clone());
    }
    let transposed = targets
        .iter()
        .any(|at| outline.site(at).is_some_and(|it| it.transposed));
    let mut json = serde_json::to_value(&config.common).unwrap_or_default();
    let more = json!({
        "peft_type": "LORA", "r": 1, "lora_alpha": 1, "lora_dropout": 0.0, "target_modules": targets,
        "bias": if existing.is_empty() { "none" } else { "all" }, "lora_bias": !added.is_empty(),
        "modules_to_save": config.modules_to_save, "fan_in_fan_out": transposed,
    });
    for (key, value) in more.as_object().into_iter().flatten() {
        json[key] = value.clone();
    }
    Ok((json, state))
}

/// Writes a folder that Python's `PeftModel.from_pretrained(model, dir)` loads.
pub fn save_for_python(adapter: &Adapter, model: &mut dyn Model, dir: &Path) -> Result<()> {
    let (config, state) = for_python(adapter, model)?;
    write_folder(dir, &config, &state)
}

/// Reads a LoRA that trains nothing but biases as a BitFit: what [`save_for_python`] writes, or what Python has saved.
///
/// A LoRA whose factors do something is an error; so is one with settings that change the numbers.
pub fn load_from_python(dir: &Path, model: &mut dyn Model) -> Result<Adapter> {
    let (json, given) = read_folder(dir)?;
    let fault = |reason: String| Error::file(dir, reason);
    if json["peft_type"] != "LORA" {
        return Err(fault(format!(
            "of type {} and not LORA, which is what a BitFit is for Python",
            json["peft_type"]
        )));
    }
    let number = |key: &str, default: f64| json[key].as_f64().unwrap_or(default);
    let (r, alpha) = (number("r", 8.0), number("lora_alpha", 8.0));
    let scale = if json["use_rslora"] == true {
        alpha / r.sqrt()
    } else {
        alpha / r
    };
    for key in ["rank_pattern", "alpha_pattern"] {
        if json[key].as_object().is_some_and(|it| !it.is_empty()) {
            return Err(fault(format!("has a {key}; a BitFit for Python has none")));
        }
    }
    let outline = model.outline();
    let saved: Option<Vec<String>> = serde_json::from_value(json["modules_to_save"].clone())
        .map_err(|error| fault(format!("modules_to_save: {error}")))?;
    let mut config = BitfitConfig {
        modules_to_save: saved,
        ..BitfitConfig::default()
    };
    config.common =
        serde_json::from_value(json.clone()).map_err(|error| fault(error.to_string()))?;

    let mut state = State::new();
    let mut biases: Vec<(String, Tensor)> = Vec::new();
    for (key, tensor) in given {
        let Some(place) = key.strip_prefix(ROOT) else {
            return Err(fault(format!("`{key}` does not begin with `{ROOT}`")));
        };
        let module = place.rsplit_once('.').map_or(place, |(at, _)| at);
        if config.selection().saves(module) {
            state.insert(key, tensor);
        } else if place.ends_with(A) {
            // Without B it does nothing.
        } else if place.ends_with(B) {
            if tensor.any().int64_value(&[]) != 0 {
                return Err(fault(format!(
                    "`{key}` is not zero: this is a LoRA and not a BitFit"
                )));
            }
        } else if let Some(at) = place.strip_suffix(B_BIAS) {
            let own = tensor.to_kind(Kind::Float) * scale;
            let bias = match base_bias(model, at) {
                Some(base) => own + base.to_kind(Kind::Float),
                None => own,
            };
            biases.push((at.to_owned(), bias));
        } else if let Some(at) = place
            .strip_suffix(BASE_BIAS)
            .or_else(|| place.strip_suffix(BIAS))
        {
            biases.push((at.to_owned(), tensor));
        } else {
            return Err(fault(format!("`{key}` is no part of a BitFit")));
        }
    }
    let mut targets = Vec::new();
    for (at, bias) in biases {
        let site = outline.site(&at).ok_or_else(|| unknown(&at, &outline))?;
        config.add_bias |= !site.bias;
        if state.insert(format!("{ROOT}{at}{BIAS}"), bias).is_some() {
            return Err(fault(format!("has two biases for `{at}`")));
        }
        targets.push(at);
    }
    config.target_modules = Some(Names::List(targets));
    Ok(Adapter {
        tuner: Box::new(config),
        state,
        trained: State::new(),
        source: PathBuf::from(dir),
    })
}

fn of_bitfit(adapter: &Adapter) -> Result<BitfitConfig> {
    match adapter.tuner.peft_type() {
        BitfitConfig::PEFT_TYPE => parse::<BitfitConfig>(adapter.tuner.to_json()),
        other => Err(BitfitConfig::fault(format!(
            "this adapter is of type {other}"
        ))),
    }
}

fn base_bias(model: &mut dyn Model, wanted: &str) -> Option<Tensor> {
    let mut found = None;
    model.slots(&mut |at, slot| {
        if let (true, Slot::Linear(layer)) = (at == wanted, slot) {
            found = layer.base().bias().map(Tensor::shallow_clone);
        }
    });
    found
}

fn unknown(at: &str, outline: &Outline) -> Error {
    let places = outline.sites.iter().map(|it| it.at.as_str());
    BitfitConfig::fault(format!(
        "the model has no place `{at}`{}",
        nearest(at, places)
    ))
}
