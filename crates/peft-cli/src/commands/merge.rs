//! `peft merge`: the adapter baked into the base, as a plain model folder.
//!
//! The sum is computed in fp32 from the base as it is stored and rounded once. How much that changed is
//! measured on a probe and said: with a bf16 base it is never nothing.

use std::{fs, path::PathBuf};

use anyhow::{Context, Result, bail};
use console::style;
use peft::{
    core::{Ctx, ModelExt, Slot},
    models::{Input, Network, Task, parameters, save},
    quant::Format,
};
use tch::{Kind, Tensor};

use crate::{
    args::{DtypeChoice, fresh_folder, kind_name},
    error::usage,
    sources::{SourceArgs, Sources},
    terminal::{bytes, grouped},
};

/// Flags of `peft merge`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    source: SourceArgs,
    /// The folder to write; it must be empty or not exist
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Number format of the merged model: auto keeps that of the base
    #[arg(long, value_name = "DTYPE", default_value = "auto")]
    dtype: DtypeChoice,
    /// Of a base in few bits: decode, add and encode again, instead of writing dense weights
    #[arg(long)]
    keep_quantized: bool,
}

/// Merges and writes.
pub(crate) fn run(args: Args) -> Result<()> {
    fresh_folder(&args.out)?;
    let mut sources = args.source.find()?;
    if sources.adapters.is_empty() {
        return Err(usage(
            "nothing to merge: give a run with an adapter, or name an `--adapter` (full fine-tuning leaves a whole model)",
        ));
    }
    let few = sources.format.scheme.is_some()
        || sources
            .base
            .config()?
            .get("quantization_config")
            .is_some_and(|it| !it.is_null());
    if args.keep_quantized && !few {
        return Err(usage(format!(
            "`--keep-quantized` is for a base in few bits, and `{}` is dense",
            sources.model
        )));
    }
    let merged: Vec<String> = sources
        .adapters
        .iter()
        .map(|(_, dir)| format!("`{}`", dir.display()))
        .collect();
    let wanted = args.dtype.kind();
    let task = sources.task(None)?;
    // With a base that was quantised for the run, the adapter goes into the dense weights that it was made of.
    let quantised = match sources.format.scheme.is_some() && !args.keep_quantized {
        true => Some(sources.load_stored(task, Some(Kind::Float))?),
        false => None,
    };
    if quantised.is_some() {
        sources.format = Format::as_stored();
    }
    let mut model = sources.load_stored(task, wanted.map(|_| Kind::Float))?;
    if !args.keep_quantized {
        model.slots(&mut |_, slot| {
            if let Slot::Linear(it) = slot {
                it.decode();
            }
        });
    }
    let probe = probe(&*model);
    let logits = |model: &dyn Network| -> Result<Tensor> {
        let input = Input {
            decoder_ids: Some(probe.shallow_clone()), // read by models that write a text for a text
            ..Input::new(probe.shallow_clone())
        };
        let outputs = tch::no_grad(|| model.outputs(&input, Ctx::EVAL))?;
        let first = outputs.into_values().next();
        Ok(first
            .context("the model gives nothing")?
            .to_kind(Kind::Float))
    };
    let before = logits(&*model)?;
    let in_bits = quantised.map(|it| logits(&*it)).transpose()?;
    model.merge_and_unload()?;
    if let Some(kind) = wanted {
        round(&mut *model, kind)?;
    }
    let after = logits(&*model)?;
    let from_bits = in_bits.map(|it| (it - &after).abs().max().double_value(&[]));
    let change = (&before - after).abs().max().double_value(&[]);
    let largest = before.abs().max().double_value(&[]);
    if !change.is_finite() {
        bail!("the merged model does not compute finite numbers; nothing was written");
    }

    let held = tempfile::tempdir().context("a temporary folder")?;
    save(&mut *model, &args.out, &besides(&sources, &held)?)?;
    let size = bytes(folder_size(&args.out)?);
    println!(
        "{} {} {} ({} parameters, {}, {size})",
        merged.join(" and "),
        style("merged into").green(),
        args.out.display(),
        grouped(parameters(&mut *model)),
        kind_name(model.kind()),
    );
    let why = match args.keep_quantized {
        true => "the sum is encoded again",
        false => "rounding",
    };
    println!(
        "on {} tokens merging moved the logits by up to {change:.1e} ({why}), the largest is {largest:.1}",
        probe.size()[1]
    );
    if let Some(far) = from_bits {
        println!(
            "from those with the base in few bits, on which the adapter was trained, they are up to {far:.1e} away"
        );
    }
    if task == Task::CausalLm {
        println!("\nNext:\n  peft chat {}", args.out.display());
    }
    Ok(())
}

/// Rounds every weight to another number format. What is shared stays shared: the handle keeps its place
/// and gets other data.
fn round(model: &mut dyn Network, kind: Kind) -> Result<()> {
    let mut result = Ok(());
    model.slots(&mut |_, slot| {
        let tensors = match slot {
            Slot::Linear(it) => [
                Some(it.base().weight()),
                it.base().bias().map(Tensor::shallow_clone),
            ],
            Slot::Embedding(it) => [Some(it.weight().shallow_clone()), None],
            Slot::Conv(it) => [
                Some(it.base().weight().shallow_clone()),
                it.base().bias().map(Tensor::shallow_clone),
            ],
            Slot::Norm(it) => {
                let affine = it.base();
                [
                    Some(affine.weight.shallow_clone()),
                    affine.bias.as_ref().map(Tensor::shallow_clone),
                ]
            }
            _ => [None, None],
        };
        for mut tensor in tensors.into_iter().flatten().filter(|it| it.kind() != kind) {
            let rounded = tensor.f_to_kind(kind).and_then(|it| tensor.f_set_data(&it));
            result = std::mem::replace(&mut result, Ok(())).and(rounded);
        }
    });
    Ok(result?)
}

/// Ids from all over the vocabulary, `[1, n]`.
fn probe(model: &dyn Network) -> Tensor {
    let n = model.max_positions().clamp(1, 32);
    let vocab = model.vocab();
    // A stride that has no factor in common with most vocabularies.
    let ids: Vec<i64> = (0..n).map(|i| (i * 7919 + 11) % vocab).collect();
    Tensor::from_slice(&ids).view([1, n])
}

/// The files that go along: tokenizer with template, and the settings for generation.
pub(crate) fn besides(sources: &Sources, held: &tempfile::TempDir) -> Result<Vec<PathBuf>> {
    match sources.has_tokenizer() {
        true => sources.tokenizer()?.save(held.path())?,
        false => eprintln!("note: the base has no tokenizer, so the new folder has none"),
    }
    let entries = fs::read_dir(held.path()).context("a temporary folder")?;
    let mut files: Vec<PathBuf> = entries
        .map(|it| it.map(|it| it.path()))
        .collect::<Result<_, _>>()?;
    let settings = sources.generation_config();
    files.retain(|it| {
        settings
            .as_ref()
            .is_none_or(|settings| it.file_name() != settings.file_name())
    });
    files.extend(settings);
    Ok(files)
}

pub(crate) fn folder_size(dir: &std::path::Path) -> Result<u64> {
    let mut total = 0;
    for entry in fs::read_dir(dir).with_context(|| dir.display().to_string())? {
        total += entry?.metadata()?.len();
    }
    Ok(total)
}
