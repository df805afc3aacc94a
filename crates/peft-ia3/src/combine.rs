//! Several adapters as one: l = Σ wᵢ lᵢ, place by place.
//!
//! Python's `add_weighted_adapter`. The weights are taken as they are: with (0.5, 0.5) the factors are averaged, with
//! (1, 1) they are nearly doubled, as l begins at one. A place that only some of the adapters have gets the sum over those.

use std::collections::BTreeMap;

use peft_core::{Adapter, Config, Error, Names, Result, State, parse};
use tch::Tensor;

use crate::{config::Ia3Config, factors::L};

/// Σ wᵢ lᵢ over adapters of one base, each with its weight: an adapter to save or to apply.
///
/// Targets and feed-forward layers of all are the new one's; everything else is the first one's. A module that is trained
/// whole (`modules_to_save`) cannot be a sum: where more than one adapter has it, that is an error.
pub fn combine(parts: &[(&Adapter, f64)]) -> Result<Adapter> {
    let fault = |reason: String| Err(Ia3Config::fault(reason));
    let mut configs = Vec::new();
    for (adapter, weight) in parts {
        let found = adapter.tuner.peft_type();
        if found != Ia3Config::PEFT_TYPE {
            let place = adapter.source.display();
            return fault(format!(
                "{place} is of type {found} and cannot be combined with these"
            ));
        }
        if !weight.is_finite() {
            return fault(format!("a weight of {weight} is not finite"));
        }
        configs.push(parse::<Ia3Config>(adapter.tuner.to_json())?);
    }
    let Some((first, others)) = configs.split_first() else {
        return fault("there is nothing to combine".to_owned());
    };
    let mut config = first.clone();
    for other in others {
        let both = |a: &mut Option<Names>, b: &Option<Names>, key| -> Result<()> {
            *a = Some(union(a.take(), b.clone(), key)?);
            Ok(())
        };
        both(
            &mut config.target_modules,
            &other.target_modules,
            "target_modules",
        )?;
        let (a, b) = (&mut config.feedforward_modules, &other.feedforward_modules);
        both(a, b, "feedforward_modules")?;
        let saved = other.modules_to_save.iter().flatten().cloned();
        let new: Vec<String> = saved
            .filter(|it| !config.modules_to_save.iter().flatten().any(|is| is == it))
            .collect();
        if !new.is_empty() {
            config.modules_to_save.get_or_insert_default().extend(new);
        }
    }
    Ok(Adapter {
        tuner: Box::new(config),
        state: sum(parts)?,
        trained: State::new(),
        source: parts[0].0.source.clone(),
    })
}

fn sum(parts: &[(&Adapter, f64)]) -> Result<State> {
    let mut all: BTreeMap<String, Tensor> = BTreeMap::new();
    let _off = tch::no_grad_guard();
    for (adapter, weight) in parts {
        for (key, tensor) in &adapter.state {
            let factors = key.rsplit('.').next() == Some(L);
            let Some(there) = all.get(key) else {
                let own = if factors {
                    tensor * *weight
                } else {
                    tensor.copy()
                };
                all.insert(key.clone(), own);
                continue;
            };
            if !factors {
                return Err(Ia3Config::fault(format!(
                    "more than one of the adapters trains `{key}` whole (modules_to_save); that cannot be combined"
                )));
            }
            if there.size() != tensor.size() {
                // One scales the layer's input and one its output.
                return Err(Error::Shape {
                    key: key.clone(),
                    expected: there.size(),
                    got: tensor.size(),
                });
            }
            let sum = there + tensor * *weight;
            all.insert(key.clone(), sum);
        }
    }
    Ok(all)
}

/// Both lists, or either expression.
fn union(a: Option<Names>, b: Option<Names>, key: &str) -> Result<Names> {
    match (a, b) {
        (Some(a), Some(b)) if a == b => Ok(a),
        (Some(Names::List(mut a)), Some(Names::List(b))) => {
            let new: Vec<String> = b.into_iter().filter(|it| !a.contains(it)).collect();
            a.extend(new);
            Ok(Names::List(a))
        }
        (Some(Names::Regex(a)), Some(Names::Regex(b))) => Ok(Names::Regex(format!("({a})|({b})"))),
        _ => Err(Ia3Config::fault(format!(
            "{key} is a list in one adapter and an expression in another, or missing: they cannot be combined"
        ))),
    }
}
