//! `peft dequantize`: a dense model folder from one whose linear layers are in few bits.
//!
//! For programs that read no 4 bits, and for merging elsewhere. What rounding to few bits took away does not come back.

use std::path::PathBuf;

use anyhow::Result;
use console::style;
use peft::{
    models::{OpenOptions, Source},
    quant::Decoded,
};
use tch::Device;

use crate::{
    args::{DtypeChoice, fresh_folder},
    commands::quantize::rewrite,
    error::usage,
    quantization::Quantization,
    sources::BaseArgs,
    terminal::plural,
};

/// Flags of `peft dequantize`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The model: a folder whose layers are in 4 or 8 bits, or a hub id
    model: String,
    /// The folder to write; it must be empty or not exist
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Number format of the folder: auto decodes each layer to that which it had before
    #[arg(long, value_name = "DTYPE", default_value = "auto")]
    dtype: DtypeChoice,
    /// The largest file of the folder, in megabytes
    #[arg(long, value_name = "MB", default_value_t = 5000, value_parser = clap::value_parser!(u64).range(1..))]
    shard_size: u64,
}

const EXAMPLES: &str = "\
Examples:
  peft dequantize MODEL-nf4 --out MODEL-dense
  peft dequantize MODEL-nf4 --out MODEL-dense --dtype bf16";

/// Reads, decodes and writes.
pub(crate) fn run(args: Args) -> Result<()> {
    fresh_folder(&args.out)?;
    let sources = BaseArgs {
        model: Some(args.model.clone()),
        adapter: Vec::new(),
    }
    .find()?;
    if let Source::Gguf(_) = sources.base {
        return Err(usage(format!(
            "`{}` is a GGUF file; `peft import` makes a dense folder of it",
            args.model
        )));
    }
    let Some(stored) = Quantization::stored(&sources.base.config()?) else {
        return Err(usage(format!(
            "`{}` is dense: its config.json has no `quantization_config`",
            args.model
        )));
    };
    let options = OpenOptions {
        kind: args.dtype.kind(),
        device: Device::Cpu,
    };
    rewrite(
        &sources,
        (&args.model, options),
        &Decoded::new(),
        (&args.out, args.shard_size),
        |done| {
            format!(
                "{} {} (from {}; {})",
                style("dequantised into").green(),
                args.out.display(),
                stored.bits.name(),
                plural(done.left, "tensor"),
            )
        },
    )
}
