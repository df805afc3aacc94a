//! `peft convert`: any adapter that has a form as weights, as plain LoRA, for runtimes that know nothing else.
//!
//! Of each layer's change ΔW the largest singular values are kept. What that loses is said for each layer.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use console::style;
use peft::{
    core::Adapter,
    lora::{ConvertedLayer, Rank, to_lora},
};
use tch::Kind;

use crate::{
    args::fresh_folder,
    commands::check::plain_table,
    error::{of_settings, usage},
    quantization::say_what_is_left,
    sources::SourceArgs,
    terminal::{bytes, grouped},
};

/// Flags of `peft convert`.
#[derive(Debug, clap::Args)]
#[command(group(clap::ArgGroup::new("how").required(true)))]
pub(crate) struct Args {
    #[command(flatten)]
    source: SourceArgs,
    /// The rank of every layer
    #[arg(long, value_name = "N", group = "how")]
    rank: Option<i64>,
    /// For each layer the smallest rank that keeps this share of its change, in squares: 0.99
    #[arg(long, value_name = "X", group = "how")]
    keep: Option<f64>,
    /// The adapter folder to write; it must be empty or not exist
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

/// Converts and writes.
pub(crate) fn run(args: Args) -> Result<()> {
    fresh_folder(&args.out)?;
    let rank = match (args.rank, args.keep) {
        (Some(n), _) => Rank::Number(n),
        (None, Some(share)) => Rank::Energy(share),
        (None, None) => return Err(usage("say `--rank N` or `--keep X`")),
    };
    let sources = args.source.find()?;
    if sources.adapters.is_empty() {
        return Err(usage(
            "nothing to convert: give a run with an adapter, an adapter folder, or a model with `--adapter`",
        ));
    }
    let [(name, dir)] = sources.adapters.as_slice() else {
        return Err(usage(format!(
            "one adapter is converted at a time, and {} are named",
            sources.adapters.len()
        )));
    };
    let tuner = Adapter::load(dir, &peft::builtin())
        .with_context(|| format!("adapter `{}`", dir.display()))?
        .tuner;
    let task = sources.task(None)?;
    let mut model = sources.load_stored(task, Some(Kind::Float))?;
    let converted = to_lora(&mut *model, name, &*tuner, rank).map_err(of_settings)?;
    converted.adapter.save(&args.out)?;

    let state = &converted.adapter.state;
    let numbers: i64 = state.values().map(|it| it.numel() as i64).sum();
    println!(
        "{} {} ({} layers, {} parameters, {} in fp32)",
        style("converted into").green(),
        args.out.display(),
        converted.layers.len(),
        grouped(numbers),
        bytes(4 * numbers.unsigned_abs()),
    );
    println!("{}", table(&converted.layers));
    if let Some(run) = &args.source.run {
        say_what_is_left(Path::new(run))?;
    }
    println!("\nNext:\n  peft check {}", args.out.display());
    Ok(())
}

/// Layers that are shown: those that lost most.
const SHOWN: usize = 8;

/// Kept: the share of the change's squares, as `--keep` counts. Off by: the norm of what is lost beside that of the change.
fn table(layers: &[ConvertedLayer]) -> String {
    let mut worst: Vec<&ConvertedLayer> = layers.iter().collect();
    worst.sort_by(|a, b| b.error.total_cmp(&a.error));
    let mut table = plain_table();
    table.set_header(["layers that lost most", "rank", "kept", "off by"]);
    for it in worst.iter().take(SHOWN) {
        table.add_row([
            it.at.clone(),
            it.rank.to_string(),
            format!("{:.4} %", 100.0 * (1.0 - it.error.powi(2))),
            format!("{:.1e}", it.error),
        ]);
    }
    table.trim_fmt()
}
