//! `peft data`: what the model will see of the rows, token by token.

use std::path::PathBuf;

use anyhow::Result;
use console::style;
use peft::data::{Options, pieces};

use super::train::{cache_dir, describe, format, load, positions, screen::paint};
use crate::{error::usage, sources::SourceArgs};

/// Flags of `peft data`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(flatten)]
    source: SourceArgs,
    /// Rows to look at: .jsonl, .json or .txt; several files may be given
    #[arg(long, value_name = "FILE", num_args = 1.., required = true)]
    data: Vec<PathBuf>,
    /// Rows to show
    #[arg(long, value_name = "N", default_value_t = 3)]
    rows: usize,
    /// The first row to show, counted from 1
    #[arg(long, value_name = "N", default_value_t = 1)]
    from: usize,
    /// A line for each token: its id, whether it is learnt, its text
    #[arg(long)]
    ids: bool,
    /// Format of the rows [default: found out]
    #[arg(long, value_name = "FORMAT")]
    format: Option<String>,
    /// Tokens after which a row is cut [default: what the model takes, at most 1024]
    #[arg(long, value_name = "N")]
    max_length: Option<usize>,
    /// Learn the prompts, too
    #[arg(long)]
    train_on_prompt: bool,
}

const EXAMPLES: &str = "\
Examples:
  peft data MODEL --data rows.jsonl
  peft data RUN --data rows.jsonl --from 12 --rows 1 --ids";

/// Shows.
pub(crate) fn run(args: Args) -> Result<()> {
    let sources = args.source.find()?;
    let tokenizer = sources.tokenizer()?;
    let usual =
        || Ok::<_, anyhow::Error>(positions(&sources.base)?.map_or(1024, |most| most.min(1024)));
    let options = Options {
        format: format(args.format.as_deref())?,
        max_length: args.max_length.map_or_else(usual, Ok)?,
        train_on_prompt: args.train_on_prompt,
        cache_dir: cache_dir(),
        ..Options::default()
    };
    let data = load(&args.data, &tokenizer, &options)?;
    describe("data", &data, options.max_length);
    let begin = args.from.checked_sub(1).filter(|begin| *begin < data.len());
    let Some(begin) = begin else {
        return Err(usage(format!(
            "no row {}: there are {}, counted from 1",
            args.from,
            data.len()
        )));
    };
    if args.rows > 0 && !args.ids {
        let learnt = match console::colors_enabled() {
            true => "what is green is learnt",
            false => "what is between ⟦ and ⟧ is learnt",
        };
        println!("\n{}", style(format!("│ parts tokens; {learnt}")).dim());
    }
    for at in begin..data.len().min(begin.saturating_add(args.rows)) {
        let Some(row) = data.get(at) else { break };
        let title = format!(
            "row {} · {} tokens, {} learnt",
            at + 1,
            row.ids.len(),
            row.trained_tokens()
        );
        println!("\n{}", style(title).bold());
        let pieces = pieces(&tokenizer, row)?;
        if args.ids {
            for piece in &pieces {
                let mark = if piece.trained { "learnt" } else { "" };
                println!(
                    "{:>8}  {mark:<6}  {}",
                    piece.id,
                    style(format!("{:?}", piece.text)).for_stdout()
                );
            }
        } else {
            println!("{}", paint(&pieces, "│").trim_end_matches('\n'));
        }
    }
    Ok(())
}
