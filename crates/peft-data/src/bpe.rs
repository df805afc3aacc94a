//! Byte-level BPE, fast, for the tokenizers that most decoders have.
//!
//! The `tokenizers` crate keeps, for each piece of text, how every byte of it
//! came about through normalisers and pre-tokenizers. That generality costs
//! most of its time. The tokenizers of GPT-2, SmolLM, Llama 3 and Qwen do only
//! this:
//!
//! ```text
//! text ─ added tokens ─► segments ─ one of three patterns ─► words ─ merges by rank ─► ids
//! ```
//!
//! Words repeat (Zipf), so a word's ids are looked up; the patterns are written
//! out by hand; an offset is a sum of lengths. This must give the very ids of
//! `tokenizers`, so it is careful three times over: a configuration with
//! anything else in it is not taken on; what a letter, a number or a blank is,
//! the regex engine of `tokenizers` itself is asked, character by character;
//! and before its first use it is compared with `tokenizers` on a probe text.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use serde_json::Value;
use tokenizers::Tokenizer;
use tokenizers::utils::SysRegex;

use crate::tokenizer::Offsets;

/// A byte-level BPE with the pattern and the added tokens around it.
pub(crate) struct Bpe {
    /// Found in the text as it is, then in what is left: longest first.
    added: [Added; 2],
    digits_alone: bool,
    pattern: Pattern,
    /// Whether text that is not ASCII has to be normalised, which is left to `tokenizers`.
    normalises: bool,
    /// The id of each single byte; some vocabularies lack those that UTF-8 never has.
    bytes: [Option<u32>; 256],
    /// Pairs of ids that merge: their rank and the id they become.
    merges: Table<(u32, u32), (u32, u32)>,
    /// Words that are tokens, where those are not put together from merges.
    whole: Table<Box<[u8]>, u32>,
    /// How many bytes each id stands for.
    lengths: Table<u32, u32>,
    /// What goes in front and behind where special tokens are asked for.
    around: (Vec<u32>, Vec<u32>),
    classes: [SysRegex; 3],
    idle: Mutex<Vec<Memory>>,
}

/// The patterns by which text is cut into words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pattern {
    /// `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`
    Gpt2,
    /// [`MODERN`] with so many digits together.
    Modern { digits: usize },
}

/// The pattern of Llama 3; that of Qwen has `\p{N}` for `\p{N}{1,3}`.
const MODERN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// What a thread learns and keeps: the ids of words, the classes of characters.
#[derive(Default)]
pub(crate) struct Memory {
    words: Table<Box<[u8]>, Box<[u32]>>,
    classes: Table<char, Class>,
}

/// Words after which a memory starts anew.
const MAX_WORDS: usize = 1 << 18;
/// Bytes from which on a word is left to `tokenizers`: merging here is quadratic.
const MAX_WORD: usize = 256;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    Letter,
    Number,
    Blank,
    Other,
}

/// Added tokens by their first byte, longest first.
#[derive(Default)]
struct Added(Table<u8, Vec<AddedToken>>);

/// The bytes of an added token and its id.
type AddedToken = (Box<[u8]>, u32);

impl Bpe {
    /// The same tokenizer, if it is of the kind that this file knows.
    pub(crate) fn of(json: &[u8], reference: &Tokenizer) -> Option<Self> {
        let json: Value = serde_json::from_slice(json).ok()?;
        let model = &json["model"];
        let absent = |key: &str| matches!(&model[key], Value::Null) || model[key] == "";
        let plain = model["type"] == "BPE"
            && (absent("dropout") || model["dropout"] == 0.0)
            && absent("continuing_subword_prefix")
            && absent("end_of_word_suffix")
            && model["byte_fallback"] != true;
        if !plain {
            return None;
        }
        let normalises = match &json["normalizer"] {
            Value::Null => false,
            normalizer if normalizer["type"] == "NFC" => true,
            _ => return None,
        };
        let (digits_alone, pattern) = pattern(&json["pre_tokenizer"])?;
        let mut bpe = Bpe {
            added: added(reference)?,
            digits_alone,
            pattern,
            normalises,
            bytes: [None; 256],
            merges: Table::default(),
            whole: Table::default(),
            lengths: Table::default(),
            around: around(reference)?,
            classes: [
                SysRegex::new(r"\p{L}").ok()?,
                SysRegex::new(r"\p{N}").ok()?,
                SysRegex::new(r"\s").ok()?,
            ],
            idle: Mutex::default(),
        };
        bpe.learn(model)?;
        bpe.agrees(reference).then_some(bpe)
    }

