//! Chat templates: Jinja programs that turn a conversation into the text a model was trained on.
//!
//! A template is part of a model's weights in all but name: one blank too many
//! and the model is out of its depth. So the test of this file is equality
//! with Python, byte for byte, over every idiom that the common families use.
//! `minijinja` is the engine; around it stand the things that Hugging Face
//! adds to Jinja2: `trim_blocks` and `lstrip_blocks`, loop controls,
//! `raise_exception`, `strftime_now`, a `tojson` that is plain `json.dumps`,
//! and the tag `{% generation %}`, by which a template says itself which part
//! the assistant wrote.
//!
//! That tag is the one that needs thought. Jinja2 lets a host add tags,
//! minijinja does not, so it is rewritten before compiling into a call block,
//! which is what Hugging Face's own extension compiles to: same scoping, same
//! whitespace rules. While spans are wanted the call puts a mark before and
//! after its body, and the marks are taken out again.

use std::collections::BTreeMap;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Kwargs;
use minijinja::{Environment, ErrorKind, State, Value};
use serde_json::{Map, Value as Json};

use crate::error::{Error, Result};
use crate::message::Message;
use crate::python::{self, from_json};

/// A compiled chat template with the special tokens it may name.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    env: Environment<'static>,
    source: String,
    marks_generation: bool,
}

const NAME: &str = "chat_template";
/// Steps one rendering may take, so that a hostile template ends too.
const FUEL: u64 = 50_000_000;
/// The name under which a render that wants spans passes its mark.
const MARK: &str = "__generation_mark__";

impl ChatTemplate {
    /// Compiles `source`; `special` holds `bos_token`, `eos_token` and so on.
    pub fn compile(source: &str, special: &BTreeMap<String, String>) -> Result<Self> {
        let (rewritten, marks_generation) = rewrite_generation(source);
        let mut env = Environment::new();
        env.set_syntax(
            SyntaxConfig::builder()
                .trim_blocks(true)
                .lstrip_blocks(true)
                .build()
                .map_err(|error| Error::Template(describe(&error)))?,
        );
        env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        env.set_unknown_method_callback(methods);
        env.set_formatter(python::print);
        env.set_fuel(Some(FUEL));
        env.add_filter("tojson", python::tojson);
        env.add_function("raise_exception", raise_exception);
        env.add_function("strftime_now", strftime_now);
        env.add_function("__generation__", generation);
        env.add_test("sequence", is_sequence);
        for (name, token) in special {
            env.add_global(name.clone(), token.clone());
        }
        env.add_template_owned(NAME, rewritten)
            .map_err(|error| Error::Template(describe(&error)))?;
        Ok(Self {
            env,
            source: source.to_owned(),
            marks_generation,
        })
    }

    /// The template as it was given.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Whether the template marks the assistant's part by `{% generation %}`.
    pub fn marks_generation(&self) -> bool {
        self.marks_generation
    }

    /// Whether what it renders may depend on the day.
    pub fn reads_clock(&self) -> bool {
        self.source.contains("strftime_now")
    }

    /// The text of a conversation, which need not end with a reply.
    pub fn render(&self, messages: &[Message], options: &RenderOptions) -> Result<String> {
        let seen = messages.iter().map(Message::to_template).collect();
        self.render_values(variables(seen, options, options.add_generation_prompt))
    }

    /// The text of a conversation, and the byte ranges of it inside `{% generation %}`.
    pub fn render_spans(
        &self,
        messages: &[Message],
        options: &RenderOptions,
    ) -> Result<(String, Vec<Range<usize>>)> {
        let mut mark = String::from("\u{fdd0}");
        while messages.iter().any(|message| message.mentions(&mark)) {
            mark.push('\u{fdd1}');
        }
        let seen = messages.iter().map(Message::to_template).collect();
        let mut variables = variables(seen, options, options.add_generation_prompt);
        variables.insert(MARK.into(), Value::from(mark.as_str()));
        Ok(take_marks(&self.render_values(variables)?, &mark))
    }

    /// Renders with the variables that the template sees.
    pub(crate) fn render_values(&self, variables: BTreeMap<String, Value>) -> Result<String> {
        let render = || {
            let template = self.env.get_template(NAME)?;
            template.render(Value::from_pairs(variables))
        };
        // minijinja 3.0 panics where a template reverses an empty list or string.
        match catch_unwind(AssertUnwindSafe(render)) {
            Ok(rendered) => rendered.map_err(|error| Error::Template(describe(&error))),
            Err(_) => Err(Error::Template(
                "the template engine broke down over this conversation".into(),
            )),
        }
    }
}

