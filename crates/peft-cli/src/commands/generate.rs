//! `peft generate`: answers to one prompt, streamed, or to many, in batches.
//!
//! The answer goes to the standard output and nothing else does; figures go to the standard error, and only
//! on a terminal, so that a pipe gets the text alone.

use std::{
    io::{IsTerminal, Read, Write, stderr, stdin, stdout},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use console::style;
use peft::{
    core::ModelExt,
    data::{Message, Tokenizer},
    models::{Memory, Sampling, Task, asked_before},
};
use serde::Deserialize;

use crate::{
    answer::{Reply, SamplingArgs, Speaker, Writer, answers, conversation, stream},
    args::Compute,
    error::usage,
    sources::SourceArgs,
};

/// Flags of `peft generate`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(flatten)]
    source: SourceArgs,
    /// What to answer; may be given several times
    #[arg(long, short, value_name = "TEXT", required_unless_present = "prompts")]
    prompt: Vec<String>,
    /// A file with a prompt a line, or .jsonl rows with `prompt` or `messages`; `-` reads the standard input
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// What the model is told first
    #[arg(long, value_name = "TEXT", conflicts_with = "raw")]
    system: Option<String>,
    /// Go on from the text as it is, without the chat template
    #[arg(long)]
    raw: bool,
    /// A JSON object a line: prompt, answer, tokens, stop
    #[arg(long)]
    json: bool,
    /// Merge the adapter into the base first: a little faster
    #[arg(long, overrides_with = "unmerged")]
    merged: bool,
    /// Compute the adapter beside the base (the default)
    #[arg(long, overrides_with = "merged")]
    unmerged: bool,
    /// Prompts that are answered together
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..))]
    batch_size: u16,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    compute: Compute,
}

const EXAMPLES: &str = "\
Examples:
  peft generate RUN --prompt 'What is a lighthouse?'
  peft generate --model MODEL --raw --prompt 'Once upon a time' --temperature 0.8 --seed 1
  peft generate RUN --prompts questions.txt --json > answers.jsonl";

/// Answers.
pub(crate) fn run(args: Args) -> Result<()> {
    let stops = args.sampling.stops()?;
    let prompts = args.all_prompts()?;
    let sources = args.source.find()?;
    let tokenizer = sources.tokenizer()?;
    let sampling = args.sampling.settings(&tokenizer, 0.0)?;
    let place = args.compute.place()?;
    let batches = Batches {
        tokenizer: &tokenizer,
        sampling: &sampling,
        stops: &stops,
        prompts: &prompts,
        size: args.batch_size.into(),
        json: args.json,
    };
    if sources.task(None)? == Task::Seq2SeqLm {
        let ids = prompts
            .iter()
            .map(|it| it.source(&tokenizer, args.system.as_deref()))
            .collect::<Result<Vec<_>>>()?;
        let mut model = sources.load_task(Task::Seq2SeqLm, place)?;
        if args.merged {
            model.merge()?;
        }
        let model = model.seq2seq().context("the model writes no texts")?;
        return batches.answer(Writer::Seq2Seq(model), &ids);
    }
    sources.must_talk()?;
    let ids: Vec<Vec<u32>> = prompts
        .iter()
        .map(|it| it.ids(&tokenizer, args.system.as_deref(), args.raw))
        .collect::<Result<_>>()?;
    let mut model = sources.load_at(place)?;
    if args.merged {
        model.merge()?;
    }

    if let ([prompt], [ids], false) = (&prompts[..], &ids[..], args.json) {
        let mut show = |text: &str| say(text);
        let memory = &mut Memory::new();
        let speaker = Speaker {
            model: &*model,
            tokenizer: &tokenizer,
            sampling: &sampling,
            stops: &stops,
        };
        let reply = stream(speaker, memory, ids, &mut show, &|| true)
            .with_context(|| prompt.place.clone())?;
        say("\n")?;
        figures(&[reply]);
        return Ok(());
    }
    batches.answer(Writer::Decoder(&*model), &ids)
}

/// Prompts that are answered some at a time.
struct Batches<'a> {
    tokenizer: &'a Tokenizer,
    sampling: &'a Sampling,
    stops: &'a [String],
    prompts: &'a [Prompt],
    size: usize,
    json: bool,
}

impl Batches<'_> {
    /// Answers and prints; the ids are those of the prompts.
    fn answer(&self, writer: Writer<'_>, ids: &[Vec<u32>]) -> Result<()> {
        let mut all = Vec::new();
        let before = asked_before(ids);
        let batches = ids.chunks(self.size).zip(before.chunks(self.size));
        for (prompts, (ids, before)) in self.prompts.chunks(self.size).zip(batches) {
            let sampling = Sampling {
                asked_before: before.to_vec(),
                ..self.sampling.clone()
            };
            let replies = answers(writer, self.tokenizer, ids, &sampling, self.stops)
                .with_context(|| format!("prompts from {}", prompts[0].place))?;
            for (prompt, reply) in prompts.iter().zip(&replies) {
                match (self.json, self.prompts.len()) {
                    (true, _) => say(&prompt.json(reply))?,
                    (false, 1) => say(&format!("{}\n", reply.text))?,
                    (false, _) => say(&prompt.shown(reply))?,
                }
            }
            all.extend(replies);
        }
        figures(&all);
        Ok(())
    }
}

/// One prompt, and where it came from.
#[derive(Debug, Clone)]
struct Prompt {
    what: Asked,
    place: String,
}

/// A text, or a conversation so far.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum Asked {
    Prompt { prompt: String },
    Messages { messages: Vec<Message> },
}

