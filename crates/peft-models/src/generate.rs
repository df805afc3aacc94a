//! Text from a decoder: one token after the other, through the cache.
//!
//! Each step scores the vocabulary at the last position and picks a token. The scores z go through what
//! `transformers` calls logits processors, in its order:
//!
//! ```text
//! repetition penalty p    z ← z/p where z > 0, else z·p, for every token seen so far
//! temperature t           z ← z/t
//! top-k                   keep the k best, and ties with the last of them
//! top-p                   keep the best whose probabilities sum up to p
//! min-p                   keep those with at least p of the probability of the best
//! ```
//!
//! then the token is drawn from softmax(z) by inverting its cumulative sum, or is the argmax where the
//! temperature is 0.
//!
//! Prompts of different lengths are padded on the left, masked and numbered so that each row computes what it
//! would compute alone; a padding token counts as "seen" nowhere (it does in `transformers`). The
//! random numbers of a row are a function of the seed, of the prompt, of how often it was asked before, and of how many tokens it
//! has drawn, and come from a generator of our own: an answer does not depend on its company in the batch (but for the
//! rounding of a narrow number format, which may tip a near tie), a prompt that is asked five times gets five answers, and a
//! training run that shows samples in between stays the same to the bit.

use std::{collections::HashMap, ops::ControlFlow};

use peft_core::{Ctx, Linear};
use rand_chacha::{
    ChaCha8Rng,
    rand_core::{Rng, SeedableRng},
};
use tch::{Device, Kind, TchError, Tensor};

use crate::{Cache, Decoder, Encoded, Input, Network, Seq2Seq};

/// How to go on from a prompt, and for how long.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// Stop after this many tokens.
    pub max_new_tokens: usize,
    /// Tokens that end an answer; they are not part of it.
    pub stop_ids: Vec<u32>,
    /// 0 always takes the best token; 1 draws from the model's own distribution.
    pub temperature: f64,
    /// Draw from this many best tokens only; 0: from all.
    pub top_k: usize,
    /// Draw from the best tokens that have this much probability together; 1: from all.
    pub top_p: f64,
    /// Leave out tokens with less than this part of the best one's probability; 0: none.
    pub min_p: f64,
    /// Above 1, what was said or asked becomes less likely; 1: off.
    pub repetition_penalty: f64,
    /// Where the random numbers start.
    pub seed: u64,
    /// How often each prompt was asked before, where it gets another answer each time; empty: counted among the prompts of a call.
    pub asked_before: Vec<u64>,
    /// The most positions, prompt included; `None`: what the model was made for.
    pub context: Option<i64>,
}

impl Default for Sampling {
    fn default() -> Sampling {
        Sampling {
            max_new_tokens: 256,
            stop_ids: Vec::new(),
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            seed: 0,
            asked_before: Vec::new(),
            context: None,
        }
    }
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// The model said so, with this token.
    End(u32),
    /// It has as many tokens as were asked for.
    Length,
    /// The model has no more positions.
    Context,
    /// The caller broke off.
    Caller,
}

/// What one prompt got.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// The new tokens, without the one that ended it.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub stop: Stop,
}

/// What keeps a text from being made.
#[derive(Debug, thiserror::Error)]
pub enum GenerateError {
    /// There is nothing to go on from.
    #[error("prompt {row} is empty: there is no token to go on from")]
    Empty {
        /// Which prompt, from 1.
        row: usize,
    },
    /// The prompt alone is longer than the context.
    #[error("prompt {row} has {tokens} tokens, the context holds {context}")]
    TooLong {
        /// Which prompt, from 1.
        row: usize,
        /// Its length.
        tokens: usize,
        /// The limit.
        context: i64,
    },
    /// A token that the model has no embedding for.
    #[error(
        "prompt {row} has token {id}, the model knows {vocab}: does the tokenizer belong to it?"
    )]
    Token {
        /// Which prompt, from 1.
        row: usize,
        /// The token.
        id: u32,
        /// The size of its vocabulary.
        vocab: i64,
    },
    /// A setting out of range.
    #[error("{name} = {value} is out of range: {range}")]
    Setting {
        /// The setting.
        name: &'static str,
        /// What it is.
        value: f64,
        /// What it may be.
        range: &'static str,
    },
    /// The model computes nonsense.
    #[error(
        "the scores for token {step} of answer {row} are not finite: the weights or the adapter are damaged, or the number format is too narrow"
    )]
    NotFinite {
        /// Which prompt, from 1.
        row: usize,
        /// Which new token, from 1.
        step: usize,
    },
    /// libtorch refused.
    #[error(transparent)]
    Torch(#[from] TchError),
}