    /// Reads vocabulary and merges.
    fn learn(&mut self, model: &Value) -> Option<()> {
        let byte_of: HashMap<char, u8> = (0..=255).map(|byte| (byte_char(byte), byte)).collect();
        let mut ids: HashMap<&str, u32> = HashMap::new();
        for (token, id) in model["vocab"].as_object()? {
            let id = u32::try_from(id.as_u64()?).ok()?;
            ids.insert(token, id);
            let bytes: Option<Vec<u8>> = token.chars().map(|c| byte_of.get(&c).copied()).collect();
            if let Some(bytes) = bytes {
                self.lengths.insert(id, u32::try_from(bytes.len()).ok()?);
                if model["ignore_merges"] == true {
                    self.whole.insert(bytes.into(), id);
                }
            }
        }
        for byte in 0..=255u8 {
            self.bytes[usize::from(byte)] = ids.get(byte_char(byte).to_string().as_str()).copied();
        }
        for (rank, merge) in (0u32..).zip(model["merges"].as_array()?) {
            let (left, right) = match merge {
                Value::String(pair) => pair.split_once(' ')?,
                pair => (pair[0].as_str()?, pair[1].as_str()?),
            };
            let pair = (*ids.get(left)?, *ids.get(right)?);
            let merged = *ids.get(format!("{left}{right}").as_str())?;
            self.merges.insert(pair, (rank, merged));
        }
        Some(())
    }

    /// Compares with the reference on text with something of everything.
    fn agrees(&self, reference: &Tokenizer) -> bool {
        let added = self
            .added
            .iter()
            .flat_map(|added| added.0.values().flatten());
        let mut probe = String::from(PROBE);
        for (token, _) in added.take(40) {
            probe.push_str(&String::from_utf8_lossy(token));
            probe.push_str(" a\n");
        }
        let ours = self.encode(&probe, true, reference);
        let theirs = reference.encode_fast(probe.as_str(), true);
        matches!((ours, theirs), (Ok((ids, _)), Ok(theirs)) if ids == theirs.get_ids())
    }

    /// The ids of `text` and the byte range that each came from.
    pub(crate) fn encode(
        &self,
        text: &str,
        add_special_tokens: bool,
        reference: &Tokenizer,
    ) -> tokenizers::Result<(Vec<u32>, Vec<Offsets>)> {
        let mut memory = self.lock().pop().unwrap_or_default();
        let mut run = Run {
            bpe: self,
            reference,
            memory: &mut memory,
            text,
            ids: Vec::with_capacity(text.len() / 3),
            offsets: Vec::with_capacity(text.len() / 3),
        };
        let none = (Vec::new(), Vec::new());
        let (before, after) = if add_special_tokens {
            &self.around
        } else {
            &none
        };
        for id in before {
            run.push(*id, 0..0);
        }
        run.added(0, 0..text.len())?;
        for id in after {
            run.push(*id, text.len()..text.len());
        }
        let out = (run.ids, run.offsets);
        if memory.words.len() < MAX_WORDS {
            self.lock().push(memory);
        }
        Ok(out)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Memory>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks the engine that the patterns are written for.
    fn class(&self, c: char) -> Class {
        let mut buffer = [0; 4];
        let text = c.encode_utf8(&mut buffer);
        let [letter, number, blank] = &self.classes;
        let is = |class: &SysRegex| class.find_iter(text).next().is_some();
        match () {
            () if is(letter) => Class::Letter,
            () if is(number) => Class::Number,
            () if is(blank) => Class::Blank,
            () => Class::Other,
        }
    }
}

/// One text on its way to ids.
struct Run<'a> {
    bpe: &'a Bpe,
    reference: &'a Tokenizer,
    memory: &'a mut Memory,
    text: &'a str,
    ids: Vec<u32>,
    offsets: Vec<Offsets>,
}

