//! A tokenizer folder: `tokenizer.json`, its configuration and its chat template.
//!
//! Hugging Face spreads what belongs together over several files, by age:
//!
//! | what | where it is looked for, first found wins |
//! | --- | --- |
//! | vocabulary, merges, added tokens | `tokenizer.json`; further tokens in `tokenizer_config.json` (`added_tokens_decoder`), `added_tokens.json` |
//! | `bos_token`, `eos_token`, … | `tokenizer_config.json`, `special_tokens_map.json` |
//! | chat template | `chat_template.jinja`, `tokenizer_config.json` (a string, or a list of named ones), `chat_template.json` |
//! | segment ids, sides of padding and truncation | `model_input_names`, `tokenizer_class`, `padding_side`, `truncation_side` of `tokenizer_config.json` |
//! | tokens that end a reply | `eos_token` and every `eos_token_id` of `generation_config.json`; `config.json` if neither says |
//!
//! `tokenizer.json` may also carry a truncation and a padding rule. They are
//! somebody's serving set-up (one well-known encoder pads everything to 128),
//! so both are switched off here, as `transformers` does.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use serde_json::{Map, Value};
use tokenizers::AddedToken;

use crate::batch::Side;
use crate::bpe::Bpe;
use crate::error::{Error, Result, nearest};
use crate::message::{Message, kind};
use crate::template::{ChatTemplate, RenderOptions};

/// Text to ids and back, and conversations to text.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    dir: PathBuf,
    json: Arc<Vec<u8>>,
    special: BTreeMap<String, String>,
    templates: BTreeMap<String, ChatTemplate>,
    /// A template that the caller set: written out on [`Tokenizer::save`].
    replaced: bool,
    eos: Vec<u32>,
    pad: u32,
    vocab_size: usize,
    habits: Habits,
    ends: Arc<[String]>,
    /// Made when the first row needs it, where this kind of tokenizer is known.
    fast: OnceLock<Option<Arc<Bpe>>>,
}

/// What `tokenizer_config.json` says about the rows that a tokenizer makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Habits {
    segments: bool,
    padding_left: bool,
    truncation_left: bool,
}

/// The classes of `transformers` whose tokenizers give `token_type_ids`, without `Fast`; the
/// others leave them out, whatever the template in `tokenizer.json` says.
const SEGMENTED: [&str; 13] = [
    "BertTokenizer",
    "BertJapaneseTokenizer",
    "CanineTokenizer",
    "ConvBertTokenizer",
    "DebertaTokenizer",
    "DebertaV2Tokenizer",
    "ElectraTokenizer",
    "FNetTokenizer",
    "FunnelTokenizer",
    "LayoutLMTokenizer",
    "MarkupLMTokenizer",
    "MobileBertTokenizer",
    "RetriBertTokenizer",
];

/// The byte range that a token came from: start and end.
pub type Offsets = (usize, usize);

/// The files of a tokenizer folder, in the order they are copied.
const FILES: [&str; 11] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "generation_config.json",
];

/// The tokens that have a name of their own in Hugging Face's files.
const SPECIAL: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
];

impl Tokenizer {
    /// Opens the tokenizer in the folder `dir`.
    pub fn open(dir: &Path) -> Result<Tokenizer> {
        let path = dir.join("tokenizer.json");
        let json = match fs::read(&path) {
            Ok(json) => json,
            Err(_) if dir.join("tokenizer.model").exists() => {
                return Err(Error::file(
                    &path,
                    "not there; `tokenizer.model` beside it is a SentencePiece file, convert it \
                     with transformers (`AutoTokenizer.from_pretrained(dir).save_pretrained(dir)`)",
                ));
            }
            Err(error) => return Err(Error::io(&path)(error)),
        };
        let mut inner = parse(&path, &json)?;
        let config = read_object(&dir.join("tokenizer_config.json"))?;
        add_tokens(&mut inner, dir, &config)?;
        let mut special = special_tokens(dir, &config)?;
        add_defaults(&mut special, &inner, &config);
        make_special(&mut inner, &special)?;
        let habits = Habits::of(dir, &config)?;
        let templates = templates(dir, &config, &special)?;

        let named = |name: &str| -> Result<Option<u32>> {
            let Some(token) = special.get(name) else {
                return Ok(None);
            };
            match inner.token_to_id(token) {
                Some(id) => Ok(Some(id)),
                None => Err(Error::file(
                    &dir.join("tokenizer_config.json"),
                    format!(
                        "{name} `{token}` is not in the vocabulary of {}",
                        path.display()
                    ),
                )),
            }
        };
        let mut eos: Vec<u32> = named("eos_token")?.into_iter().collect();
        eos_of(&dir.join("generation_config.json"), &mut eos)?;
        if eos.is_empty() {
            eos_of(&dir.join("config.json"), &mut eos)?;
        }
        let pad = named("pad_token")?
            .or(eos.first().copied())
            .unwrap_or_default();
        let vocab_size = inner
            .get_vocab(true)
            .into_values()
            .max()
            .map_or(0, |last| last as usize + 1);
        let ends = special_contents(&inner, &special);
        Ok(Tokenizer {
            inner,
            dir: dir.to_owned(),
            json: json.into(),
            special,
            templates,
            replaced: false,
            eos,
            pad,
            vocab_size,
            habits,
            ends: ends.into(),
            fast: OnceLock::new(),
        })
    }

