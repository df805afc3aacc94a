//! The manners of a program on a terminal.

use std::process::exit;

/// A panic is a bug of ours; it is said on one line and ends the program with code 1.
///
/// But for one kind: `print!` panics when whoever reads our output has gone (`peft data … | head`), and that
/// is the usual end of a pipe.
pub(crate) fn quiet_panics() {
    std::panic::set_hook(Box::new(|info| {
        let text = info.payload_as_str().unwrap_or("no message");
        if text.starts_with("failed printing to std") && text.contains("Broken pipe") {
            exit(0);
        }
        let place = info
            .location()
            .map(|at| format!(" at {}:{}", at.file(), at.line()));
        let first = text.lines().next().unwrap_or_default();
        let place = place.unwrap_or_default();
        eprintln!("internal error{place}: {first}; please report this, it is a bug in peft");
        exit(1);
    }));
}