impl Run<'_> {
    fn push(&mut self, id: u32, range: Range<usize>) {
        self.ids.push(id);
        self.offsets.push((range.start, range.end));
    }

    /// Cuts out the added tokens of one kind, then those of the next.
    fn added(&mut self, kind: usize, range: Range<usize>) -> tokenizers::Result<()> {
        let bpe = self.bpe;
        let Some(added) = bpe.added.get(kind) else {
            return self.segment(range);
        };
        let (mut from, mut at) = (range.start, range.start);
        while at < range.end {
            match added.at(&self.text.as_bytes()[at..range.end]) {
                Some((length, id)) => {
                    self.added(kind + 1, from..at)?;
                    self.push(id, at..at + length);
                    at += length;
                    from = at;
                }
                None => at += 1,
            }
        }
        self.added(kind + 1, from..range.end)
    }

    /// Text without added tokens.
    fn segment(&mut self, range: Range<usize>) -> tokenizers::Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let text = &self.text[range.clone()];
        // ſ is a form of s to a pattern that ignores case.
        let odd = !text.is_ascii() && (self.bpe.normalises || text.contains('ſ'));
        if odd {
            return self.refer(range);
        }
        if !self.bpe.digits_alone {
            return self.words(range);
        }
        let mut from = range.start;
        for (at, digit) in text.match_indices(char::is_numeric) {
            let at = range.start + at;
            self.words(from..at)?;
            from = at + digit.len();
            self.words(at..from)?;
        }
        self.words(from..range.end)
    }

    /// Leaves a segment to the reference.
    fn refer(&mut self, range: Range<usize>) -> tokenizers::Result<()> {
        let encoding = self.reference.encode(&self.text[range.clone()], false)?;
        for (id, (start, end)) in encoding.get_ids().iter().zip(encoding.get_offsets()) {
            self.push(*id, range.start + start..range.start + end);
        }
        Ok(())
    }

    /// Cuts text into words and appends their ids.
    fn words(&mut self, range: Range<usize>) -> tokenizers::Result<()> {
        let mut at = range.start;
        while at < range.end {
            let text = &self.text[..range.end];
            let end = match self.bpe.pattern {
                Pattern::Gpt2 => self.gpt2(text, at),
                Pattern::Modern { digits } => self.modern(text, at, digits),
            };
            if end - at > MAX_WORD || !self.word(at..end) {
                self.odd_word(at..end)?;
            }
            at = end;
        }
        Ok(())
    }

    /// Appends the ids of a word, unless it has bytes that the vocabulary lacks.
    fn word(&mut self, range: Range<usize>) -> bool {
        let bytes = &self.text.as_bytes()[range.clone()];
        if !self.memory.words.contains_key(bytes) {
            let Some(ids) = self.bpe.merge(bytes) else {
                return false;
            };
            self.memory.words.insert(bytes.into(), ids.into());
        }
        let mut at = range.start;
        for id in &self.memory.words[bytes] {
            let length = self
                .bpe
                .lengths
                .get(id)
                .map_or(0, |length| *length as usize);
            self.ids.push(*id);
            self.offsets.push((at, at + length));
            at += length;
        }
        true
    }

    /// A word that is long, or has bytes that are no tokens: `tokenizers` has its ways with it.
    fn odd_word(&mut self, range: Range<usize>) -> tokenizers::Result<()> {
        let model = self.reference.get_model();
        let spelt: String = self.text.as_bytes()[range.clone()]
            .iter()
            .map(|byte| byte_char(*byte))
            .collect();
        let mut at = range.start;
        for token in tokenizers::Model::tokenize(model, &spelt)? {
            let length = token.value.chars().count();
            self.push(token.id, at..at + length);
            at += length;
        }
        Ok(())
    }

    fn class(&mut self, text: &str, at: usize) -> Option<(Class, usize)> {
        let byte = *text.as_bytes().get(at)?;
        if byte.is_ascii() {
            return Some((ASCII[usize::from(byte)], 1));
        }
        let c = text[at..].chars().next()?;
        let bpe = self.bpe;
        let class = *self.memory.classes.entry(c).or_insert_with(|| bpe.class(c));
        Some((class, c.len_utf8()))
    }

    /// Where a run of one class from `at` on ends.
    fn run(&mut self, text: &str, mut at: usize, class: Class, most: usize) -> usize {
        for _ in 0..most {
            match self.class(text, at) {
                Some((found, length)) if found == class => at += length,
                _ => break,
            }
        }
        at
    }

    /// `\s+(?!\S)|\s+`: blanks, of which the last is left for the word after them.
    fn blanks(&mut self, text: &str, at: usize) -> usize {
        let end = self.run(text, at, Class::Blank, usize::MAX);
        let last = text[at..end]
            .char_indices()
            .next_back()
            .map_or(0, |(last, _)| last);
        if end == text.len() || last == 0 {
            end
        } else {
            at + last
        }
    }

    fn gpt2(&mut self, text: &str, at: usize) -> usize {
        if let Some(length) = contraction(&text.as_bytes()[at..], false) {
            return at + length;
        }
        let word = at + usize::from(text.as_bytes()[at] == b' ');
        match self.class(text, word) {
            None | Some((Class::Blank, _)) => self.blanks(text, at),
            Some((class, _)) => self.run(text, word, class, usize::MAX),
        }
    }

    fn modern(&mut self, text: &str, at: usize, digits: usize) -> usize {
        let bytes = text.as_bytes();
        if let Some(length) = contraction(&bytes[at..], true) {
            return at + length;
        }
        let Some((class, length)) = self.class(text, at) else {
            return text.len();
        };
        let letters = match class {
            Class::Letter => Some(at),
            Class::Number => return self.run(text, at, Class::Number, digits),
            _ if matches!(bytes[at], b'\r' | b'\n') => None,
            _ => Some(at + length),
        };
        if let Some(from) = letters {
            let end = self.run(text, from, Class::Letter, usize::MAX);
            if end > from {
                return end;
            }
        }
        let signs = at + usize::from(bytes[at] == b' ');
        let end = self.run(text, signs, Class::Other, usize::MAX);
        if end > signs {
            let breaks = bytes[end..]
                .iter()
                .take_while(|byte| matches!(byte, b'\r' | b'\n'));
            return end + breaks.count();
        }
        let end = self.run(text, at, Class::Blank, usize::MAX);
        match text[at..end].rfind(['\r', '\n']) {
            Some(last) => at + last + 1,
            None => self.blanks(text, at),
        }
    }
}