impl Prompt {
    fn text(text: &str, place: String) -> Prompt {
        let prompt = text.to_owned();
        Prompt {
            what: Asked::Prompt { prompt },
            place,
        }
    }

    fn ids(&self, tokenizer: &Tokenizer, system: Option<&str>, raw: bool) -> Result<Vec<u32>> {
        let told = system.map(Message::system);
        let ids = match (&self.what, raw) {
            (Asked::Prompt { prompt }, true) => Ok(tokenizer.encode(prompt, true)?),
            (Asked::Messages { .. }, true) => {
                Err(usage("`messages` need the chat template, so not `--raw`"))
            }
            (Asked::Prompt { prompt }, false) => {
                let asked = Message::user(prompt.as_str());
                conversation(
                    tokenizer,
                    &told.into_iter().chain([asked]).collect::<Vec<_>>(),
                )
            }
            (Asked::Messages { messages }, false) => conversation(
                tokenizer,
                &told.into_iter().chain(messages.clone()).collect::<Vec<_>>(),
            ),
        };
        ids.with_context(|| self.place.clone())
    }

    /// The ids of a text that a text is written for.
    fn source(&self, tokenizer: &Tokenizer, system: Option<&str>) -> Result<Vec<u32>> {
        match (&self.what, system) {
            (_, Some(_)) => Err(usage(
                "`--system` is for models that one talks to; this one writes a text for a text",
            )),
            (Asked::Messages { .. }, _) => Err(usage(format!(
                "{}: `messages` are for models that one talks to; this one writes a text for a text: give a `prompt`",
                self.place
            ))),
            (Asked::Prompt { prompt }, None) => Ok(tokenizer.encode(prompt, true)?),
        }
    }

    /// The prompt for people: the last thing that was said.
    fn last(&self) -> &str {
        match &self.what {
            Asked::Prompt { prompt } => prompt,
            Asked::Messages { messages } => messages.last().map_or("", |it| &it.content),
        }
    }

    fn shown(&self, reply: &Reply) -> String {
        let asked = format!("> {}", self.last().replace('\n', "\n> "));
        format!("{}\n{}\n\n", style(asked).dim(), reply.text)
    }

    fn json(&self, reply: &Reply) -> String {
        let mut row = match &self.what {
            Asked::Prompt { prompt } => serde_json::json!({ "prompt": prompt }),
            Asked::Messages { messages } => serde_json::json!({ "messages": messages }),
        };
        row["answer"] = reply.text.clone().into();
        row["tokens"] = reply.tokens.into();
        row["stop"] = reply.stop.word().into();
        format!("{row}\n")
    }
}

impl Args {
    fn all_prompts(&self) -> Result<Vec<Prompt>> {
        let given = self.prompt.iter().enumerate();
        let mut all: Vec<Prompt> = given
            .map(|(i, it)| Prompt::text(it, format!("prompt {}", i + 1)))
            .collect();
        if let Some(path) = &self.prompts {
            all.extend(read(path)?);
        }
        Ok(all)
    }
}

/// A prompt a line, or a row a line.
fn read(path: &Path) -> Result<Vec<Prompt>> {
    let mut text = String::new();
    match path.to_str() {
        Some("-") => stdin()
            .read_to_string(&mut text)
            .context("the standard input")?,
        _ => std::fs::File::open(path)
            .and_then(|mut it| it.read_to_string(&mut text))
            .with_context(|| path.display().to_string())?,
    };
    let rows = path.extension().is_some_and(|it| it == "jsonl");
    let lines = (1..)
        .zip(text.lines())
        .filter(|(_, line)| !line.trim().is_empty());
    let prompts = lines.map(|(number, line)| {
        let place = format!("{}:{number}", path.display());
        if !rows {
            return Ok(Prompt::text(line, place));
        }
        let what = serde_json::from_str(line)
            .with_context(|| format!("{place}: expected an object with `prompt` or `messages`"))?;
        Ok(Prompt { what, place })
    });
    let prompts: Vec<Prompt> = prompts.collect::<Result<_>>()?;
    if prompts.is_empty() {
        bail!("{}: no prompt in it", path.display());
    }
    Ok(prompts)
}

/// Writes text as it comes.
pub(crate) fn say(text: &str) -> Result<()> {
    let mut out = stdout().lock();
    let written = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    match written {
        // Whoever read this has enough.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => std::process::exit(0),
        other => other.context("the standard output"),
    }
}

/// Why it ended, how many tokens, how fast: for people.
pub(crate) fn figures(replies: &[Reply]) {
    let remarks = replies.iter().filter_map(|it| it.stop.remark());
    let mut said: Vec<String> = Vec::new();
    if stderr().is_terminal() {
        let tokens: usize = replies.iter().map(|it| it.tokens).sum();
        let later: usize = replies.iter().map(|it| it.tokens.saturating_sub(1)).sum();
        let rest: f64 = replies
            .iter()
            .map(|it| it.rest.as_secs_f64())
            .fold(0.0, f64::max);
        let first = replies.first().map_or(0.0, |it| it.first.as_secs_f64());
        said.push(format!("{tokens} tokens"));
        said.push(format!("first after {first:.2} s"));
        if later > 0 && rest > 0.0 && replies.len() == 1 {
            said.push(format!("then {:.1} tokens/s", later as f64 / rest));
        }
    }
    let mut remarks: Vec<&str> = remarks.collect();
    remarks.sort_unstable();
    remarks.dedup();
    said.extend(remarks.into_iter().map(str::to_owned));
    if !said.is_empty() {
        eprintln!(
            "{}",
            style(format!("[{}]", said.join(" · "))).dim().for_stderr()
        );
    }
}
