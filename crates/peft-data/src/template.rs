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

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, ValueKind};
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
        env.add_filter("trim", python::trim);
        env.add_filter("indent", python::indent);
        env.add_filter("string", python::text);
        env.add_test("sequence", is_sequence);
        env.add_test("iterable", is_iterable);
        env.add_test("number", |it: &Value| {
            is_integer(it) || is_float(it) || is_bool(it)
        });
        env.add_test("integer", is_integer);
        env.add_test("float", is_float);
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

/// The local time in Python's `strftime` format: microseconds, and no zone, which `datetime.now()` has not.
fn strftime_now(format: &str) -> Result<String, minijinja::Error> {
    let mut pythons = String::new();
    let mut rest = format;
    while let Some(at) = rest.find('%') {
        pythons.push_str(&rest[..at]);
        let (directive, after) = match rest[at..].char_indices().nth(2) {
            Some((end, _)) => rest[at..].split_at(end),
            None => (&rest[at..], ""),
        };
        pythons.push_str(match directive {
            "%f" => "%6f",
            "%Z" | "%z" => "",
            other => other,
        });
        rest = after;
    }
    pythons.push_str(rest);
    let items = chrono::format::StrftimeItems::new(&pythons)
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

/// Python's strings and dictionaries have a length and items, so Jinja2 calls them sequences too; what is not defined
/// has both as well.
fn is_sequence(value: &Value) -> bool {
    use ValueKind::{Map, Seq, String, Undefined};
    matches!(value.kind(), Seq | String | Map | Undefined)
}

/// minijinja goes through `none` as well, Python does not.
fn is_iterable(value: &Value) -> bool {
    is_sequence(value) || value.kind() == ValueKind::Iterable
}

fn is_bool(value: &Value) -> bool {
    value.kind() == ValueKind::Bool
}

/// In Jinja2 `true` is a number and no integer.
fn is_integer(value: &Value) -> bool {
    value.kind() == ValueKind::Number && value.is_integer()
}

fn is_float(value: &Value) -> bool {
    value.kind() == ValueKind::Number && !value.is_integer()
}

/// Python's methods on strings, lists and dictionaries: the usual set, and what it lacks.
fn methods(
    state: &mut State,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, minijinja::Error> {
    if let (Some(text), []) = (value.as_str(), args) {
        match method {
            "strip" => return Ok(text.trim_matches(python::is_space).into()),
            "lstrip" => return Ok(text.trim_start_matches(python::is_space).into()),
            "rstrip" => return Ok(text.trim_end_matches(python::is_space).into()),
            "split" => {
                let parts = text.split(python::is_space).filter(|it| !it.is_empty());
                return Ok(parts.map(Value::from).collect());
            }
            _ => {}
        }
    }
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
    let tags = tags(source);
    let filled: BTreeSet<&str> = tags
        .iter()
        .filter_map(|tag| filled_namespace(tag))
        .collect();
    let mut found = false;
    let rewritten = tags.iter().map(|tag| match generation_tag(tag, &filled) {
        Some(replacement) => {
            found = true;
            replacement
        }
        None => (*tag).to_owned(),
    });
    (rewritten.collect(), found)
}

/// Tags, expressions, comments, and the text between them.
fn tags(source: &str) -> Vec<&str> {
    let (mut all, mut rest) = (Vec::new(), source);
    while let Some(at) = rest.find('{') {
        let (text, tag) = rest.split_at(at);
        let end = match tag.as_bytes().get(1) {
            Some(b'#') => tag.find("#}").map(|end| end + 2),
            Some(b'%') if is_raw(tag) => raw_end(tag),
            Some(b'%') => code_end(tag, "%}"),
            Some(b'{') => code_end(tag, "}}"),
            _ => Some(1),
        };
        let (tag, after) = tag.split_at(end.unwrap_or(tag.len()));
        all.extend([text, tag]);
        rest = after;
    }
    all.push(rest);
    all
}

/// `name` of `{% set name.attribute = … %}`.
fn filled_namespace(tag: &str) -> Option<&str> {
    let inner = tag.strip_prefix("{%")?.trim_start_matches(['-', '+']);
    let target = inner.trim_start().strip_prefix("set")?;
    let (name, _) = target.split_once('.')?;
    let is_name = |it: &str| it.chars().all(|c| c.is_alphanumeric() || c == '_');
    let name = name.strip_prefix(char::is_whitespace)?.trim();
    (!name.is_empty() && is_name(name)).then_some(name)
}

/// `{%- generation -%}` as `{%- call __generation__() -%}`, its end likewise.
///
/// A call sees those variables of the outside that its body names, and to minijinja `{% set a.b = 1 %}` does not name `a`;
/// so those in `filled` are named where they cost nothing.
fn generation_tag(tag: &str, filled: &BTreeSet<&str>) -> Option<String> {
    let inner = tag.strip_prefix("{%")?.strip_suffix("%}")?;
    let word = inner.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
    let code = match word {
        "generation" => "call __generation__()",
        "endgeneration" => "endcall",
        _ => return None,
    };
    let inner = inner.replacen(word, code, 1);
    if word == "endgeneration" || filled.is_empty() {
        return Some(format!("{{%{inner}%}}"));
    }
    let names: String = filled
        .iter()
        .map(|name| format!("{{{{ {name} }}}}"))
        .collect();
    let close = &inner[inner.trim_end_matches(['-', '+']).len()..];
    Some(format!(
        "{{%{inner}%}}{{% if false %}}{names}{{% endif {close}%}}"
    ))
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
    fn generation_fills_a_namespace_of_the_outside() {
        let source = "{% set ns = namespace(x=0) %}{% for m in messages %}\n  {%- generation -%}\n {{ m.content }}{% set ns.x = ns.x + 1 %}\n{% endgeneration -%} \n{% endfor %}{{ ns.x }}";
        let messages = [Message::user("a"), Message::assistant("b")];
        let (text, spans) = compile(source)
            .render_spans(&messages, &RenderOptions::default())
            .unwrap();
        assert_eq!((text.as_str(), spans), ("ab2", vec![0..1, 1..2]));
    }

    /// What Jinja2 3.1 says.
    #[test]
    fn kinds_of_values() {
        for (value, kinds) in [
            ("none", ""),
            ("not_there", "iterable sequence"),
            ("1", "number integer"),
            ("1.0", "number float"),
            ("true", "number"),
            ("'a'", "iterable sequence string"),
            ("[]", "iterable sequence"),
            ("{}", "iterable sequence mapping"),
        ] {
            let all = [
                "iterable", "sequence", "number", "integer", "float", "string", "mapping",
            ];
            let source: String = all
                .map(|kind| format!("{{{{ '{kind} ' if {value} is {kind} }}}}"))
                .concat();
            let said = compile(&source).render_values(BTreeMap::new()).unwrap();
            assert_eq!(said.trim_end(), kinds, "{value}");
        }
    }

    #[test]
    fn containers_as_python_prints_them() {
        check(
            r#"{{ [1, 2.5, 1e20, "a'b", 'c"\'', "x\u00a0\u200b\ufeff\u2028\n\té", true, none, {"k": 0.1}, (1,), (1, 2.0)] }}"#,
            r#"[1, 2.5, 1e+20, "a'b", 'c"\'', 'x\xa0\u200b\ufeff\u2028\n\té', True, None, {'k': 0.1}, (1,), (1, 2.0)]"#,
        );
        check("{{ [0.5] | string ~ 'x' }}", "[0.5]x");
        check(
            "{{ 'a\n\nb\n' | indent(2, true) }}|{{ 'a\n\nb' | indent(width=1, blank=true) }}|{{ 'a\nb' | indent('> ') }}",
            "  a\n\n  b\n|a\n \n b|a\n> b",
        );
        let now = compile("{{ strftime_now('%Z%z|%f|%%f') }}")
            .render_values(BTreeMap::new())
            .unwrap();
        assert!(
            now.starts_with('|') && now.ends_with("|%f") && now.len() == 10,
            "{now}"
        );
        check(
            "{{ '\u{1f} a\u{1c}' | trim }}|{{ '\u{1d} b '.strip() }}|{{ ' a\u{1e}b '.split() }}|{{ 'xxaxx' | trim('x') }}|{{ 5 | trim }}",
            "a|b|['a', 'b']|a|5",
        );
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
