//! Configurations of methods, and which method a file means.
//!
//! The registry is a list that a program writes down, not one that the linker gathers: whoever reads the program sees
//! what it can load.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Map, Value};

use crate::{Error, Result, Tuner, nearest};

/// The serialisable half of a method: what `adapter_config.json` holds.
pub trait Config: Tuner + Serialize + DeserializeOwned + Sized + 'static {
    /// The value of the key `peft_type`.
    const PEFT_TYPE: &'static str;

    /// Keys that may hold anything without changing the mathematics.
    const INERT: &'static [&'static str] = &[];

    /// Keys with the one value that they may hold here: settings of `peft` that this build knows and does not offer.
    const FIXED: &'static [(&'static str, &'static str)] = &[];

    /// The keys that this method does not read.
    fn unmodelled(&self) -> &Unmodelled;

    /// Checks ranges and combinations, so that an accepted configuration can be applied.
    fn check(&self) -> Result<()> {
        Ok(())
    }
}

/// Keys of a configuration that a method does not model; kept, so that saving loses nothing.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Unmodelled(pub Map<String, Value>);

/// The keys that every method's file has.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Common {
    /// `CAUSAL_LM` and so on.
    pub task_type: Option<String>,
    /// The folder or hub id of the base.
    pub base_model_name_or_path: Option<String>,
    /// The revision of the base.
    pub revision: Option<String>,
    /// Always true in a saved file.
    pub inference_mode: bool,
    /// For classes that Python cannot guess.
    pub auto_mapping: Option<Value>,
    /// Who wrote the file.
    pub peft_version: Option<String>,
}

impl Default for Common {
    fn default() -> Common {
        Common {
            task_type: None,
            base_model_name_or_path: None,
            revision: None,
            inference_mode: true,
            auto_mapping: None,
            peft_version: None,
        }
    }
}

type Parse = fn(Value) -> Result<Box<dyn Tuner>>;

/// The methods that a program knows, by `peft_type`: a map that one can read.
#[derive(Debug, Default, Clone)]
pub struct Registry(BTreeMap<&'static str, Parse>);

impl Registry {
    /// Adds a method.
    pub fn with<C: Config>(mut self) -> Registry {
        self.0
            .insert(C::PEFT_TYPE, |json| Ok(Box::new(parse::<C>(json)?)));
        self
    }

    /// The tags it knows.
    pub fn known(&self) -> Vec<&'static str> {
        self.0.keys().copied().collect()
    }

    /// Reads a configuration of any known method.
    pub fn parse(&self, json: Value) -> Result<Box<dyn Tuner>> {
        let found = match json.get("peft_type") {
            Some(Value::String(tag)) => tag.clone(),
            Some(other) => other.to_string(),
            None => "(none)".to_owned(),
        };
        let parse = self.0.get(found.as_str());
        parse.ok_or_else(|| Error::UnknownMethod {
            found,
            known: self.known(),
        })?(json)
    }
}

/// Reads one method's configuration: strict about what changes the numbers, lenient about the rest.
///
/// A key that the method does not model must be off (null, false, empty), inert, or hold its only offered value.
pub fn parse<C: Config>(json: Value) -> Result<C> {
    let fault = |reason: String| Error::Config {
        peft_type: C::PEFT_TYPE.to_owned(),
        reason,
    };
    let config = C::deserialize(&json);
    let config = config.map_err(|error| fault(mistyped::<C>(&json, &error)))?;
    for (key, value) in &config.unmodelled().0 {
        let fixed = C::FIXED.iter().find(|(name, _)| name == key);
        let allowed = match fixed {
            Some((_, only)) => value.as_str().unwrap_or(&value.to_string()) == *only,
            None => false,
        };
        if !allowed && !off(value) && !C::INERT.contains(&key.as_str()) && key != "peft_type" {
            let json = config.to_json();
            let keys = json.as_object().into_iter().flat_map(Map::keys);
            let modelled = keys.filter(|it| !config.unmodelled().0.contains_key(*it));
            return Err(Error::Unsupported {
                peft_type: C::PEFT_TYPE.to_owned(),
                key: key.clone(),
                value: Box::new(value.clone()),
                hint: nearest(key, modelled.map(String::as_str)),
            });
        }
    }
    config.check()?;
    Ok(config)
}

/// What is wrong with a configuration that cannot be read, by the key that cannot be read alone.
fn mistyped<C: Config>(json: &Value, error: &serde_json::Error) -> String {
    let alone = |it: (&String, &Value)| {
        let one = Value::Object(Map::from_iter([(it.0.clone(), it.1.clone())]));
        let error = C::deserialize(&one).err()?.to_string();
        // So `serde` says that a value has none of several forms, by names that nobody else knows.
        let reason = match error.contains("untagged enum") {
            true => "is none of the forms that it can have".to_owned(),
            false => error,
        };
        Some(format!("`{}` is {}: {reason}", it.0, it.1))
    };
    let empty = Value::Object(Map::new());
    let optional = C::deserialize(&empty).is_ok();
    let mut keys = json.as_object().into_iter().flatten();
    let found = if optional { keys.find_map(alone) } else { None };
    found.unwrap_or_else(|| error.to_string())
}

fn off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    }
}