    /// The ids of `text`, with the tokenizer's own begin and end tokens if `add_special_tokens`.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        let encoding = guarded(|| self.inner.encode_fast(text, add_special_tokens));
        Ok(encoding.map_err(refused)?.get_ids().to_vec())
    }

    /// As [`Tokenizer::encode`], with the byte range in `text` that each id came from.
    ///
    /// For many texts: the first call may take a while to set up a faster way.
    pub fn encode_with_offsets(
        &self,
        text: &str,
        add_special_tokens: bool,
    ) -> Result<(Vec<u32>, Vec<Offsets>)> {
        let fast = self.fast.get_or_init(|| self.fast());
        if let Some(fast) = fast {
            let encoded = fast.encode(text, add_special_tokens, &self.inner);
            return encoded.map_err(refused);
        }
        let encoding = guarded(|| self.inner.encode(text, add_special_tokens));
        let encoding = encoding.map_err(refused)?;
        Ok((encoding.get_ids().to_vec(), encoding.get_offsets().to_vec()))
    }

    /// The text of `ids`.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        self.check(ids)?;
        guarded(|| self.inner.decode(ids, skip_special_tokens)).map_err(refused)
    }

    /// Decodes ids one by one, as a model makes them.
    pub fn stream(&self, skip_special_tokens: bool) -> DecodeStream<'_> {
        DecodeStream {
            tokenizer: self,
            skip_special_tokens,
            ids: Vec::new(),
            settled: 0,
            shown: String::new(),
        }
    }

    /// The token `id` as it stands in the vocabulary.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The id of a token as it stands in the vocabulary.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The id of `token`, or an error with the nearest added token.
    pub fn require(&self, token: &str) -> Result<u32> {
        self.id(token).ok_or_else(|| {
            let near = nearest(token, self.ends.iter().map(String::as_str));
            Error::Tokenizer(match near {
                Some(near) => format!("no token `{token}`, the nearest is `{near}`"),
                None => format!("no token `{token}`"),
            })
        })
    }

    /// The highest id plus one: how many rows an embedding must have at least.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The ids that end a reply; the first is the tokenizer's `eos_token`.
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos
    }

    /// The id for padding: `pad_token`, else the first that ends a reply, else 0.
    ///
    /// Which one it is changes nothing, since padding is masked by position.
    pub fn pad_id(&self) -> u32 {
        self.pad
    }

    /// The id of `bos_token`.
    pub fn bos_id(&self) -> Option<u32> {
        self.special_id("bos_token")
    }

    /// The id of a special token by its name, such as `unk_token`.
    pub fn special_id(&self, name: &str) -> Option<u32> {
        self.id(self.special.get(name)?)
    }

    /// Whether rows have segment ids (`token_type_ids`).
    pub fn has_segments(&self) -> bool {
        self.habits.segments
    }

    /// The side on which short rows are filled up.
    pub fn padding_side(&self) -> Side {
        match self.habits.padding_left {
            true => Side::Left,
            false => Side::Right,
        }
    }

    /// Whether the vocabulary writes bytes as letters, as GPT-2's does.
    pub(crate) fn is_byte_level(&self) -> bool {
        matches!(
            self.inner.get_decoder(),
            Some(tokenizers::DecoderWrapper::ByteLevel(_))
        )
    }

    /// Whether long rows are cut off at their start.
    pub(crate) fn truncates_left(&self) -> bool {
        self.habits.truncation_left
    }

    /// The machinery beneath, without truncation and padding.
    pub(crate) fn machinery(&self) -> &tokenizers::Tokenizer {
        &self.inner
    }

    /// The special tokens by name, as templates see them.
    pub fn special_tokens(&self) -> &BTreeMap<String, String> {
        &self.special
    }

    /// The chat template, where there is one; the one named `default` where there are several.
    pub fn chat_template(&self) -> Option<&str> {
        Some(self.template(false)?.source())
    }

    /// The template for a conversation with or without tools.
    pub(crate) fn template(&self, tools: bool) -> Option<&ChatTemplate> {
        tools
            .then(|| self.templates.get("tool_use"))
            .flatten()
            .or_else(|| self.templates.get("default"))
    }

    /// The text of a conversation, as the model was trained on it.
    ///
    /// Encode it with `add_special_tokens = false`: the template wrote them.
    pub fn render(&self, messages: &[Message], options: &RenderOptions) -> Result<String> {
        if messages.is_empty() {
            return Err(Error::Template("a conversation without messages".into()));
        }
        self.template_for(options)?.render(messages, options)
    }

    /// The template for these options, or an error that says how to get one.
    pub(crate) fn template_for(&self, options: &RenderOptions) -> Result<&ChatTemplate> {
        self.template(options.tools.is_some()).ok_or_else(|| {
            let what = match self.templates.keys().next() {
                None => "there is none",
                Some(_) => "there are several and none is named `default`",
            };
            Error::file(&self.dir, format!("chat template: {what}"))
        })
    }

    /// The same tokenizer with another chat template.
    pub fn with_chat_template(mut self, template: String) -> Result<Self> {
        let template = ChatTemplate::compile(&template, &self.special)?;
        self.templates = BTreeMap::from([("default".into(), template)]);
        self.replaced = true;
        Ok(self)
    }

    /// Copies the tokenizer's files into the folder `dir`, which must exist.
    pub fn save(&self, dir: &Path) -> Result<()> {
        for name in FILES {
            let source = self.dir.join(name);
            if name == "chat_template.jinja" && self.replaced {
                let template = self.template(false).map_or("", ChatTemplate::source);
                write_whole(&dir.join(name), template.as_bytes())?;
            } else if source.exists() && source != dir.join(name) {
                let bytes = fs::read(&source).map_err(Error::io(&source))?;
                write_whole(&dir.join(name), &bytes)?;
            }
        }
        Ok(())
    }

    /// A digest of everything that decides which ids a conversation becomes.
    pub fn fingerprint(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        let mut part = |bytes: &[u8]| {
            hasher.update(&(bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        };
        part(&self.json);
        part(&self.vocab_size.to_le_bytes());
        for (name, token) in &self.special {
            part(name.as_bytes());
            part(token.as_bytes());
        }
        for (name, template) in &self.templates {
            part(name.as_bytes());
            part(template.source().as_bytes());
        }
        for id in &self.eos {
            part(&id.to_le_bytes());
        }
        *hasher.finalize().as_bytes()
    }

    /// The special tokens' texts, longest first: what may end a turn.
    pub(crate) fn special_contents(&self) -> &[String] {
        &self.ends
    }

    /// The faster way to encode, if this tokenizer is of a kind that has one.
    fn fast(&self) -> Option<Arc<Bpe>> {
        guarded(|| Ok(Bpe::of(&self.json, &self.inner).map(Arc::new))).ok()?
    }

    fn check(&self, ids: &[u32]) -> Result<()> {
        match ids.iter().find(|id| **id as usize >= self.vocab_size) {
            None => Ok(()),
            Some(id) => Err(Error::Tokenizer(format!(
                "id {id} is out of range, the vocabulary has {}",
                self.vocab_size
            ))),
        }
    }
}

impl Habits {
    fn of(dir: &Path, config: &Map<String, Value>) -> Result<Self> {
        let path = dir.join("tokenizer_config.json");
        let left = |key: &str| match config.get(key).and_then(Value::as_str) {
            None if config.get(key).is_none_or(Value::is_null) => Ok(false),
            Some("right") => Ok(false),
            Some("left") => Ok(true),
            _ => Err(Error::file(
                &path,
                format!("{key} must be `left` or `right`, not {}", config[key]),
            )),
        };
        let segments = match config.get("model_input_names") {
            Some(Value::Array(names)) => names.iter().any(|name| name == "token_type_ids"),
            _ => {
                let class = config.get("tokenizer_class").and_then(Value::as_str);
                let class = class.unwrap_or_default();
                SEGMENTED.contains(&class.strip_suffix("Fast").unwrap_or(class))
            }
        };
        Ok(Self {
            segments,
            padding_left: left("padding_side")?,
            truncation_left: left("truncation_side")?,
        })
    }
}

/// Text from ids that come one at a time; see [`Tokenizer::stream`].
///
/// A character may take several tokens, and how a token looks may depend on
/// the one before it (SentencePiece drops the blank of the first). So the last
/// few tokens are decoded together and only what is certain is handed out.
#[derive(Debug)]
pub struct DecodeStream<'t> {
    tokenizer: &'t Tokenizer,
    skip_special_tokens: bool,
    /// The tokens whose text is `shown`, and from `settled` on those still held back.
    ids: Vec<u32>,
    settled: usize,
    shown: String,
}

