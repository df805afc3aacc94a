//! safetensors files and tch tensors.
//!
//! A file is memory-mapped. A tensor that is wanted as it is stored is a view
//! of the mapped pages: nothing is copied, and pages are read when they are
//! first used. One that is wanted in another dtype is converted from there, so
//! at no time is there a second copy of the file in memory.

use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    path::{Path, PathBuf},
    sync::Arc,
};

use memmap2::{MmapMut, MmapOptions};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use tch::{Device, Kind, Tensor};

use crate::{Error, Result, files, nearest};

/// Tensors by name, in order.
pub type State = BTreeMap<String, Tensor>;

/// A memory-mapped safetensors file.
///
/// While it is open nobody may change the file in place; replacing it is fine.
#[derive(Debug)]
pub struct Mapped {
    path: PathBuf,
    map: Arc<MmapMut>,
    infos: BTreeMap<String, Info>,
    metadata: HashMap<String, String>,
}

#[derive(Debug, Clone)]
struct Info {
    dtype: Dtype,
    shape: Vec<i64>,
    begin: usize,
    end: usize,
}

impl Mapped {
    /// Opens a file and checks its header against its length.
    pub fn open(path: &Path) -> Result<Mapped> {
        let file = File::open(path).map_err(Error::io(path))?;
        // SAFETY: a private mapping; the pages are read through tensors that nothing writes to. A file that
        // somebody truncates meanwhile would stop the process, which the documentation of `Mapped` says.
        let map = unsafe { MmapOptions::new().map_copy(&file) }.map_err(Error::io(path))?;
        let (header, metadata) =
            SafeTensors::read_metadata(&map).map_err(|e| Error::file(path, explain(&e)))?;
        let mut infos = BTreeMap::new();
        for (name, info) in metadata.tensors() {
            let (begin, end) = info.data_offsets;
            let shape = info.shape.iter().map(|&d| d as i64).collect();
            let start = header + 8;
            if end.checked_add(start).is_none_or(|end| end > map.len()) {
                return Err(Error::file(
                    path,
                    format!("`{name}` lies beyond the end of the file"),
                ));
            }
            let info = Info {
                dtype: info.dtype,
                shape,
                begin: start + begin,
                end: start + end,
            };
            infos.insert(name, info);
        }
        let metadata = metadata.metadata().clone().unwrap_or_default();
        Ok(Mapped {
            path: path.to_owned(),
            map: Arc::new(map),
            infos,
            metadata,
        })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The names of its tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.infos.keys().map(String::as_str)
    }

    /// The text entries of its header.
    pub fn metadata(&self) -> &HashMap<String, String> {
        &self.metadata
    }

    /// Whether there is a tensor of this name.
    pub fn has(&self, name: &str) -> bool {
        self.infos.contains_key(name)
    }

    /// Shape and dtype of a tensor.
    pub fn info(&self, name: &str) -> Option<(&[i64], Dtype)> {
        self.infos
            .get(name)
            .map(|it| (it.shape.as_slice(), it.dtype))
    }

    /// A tensor as it is stored: a view of the mapped file where its alignment allows.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let info = self.infos.get(name).ok_or_else(|| Error::Missing {
            place: self.path.display().to_string(),
            key: name.to_owned(),
            hint: nearest(name, self.names()),
        })?;
        let kind = kind(info.dtype).ok_or_else(|| {
            let known = "F64, F32, F16, BF16, I64, I32, I16, I8, U8, BOOL";
            let reason = format!("`{name}` is of type {:?}; readable are {known}", info.dtype);
            Error::file(&self.path, reason)
        })?;
        let bytes = &self.map[info.begin..info.end];
        if info.shape.is_empty() || bytes.is_empty() || !aligned(bytes, kind) {
            return Ok(Tensor::f_from_data_size(bytes, &info.shape, kind)?);
        }
        // SAFETY: the map is private, never moved and held by the tensor.
        Ok(unsafe { peft_torch::memory::borrow(bytes, &info.shape, kind, self.map.clone()) }?)
    }

    /// Gives the pages of a tensor back to the system. What still uses them reads the file again; what somebody wrote to them is
    /// gone, so this is for tensors that were read and not changed.
    pub fn release(&self, name: &str) {
        #[cfg(unix)]
        if let Some(info) = self.infos.get(name)
            && info.begin < info.end
        {
            // SAFETY: the pages are those of a file that nobody changes, so their contents are the same when they come again.
            let done = unsafe {
                self.map.unchecked_advise_range(
                    memmap2::UncheckedAdvice::DontNeed,
                    info.begin,
                    info.end - info.begin,
                )
            };
            drop(done); // an advice: without it there is less memory, and nothing else
        }
    }

    /// Every tensor.
    pub fn all(&self) -> Result<State> {
        let names = self.names();
        names
            .map(|name| Ok((name.to_owned(), self.tensor(name)?)))
            .collect()
    }
}

