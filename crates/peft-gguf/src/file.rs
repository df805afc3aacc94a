//! The GGUF container, versions 2 and 3.
//!
//! ```text
//! "GGUF" | u32 version | u64 tensor count | u64 key count
//! key count ×    string key | u32 type | value
//! tensor count × string name | u32 n | n × u64 dims | u32 ggml type | u64 offset
//! padding to `general.alignment` (32), then the data; offsets count from here
//! ```
//!
//! A string is a u64 length and UTF-8; an array is u32 type, u64 count and items; all little-endian.
//! Dims run from the fastest: a row-major matrix [out, in] says (in, out), so shapes are reversed
//! once, here, and everything else in this crate has them as Hugging Face does.
//!
//! [`Header`] is the only code that touches unchecked bytes. It knows how many bytes are left, and
//! takes no length or count on trust: a length must fit into what is left before it is allocated,
//! a count before it is looped over. The whole header may have 256 MiB (the largest real ones have
//! about 30), because a sparse file can pretend to any size.

use crate::blocks::GgmlType;
use crate::error::{Error, Result, nearest, shown};
use crate::metadata::{Array, Metadata, Value};
use indexmap::IndexMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Bytes that metadata and tensor table may have.
const HEADER_LIMIT: u64 = 256 << 20;
/// Bytes that a key or a tensor name may have; the format's own limit for keys.
const NAME_LIMIT: u64 = 65_535;
/// Arrays within arrays within …; no known file nests at all.
const NESTING_LIMIT: usize = 8;
/// Dimensions of a tensor; ggml's own limit.
const DIMS_LIMIT: u32 = 4;
/// Values decoded at a time: a multiple of every block, small enough for the cache.
const STEP: usize = 1 << 16;

/// An open GGUF file: header read and checked, tensors still on disk.
#[derive(Debug)]
pub struct Gguf {
    file: File,
    version: u32,
    metadata: Metadata,
    tensors: IndexMap<String, TensorInfo>,
}

/// One row of the tensor table. What it says has been checked against the file.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct TensorInfo {
    /// The name in the file.
    pub name: String,
    /// The shape, slowest dimension first as in Hugging Face.
    pub shape: Vec<usize>,
    /// The block format.
    pub kind: GgmlType,
    /// Where the data starts, in bytes from the start of the file.
    pub offset: u64,
    /// How many bytes it has.
    pub size: u64,
}

impl TensorInfo {
    /// The number of values.
    pub fn values(&self) -> usize {
        self.shape.iter().product()
    }
}

impl Gguf {
    /// Opens `path` and reads its header. No tensor is read.
    pub fn open(path: &Path) -> Result<Gguf> {
        let file = File::open(path).map_err(|e| Error::io(path, "open", e))?;
        let about = file.metadata().map_err(|e| Error::io(path, "open", e))?;
        if !about.is_file() {
            let kind = std::io::Error::other("not a regular file, expected a GGUF file");
            return Err(Error::io(path, "open", kind));
        }
        let mut header = Header {
            path,
            input: BufReader::with_capacity(1 << 18, &file),
            at: 0,
            end: about.len(),
        };
        let version = header.version()?;
        let (tensor_count, key_count) = (header.u64("tensor count")?, header.u64("key count")?);
        let metadata = Metadata {
            path: path.into(),
            entries: header.metadata(key_count)?,
        };
        let tensors = header.tensors(tensor_count, alignment(&metadata)?)?;
        check_overlap(path, &tensors)?;
        Ok(Gguf {
            file,
            version,
            metadata,
            tensors,
        })
    }

    /// The format version, 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// The file.
    pub fn path(&self) -> &Path {
        self.metadata.path()
    }

