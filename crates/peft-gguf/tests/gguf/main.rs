//! GGUF files as Python writes them, as nobody should write them, and what comes out.

mod formats;
mod fuzz;
mod hostile;
mod models;
mod smollm2;
mod support;
mod tokenizer;
