//! Damage to files, for the tests that nothing panics over any.

use proptest::prelude::*;

/// What may happen to a file.
#[derive(Debug, Clone)]
pub(crate) enum Harm {
    Set(usize, u8),
    Insert(usize, Vec<u8>),
    Cut(usize),
    Remove(usize, usize),
    Repeat(usize, usize),
}

fn harm() -> impl Strategy<Value = Harm> {
    let words: Vec<&[u8]> = vec![
        b"null",
        b"[[[[",
        b"{}",
        b"-1",
        b"1e999",
        b"\"",
        b"\\u0000",
        b"\xff\xfe",
        b"\0",
        b"\n",
        b"{%",
        b"%}",
        b"{{",
        b"}}",
        b"[::-1]",
        b" in ",
        b"18446744073709551616",
        b"\xf0\x9f\x91\xa9",
        b"\"id\": 4294967295",
        b"<|im_end|>",
        b",",
        b"\t",
        b"|",
        b"\r\n",
        b"[0, 1]",
        b"\\ud800",
    ];
    prop_oneof![
        (any::<usize>(), any::<u8>()).prop_map(|(at, byte)| Harm::Set(at, byte)),
        (any::<usize>(), prop::sample::select(words))
            .prop_map(|(at, word)| Harm::Insert(at, word.to_vec())),
        any::<usize>().prop_map(Harm::Cut),
        (any::<usize>(), 1..40usize).prop_map(|(at, length)| Harm::Remove(at, length)),
        (any::<usize>(), 1..200usize).prop_map(|(at, length)| Harm::Repeat(at, length)),
    ]
}

pub(crate) fn apply(mut bytes: Vec<u8>, harms: &[Harm]) -> Vec<u8> {
    for harm in harms {
        let length = bytes.len().max(1);
        let from = |at: &usize| at % length;
        match harm {
            Harm::Set(at, byte) => {
                if let Some(old) = bytes.get_mut(from(at)) {
                    *old = *byte;
                }
            }
            Harm::Insert(at, word) => {
                let at = from(at).min(bytes.len());
                bytes.splice(at..at, word.iter().copied());
            }
            Harm::Cut(at) => bytes.truncate(from(at)),
            Harm::Remove(at, count) => {
                let at = from(at).min(bytes.len());
                let end = (at + count).min(bytes.len());
                bytes.drain(at..end);
            }
            Harm::Repeat(at, count) => {
                let at = from(at).min(bytes.len());
                let end = (at + count).min(bytes.len());
                let copy = bytes[at..end].to_vec();
                bytes.splice(at..at, copy);
            }
        }
    }
    bytes
}

pub(crate) fn harms() -> impl Strategy<Value = Vec<Harm>> {
    prop::collection::vec(harm(), 1..6)
}

/// How many cases: `PROPTEST_CASES` for a long run.
pub(crate) fn cases() -> u32 {
    std::env::var("PROPTEST_CASES")
        .ok()
        .and_then(|cases| cases.parse().ok())
        .unwrap_or(200)
}
