//! A model folder from another, its layers in another format, in little memory.
//!
//! The model is built as always, but each layer is written as soon as it is there: what is held at any time is
//! one file of the folder that is being written, and never the model.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use peft_core::{BaseFormat, Dense, Error, Linear, Result, Weights, files};
use serde_json::{Map, Value, json};
use tch::{Kind, Tensor};

use crate::{
    HeadOptions, OpenOptions, Source, Task, assemble,
    checkpoint::{INDEX, SINGLE},
    open::{keys, weights},
    save::{self, DenseLayer},
};

/// What a folder was before and after.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Converted {
    /// Layers that are in few bits now.
    pub layers: usize,
    /// Layers, norms and tables that were left as they are.
    pub left: usize,
}

/// Writes the model at `source`, its linear layers in `format`, to `dir`, which must not exist or be empty.
///
/// `besides` are files to be copied along; `limit` is the size of one file in bytes.
pub fn convert(
    source: &Source,
    task: Task,
    options: OpenOptions,
    format: &dyn BaseFormat,
    dir: &Path,
    besides: &[PathBuf],
    limit: Option<u64>,
) -> Result<Converted> {
    let keys = keys(source)?;
    assemble::offers(&keys, task)?;
    format.check(&keys.json)?;
    save::whole(dir, |dir| {
        let mut weights = weights(source, options)?;
        let mut sink = Sink {
            weights: format.over(&mut weights),
            dir: dir.to_owned(),
            limit: limit.unwrap_or(save::SHARD),
            held: Vec::new(),
            seen: BTreeSet::new(),
            shards: Vec::new(),
            config: None,
            dense: Vec::new(),
            quantised: BTreeSet::new(),
            total: 0,
            done: Converted { layers: 0, left: 0 },
        };
        let built = assemble::network(&keys, &mut sink, task, &HeadOptions::default())?;
        let spec = built.network().spec();
        sink.flush()?;
        let (config, done) = (sink.config.take(), sink.done);
        let (mut dense, quantised) = (
            std::mem::take(&mut sink.dense),
            std::mem::take(&mut sink.quantised),
        );
        // That of an encoder is read as a table.
        let head = spec.output_embedding.iter();
        dense.extend(
            head.filter(|it| !quantised.contains(*it))
                .map(|it| DenseLayer {
                    at: it.clone(),
                    biased: false,
                }),
        );
        sink.finish()?;
        weights.finish(assemble::aside(task))?;
        for path in besides {
            let to = dir.join(path.file_name().unwrap_or_default());
            fs::copy(path, &to).map_err(Error::io(path))?;
        }
        let mut json = keys.json.clone();
        if let (Some(kind), Some(map)) = (options.kind, json.as_object_mut()) {
            map.remove("torch_dtype");
            map.insert("dtype".into(), json!(save::dtype_name(kind)));
        }
        if let Some(map) = json.as_object_mut() {
            save::describe(map, config, &dense, &spec);
        }
        files::write_json(&dir.join("config.json"), &json)?;
        Ok(done)
    })
}

/// Hands layers on, without what is in them, and writes that.
struct Sink<'a> {
    weights: Box<dyn Weights + 'a>,
    dir: PathBuf,
    limit: u64,
    /// Of the file that is next.
    held: Vec<(String, Tensor)>,
    seen: BTreeSet<String>,
    /// The names of the tensors of each file that is written.
    shards: Vec<Vec<String>>,
    config: Option<Value>,
    /// Linear layers that were left as they are.
    dense: Vec<DenseLayer>,
    /// Those that are in few bits.
    quantised: BTreeSet<String>,
    /// Bytes that were put.
    total: u64,
    done: Converted,
}

