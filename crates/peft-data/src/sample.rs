//! From what a row says to token ids, and which of them are trained.
//!
//! Loss on completions only means: a token counts if it is something the model
//! would have to say itself. That is decided by *position* in the rendered
//! text, never by looking for ids: an end token is also a separator, and a user
//! may quote one. The text is rendered and tokenised once, whole, so that
//! tokens at the seams are the ones the model will see; then the byte ranges
//! that the assistant wrote are laid over it, and a token is trained if it
//! overlaps one.
//!
//! Where the assistant's turn `k` lies in the text `full` is found so:
//!
//! ```text
//! {% generation %} in the template          its own spans
//! start   render(messages[..k], add_generation_prompt) is a prefix of full: there it ends
//!         render(messages[..k]) is:  where the two renderings part (a prompt that opens <think>)
//!         otherwise: where full parts from a rendering with another first character in turn k
//! end     render(messages[..=k]) is a prefix of full: there it ends
//!         otherwise: where full, from its end, parts from a rendering with another last
//!         character in turn k; plus the end token that stands there. A turn that is all
//!         calls of tools has no such character: its end is compared as a whole
//! ```
//!
//! The two "otherwise" are for templates that rewrite history: Qwen3 drops the
//! reasoning of earlier turns, Mistral moves the system prompt to the last one.
//! What follows the end token (a line break, mostly) is not the model's to say.

use std::ops::Range;

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::format::Example;
use crate::message::Message;
use crate::python::is_space;
use crate::template::{RenderOptions, variables};
use crate::tokenizer::{Tokenizer, common_prefix};

/// A tokenised row.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Sample {
    /// Token ids.
    pub(crate) ids: Vec<u32>,
    /// Whether the model is to learn to say token `i`: as long as `ids`.
    pub(crate) trained: Vec<bool>,
}

impl Sample {
    /// Ends with the first of `eos`, trained, whether or not the tokenizer wrote it already.
    pub(crate) fn end(&mut self, eos: &[u32]) {
        let Some(eos) = eos.first() else {
            return;
        };
        if self.ids.last() == Some(eos) {
            self.trained.pop();
        } else {
            self.ids.push(*eos);
        }
        self.trained.push(true);
    }
}

/// What of a row is trained, and with what the template is called.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Rules {
    pub(crate) train_on_prompt: bool,
    pub(crate) add_eos: bool,
    pub(crate) turns: Turns,
    pub(crate) template_variables: Map<String, Value>,
}

/// Which of the assistant's turns are trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Turns {
    /// Every one.
    #[default]
    All,
    /// Only the last one; the others are context.
    Last,
}

/// Text with the byte ranges of it that are trained.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Marked {
    text: String,
    trained: Vec<Range<usize>>,
    /// Whether the tokenizer adds its own begin token: not where a template did.
    add_special_tokens: bool,
    /// Whether an end token follows, which is trained too.
    eos: bool,
}

/// Tokenises one row.
pub(crate) fn sample(tokenizer: &Tokenizer, example: &Example, rules: &Rules) -> Result<Sample> {
    let marked = mark(tokenizer, example, rules)?;
    let (ids, offsets) = tokenizer.encode_with_offsets(&marked.text, marked.add_special_tokens)?;
    let mut regions = marked.trained.iter().peekable();
    let mut trained = Vec::with_capacity(ids.len() + 1);
    for (start, end) in offsets {
        while regions.next_if(|region| region.end <= start).is_some() {}
        trained.push(start < end && regions.peek().is_some_and(|region| region.start < end));
    }
    let mut sample = Sample { ids, trained };
    if marked.eos {
        sample.end(tokenizer.eos_ids());
    }
    Ok(sample)
}

/// Alpaca's own words, for a base model without a chat template.
fn alpaca_prompt(instruction: &str, input: &str) -> String {
    if input.is_empty() {
        format!(
            "Below is an instruction that describes a task. Write a response that appropriately \
             completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:"
        )
    } else {
        format!(
            "Below is an instruction that describes a task, paired with an input that provides \
             further context. Write a response that appropriately completes the \
             request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
        )
    }
}

/// The text of a row and what of it is trained.
fn mark(tokenizer: &Tokenizer, example: &Example, rules: &Rules) -> Result<Marked> {
    let has_template = tokenizer.template(false).is_some();
    let mut marked = match example {
        Example::Text(text) => whole(text.clone(), rules),
        Example::Pair { prompt, completion } if !has_template => {
            continued(prompt.clone(), completion, rules)
        }
        Example::Pair { prompt, completion } => {
            chat(tokenizer, &exchange(prompt, completion), 0, None, rules)?
        }
        Example::Instruction {
            instruction,
            input,
            output,
        } if !has_template => continued(alpaca_prompt(instruction, input), output, rules),
        Example::Instruction {
            instruction,
            input,
            output,
        } => {
            let prompt = match input.as_str() {
                "" => instruction.clone(),
                input => format!("{instruction}\n\n{input}"),
            };
            chat(tokenizer, &exchange(&prompt, output), 0, None, rules)?
        }
        Example::Chat {
            messages,
            first,
            tools,
        } => chat(tokenizer, messages, *first, tools.clone(), rules)?,
    };
    if rules.train_on_prompt {
        marked.trained = vec![0..marked.text.len()];
    }
    Ok(marked)
}

