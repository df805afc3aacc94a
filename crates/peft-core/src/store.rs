//! An adapter folder: `adapter_config.json` and `adapter_model.safetensors`, as Python's `peft` writes them.
//!
//! Loading is strict. Python warns about a key that is missing and leaves that factor as it was initialised, so half an
//! adapter is at work and nobody knows; here that is an error.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde_json::Value;
use tch::Tensor;

use crate::{
    Error, Model, ModelExt, Param, Registry, Result, Slot, Start, State, Tuner, files, model,
    nearest, tensors,
};

/// On-disk name of the configuration.
const CONFIG: &str = "adapter_config.json";
/// On-disk name of the tensors.
const WEIGHTS: &str = "adapter_model.safetensors";
/// On-disk name of what is trained, where the file of the tensors does not hold it: our own, which Python passes over.
const TRAINED: &str = "trainable_state.safetensors";

/// Writes what the two files of an adapter folder are to hold, whoever's form it is.
pub fn write_folder(dir: &Path, config: &Value, state: &State) -> Result<()> {
    tensors::write(&dir.join(WEIGHTS), state)?;
    files::write_json(&dir.join(CONFIG), config)
}

/// Reads the two files of an adapter folder and makes nothing of them.
pub fn read_folder(dir: &Path) -> Result<(Value, State)> {
    Ok((read_config(dir)?, read_tensors(dir)?))
}

fn read_config(dir: &Path) -> Result<Value> {
    let path = dir.join(CONFIG);
    if !path.exists() {
        let reason = format!("no `{CONFIG}` in this folder, so it holds no adapter");
        return Err(Error::file(dir, reason));
    }
    files::read_json(&path)
}

fn read_tensors(dir: &Path) -> Result<State> {
    let (path, pickle) = (dir.join(WEIGHTS), dir.join("adapter_model.bin"));
    if !path.exists() && pickle.exists() {
        let reason =
            "a pickle, which can run code when it is read; save it with `safe_serialization=True`";
        return Err(Error::file(&pickle, reason));
    }
    tensors::read(&path)
}

/// A method's configuration and tensors, apart from any model: what an adapter folder holds.
#[derive(Debug)]
pub struct Adapter {
    /// The configured method.
    pub tuner: Box<dyn Tuner>,
    /// Its tensors by on-disk key.
    pub state: State,
    /// What is trained, by the names of Python's live model, where `state` is computed from it: an encoder of virtual
    /// tokens. With it training can go on, which Python cannot.
    pub trained: State,
    /// Where it came from, for messages.
    pub source: PathBuf,
}

impl Adapter {
    /// Reads a folder that Python's `peft` or this crate wrote.
    pub fn load(dir: &Path, registry: &Registry) -> Result<Adapter> {
        let path = dir.join(CONFIG);
        let named = |error| match error {
            Error::Config { .. } | Error::Unsupported { .. } | Error::UnknownMethod { .. } => {
                Error::file(&path, error)
            }
            other => other,
        };
        let tuner = registry.parse(read_config(dir)?).map_err(named)?;
        let state = read_tensors(dir)?;
        let more = dir.join(TRAINED);
        let trained = match more.exists() {
            true => tensors::read(&more)?,
            false => State::new(),
        };
        Ok(Adapter {
            tuner,
            state,
            trained,
            source: dir.join(WEIGHTS),
        })
    }

    /// Writes the folder. Each file is there whole or not at all.
    pub fn save(&self, dir: &Path) -> Result<()> {
        if !self.trained.is_empty() {
            tensors::write(&dir.join(TRAINED), &self.trained)?;
        }
        write_folder(dir, &self.tuner.to_json(), &self.state)
    }

    /// Takes the parameters called `name` out of a dressed model.
    pub fn of(name: &str, tuner: &dyn Tuner, model: &mut dyn Model) -> Result<Adapter> {
        let resolved = tuner.resolve(&model.outline())?;
        let copy = |t: &Tensor| tch::no_grad(|| t.detach().copy());
        let mut state = State::new();
        let mut trained = State::new();
        let saved = tch::no_grad(|| model.saved(name));
        let kept = |it: &Param| saved.iter().any(|s| (&s.at, &s.name) == (&it.at, &it.name));
        let computed = resolved.saved().is_none() && !model.trainable(name).iter().all(kept);
        if computed {
            for param in model.params(name).iter().filter(|it| !kept(it)) {
                let key = resolved.live_key(&param.at, &param.name);
                trained.insert(key, copy(&param.tensor));
            }
        }
        let tuner = resolved.saved().unwrap_or(resolved);
        let tuner = tuner.completed(&model.params(name)).unwrap_or(tuner);
        for param in &saved {
            state.insert(tuner.key(&param.at, &param.name), copy(&param.tensor));
        }
        Ok(Adapter {
            tuner,
            state,
            trained,
            source: PathBuf::from(WEIGHTS),
        })
    }