/// What [`ChatTemplate::render`] passes to the template besides the messages.
#[derive(Debug, Clone, Default)]
pub struct RenderOptions {
    /// End with the header of a reply, for the model to go on from.
    pub add_generation_prompt: bool,
    /// JSON schemas of the tools that the model may call: a list.
    pub tools: Option<Json>,
    /// Documents to answer from: a list of objects.
    pub documents: Option<Json>,
    /// Further variables, such as `enable_thinking`.
    pub variables: Map<String, Json>,
}

/// What a template sees.
pub(crate) fn variables(
    messages: Vec<Value>,
    options: &RenderOptions,
    add_generation_prompt: bool,
) -> BTreeMap<String, Value> {
    let json = |value: &Option<Json>| value.as_ref().map_or(Value::from(()), from_json);
    let mut all = BTreeMap::from([
        ("messages".to_owned(), Value::from(messages)),
        ("tools".to_owned(), json(&options.tools)),
        ("documents".to_owned(), json(&options.documents)),
        (
            "add_generation_prompt".to_owned(),
            Value::from(add_generation_prompt),
        ),
    ]);
    for (name, value) in &options.variables {
        all.insert(name.clone(), from_json(value));
    }
    all
}

/// Splits text that alternates outside, inside, outside, … at `mark`.
fn take_marks(marked: &str, mark: &str) -> (String, Vec<Range<usize>>) {
    let mut text = String::with_capacity(marked.len());
    let mut spans = Vec::new();
    for (at, part) in marked.split(mark).enumerate() {
        let start = text.len();
        text.push_str(part);
        if at % 2 == 1 && !part.is_empty() {
            spans.push(start..text.len());
        }
    }
    (text, spans)
}

/// The body of `{% generation %}`, between marks where spans are wanted.
fn generation(state: &mut State, kwargs: Kwargs) -> Result<String, minijinja::Error> {
    let body = kwargs.get::<Value>("caller")?.call(state, &[])?.to_string();
    Ok(
        match state.lookup(MARK).filter(|mark| mark.as_str().is_some()) {
            Some(mark) => format!("{mark}{body}{mark}"),
            None => body,
        },
    )
}

fn raise_exception(message: String) -> Result<String, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
}

/// The local time in Python's `strftime` format.
fn strftime_now(format: &str) -> Result<String, minijinja::Error> {
    let items = chrono::format::StrftimeItems::new(format)
        .parse()
        .map_err(|_| {
            minijinja::Error::new(
                ErrorKind::InvalidOperation,
                format!("strftime_now does not know the format {format:?}"),
            )
        })?;
    Ok(chrono::Local::now()
        .format_with_items(items.iter())
        .to_string())
}

/// Python's strings and dictionaries have a length and items, so Jinja2 calls them sequences too.
fn is_sequence(value: &Value) -> bool {
    use minijinja::value::ValueKind as Kind;
    matches!(value.kind(), Kind::Seq | Kind::String | Kind::Map)
}