    /// Everything that is not a tensor.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// The tensor table, in file order.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = &TensorInfo> {
        self.tensors.values()
    }

    /// The tensor called `name` in the file.
    pub fn tensor(&self, name: &str) -> Result<&TensorInfo> {
        self.tensors.get(name).ok_or_else(|| {
            let near = nearest(name, self.tensors.keys().map(String::as_str));
            Error::tensor(self.path(), name, format!("is missing{near}"))
        })
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The values of one tensor, row-major.
    pub fn dequantise(&self, name: &str) -> Result<Vec<f32>> {
        let info = self.tensor(name)?;
        let mut out = self.room(info)?;
        self.dequantise_into(info, &mut out)?;
        Ok(out)
    }

    /// Zeros for every value of `info`; a tensor too large for the memory is an error, not an abort.
    pub(crate) fn room(&self, info: &TensorInfo) -> Result<Vec<f32>> {
        let mut out = Vec::new();
        out.try_reserve_exact(info.values()).map_err(|_| {
            let problem = format!("no memory for {} values", info.values());
            Error::tensor(self.path(), &info.name, problem)
        })?;
        out.resize(info.values(), 0.0);
        Ok(out)
    }

    /// As [`Gguf::dequantise`], into `out` of exactly the tensor's size.
    pub(crate) fn dequantise_into(&self, info: &TensorInfo, out: &mut [f32]) -> Result<()> {
        if out.len() != info.values() {
            let problem = format!("has {} values, the buffer {}", info.values(), out.len());
            return Err(Error::tensor(self.path(), &info.name, problem));
        }
        let (values, bytes) = (info.kind.block_values(), info.kind.block_bytes());
        let mut buffer = vec![0; STEP.min(out.len()) / values * bytes];
        let mut at = info.offset;
        for out in out.chunks_mut(STEP) {
            let encoded = &mut buffer[..out.len() / values * bytes];
            self.file.read_exact_at(encoded, at).map_err(|e| {
                Error::tensor(self.path(), &info.name, format!("read at byte {at}: {e}"))
            })?;
            info.kind.decode(encoded, out);
            at += encoded.len() as u64;
        }
        Ok(())
    }
}

/// `general.alignment`, or the format's default.
fn alignment(metadata: &Metadata) -> Result<u64> {
    const KEY: &str = "general.alignment";
    let alignment = metadata.integer(KEY)?.unwrap_or(32);
    if !alignment.is_power_of_two() || alignment > 1 << 20 {
        let problem = format!("expected a power of two up to 1048576, got {alignment}");
        return Err(Error::key(metadata.path(), KEY, problem));
    }
    Ok(alignment)
}

/// Two tensors must not share bytes: no writer does that, and a lie about one is a lie about both.
fn check_overlap(path: &Path, tensors: &IndexMap<String, TensorInfo>) -> Result<()> {
    let mut sorted: Vec<_> = tensors.values().collect();
    sorted.sort_by_key(|t| t.offset);
    for pair in sorted.windows(2) {
        if pair[0].offset + pair[0].size > pair[1].offset {
            let problem = format!(
                "starts at byte {}, inside `{}` ({} bytes from {})",
                pair[1].offset,
                shown(&pair[0].name),
                pair[0].size,
                pair[0].offset
            );
            return Err(Error::tensor(path, &pair[1].name, problem));
        }
    }
    Ok(())
}

/// Reads the header front to back and never past its end.
struct Header<'a> {
    path: &'a Path,
    input: BufReader<&'a File>,
    /// Bytes read so far.
    at: u64,
    /// Bytes in the file.
    end: u64,
}

