//! The verbs, one file each: `Args` says what can be typed, `run` does it.

pub(crate) mod chat;
pub(crate) mod check;
pub(crate) mod combine;
pub(crate) mod compare;
pub(crate) mod completions;
pub(crate) mod convert;
pub(crate) mod data;
pub(crate) mod dequantize;
pub(crate) mod eval;
pub(crate) mod forward;
pub(crate) mod generate;
pub(crate) mod import;
pub(crate) mod info;
pub(crate) mod merge;
pub(crate) mod quantize;
pub(crate) mod train;
