//! `peft import`: a GGUF file as a model folder.

use std::{
    io::{IsTerminal, stderr},
    path::PathBuf,
};

use anyhow::Result;
use clap::ValueEnum;
use console::style;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use peft::gguf::{self, Dtype};

use crate::{
    args::fresh_folder,
    terminal::{bytes, grouped},
};

/// Flags of `peft import`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The .gguf file
    file: PathBuf,
    /// The folder to write; it must be empty or not exist
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Number format of the weights in the folder
    #[arg(long, value_name = "DTYPE", default_value = "bf16")]
    dtype: Format,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Format {
    #[value(alias = "float32", alias = "f32")]
    Fp32,
    #[value(alias = "bfloat16")]
    Bf16,
    #[value(alias = "float16", alias = "f16")]
    Fp16,
}

/// Reads and writes.
pub(crate) fn run(args: Args) -> Result<()> {
    let dtype = match args.dtype {
        Format::Fp32 => Dtype::F32,
        Format::Bf16 => Dtype::BF16,
        Format::Fp16 => Dtype::F16,
    };
    fresh_folder(&args.out)?;
    let bar = ProgressBar::with_draw_target(Some(0), target());
    if let Ok(style) = ProgressStyle::with_template("{bar:40} {pos}/{len} {wide_msg:.dim}") {
        bar.set_style(style);
    }
    let imported = gguf::import(&args.file, &args.out, dtype, &mut |done, total, name| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
        bar.set_message(name.to_owned());
    });
    bar.finish_and_clear();
    let imported = imported?;
    println!(
        "{} {} ({}, {} parameters in {} tensors, {})",
        style("imported into").green(),
        imported.folder.display(),
        imported.model_type,
        grouped(i64::try_from(imported.parameters).unwrap_or(i64::MAX)),
        imported.tensors,
        bytes(imported.bytes),
    );
    let formats: Vec<String> = imported
        .formats
        .iter()
        .map(|(name, n)| format!("{n} × {name}"))
        .collect();
    println!("from {}", formats.join(", "));
    match &imported.tokenizer {
        Some(tokenizer) => println!("with its tokenizer ({tokenizer})"),
        None => println!("without a tokenizer: the file has none"),
    }
    println!("\nNext:\n  peft chat {}", args.out.display());
    Ok(())
}

fn target() -> ProgressDrawTarget {
    match stderr().is_terminal() {
        true => ProgressDrawTarget::stderr(),
        false => ProgressDrawTarget::hidden(),
    }
}