impl Header<'_> {
    fn wrong<T>(&self, problem: impl Into<String>) -> Result<T> {
        Err(Error::Format {
            path: PathBuf::from(self.path),
            at: self.at,
            problem: problem.into(),
        })
    }

    /// Asks for `count` items of at least `size` bytes each, all of which must still be there.
    fn claim(&self, count: u64, size: u64, what: &str) -> Result<usize> {
        let left = self.end.min(HEADER_LIMIT).saturating_sub(self.at);
        match count.checked_mul(size) {
            Some(bytes) if bytes <= left => Ok(count as usize),
            _ if self.end > HEADER_LIMIT => self.wrong(format!(
                "{what}: {count} × {size} bytes, but a header has at most {HEADER_LIMIT}"
            )),
            _ => self.wrong(format!(
                "truncated: {what} needs {count} × {size} bytes, {left} are left"
            )),
        }
    }

    fn fill(&mut self, out: &mut [u8]) -> Result<()> {
        self.input
            .read_exact(out)
            .map_err(|e| Error::io(self.path, "read", e))?;
        self.at += out.len() as u64;
        Ok(())
    }

    fn bytes<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        self.claim(1, N as u64, what)?;
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        self.bytes(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        self.bytes(what).map(u64::from_le_bytes)
    }

    fn string(&mut self, what: &str, limit: u64) -> Result<String> {
        let length = self.u64(what)?;
        if length > limit {
            return self.wrong(format!("{what}: {length} bytes, at most {limit} allowed"));
        }
        let mut text = vec![0; self.claim(length, 1, what)?];
        let start = self.at;
        self.fill(&mut text)?;
        String::from_utf8(text).or_else(|e| {
            let bad = start + e.utf8_error().valid_up_to() as u64;
            self.wrong(format!("{what}: not UTF-8 at byte {bad}"))
        })
    }

    fn version(&mut self) -> Result<u32> {
        let magic: [u8; 4] = self.bytes("magic")?;
        if &magic != b"GGUF" {
            self.at = 0;
            let magic = magic.escape_ascii();
            return self.wrong(format!("not a GGUF file: starts with `{magic}`"));
        }
        match self.u32("version")? {
            version @ 2..=3 => Ok(version),
            version if matches!(version.swap_bytes(), 2..=3) => {
                self.wrong("a big-endian GGUF file; only little-endian ones can be read")
            }
            version => self.wrong(format!(
                "GGUF version {version}; this build reads versions 2 and 3"
            )),
        }
    }

    fn metadata(&mut self, count: u64) -> Result<IndexMap<String, Value>> {
        // the smallest entry: an empty key, a type, one byte
        self.claim(count, 8 + 4 + 1, "key count")?;
        let mut entries = IndexMap::new();
        for _ in 0..count {
            let key = self.string("key", NAME_LIMIT)?;
            let value = self.value().map_err(|e| self.at_key(&key, e))?;
            if entries.contains_key(&key) {
                return Err(Error::key(self.path, &key, "appears twice"));
            }
            entries.insert(key, value);
        }
        Ok(entries)
    }

    /// A structural error inside the value of `key` is better told with the key.
    fn at_key(&self, key: &str, error: Error) -> Error {
        match error {
            Error::Format { at, problem, .. } => {
                Error::key(self.path, key, format!("byte {at}: {problem}"))
            }
            other => other,
        }
    }

    fn value(&mut self) -> Result<Value> {
        let kind = self.u32("value type")?;
        Ok(match kind {
            0 => Value::U8(u8::from_le_bytes(self.bytes("value")?)),
            1 => Value::I8(i8::from_le_bytes(self.bytes("value")?)),
            2 => Value::U16(u16::from_le_bytes(self.bytes("value")?)),
            3 => Value::I16(i16::from_le_bytes(self.bytes("value")?)),
            4 => Value::U32(u32::from_le_bytes(self.bytes("value")?)),
            5 => Value::I32(i32::from_le_bytes(self.bytes("value")?)),
            6 => Value::F32(f32::from_le_bytes(self.bytes("value")?)),
            7 => Value::Bool(self.bool()?),
            8 => Value::String(self.string("string", HEADER_LIMIT)?),
            9 => Value::Array(self.array(0)?),
            10 => Value::U64(u64::from_le_bytes(self.bytes("value")?)),
            11 => Value::I64(i64::from_le_bytes(self.bytes("value")?)),
            12 => Value::F64(f64::from_le_bytes(self.bytes("value")?)),
            _ => return self.wrong(format!("unknown value type {kind}, known are 0 to 12")),
        })
    }

    fn bool(&mut self) -> Result<bool> {
        match self.bytes::<1>("bool")? {
            [0] => Ok(false),
            [1] => Ok(true),
            [other] => self.wrong(format!("a bool is 0 or 1, got {other}")),
        }
    }

    fn array(&mut self, depth: usize) -> Result<Array> {
        let kind = self.u32("item type")?;
        let count = self.u64("array length")?;
        Ok(match kind {
            0 => Array::U8(self.items(count, u8::from_le_bytes)?),
            1 => Array::I8(self.items(count, i8::from_le_bytes)?),
            2 => Array::U16(self.items(count, u16::from_le_bytes)?),
            3 => Array::I16(self.items(count, i16::from_le_bytes)?),
            4 => Array::U32(self.items(count, u32::from_le_bytes)?),
            5 => Array::I32(self.items(count, i32::from_le_bytes)?),
            6 => Array::F32(self.items(count, f32::from_le_bytes)?),
            7 => Array::Bool(self.each(count, 1, Self::bool)?),
            8 => Array::String(self.each(count, 8, |h| h.string("string", HEADER_LIMIT))?),
            9 if depth == NESTING_LIMIT => {
                return self.wrong(format!("arrays nested more than {NESTING_LIMIT} deep"));
            }
            9 => Array::Array(self.each(count, 12, |h| h.array(depth + 1))?),
            10 => Array::U64(self.items(count, u64::from_le_bytes)?),
            11 => Array::I64(self.items(count, i64::from_le_bytes)?),
            12 => Array::F64(self.items(count, f64::from_le_bytes)?),
            _ => return self.wrong(format!("unknown item type {kind}, known are 0 to 12")),
        })
    }

    /// `count` fixed-size items.
    fn items<T, const N: usize>(&mut self, count: u64, item: fn([u8; N]) -> T) -> Result<Vec<T>> {
        self.each(count, N as u64, |h| h.bytes("array").map(item))
    }

    /// `count` items of at least `size` bytes, each read by `read`.
    fn each<T>(
        &mut self,
        count: u64,
        size: u64,
        mut read: impl FnMut(&mut Self) -> Result<T>,
    ) -> Result<Vec<T>> {
        let count = self.claim(count, size, "array")?;
        (0..count).map(|_| read(self)).collect()
    }

    /// The tensor table, with offsets from the start of the file.
    fn tensors(&mut self, count: u64, alignment: u64) -> Result<IndexMap<String, TensorInfo>> {
        // the smallest row: an empty name, no dims, type and offset
        self.claim(count, 8 + 4 + 4 + 8, "tensor count")?;
        let mut tensors = IndexMap::new();
        for _ in 0..count {
            let name = self.string("tensor name", NAME_LIMIT)?;
            let info = self.tensor(&name)?;
            if tensors.insert(name.clone(), info).is_some() {
                return Err(Error::tensor(self.path, &name, "appears twice"));
            }
        }
        let data = self.at.next_multiple_of(alignment);
        for info in tensors.values_mut() {
            self.place(info, data, alignment)?;
        }
        Ok(tensors)
    }

    fn tensor(&mut self, name: &str) -> Result<TensorInfo> {
        let wrong = |problem: String| Error::tensor(self.path, name, problem);
        let rank = self.u32("number of dims")?;
        if rank > DIMS_LIMIT {
            return Err(wrong(format!(
                "has {rank} dimensions, at most {DIMS_LIMIT} allowed"
            )));
        }
        let mut dims = Vec::new();
        for _ in 0..rank {
            dims.push(self.u64("dim")?);
        }
        let kind = GgmlType::of(self.u32("tensor type")?).map_err(wrong)?;
        let offset = self.u64("tensor offset")?;

        let row = dims.first().copied().unwrap_or(1);
        if !row.is_multiple_of(kind.block_values() as u64) {
            return Err(wrong(format!(
                "has rows of {row} values, but {kind} comes in blocks of {}",
                kind.block_values()
            )));
        }
        // values · 4 must fit too: that is what decoding allocates
        let values = dims.iter().try_fold(1u64, |n, d| n.checked_mul(*d));
        let size = match values.filter(|n| *n <= isize::MAX as u64 / 4) {
            Some(0) => return Err(wrong(format!("has an empty dimension: {dims:?}"))),
            Some(n) => n / kind.block_values() as u64 * kind.block_bytes() as u64,
            None => return Err(wrong(format!("has more values than can be: {dims:?}"))),
        };
        Ok(TensorInfo {
            name: name.into(),
            shape: dims.iter().rev().map(|d| *d as usize).collect(),
            kind,
            offset,
            size,
        })
    }

    /// Turns an offset into the data section into one into the file, and checks it.
    fn place(&self, info: &mut TensorInfo, data: u64, alignment: u64) -> Result<()> {
        let (relative, size) = (info.offset, info.size);
        if !relative.is_multiple_of(alignment) {
            let problem = format!("offset {relative} is not a multiple of {alignment}");
            return Err(Error::tensor(self.path, &info.name, problem));
        }
        let start = data.checked_add(relative);
        match start.and_then(|start| start.checked_add(size)) {
            Some(end) if end <= self.end => {
                info.offset = data + relative;
                Ok(())
            }
            _ => {
                let problem = format!(
                    "truncated: {size} bytes at offset {relative} of the data (byte {data}), the file has {}",
                    self.end
                );
                Err(Error::tensor(self.path, &info.name, problem))
            }
        }
    }
}
