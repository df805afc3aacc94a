//! Kernels for CUDA that libtorch has not: weights in 4 bits decoded, multiplied and encoded, and AdamW with moments in 8 bits.
//!
//! ```text
//! text in this crate  --NVRTC, once a machine-->  image in the user's cache  --driver-->  launched on libtorch's stream
//! ```
//!
//! Nothing of CUDA is needed to build this crate or a program with it: the driver and the compiler are libraries that are
//! looked for when the first kernel is wanted. What is missing is an [`Error`] that says so.
//!
//! The bits are those of [`peft_codec`]: each operation is rounded by itself, nothing is approximated or fused, and a result is rounded to its
//! format once. So a file decoded on a GPU and one decoded on a processor are the same model. Sums of a product are fp32,
//! and only their order is the kernel's own.
//!
//! Memory is the caller's: addresses come in with their lengths, which are checked against the arithmetic of the format, and results go where the
//! caller says, so that libtorch's allocator owns them. Work goes on a stream of the caller's ([`Stream::current`]) and is
//! not waited for. The one promise that cannot be checked, that there is memory at an address, is given where a [`Memory`] is made.
//!
//! ```no_run
//! use peft_codec::{Block, Type};
//! use peft_cuda::{Memory, Number, Scales, Stream, Weight};
//! # fn tensors() -> (u64, u64, u64) { (0, 0, 0) }
//! let (codes, absmax, out) = tensors(); // addresses of 4096 × 4096 numbers in NF4, and of as many in bf16
//! let n = 4096 * 4096;
//! // SAFETY: tensors on GPU 0 of these lengths, alive until after the launch; libtorch's allocator knows the stream.
//! let (codes, absmax, out) = unsafe {
//!     (Memory::of(codes, n / 2), Memory::of(absmax, n / 64 * 4), Memory::of(out, n * 2))
//! };
//! let weight = Weight::new(codes, Scales::Plain(absmax), *Type::Nf4.table(), Block::USUAL, n)?;
//! weight.dequantise(out, Number::Bf16, &Stream::current(0)?)?;
//! # Ok::<(), peft_cuda::Error>(())
//! ```

pub mod adamw;
mod cache;
mod driver;
mod encode;
mod error;
mod kernels;
mod memory;
mod nvrtc;
mod stream;
#[cfg(test)]
mod tests;
mod weight;

pub use driver::devices;
pub use encode::{nest, quantise};
pub use error::{Error, Result};
pub use kernels::{compile, prepare};
pub use memory::{Managed, Memory, Number};
pub use stream::Stream;
pub use weight::{MOST_ROWS, Scales, Weight};
