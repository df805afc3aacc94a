//! Text in, text out: prompts through the template, tokens through the tokenizer, and stop strings.
//!
//! What may be the beginning of a stop string is held back until it is clear that it is none, so
//! nothing is shown that has to be taken back.

use std::{
    collections::hash_map::RandomState,
    hash::BuildHasher,
    ops::ControlFlow,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use peft::{
    data::{DecodeStream, Message, RenderOptions, Tokenizer},
    models::{Decoder, Memory, Sampling, Seq2Seq, Stop, converse, generate, generate_seq2seq},
};

use crate::error::usage;

/// How to choose the next token, and when to stop.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Sampling")]
pub(crate) struct SamplingArgs {
    /// 0 takes the best token each time; higher is livelier [default: 0, in a chat 0.7]
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    temperature: Option<f64>,
    /// Draw from the N best tokens only; 0: from all
    #[arg(long, value_name = "N", default_value_t = 0)]
    top_k: usize,
    /// Draw from the best tokens that have this much probability together
    #[arg(
        long,
        value_name = "P",
        allow_negative_numbers = true,
        default_value_t = 1.0
    )]
    top_p: f64,
    /// Leave out tokens below this part of the best one's probability
    #[arg(
        long,
        value_name = "P",
        allow_negative_numbers = true,
        default_value_t = 0.0
    )]
    min_p: f64,
    /// Above 1: what was said already becomes less likely
    #[arg(
        long,
        value_name = "P",
        allow_negative_numbers = true,
        default_value_t = 1.0
    )]
    repetition_penalty: f64,
    /// End an answer before this text; may be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Most tokens in an answer
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_new_tokens: usize,
    /// Of the random numbers; the same seed gives the same answer [default: another each time]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
}

impl SamplingArgs {
    /// The settings, with the tokens that end an answer.
    pub(crate) fn settings(
        &self,
        tokenizer: &Tokenizer,
        usual_temperature: f64,
    ) -> Result<Sampling> {
        let sampling = Sampling {
            asked_before: Vec::new(),
            max_new_tokens: self.max_new_tokens,
            stop_ids: tokenizer.eos_ids().to_vec(),
            temperature: self.temperature.unwrap_or(usual_temperature),
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            seed: self
                .seed
                .unwrap_or_else(|| RandomState::new().hash_one("seed")),
            context: None,
        };
        sampling.check().map_err(usage)?;
        Ok(sampling)
    }

    /// The texts that end an answer; an empty one would end every answer at once.
    pub(crate) fn stops(&self) -> Result<Vec<String>> {
        if self.stop.iter().any(String::is_empty) {
            return Err(usage("`--stop` is empty: a text is wanted"));
        }
        Ok(self.stop.clone())
    }
}

/// The ids of a conversation, up to where the model goes on.
pub(crate) fn conversation(tokenizer: &Tokenizer, messages: &[Message]) -> Result<Vec<u32>> {
    let options = RenderOptions {
        add_generation_prompt: true,
        ..RenderOptions::default()
    };
    if tokenizer.chat_template().is_none() {
        anyhow::bail!(
            "this model has no chat template, so it cannot be asked; let it go on from a text with `--raw`"
        );
    }
    let text = tokenizer.render(messages, &options)?;
    Ok(tokenizer.encode(&text, false)?)
}

/// What an answer became, and how long it took.
#[derive(Debug, Clone)]
pub(crate) struct Reply {
    /// The whole text, stop string not included.
    pub(crate) text: String,
    /// Tokens made.
    pub(crate) tokens: usize,
    /// Why it ended.
    pub(crate) stop: Ending,
    /// From the start to the first token.
    pub(crate) first: Duration,
    /// From the first token to the last.
    pub(crate) rest: Duration,
}

/// Why a text ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ending {
    /// The model ended it.
    End,
    /// A stop string came.
    StopString,
    /// As many tokens as were asked for.
    Length,
    /// The model has no more positions.
    Context,
    /// The user broke it off.
    Interrupted,
}

impl Ending {
    /// A word for machines.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Ending::End => "end",
            Ending::StopString => "stop",
            Ending::Length => "length",
            Ending::Context => "context",
            Ending::Interrupted => "interrupted",
        }
    }

    /// A remark for people, where the end is not the model's own.
    pub(crate) fn remark(self) -> Option<&'static str> {
        match self {
            Ending::End | Ending::StopString => None,
            Ending::Length => Some("cut at --max-new-tokens"),
            Ending::Context => Some("cut: the context of the model is full"),
            Ending::Interrupted => Some("interrupted"),
        }
    }
}

/// Who writes.
#[derive(Clone, Copy)]
pub(crate) enum Writer<'a> {
    /// A model that goes on with a text.
    Decoder(&'a dyn Decoder),
    /// A model that writes a text for a text.
    Seq2Seq(&'a dyn Seq2Seq),
}

/// Answers prompts, as ids; each answer is given out whole.
pub(crate) fn answers(
    writer: Writer<'_>,
    tokenizer: &Tokenizer,
    prompts: &[Vec<u32>],
    sampling: &Sampling,
    stops: &[String],
) -> Result<Vec<Reply>> {
    let begun = Instant::now();
    let mut texts: Vec<Text> = prompts
        .iter()
        .map(|_| Text::new(tokenizer, stops))
        .collect();
    let mut each = |row: usize, id| texts[row].take(id);
    let answers = match writer {
        Writer::Decoder(model) => generate(model, prompts, sampling, &mut each)?,
        Writer::Seq2Seq(model) => generate_seq2seq(model, prompts, sampling, &mut each)?,
    };
    let ended = answers.iter().zip(texts);
    ended
        .map(|(answer, text)| text.reply(answer.stop, begun, &mut |_| Ok(())))
        .collect()
}

/// A model that talks, and how.
#[derive(Clone, Copy)]
pub(crate) struct Speaker<'a> {
    /// The model.
    pub(crate) model: &'a dyn Decoder,
    /// Its tokenizer.
    pub(crate) tokenizer: &'a Tokenizer,
    /// How it chooses.
    pub(crate) sampling: &'a Sampling,
    /// Texts that end an answer.
    pub(crate) stops: &'a [String],
}