impl DecodeStream<'_> {
    /// Takes the next id; gives the text that is certain now, if any.
    pub fn push(&mut self, id: u32) -> Result<Option<String>> {
        self.tokenizer.check(&[id])?;
        self.ids.push(id);
        let text = self.decode(&self.ids)?;
        if text.ends_with(char::REPLACEMENT_CHARACTER) {
            return Ok(None);
        }
        self.emit(text)
    }

    /// The text that is still held back: what looks like part of a character and will stay it.
    pub fn finish(mut self) -> Result<Option<String>> {
        let text = self.decode(&self.ids)?;
        self.emit(text)
    }

    fn decode(&self, ids: &[u32]) -> Result<String> {
        self.tokenizer.decode(ids, self.skip_special_tokens)
    }

    fn emit(&mut self, text: String) -> Result<Option<String>> {
        let known = common_prefix(&self.shown, &text);
        if known == text.len() {
            return Ok(None);
        }
        // The newest tokens stay, as context for the next one.
        self.ids.drain(..self.settled);
        self.settled = self.ids.len();
        self.shown = self.decode(&self.ids)?;
        Ok(Some(text[known..].to_owned()))
    }
}

/// How many bytes of `a` and `b` agree from the start, in whole characters.
pub(crate) fn common_prefix(a: &str, b: &str) -> usize {
    let agree = a.bytes().zip(b.bytes()).take_while(|(x, y)| x == y).count();
    (0..=agree)
        .rev()
        .find(|at| a.is_char_boundary(*at) && b.is_char_boundary(*at))
        .unwrap_or(0)
}

