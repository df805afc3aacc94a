//! Reading Rust just well enough to check it: what is code, what is comment or text, what is test.
//!
//! A real parser would know more and cost more: a dependency that takes longer to compile than the rest of
//! this crate. The checks only need the code with everything else blanked out, at the same line and column.

/// `source` with comments and the insides of strings and characters turned into spaces.
pub(super) fn code_only(source: &str) -> String {
    let bytes = source.as_bytes();
    let mut code = bytes.to_vec();
    let mut at = 0;
    while at < bytes.len() {
        let end = match &bytes[at..] {
            [b'/', b'/', ..] => line_end(bytes, at),
            [b'/', b'*', ..] => comment_end(bytes, at),
            [b'"', ..] => string_end(bytes, at),
            [b'r' | b'b' | b'c', ..] if !inside_word(bytes, at) => {
                match raw_string_end(bytes, at) {
                    Some(end) => end,
                    None => {
                        at += 1;
                        continue;
                    }
                }
            }
            [b'\'', ..] => match character_end(bytes, at) {
                Some(end) => end,
                None => {
                    at += 1;
                    continue;
                }
            },
            _ => {
                at += 1;
                continue;
            }
        };
        for byte in &mut code[at..end] {
            if *byte != b'\n' {
                *byte = b' ';
            }
        }
        at = end;
    }
    String::from_utf8_lossy(&code).into_owned()
}

/// `code` (without comments and strings) with everything under `#[cfg(test)]` turned into spaces.
pub(super) fn without_tests(code: &str) -> String {
    let mut kept = code.as_bytes().to_vec();
    let mut from = 0;
    while let Some(found) = code[from..].find("#[cfg(test)]") {
        let start = from + found;
        let end = item_end(code.as_bytes(), start);
        for byte in &mut kept[start..end] {
            if *byte != b'\n' {
                *byte = b' ';
            }
        }
        from = end;
    }
    String::from_utf8_lossy(&kept).into_owned()
}

/// Where the item that starts at `at` ends: at its `;`, or at the brace that closes its first one.
fn item_end(code: &[u8], at: usize) -> usize {
    let mut depth = 0_usize;
    for (index, byte) in code.iter().enumerate().skip(at) {
        match byte {
            b';' if depth == 0 => return index + 1,
            b'{' => depth += 1,
            b'}' => {
                depth = depth.saturating_sub(1);
                if depth == 0 {
                    return index + 1;
                }
            }
            _ => {}
        }
    }
    code.len()
}

/// Whether `code` holds `word` at a byte offset as a whole word.
pub(super) fn words<'a>(code: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    let part =
        |byte: Option<&u8>| byte.is_some_and(|byte| byte.is_ascii_alphanumeric() || *byte == b'_');
    let bytes = code.as_bytes();
    let starts = code.match_indices(word).map(|(at, _)| at);
    starts.filter(move |at| {
        let before = at.checked_sub(1).and_then(|before| bytes.get(before));
        !part(before) && !part(bytes.get(at + word.len()))
    })
}

/// The line, from 1, of a byte offset.
pub(super) fn line_of(text: &str, at: usize) -> usize {
    1 + text.as_bytes()[..at]
        .iter()
        .filter(|byte| **byte == b'\n')
        .count()
}

fn inside_word(bytes: &[u8], at: usize) -> bool {
    at > 0 && (bytes[at - 1].is_ascii_alphanumeric() || bytes[at - 1] == b'_')
}

fn line_end(bytes: &[u8], at: usize) -> usize {
    let rest = bytes[at..].iter().position(|byte| *byte == b'\n');
    rest.map_or(bytes.len(), |length| at + length)
}

/// Block comments nest.
fn comment_end(bytes: &[u8], mut at: usize) -> usize {
    let mut depth = 0_usize;
    while at < bytes.len() {
        match &bytes[at..] {
            [b'/', b'*', ..] => (depth, at) = (depth + 1, at + 2),
            [b'*', b'/', ..] => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            return at;
        }
    }
    at
}

fn string_end(bytes: &[u8], at: usize) -> usize {
    let mut index = at + 1;
    while index < bytes.len() {
        match bytes[index] {
            b'\\' => index += 2,
            b'"' => return index + 1,
            _ => index += 1,
        }
    }
    bytes.len()
}

/// `r"…"`, `r#"…"#`, `br"…"`; None where the letter starts something else.
fn raw_string_end(bytes: &[u8], at: usize) -> Option<usize> {
    let letters = bytes[at..]
        .iter()
        .take_while(|byte| b"rbc".contains(byte))
        .count();
    let hashes = bytes[at + letters..]
        .iter()
        .take_while(|byte| **byte == b'#')
        .count();
    let open = at + letters + hashes;
    let raw = bytes[at..at + letters].contains(&b'r');
    if letters > 2 || bytes.get(open) != Some(&b'"') || !raw {
        return None;
    }
    let close: Vec<u8> = std::iter::once(b'"')
        .chain(std::iter::repeat_n(b'#', hashes))
        .collect();
    let rest = &bytes[open + 1..];
    let length = rest.windows(close.len()).position(|window| window == close);
    Some(length.map_or(bytes.len(), |length| open + 1 + length + close.len()))
}

/// `'x'` and `'\n'`; None for a lifetime.
fn character_end(bytes: &[u8], at: usize) -> Option<usize> {
    if bytes.get(at + 1) == Some(&b'\\') {
        let close = bytes
            .get(at + 3..)?
            .iter()
            .position(|byte| *byte == b'\'')?;
        return Some(at + 3 + close + 1);
    }
    // One character, up to four bytes long.
    let close = bytes
        .get(at + 2..(at + 6).min(bytes.len()))?
        .iter()
        .position(|byte| *byte == b'\'')?;
    let one = std::str::from_utf8(&bytes[at + 1..at + 2 + close])
        .is_ok_and(|text| text.chars().count() == 1);
    one.then_some(at + 2 + close + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_texts_are_not_code() {
        let source = r##"a(); // .unwrap()
b("unsafe \" {", 'x', '{', '\'', '\u{7d}'); /* one /* two */ } */
fn c<'a>(x: &'a str) { r#"}" unsafe"# }"##;
        let code = code_only(source);
        assert_eq!(code.len(), source.len());
        assert_eq!(code.lines().count(), 3);
        assert!(!code.contains("unwrap") && !code.contains("unsafe") && !code.contains("two"));
        assert_eq!(code.matches('}').count(), 1);
        assert!(code.contains("fn c<'a>(x: &'a str) {"));
    }

    #[test]
    fn tests_are_left_out_and_what_follows_is_not() {
        let code = "fn a() {}\n#[cfg(test)]\nmod tests { fn b() { x.unwrap() } }\nfn c() {}\n#[cfg(test)]\nuse d;\nfn e() {}";
        let kept = without_tests(code);
        assert!(!kept.contains("unwrap") && !kept.contains("use d"));
        assert!(kept.contains("fn c") && kept.contains("fn e"));
        assert_eq!(line_of(&kept, kept.find("fn c").unwrap()), 4);
    }

    #[test]
    fn words_are_whole() {
        assert_eq!(
            words("unsafe_op unsafe not_unsafe", "unsafe").collect::<Vec<_>>(),
            [10]
        );
    }
}
