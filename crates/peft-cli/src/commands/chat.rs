//! `peft chat`: a conversation in the terminal.
//!
//! The whole conversation goes through the template each turn, as the model was trained, and the cache keeps what
//! did not change, so that only the new words are computed.

use std::{
    fs::OpenOptions,
    io::{IsTerminal, Write, stdin},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

use anyhow::{Context, Result};
use console::style;
use peft::{
    core::ModelExt,
    data::Message,
    models::{Decoder, GenerateError, Memory, Sampling},
};
use rustyline::{DefaultEditor, error::ReadlineError};

use crate::{
    answer::{Ending, SamplingArgs, Speaker, conversation, stream},
    args::{Compute, kind_name},
    commands::generate::{figures, say},
    sources::{SourceArgs, Voice},
};

/// Flags of `peft chat`.
#[derive(Debug, clap::Args)]
#[command(after_help = COMMANDS)]
pub(crate) struct Args {
    #[command(flatten)]
    source: SourceArgs,
    /// What the model is told first
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Merge the adapter into the base first: a little faster
    #[arg(long, overrides_with = "unmerged")]
    merged: bool,
    /// Compute the adapter beside the base (the default)
    #[arg(long, overrides_with = "merged")]
    unmerged: bool,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    compute: Compute,
}

const COMMANDS: &str = "\
In the conversation:
  /reset         start anew
  /system TEXT   start anew with another instruction; without TEXT, with none
  /adapter       switch the adapter off, or on again
  /save FILE     add the conversation to a .jsonl file, as a row to train on
  /help          these lines
  /quit          leave; so does Ctrl-D
Ctrl-C ends an answer. A line that ends with \\ goes on in the next.";

/// How lively a conversation is by default.
const TEMPERATURE: f64 = 0.7;

/// Set by Ctrl-C, taken back before each answer.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Talks until the user leaves.
pub(crate) fn run(args: Args) -> Result<()> {
    let stops = args.sampling.stops()?;
    let sources = args.source.find()?;
    sources.must_talk()?;
    let voice = sources.tokenizer()?;
    // Before the weights: a model that cannot be asked says so at once.
    conversation(&voice, &[Message::user("?")])?;
    let sampling = args.sampling.settings(&voice, TEMPERATURE)?;
    let mut model = sources.load_at(args.compute.place()?)?;
    if args.merged {
        model.merge()?;
    }
    ctrlc::set_handler(|| INTERRUPTED.store(true, Ordering::SeqCst))
        .context("Ctrl-C cannot be caught")?;

    let adapters: Vec<String> = sources
        .adapters
        .iter()
        .map(|(_, dir)| dir.display().to_string())
        .collect();
    if stdin().is_terminal() {
        let with = if adapters.is_empty() {
            String::new()
        } else {
            format!(" with {}", adapters.join(", "))
        };
        println!(
            "{}{with}, {}",
            style(&sources.model).bold(),
            kind_name(model.kind())
        );
        println!("{}\n", style("/help for commands, Ctrl-D to leave").dim());
    }
    let mut talk = Talk {
        model,
        voice,
        sampling,
        stops,
        merged: args.merged,
        system: args.system.clone(),
        messages: Vec::new(),
        memory: Memory::new(),
    };
    talk.restart();
    talk.run()
}

/// A conversation.
struct Talk {
    model: Box<dyn Decoder>,
    voice: Voice,
    sampling: Sampling,
    stops: Vec<String>,
    merged: bool,
    system: Option<String>,
    messages: Vec<Message>,
    memory: Memory,
}

impl Talk {
    fn run(&mut self) -> Result<()> {
        let mut editor = DefaultEditor::new().context("the terminal")?;
        while let Some(line) = read(&mut editor)? {
            let line = line.trim();
            match line.strip_prefix('/') {
                _ if line.is_empty() => {}
                None => self.ask(line)?,
                Some("quit" | "exit" | "q") => break,
                Some(command) => self.obey(command),
            }
        }
        Ok(())
    }

    /// One turn.
    fn ask(&mut self, text: &str) -> Result<()> {
        self.messages.push(Message::user(text));
        let ids = match conversation(&self.voice, &self.messages) {
            Ok(ids) => ids,
            Err(error) => {
                self.messages.pop();
                return self.note(&format!("{error:#}"));
            }
        };
        INTERRUPTED.store(false, Ordering::SeqCst);
        let go_on = || !INTERRUPTED.load(Ordering::SeqCst);
        let speaker = Speaker {
            model: &*self.model,
            tokenizer: &self.voice,
            sampling: &self.sampling,
            stops: &self.stops,
        };
        let reply = stream(speaker, &mut self.memory, &ids, &mut say, &go_on);
        // Another answer to the same words next time.
        self.sampling.seed = self.sampling.seed.wrapping_add(1);
        match reply {
            Ok(reply) => {
                say("\n")?;
                if reply.stop == Ending::Interrupted || stdin().is_terminal() {
                    figures(std::slice::from_ref(&reply));
                }
                self.messages.push(Message::assistant(reply.text));
                Ok(())
            }
            Err(error) if matches!(error.downcast_ref(), Some(GenerateError::TooLong { .. })) => {
                self.messages.pop();
                self.note("the conversation is longer than the model's context: /reset starts anew")
            }
            Err(error) => Err(error),
        }
    }

    fn obey(&mut self, command: &str) {
        let (name, rest) = command
            .split_once(char::is_whitespace)
            .unwrap_or((command, ""));
        let rest = rest.trim();
        let said = match name {
            "help" | "h" | "?" => COMMANDS.to_owned(),
            "reset" => {
                self.restart();
                "starting anew".to_owned()
            }
            "system" => {
                self.system = (!rest.is_empty()).then(|| rest.to_owned());
                self.restart();
                "starting anew, with that in mind".to_owned()
            }
            "adapter" => self.toggle(),
            "save" if rest.is_empty() => "/save wants a file".to_owned(),
            "save" => match self.save(Path::new(rest)) {
                Ok(()) => format!("added to {rest}"),
                Err(error) => format!("{error:#}"),
            },
            _ => {
                let known = ["help", "reset", "system", "adapter", "save", "quit"];
                format!(
                    "unknown command /{name}{}; /help shows all",
                    peft::core::nearest(name, known)
                )
            }
        };
        // A note that cannot be written is no reason to stop.
        let _ = self.note(&said);
    }

    fn note(&self, text: &str) -> Result<()> {
        eprintln!("{}", style(text).dim().for_stderr());
        Ok(())
    }

    fn restart(&mut self) {
        self.messages = self
            .system
            .iter()
            .map(|it| Message::system(it.as_str()))
            .collect();
    }

    fn toggle(&mut self) -> String {
        let all = self.model.adapters();
        if all.is_empty() || self.merged {
            return "there is no adapter that could be switched".to_owned();
        }
        let on = !all.iter().any(|(_, on)| *on);
        for (name, _) in all {
            if let Err(error) = self.model.switch(&name, on) {
                return error.to_string();
            }
        }
        // What is in the cache was computed the other way.
        self.memory = Memory::new();
        format!("the adapter is {}", if on { "on" } else { "off" })
    }

    fn save(&self, path: &Path) -> Result<()> {
        let row = serde_json::json!({ "messages": self.messages });
        let place = || PathBuf::from(path).display().to_string();
        let mut file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)
            .with_context(place)?;
        file.write_all(format!("{row}\n").as_bytes())
            .with_context(place)
    }
}

/// What the user types; `None` at the end.
fn read(editor: &mut DefaultEditor) -> Result<Option<String>> {
    let mut text = String::new();
    loop {
        match editor.readline(if text.is_empty() { "> " } else { ". " }) {
            Ok(line) => match line.strip_suffix('\\') {
                Some(more) => text = format!("{text}{more}\n"),
                None => {
                    text += &line;
                    // Without its history the conversation goes on.
                    let _ = editor.add_history_entry(text.trim());
                    return Ok(Some(text));
                }
            },
            Err(ReadlineError::Interrupted) => {
                text.clear();
                eprintln!("{}", style("Ctrl-D leaves").dim().for_stderr());
            }
            Err(ReadlineError::Eof) => return Ok(None),
            Err(error) => return Err(error).context("the terminal"),
        }
    }
}