fn aligned(bytes: &[u8], kind: Kind) -> bool {
    (bytes.as_ptr() as usize).is_multiple_of(kind.elt_size_in_bytes())
}

/// Reads a whole file.
pub fn read(path: &Path) -> Result<State> {
    Mapped::open(path)?.all()
}

/// Writes a file, whole or not at all, with the header that Python writes.
pub fn write(path: &Path, state: &State) -> Result<()> {
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let mut held = Vec::new();
    for (name, tensor) in state {
        held.push((name.as_str(), Bytes::of(tensor)?));
    }
    let mut views = Vec::new();
    for (name, it) in &held {
        let view = TensorView::new(it.dtype, it.shape.clone(), &it.bytes)
            .map_err(|error| Error::file(path, format!("`{name}`: {error}")))?;
        views.push((*name, view));
    }
    let data = safetensors::serialize(views, Some(metadata)).map_err(|e| Error::file(path, e))?;
    files::write(path, |file| file.write_all(&data))
}

/// The bytes of a tensor, as safetensors wants them.
#[derive(Debug)]
pub struct Bytes {
    /// Element type.
    pub dtype: Dtype,
    /// Shape.
    pub shape: Vec<usize>,
    /// Little-endian, row-major.
    pub bytes: Vec<u8>,
}

impl Bytes {
    /// Copies a tensor out of torch.
    pub fn of(tensor: &Tensor) -> Result<Bytes> {
        let kind = tensor.kind();
        let dtype = dtype(kind).ok_or_else(|| {
            tch::TchError::Kind(format!("{kind:?} has no place in a safetensors file"))
        })?;
        let tensor = tensor.detach().to_device(Device::Cpu).contiguous();
        let mut bytes = vec![0u8; tensor.numel() * kind.elt_size_in_bytes()];
        if !bytes.is_empty() {
            tensor.f_copy_data_u8(&mut bytes, tensor.numel())?;
        }
        let shape = tensor.size().iter().map(|&d| d as usize).collect();
        Ok(Bytes {
            dtype,
            shape,
            bytes,
        })
    }
}

/// The element type of torch for one of safetensors, if torch here has it.
pub fn kind(dtype: Dtype) -> Option<Kind> {
    Some(match dtype {
        Dtype::F64 => Kind::Double,
        Dtype::F32 => Kind::Float,
        Dtype::F16 => Kind::Half,
        Dtype::BF16 => Kind::BFloat16,
        Dtype::I64 => Kind::Int64,
        Dtype::I32 => Kind::Int,
        Dtype::I16 => Kind::Int16,
        Dtype::I8 => Kind::Int8,
        Dtype::U8 => Kind::Uint8,
        Dtype::BOOL => Kind::Bool,
        _ => return None,
    })
}

/// The element type of safetensors for one of torch.
pub fn dtype(of: Kind) -> Option<Dtype> {
    use Dtype::*;
    [F64, F32, F16, BF16, I64, I32, I16, I8, U8, BOOL]
        .into_iter()
        .find(|&it| kind(it) == Some(of))
}

fn explain(error: &safetensors::SafeTensorError) -> String {
    format!("not a safetensors file: {error}")
}