impl Sink<'_> {
    fn put(&mut self, all: Vec<(String, Tensor)>) -> Result<()> {
        for (name, tensor) in all {
            if !self.seen.insert(name.clone()) {
                continue;
            }
            let held: u64 = self.held.iter().map(|(_, it)| save::size(it)).sum();
            if held > 0 && held + save::size(&tensor) > self.limit {
                self.flush()?;
            }
            self.total += save::size(&tensor);
            self.held.push((name, tensor));
        }
        Ok(())
    }

    /// Writes what is held.
    fn flush(&mut self) -> Result<()> {
        if self.held.is_empty() {
            return Ok(());
        }
        let held = std::mem::take(&mut self.held);
        let path = self.dir.join(number(self.shards.len()));
        save::write_file(&path, &held.iter().collect::<Vec<_>>())?;
        self.shards
            .push(held.into_iter().map(|(name, _)| name).collect());
        Ok(())
    }

    /// Gives the files their names, now that it is known how many there are.
    fn finish(self) -> Result<()> {
        let count = self.shards.len();
        let rename = |i: usize, name: &str| {
            let from = self.dir.join(number(i));
            fs::rename(&from, self.dir.join(name)).map_err(Error::io(&from))
        };
        if count == 1 {
            return rename(0, SINGLE);
        }
        let mut map = Map::new();
        for (i, names) in self.shards.iter().enumerate() {
            let file = save::shard_name(i, count);
            rename(i, &file)?;
            map.extend(names.iter().map(|it| (it.clone(), file.clone().into())));
        }
        let metadata = json!({"total_size": self.total});
        let index = json!({"metadata": metadata, "weight_map": Value::Object(map)});
        files::write_json(&self.dir.join(INDEX), &index)
    }

    /// Writes a layer and leaves its shape.
    fn layer(&mut self, at: &str, linear: Linear, transposed: bool) -> Result<Linear> {
        let base = linear.base();
        let (out, inp) = base.shape();
        let bias = base.bias().map(Tensor::shallow_clone);
        match base.stored() {
            Some(stored) => {
                self.done.layers += 1;
                self.quantised.insert(at.to_owned());
                self.put(stored.named(at, bias.as_ref()))?;
                self.config.get_or_insert(stored.config);
            }
            None => {
                self.done.left += 1;
                self.dense.push(DenseLayer {
                    at: at.to_owned(),
                    biased: bias.is_some(),
                });
                let weight = base.weight();
                let weight = if transposed { weight.tr() } else { weight };
                self.put(vec![(format!("{at}.weight"), weight)])?;
                let bias = bias.as_ref().map(Tensor::shallow_clone);
                self.put(Vec::from_iter(bias.map(|it| (format!("{at}.bias"), it))))?;
            }
        }
        let empty = Tensor::zeros([1, 1], (Kind::Float, base.device())).expand([out, inp], false);
        Ok(Linear::new(Dense::new(empty, bias)))
    }
}

/// A file whose name is not known yet.
fn number(i: usize) -> String {
    format!("{i}.partial")
}

impl Weights for Sink<'_> {
    fn tensor(&mut self, key: &str, shape: &[i64]) -> Result<Tensor> {
        let tensor = self.weights.tensor(key, shape)?;
        if !self.seen.contains(key) {
            self.done.left += 1;
            self.put(vec![(key.to_owned(), tensor.shallow_clone())])?;
        }
        Ok(tensor)
    }

    fn stored(&mut self, key: &str) -> Result<Tensor> {
        self.weights.stored(key)
    }

    fn kind(&self) -> Option<Kind> {
        self.weights.kind()
    }

    fn has(&self, key: &str) -> bool {
        self.weights.has(key)
    }

    fn linear(&mut self, at: &str, shape: (i64, i64), bias: bool) -> Result<Linear> {
        let linear = self.weights.linear(at, shape, bias)?;
        self.layer(at, linear, false)
    }

    fn linear_transposed(&mut self, at: &str, shape: (i64, i64)) -> Result<Linear> {
        let linear = self.weights.linear_transposed(at, shape)?;
        self.layer(at, linear, true)
    }
}
