//! What a row of a task says, and in which columns it says it.
//!
//! The first row of a file decides which columns are read; a later row that
//! lacks one is an error with its line, since a row without its label is not a
//! row that may be skipped.

use serde_json::{Map, Value};

use super::{Columns, Task};
use crate::error::nearest;
use crate::message::{kind, quoted};

/// A row as a file has it.
pub(crate) type Object = Map<String, Value>;

/// What a row says.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Said {
    Text {
        text: String,
        pair: Option<String>,
        /// Nothing where only inputs are read.
        label: Option<Label>,
    },
    Words {
        words: Vec<String>,
        /// None where only inputs are read.
        tags: Vec<Label>,
    },
    Question {
        question: String,
        context: String,
        answers: Vec<Answer>,
    },
    Target {
        source: String,
        target: Option<String>,
    },
    Raw(String),
}

/// A label as it was written, before it is known what the others are.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Label {
    Name(String),
    Int(i64),
    Bool(bool),
    Float(f64),
    /// A table's cell: a name, or a number if all are.
    Cell(String),
    Names(Vec<String>),
    Numbers(Vec<f64>),
}

/// Where an answer stands: in characters, and in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) text: String,
    pub(crate) start: usize,
    pub(crate) end: usize,
}

/// The columns that are read of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Layout {
    Text {
        text: String,
        pair: Option<String>,
        label: Option<String>,
        /// A pair's second column that the first row did not have.
        unused: Option<&'static str>,
    },
    Words {
        words: String,
        tags: Option<String>,
    },
    Question(Answers),
    Target {
        source: String,
        /// What is put behind the source where it is not empty.
        input: Option<&'static str>,
        target: Option<String>,
    },
    Raw {
        text: String,
    },
}

/// Where the answers to a question are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Answers {
    /// In the column `answers`.
    Nested,
    /// In the columns `answer` and `answer_start`.
    Flat,
    /// Not read.
    None,
}

/// The columns of texts: the first, and the second where there is one.
const TEXTS: [(&str, Option<&str>); 6] = [
    ("text", Some("text_pair")),
    ("sentence", None),
    ("sentence1", Some("sentence2")),
    ("premise", Some("hypothesis")),
    ("question1", Some("question2")),
    ("question", Some("answer")),
];
const LABELS: [&str; 2] = ["label", "labels"];
const WORDS: [&str; 2] = ["tokens", "words"];
const TAGS: [&str; 5] = ["tags", "labels", "ner_tags", "pos_tags", "chunk_tags"];
const TARGETS: [(&str, &str); 3] = [
    ("source", "target"),
    ("input", "output"),
    ("prompt", "completion"),
];

impl Layout {
    /// The columns of a task in a file whose first row has these keys; those of labels only if
    /// they are `labelled`.
    pub(crate) fn of(
        task: Task,
        row: &Object,
        columns: &Columns,
        labelled: bool,
    ) -> Result<Layout, String> {
        match task {
            Task::SeqCls => Self::text(row, columns, labelled),
            Task::TokenCls => {
                let tags = || one_of("tags", row, columns.label.as_deref(), &TAGS);
                Ok(Layout::Words {
                    words: one_of("words", row, columns.text.as_deref(), &WORDS)?,
                    tags: labelled.then(tags).transpose()?,
                })
            }
            Task::QuestionAns => Self::question(row, labelled),
            Task::Seq2SeqLm => Self::target(row, columns, labelled),
            Task::MaskedLm => Ok(Layout::Raw {
                text: one_of("text", row, columns.text.as_deref(), &["text", "sentence"])?,
            }),
            Task::CausalLm => Err(format!("{task} has formats of its own")),
        }
    }