/// What the tokens of a conversation left behind: the next turn computes only what is new.
#[derive(Debug, Default)]
pub struct Memory {
    cache: Cache,
    tokens: Vec<u32>,
}

impl Memory {
    /// Nothing remembered.
    pub fn new() -> Memory {
        Memory::default()
    }

    /// Forgets everything behind the first place where `prompt` differs, and at least its last
    /// token, whose scores are wanted; says how much is left.
    fn keep(&mut self, prompt: &[u32]) -> usize {
        let same = self.tokens.iter().zip(prompt).take_while(|(a, b)| a == b);
        let kept = same.count().min(prompt.len().saturating_sub(1));
        self.cache.truncate(kept as i64);
        self.tokens.truncate(kept);
        kept
    }
}

/// Answers each prompt; `each(row, token)` sees the tokens as they come and may end its row.
pub fn generate(
    model: &dyn Decoder,
    prompts: &[Vec<u32>],
    sampling: &Sampling,
    each: &mut dyn FnMut(usize, u32) -> ControlFlow<()>,
) -> Result<Vec<Answer>, GenerateError> {
    check(model, prompts, sampling)?;
    if prompts.is_empty() {
        return Ok(Vec::new());
    }
    let rows = Rows::begin(Writer::Decoder(model), prompts, prompts, sampling);
    tch::no_grad(|| rows.run(&mut Cache::new(), 0, each))
}

/// Writes a text for each source; `each(row, token)` sees the tokens as they come and may end its row.
///
/// The encoder reads every source once, and what the decoder takes from it is computed once.
pub fn generate_seq2seq(
    model: &dyn Seq2Seq,
    sources: &[Vec<u32>],
    sampling: &Sampling,
    each: &mut dyn FnMut(usize, u32) -> ControlFlow<()>,
) -> Result<Vec<Answer>, GenerateError> {
    sampling.check()?;
    known(sources, i64::MAX, model.vocab())?;
    if sources.is_empty() {
        return Ok(Vec::new());
    }
    let start = vec![vec![model.start() as u32]; sources.len()];
    tch::no_grad(|| {
        let source = model.encode(&padded_behind(sources, model.device()), Ctx::EVAL);
        let rows = Rows::begin(Writer::Seq2Seq(model, source), &start, sources, sampling);
        rows.run(&mut Cache::new(), 0, each)
    })
}

/// Sources of different lengths as one batch: padded behind and masked.
fn padded_behind(sources: &[Vec<u32>], device: Device) -> Input {
    let width = sources.iter().map(Vec::len).max().unwrap_or(0);
    let (mut ids, mut mask) = (Vec::new(), Vec::new());
    for source in sources {
        let gap = width - source.len();
        ids.extend(source.iter().map(|&id| i64::from(id)));
        ids.extend(std::iter::repeat_n(0, gap));
        mask.extend((0..width).map(|i| i64::from(i < source.len())));
    }
    let load = |values: &[i64]| {
        let shape = [sources.len() as i64, width as i64];
        Tensor::from_slice(values).view(shape).to_device(device)
    };
    Input {
        attention_mask: Some(load(&mask)),
        ..Input::new(load(&ids))
    }
}

