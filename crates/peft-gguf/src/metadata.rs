//! The key-value half of a GGUF file.
//!
//! Keys keep the order of the file. Values keep their type: whether a count was written as `u32` or
//! `u64` is nobody's concern later, so the typed getters accept any integer that fits, but a string
//! where a number belongs is an error that says so. An absent key is `None`; only the caller knows
//! whether that is one too.

use crate::error::{Error, Result, nearest, shown};
use indexmap::IndexMap;
use std::path::{Path, PathBuf};

/// The metadata of one file, in file order.
#[derive(Debug, Clone)]
pub struct Metadata {
    pub(crate) path: PathBuf,
    pub(crate) entries: IndexMap<String, Value>,
}

/// One metadata value.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)] // the variants are the types of the format
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    U64(u64),
    I64(i64),
    F32(f32),
    F64(f64),
    Bool(bool),
    String(String),
    Array(Array),
}

/// An array value, kept as compactly as in the file: a vocabulary has 100,000 entries.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)] // the variants are the types of the format
pub enum Array {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F32(Vec<f32>),
    F64(Vec<f64>),
    Bool(Vec<bool>),
    String(Vec<String>),
    Array(Vec<Array>),
}

impl Metadata {
    /// The value of `key`.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.entries.get(key)
    }

    /// All entries, in file order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.entries.iter().map(|(k, v)| (k.as_str(), v))
    }

    /// How many keys there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The file that this is from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A whole number that is not negative, of any integer type.
    pub fn integer(&self, key: &str) -> Result<Option<u64>> {
        self.typed(key, "a whole number that is not negative", Value::as_u64)
    }

    /// A number with a fraction.
    pub fn float(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a finite float", Value::as_f64)
    }

    /// A truth value.
    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "true or false", |value| match value {
            Value::Bool(flag) => Some(*flag),
            _ => None,
        })
    }

    /// A string.
    pub fn text(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "a string", Value::as_str)
    }

    /// An array of strings.
    pub fn texts(&self, key: &str) -> Result<Option<&[String]>> {
        self.typed(key, "an array of strings", |value| match value {
            Value::Array(Array::String(texts)) => Some(texts.as_slice()),
            _ => None,
        })
    }

    /// What the file must have: `value`, or an error that names the missing key and the nearest one.
    pub fn required<T>(&self, key: &str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| {
            let near = nearest(key, self.entries.keys().map(String::as_str));
            Error::key(&self.path, key, format!("is missing{near}"))
        })
    }

    /// The value of `key` as `read` sees it; an error that says `expected` where it sees nothing.
    pub(crate) fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let got = || format!("expected {expected}, got {}", value.describe());
        read(value)
            .map(Some)
            .ok_or_else(|| Error::key(&self.path, key, got()))
    }
}

impl Value {
    /// The number, if this is an integer of any type and not negative.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Value::U8(n) => Some(n.into()),
            Value::U16(n) => Some(n.into()),
            Value::U32(n) => Some(n.into()),
            Value::U64(n) => Some(n),
            Value::I8(n) => n.try_into().ok(),
            Value::I16(n) => n.try_into().ok(),
            Value::I32(n) => n.try_into().ok(),
            Value::I64(n) => n.try_into().ok(),
            _ => None,
        }
    }

    /// The number, if this is a finite float. An `f32` becomes the shortest decimal that stands for
    /// it, so that a `1e-5` that went into the file comes out as `1e-5` and not as 9.99999974e-6.
    pub fn as_f64(&self) -> Option<f64> {
        let number = match *self {
            Value::F32(x) => x.to_string().parse().ok()?,
            Value::F64(x) => x,
            _ => return None,
        };
        number.is_finite().then_some(number)
    }

    /// The text, if this is a string.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Value::String(text) => Some(text),
            _ => None,
        }
    }

    /// The value with its type, for messages and listings: `` the string `abc` ``, `u32 4`, `an array of 9 f32`.
    pub fn describe(&self) -> String {
        match self {
            Value::U8(n) => format!("u8 {n}"),
            Value::I8(n) => format!("i8 {n}"),
            Value::U16(n) => format!("u16 {n}"),
            Value::I16(n) => format!("i16 {n}"),
            Value::U32(n) => format!("u32 {n}"),
            Value::I32(n) => format!("i32 {n}"),
            Value::U64(n) => format!("u64 {n}"),
            Value::I64(n) => format!("i64 {n}"),
            Value::F32(x) => format!("f32 {x}"),
            Value::F64(x) => format!("f64 {x}"),
            Value::Bool(flag) => format!("bool {flag}"),
            Value::String(text) => format!("the string `{}`", shown(text)),
            Value::Array(array) => format!("an array of {} {}", array.len(), array.item()),
        }
    }
}

impl Array {
    /// How many items there are.
    pub fn len(&self) -> usize {
        match self {
            Array::U8(v) => v.len(),
            Array::I8(v) => v.len(),
            Array::U16(v) => v.len(),
            Array::I16(v) => v.len(),
            Array::U32(v) => v.len(),
            Array::I32(v) => v.len(),
            Array::U64(v) => v.len(),
            Array::I64(v) => v.len(),
            Array::F32(v) => v.len(),
            Array::F64(v) => v.len(),
            Array::Bool(v) => v.len(),
            Array::String(v) => v.len(),
            Array::Array(v) => v.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What one item is called.
    fn item(&self) -> &'static str {
        match self {
            Array::U8(_) => "u8",
            Array::I8(_) => "i8",
            Array::U16(_) => "u16",
            Array::I16(_) => "i16",
            Array::U32(_) => "u32",
            Array::I32(_) => "i32",
            Array::U64(_) => "u64",
            Array::I64(_) => "i64",
            Array::F32(_) => "f32",
            Array::F64(_) => "f64",
            Array::Bool(_) => "bool",
            Array::String(_) => "strings",
            Array::Array(_) => "arrays",
        }
    }
}
