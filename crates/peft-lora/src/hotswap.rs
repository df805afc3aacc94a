//! Another LoRA under the name of one that is at work: a new adapter for the next request, without a new model.
//!
//! [`Adapter::replace`] does it for any two adapters. This one asks as Python's `hotswap_adapter` does that both have
//! the same factors, so that a file that does less than the one before, or more, is noticed. Python also wants
//! equal `use_rslora`, `lora_dropout` and `alpha_pattern`, since it keeps the old ones; here the adapter that comes
//! brings all of its own: ranks, α, dropout.

use std::collections::BTreeSet;

use peft_core::{Adapter, Config, Error, Model, ModelExt, Result, nearest};

use crate::LoraConfig;

/// What the names of factors begin with, magnitudes and biases of B included.
const FACTOR: &str = "lora_";

/// Puts `new` in the place of the LoRA called `name`: at its height among the others, and switched on or off as it is.
///
/// Both must have factors at the same places, and be both DoRA or neither. An error leaves the model as it was.
pub fn hotswap(model: &mut dyn Model, name: &str, new: &Adapter) -> Result<()> {
    model.known(name)?;
    let tag = new.tuner.peft_type();
    if tag != LoraConfig::PEFT_TYPE {
        return Err(Error::Name {
            name: name.to_owned(),
            why: format!("only a LoRA can be swapped in, not one of peft_type `{tag}`"),
        });
    }
    let there: BTreeSet<String> = model
        .saved(name)
        .into_iter()
        .filter(|it| it.name.starts_with(FACTOR))
        .map(|it| new.tuner.key(&it.at, &it.name))
        .collect();
    if there.is_empty() {
        return Err(Error::Name {
            name: name.to_owned(),
            why: "it is no LoRA, and only one can be swapped out".to_owned(),
        });
    }
    let factor = |key: &&str| key.contains(&format!(".{FACTOR}"));
    let coming: BTreeSet<&str> = new
        .state
        .keys()
        .map(String::as_str)
        .filter(factor)
        .collect();
    if let Some(key) = there.iter().find(|it| !coming.contains(it.as_str())) {
        return Err(Error::Missing {
            place: new.source.display().to_string(),
            key: key.clone(),
            hint: nearest(key, coming.iter().copied()),
        });
    }
    let more: Vec<&str> = coming
        .into_iter()
        .filter(|it| !there.contains(*it))
        .collect();
    if let Some(key) = more.first() {
        return Err(Error::Unexpected {
            place: new.source.display().to_string(),
            count: more.len(),
            key: (*key).to_owned(),
            hint: nearest(key, there.iter().map(String::as_str)),
        });
    }
    new.replace(name, model)
}