    /// Dresses `model` under `name` and fills the new parameters. An error leaves the model as it was.
    ///
    /// Every parameter must be in the file and every tensor of the file must be taken. Accepted besides the
    /// keys of `peft` are those with the adapter's name inside (`lora_A.default.weight`) and with a `.weight`
    /// behind a bare parameter, and copies of base embeddings that equal the base.
    pub fn apply(&self, name: &str, model: &mut dyn Model) -> Result<()> {
        model.dress(name, &*self.tuner, Start::Saved)?;
        let filled = self.fill(name, model);
        if filled.is_err() {
            model.delete(name)?;
        }
        filled
    }

    /// Puts this adapter in the place of the one called `name`: at its height among the others, and switched on or
    /// off as it is. The method, the rank and the places may be others. An error leaves the model as it was.
    pub fn replace(&self, name: &str, model: &mut dyn Model) -> Result<()> {
        model.known(name)?;
        if model.merged() {
            return Err(Error::Name {
                name: name.to_owned(),
                why: "adapters are merged into the base; unmerge first".to_owned(),
            });
        }
        let on = model.adapters().iter().any(|(it, on)| it == name && *on);
        model::set_aside(model, name);
        if let Err(error) = self.apply(name, model) {
            model::put_back(model);
            return Err(error);
        }
        model::settle(model, name);
        model.switch(name, on)
    }

    /// [`Adapter::apply`] for training to go on: with the encoder, where the method has one.
    ///
    /// Python's files do not hold an encoder; they are refused with the name of what is missing.
    pub fn resume(&self, name: &str, model: &mut dyn Model) -> Result<()> {
        model.dress(name, &*self.tuner, Start::Resumed)?;
        let filled = match self.trained.is_empty() {
            true => self.fill(name, model),
            false => self.fill_trained(name, model),
        };
        if filled.is_err() {
            model.delete(name)?;
        }
        filled
    }

    fn fill_trained(&self, name: &str, model: &mut dyn Model) -> Result<()> {
        let tuner = self.tuner.resolve(&model.outline())?;
        let missing = |key: String| Error::Missing {
            place: self.source.with_file_name(TRAINED).display().to_string(),
            hint: nearest(&key, self.trained.keys().map(String::as_str)),
            key,
        };
        let mut pairs = Vec::new();
        for param in model.params(name) {
            let (live, key) = (
                tuner.live_key(&param.at, &param.name),
                tuner.key(&param.at, &param.name),
            );
            let value = self.trained.get(&live).or_else(|| self.state.get(&key));
            let value = value.ok_or_else(|| missing(live.clone()))?;
            if value.size() != param.tensor.size() {
                return Err(Error::Shape {
                    key: live,
                    expected: param.tensor.size(),
                    got: value.size(),
                });
            }
            pairs.push((param.tensor, value));
        }
        tch::no_grad(|| {
            for (mut param, value) in pairs {
                param.f_copy_(value)?;
            }
            Ok(())
        })
    }

    /// Fills the parameters called `name`, which the model has already.
    pub fn fill(&self, name: &str, model: &mut dyn Model) -> Result<()> {
        let place = self.source.display().to_string();
        let tuner = self.tuner.resolve(&model.outline())?;
        // What is neither trained nor saved is the method's own business.
        let saved = tch::no_grad(|| model.saved(name));
        let kept = |it: &Param| saved.iter().any(|s| (&s.at, &s.name) == (&it.at, &it.name));
        let wanted: BTreeMap<String, Tensor> = model
            .params(name)
            .into_iter()
            .filter(|it| it.tensor.requires_grad() || kept(it))
            .map(|it| (tuner.key(&it.at, &it.name), it.tensor))
            .collect();
        let derived = model.derived(name).into_iter();
        let derived: Vec<String> = derived.map(|it| tuner.key(&it.at, &it.name)).collect();

        let mut found: BTreeMap<&str, &Tensor> = BTreeMap::new();
        let mut left = Vec::new();
        for (key, tensor) in &self.state {
            match spellings(key, name).find_map(|it| wanted.get_key_value(&it)) {
                Some((known, _)) => drop(found.insert(known, tensor)),
                None if derived.contains(key) => {}
                None => left.push((key, tensor)),
            }
        }
        for (key, param) in &wanted {
            let value = found.get(key.as_str()).ok_or_else(|| Error::Missing {
                place: place.clone(),
                key: key.clone(),
                hint: nearest(key, left.iter().map(|(key, _)| key.as_str())),
            })?;
            if value.size() != param.size() {
                return Err(Error::Shape {
                    key: key.clone(),
                    expected: param.size(),
                    got: value.size(),
                });
            }
        }
        left.retain(|(key, tensor)| {
            !copies_base(&*tuner, model, key, tensor)
                && !copies_whole(&*tuner, model, &self.state, key, tensor)
                && !second_bias(&self.state, model.spec().tied, key, tensor)
        });
        if let Some((key, _)) = left.first() {
            return Err(Error::Unexpected {
                place,
                count: left.len(),
                key: (*key).clone(),
                hint: nearest(key, wanted.keys().map(String::as_str)),
            });
        }
        tch::no_grad(|| {
            for (key, param) in &wanted {
                param.shallow_clone().f_copy_(found[key.as_str()])?;
            }
            Ok(())
        })
    }
}