impl Bpe {
    /// Merges the bytes of a word, lowest rank first, leftmost of equals first.
    fn merge(&self, bytes: &[u8]) -> Option<Vec<u32>> {
        if let Some(id) = self.whole.get(bytes) {
            return Some(vec![*id]);
        }
        let ids = bytes.iter().map(|byte| self.bytes[usize::from(*byte)]);
        let mut ids: Vec<u32> = ids.collect::<Option<_>>()?;
        loop {
            let ranked = ids.windows(2).enumerate().filter_map(|(at, pair)| {
                let (rank, merged) = self.merges.get(&(pair[0], pair[1]))?;
                Some((*rank, at, *merged))
            });
            let Some((_, at, merged)) = ranked.min() else {
                return Some(ids);
            };
            ids[at] = merged;
            ids.remove(at + 1);
        }
    }
}

impl Added {
    /// The longest added token that `text` begins with.
    fn at(&self, text: &[u8]) -> Option<(usize, u32)> {
        let tokens = self.0.get(text.first()?)?;
        let token = tokens.iter().find(|(token, _)| text.starts_with(token));
        token.map(|(token, id)| (token.len(), *id))
    }
}

/// `'s|'t|'re|'ve|'m|'ll|'d`
fn contraction(text: &[u8], any_case: bool) -> Option<usize> {
    let (quote, rest) = text.split_first()?;
    if *quote != b'\'' {
        return None;
    }
    let fold = |byte: &u8| {
        if any_case {
            byte.to_ascii_lowercase()
        } else {
            *byte
        }
    };
    match (rest.first().map(fold), rest.get(1).map(fold)) {
        (Some(b's' | b't' | b'm' | b'd'), _) => Some(2),
        (Some(b'r' | b'v'), Some(b'e')) | (Some(b'l'), Some(b'l')) => Some(3),
        _ => None,
    }
}

/// What the pre-tokenizer does, if it is one of those known here.
fn pattern(pre: &Value) -> Option<(bool, Pattern)> {
    let byte_level = |pre: &Value, regex: bool| {
        pre["type"] == "ByteLevel"
            && pre["add_prefix_space"] == false
            && pre["use_regex"].as_bool().unwrap_or(true) == regex
    };
    if byte_level(pre, true) {
        return Some((false, Pattern::Gpt2));
    }
    let [first, second] = pre["pretokenizers"].as_array()?.as_slice() else {
        return None;
    };
    if first["type"] == "Digits" && first["individual_digits"] == true && byte_level(second, true) {
        return Some((true, Pattern::Gpt2));
    }
    let isolated =
        first["type"] == "Split" && first["behavior"] == "Isolated" && first["invert"] == false;
    if !isolated || !byte_level(second, false) {
        return None;
    }
    let regex = first["pattern"]["Regex"].as_str()?;
    let digits = match () {
        () if regex == MODERN => 3,
        () if regex == MODERN.replace(r"\p{N}{1,3}", r"\p{N}") => 1,
        () => return None,
    };
    Some((false, Pattern::Modern { digits }))
}

