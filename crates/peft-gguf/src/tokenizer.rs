//! The tokenizer of a GGUF file, as the files that `tokenizers` and `transformers` read.
//!
//! GGUF keeps a vocabulary with a type for each token, and one of two models:
//!
//! - `gpt2`: byte-level BPE. The merges are in the file; how text is cut into words first is only
//!   named (`tokenizer.ggml.pre`), so the rules of [`splitting`] are spelt out here, and a name that
//!   is not among them is refused: a wrong rule gives slightly wrong tokens for ever after.
//! - `llama`: SentencePiece BPE with bytes as a last resort. The merges are not in the file, but
//!   follow from the scores: SentencePiece joins the two neighbours whose union has the best score,
//!   so every way to split a piece into two pieces is a merge, and its rank is that of the piece.
//!
//! Control tokens (type 3) become special tokens, which decoding can leave out; user-defined ones
//! (type 4) are matched in the text like them but stay in it. Unused ones (type 5, with which
//! converters fill the vocabulary up to the size of the embedding) never come out of a text and are
//! left out.

use crate::arch::{integers, token_id};
use crate::error::{Error, Result, nearest, shown};
use crate::file::Gguf;
use crate::import::{write_json, write_text};
use crate::metadata::{Array, Metadata, Value as Meta};
use serde_json::{Map, Value, json};
use std::collections::HashMap;
use std::path::Path;

const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";
const SCORES: &str = "tokenizer.ggml.scores";
const MERGES: &str = "tokenizer.ggml.merges";
const TEMPLATE: &str = "tokenizer.chat_template";

/// What SentencePiece writes for a space.
const SPACE: &str = "\u{2581}";

// token types
const NORMAL: i64 = 1;
const UNKNOWN: i64 = 2;
const CONTROL: i64 = 3;
const USER: i64 = 4;
const UNUSED: i64 = 5;

/// Writes `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json` and, where the file
/// has one, `chat_template.jinja` into the existing folder `dir`.
pub fn write_tokenizer(gguf: &Gguf, dir: &Path) -> Result<()> {
    let meta = gguf.metadata();
    let vocab = Vocab::read(meta)?;
    let files = Files::of(meta, &vocab)?;
    write_json(&dir.join("tokenizer.json"), &files.tokenizer)?;
    write_json(&dir.join("tokenizer_config.json"), &files.config)?;
    write_json(&dir.join("special_tokens_map.json"), &files.special)?;
    if let Some(template) = meta.text(TEMPLATE)? {
        write_text(&dir.join("chat_template.jinja"), template)?;
    }
    write_named_templates(meta, dir)
}

/// Templates with a name (`tool_use`, `rag`), where `transformers` looks for them. The name becomes a
/// file name, so it has to be one word.
fn write_named_templates(meta: &Metadata, dir: &Path) -> Result<()> {
    const FOLDER: &str = "additional_chat_templates";
    let prefix = format!("{TEMPLATE}.");
    let keys = meta.iter().map(|(key, _)| key);
    for name in keys.filter_map(|key| key.strip_prefix(&prefix)) {
        let key = format!("{prefix}{name}");
        let word = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
        if name.is_empty() || name.len() > 64 || !name.chars().all(word) {
            let problem = "the name of a template has 1 to 64 letters, digits, `_` and `-`";
            return Err(Error::key(meta.path(), &key, problem));
        }
        let folder = dir.join(FOLDER);
        std::fs::create_dir_all(&folder).map_err(|e| Error::io(&folder, "create", e))?;
        let template = meta.required(&key, meta.text(&key)?)?;
        write_text(&folder.join(format!("{name}.jinja")), template)?;
    }
    Ok(())
}

/// The model's name for its kind of tokenizer; `None` if the file comes without one.
pub(crate) fn kind(meta: &Metadata) -> Result<Option<&str>> {
    Ok(meta
        .text(MODEL)?
        .filter(|kind| !matches!(*kind, "none" | "no_vocab")))
}

/// What is written, apart from the template.
struct Files {
    tokenizer: Value,
    config: Value,
    special: Value,
}

