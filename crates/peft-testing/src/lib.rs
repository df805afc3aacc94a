//! Conformance suite and fixture reader for every method.

pub mod fixtures;
mod numbers;

pub use numbers::{agree, close, distance, same_bits};
