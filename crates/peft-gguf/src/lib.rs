//! GGUF files, read as what they once were: a Hugging Face model folder.
//!
//! A GGUF file is one blob: typed metadata (configuration, vocabulary, chat template), a table of
//! tensors, and the tensors themselves, most of them quantised in small blocks. Fine-tuning needs
//! the other shape of the same thing: `config.json`, `tokenizer.json` and plain weights under the
//! names that `transformers` uses. This crate goes from the one to the other and has no opinion on
//! what happens next; it does not know libtorch.
//!
//! Three layers, each usable alone:
//!
//! - [`Gguf`] is the file: [`Metadata`], the [`TensorInfo`] table, and values decoded to `f32` with
//!   the arithmetic of ggml's reference code, bit for bit ([`GgmlType`] lists the block formats).
//! - [`HfView`] is the same file under Hugging Face names: the architecture decides how tensors are
//!   called, which rows the converter had permuted for its rotary embedding, which matrices are
//!   transposed, and what `config.json` says. Nothing is copied until a tensor is asked for.
//! - [`import`] writes the folder, one tensor at a time; [`write_tokenizer`] only its tokenizer.
//!
//! ```no_run
//! # fn main() -> Result<(), peft_gguf::Error> {
//! use peft_gguf::{Dtype, Gguf, HfView, import};
//! use std::path::Path;
//!
//! let view = HfView::new(Gguf::open(Path::new("model.gguf"))?)?;
//! let embedding = view.tensor("model.embed_tokens.weight")?;
//! println!("{} values, vocabulary {}", embedding.len(), view.config()["vocab_size"]);
//!
//! import(Path::new("model.gguf"), Path::new("model"), Dtype::BF16, &mut |done, total, name| {
//!     println!("{done}/{total} {name}");
//! })?;
//! # Ok(()) }
//! ```
//!
//! # A file is a stranger
//!
//! Model files come from the internet. Every count, length, offset and id is checked against the
//! size of the file before anything is allocated for it, and every refusal is an [`Error`] that
//! names the file, the key or tensor, and what was there. What would change the numbers and is not
//! understood (a metadata key of the architecture, a block format, a text splitting rule) is
//! refused by name rather than skipped. Tensors are read with positioned reads and not through a
//! memory map: a file that shrinks while it is read is then an error too, not a killed process, and
//! the crate needs no `unsafe`.

mod arch;
mod blocks;
mod error;
mod file;
mod import;
mod metadata;
mod tokenizer;
mod view;

pub use blocks::GgmlType;
pub use error::{Error, Result};
pub use file::{Gguf, TensorInfo};
pub use import::{Dtype, Imported, import};
pub use metadata::{Array, Metadata, Value};
pub use tokenizer::write_tokenizer;
pub use view::HfView;
