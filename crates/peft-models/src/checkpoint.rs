//! Weights from a Hugging Face folder or a GGUF file.
//!
//! Files are memory-mapped; each tensor is read once, on its way into the
//! model, and converted there if another dtype is wanted. A model loads
//! without a second copy of itself.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use peft_core::{
    Error, Result, Weights, files, nearest,
    tensors::{self, Mapped},
};
use peft_gguf::HfView;
use serde_json::Value;
use tch::{Device, Kind, Tensor};

/// On-disk name of unsharded weights.
pub(crate) const SINGLE: &str = "model.safetensors";
/// On-disk name of the list of shards.
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// Buffers that old versions of `transformers` saved and nobody reads, by how their names end.
const IGNORED: &[&str] = &[
    ".attn.bias",
    ".attn.masked_bias",
    ".rotary_emb.inv_freq",
    "embeddings.position_ids",
    "embeddings.token_type_ids",
    ".EncDecAttention.relative_attention_bias.weight",
];

/// What a weight can be.
const FLOATS: [Kind; 4] = [Kind::Float, Kind::BFloat16, Kind::Half, Kind::Double];

/// The weights of a model on disk.
#[derive(Debug)]
pub struct Checkpoint {
    source: Source,
    place: PathBuf,
    kind: Option<Kind>,
    device: Device,
    taken: BTreeSet<String>,
    /// What was read last.
    last: Option<String>,
}

#[derive(Debug)]
enum Source {
    Safetensors {
        files: Vec<Mapped>,
        /// Which file holds a tensor.
        index: BTreeMap<String, usize>,
    },
    Gguf(Box<HfView>),
}

impl Checkpoint {
    /// Opens the weights of a folder. `kind`: the dtype of the model; `None`: the folder's own, as `transformers` finds it with
    /// `dtype="auto"`: what config.json says, else that of the first weight.
    pub fn open(dir: &Path, kind: Option<Kind>, device: Device) -> Result<Checkpoint> {
        let (single, index) = (dir.join(SINGLE), dir.join(INDEX));
        let (files, index) = if single.exists() {
            let file = Mapped::open(&single)?;
            let index = file.names().map(|name| (name.to_owned(), 0)).collect();
            (vec![file], index)
        } else if index.exists() {
            shards(dir, &index)?
        } else {
            let pickle = dir.join("pytorch_model.bin").exists();
            let hint = if pickle {
                "; `pytorch_model.bin` is a pickle, which can run code when it is read: save the model as safetensors"
            } else {
                ""
            };
            let reason = format!("no `{SINGLE}` and no `{INDEX}` in this folder{hint}");
            return Err(Error::file(dir, reason));
        };
        let first = |(name, file): (&String, &usize)| {
            let (_, dtype) = files[*file].info(name)?;
            // What lies beside a weight in few bits has a dtype of its own.
            let weight = !name.contains(".weight.") && !name.ends_with(".SCB");
            tensors::kind(dtype).filter(|it| weight && FLOATS.contains(it))
        };
        let kind = kind
            .or_else(|| declared(dir))
            .or_else(|| index.iter().find_map(first));
        Ok(Checkpoint {
            source: Source::Safetensors { files, index },
            place: dir.to_owned(),
            kind,
            device,
            taken: BTreeSet::new(),
            last: None,
        })
    }

    /// The weights of a GGUF file; `kind` as in [`Checkpoint::open`], where `None` means fp32.
    pub fn gguf(view: HfView, path: &Path, kind: Option<Kind>, device: Device) -> Checkpoint {
        Checkpoint {
            source: Source::Gguf(Box::new(view)),
            place: path.to_owned(),
            kind,
            device,
            taken: BTreeSet::new(),
            last: None,
        }
    }

    /// Checks that nothing is left that no layer took; gives back what `aside` knows as another head's, by how its name
    /// begins.
    pub fn finish(mut self, aside: &[&str]) -> Result<Vec<String>> {
        self.release_last();
        let mut names = self.names();
        names.retain(|name| {
            !self.taken.contains(name) && !IGNORED.iter().any(|it| name.ends_with(it))
        });
        let (kept, left): (Vec<_>, Vec<_>) = names
            .into_iter()
            .partition(|name| aside.iter().any(|it| name.starts_with(it)));
        let Some(first) = left.first() else {
            return Ok(kept);
        };
        Err(Error::Unexpected {
            place: self.place.display().to_string(),
            count: left.len(),
            key: first.clone(),
            hint: nearest(first, self.taken.iter().map(String::as_str)),
        })
    }