/// Parses `tokenizer.json` with truncation and padding off.
fn parse(path: &Path, json: &[u8]) -> Result<tokenizers::Tokenizer> {
    // `tokenizers` unwraps where JSON breaks off inside some of its parts.
    serde_json::from_slice::<serde::de::IgnoredAny>(json)
        .map_err(|error| Error::file(path, format!("not JSON: {error}")))?;
    let mut inner = guarded(|| tokenizers::Tokenizer::from_bytes(json))
        .map_err(|error| Error::file(path, format!("not a tokenizer: {error}")))?;
    inner.with_padding(None);
    inner
        .with_truncation(None)
        .map_err(|error| Error::file(path, error.to_string()))?;
    Ok(inner)
}

/// Adds the tokens that are listed beside `tokenizer.json` and not in it, at their ids.
fn add_tokens(
    inner: &mut tokenizers::Tokenizer,
    dir: &Path,
    config: &Map<String, Value>,
) -> Result<()> {
    let mut listed: BTreeMap<u32, AddedToken> = BTreeMap::new();
    let path = dir.join("tokenizer_config.json");
    if let Some(Value::Object(tokens)) = config.get("added_tokens_decoder") {
        for (id, token) in tokens {
            let id = id.parse().map_err(|_| {
                Error::file(&path, format!("added_tokens_decoder: `{id}` is not an id"))
            })?;
            let flag = |name: &str| token.get(name).and_then(Value::as_bool);
            let special = flag("special").unwrap_or(false);
            let Some(content) = token.get("content").and_then(Value::as_str) else {
                return Err(Error::file(
                    &path,
                    format!("added_tokens_decoder: {id} has no `content`"),
                ));
            };
            let token = AddedToken::from(content, special)
                .lstrip(flag("lstrip").unwrap_or(false))
                .rstrip(flag("rstrip").unwrap_or(false))
                .single_word(flag("single_word").unwrap_or(false))
                .normalized(flag("normalized").unwrap_or(!special));
            listed.insert(id, token);
        }
    }
    let older = dir.join("added_tokens.json");
    for (token, id) in read_object(&older)? {
        let id = id.as_u64().and_then(|id| u32::try_from(id).ok());
        let Some(id) = id else {
            return Err(Error::file(&older, format!("`{token}` has no id")));
        };
        listed
            .entry(id)
            .or_insert_with(|| AddedToken::from(token, false));
    }
    for (id, token) in listed {
        let content = token.content.clone();
        if inner.token_to_id(&content).is_none() {
            inner.add_tokens([token]).map_err(refused)?;
        }
        let got = inner.token_to_id(&content);
        if got != Some(id) {
            return Err(Error::file(
                &path,
                format!(
                    "token `{content}` should be id {id}, by tokenizer.json it is {}",
                    got.map_or("none".into(), |id| id.to_string())
                ),
            ));
        }
    }
    Ok(())
}

