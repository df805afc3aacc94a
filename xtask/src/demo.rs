//! `cargo xtask demo`: from a fresh clone to a fine-tuned model in one command.
//!
//! It only sets the stage: everything that is shown while the model learns is printed by `peft train`, called as
//! any user would call it, and the call is shown.

use crate::{libtorch, model, paths, run, ui};
use anyhow::{Context, Result};
use std::io::ErrorKind;
use std::process::Command;
use std::time::Instant;

/// Flags of `cargo xtask demo`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Train for this many steps instead of the usual two minutes
    #[arg(long, value_name = "N")]
    steps: Option<u32>,
    /// More flags for `peft train`
    #[arg(last = true, value_name = "FLAGS")]
    flags: Vec<String>,
}

/// `cargo xtask demo`.
pub(crate) fn demo(args: &Args) -> Result<()> {
    let start = Instant::now();
    println!(
        "{}",
        ui::bold("Teach a small language model to write dictionary entries")
    );

    ui::step(1, 4, "libtorch");
    libtorch::ensure()?;
    ui::say("ready in target/libtorch");

    ui::step(2, 4, "The program");
    let program = paths::peft("debug");
    if !program.exists() {
        ui::say("compiling; the bindings to libtorch take a few minutes, once");
    }
    run::build_peft()?;
    ui::say(format!("ready: {}", paths::short(&program)));

    ui::step(3, 4, "The model: SmolLM2-135M-Instruct");
    let model = model::ensure()?;
    ui::say(format!("ready in {}", paths::short(&model)));

    ui::step(4, 4, "Fine-tune it with LoRA on 500 WordNet definitions");
    let train = arguments(args);
    ui::say(ui::dim(format!("peft {}", train.join(" "))));
    println!();
    start_over()?;
    run::run(
        Command::new(&program)
            .args(&train)
            .current_dir(paths::root()),
    )?;
    println!(
        "\n{}",
        ui::dim(format!(
            "the whole demo took {} s",
            start.elapsed().as_secs()
        ))
    );
    Ok(())
}

/// Removes the last demo's run: `peft train` rightly does not write over one.
fn start_over() -> Result<()> {
    match std::fs::remove_dir_all(paths::root().join(OUT)) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).context(format!("at `{OUT}`"))
        }
        _ => Ok(()),
    }
}

const OUT: &str = "target/demo";

/// `peft train …`, with paths as one would type them in the root of the repository.
fn arguments(args: &Args) -> Vec<String> {
    let steps = args.steps.unwrap_or(STEPS).to_string();
    let usual = [
        ["--model", "target/models/smollm2"],
        ["--data", "fixtures/data/wordnet_define_sft.jsonl"],
        ["--prompts", "xtask/demo/prompts.txt"],
        ["--out", OUT],
        ["--max-steps", &steps],
    ];
    let usual = usual.as_flattened().iter().copied();
    let all = std::iter::once("train").chain(usual);
    all.map(ToOwned::to_owned)
        .chain(args.flags.iter().cloned())
        .collect()
}

/// About two minutes on two cores.
const STEPS: u32 = 60;
