//! Conformance suite and fixture reader for every method
