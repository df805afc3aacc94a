//! The shapes of a training row, and how one is told from another.
//!
//! | format | keys | what is trained |
//! | --- | --- | --- |
//! | `messages` | `messages`: list of `role`, `content` (also under `conversations`); optional `tools` | assistant turns |
//! | `sharegpt` | `conversations`: list of `from`, `value` (also under `messages`); optional `system`, `tools` | assistant turns |
//! | `prompt-completion` | `prompt`, `completion`: strings, or lists of messages; optional `tools` | the completion |
//! | `alpaca` | `instruction`, `output`, optional `input` | the output |
//! | `text` | `text` | everything |
//! | `plain-text` | none, the file is prose | everything |
//!
//! The first row decides, by its keys alone and in the order of the table.
//! Every later row must have the same; one that has not is an error and never a
//! row that is skipped, since a data set that loses rows in silence is worse
//! than one that does not load.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use serde_json::{Map, Value};

use crate::error::{Error, Result, nearest};
use crate::message::{Message, kind, quoted};
use crate::source::{RawRow, Shape, Source};

/// The shape of a training row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// Conversations of `role` and `content`.
    Messages,
    /// Conversations of `from` and `value`.
    ShareGpt,
    /// `prompt` and `completion`.
    PromptCompletion,
    /// `instruction`, `input` and `output`.
    Alpaca,
    /// `text`, row by row.
    Text,
    /// A file of prose, cut into windows.
    PlainText,
}

/// What a row says, whatever its format.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Example {
    /// A conversation; turns before `first` are given, not trained.
    Chat {
        messages: Vec<Message>,
        first: usize,
        tools: Option<Value>,
    },
    /// An instruction: through a chat template where there is one.
    Instruction {
        instruction: String,
        input: String,
        output: String,
    },
    /// A prompt and what follows: through a chat template where there is one.
    Pair { prompt: String, completion: String },
    /// Text, all of it trained.
    Text(String),
}

/// A parsed row, and the keys of it that nothing reads.
#[derive(Debug)]
pub(crate) struct Parsed {
    pub(crate) example: Example,
    pub(crate) ignored: Vec<String>,
}

impl Format {
    /// All formats, in the order in which they are tried.
    pub const ALL: [Format; 6] = [
        Format::Messages,
        Format::ShareGpt,
        Format::PromptCompletion,
        Format::Alpaca,
        Format::Text,
        Format::PlainText,
    ];

    /// The name that [`FromStr`] takes.
    pub fn name(self) -> &'static str {
        match self {
            Format::Messages => "messages",
            Format::ShareGpt => "sharegpt",
            Format::PromptCompletion => "prompt-completion",
            Format::Alpaca => "alpaca",
            Format::Text => "text",
            Format::PlainText => "plain-text",
        }
    }

    /// The keys that a row of this format must have.
    fn keys(self) -> &'static [&'static str] {
        match self {
            Format::Messages => &["messages"],
            Format::ShareGpt => &["conversations"],
            Format::PromptCompletion => &["prompt", "completion"],
            Format::Alpaca => &["instruction", "output"],
            Format::Text => &["text"],
            Format::PlainText => &[],
        }
    }

    /// Whether a row has this format's keys.
    fn fits(self, row: &Map<String, Value>) -> bool {
        match self {
            Format::Messages | Format::ShareGpt => {
                row.contains_key("messages") || row.contains_key("conversations")
            }
            _ => self.keys().iter().all(|key| row.contains_key(*key)),
        }
    }

    /// Which format a row has, by its keys.
    pub(crate) fn of(row: &Map<String, Value>) -> Option<Format> {
        if let Some(turns) = row.get("messages").or(row.get("conversations")) {
            let from = turns.get(0).is_some_and(|turn| turn.get("from").is_some());
            return Some(if from {
                Format::ShareGpt
            } else {
                Format::Messages
            });
        }
        [Format::PromptCompletion, Format::Alpaca, Format::Text]
            .into_iter()
            .find(|format| format.keys().iter().all(|key| row.contains_key(*key)))
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Format {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let plain = name.to_ascii_lowercase().replace('_', "-");
        let found = Format::ALL
            .into_iter()
            .find(|format| format.name() == plain);
        found.ok_or_else(|| {
            let names = Format::ALL.map(Format::name);
            let mut what = format!(
                "unknown data format `{name}`, this build knows {}",
                quoted(names)
            );
            if let Some(near) = nearest(&plain, names) {
                what.push_str(&format!(", the nearest is `{near}`"));
            }
            Error::Option(what)
        })
    }
}