impl Files {
    fn of(meta: &Metadata, vocab: &Vocab<'_>) -> Result<Files> {
        let model = kind(meta)?;
        let recipe = match meta.required(MODEL, model)? {
            "gpt2" => byte_level(meta, vocab)?,
            "llama" => sentence_piece(meta, vocab)?,
            other => {
                let problem = format!(
                    "unknown tokenizer `{}`, this build knows gpt2, llama{}",
                    shown(other),
                    nearest(other, ["gpt2", "llama"])
                );
                return Err(Error::key(meta.path(), MODEL, problem));
            }
        };
        let special = vocab.special(meta)?;
        let add_bos = flag(meta, "add_bos_token", recipe.add_bos)?;
        let add_eos = flag(meta, "add_eos_token", false)?;
        let around = |name: &str, wanted: bool| match (wanted, special.get(name)) {
            (false, _) => Ok(None),
            (true, Some((id, text))) => Ok(Some((*id, text.as_str()))),
            (true, None) => {
                let key = format!("tokenizer.ggml.{name}_id");
                let problem = "is missing, but is to be added to every text";
                Err(Error::key(meta.path(), &key, problem))
            }
        };
        let (bos, eos) = (around("bos_token", add_bos)?, around("eos_token", add_eos)?);
        let tokenizer = json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": vocab.added(),
            "normalizer": recipe.normalizer,
            "pre_tokenizer": recipe.pre_tokenizer,
            "post_processor": frame(bos, eos),
            "decoder": recipe.decoder,
            "model": recipe.model,
        });
        Ok(Files {
            tokenizer,
            config: config(meta, vocab, &special, add_bos, add_eos)?,
            special: special
                .iter()
                .map(|(name, (_, text))| (name.clone(), Value::from(text.as_str())))
                .collect(),
        })
    }
}

/// The tokens, with their types and the way back from text to id.
struct Vocab<'a> {
    path: &'a Path,
    texts: &'a [String],
    types: Vec<i64>,
    ids: HashMap<&'a str, usize>,
}

impl<'a> Vocab<'a> {
    fn read(meta: &'a Metadata) -> Result<Self> {
        let texts = meta.required(TOKENS, meta.texts(TOKENS)?)?;
        let types = meta
            .typed(TYPES, "an array of i32", integers)?
            .unwrap_or_else(|| vec![NORMAL; texts.len()]);
        if types.len() != texts.len() {
            let problem = format!("has {} entries for {} tokens", types.len(), texts.len());
            return Err(Error::key(meta.path(), TYPES, problem));
        }
        let wrong = |problem: String| Err(Error::key(meta.path(), TOKENS, problem));
        let mut ids = HashMap::with_capacity(texts.len());
        for (id, text) in texts.iter().enumerate() {
            if types[id] == UNUSED {
                continue;
            }
            if text.is_empty() && matches!(types[id], CONTROL | USER | UNKNOWN) {
                return wrong(format!("token {id} is special and empty"));
            }
            if let Some(first) = ids.insert(text.as_str(), id) {
                return wrong(format!(
                    "tokens {first} and {id} are both `{}`",
                    shown(text)
                ));
            }
        }
        Ok(Vocab {
            path: meta.path(),
            texts,
            types,
            ids,
        })
    }

    /// Tokens that can come out of a text, in the order of their ids.
    fn used(&self) -> impl Iterator<Item = (usize, &'a str, i64)> {
        let texts = self.texts.iter().map(String::as_str).enumerate();
        texts
            .zip(&self.types)
            .map(|((id, text), kind)| (id, text, *kind))
            .filter(|(_, _, kind)| *kind != UNUSED)
    }

    /// `model.vocab`
    fn map(&self) -> Map<String, Value> {
        self.used()
            .map(|(id, text, _)| (text.to_owned(), id.into()))
            .collect()
    }

    /// Tokens that are looked for in the text before anything else: id, text, whether special.
    fn matched(&self) -> impl Iterator<Item = (usize, &'a str, bool)> {
        self.used()
            .filter(|(_, _, kind)| matches!(*kind, UNKNOWN | CONTROL | USER))
            .map(|(id, text, kind)| (id, text, kind != USER))
    }

