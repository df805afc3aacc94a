//! LoRA and its relatives on linear and embedding layers