/// The format of a data file, by its name and its first row.
pub fn detect(path: &Path) -> Result<Format> {
    detect_in(&Source::open(path)?)
}

pub(crate) fn detect_in(source: &Source) -> Result<Format> {
    if source.shape == Shape::Text {
        return Ok(Format::PlainText);
    }
    let (first, row) = first_row(source)?;
    Format::of(&row).ok_or_else(|| {
        let mut what = format!(
            "no known format has the keys {}; expected one of ",
            quoted(row.keys())
        );
        let known: Vec<String> = Format::ALL[..5]
            .iter()
            .map(|format| quoted(format.keys()))
            .collect();
        what.push_str(&known.join(", "));
        let names = Format::ALL.iter().flat_map(|format| format.keys());
        for wanted in names {
            if let Some(near) = nearest(wanted, row.keys().map(String::as_str)) {
                what.push_str(&format!("; did `{near}` mean `{wanted}`?"));
                break;
            }
        }
        Error::row(&source.path, first.line, what)
    })
}

/// The first row of a file that has rows, and where it is.
pub(crate) fn first_row(source: &Source) -> Result<(RawRow<'_>, Map<String, Value>)> {
    let Some(first) = source.rows()?.next() else {
        let what = match source.shape {
            Shape::Table { .. } => "there is no row below the names of the columns",
            _ => "empty, there is no row in it",
        };
        return Err(Error::file(&source.path, what));
    };
    Ok((first, object(source, first)?))
}

/// Parses one row of a known format.
pub(crate) fn parse(source: &Source, row: RawRow<'_>, format: Format) -> Result<Parsed> {
    let mut object = object(source, row)?;
    let refuse = |what: String| Error::row(&source.path, row.line, what);
    if !format.fits(&object) {
        return Err(refuse(disagrees(&object, format)));
    }
    let example = match format {
        Format::Messages => turns(&mut object, Message::from_json, format),
        Format::ShareGpt => turns(&mut object, from_sharegpt, format),
        Format::PromptCompletion => pair(&mut object),
        Format::Alpaca => alpaca(&mut object),
        Format::Text => string(&mut object, "text", format).map(Example::Text),
        Format::PlainText => Err("a plain text file has no rows".into()),
    };
    Ok(Parsed {
        example: example.map_err(refuse)?,
        ignored: object.into_iter().map(|(key, _)| key).collect(),
    })
}

/// A row as an object. A table's cells are strings.
pub(crate) fn object(source: &Source, row: RawRow<'_>) -> Result<Map<String, Value>> {
    let refuse = |what: String| Error::row(&source.path, row.line, what);
    let text = source.row_text(row)?;
    if let Some(table) = &source.table {
        return table.object(text).map_err(refuse);
    }
    match serde_json::from_str(text) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(other) => Err(refuse(format!(
            "a row must be a JSON object, not {}",
            kind(&other)
        ))),
        Err(error) => {
            // The error counts lines within the row, which is one line.
            let what = error.to_string();
            let what = what.split(" at line ").next().unwrap_or(&what);
            Err(refuse(format!(
                "not JSON: {what}, column {}",
                error.column()
            )))
        }
    }
}

type Row = Map<String, Value>;

fn turns(
    row: &mut Row,
    read: fn(Value) -> Result<Message, String>,
    format: Format,
) -> Result<Example, String> {
    let key = ["messages", "conversations"]
        .into_iter()
        .find(|key| row.contains_key(*key));
    let Some(key) = key else {
        return Err(disagrees(row, format));
    };
    let mut messages = list(row, key, read, format)?;
    if format == Format::ShareGpt
        && let Some(system) = row.shift_remove("system")
    {
        match system {
            Value::String(system) if !system.is_empty() => {
                messages.insert(0, Message::system(system));
            }
            Value::String(_) | Value::Null => {}
            other => return Err(format!("`system` must be a string, not {}", kind(&other))),
        }
    }
    chat(messages, 0, row)
}

fn chat(messages: Vec<Message>, first: usize, row: &mut Row) -> Result<Example, String> {
    if !messages[first..].iter().any(Message::is_assistant) {
        let roles = quoted(messages.iter().map(|message| &message.role));
        return Err(format!(
            "no assistant turn, so there is nothing to learn; the roles are {roles}"
        ));
    }
    let tools = match row.shift_remove("tools") {
        None | Some(Value::Null) => None,
        Some(tools @ Value::Array(_)) => Some(tools),
        // Columnar files cannot hold lists of mixed objects, so some hold their JSON text.
        Some(Value::String(text)) => match serde_json::from_str(&text) {
            Ok(tools @ Value::Array(_)) => Some(tools),
            _ => return Err("`tools` must be a list, or the JSON text of one".into()),
        },
        Some(other) => return Err(format!("`tools` must be a list, not {}", kind(&other))),
    };
    Ok(Example::Chat {
        messages,
        first,
        tools,
    })
}