/// Python's methods on strings, lists and dictionaries: the usual set, and what it lacks.
fn methods(
    state: &mut State,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, minijinja::Error> {
    let first = args.first().and_then(|arg| arg.as_str());
    if let (Some(text), Some(arg)) = (value.as_str(), first.filter(|arg| !arg.is_empty())) {
        let list = |parts: &[&str]| parts.iter().map(|part| Value::from(*part)).collect();
        match method {
            "removeprefix" => return Ok(text.strip_prefix(arg).unwrap_or(text).into()),
            "removesuffix" => return Ok(text.strip_suffix(arg).unwrap_or(text).into()),
            "partition" => {
                return Ok(match text.split_once(arg) {
                    Some((before, after)) => list(&[before, arg, after]),
                    None => list(&[text, "", ""]),
                });
            }
            "rpartition" => {
                return Ok(match text.rsplit_once(arg) {
                    Some((before, after)) => list(&[before, arg, after]),
                    None => list(&["", "", text]),
                });
            }
            "rsplit" => {
                let most = args.get(1).and_then(|n| usize::try_from(n.clone()).ok());
                let mut parts: Vec<&str> = match most {
                    Some(most) => text.rsplitn(most.saturating_add(1), arg).collect(),
                    None => text.rsplit(arg).collect(),
                };
                parts.reverse();
                return Ok(list(&parts));
            }
            _ => {}
        }
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args)
}

/// What went wrong, with the template's line where it is known.
fn describe(error: &minijinja::Error) -> String {
    let mut text = match error.line() {
        Some(line) => format!("line {line}: "),
        None => String::new(),
    };
    match error.detail() {
        Some(detail) => text.push_str(detail),
        None => text.push_str(&error.kind().to_string()),
    }
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

/// Turns `{% generation %}` into a call block; says whether there was one.
///
/// Walks the template as Jinja's lexer does, so that the word in a comment, in
/// a string or in a raw block stays what it is.
fn rewrite_generation(source: &str) -> (String, bool) {
    let mut out = String::with_capacity(source.len());
    let mut found = false;
    let mut rest = source;
    while let Some(at) = rest.find('{') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let end = match rest.as_bytes().get(1) {
            Some(b'#') => rest.find("#}").map(|end| end + 2),
            Some(b'%') if is_raw(rest) => raw_end(rest),
            Some(b'%') => code_end(rest, "%}"),
            Some(b'{') => code_end(rest, "}}"),
            _ => Some(1),
        };
        let (tag, after) = rest.split_at(end.unwrap_or(rest.len()));
        match generation_tag(tag) {
            Some(replacement) => {
                found = true;
                out.push_str(&replacement);
            }
            None => out.push_str(tag),
        }
        rest = after;
    }
    out.push_str(rest);
    (out, found)
}

/// `{%- generation -%}` as `{%- call __generation__() -%}`, its end likewise.
fn generation_tag(tag: &str) -> Option<String> {
    let inner = tag.strip_prefix("{%")?.strip_suffix("%}")?;
    let word = inner.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
    let code = match word {
        "generation" => "call __generation__()",
        "endgeneration" => "endcall",
        _ => return None,
    };
    Some(format!("{{%{}%}}", inner.replacen(word, code, 1)))
}

fn is_raw(tag: &str) -> bool {
    let inner = tag[2..].trim_start_matches(['-', '+']).trim_start();
    inner.strip_prefix("raw").is_some_and(|rest| {
        rest.trim_start()
            .trim_start_matches(['-', '+'])
            .starts_with("%}")
    })
}

/// Where the raw block that starts here ends.
fn raw_end(text: &str) -> Option<usize> {
    let word = text.find("endraw")?;
    Some(word + text[word..].find("%}")? + 2)
}

/// Where the tag that starts here ends: the first `close` outside a string.
fn code_end(text: &str, close: &str) -> Option<usize> {
    let bytes = text.as_bytes();
    let mut at = 2;
    while at < bytes.len() {
        match bytes[at] {
            quote @ (b'"' | b'\'') => {
                at += 1;
                while at < bytes.len() && bytes[at] != quote {
                    at += if bytes[at] == b'\\' { 2 } else { 1 };
                }
                at += 1;
            }
            _ if bytes[at..].starts_with(close.as_bytes()) => return Some(at + close.len()),
            _ => at += 1,
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compile(source: &str) -> ChatTemplate {
        ChatTemplate::compile(source, &BTreeMap::new()).unwrap()
    }

    fn check(source: &str, expected: &str) {
        let rendered = compile(source).render_values(BTreeMap::new()).unwrap();
        assert_eq!(rendered, expected, "{source}");
    }

    #[test]
    fn the_word_generation_elsewhere_is_left_alone() {
        check("{# {% generation %} #}a", "a");
        check("{% raw %}{% generation %}{% endraw %}", "{% generation %}");
        check("{{ '{% generation %}' }}", "{% generation %}");
        check("{ {%- generation -%} x {%- endgeneration -%} }", "{x}");
    }

    #[test]
    fn generation_spans_see_the_loop() {
        let source = "{% for m in messages %}\n{% if loop.last %}{% generation %}{{ m.content }}{{ loop.index }}{% endgeneration %}{% else %}é{% endif %}\n{% endfor %}";
        let messages = [Message::user("a"), Message::assistant("\u{fdd0}")];
        let rendered = compile(source).render_spans(&messages, &RenderOptions::default());
        assert_eq!(rendered.unwrap(), ("é\u{fdd0}2".to_owned(), vec![2..6]));
    }

    #[test]
    fn python_methods() {
        check("{{ 'a.b.c'.rsplit('.', 1) | join('|') }}", "a.b|c");
        check("{{ 'abc'.removeprefix('a').removesuffix('x') }}", "bc");
        check("{{ 'k=v'.partition('=')[2] }}", "v");
        check(
            "{{ [1, 2] + [3] }} {{ none }} {{ true }}",
            "[1, 2, 3] None True",
        );
        check(
            "{{ {'a': \"<é>\", 'b': [1.0, none]} | tojson }}",
            r#"{"a": "<é>", "b": [1.0, null]}"#,
        );
        check(
            "{{ 'abc' is sequence }} {{ 'abc' is iterable }}",
            "True True",
        );
    }

    #[test]
    fn errors_say_the_line() {
        let error = compile("\n{{ raise_exception('no system') }}")
            .render_values(BTreeMap::new())
            .unwrap_err();
        assert_eq!(error.to_string(), "chat template: line 2: no system");
        let endless =
            "{% for a in range(9999) %}{% for b in range(9999) %}{{ a }}{% endfor %}{% endfor %}";
        assert!(compile(endless).render_values(BTreeMap::new()).is_err());
    }
}