/// Answers one prompt; what it begins with in common with what `memory` holds is not computed again.
pub fn converse(
    model: &dyn Decoder,
    memory: &mut Memory,
    prompt: &[u32],
    sampling: &Sampling,
    each: &mut dyn FnMut(u32) -> ControlFlow<()>,
) -> Result<Answer, GenerateError> {
    let prompts = [prompt.to_vec()];
    check(model, &prompts, sampling)?;
    let kept = memory.keep(prompt);
    let rows = Rows::begin(Writer::Decoder(model), &prompts, &prompts, sampling);
    let cache = &mut memory.cache;
    let answers = tch::no_grad(|| rows.run(cache, kept, &mut |_, token| each(token)))?;
    let answer = answers.into_iter().next().expect("one prompt, one answer");
    let all = prompt.iter().chain(&answer.tokens).copied();
    memory.tokens = all.take(memory.cache.len() as usize).collect();
    Ok(answer)
}

impl Sampling {
    /// An error where a setting is out of its range.
    pub fn check(&self) -> Result<(), GenerateError> {
        let it = self;
        let within = |name, value: f64, fits: bool, range| match fits {
            true => Ok(()),
            false => Err(GenerateError::Setting { name, value, range }),
        };
        let (t, p, m, r) = (it.temperature, it.top_p, it.min_p, it.repetition_penalty);
        within("temperature", t, t.is_finite() && t >= 0.0, "0 or more")?;
        within("top_p", p, p > 0.0 && p <= 1.0, "above 0, at most 1")?;
        within("min_p", m, (0.0..=1.0).contains(&m), "0 to 1")?;
        within("repetition_penalty", r, r.is_finite() && r > 0.0, "above 0")?;
        let context = it.context.unwrap_or(i64::MAX);
        within("context", context as f64, context > 0, "1 or more")
    }
}

fn check(model: &dyn Decoder, prompts: &[Vec<u32>], it: &Sampling) -> Result<(), GenerateError> {
    it.check()?;
    known(prompts, limit(model, it), model.vocab())
}

/// Checks that there is something to go on from, not too much of it, and that the model knows every token.
fn known(prompts: &[Vec<u32>], context: i64, vocab: i64) -> Result<(), GenerateError> {
    for (row, prompt) in (1..).zip(prompts) {
        let tokens = prompt.len();
        if tokens == 0 {
            return Err(GenerateError::Empty { row });
        }
        if tokens as i64 > context {
            return Err(GenerateError::TooLong {
                row,
                tokens,
                context,
            });
        }
        if let Some(&id) = prompt.iter().find(|&&id| i64::from(id) >= vocab) {
            return Err(GenerateError::Token { row, id, vocab });
        }
    }
    Ok(())
}

/// The most positions: as asked for, but where the model looks positions up it ends with its table.
fn limit<N: Network + ?Sized>(model: &N, sampling: &Sampling) -> i64 {
    let made_for = model.max_positions();
    match sampling.context {
        Some(context) if !model.learned_positions() => context,
        Some(context) => context.min(made_for),
        None => made_for,
    }
}

/// What writes.
enum Writer<'a> {
    /// A decoder goes on from its prompts.
    Decoder(&'a dyn Decoder),
    /// A decoder looks at sources, which were read.
    Seq2Seq(&'a dyn Seq2Seq, Encoded),
}

impl Writer<'_> {
    /// The vectors of the new positions, `[live, new, hidden]`.
    fn hidden(&self, input: &Input, cache: &mut Cache) -> Tensor {
        match self {
            Writer::Decoder(model) => model.hidden(input, Some(cache), Ctx::EVAL),
            Writer::Seq2Seq(model, source) => {
                model.decode(&input.ids, None, source, Some(cache), Ctx::EVAL)
            }
        }
    }

    fn head(&self) -> &Linear {
        match self {
            Writer::Decoder(model) => model.head(),
            Writer::Seq2Seq(model, _) => model.head(),
        }
    }

    fn device(&self) -> Device {
        match self {
            Writer::Decoder(model) => model.device(),
            Writer::Seq2Seq(model, _) => model.device(),
        }
    }

    fn limit(&self, sampling: &Sampling) -> i64 {
        match self {
            Writer::Decoder(model) => limit(*model, sampling),
            Writer::Seq2Seq(model, _) => limit(*model, sampling),
        }
    }

    /// Keeps the rows `[n]` of the batch.
    fn select(&mut self, rows: &Tensor) {
        if let Writer::Seq2Seq(_, source) = self {
            source.select(rows);
        }
    }
}