    fn text(row: &Object, columns: &Columns, labelled: bool) -> Result<Layout, String> {
        let (text, pair, unused) = match (&columns.text, &columns.pair) {
            (Some(text), pair) => {
                let pair = pair.as_ref().map(|pair| present("pair", row, pair));
                (present("text", row, text)?, pair.transpose()?, None)
            }
            (None, Some(pair)) => {
                return Err(format!(
                    "the second text is to be `{pair}`, but which is the first is not said"
                ));
            }
            (None, None) => {
                let found: Vec<_> = TEXTS
                    .into_iter()
                    .filter(|(text, _)| row.contains_key(*text))
                    .collect();
                let &[(text, pair)] = found.as_slice() else {
                    return Err(choice(
                        "text",
                        row,
                        found.iter().map(|it| it.0),
                        &TEXTS.map(|it| it.0),
                    ));
                };
                let given = pair.filter(|pair| row.contains_key(*pair));
                if given.is_none()
                    && text != "text"
                    && let Some(pair) = pair
                {
                    return Err(format!(
                        "`{text}` without `{pair}`; the keys are {}",
                        quoted(row.keys())
                    ));
                }
                let unused = if given.is_none() { pair } else { None };
                (text.to_owned(), given.map(str::to_owned), unused)
            }
        };
        let label = || one_of("label", row, columns.label.as_deref(), &LABELS);
        let label = labelled.then(label).transpose()?;
        Ok(Layout::Text {
            text,
            pair,
            label,
            unused,
        })
    }

    fn question(row: &Object, labelled: bool) -> Result<Layout, String> {
        for key in ["question", "context"] {
            present(key, row, key)?;
        }
        if !labelled {
            return Ok(Layout::Question(Answers::None));
        }
        let nested = row.contains_key("answers");
        let flat = row.contains_key("answer") || row.contains_key("answer_start");
        match (nested, flat) {
            (true, false) => Ok(Layout::Question(Answers::Nested)),
            (false, true) => {
                present("answer", row, "answer")?;
                present("answer_start", row, "answer_start")?;
                Ok(Layout::Question(Answers::Flat))
            }
            (true, true) => Err("both `answers` and `answer`; one of them must go".into()),
            (false, false) => Err(format!(
                "a question without `answers`, or `answer` and `answer_start`; the keys are {}",
                quoted(row.keys())
            )),
        }
    }

    fn target(row: &Object, columns: &Columns, labelled: bool) -> Result<Layout, String> {
        let of = |source: &str, input, target: &str| {
            present("source", row, source)?;
            if labelled {
                present("target", row, target)?;
            }
            Ok(Layout::Target {
                source: source.to_owned(),
                input,
                target: labelled.then(|| target.to_owned()),
            })
        };
        match (&columns.text, &columns.pair) {
            (Some(source), Some(target)) => return of(source, None, target),
            (Some(source), None) if !labelled => return of(source, None, ""),
            (None, None) => {}
            _ => return Err("source and target must both be named, or neither".into()),
        }
        let has = |key: &str| row.contains_key(key);
        if has("instruction") {
            return of("instruction", Some("input"), "output");
        }
        let found: Vec<_> = TARGETS
            .into_iter()
            .filter(|(source, target)| has(source) && (has(target) || !labelled))
            .collect();
        match found.as_slice() {
            [(source, target)] => of(source, None, target),
            _ => Err(choice(
                "source and target",
                row,
                found.iter().map(|it| it.0),
                &TARGETS.map(|it| it.0),
            )),
        }
    }

    /// A name for reports.
    pub(crate) fn name(&self) -> String {
        let labelled = |inputs: String, label: &Option<String>| match label {
            Some(label) => format!("{inputs} / {label}"),
            None => inputs,
        };
        match self {
            Layout::Text {
                text, pair, label, ..
            } => {
                let inputs = match pair {
                    Some(pair) => format!("{text}, {pair}"),
                    None => text.clone(),
                };
                labelled(inputs, label)
            }
            Layout::Words { words, tags } => labelled(words.clone(), tags),
            Layout::Question(Answers::Nested) => "question, context / answers".into(),
            Layout::Question(Answers::Flat) => "question, context / answer".into(),
            Layout::Question(Answers::None) => "question, context".into(),
            Layout::Target { source, target, .. } => labelled(source.clone(), target),
            Layout::Raw { text } => text.clone(),
        }
    }

