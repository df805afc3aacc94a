//! `peft eval`: loss and perplexity or what the task is judged by for each file, with the adapters and without.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use console::style;
use indicatif::{ProgressBar, ProgressStyle};
use peft::{
    Ctx, Decoder, ModelExt, Settings,
    data::{Options, Target, TaskDataset, TaskOptions, Tokenizer, prepare_task},
    metrics::{Words, bleu, rouge},
    models::{Classes, Problem, Sampling, Seq2Seq, Task},
    train::{Batch, Evaluation, Rows, Run, evaluate, loss},
};

use serde_json::{Map, Value};

use super::train::{USUAL_LENGTH, cache_dir, format, load, recipe::Plan};
use crate::{
    answer::{Writer, answers as answer_all},
    args::{Compute, kind_name},
    error::usage,
    metrics::judge,
    sources::{SourceArgs, Sources},
    terminal::grouped,
};

/// Flags of `peft eval`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(flatten)]
    source: SourceArgs,
    /// Rows to measure on: .jsonl, .json, .csv, .tsv or .txt; several files may be given
    #[arg(long, value_name = "FILE", num_args = 1.., required = true)]
    data: Vec<PathBuf>,
    /// Format of the rows [default: found out]
    #[arg(long, value_name = "FORMAT")]
    format: Option<String>,
    /// Tokens after which a row is cut [default: what the model takes, at most 1024]
    #[arg(long, value_name = "N")]
    max_length: Option<usize>,
    /// Measure the prompts, too
    #[arg(long)]
    train_on_prompt: bool,
    /// Rows that are computed at once
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..))]
    batch_size: u16,
    /// A JSON object a line instead of a table
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    compute: Compute,
}

const EXAMPLES: &str = "\
Examples:
  peft eval RUN --data test.jsonl
  peft eval --model MODEL --data a.jsonl b.txt";

/// Measures.
pub(crate) fn run(args: Args) -> Result<()> {
    let sources = args.source.find()?;
    let tokenizer = sources.tokenizer()?;
    let place = args.compute.place()?;
    let task = sources.task(None)?;
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
    let mut model = sources.load_at(place)?;
    let adapters: Vec<String> = model.adapters().into_iter().map(|(name, _)| name).collect();
    if !args.json {
        let with = if adapters.is_empty() {
            String::new()
        } else {
            format!(", adapters {}", adapters.join(", "))
        };
        println!(
            "{} in {} ({}){with}",
            style(&sources.model).bold(),
            kind_name(place.kind),
            place.why
        );
        data.report()
            .warnings()
            .iter()
            .for_each(|text| println!("{} {text}", style("warning").yellow().bold()));
    }

    let mut lines: Vec<Line> = Vec::new();
    for (at, file) in data.files().iter().enumerate() {
        let rows = (0..data.len())
            .filter(|row| data.file_of(*row) == Some(at))
            .collect();
        let rows = Rows::new(&data, rows, tokenizer.pad_id())
            .map_err(|error| anyhow::anyhow!("{}: {error}", file.path.display()))?;
        let size = usize::from(args.batch_size);
        let on = measure(&*model, &rows, size)?;
        let off = match adapters.is_empty() {
            true => None,
            false => {
                adapters
                    .iter()
                    .try_for_each(|name| model.switch(name, false))?;
                let off = measure(&*model, &rows, size)?;
                adapters
                    .iter()
                    .try_for_each(|name| model.switch(name, true))?;
                Some(off)
            }
        };
        lines.push((file.path.display().to_string(), on, off));
    }
    if lines.len() > 1 {
        let sum = |of: &dyn Fn(&Line) -> Option<Evaluation>| {
            let all = lines.iter().filter_map(of);
            all.reduce(|a, b| Evaluation {
                sum: a.sum + b.sum,
                labels: a.labels + b.labels,
            })
        };
        if let Some(on) = sum(&|line| Some(line.1)) {
            let off = sum(&|line| line.2);
            lines.push(("all".into(), on, off));
        }
    }
    match args.json {
        true => lines.iter().for_each(|line| println!("{}", json(line))),
        false => println!("{}", table(&lines)),
    }
    Ok(())
}