/// Answers one prompt; `show` is given the text piece by piece, `go_on` is asked after each token.
pub(crate) fn stream(
    speaker: Speaker<'_>,
    memory: &mut Memory,
    prompt: &[u32],
    show: &mut dyn FnMut(&str) -> Result<()>,
    go_on: &dyn Fn() -> bool,
) -> Result<Reply> {
    let begun = Instant::now();
    let mut text = Text::new(speaker.tokenizer, speaker.stops);
    let answer = converse(speaker.model, memory, prompt, speaker.sampling, &mut |id| {
        let flow = text.take(id);
        if let Err(error) = show(&text.fresh()) {
            text.fault = Some(error);
            return ControlFlow::Break(());
        }
        if go_on() {
            flow
        } else {
            ControlFlow::Break(())
        }
    })?;
    text.reply(answer.stop, begun, show)
}

/// The text of one answer while it is being made.
struct Text<'t> {
    stream: Option<DecodeStream<'t>>,
    stops: &'t [String],
    whole: String,
    /// How much of `whole` has been given out.
    given: usize,
    tokens: usize,
    stopped: bool,
    fault: Option<anyhow::Error>,
    first: Option<Instant>,
    last: Option<Instant>,
}

impl<'t> Text<'t> {
    fn new(tokenizer: &'t Tokenizer, stops: &'t [String]) -> Text<'t> {
        Text {
            stream: Some(tokenizer.stream(true)),
            stops,
            whole: String::new(),
            given: 0,
            tokens: 0,
            stopped: false,
            fault: None,
            first: None,
            last: None,
        }
    }

    fn take(&mut self, id: u32) -> ControlFlow<()> {
        let now = Instant::now();
        self.first.get_or_insert(now);
        self.last = Some(now);
        self.tokens += 1;
        match self.stream.as_mut().map(|it| it.push(id)) {
            Some(Ok(Some(piece))) => self.add(&piece),
            Some(Err(error)) => self.fault = Some(error.into()),
            _ => {}
        }
        match self.stopped || self.fault.is_some() {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    }

    fn add(&mut self, piece: &str) {
        // A stop string may begin in what was there before.
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let mut from = self.whole.len().saturating_sub(longest);
        while !self.whole.is_char_boundary(from) {
            from -= 1;
        }
        self.whole.push_str(piece);
        let found = self
            .stops
            .iter()
            .filter_map(|stop| self.whole[from..].find(stop.as_str()));
        if let Some(at) = found.min() {
            self.whole.truncate(from + at);
            self.stopped = true;
        }
    }

    /// What can be shown and has not been: nothing that may yet become a stop string.
    fn fresh(&mut self) -> String {
        let held = if self.stopped {
            0
        } else {
            held_back(&self.whole, self.stops)
        };
        let end = (self.whole.len() - held).max(self.given);
        let fresh = self.whole[self.given.min(end)..end].to_owned();
        self.given = end;
        fresh
    }

    fn reply(
        mut self,
        stop: Stop,
        begun: Instant,
        show: &mut dyn FnMut(&str) -> Result<()>,
    ) -> Result<Reply> {
        if let Some(fault) = self.fault {
            return Err(fault);
        }
        if !self.stopped
            && let Some(rest) = self
                .stream
                .take()
                .map(DecodeStream::finish)
                .transpose()?
                .flatten()
        {
            self.add(&rest);
        }
        let rest = self.whole.get(self.given..).unwrap_or_default();
        if !rest.is_empty() {
            show(rest).context("writing the answer")?;
        }
        let first = self.first.unwrap_or_else(Instant::now);
        Ok(Reply {
            tokens: self.tokens,
            stop: match stop {
                _ if self.stopped => Ending::StopString,
                Stop::End(_) => Ending::End,
                Stop::Length => Ending::Length,
                Stop::Context => Ending::Context,
                Stop::Caller => Ending::Interrupted,
            },
            first: first - begun,
            rest: self.last.unwrap_or(first) - first,
            text: self.whole,
        })
    }
}

/// How many bytes at the end of `text` are the beginning of a stop string.
fn held_back(text: &str, stops: &[String]) -> usize {
    let begins = |stop: &String| {
        let cuts = stop.char_indices().map(|(i, _)| i).filter(|&i| i > 0);
        cuts.filter(|&i| text.ends_with(&stop[..i])).max()
    };
    stops.iter().filter_map(begins).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(all: &[&str]) -> Vec<String> {
        all.iter().map(|&it| it.to_owned()).collect()
    }

    #[test]
    fn the_beginning_of_a_stop_string_is_held_back() {
        let stops = strings(&["</s>", "Ünd"]);
        for (text, held) in [
            ("ab", 0),
            ("ab<", 1),
            ("ab</s", 3),
            ("abÜ", 2),
            ("abÜn", 3),
            ("", 0),
            ("<x", 0),
        ] {
            assert_eq!(held_back(text, &stops), held, "{text}");
        }
        assert_eq!(held_back("aa", &strings(&["aaa"])), 2);
        assert_eq!(held_back("abc", &[]), 0);
    }
}
