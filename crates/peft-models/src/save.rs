//! A model folder that `transformers` loads.
//!
//! One file up to 5 GB, shards with an index above, as `save_pretrained` does
//! it. The folder is written beside its place and renamed when it is whole;
//! tensors go to the disk one at a time.

use std::{
    collections::{BTreeSet, HashMap},
    fs,
    io::{BufWriter, Write},
    path::{Path, PathBuf},
};

use peft_core::{Error, Result, Slot, Spec, files, tensors::dtype};
use peft_torch::memory::with_bytes;
use serde_json::{Map, Value, json};
use tch::{Kind, Tensor};

use crate::{
    Network, biases,
    checkpoint::{INDEX, SINGLE},
    head::bias_key,
};

/// The largest file, in bytes, that `transformers` writes by default.
pub(crate) const SHARD: u64 = 5_000_000_000;

/// Writes the base (with whatever was merged into it) to `dir`, which must not exist or be empty.
///
/// `besides` are files to be copied along: the tokenizer, the generation settings.
pub fn save(model: &mut dyn Network, dir: &Path, besides: &[PathBuf]) -> Result<()> {
    save_sharded(model, dir, besides, SHARD)
}

/// [`save`] with another limit for one file.
pub fn save_sharded(
    model: &mut dyn Network,
    dir: &Path,
    besides: &[PathBuf],
    limit: u64,
) -> Result<()> {
    whole(dir, |partial| fill(model, partial, besides, limit))
}

/// In a folder that is being written, locked by whoever writes.
const LOCK: &str = ".lock";

/// Lets `fill` write a folder beside `dir`, and gives it that name when it is whole. What a process that was killed meanwhile
/// left of such a folder is removed by the next.
pub(crate) fn whole<T>(dir: &Path, fill: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
    if dir.read_dir().is_ok_and(|mut it| it.next().is_some()) {
        return Err(Error::file(
            dir,
            "exists and is not empty; choose another folder",
        ));
    }
    let name = dir
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    remove_abandoned(dir, &format!(".{name}."));
    let partial = dir.with_file_name(format!(".{name}.{}.partial", std::process::id()));
    let written = fs::create_dir_all(&partial)
        .map_err(Error::io(&partial))
        .and_then(|()| {
            let path = partial.join(LOCK);
            let lock = fs::File::create(&path).map_err(Error::io(&path))?;
            let _ = lock.lock(); // where files cannot be locked, nothing is ever taken for abandoned
            let result = fill(&partial)?;
            drop(lock);
            fs::remove_file(&path).map_err(Error::io(&path))?;
            Ok(result)
        })
        .and_then(|result| {
            // An empty folder is in the way of a rename on some systems.
            let _ = fs::remove_dir(dir);
            fs::rename(&partial, dir).map_err(Error::io(dir))?;
            Ok(result)
        });
    if written.is_err() {
        let _ = fs::remove_dir_all(&partial);
    }
    written
}

/// Removes what processes that are no more began to write for `dir`: a lock ends with its process.
fn remove_abandoned(dir: &Path, begins: &str) {
    let parent = dir.parent().filter(|it| !it.as_os_str().is_empty());
    let entries = fs::read_dir(parent.unwrap_or(Path::new("."))).into_iter();
    for path in entries.flatten().flatten().map(|it| it.path()) {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let ours = name.starts_with(begins) && name.ends_with(".partial");
        let free = || fs::File::open(path.join(LOCK)).is_ok_and(|it| it.try_lock().is_ok());
        if ours && free() {
            let _ = fs::remove_dir_all(&path);
        }
    }
}

fn fill(model: &mut dyn Network, dir: &Path, besides: &[PathBuf], limit: u64) -> Result<()> {
    let State {
        mut tensors,
        linear,
        tied,
        quantised,
        dense,
    } = state(model);
    let spec = model.spec();
    for path in besides {
        let to = dir.join(path.file_name().unwrap_or_default());
        fs::copy(path, &to).map_err(Error::io(path))?;
    }
    let mut config = model.config().clone();
    config["tie_word_embeddings"] = tied.into();
    let kind = dtype_name(model.kind());
    if let Some(map) = config.as_object_mut() {
        map.remove("torch_dtype");
        map.insert("dtype".into(), json!(kind));
        describe(map, quantised, &dense, &spec);
        biases::settle(map, &mut tensors, &linear)?;
    }
    files::write_json(&dir.join("config.json"), &config)?;
    write_shards(&tensors, dir, limit)
}

/// As `config.json` calls a dtype.
pub(crate) fn dtype_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Double => "float64",
        Kind::BFloat16 => "bfloat16",
        Kind::Half => "float16",
        _ => "float32",
    }
}

/// The key of `quantization_config` for the layers that are dense.
const SKIPPED: &str = "llm_int8_skip_modules";

/// A linear layer that is dense.
#[derive(Debug)]
pub(crate) struct DenseLayer {
    pub(crate) at: String,
    pub(crate) biased: bool,
}