/// The rows of a batch, those that are still being written in front of the model.
struct Rows<'a> {
    model: Writer<'a>,
    sampling: &'a Sampling,
    context: i64,
    rows: Vec<Row>,
    /// Which rows are in the batch, in its order.
    live: Vec<usize>,
}

struct Row {
    prompt: usize,
    /// Prompt and answer.
    tokens: Vec<u32>,
    random: ChaCha8Rng,
    stop: Option<Stop>,
}

impl Rows<'_> {
    /// Answers begin with `prompts`, and are drawn for what was `asked`.
    fn begin<'a>(
        model: Writer<'a>,
        prompts: &[Vec<u32>],
        asked: &[Vec<u32>],
        sampling: &'a Sampling,
    ) -> Rows<'a> {
        let counted = asked_before(asked);
        let row = |(at, prompt): (usize, &Vec<u32>)| {
            let before = sampling.asked_before.get(at).copied();
            Row {
                prompt: prompt.len(),
                tokens: prompt.clone(),
                random: randomness(sampling.seed, &asked[at], before.unwrap_or(counted[at])),
                stop: (sampling.max_new_tokens == 0).then_some(Stop::Length),
            }
        };
        let rows: Vec<Row> = prompts.iter().enumerate().map(row).collect();
        let live = (0..rows.len())
            .filter(|&i| rows[i].stop.is_none())
            .collect();
        Rows {
            context: model.limit(sampling),
            model,
            sampling,
            rows,
            live,
        }
    }

    /// Writes until every row has ended. The first `past` tokens of a single row are in the cache already.
    fn run(
        mut self,
        cache: &mut Cache,
        past: usize,
        each: &mut dyn FnMut(usize, u32) -> ControlFlow<()>,
    ) -> Result<Vec<Answer>, GenerateError> {
        let mut input = self.first(past);
        while !self.live.is_empty() {
            let scores = self.scores(&input, cache)?; // [live, vocab]
            let chosen = self.choose(&scores)?;
            // Behind virtual embeddings padding takes up positions, too.
            let padded = if cache.is_counted() {
                cache.len() + 1
            } else {
                0
            };
            for (&row, token) in self.live.iter().zip(chosen) {
                let room = self.context - padded;
                self.rows[row].take(row, token, self.sampling, (self.context, room), each);
            }
            input = self.next(input, cache);
        }
        Ok(self.rows.into_iter().map(Row::answer).collect())
    }

    /// All prompts, padded on the left.
    fn first(&self, past: usize) -> Input {
        let device = self.model.device();
        let rest = |&row: &usize| &self.rows[row].tokens[past..];
        let width = self
            .live
            .iter()
            .map(|row| rest(row).len())
            .max()
            .unwrap_or(0);
        let (mut ids, mut mask) = (Vec::new(), Vec::new());
        for tokens in self.live.iter().map(rest) {
            let gap = width - tokens.len();
            ids.extend(std::iter::repeat_n(0, gap).chain(tokens.iter().map(|&id| i64::from(id))));
            mask.extend((0..width).map(|i| i64::from(i >= gap)));
        }
        let shape = [self.live.len() as i64, width as i64];
        let ids = Tensor::from_slice(&ids).view(shape).to_device(device);
        if mask.iter().all(|&it| it == 1) {
            return Input::new(ids);
        }
        let mask = Tensor::from_slice(&mask).view(shape);
        let positions = (mask.cumsum(1, Kind::Int64) - 1).clamp_min(0);
        Input {
            position_ids: Some(positions.to_device(device)),
            attention_mask: Some(mask.to_device(device)),
            ..Input::new(ids)
        }
    }

    /// The tokens just chosen, for the rows that go on; the others leave the batch.
    fn next(&mut self, last: Input, cache: &mut Cache) -> Input {
        let device = self.model.device();
        let goes_on = |row: &usize| self.rows[*row].stop.is_none();
        let mut mask = last.attention_mask;
        if !self.live.iter().all(goes_on) {
            let kept = (0i64..).zip(&self.live).filter(|(_, row)| goes_on(row));
            let kept: Vec<i64> = kept.map(|(i, _)| i).collect();
            let kept = Tensor::from_slice(&kept).to_device(device);
            self.live.retain(|row| self.rows[*row].stop.is_none());
            if !self.live.is_empty() {
                cache.select(&kept);
                self.model.select(&kept);
            }
            mask = mask.map(|it| it.index_select(0, &kept));
        }
        let column = |of: &dyn Fn(&Row) -> i64| {
            let values: Vec<i64> = self.live.iter().map(|&row| of(&self.rows[row])).collect();
            Tensor::from_slice(&values).view([-1, 1]).to_device(device)
        };
        let ids = column(&|row| row.tokens.last().map_or(0, |&id| i64::from(id)));
        match mask {
            None => Input::new(ids),
            Some(mask) => Input {
                position_ids: Some(column(&|row| row.tokens.len() as i64 - 1)),
                attention_mask: Some(Tensor::cat(&[&mask, &ids.ones_like()], 1)),
                ..Input::new(ids)
            },
        }
    }

    /// `[live, vocab]` in fp32, with the penalty for repetition.
    fn scores(&self, input: &Input, cache: &mut Cache) -> Result<Tensor, GenerateError> {
        let hidden = self.model.hidden(input, cache);
        let last = hidden.narrow(1, hidden.size()[1] - 1, 1).squeeze_dim(1);
        let scores = self
            .model
            .head()
            .forward(&last, Ctx::EVAL)
            .to_kind(Kind::Float);
        let penalty = self.sampling.repetition_penalty;
        if penalty != 1.0 {
            for (i, &row) in (0i64..).zip(&self.live) {
                penalise(&scores.get(i), &self.rows[row].tokens, penalty)?;
            }
        }
        Ok(scores)
    }

    /// One token a row.
    fn choose(&mut self, scores: &Tensor) -> Result<Vec<u32>, GenerateError> {
        let (best, argmax) = scores.f_max_dim(-1, false)?;
        let best = Vec::<f32>::try_from(best)?;
        if let Some(at) = best.iter().position(|it| !it.is_finite()) {
            let row = &self.rows[self.live[at]];
            let step = row.tokens.len() - row.prompt + 1;
            return Err(GenerateError::NotFinite {
                row: self.live[at] + 1,
                step,
            });
        }
        let chosen = if self.sampling.temperature == 0.0 {
            argmax
        } else {
            let random = self
                .live
                .iter()
                .map(|&row| uniform(&mut self.rows[row].random));
            draw(&warp(scores, self.sampling)?, &random.collect::<Vec<f64>>())?
        };
        let chosen = Vec::<i64>::try_from(chosen)?;
        Ok(chosen.into_iter().map(|id| id as u32).collect())
    }
}

