//! Where models and the formats of their bases meet.

use peft_core::Result;
use peft_models::{Decoder, HeadOptions, Network, OpenOptions, Source, Task};
use peft_quant::Format;

/// Loads a decoder from a folder, a GGUF file or the hub; layers that it keeps in few bits stay so.
pub fn open(name: &str, options: OpenOptions) -> Result<Box<dyn Decoder>> {
    open_in(name, options, &Format::as_stored())
}

/// Loads a decoder whose linear layers are kept in a format: the base of QLoRA.
///
/// ```
/// use peft::{OpenOptions, open_in, quant::{Format, Scheme}};
/// # let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/models/llama");
/// let model = open_in(folder, OpenOptions::default(), &Format::of(Scheme::NF4))?;
/// # Ok::<(), peft::Error>(())
/// ```
pub fn open_in(name: &str, options: OpenOptions, format: &Format) -> Result<Box<dyn Decoder>> {
    peft_models::open_source_in(&Source::find(name)?, options, format)
}

/// Loads a model for a task from where it lies; layers that it keeps in few bits stay so.
pub fn open_task(
    source: &Source,
    task: Task,
    options: OpenOptions,
    head: &HeadOptions,
) -> Result<Box<dyn Network>> {
    peft_models::open_task_in(source, task, options, head, &Format::as_stored())
}