    /// Reads one row; what is left of it nothing reads. `table`: all values are text.
    pub(crate) fn read(&self, row: &mut Object, table: bool) -> Result<Said, String> {
        match self {
            Layout::Text {
                text,
                pair,
                label,
                unused,
            } => {
                if let Some(unused) = unused.filter(|unused| row.contains_key(*unused)) {
                    return Err(format!("`{unused}`, which the first row has not"));
                }
                Ok(Said::Text {
                    text: full(row, text)?,
                    pair: pair.as_ref().map(|pair| full(row, pair)).transpose()?,
                    label: label
                        .as_ref()
                        .map(|label| label_of(row, label, table))
                        .transpose()?,
                })
            }
            Layout::Words { words, tags } => self::words(row, words, tags.as_deref(), table),
            Layout::Question(answers) => question(row, *answers, table),
            Layout::Target {
                source,
                input,
                target,
            } => {
                let mut text = full(row, source)?;
                if let Some(input) = input.filter(|input| row.contains_key(*input)) {
                    let input = match row.get(input) {
                        Some(Value::Null) => String::new(),
                        _ => string(row, input)?,
                    };
                    if !input.is_empty() {
                        text = format!("{text}\n\n{input}");
                    }
                }
                if let Some(input) = input {
                    row.shift_remove(*input);
                }
                Ok(Said::Target {
                    source: text,
                    target: target
                        .as_ref()
                        .map(|target| full(row, target))
                        .transpose()?,
                })
            }
            Layout::Raw { text } => Ok(Said::Raw(full(row, text)?)),
        }
    }
}

/// The one key of `known` that a row has, or the one that is `given`.
fn one_of(what: &str, row: &Object, given: Option<&str>, known: &[&str]) -> Result<String, String> {
    if let Some(given) = given {
        return present(what, row, given);
    }
    let found: Vec<&str> = known
        .iter()
        .copied()
        .filter(|key| row.contains_key(*key))
        .collect();
    match found.as_slice() {
        [key] => Ok((*key).to_owned()),
        _ => Err(choice(what, row, found.iter().copied(), known)),
    }
}

/// Why no one column could be chosen.
fn choice<'a>(
    what: &str,
    row: &Object,
    found: impl Iterator<Item = &'a str>,
    known: &[&str],
) -> String {
    let found: Vec<&str> = found.collect();
    if found.len() > 1 {
        return format!(
            "the {what} could be any of {}; say which column it is",
            quoted(found)
        );
    }
    let mut text = format!(
        "no column for the {what}: the keys are {}, expected one of {}",
        quoted(row.keys()),
        quoted(known)
    );
    let joined = |it: &String| it.contains([';', '\t', '|']);
    if row.len() == 1 && row.keys().any(joined) {
        text.push_str("; cells have commas between them in .csv, tabs in .tsv");
        return text;
    }
    for wanted in known {
        if let Some(near) = nearest(wanted, row.keys().map(String::as_str)) {
            text.push_str(&format!("; did `{near}` mean `{wanted}`?"));
            break;
        }
    }
    text
}

fn present(what: &str, row: &Object, key: &str) -> Result<String, String> {
    if row.contains_key(key) {
        return Ok(key.to_owned());
    }
    Err(missing(what, key, row))
}

fn missing(what: &str, key: &str, row: &Object) -> String {
    let mut text = format!(
        "no {what}: `{key}` is missing, the keys are {}",
        quoted(row.keys())
    );
    if let Some(near) = nearest(key, row.keys().map(String::as_str)) {
        text.push_str(&format!("; did `{near}` mean `{key}`?"));
    }
    text
}

/// What the rows before have and this one has not; of its keys those are left that were not read.
fn lacking(what: &str, key: &str, row: &Object) -> String {
    let mut text = format!("no {what}: `{key}` is missing in this row");
    if let Some(near) = nearest(key, row.keys().map(String::as_str)) {
        text.push_str(&format!("; did `{near}` mean `{key}`?"));
    }
    text
}

fn string(row: &mut Object, key: &str) -> Result<String, String> {
    match row.shift_remove(key) {
        Some(Value::String(text)) => Ok(text),
        Some(other) => Err(format!("`{key}` must be a string, not {}", kind(&other))),
        None => Err(lacking("text", key, row)),
    }
}

/// A string with something in it.
fn full(row: &mut Object, key: &str) -> Result<String, String> {
    let text = string(row, key)?;
    if text.trim().is_empty() {
        return Err(format!("`{key}` is empty"));
    }
    Ok(text)
}