impl Row {
    /// Takes a new token: it ends the row, or belongs to it.
    fn take(
        &mut self,
        row: usize,
        token: u32,
        sampling: &Sampling,
        (context, room): (i64, i64),
        each: &mut dyn FnMut(usize, u32) -> ControlFlow<()>,
    ) {
        if sampling.stop_ids.contains(&token) {
            self.stop = Some(Stop::End(token));
            return;
        }
        self.tokens.push(token);
        let new = self.tokens.len() - self.prompt;
        self.stop = match each(row, token) {
            ControlFlow::Break(()) => Some(Stop::Caller),
            ControlFlow::Continue(()) if new >= sampling.max_new_tokens => Some(Stop::Length),
            ControlFlow::Continue(()) if self.tokens.len() as i64 > context || room < 0 => {
                Some(Stop::Context)
            }
            ControlFlow::Continue(()) => None,
        };
    }

    fn answer(self) -> Answer {
        Answer {
            tokens: self.tokens[self.prompt..].to_vec(),
            stop: self.stop.unwrap_or(Stop::Length),
        }
    }
}

/// Makes the tokens of `seen` less likely, in place; scores: `[vocab]`.
fn penalise(scores: &Tensor, seen: &[u32], penalty: f64) -> Result<(), TchError> {
    let mut seen: Vec<i64> = seen.iter().map(|&id| i64::from(id)).collect();
    seen.sort_unstable();
    seen.dedup();
    let at = Tensor::from_slice(&seen).to_device(scores.device());
    let old = scores.f_index_select(0, &at)?;
    let new = old
        .f_div_scalar(penalty)?
        .f_where_self(&old.f_gt(0.0)?, &(&old * penalty))?;
    let _ = scores.shallow_clone().f_index_copy_(0, &at, &new)?;
    Ok(())
}