/// Says in `config.json` in which bits layers are kept, or that none is; `dense`: the linear layers that are not.
///
/// Python makes every layer one of few bits that this does not name. If nothing is named at all it leaves the output
/// embedding alone and the model's last parameter, by whose name it means a head: only one without a bias is found so.
pub(crate) fn describe(
    config: &mut Map<String, Value>,
    quantised: Option<Value>,
    dense: &[DenseLayer],
    spec: &Spec,
) {
    let key = "quantization_config";
    // What is known of the folder that it came from goes on, such as what was left dense.
    let old = config.remove(key);
    if let Some(mut new) = quantised {
        let found = |it: &DenseLayer| {
            let place = |head: &Option<String>| head.as_deref() == Some(&it.at);
            place(&spec.output_embedding) || place(&spec.task_head) && !it.biased
        };
        if !dense.iter().all(found) {
            let mut names: BTreeSet<&String> = dense.iter().map(|it| &it.at).collect();
            // Of a head that is the input embedding, too: to Python it is one of the layers.
            names.extend(spec.output_embedding.iter().filter(|_| spec.tied));
            new[SKIPPED] = names.into_iter().cloned().collect();
        }
        let old = old.as_ref().and_then(Value::as_object);
        let same = old.filter(|it| it.get("load_in_4bit") == new.get("load_in_4bit"));
        for (key, value) in same.into_iter().flatten() {
            new[key.as_str()] = value.clone();
        }
        config.insert(key.into(), new);
    }
}

/// The base as it lies on disk.
struct State {
    /// By their names, in their layout.
    tensors: Vec<(String, Tensor)>,
    /// The head is the input embedding.
    tied: bool,
    /// In which bits layers are kept, if some are not dense.
    quantised: Option<Value>,
    /// The linear layers that are.
    dense: Vec<DenseLayer>,
    /// All linear layers, and how many numbers they give.
    linear: Vec<(String, i64)>,
}

fn state(model: &mut dyn Network) -> State {
    let spec = model.spec();
    let (mut all, mut dense, mut linear) = (Vec::new(), Vec::new(), Vec::new());
    let (mut table, mut tied, mut quantised) = (None, false, None);
    model.slots(&mut |at, slot| match slot {
        Slot::Embedding(it) => {
            if at == spec.input_embedding {
                table = Some(it.weight().data_ptr());
            }
            all.push((format!("{at}.weight"), it.weight().shallow_clone()));
        }
        Slot::Linear(it) => {
            linear.push((at.to_owned(), it.base().shape().0));
            if let Some(stored) = it.base().stored() {
                all.extend(stored.named(at, it.base().bias()));
                quantised = Some(stored.config);
                return;
            }
            dense.push(DenseLayer {
                at: at.to_owned(),
                biased: it.base().bias().is_some(),
            });
            let weight = it.base().weight();
            let head = spec.output_embedding.as_deref() == Some(at);
            let bias = it.base().bias().map(Tensor::shallow_clone);
            let shared = head && spec.tied && table == Some(weight.data_ptr());
            if let Some(bias) = bias {
                // Tied or not, `transformers` keeps the bias of such a head beside it; untied, it reads the head's own.
                let own = format!("{at}.bias");
                if head && bias_key(at) != own {
                    all.push((bias_key(at), bias.shallow_clone()));
                }
                if !shared || bias_key(at) == own {
                    all.push((own, bias));
                }
            }
            if shared {
                tied = true;
                return;
            }
            let kept = if it.base().transposed() {
                weight.tr()
            } else {
                weight
            };
            all.push((format!("{at}.weight"), kept));
        }
        Slot::Conv(it) => {
            let base = it.base();
            all.push((format!("{at}.weight"), base.weight().shallow_clone()));
            all.extend(
                base.bias()
                    .map(|b| (format!("{at}.bias"), b.shallow_clone())),
            );
        }
        Slot::Norm(it) => {
            let affine = it.base();
            all.push((format!("{at}.weight"), affine.weight.shallow_clone()));
            all.extend(
                affine
                    .bias
                    .iter()
                    .map(|b| (format!("{at}.bias"), b.shallow_clone())),
            );
        }
        _ => {}
    });
    State {
        tensors: all,
        tied,
        quantised,
        dense,
        linear,
    }
}