fn label_of(row: &mut Object, key: &str, table: bool) -> Result<Label, String> {
    match row.shift_remove(key) {
        None => Err(lacking("label", key, row)),
        Some(Value::Null) => Err(format!("`{key}` is null, a text without a label")),
        Some(Value::String(cell)) if table && key == "labels" => Ok(Label::Names(several(&cell))),
        Some(Value::String(cell)) if table => match cell.is_empty() {
            true => Err(format!("`{key}` is empty, a text without a label")),
            false => Ok(Label::Cell(cell)),
        },
        Some(Value::Array(list)) => list_label(key, &list),
        Some(value) => one(&value).ok_or_else(|| unfit(key, &value)),
    }
}

/// The labels of one cell, with `|` between them; an empty cell has none.
pub(crate) fn several(cell: &str) -> Vec<String> {
    let parts = cell.split('|').map(str::trim);
    parts
        .filter(|part| !part.is_empty())
        .map(str::to_owned)
        .collect()
}

/// A label that is one value.
fn one(value: &Value) -> Option<Label> {
    match value {
        Value::String(name) if !name.is_empty() => Some(Label::Name(name.clone())),
        Value::Bool(flag) => Some(Label::Bool(*flag)),
        Value::Number(number) => match number.as_i64() {
            Some(number) => Some(Label::Int(number)),
            None => number
                .as_f64()
                .filter(|number| number.is_finite())
                .map(Label::Float),
        },
        _ => None,
    }
}

fn unfit(key: &str, value: &Value) -> String {
    match value {
        Value::String(_) => format!("`{key}` is empty, a text without a label"),
        other => format!(
            "`{key}` must be a string, a number, a boolean or a list, not {}",
            kind(other)
        ),
    }
}

fn list_label(key: &str, list: &[Value]) -> Result<Label, String> {
    let names: Option<Vec<String>> = list
        .iter()
        .map(|item| item.as_str().filter(|name| !name.is_empty()))
        .map(|name| name.map(str::to_owned))
        .collect();
    if let Some(names) = names {
        return Ok(Label::Names(names));
    }
    let numbers: Option<Vec<f64>> = list
        .iter()
        .map(|item| match item {
            Value::Bool(flag) => Some(f64::from(u8::from(*flag))),
            other => other.as_f64().filter(|number| number.is_finite()),
        })
        .collect();
    numbers.map(Label::Numbers).ok_or_else(|| {
        let sorts: Vec<&str> = list.iter().map(kind).collect();
        format!(
            "`{key}` must be a list of names, or of 0 and 1, not of {}",
            sorts.join(", ")
        )
    })
}

fn words(row: &mut Object, words: &str, tags: Option<&str>, table: bool) -> Result<Said, String> {
    let mut list = |key: &str, what: &str| match row.shift_remove(key) {
        Some(Value::Array(list)) => Ok(list),
        Some(Value::String(cell)) if table => Ok(cell
            .split_whitespace()
            .map(|part| Value::String(part.to_owned()))
            .collect()),
        Some(Value::Null) => Err(format!("`{key}` is null, expected a list")),
        Some(other) => Err(format!("`{key}` must be a list, not {}", kind(&other))),
        None => Err(lacking(what, key, row)),
    };
    let words_of = list(words, "words")?;
    if words_of.is_empty() {
        return Err(format!("`{words}` is empty"));
    }
    let tags_of = match tags {
        Some(tags) => list(tags, "tags")?,
        None => Vec::new(),
    };
    let tags = tags.unwrap_or_default();
    if !tags.is_empty() && words_of.len() != tags_of.len() {
        return Err(format!(
            "`{words}` has {} items and `{tags}` has {}; each word needs a tag",
            words_of.len(),
            tags_of.len()
        ));
    }
    let read_word = |(at, value): (usize, &Value)| match value {
        Value::String(word) if !word.trim().is_empty() => Ok(word.clone()),
        Value::String(_) => Err(format!("`{words}`[{at}] is empty")),
        other => Err(format!(
            "`{words}`[{at}] must be a string, not {}",
            kind(other)
        )),
    };
    let read_tag = |(at, value): (usize, &Value)| match one(value) {
        Some(Label::Name(cell)) if table => Ok(Label::Cell(cell)),
        Some(Label::Int(number)) if number < 0 => Err(format!(
            "`{tags}`[{at}] is {number}: classes are counted from 0, and each word has one"
        )),
        Some(tag @ (Label::Name(_) | Label::Int(_))) => Ok(tag),
        _ => Err(format!(
            "`{tags}`[{at}] must be a name or an integer, not {value}"
        )),
    };
    let words_of = words_of.iter().enumerate().map(read_word);
    let tags_of = tags_of.iter().enumerate().map(read_tag);
    Ok(Said::Words {
        words: words_of.collect::<Result<_, _>>()?,
        tags: tags_of.collect::<Result<_, _>>()?,
    })
}