/// The added tokens: those found in the text as it is, and those found after normalising.
fn added(reference: &Tokenizer) -> Option<[Added; 2]> {
    let mut kinds = [Added::default(), Added::default()];
    for (id, token) in reference.get_added_tokens_decoder() {
        if token.lstrip || token.rstrip || token.single_word {
            return None;
        }
        let bytes = token.content.as_bytes();
        if let Some(first) = bytes.first() {
            let kind = &mut kinds[usize::from(token.normalized)];
            kind.0.entry(*first).or_default().push((bytes.into(), id));
        }
    }
    for tokens in kinds.iter_mut().flat_map(|kind| kind.0.values_mut()) {
        tokens.sort_by_key(|(token, _)| std::cmp::Reverse(token.len()));
    }
    Some(kinds)
}

/// What the post-processor puts around a text.
fn around(reference: &Tokenizer) -> Option<(Vec<u32>, Vec<u32>)> {
    let bare = reference.encode_fast("a", false).ok()?;
    let full = reference.encode_fast("a", true).ok()?;
    let (bare, full) = (bare.get_ids(), full.get_ids());
    let at = full
        .windows(bare.len().max(1))
        .position(|ids| ids == bare)?;
    Some((full[..at].to_vec(), full[at + bare.len()..].to_vec()))
}

/// The character by which byte-level vocabularies write a byte: GPT-2's table.
fn byte_char(byte: u8) -> char {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    if printable(byte) {
        return char::from(byte);
    }
    let nth = (0..byte).filter(|before| !printable(*before)).count() as u32;
    char::from_u32(256 + nth).unwrap_or(char::REPLACEMENT_CHARACTER)
}

/// The classes of ASCII, which every version of Unicode agrees on.
const ASCII: [Class; 128] = {
    let mut classes = [Class::Other; 128];
    let mut at = 0;
    while at < 128 {
        classes[at] = match at as u8 {
            b'a'..=b'z' | b'A'..=b'Z' => Class::Letter,
            b'0'..=b'9' => Class::Number,
            b'\t'..=b'\r' | b' ' => Class::Blank,
            _ => Class::Other,
        };
        at += 1;
    }
    classes
};

/// Something of everything that the patterns tell apart.
const PROBE: &str = "It's we'LL they're I'd  don't 'quoted' x'sy\r\n\r\n  two  blanks\t\ttabs \n \n\n a\u{b}b\u{c}c\u{1c}d\u{85}e\u{a0}f\u{2003}g \
1234567 3.14 x86_64 ²½Ⅷ٣ Zürich ÆØÅ naïve e\u{301} 你好，世界。 안녕 👩‍🚀👍🏽 -- ... !!!\n\n??\n {\"k\": [1, 2]}; (a) #b @c $d %e ~f `g` |h| \
supercalifragilisticexpialidocious AAAAAAAAaaaaaaaa        end   ";

/// A map with a quick hash: its keys are words and ids, nobody's choice of attack.
type Table<K, V> = HashMap<K, V, BuildHasherDefault<Quick>>;

/// The multiply-and-rotate hash of the Rust compiler.
#[derive(Default)]
struct Quick(u64);

impl Hasher for Quick {
    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.write_u64(u64::from_le_bytes(word));
        }
    }

    fn write_u8(&mut self, byte: u8) {
        self.write_u64(u64::from(byte));
    }

    fn write_u32(&mut self, word: u32) {
        self.write_u64(u64::from(word));
    }

    fn write_u64(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(5) ^ word).wrapping_mul(0x517c_c1b7_2722_0a95);
    }

    fn write_usize(&mut self, word: usize) {
        self.write_u64(word as u64);
    }

    fn finish(&self) -> u64 {
        // The high bits are the mixed ones, tables use the low.
        self.0.rotate_left(26)
    }
}

impl std::fmt::Debug for Bpe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bpe")
            .field("pattern", &self.pattern)
            .field("merges", &self.merges.len())
            .finish_non_exhaustive()
    }
}
