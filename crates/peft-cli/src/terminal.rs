//! The manners of a program on a terminal.

use std::{
    panic::{AssertUnwindSafe, catch_unwind, set_hook},
    process::exit,
    sync::Mutex,
};

use anyhow::{Result, anyhow};

/// What the last panic said, and where.
static LAST: Mutex<String> = Mutex::new(String::new());

/// Runs the program. A panic is a bug of ours; it becomes an error on one line.
///
/// But for one kind: `print!` panics when whoever reads our output has gone (`peft data … | head`), and that
/// is the usual end of a pipe. The hook prints nothing, because a library may catch a panic and go on.
pub(crate) fn guarded(body: impl FnOnce() -> Result<()>) -> Result<()> {
    set_hook(Box::new(|info| {
        let payload = info.payload();
        let text = payload.downcast_ref::<String>().map(String::as_str);
        let text = text
            .or(payload.downcast_ref::<&str>().copied())
            .unwrap_or("no message");
        if text.starts_with("failed printing to std") && text.contains("Broken pipe") {
            exit(0);
        }
        let place = info
            .location()
            .map(|at| format!(" at {}:{}", at.file(), at.line()));
        let first = text.lines().next().unwrap_or_default();
        if let Ok(mut last) = LAST.lock() {
            // A disk that is full, say, is no bug of ours.
            *last = match text.strip_prefix("failed printing to ") {
                Some(where_and_why) => format!("cannot write to {where_and_why}"),
                None => format!(
                    "internal error{}: {first}; please report this, it is a bug in peft",
                    place.unwrap_or_default()
                ),
            };
        }
    }));
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|_| {
        let last = LAST.lock().map(|it| it.clone()).unwrap_or_default();
        Err(anyhow!("{last}"))
    })
}

/// `12.3 MB`, in powers of ten.
pub(crate) fn bytes(n: u64) -> String {
    let units = [(1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")];
    let unit = units.into_iter().find(|(size, _)| n as f64 >= *size);
    unit.map_or(format!("{n} B"), |(size, name)| {
        format!("{:.1} {name}", n as f64 / size)
    })
}

/// `1 place`, `2 places`.
pub(crate) fn plural(n: usize, what: &str) -> String {
    match n {
        1 => format!("1 {what}"),
        n => format!("{n} {what}s"),
    }
}

/// `1,234,567`.
pub(crate) fn grouped(n: i64) -> String {
    let digits = n.unsigned_abs().to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    if n < 0 { format!("-{text}") } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped_and_rounded() {
        for (n, text) in [
            (0, "0"),
            (999, "999"),
            (1000, "1,000"),
            (-1234567, "-1,234,567"),
        ] {
            assert_eq!(grouped(n), text);
        }
        for (n, text) in [
            (0, "0 B"),
            (999, "999 B"),
            (1500, "1.5 kB"),
            (2_000_000_000, "2.0 GB"),
        ] {
            assert_eq!(bytes(n), text);
        }
    }
}
