//! Texts, pairs and words as ids, cut to length by the tokenizer's own rules.
//!
//! Special tokens go where the tokenizer's post-processor puts them, and room
//! is made for them before a text is cut: `[CLS] a [SEP] b [SEP]` of 128 tokens
//! leaves 125 for both texts. Of a pair the longer text is cut until both are
//! as long, then both (`longest_first`); of a question and its context only the
//! context is, and what is cut off goes on in further windows, each with the
//! last `stride` tokens of the one before.
//!
//! A text is encoded whole and cut afterwards. The library can cut while it
//! encodes, but then (tokenizers 0.23.2) it stops at the limit: what should go
//! on in a further window is gone, and the longer of a pair looks as short as
//! the limit. Python's 0.23.3 cuts afterwards, too.

use tokenizers::{
    EncodeInput, Encoding, InputSequence, PostProcessor, PostProcessorWrapper, PreTokenizerWrapper,
    TruncationDirection, TruncationParams, TruncationStrategy,
};

use crate::error::{Error, Result};
use crate::tokenizer::{Tokenizer, guarded, refused};

/// A tokenizer that cuts to length.
pub(crate) struct Cutter {
    /// Neither cuts nor adds special tokens.
    plain: tokenizers::Tokenizer,
    /// Does both to what the other made.
    cut: tokenizers::Tokenizer,
    max_length: usize,
    stride: usize,
    /// Words have a blank before them, also the first: see [`Cutter::words`].
    blank: bool,
}

impl Cutter {
    /// Cuts texts and pairs.
    pub(crate) fn texts(tokenizer: &Tokenizer, name: &str, max_length: usize) -> Result<Self> {
        Self::new(
            tokenizer,
            name,
            max_length,
            0,
            TruncationStrategy::LongestFirst,
        )
    }

    /// Cuts lists of words: see [`Cutter::words`].
    pub(crate) fn lists(tokenizer: &Tokenizer, name: &str, max_length: usize) -> Result<Self> {
        let mut cutter = Self::texts(tokenizer, name, max_length)?;
        match cutter.plain.get_pre_tokenizer() {
            Some(PreTokenizerWrapper::ByteLevel(it)) => {
                let it = it.add_prefix_space(true);
                cutter.plain.with_pre_tokenizer(Some(it));
            }
            Some(it) => cutter.blank = lacks_blank(it),
            None => {}
        }
        Ok(cutter)
    }

    /// Cuts the second of a pair into windows that overlap by `stride` tokens.
    pub(crate) fn windows(
        tokenizer: &Tokenizer,
        name: &str,
        max_length: usize,
        stride: usize,
    ) -> Result<Self> {
        Self::new(
            tokenizer,
            name,
            max_length,
            stride,
            TruncationStrategy::OnlySecond,
        )
    }

    fn new(
        tokenizer: &Tokenizer,
        name: &str,
        max_length: usize,
        stride: usize,
        strategy: TruncationStrategy,
    ) -> Result<Self> {
        let mut cut = tokenizer.machinery().clone();
        let added = |pair| {
            let processor = cut.get_post_processor();
            processor.map_or(0, |it| it.added_tokens(pair))
        };
        // A row needs a token beside the special ones, a pair one for each text.
        let least = (added(false) + 1).max(added(true) + 2);
        if max_length < least {
            return Err(Error::Option(format!(
                "{name} is {max_length}, a row of this tokenizer needs {least} tokens at least"
            )));
        }
        if stride + least > max_length {
            return Err(Error::Option(format!(
                "doc_stride is {stride}, which leaves nothing new for a window of {max_length} \
                 tokens"
            )));
        }
        let direction = match tokenizer.truncates_left() {
            true => TruncationDirection::Left,
            false => TruncationDirection::Right,
        };
        let params = TruncationParams {
            direction,
            max_length,
            strategy,
            stride,
        };
        let mut plain = cut.clone();
        plain.with_post_processor(None::<PostProcessorWrapper>);
        cut.with_truncation(Some(params)).map_err(refused)?;
        Ok(Self {
            blank: false,
            plain,
            cut,
            max_length,
            stride,
        })
    }

    /// One text.
    pub(crate) fn single(&self, text: &str) -> Result<Encoding> {
        self.finish(self.encode(text.into())?, None)
    }

    /// Two texts.
    pub(crate) fn pair(&self, first: &str, second: &str) -> Result<Encoding> {
        self.finish(
            self.encode(first.into())?,
            Some(self.encode(second.into())?),
        )
    }

    /// A question and its context: the first window, the others as its overflow.
    pub(crate) fn question(&self, question: &str, context: &str) -> Result<Encoding> {
        let question = self.encode(question.into())?;
        let added = self.cut.get_post_processor();
        let taken = question.len() + added.map_or(0, |it| it.added_tokens(true));
        if taken + self.stride >= self.max_length {
            return Err(Error::Tokenizer(format!(
                "the question takes {taken} of {} tokens, which leaves no room for windows that \
                 overlap by {} (raise max_length or lower doc_stride)",
                self.max_length, self.stride
            )));
        }
        self.finish(question, Some(self.encode(context.into())?))
    }

    /// Words: `get_word_ids` of the result says which word a token is of.
    ///
    /// A byte-level tokenizer knows a word by the blank before it, so there each word gets one, but for special tokens.
    /// (`transformers` asks for `add_prefix_space=True` here.) Where other steps split a word before, the blank is put in front of all.
    pub(crate) fn words(&self, words: &[String]) -> Result<Encoding> {
        let words = words.iter().map(|word| match self.blank {
            true => format!(" {word}"),
            false => word.clone(),
        });
        let words: InputSequence<'_> = words.collect::<Vec<String>>().into();
        self.finish(self.encode(words.into())?, None)
    }

    fn encode(&self, input: EncodeInput<'_>) -> Result<Encoding> {
        guarded(|| self.plain.encode(input, false)).map_err(refused)
    }

    /// Cuts to length and puts special tokens around.
    fn finish(&self, first: Encoding, second: Option<Encoding>) -> Result<Encoding> {
        let second = second.map(|mut second| {
            // A post-processor sets these for the first window alone.
            second.set_type_ids(vec![1; second.len()]);
            second
        });
        guarded(|| self.cut.post_process(first, second, true)).map_err(refused)
    }
}

/// Whether a byte-level pre-tokenizer takes words as they come.
fn lacks_blank(pre: &PreTokenizerWrapper) -> bool {
    match pre {
        PreTokenizerWrapper::ByteLevel(it) => !it.add_prefix_space,
        PreTokenizerWrapper::Sequence(list) => {
            let list: &[PreTokenizerWrapper] = list.as_ref();
            list.iter().any(lacks_blank)
        }
        _ => false,
    }
}