fn question(row: &mut Object, answers: Answers, table: bool) -> Result<Said, String> {
    let question = full(row, "question")?;
    let context = full(row, "context")?;
    let pairs = match answers {
        Answers::None => Vec::new(),
        Answers::Nested => nested(row.shift_remove("answers"))?,
        Answers::Flat => {
            let answer = string(row, "answer")?;
            let start = match row.shift_remove("answer_start") {
                Some(Value::String(cell)) if table && cell.trim().is_empty() => Value::Null,
                Some(Value::String(cell)) if table => match cell.trim().parse::<u64>() {
                    Ok(start) => start.into(),
                    Err(_) => Value::String(cell),
                },
                other => other.unwrap_or_default(),
            };
            match (answer.is_empty(), &start) {
                (true, Value::Null) => Vec::new(),
                _ => vec![(Value::String(answer), start)],
            }
        }
    };
    let answers = pairs
        .into_iter()
        .map(|(text, start)| answer(&context, &text, &start));
    let answers = answers.collect::<Result<_, _>>()?;
    Ok(Said::Question {
        question,
        context,
        answers,
    })
}

/// The texts and starts of `answers`: two lists, or a list of pairs.
fn nested(value: Option<Value>) -> Result<Vec<(Value, Value)>, String> {
    let pair = |item: &Value| (item.get("text").cloned(), item.get("answer_start").cloned());
    match value {
        Some(Value::Array(items)) => items
            .iter()
            .map(|item| match pair(item) {
                (Some(text), Some(start)) => Ok((text, start)),
                _ => Err("an item of `answers` needs `text` and `answer_start`".to_owned()),
            })
            .collect(),
        Some(object @ Value::Object(_)) => match pair(&object) {
            (Some(Value::Array(texts)), Some(Value::Array(starts))) => {
                if texts.len() != starts.len() {
                    return Err(format!(
                        "`answers` has {} texts and {} starts",
                        texts.len(),
                        starts.len()
                    ));
                }
                Ok(texts.into_iter().zip(starts).collect())
            }
            _ => Err("`answers` needs the lists `text` and `answer_start`".into()),
        },
        Some(other) => Err(format!(
            "`answers` must be an object with the lists `text` and `answer_start`, not {}",
            kind(&other)
        )),
        None => Err("no answer: `answers` is missing".into()),
    }
}

/// Finds an answer at its place, counted in characters.
fn answer(context: &str, text: &Value, start: &Value) -> Result<Answer, String> {
    let Value::String(text) = text else {
        return Err(format!("an answer must be a string, not {}", kind(text)));
    };
    let Some(at) = start.as_u64().and_then(|at| usize::try_from(at).ok()) else {
        return Err(format!(
            "`answer_start` must be a count of characters, not {start}"
        ));
    };
    if text.trim().is_empty() {
        return Err("an answer is empty; a question without an answer has empty lists".into());
    }
    let byte = context.char_indices().map(|(byte, _)| byte).nth(at);
    if let Some(start) = byte
        && context[start..].starts_with(text.as_str())
    {
        let end = start + text.len();
        return Ok(Answer {
            text: text.clone(),
            start,
            end,
        });
    }
    let there = match byte {
        Some(byte) => {
            let stands: String = context[byte..].chars().take(text.chars().count()).collect();
            format!("`{stands}` stands there")
        }
        None => format!("the context has {} characters", context.chars().count()),
    };
    let places = context.match_indices(text.as_str());
    let places = places.map(|(byte, _)| context[..byte].chars().count());
    let hint = match places.min_by_key(|place| place.abs_diff(at)) {
        Some(place) => format!("; the answer is at {place}"),
        None => "; the answer is nowhere in the context".into(),
    };
    Err(format!(
        "answer_start {at} does not point at the answer `{text}`: {there}{hint}"
    ))
}