/// The texts of all special tokens, longest first, so that none hides in another.
fn special_contents(
    inner: &tokenizers::Tokenizer,
    special: &BTreeMap<String, String>,
) -> Vec<String> {
    let added = inner.get_added_tokens_decoder().into_values();
    let mut tokens: Vec<String> = added
        .filter(|token| token.special && !token.content.trim().is_empty())
        .map(|token| token.content)
        .chain(special.get("eos_token").cloned())
        .filter(|token| !token.is_empty())
        .collect();
    tokens.sort_by(|a, b| b.len().cmp(&a.len()).then_with(|| a.cmp(b)));
    tokens.dedup();
    tokens
}

/// `bos_token` and the others, each a string or an object with `content`.
fn special_tokens(dir: &Path, config: &Map<String, Value>) -> Result<BTreeMap<String, String>> {
    let older = read_object(&dir.join("special_tokens_map.json"))?;
    let mut special = BTreeMap::new();
    for name in SPECIAL {
        let value = match config.get(name) {
            Some(value) => value,
            None => match older.get(name) {
                Some(value) => value,
                None => continue,
            },
        };
        let content = match value {
            Value::Null => continue,
            Value::String(content) => content,
            Value::Object(token) if token.get("content").is_some_and(Value::is_string) => {
                token["content"].as_str().unwrap_or_default()
            }
            other => {
                return Err(Error::file(
                    &dir.join("tokenizer_config.json"),
                    format!("{name} must be a string, not {}", kind(other)),
                ));
            }
        };
        special.insert(name.to_owned(), content.to_owned());
    }
    Ok(special)
}

/// The special tokens that classes of `transformers` have where no file names them.
const DEFAULTS: [(&str, &[(&str, &str)]); 3] = [
    (
        "Bert",
        &[
            ("unk_token", "[UNK]"),
            ("sep_token", "[SEP]"),
            ("pad_token", "[PAD]"),
            ("cls_token", "[CLS]"),
            ("mask_token", "[MASK]"),
        ],
    ),
    (
        "Roberta",
        &[
            ("bos_token", "<s>"),
            ("eos_token", "</s>"),
            ("unk_token", "<unk>"),
            ("sep_token", "</s>"),
            ("pad_token", "<pad>"),
            ("cls_token", "<s>"),
            ("mask_token", "<mask>"),
        ],
    ),
    (
        "T5",
        &[
            ("eos_token", "</s>"),
            ("unk_token", "<unk>"),
            ("pad_token", "<pad>"),
        ],
    ),
];

/// Adds what a tokenizer's class says and no file does, as far as the vocabulary has it.
fn add_defaults(
    special: &mut BTreeMap<String, String>,
    inner: &tokenizers::Tokenizer,
    config: &Map<String, Value>,
) {
    let class = config.get("tokenizer_class").and_then(Value::as_str);
    let class = class.unwrap_or_default();
    let class = class.strip_suffix("Fast").unwrap_or(class);
    let class = class.strip_suffix("Tokenizer").unwrap_or(class);
    let known = DEFAULTS.iter().find(|(name, _)| *name == class);
    for (name, token) in known.map_or(&[][..], |(_, tokens)| tokens) {
        // A name that is there with null was taken away on purpose.
        if !config.contains_key(*name) && inner.token_to_id(token).is_some() {
            special
                .entry((*name).to_owned())
                .or_insert_with(|| (*token).to_owned());
        }
    }
}