    /// `added_tokens`
    fn added(&self) -> Vec<Value> {
        let entry = |(id, text, special): (usize, &str, bool)| {
            json!({
                "id": id, "content": text, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": special,
            })
        };
        self.matched().map(entry).collect()
    }

    /// The tokens with a role: its name in Hugging Face's files, id and text.
    fn special(&self, meta: &Metadata) -> Result<indexmap::IndexMap<String, (u64, String)>> {
        let mut special = indexmap::IndexMap::new();
        for (role, name) in [
            ("bos", "bos_token"),
            ("eos", "eos_token"),
            ("unknown", "unk_token"),
            ("padding", "pad_token"),
        ] {
            if let Some(id) = token_id(meta, role, self.texts.len())? {
                special.insert(name.to_owned(), (id, self.texts[id as usize].clone()));
            }
        }
        Ok(special)
    }
}

/// The parts of `tokenizer.json` in which the two models differ.
struct Recipe {
    normalizer: Value,
    pre_tokenizer: Value,
    decoder: Value,
    model: Value,
    /// Whether texts begin with the first token where the file does not say.
    add_bos: bool,
}

/// A way to cut text into words before merging.
struct Splitting {
    /// llama.cpp's names for it.
    names: &'static [&'static str],
    normalizer: fn() -> Value,
    pre_tokenizer: fn(bool) -> Value,
    /// Whether a word that is a token stays whole, whatever the merges say.
    ignore_merges: bool,
    add_bos: bool,
}

const SPLITTINGS: &[Splitting] = &[
    Splitting {
        names: &["gpt-2", "default", "phi-2"],
        normalizer: || Value::Null,
        pre_tokenizer: |prefix| bytes(prefix, true),
        ignore_merges: false,
        add_bos: false,
    },
    Splitting {
        names: &["smollm", "starcoder", "refact"],
        normalizer: || Value::Null,
        pre_tokenizer: |prefix| {
            let digits = json!({"type": "Digits", "individual_digits": true});
            json!({"type": "Sequence", "pretokenizers": [digits, bytes(prefix, true)]})
        },
        ignore_merges: false,
        add_bos: false,
    },
    Splitting {
        names: &["qwen2"],
        normalizer: || json!({"type": "NFC"}),
        pre_tokenizer: |prefix| {
            words(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
                prefix,
            )
        },
        ignore_merges: false,
        add_bos: false,
    },
    Splitting {
        names: &["llama-bpe", "llama3", "llama-v3"],
        normalizer: || Value::Null,
        pre_tokenizer: |prefix| {
            words(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
                prefix,
            )
        },
        ignore_merges: true,
        add_bos: true,
    },
    Splitting {
        names: &["tekken"],
        normalizer: || Value::Null,
        pre_tokenizer: |prefix| {
            words(
                r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
                prefix,
            )
        },
        ignore_merges: true,
        add_bos: true,
    },
];

/// Bytes as printable characters, with GPT-2's own way to cut words or after another one.
fn bytes(prefix: bool, cut: bool) -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": true, "use_regex": cut})
}

fn words(regex: &str, prefix: bool) -> Value {
    let split = json!({
        "type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false,
    });
    json!({"type": "Sequence", "pretokenizers": [split, bytes(prefix, false)]})
}

/// The rule that `tokenizer.ggml.pre` names. Files from before that key existed have none; of these
/// only GPT-2's own are clear.
fn splitting(meta: &Metadata) -> Result<&'static Splitting> {
    let gpt2 = meta.text("general.architecture")? == Some("gpt2");
    let name = match meta.text(PRE)? {
        None if gpt2 => "gpt-2",
        name => meta.required(PRE, name)?,
    };
    SPLITTINGS
        .iter()
        .find(|s| s.names.contains(&name))
        .ok_or_else(|| {
            let known = || SPLITTINGS.iter().flat_map(|s| s.names).copied();
            let problem = format!(
                "unknown way to split text `{}`, this build knows {}{}",
                shown(name),
                known().collect::<Vec<_>>().join(", "),
                nearest(name, known())
            );
            Error::key(meta.path(), PRE, problem)
        })
}

