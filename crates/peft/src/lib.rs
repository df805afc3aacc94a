//! Parameter-efficient fine-tuning: the crates under one name