/// Tokens that a configuration names are special, as in Python, whatever `tokenizer.json` says of them: found in a text before it is
/// cut into words, and left out of an answer.
fn make_special(
    inner: &mut tokenizers::Tokenizer,
    special: &BTreeMap<String, String>,
) -> Result<()> {
    let added = inner.get_added_tokens_decoder();
    let is_added = |token: &String| added.values().any(|it| it.content == *token);
    let mut new: Vec<AddedToken> = Vec::new();
    for token in special.values() {
        if inner.token_to_id(token).is_some() && !is_added(token) {
            new.push(AddedToken::from(token.clone(), true));
        }
    }
    if !new.is_empty() {
        inner.add_special_tokens(new).map_err(refused)?;
    }
    Ok(())
}

/// The chat templates by name; a single one is named `default`.
fn templates(
    dir: &Path,
    config: &Map<String, Value>,
    special: &BTreeMap<String, String>,
) -> Result<BTreeMap<String, ChatTemplate>> {
    let jinja = dir.join("chat_template.jinja");
    let json = dir.join("chat_template.json");
    let (path, value) = if jinja.exists() {
        let text = fs::read_to_string(&jinja).map_err(Error::io(&jinja))?;
        (jinja, Value::String(text))
    } else if let Some(value) = config.get("chat_template") {
        (dir.join("tokenizer_config.json"), value.clone())
    } else {
        let mut object = read_object(&json)?;
        let value = object.remove("chat_template").unwrap_or_default();
        (json, value)
    };
    let compile = |text: &str| {
        ChatTemplate::compile(text, special).map_err(|error| Error::file(&path, error.to_string()))
    };
    match &value {
        Value::Null => Ok(BTreeMap::new()),
        Value::String(text) => Ok(BTreeMap::from([("default".into(), compile(text)?)])),
        Value::Array(named) => named
            .iter()
            .map(|entry| {
                let text = |key: &str| entry.get(key).and_then(Value::as_str);
                match (text("name"), text("template")) {
                    (Some(name), Some(template)) => Ok((name.to_owned(), compile(template)?)),
                    _ => Err(Error::file(
                        &path,
                        "a named chat template needs `name` and `template`",
                    )),
                }
            })
            .collect(),
        other => Err(Error::file(
            &path,
            format!("chat_template must be a string, not {}", kind(other)),
        )),
    }
}

/// Appends every `eos_token_id` of a JSON file.
fn eos_of(path: &Path, eos: &mut Vec<u32>) -> Result<()> {
    let config = read_object(path)?;
    let ids = match config.get("eos_token_id") {
        None | Some(Value::Null) => return Ok(()),
        Some(Value::Array(ids)) => ids.as_slice(),
        Some(id) => std::slice::from_ref(id),
    };
    for id in ids {
        let Some(id) = id.as_u64().and_then(|id| u32::try_from(id).ok()) else {
            return Err(Error::file(
                path,
                format!("eos_token_id: {id} is not an id"),
            ));
        };
        if !eos.contains(&id) {
            eos.push(id);
        }
    }
    Ok(())
}

/// A JSON object from a file; empty where there is no such file.
fn read_object(path: &Path) -> Result<Map<String, Value>> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Map::new()),
        Err(error) => return Err(Error::io(path)(error)),
    };
    serde_json::from_slice(&bytes).map_err(|error| Error::file(path, format!("not JSON: {error}")))
}

/// Writes a file so that it is there whole or not at all.
fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let dir = path.parent().unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(dir).map_err(Error::io(dir))?;
    file.write_all(bytes).map_err(Error::io(path))?;
    readable_by_all(file.as_file()).map_err(Error::io(path))?;
    file.persist(path)
        .map_err(|error| Error::io(path)(error.error))?;
    Ok(())
}

/// Temporary files are private to their owner; finished ones should not be.
#[cfg(unix)]
pub(crate) fn readable_by_all(file: &fs::File) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    file.set_permissions(fs::Permissions::from_mode(0o644))
}

/// Temporary files are private to their owner only on Unix.
#[cfg(not(unix))]
pub(crate) fn readable_by_all(_: &fs::File) -> std::io::Result<()> {
    Ok(())
}

/// Turns a panic of `tokenizers` over a strange configuration into an error.
pub(crate) fn guarded<T>(work: impl FnOnce() -> tokenizers::Result<T>) -> tokenizers::Result<T> {
    catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|_| Err("the tokenizers library broke down over this configuration".into()))
}

pub(crate) fn refused(error: Box<dyn std::error::Error + Send + Sync>) -> Error {
    Error::Tokenizer(error.to_string())
}