pub(crate) fn size(tensor: &Tensor) -> u64 {
    (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64
}

fn write_shards(tensors: &[(String, Tensor)], dir: &Path, limit: u64) -> Result<()> {
    let mut shards: Vec<Vec<&(String, Tensor)>> = vec![Vec::new()];
    let mut filled = 0;
    for entry in tensors {
        if filled > 0 && filled + size(&entry.1) > limit {
            shards.push(Vec::new());
            filled = 0;
        }
        filled += size(&entry.1);
        shards.last_mut().expect("one at least").push(entry);
    }
    if let [only] = shards.as_slice() {
        return write_file(&dir.join(SINGLE), only);
    }
    let count = shards.len();
    let mut map = Map::new();
    for (i, shard) in shards.iter().enumerate() {
        let name = shard_name(i, count);
        for (key, _) in shard.iter() {
            map.insert(key.clone(), name.clone().into());
        }
        write_file(&dir.join(&name), shard)?;
    }
    let total: u64 = tensors.iter().map(|(_, t)| size(t)).sum();
    let index = json!({"metadata": {"total_size": total}, "weight_map": Value::Object(map)});
    files::write_json(&dir.join(INDEX), &index)
}

/// How the first of so many files is called.
pub(crate) fn shard_name(i: usize, count: usize) -> String {
    format!("model-{:05}-of-{count:05}.safetensors", i + 1)
}

/// One safetensors file, header first, then each tensor in turn: no second copy of the model in memory.
pub(crate) fn write_file(path: &Path, tensors: &[&(String, Tensor)]) -> Result<()> {
    // The format wants wide elements first, then names in order.
    let mut order: Vec<&&(String, Tensor)> = tensors.iter().collect();
    order.sort_by_key(|(name, t)| {
        (
            std::cmp::Reverse(t.kind().elt_size_in_bytes()),
            name.clone(),
        )
    });
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut end = 0;
    for (name, tensor) in order.iter().map(|it| (&it.0, &it.1)) {
        let begin = end;
        end += size(tensor);
        let dtype = dtype(tensor.kind()).ok_or_else(|| {
            Error::file(
                path,
                format!(
                    "`{name}` is of type {:?}, which has no place here",
                    tensor.kind()
                ),
            )
        })?;
        header.insert(
            name.clone(),
            json!({"dtype": dtype, "shape": tensor.size(), "data_offsets": [begin, end]}),
        );
    }
    let mut text = Value::Object(header).to_string();
    text.push_str(&" ".repeat(text.len().next_multiple_of(8) - text.len()));
    let mut file = BufWriter::new(fs::File::create(path).map_err(Error::io(path))?);
    let mut put = |bytes: &[u8]| file.write_all(bytes).map_err(Error::io(path));
    put(&(text.len() as u64).to_le_bytes())?;
    put(text.as_bytes())?;
    for (_, tensor) in order.iter().map(|it| (&it.0, &it.1)) {
        with_bytes(tensor, &mut put)?;
    }
    // Not forced to the disk: a merged model can be made again, and a kill leaves the pages with the system.
    file.flush().map_err(Error::io(path))
}

/// How many numbers the base has, tied tables counted once, those in few bits as numbers and not as bytes.
pub fn parameters(model: &mut dyn Network) -> i64 {
    let mut seen: HashMap<usize, i64> = HashMap::new();
    let mut count = |it: &Tensor| {
        seen.insert(it.data_ptr() as usize, it.numel() as i64);
    };
    let mut packed = 0;
    model.slots(&mut |_, slot| match slot {
        Slot::Linear(it) => {
            let base = it.base();
            match base.is_dense() {
                true => count(&base.weight()),
                false => packed += base.shape().0 * base.shape().1,
            }
            base.bias().into_iter().for_each(&mut count);
        }
        Slot::Embedding(it) => count(it.weight()),
        Slot::Conv(it) => {
            count(it.base().weight());
            it.base().bias().into_iter().for_each(&mut count);
        }
        Slot::Norm(it) => {
            count(&it.base().weight);
            it.base().bias.iter().for_each(&mut count);
        }
        _ => {}
    });
    packed + seen.values().sum::<i64>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_killed_process_left_is_removed_and_what_another_writes_is_not() {
        let parent = tempfile::tempdir().unwrap();
        let at = |name: &str| parent.path().join(name);
        for name in [
            ".out.1.partial",
            ".out.2.partial",
            ".other.1.partial",
            ".out.3.partial",
        ] {
            fs::create_dir(at(name)).unwrap();
            fs::write(at(name).join("model.safetensors"), "half").unwrap();
        }
        for name in [".out.1.partial", ".out.2.partial", ".other.1.partial"] {
            fs::write(at(name).join(LOCK), "").unwrap();
        }
        let writing = fs::File::open(at(".out.2.partial").join(LOCK)).unwrap();
        writing.lock().unwrap();
        let out = at("out");
        let file = |dir: &Path| fs::write(dir.join("config.json"), "{}").map_err(Error::io(dir));
        whole(&out, file).unwrap();
        let mut left: Vec<_> = fs::read_dir(parent.path())
            .unwrap()
            .map(|it| it.unwrap().file_name())
            .collect();
        left.sort();
        // Without a lock nobody knows whether somebody has only just begun.
        assert_eq!(
            left,
            [
                ".other.1.partial",
                ".out.2.partial",
                ".out.3.partial",
                "out"
            ]
        );
        let files: Vec<_> = fs::read_dir(&out).unwrap().collect();
        assert_eq!(files.len(), 1, "the lock is gone");
    }
}