fn list(
    row: &mut Row,
    key: &str,
    read: fn(Value) -> Result<Message, String>,
    format: Format,
) -> Result<Vec<Message>, String> {
    match row.shift_remove(key) {
        Some(Value::Array(turns)) if turns.is_empty() => Err(format!("`{key}` is an empty list")),
        Some(Value::Array(turns)) => turns
            .into_iter()
            .enumerate()
            .map(|(at, turn)| read(turn).map_err(|what| format!("`{key}`[{at}]: {what}")))
            .collect(),
        Some(other) => Err(format!(
            "`{key}` must be a list of messages, not {}",
            kind(&other)
        )),
        None => Err(disagrees(row, format)),
    }
}

/// ShareGPT's `from` and `value` as `role` and `content`.
fn from_sharegpt(turn: Value) -> Result<Message, String> {
    let Value::Object(mut turn) = turn else {
        return Err(format!("a message must be an object, not {}", kind(&turn)));
    };
    let mut take = |key: &str| match turn.shift_remove(key) {
        Some(Value::String(text)) => Ok(text),
        Some(other) => Err(format!("`{key}` must be a string, not {}", kind(&other))),
        None => {
            let mut what = format!(
                "a message without `{key}`, its keys are {}",
                quoted(turn.keys())
            );
            if turn.contains_key("role") {
                what.push_str("; earlier ones have `from` and `value`");
            }
            Err(what)
        }
    };
    let from = take("from")?;
    let value = take("value")?;
    const NAMES: [(&str, &str); 12] = [
        ("human", "user"),
        ("user", "user"),
        ("gpt", "assistant"),
        ("assistant", "assistant"),
        ("chatgpt", "assistant"),
        ("bing", "assistant"),
        ("bard", "assistant"),
        ("model", "assistant"),
        ("system", "system"),
        ("tool", "tool"),
        ("function", "tool"),
        ("observation", "tool"),
    ];
    let role = NAMES.iter().find(|(name, _)| *name == from);
    let Some((_, role)) = role else {
        let names = NAMES.map(|(name, _)| name);
        let near = nearest(&from, names)
            .map_or(String::new(), |near| format!(", the nearest is `{near}`"));
        return Err(format!(
            "unknown speaker `{from}`, this build knows {}{near}",
            quoted(names)
        ));
    };
    Ok(Message {
        role: (*role).to_owned(),
        content: value,
        extra: turn,
    })
}

fn pair(row: &mut Row) -> Result<Example, String> {
    let format = Format::PromptCompletion;
    if row.get("prompt").is_some_and(Value::is_array) {
        let mut messages = list(row, "prompt", Message::from_json, format)?;
        let first = messages.len();
        messages.extend(list(row, "completion", Message::from_json, format)?);
        return chat(messages, first, row);
    }
    Ok(Example::Pair {
        prompt: string(row, "prompt", format)?,
        completion: string(row, "completion", format)?,
    })
}

fn alpaca(row: &mut Row) -> Result<Example, String> {
    let instruction = string(row, "instruction", Format::Alpaca)?;
    let output = string(row, "output", Format::Alpaca)?;
    let input = match row.shift_remove("input") {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(input)) => input,
        Some(other) => return Err(format!("`input` must be a string, not {}", kind(&other))),
    };
    Ok(Example::Instruction {
        instruction,
        input,
        output,
    })
}

fn string(row: &mut Row, key: &str, format: Format) -> Result<String, String> {
    match row.shift_remove(key) {
        Some(Value::String(text)) => Ok(text),
        Some(other) => Err(format!("`{key}` must be a string, not {}", kind(&other))),
        None => Err(disagrees(row, format)),
    }
}

/// A row that is not of the file's format.
fn disagrees(row: &Row, format: Format) -> String {
    let mut what = format!(
        "this file's format is {format}, which needs the keys {}; this row has {}",
        quoted(format.keys()),
        quoted(row.keys())
    );
    for wanted in format.keys().iter().filter(|key| !row.contains_key(**key)) {
        if let Some(near) = nearest(wanted, row.keys().map(String::as_str)) {
            what.push_str(&format!("; did `{near}` mean `{wanted}`?"));
        }
    }
    what
}