/// Loss and figures of a model of another task.
fn of_task(args: &Args, sources: &Sources, task: Task) -> Result<()> {
    let tokenizer = sources.tokenizer()?;
    if task == Task::FeatureExtraction {
        return Err(usage(format!(
            "`{}` has no head that could be measured; give a run, or an adapter that brings one",
            sources.model
        )));
    }
    let model = sources.load_task(task, args.compute.place()?)?;
    let options = TaskOptions::of(task.name().parse()?);
    let length = sources.row_length(0, args.max_length, options.max_length)?;
    let mut options = options.with_max_length(length);
    // Hidden are the words that the run hides, or one that says nothing of its seed.
    let run = args.source.run.as_deref().map(Path::new);
    options.mask_seed = match run.filter(|dir| task == Task::MaskedLm && Run::is_run(dir)) {
        Some(dir) => Plan::read(&Run::open(dir)?.config())?.settings.seed,
        None => Settings::default().seed,
    };
    // A head for numbers has names for its outputs, too, but they are no classes.
    let classes = model.classes();
    let numbers = |it: &Classes| it.problem == Some(Problem::Regression) || it.names.len() == 1;
    if classes.is_some_and(numbers) && task == Task::SeqCls {
        options.problem = Some(peft::data::Problem::Regression);
    }
    let classes = classes.filter(|it| !numbers(it));
    options.classes = classes.map(|it| it.names.clone());
    for file in &args.data {
        let data = prepare_task(std::slice::from_ref(file), &tokenizer, &options, &|_| {})?;
        let rows: Vec<usize> = (0..data.len()).collect();
        let mut judged = judge(&*model, &data, &rows, usize::from(args.batch_size))?;
        if let Some(writer) = model.seq2seq() {
            let texts = written(writer, &data, &tokenizer, usize::from(args.batch_size))?;
            judged.figures.extend(texts);
        }
        if args.json {
            let mut line = serde_json::json!({
                "file": file,
                "labels": judged.loss.labels,
                "loss": judged.loss.loss(),
            });
            for (name, value) in judged.figures {
                line[name] = value;
            }
            println!("{line}");
            continue;
        }
        println!(
            "{}: loss {:.4} · {}",
            style(file.display()).bold(),
            judged.loss.loss(),
            judged.line()
        );
        if let Some(confusion) = &judged.confusion {
            println!("\n{}", confusion.table());
        }
        if let Some(report) = &judged.report {
            println!("\n{report}");
        }
    }
    Ok(())
}

/// Most tokens of a text that is written to be measured.
const LONGEST: usize = 128;

/// What the texts are worth that a model writes for the sources, each token the best: BLEU (0 to 100) and the F of ROUGE (0 to 1).
fn written(
    model: &dyn Seq2Seq,
    data: &TaskDataset,
    tokenizer: &Tokenizer,
    size: usize,
) -> Result<Map<String, Value>> {
    let sampling = Sampling {
        max_new_tokens: LONGEST,
        stop_ids: tokenizer.eos_ids().to_vec(),
        ..Sampling::default()
    };
    let (mut sources, mut references) = (Vec::new(), Vec::new());
    for at in 0..data.len() {
        let row = data.get(at).context("a row that is there")?;
        if let Target::Sequence(ids) = row.target {
            sources.push(row.ids.to_vec());
            references.push(vec![tokenizer.decode(ids, true)?]);
        }
    }
    if sources.is_empty() {
        return Ok(Map::new());
    }
    let mut answers = Vec::new();
    for some in sources.chunks(size.max(1)) {
        for reply in answer_all(Writer::Seq2Seq(model), tokenizer, some, &sampling, &[])? {
            answers.push(reply.text);
        }
    }
    let overlaps = rouge(&references, &answers, Words::default())?;
    Ok(Map::from_iter([
        ("bleu".to_owned(), bleu(&references, &answers)?.score.into()),
        ("rouge1".to_owned(), overlaps.rouge1.f.into()),
        ("rouge2".to_owned(), overlaps.rouge2.f.into()),
        ("rougeL".to_owned(), overlaps.rouge_l.f.into()),
    ]))
}

/// A file, its loss with the adapters, and without them where there are any.
type Line = (String, Evaluation, Option<Evaluation>);

fn measure(model: &dyn Decoder, rows: &Rows<'_>, size: usize) -> Result<Evaluation> {
    let bar = ProgressBar::new(0); // hidden where there is no terminal
    if let Ok(look) =
        ProgressStyle::with_template("measuring {bar:24.cyan/dim} {pos}/{len} {eta} left")
    {
        bar.set_style(look.progress_chars("━━─"));
    }
    let mut sum = |batch: &Batch| loss(model, batch, Ctx::EVAL);
    let result = evaluate(&mut sum, rows, size, &mut |done, of| {
        bar.set_length(of as u64);
        bar.set_position(done as u64);
    });
    bar.finish_and_clear();
    Ok(result?)
}

fn json((file, on, off): &Line) -> serde_json::Value {
    let figures =
        |it: &Evaluation| serde_json::json!({"loss": it.loss(), "perplexity": it.perplexity()});
    serde_json::json!({
        "file": file,
        "tokens": on.labels,
        "loss": on.loss(),
        "perplexity": on.perplexity(),
        "without_adapter": off.as_ref().map(figures),
    })
}

fn table(lines: &[Line]) -> Table {
    let both = lines.iter().any(|line| line.2.is_some());
    let mut table = Table::new();
    table
        .load_style(presets::UTF8_HORIZONTAL_ONLY)
        .set_content_arrangement(ContentArrangement::Dynamic); // as wide as the terminal at most
    let mut head = vec!["file", "tokens", "loss", "perplexity"];
    if both {
        head.extend(["loss without", "perplexity without"]);
    }
    table.set_header(head);
    for (file, on, off) in lines {
        let mut cells = vec![
            file.clone(),
            grouped(i64::try_from(on.labels).unwrap_or(i64::MAX)),
            format!("{:.4}", on.loss()),
            format!("{:.2}", on.perplexity()),
        ];
        if let Some(off) = off {
            cells.extend([
                format!("{:.4}", off.loss()),
                format!("{:.2}", off.perplexity()),
            ]);
        }
        table.add_row(cells);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}
