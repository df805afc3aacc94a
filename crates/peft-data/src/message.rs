//! One turn of a conversation, as chat templates see it.
//!
//! Nearly every turn is a role and a text, and the Rust side wants just that.
//! Templates may look at more (`tool_calls`, `name`, `reasoning_content`,
//! content in parts), so whatever else a row carries is kept as JSON and handed
//! on untouched.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::python::from_json;

/// A turn of a conversation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Value", into = "Value")]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant`, `tool`, …
    pub role: String,
    /// What they say. Empty where the content is not a string, or an empty one beside `tool_calls`: then the raw
    /// value is under `content` in [`Message::extra`], and templates see that.
    pub content: String,
    /// Every other key.
    pub extra: Map<String, Value>,
}

/// The names under which a turn's reasoning is passed; templates read the first.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

impl Message {
    /// A turn that is only text.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self {
            role: role.into(),
            content: content.into(),
            extra: Map::new(),
        }
    }

    /// A turn of the user.
    pub fn user(content: impl Into<String>) -> Self {
        Self::new("user", content)
    }

    /// A turn of the assistant.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self::new("assistant", content)
    }

    /// A system prompt.
    pub fn system(content: impl Into<String>) -> Self {
        Self::new("system", content)
    }

    /// Whether the model is to learn to say this.
    pub fn is_assistant(&self) -> bool {
        matches!(self.role.as_str(), "assistant" | "model")
    }

    /// Reads a turn from a row; the error says what is missing.
    pub(crate) fn from_json(value: Value) -> Result<Self, String> {
        let Value::Object(mut extra) = value else {
            return Err(format!("a message must be an object, not {}", kind(&value)));
        };
        let role = match extra.shift_remove("role") {
            Some(Value::String(role)) => role,
            Some(other) => return Err(format!("`role` must be a string, not {}", kind(&other))),
            None => return Err(missing("role", &extra)),
        };
        let calls = extra.contains_key("tool_calls");
        let content = match extra.get_mut("content") {
            Some(Value::String(content)) if content.is_empty() && calls => String::new(),
            Some(Value::String(content)) => {
                let content = std::mem::take(content);
                extra.shift_remove("content");
                content
            }
            Some(Value::Null | Value::Array(_)) => String::new(),
            Some(other) => {
                return Err(format!(
                    "`content` must be a string or a list of parts, not {}",
                    kind(other)
                ));
            }
            None if calls => String::new(),
            None => return Err(missing("content", &extra)),
        };
        Ok(Self {
            role,
            content,
            extra,
        })
    }

    /// The dictionary that a template sees: without nulls, reasoning under its usual names.
    pub(crate) fn to_template(&self) -> minijinja::Value {
        let mut seen: Vec<(String, minijinja::Value)> = vec![("role".into(), (&self.role).into())];
        if !self.extra.contains_key("content") && !self.lacks_content() {
            seen.push(("content".into(), (&self.content).into()));
        }
        for (key, value) in self.extra.iter().filter(|(_, value)| !value.is_null()) {
            seen.push((key.clone(), from_json(value)));
        }
        let reasoning = REASONING
            .iter()
            .find_map(|name| self.extra.get(*name).filter(|value| !value.is_null()));
        if let Some(reasoning) = reasoning {
            let reasoning = from_json(reasoning);
            if self.extra.get("thinking").is_none_or(Value::is_null) {
                seen.insert(0, ("thinking".into(), reasoning.clone()));
            }
            seen.retain(|(key, _)| key != REASONING[0]);
            seen.push((REASONING[0].into(), reasoning));
        }
        minijinja::Value::from_pairs(seen)
    }

    /// Whether `text` occurs anywhere in it.
    pub(crate) fn mentions(&self, text: &str) -> bool {
        let values = || self.extra.values().map(Value::to_string);
        self.content.contains(text) || values().any(|value| value.contains(text))
    }

    /// A call of tools without a word: the key `content` was not in the row.
    fn lacks_content(&self) -> bool {
        self.content.is_empty() && self.extra.contains_key("tool_calls")
    }
}

impl TryFrom<Value> for Message {
    type Error = String;

    fn try_from(value: Value) -> Result<Self, String> {
        Message::from_json(value)
    }
}

impl From<Message> for Value {
    fn from(message: Message) -> Value {
        let mut object = Map::from_iter([("role".to_owned(), Value::from(message.role.as_str()))]);
        if !message.extra.contains_key("content") && !message.lacks_content() {
            object.insert("content".into(), message.content.into());
        }
        object.extend(message.extra);
        Value::Object(object)
    }
}

/// What kind of JSON value this is, for errors.
pub(crate) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

fn missing(name: &str, keys: &Map<String, Value>) -> String {
    let mut text = format!(
        "a message without `{name}`, its keys are {}",
        quoted(keys.keys())
    );
    if let Some(near) = crate::error::nearest(name, keys.keys().map(String::as_str)) {
        text.push_str(&format!("; did `{near}` mean `{name}`?"));
    }
    text
}

/// Names in backticks, for errors: [`a`, `b`].
pub(crate) fn quoted<T: std::fmt::Display>(names: impl IntoIterator<Item = T>) -> String {
    let names: Vec<String> = names.into_iter().map(|name| format!("`{name}`")).collect();
    format!("[{}]", names.join(", "))
}
