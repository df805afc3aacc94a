//! `peft data`: what the model will see of the rows, token by token.

use std::path::PathBuf;

use anyhow::Result;
use console::style;
use peft::{
    data::{Options, Problem, TaskOptions, pieces, prepare_task},
    models::Task,
};

use super::train::{
    USUAL_LENGTH, cache_dir, describe, describe_task, format, load, screen::paint, show_row,
    task_for,
};
use crate::{
    error::usage,
    sources::{SourceArgs, Sources},
};

/// Flags of `peft data`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(flatten)]
    source: SourceArgs,
    /// Rows to look at: .jsonl, .json, .csv, .tsv or .txt; several files may be given
    #[arg(long, value_name = "FILE", num_args = 1.., required = true)]
    data: Vec<PathBuf>,
    /// What they are for: CAUSAL_LM, SEQ_CLS, TOKEN_CLS, QUESTION_ANS, SEQ_2_SEQ_LM, MASKED_LM [default: found out]
    #[arg(long, value_name = "TASK", conflicts_with_all = ["format", "train_on_prompt"])]
    task: Option<String>,
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
    let task = match (&args.task, sources.task, &args.format) {
        (None, Some(task), _) => task,
        (None, None, Some(_)) => Task::CausalLm, // the formats that can be named are those of texts to go on with
        (asked, _, _) => task_for(asked.as_deref(), &args.data, &sources)?,
    };
    if task != Task::CausalLm {
        return of_task(&args, &sources, task);
    }
    let options = Options {
        format: format(args.format.as_deref())?,
        max_length: sources.row_length(0, args.max_length, USUAL_LENGTH)?,
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

/// Rows of another task.
fn of_task(args: &Args, sources: &Sources, task: Task) -> Result<()> {
    if args.ids {
        return Err(usage(format!(
            "`--ids` is for texts to go on with; of rows for {task} the tokens are shown with their labels"
        )));
    }
    let tokenizer = sources.tokenizer()?;
    let options = TaskOptions::of(task.name().parse()?);
    let length = sources.row_length(0, args.max_length, options.max_length)?;
    let mut options = options.with_max_length(length);
    let numbers = sources.predicts_numbers(task)?;
    options.problem = numbers.then_some(Problem::Regression);
    let data = prepare_task(&args.data, &tokenizer, &options, &|_| {})?;
    println!("  {} {task}", style(format!("{:<10}", "task")).bold());
    describe_task("data", &data, options.max_length);
    let begin = args.from.checked_sub(1).filter(|it| *it < data.len());
    let Some(begin) = begin else {
        return Err(usage(format!(
            "no row {}: there are {}, counted from 1",
            args.from,
            data.len()
        )));
    };
    for at in begin..data.len().min(begin.saturating_add(args.rows)) {
        println!("\n{}", style(format!("row {}", at + 1)).bold());
        show_row(&data, &tokenizer, at, usize::MAX)?;
    }
    Ok(())
}