/// `gpt2`: byte-level BPE with the merges of the file.
fn byte_level(meta: &Metadata, vocab: &Vocab<'_>) -> Result<Recipe> {
    let splitting = splitting(meta)?;
    let merges = meta.required(MERGES, meta.texts(MERGES)?)?;
    let merges: Vec<Value> = merges
        .iter()
        .enumerate()
        .map(|(rank, merge)| merge_of(vocab, rank, merge))
        .collect::<Result<_>>()?;
    let prefix = flag(meta, "add_space_prefix", false)?;
    Ok(Recipe {
        normalizer: (splitting.normalizer)(),
        pre_tokenizer: (splitting.pre_tokenizer)(prefix),
        decoder: json!({
            "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true,
        }),
        model: json!({
            "type": "BPE", "dropout": null, "unk_token": null,
            "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": splitting.ignore_merges,
            "vocab": vocab.map(), "merges": merges,
        }),
        add_bos: splitting.add_bos,
    })
}

/// A merge is two tokens with a space between, and their union is a token too.
fn merge_of(vocab: &Vocab<'_>, rank: usize, merge: &str) -> Result<Value> {
    let wrong = |problem: String| {
        let problem = format!("merge {rank}, `{}`: {problem}", shown(merge));
        Err(Error::key(vocab.path, MERGES, problem))
    };
    let Some((left, right)) = merge.split_once(' ') else {
        return wrong("expected two tokens with a space between".into());
    };
    let union = [left, right].concat();
    match [left, right, &union]
        .into_iter()
        .find(|t| !vocab.ids.contains_key(t))
    {
        None => Ok(json!([left, right])),
        Some(absent) => wrong(format!("`{}` is not a token", shown(absent))),
    }
}

/// `llama`: SentencePiece BPE, merges from scores.
fn sentence_piece(meta: &Metadata, vocab: &Vocab<'_>) -> Result<Recipe> {
    let scores = match meta.get(SCORES) {
        Some(Meta::Array(Array::F32(scores))) => scores.as_slice(),
        Some(other) => {
            let problem = format!("expected an array of f32, got {}", other.describe());
            return Err(Error::key(meta.path(), SCORES, problem));
        }
        None => meta.required(SCORES, None)?,
    };
    if scores.len() != vocab.texts.len() {
        let problem = format!(
            "has {} entries for {} tokens",
            scores.len(),
            vocab.texts.len()
        );
        return Err(Error::key(meta.path(), SCORES, problem));
    }
    for name in ["remove_extra_whitespaces", "escape_whitespaces"] {
        let usual = name == "escape_whitespaces";
        if flag(meta, name, usual)? != usual {
            let key = format!("tokenizer.ggml.{name}");
            return Err(Error::key(meta.path(), &key, "cannot be honoured"));
        }
    }
    let charsmap = "tokenizer.ggml.precompiled_charsmap";
    if meta.get(charsmap).is_some() {
        return Err(Error::key(meta.path(), charsmap, "cannot be honoured"));
    }
    let unknown = match token_id(meta, "unknown", vocab.texts.len())? {
        Some(id) => Some(vocab.texts[id as usize].as_str()),
        None => vocab.used().find(|t| t.2 == UNKNOWN).map(|t| t.1),
    };
    let prefix = flag(meta, "add_space_prefix", true)?;
    let to_piece = json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE});
    let to_text = json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "});
    let mut normalizers = vec![json!({"type": "Prepend", "prepend": SPACE}), to_piece];
    let mut decoders = vec![
        to_text,
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
        json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}),
    ];
    if !prefix {
        normalizers.remove(0);
        decoders.pop();
    }
    Ok(Recipe {
        normalizer: json!({"type": "Sequence", "normalizers": normalizers}),
        pre_tokenizer: Value::Null,
        decoder: json!({"type": "Sequence", "decoders": decoders}),
        model: json!({
            "type": "BPE", "dropout": null, "unk_token": unknown,
            "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": vocab.map(), "merges": merges_of(vocab, scores),
        }),
        add_bos: true,
    })
}