/// Below this temperature scores of fp32 overflow, and the best one has all probability.
const COLD: f64 = 1e-30;

/// Temperature, top-k, top-p and min-p; scores and result: `[rows, vocab]`, −∞ where a token is out.
fn warp(scores: &Tensor, it: &Sampling) -> Result<Tensor, TchError> {
    let out = f64::NEG_INFINITY;
    if it.temperature < COLD {
        let best = scores.f_amax([-1i64].as_slice(), true)?;
        return scores.f_masked_fill(&scores.f_lt_tensor(&best)?, out);
    }
    let mut scores = scores.f_div_scalar(it.temperature)?;
    let vocab = scores.size()[1];
    let top_k = i64::try_from(it.top_k).unwrap_or(i64::MAX);
    if top_k > 0 && top_k < vocab {
        let (best, _) = scores.f_topk(top_k, -1, true, true)?;
        let last = best.narrow(-1, top_k - 1, 1);
        scores = scores.f_masked_fill(&scores.f_lt_tensor(&last)?, out)?;
    }
    if it.top_p < 1.0 {
        let (sorted, order) = scores.f_sort(-1, false)?;
        let below = sorted
            .f_softmax(-1, Kind::Float)?
            .f_cumsum(-1, Kind::Float)?;
        let gone = below.f_le(1.0 - it.top_p)?;
        let _ = gone.narrow(-1, vocab - 1, 1).f_fill_(0)?; // the best one stays
        scores = scores.f_masked_fill(&gone.f_scatter(-1, &order, &gone)?, out)?;
    }
    if it.min_p > 0.0 {
        let p = scores.f_softmax(-1, Kind::Float)?;
        let least = p.f_amax([-1i64].as_slice(), true)? * it.min_p;
        scores = scores.f_masked_fill(&p.f_lt_tensor(&least)?, out)?;
    }
    Ok(scores)
}

/// The token at which the cumulative probability passes the row's random number; scores: `[rows, vocab] -> [rows]`.
fn draw(scores: &Tensor, random: &[f64]) -> Result<Tensor, TchError> {
    let below = scores
        .f_softmax(-1, Kind::Double)?
        .f_cumsum(-1, Kind::Double)?;
    let last = below.size()[1] - 1;
    let random = Tensor::from_slice(random)
        .to_device(scores.device())
        .view([-1, 1]);
    let wanted = random * below.narrow(-1, last, 1);
    let at = wanted.f_searchsorted(&below, false, true, "right", None::<Tensor>)?;
    at.f_clamp_max(last)?.f_squeeze_dim(-1)
}

/// How often each of the prompts stands before itself.
pub fn asked_before(prompts: &[Vec<u32>]) -> Vec<u64> {
    let mut seen = HashMap::new();
    let before = prompts.iter().map(|prompt| {
        let times = seen.entry(prompt).or_insert(0);
        *times += 1;
        *times - 1
    });
    before.collect()
}

fn randomness(seed: u64, prompt: &[u32], asked_before: u64) -> ChaCha8Rng {
    let mut hash = blake3::Hasher::new();
    hash.update(&seed.to_le_bytes());
    hash.update(&asked_before.to_le_bytes());
    for id in prompt {
        hash.update(&id.to_le_bytes());
    }
    ChaCha8Rng::from_seed(*hash.finalize().as_bytes())
}

/// Uniform in [0, 1), 53 bits.
fn uniform(random: &mut ChaCha8Rng) -> f64 {
    (random.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}
