//! Benchmarks: kernels under criterion (`benches/`), whole jobs beside Python's (`src/bin/jobs.rs`, `compare.py`).
//!
//! A whole job is one process that does one thing and prints one line of JSON,
//! ours and Python's alike: `compare.py` runs them in turn, so that what else
//! the machine does hits both, and writes medians, ratios and raw samples to
//! `results/`. Every job is stated beside its floor: operations over the rate of
//! a matrix product, or bytes over the bandwidth of memory, measured in the same run.

pub mod ffi;
