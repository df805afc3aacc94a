//! `peft quantize`: a model folder whose linear layers are in few bits.
//!
//! The folder is the one that `transformers` writes with `bitsandbytes`. Layers are read, encoded and written one after
//! the other; what is held in memory is one file of the new folder.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context, Result};
use console::style;
use peft::{
    core::BaseFormat,
    models::{Converted, OpenOptions, Source, Task, convert},
    torch::memory,
};
use tch::Device;

use crate::{
    args::{DtypeChoice, fresh_folder},
    commands::merge::{besides, folder_size},
    error::usage,
    quantization::{Bits, Quantization},
    sources::{BaseArgs, Sources},
    terminal::{bytes, plural},
};

/// Flags of `peft quantize`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The model: a folder, a hub id or a .gguf file
    model: String,
    /// The folder to write; it must be empty or not exist
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// In which bits linear layers are kept
    #[arg(long = "type", value_name = "TYPE", default_value = "nf4")]
    bits: Bits,
    /// Keep the scales of 4-bit blocks in 8 bits
    #[arg(long)]
    double_quant: bool,
    /// Numbers that share a scale, of 4 bits: 32 to 4096, a power of two
    #[arg(long, value_name = "N", default_value_t = 64)]
    block_size: usize,
    /// Layers that stay as they are, by name or the last part of it, with commas between [default: heads, and wo of T5]
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    skip: Option<Vec<String>>,
    /// Number format of what is not quantised: auto keeps that of the model
    #[arg(long, value_name = "DTYPE", default_value = "auto")]
    dtype: DtypeChoice,
    /// The largest file of the folder, in megabytes
    #[arg(long, value_name = "MB", default_value_t = 5000, value_parser = clap::value_parser!(u64).range(1..))]
    shard_size: u64,
}

const EXAMPLES: &str = "\
Examples:
  peft quantize MODEL --out MODEL-nf4 --double-quant
  peft train --method qlora --model MODEL-nf4 --data rows.jsonl --out RUN";

/// Reads, encodes and writes.
pub(crate) fn run(args: Args) -> Result<()> {
    fresh_folder(&args.out)?;
    if args.bits == Bits::Int8 && (args.double_quant || args.block_size != 64) {
        return Err(usage(
            "`--double-quant` and `--block-size` are of 4 bits; int8 has one scale a row",
        ));
    }
    let wish = Quantization {
        bits: args.bits,
        double_quant: args.double_quant,
        block_size: args.block_size,
        skip: match args.skip {
            Some(names) => names.into_iter().filter(|it| !it.is_empty()).collect(),
            None => Quantization::default().skip,
        },
    };
    let format = wish.format()?;
    let sources = BaseArgs {
        model: Some(args.model.clone()),
        adapter: Vec::new(),
    }
    .find()?;
    wish.must_fit(&sources.base, task(&sources))?;
    let options = OpenOptions {
        kind: args.dtype.kind(),
        device: Device::Cpu,
    };
    rewrite(
        &sources,
        (&args.model, options),
        &format,
        (&args.out, args.shard_size),
        |done| {
            format!(
                "{} {} ({}: {}; {} left as they are)",
                style("quantised into").green(),
                args.out.display(),
                plural(done.layers, "layer"),
                wish.line(),
                plural(done.left, "tensor"),
            )
        },
    )
}

fn task(sources: &Sources) -> Task {
    sources.task(None).unwrap_or(Task::CausalLm)
}

/// Writes a model in a format to a folder, in files of so many megabytes at most; prints `line`, sizes and the next step.
pub(crate) fn rewrite(
    sources: &Sources,
    (model, options): (&str, OpenOptions),
    format: &dyn BaseFormat,
    (out, shard_size): (&Path, u64),
    line: impl FnOnce(Converted) -> String,
) -> Result<()> {
    let held = tempfile::tempdir().context("a temporary folder")?;
    let begun = Instant::now();
    let task = task(sources);
    let done = convert(
        &sources.base,
        task,
        options,
        format,
        out,
        &besides(sources, &held)?,
        Some(shard_size.saturating_mul(1_000_000)),
    )
    .with_context(|| format!("model `{model}`"))?;
    let before = match &sources.base {
        Source::Folder(dir) => weights_size(dir)?,
        Source::Gguf(file) => fs::metadata(file).map(|it| it.len()).unwrap_or(0),
    };
    println!("{}", line(done));
    let peak = memory::usage(Device::Cpu).map(|it| format!(", at most {}", bytes(it.peak)));
    println!(
        "{} → {} in {:.1} s{}",
        bytes(before),
        bytes(folder_size(out)?),
        begun.elapsed().as_secs_f64(),
        peak.unwrap_or_default()
    );
    if task == Task::CausalLm && sources.has_tokenizer() {
        println!("\nNext:\n  peft chat {}", out.display());
    }
    Ok(())
}

/// Bytes of the weights in a folder, which a link may point to.
fn weights_size(dir: &Path) -> Result<u64> {
    let files = fs::read_dir(dir).with_context(|| dir.display().to_string())?;
    let weights = files
        .flatten()
        .filter(|it| it.file_name().to_string_lossy().starts_with("model"))
        .filter(|it| it.path().extension().is_some_and(|it| it == "safetensors"));
    Ok(weights
        .filter_map(|it| fs::metadata(it.path()).ok())
        .map(|it| it.len())
        .sum())
}
