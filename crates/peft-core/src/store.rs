//! An adapter folder: `adapter_config.json` and `adapter_model.safetensors`, as Python's `peft` writes them.
//!
//! Loading is strict. Python warns about a key that is missing and leaves that factor as it was initialised, so half an
//! adapter is at work and nobody knows; here that is an error.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use tch::Tensor;

use crate::{
    Error, Model, ModelExt, Registry, Result, Slot, State, Tuner, files, nearest, tensors,
};

/// On-disk name of the configuration.
const CONFIG: &str = "adapter_config.json";
/// On-disk name of the tensors.
const WEIGHTS: &str = "adapter_model.safetensors";

/// A method's configuration and tensors, apart from any model: what an adapter folder holds.
#[derive(Debug)]
pub struct Adapter {
    /// The configured method.
    pub tuner: Box<dyn Tuner>,
    /// Its tensors by on-disk key.
    pub state: State,
    /// Where it came from, for messages.
    pub source: PathBuf,
}

impl Adapter {
    /// Reads a folder that Python's `peft` or this crate wrote.
    pub fn load(dir: &Path, registry: &Registry) -> Result<Adapter> {
        let path = dir.join(CONFIG);
        if !path.exists() {
            let reason = format!("no `{CONFIG}` in this folder, so it holds no adapter");
            return Err(Error::file(dir, reason));
        }
        let named = |error| match error {
            Error::Config { .. } | Error::Unsupported { .. } | Error::UnknownMethod { .. } => {
                Error::file(&path, error)
            }
            other => other,
        };
        let tuner = registry.parse(files::read_json(&path)?).map_err(named)?;
        let source = dir.join(WEIGHTS);
        if !source.exists() && dir.join("adapter_model.bin").exists() {
            let reason = "a pickle, which can run code when it is read; save it with `safe_serialization=True`";
            return Err(Error::file(&dir.join("adapter_model.bin"), reason));
        }
        let state = tensors::read(&source)?;
        Ok(Adapter {
            tuner,
            state,
            source,
        })
    }

    /// Writes the folder. Each file is there whole or not at all.
    pub fn save(&self, dir: &Path) -> Result<()> {
        tensors::write(&dir.join(WEIGHTS), &self.state)?;
        files::write_json(&dir.join(CONFIG), &self.tuner.to_json())
    }

    /// Takes the parameters called `name` out of a dressed model.
    pub fn of(name: &str, tuner: &dyn Tuner, model: &mut dyn Model) -> Result<Adapter> {
        let resolved = tuner.resolve(&model.outline())?;
        let tuner = resolved.saved().unwrap_or(resolved);
        let mut state = State::new();
        for param in model.saved(name) {
            let key = tuner.key(&param.at, &param.name);
            state.insert(key, tch::no_grad(|| param.tensor.detach().copy()));
        }
        Ok(Adapter {
            tuner,
            state,
            source: PathBuf::from(WEIGHTS),
        })
    }

    /// Dresses `model` under `name` and fills the new parameters. An error leaves the model as it was.
    ///
    /// Every parameter must be in the file and every tensor of the file must be taken. Accepted besides the
    /// keys of `peft` are those with the adapter's name inside (`lora_A.default.weight`) and with a `.weight`
    /// behind a bare parameter, and copies of base embeddings that equal the base.
    pub fn apply(&self, name: &str, model: &mut dyn Model) -> Result<()> {
        model.inject(name, &*self.tuner)?;
        let filled = self.fill(name, model);
        if filled.is_err() {
            model.delete(name)?;
        }
        filled
    }

    /// Fills the parameters called `name`, which the model has already.
    pub fn fill(&self, name: &str, model: &mut dyn Model) -> Result<()> {
        let place = self.source.display().to_string();
        let tuner = self.tuner.resolve(&model.outline())?;
        let wanted: BTreeMap<String, Tensor> = model
            .params(name)
            .into_iter()
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
        left.retain(|(key, tensor)| !copies_base(&*tuner, model, key, tensor));
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
                Slot::Norm(_) => return,
            };
            same = base.size() == tensor.size() && base.equal(&tensor.to_kind(base.kind()));
        }
    });
    same
}
