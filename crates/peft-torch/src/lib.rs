//! What tch lacks: autograd functions in Rust, fused AdamW, oneDNN products, random state, memory figures