    /// Marks a tensor as read.
    fn take(&mut self, key: &str) {
        self.release_last();
        self.taken.insert(key.to_owned());
        self.last = Some(key.to_owned());
    }

    /// What was read last was converted or encoded by now, or is a view that was not looked at yet: its pages are given back, so
    /// that a model which is kept in another form never has its file in memory, too.
    fn release_last(&mut self) {
        if let Some(last) = self.last.take()
            && let Source::Safetensors { files, index } = &self.source
            && let Some(file) = index.get(&last)
        {
            files[*file].release(&last);
        }
    }

    fn names(&self) -> Vec<String> {
        match &self.source {
            Source::Safetensors { index, .. } => index.keys().cloned().collect(),
            Source::Gguf(view) => view.names(),
        }
    }

    fn read(&self, key: &str) -> Result<Tensor> {
        if !self.has(key) {
            let names = self.names();
            return Err(Error::Missing {
                place: self.place.display().to_string(),
                key: key.to_owned(),
                hint: nearest(key, names.iter().map(String::as_str)),
            });
        }
        match &self.source {
            Source::Safetensors { files, index } => files[index[key]].tensor(key),
            Source::Gguf(view) => {
                let shape: Vec<i64> = view
                    .shape(key)
                    .unwrap_or_default()
                    .iter()
                    .map(|&d| d as i64)
                    .collect();
                let values = view.tensor(key).map_err(|e| Error::file(&self.place, e))?;
                Ok(Tensor::from_slice(&values).view(shape.as_slice()))
            }
        }
    }
}

impl Weights for Checkpoint {
    fn tensor(&mut self, key: &str, shape: &[i64]) -> Result<Tensor> {
        let tensor = self.read(key)?;
        if tensor.size() != shape {
            return Err(Error::Shape {
                key: key.to_owned(),
                expected: shape.to_owned(),
                got: tensor.size(),
            });
        }
        if !FLOATS.contains(&tensor.kind()) {
            let reason = format!(
                "`{key}` is of type {:?}, expected floating point",
                tensor.kind()
            );
            return Err(Error::file(&self.place, reason));
        }
        self.take(key);
        let kind = self.kind.unwrap_or(tensor.kind());
        Ok(tensor.f_to_device_(self.device, kind, false, false)?)
    }

    fn kind(&self) -> Option<Kind> {
        self.kind
    }

    fn stored(&mut self, key: &str) -> Result<Tensor> {
        let tensor = self.read(key)?;
        self.take(key);
        Ok(tensor.f_to_device_(self.device, tensor.kind(), false, false)?)
    }

    fn has(&self, key: &str) -> bool {
        match &self.source {
            Source::Safetensors { index, .. } => index.contains_key(key),
            Source::Gguf(view) => view.shape(key).is_some(),
        }
    }
}

/// The dtype that config.json gives the model.
fn declared(dir: &Path) -> Option<Kind> {
    let config = files::read_json(&dir.join("config.json")).ok()?;
    let name = ["dtype", "torch_dtype"]
        .iter()
        .find_map(|key| config.get(key)?.as_str())?;
    match name.strip_prefix("torch.").unwrap_or(name) {
        "float32" => Some(Kind::Float),
        "bfloat16" => Some(Kind::BFloat16),
        "float16" => Some(Kind::Half),
        "float64" => Some(Kind::Double),
        _ => None,
    }
}

fn shards(dir: &Path, path: &Path) -> Result<(Vec<Mapped>, BTreeMap<String, usize>)> {
    let json = files::read_json(path)?;
    let map = json.get("weight_map").and_then(Value::as_object);
    let map = map.ok_or_else(|| Error::file(path, "`weight_map` is missing or no object"))?;
    let mut opened: BTreeMap<&str, usize> = BTreeMap::new();
    let (mut files, mut index) = (Vec::<Mapped>::new(), BTreeMap::new());
    for (key, file) in map {
        let name = file
            .as_str()
            .filter(|name| Path::new(name).components().count() == 1 && !name.starts_with('.'))
            .ok_or_else(|| {
                Error::file(
                    path,
                    format!("`{key}` is said to lie in {file}, which is no file name"),
                )
            })?;
        let at = match opened.get(name) {
            Some(&at) => at,
            None => {
                files.push(Mapped::open(&dir.join(name))?);
                *opened.entry(name).or_insert(files.len() - 1)
            }
        };
        if !files[at].has(key) {
            let hint = nearest(key, files[at].names());
            let reason = format!("`{key}` is said to lie in `{name}`, which lacks it{hint}");
            return Err(Error::file(path, reason));
        }
        index.insert(key.clone(), at);
    }
    Ok((files, index))
}