/// Text that is trained from beginning to end.
fn whole(text: String, rules: &Rules) -> Marked {
    Marked {
        trained: vec![0..text.len()],
        text,
        add_special_tokens: true,
        eos: rules.add_eos,
    }
}

/// A prompt, and right after it the completion.
fn continued(prompt: String, completion: &str, rules: &Rules) -> Marked {
    let start = prompt.len();
    let text = prompt + completion;
    Marked {
        trained: vec![start..text.len()],
        text,
        add_special_tokens: true,
        eos: rules.add_eos,
    }
}

fn exchange(prompt: &str, completion: &str) -> [Message; 2] {
    [Message::user(prompt), Message::assistant(completion)]
}

/// A conversation through the chat template.
fn chat(
    tokenizer: &Tokenizer,
    messages: &[Message],
    first: usize,
    tools: Option<Value>,
    rules: &Rules,
) -> Result<Marked> {
    let conversation = Conversation::new(tokenizer, messages, tools, rules)?;
    let (text, spans) = conversation.full()?;
    if let Some(spans) = &spans
        && first == 0
        && rules.turns == Turns::All
    {
        return Ok(rendered(text, spans.clone()));
    }
    let mut trained = Vec::new();
    let last = messages.iter().rposition(Message::is_assistant);
    for (k, _) in (first..)
        .zip(&messages[first..])
        .filter(|(_, message)| message.is_assistant())
    {
        if rules.train_on_prompt || (rules.turns == Turns::Last && Some(k) != last) {
            continue;
        }
        trained.push(match &spans {
            Some(spans) => conversation.marked_turn(k, spans)?,
            None => conversation.turn(k, &text)?,
        });
    }
    Ok(rendered(text, trained))
}

/// What a template wrote: special tokens are in it already.
fn rendered(text: String, trained: Vec<Range<usize>>) -> Marked {
    Marked {
        text,
        trained,
        add_special_tokens: false,
        eos: false,
    }
}

/// A conversation that is rendered several times, in parts and with changes.
struct Conversation<'a> {
    tokenizer: &'a Tokenizer,
    messages: &'a [Message],
    /// The messages as templates see them.
    seen: Vec<minijinja::Value>,
    options: RenderOptions,
}

impl<'a> Conversation<'a> {
    fn new(
        tokenizer: &'a Tokenizer,
        messages: &'a [Message],
        tools: Option<Value>,
        rules: &Rules,
    ) -> Result<Self> {
        Ok(Self {
            tokenizer,
            messages,
            seen: messages.iter().map(Message::to_template).collect(),
            options: RenderOptions {
                tools,
                variables: rules.template_variables.clone(),
                ..RenderOptions::default()
            },
        })
    }

    /// The whole text, and the template's own spans if it marks any.
    fn full(&self) -> Result<(String, Option<Vec<Range<usize>>>)> {
        let template = self.tokenizer.template_for(&self.options)?;
        if template.marks_generation() {
            let (text, spans) = template.render_spans(self.messages, &self.options)?;
            return Ok((text, Some(spans)));
        }
        Ok((self.render(self.seen.clone(), false)?, None))
    }

    fn render(&self, seen: Vec<minijinja::Value>, add_generation_prompt: bool) -> Result<String> {
        let template = self.tokenizer.template_for(&self.options)?;
        template.render_values(variables(seen, &self.options, add_generation_prompt))
    }

    /// The `n`-th of the template's own spans for the `n`-th assistant turn.
    fn marked_turn(&self, k: usize, spans: &[Range<usize>]) -> Result<Range<usize>> {
        let turns = self
            .messages
            .iter()
            .filter(|message| message.is_assistant());
        let nth = self.messages[..k]
            .iter()
            .filter(|message| message.is_assistant())
            .count();
        if spans.len() != turns.clone().count() {
            return Err(Error::Template(format!(
                "it marks {} replies by {{% generation %}} in a conversation with {}",
                spans.len(),
                turns.count()
            )));
        }
        Ok(spans[nth].clone())
    }

    /// Where the assistant's turn `k` lies in `full`, its end token included.
    fn turn(&self, k: usize, full: &str) -> Result<Range<usize>> {
        let start = self.start(k, full)?;
        let end = self.end(k, full, start)?;
        if start >= end {
            return Err(self.lost(k));
        }
        Ok(start..end)
    }

    fn start(&self, k: usize, full: &str) -> Result<usize> {
        if k > 0
            && let Ok(prompt) = self.render(self.seen[..k].to_vec(), true)
        {
            if full.starts_with(&prompt) {
                return Ok(prompt.len());
            }
            let history = self.render(self.seen[..k].to_vec(), false);
            if history.is_ok_and(|history| full.starts_with(&history)) {
                return Ok(common_prefix(&prompt, full));
            }
        }
        let other = self.nudged(k, |content| format!("\u{1}{content}"))?;
        match common_prefix(&other, full) {
            same if same < full.len() => Ok(same),
            _ => Err(self.lost(k)),
        }
    }

