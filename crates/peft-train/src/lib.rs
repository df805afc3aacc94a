//! A training loop that one can read