/// Every split of each normal piece into two pieces, best score first. Within one score longer left
/// halves come first, as in `transformers`' own conversion.
fn merges_of(vocab: &Vocab<'_>, scores: &[f32]) -> Vec<Value> {
    let mut merges: Vec<(f32, &str, &str)> = Vec::new();
    for (id, piece, _) in vocab.used().filter(|t| t.2 == NORMAL) {
        let splits = piece
            .char_indices()
            .skip(1)
            .map(|(at, _)| piece.split_at(at));
        let known = |t: &str| {
            vocab
                .ids
                .get(t)
                .is_some_and(|id| vocab.types[*id] == NORMAL)
        };
        let splits = splits.filter(|(left, right)| known(left) && known(right));
        merges.extend(splits.map(|(left, right)| (scores[id], left, right)));
    }
    let lengths = |m: &(f32, &str, &str)| (m.1.chars().count(), m.2.chars().count());
    merges.sort_by(|a, b| {
        b.0.total_cmp(&a.0)
            .then_with(|| lengths(b).cmp(&lengths(a)))
    });
    let pair = |(_, left, right): &(f32, &str, &str)| json!([left, right]);
    merges.iter().map(pair).collect()
}

/// Puts tokens before and after each text, or null where there are none.
fn frame(bos: Option<(u64, &str)>, eos: Option<(u64, &str)>) -> Value {
    if bos.is_none() && eos.is_none() {
        return Value::Null;
    }
    let special = |token: Option<(u64, &str)>, segment: u8| {
        token.map(|(_, text)| json!({"SpecialToken": {"id": text, "type_id": segment}}))
    };
    let text = |name: &str, segment: u8| {
        let text = Some(json!({"Sequence": {"id": name, "type_id": segment}}));
        [special(bos, segment), text, special(eos, segment)]
    };
    let single: Vec<Value> = text("A", 0).into_iter().flatten().collect();
    let pair: Vec<Value> = text("A", 0)
        .into_iter()
        .chain(text("B", 1))
        .flatten()
        .collect();
    let tokens: Map<String, Value> = [bos, eos]
        .into_iter()
        .flatten()
        .map(|(id, text)| {
            let entry = json!({"id": text, "ids": [id], "tokens": [text]});
            (text.to_owned(), entry)
        })
        .collect();
    json!({"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens})
}

/// `tokenizer_config.json`
fn config(
    meta: &Metadata,
    vocab: &Vocab<'_>,
    special: &indexmap::IndexMap<String, (u64, String)>,
    add_bos: bool,
    add_eos: bool,
) -> Result<Value> {
    let mut config = Map::new();
    config.insert("tokenizer_class".into(), "PreTrainedTokenizerFast".into());
    config.insert("add_bos_token".into(), add_bos.into());
    config.insert("add_eos_token".into(), add_eos.into());
    config.insert("clean_up_tokenization_spaces".into(), false.into());
    let arch = meta.text("general.architecture")?.unwrap_or_default();
    if let Some(length) = meta.integer(&format!("{arch}.context_length"))? {
        config.insert("model_max_length".into(), length.into());
    }
    for (name, (_, text)) in special {
        config.insert(name.clone(), text.as_str().into());
    }
    let decoder: Map<String, Value> = vocab
        .matched()
        .map(|(id, text, special)| {
            let entry = json!({
                "content": text, "lstrip": false, "normalized": false, "rstrip": false,
                "single_word": false, "special": special,
            });
            (id.to_string(), entry)
        })
        .collect();
    config.insert("added_tokens_decoder".into(), decoder.into());
    if let Some(template) = meta.text(TEMPLATE)? {
        config.insert("chat_template".into(), template.into());
    }
    Ok(Value::Object(config))
}

/// `tokenizer.ggml.<name>`, or what holds without it.
fn flag(meta: &Metadata, name: &str, default: bool) -> Result<bool> {
    let key = format!("tokenizer.ggml.{name}");
    Ok(meta.flag(&key)?.unwrap_or(default))
}