    fn end(&self, k: usize, full: &str, start: usize) -> Result<usize> {
        if k + 1 == self.messages.len() {
            return Ok(self.trim_end(k, full, start, full.len()));
        }
        if let Ok(so_far) = self.render(self.seen[..=k].to_vec(), false)
            && full.starts_with(&so_far)
        {
            return Ok(self.trim_end(k, full, start, so_far.len()));
        }
        let calls = self.messages[k].extra.contains_key("tool_calls");
        let other = match self.nudged(k, |content| format!("{content}\u{1}")) {
            // Beside calls of tools some templates write no text.
            Ok(other) if calls && other == full => return self.end_of_call(k, full, start),
            Err(_) if calls => return self.end_of_call(k, full, start),
            other => other?,
        };
        let same = common_suffix(&other, full);
        if other.len() == same || full.len() < same {
            return Err(self.lost(k));
        }
        let content_end = full.len() - same;
        let after = &full[content_end..];
        let ends = self.tokenizer.special_contents();
        let end_token = ends
            .iter()
            .filter_map(|token| Some((after.find(token.as_str())?, token.len())))
            .min_by_key(|(at, length)| (*at, std::cmp::Reverse(*length)))
            .filter(|(at, _)| calls || after[..*at].trim().is_empty());
        Ok(content_end + end_token.map_or(0, |(at, length)| at + length))
    }

    /// The end of a turn without a text of its own, whose beginning alone was
    /// rewritten: what the turn ends with when it is the last stands here too.
    fn end_of_call(&self, k: usize, full: &str, start: usize) -> Result<usize> {
        let alone = self.render(self.seen[..=k].to_vec(), false)?;
        let Some(alone) = alone.get(start..) else {
            return Err(self.lost(k));
        };
        let ends = self.tokenizer.special_contents();
        let shared = alone
            .char_indices()
            .map(|(at, _)| &alone[at..])
            .find(|rest| full[start..].starts_with(rest))
            .filter(|shared| ends.iter().any(|token| shared.contains(token.as_str())));
        match shared {
            Some(shared) => Ok(self.trim_end(k, full, start, start + shared.len())),
            None => Err(self.lost(k)),
        }
    }

    /// Takes back what the template writes after the end token of reply `k`.
    fn trim_end(&self, k: usize, full: &str, start: usize, end: usize) -> usize {
        let ends = self.tokenizer.special_contents();
        let Some(mut turn) = full.get(start..end) else {
            // The turn ends before it starts: the caller says so.
            return end;
        };
        let closing = |text: &str| {
            ends.iter()
                .find(|token| text.ends_with(token.as_str()))
                .cloned()
        };
        // What looks like a token may be part of what was said.
        let content = &self.messages[k].content;
        let said = [content.as_str(), content.trim_matches(is_space)]
            .into_iter()
            .filter(|it| !it.is_empty())
            .find_map(|it| Some(turn.find(it)? + it.len()))
            .unwrap_or(0);
        while let Some(token) = closing(turn.trim_end()) {
            turn = turn.trim_end();
            // `<|end|>\n<|endoftext|>`: the reply ends at the first of them.
            let before = &turn[..turn.len() - token.len()];
            let earlier = closing(before.trim_end());
            let written = earlier.is_some_and(|it| before.trim_end().len() - it.len() >= said);
            match before.trim_end() != before && written {
                true => turn = before,
                false => break,
            }
        }
        start + turn.len()
    }

    /// The whole conversation with another content in turn `k`.
    fn nudged(&self, k: usize, change: impl Fn(&str) -> String) -> Result<String> {
        let mut message = self.messages[k].clone();
        if message.extra.contains_key("content") {
            return Err(self.lost(k));
        }
        let silent = message.content.is_empty();
        if silent && message.extra.contains_key("tool_calls") {
            return Err(self.lost(k));
        }
        message.content = change(&message.content);
        let mut seen = self.seen.clone();
        seen[k] = message.to_template();
        let other = self.render(seen, false)?;
        // A template may write something else altogether where nothing was said.
        match silent && self.render(self.seen.clone(), false)? != other.replace('\u{1}', "") {
            true => Err(self.lost(k)),
            false => Ok(other),
        }
    }

    fn lost(&self, k: usize) -> Error {
        Error::Template(format!(
            "it rewrites message {k} ({}) so that it cannot be found in the rendered text; a \
             template with {{% generation %}} around the reply says it itself, training on the \
             last turn or on the prompt as well does without",
            self.messages[k].role
        ))
    }
}

/// How many bytes of `a` and `b` agree from the end, in whole characters.
fn common_suffix(a: &str, b: &str) -> usize {
    let agree = a
        .bytes()
        .rev()
        .zip(b.bytes().rev())
        .take_while(|(x, y)| x == y)
        .count();
    (0..=agree)
        .rev()
        .find(|n| a.is_char_boundary(a.len() - n) && b.is_char_boundary(b.len() - n))
        .unwrap_or(0)
}
