//! The program `peft`: fine-tune a language model, look at the result, use it.
//!
//! Every stage of the work is a verb, and every verb takes the run folder that `train` left: the base, the
//! template and the settings travel with it. One file a verb in `commands`; this one only parses the command
//! line, prepares libtorch, and turns an error into one line and an exit code: 2 for a command line that
//! cannot be right, 1 for work that failed.

mod answer;
mod args;
mod commands;
mod error;
mod methods;
mod metrics;
mod quantization;
mod sources;

mod terminal;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use commands::{
    chat, check, combine, compare, completions, convert, data, dequantize, eval, forward, generate,
    import, info, merge, quantize, train,
};

/// Fine-tune language models with few parameters, and use the result.
#[derive(Debug, Parser)]
#[command(name = "peft", version, max_term_width = 100, propagate_version = true)]
#[command(arg_required_else_help = true, after_help = EXAMPLES)]
struct Cli {
    #[command(flatten)]
    global: args::Global,
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
A first session:
  peft train --model MODEL --data rows.jsonl --out RUN
  peft chat RUN
  peft merge RUN --out MERGED

MODEL is a folder in Hugging Face's format, a hub id such as HuggingFaceTB/SmolLM2-135M-Instruct, or a GGUF file.";

#[derive(Debug, Subcommand)]
enum Command {
    /// Fine-tune an adapter on your data
    Train(Box<train::Args>),
    /// Train several methods on the same data and compare them
    Compare(Box<compare::Args>),
    /// Answer one or many prompts
    Generate(generate::Args),
    /// Talk to a model
    Chat(chat::Args),
    /// Measure loss, perplexity, or what the task is judged by
    Eval(eval::Args),
    /// Bake the adapter into the base and write a plain model folder
    Merge(merge::Args),
    /// Make one LoRA of several
    Combine(combine::Args),
    /// Turn an adapter of another method into plain LoRA
    Convert(convert::Args),
    /// Examine an adapter: is it whole, does it fit, who can serve it?
    Check(check::Args),
    /// Describe a model or an adapter
    Info(info::Args),
    /// Show what the model will see of your data, token by token
    Data(data::Args),
    /// Keep the layers of a model in 4 or 8 bits
    Quantize(quantize::Args),
    /// Make the layers of a model in 4 or 8 bits dense again
    Dequantize(dequantize::Args),
    /// Turn a GGUF file into a model folder
    Import(import::Args),
    /// Compute logits, loss and gradients into a file, to compare with other frameworks
    Forward(forward::Args),
    /// Print completions for a shell
    Completions(completions::Args),
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return error::refuse(&error),
    };
    match terminal::guarded(|| run(cli)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => error::report(&error),
    }
}

fn run(cli: Cli) -> Result<()> {
    cli.global.apply();
    match cli.command {
        Command::Train(args) => train::run(*args),
        Command::Compare(args) => compare::run(*args),
        Command::Generate(args) => generate::run(args),
        Command::Chat(args) => chat::run(args),
        Command::Eval(args) => eval::run(args),
        Command::Merge(args) => merge::run(args),
        Command::Combine(args) => combine::run(args),
        Command::Convert(args) => convert::run(args),
        Command::Check(args) => check::run(args),
        Command::Info(args) => info::run(args),
        Command::Data(args) => data::run(args),
        Command::Quantize(args) => quantize::run(args),
        Command::Dequantize(args) => dequantize::run(args),
        Command::Import(args) => import::run(args),
        Command::Forward(args) => forward::run(args),
        Command::Completions(args) => completions::run::<Cli>(args),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        super::Cli::command().debug_assert();
    }
}