/// The key itself, and how it would be spelt without an adapter's name or a superfluous `.weight`.
fn spellings<'a>(key: &'a str, name: &'a str) -> impl Iterator<Item = String> + 'a {
    let parts: Vec<&str> = key.split('.').collect();
    let n = parts.len();
    let without = move |i: usize| {
        let mut rest = parts.clone();
        let gone = (i < n && (rest[i] == name || rest[i] == "default")).then(|| rest.remove(i));
        gone.map(|_| rest.join("."))
    };
    let inside = [n.wrapping_sub(1), n.wrapping_sub(2)]
        .into_iter()
        .filter_map(without);
    let spelt: Vec<String> = std::iter::once(key.to_owned()).chain(inside).collect();
    let bare: Vec<String> = spelt
        .iter()
        .filter_map(|it| it.strip_suffix(".weight").map(str::to_owned))
        .collect();
    spelt.into_iter().chain(bare)
}

/// Whether a tensor of the file is a copy of an embedding of the base, as `peft` writes when a target is one.
fn copies_base(tuner: &dyn Tuner, model: &mut dyn Model, key: &str, tensor: &Tensor) -> bool {
    let spec = model.spec();
    let ends = [Some(spec.input_embedding), spec.output_embedding];
    let mut same = false;
    model.slots(&mut |at, slot| {
        let named = ["weight", "base_layer.weight"]
            .iter()
            .any(|it| tuner.key(at, it) == key);
        if named && ends.iter().flatten().any(|it| it == at) {
            let base = match slot {
                Slot::Embedding(it) => it.weight().shallow_clone(),
                Slot::Linear(it) => it.base().weight(),
                Slot::Conv(_) | Slot::Norm(_) | Slot::Prompt(_) => return,
            };
            same = is_copy(tensor, &base);
        }
    });
    same
}

/// Whether a tensor of the file is the bias of a masked language model's last layer under its second name, which `peft` writes
/// with `bias="all"`: `cls.predictions.bias` beside `cls.predictions.decoder.bias`. Where that layer is the input embedding they
/// are one tensor, else nothing is computed with this one.
fn second_bias(state: &State, tied: bool, key: &str, tensor: &Tensor) -> bool {
    let first = key.strip_suffix(".bias");
    let first = first.and_then(|at| state.get(&format!("{at}.decoder.bias")));
    first.is_some_and(|it| match tied {
        true => is_copy(tensor, it),
        false => tensor.size() == it.size(),
    })
}

/// Whether a tensor is another, perhaps in other bits: a file that was cast has its copies in fewer than the base.
fn is_copy(tensor: &Tensor, of: &Tensor) -> bool {
    tensor.size() == of.size()
        && (of.equal(&tensor.to_kind(of.kind())) || of.to_kind(tensor.kind()).equal(tensor))
}

/// Whether a tensor of the file is one more copy of what a module has that is trained whole, as `peft` writes with
/// `bias="all"`: of its bias as it is (`.modules_to_save.`), and as the base has it (`.original_module.`).
fn copies_whole(
    tuner: &dyn Tuner,
    model: &mut dyn Model,
    state: &State,
    key: &str,
    tensor: &Tensor,
) -> bool {
    if let Some((at, rest)) = key.split_once(".modules_to_save.") {
        // Within a module of several layers the adapter's name stays.
        let within = rest.split_once('.').map(|(_, it)| it);
        let mut trained = [Some(rest), within].into_iter().flatten();
        return trained.any(|it| {
            let whole = state.get(&format!("{at}.{it}"));
            whole.is_some_and(|it| is_copy(tensor, it))
        });
    }
    let Some((module, rest)) = key.split_once(".original_module.") else {
        return false;
    };
    let (place, mut copied) = (format!("{module}.{rest}"), false);
    model.slots(&mut |at, slot| {
        let params = ["weight", "bias"].into_iter();
        for param in params.filter(|it| tuner.key(at, it) == place) {
            let base = match (&slot, param) {
                (Slot::Conv(it), "weight") => Some(it.base().weight().shallow_clone()),
                (Slot::Conv(it), _) => it.base().bias().map(Tensor::shallow_clone),
                (Slot::Linear(it), "weight") => Some(it.base().weight()),
                (Slot::Linear(it), _) => it.base().bias().map(Tensor::shallow_clone),
                (Slot::Embedding(it), "weight") => Some(it.weight().shallow_clone()),
                (Slot::Norm(it), "weight") => Some(it.base().weight.shallow_clone()),
                (Slot::Norm(it), _) => it.base().bias.as_ref().map(Tensor::shallow_clone),
                (Slot::Embedding(_) | Slot::Prompt(_), _) => None,
            };
            copied = base.is_some_and(|it| is_copy(tensor, &it));
        }
    });
    copied
}
