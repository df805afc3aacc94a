//! What a person sees while a run goes on: a bar on a terminal, plain lines in a pipe.

use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use console::style;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use peft::data::Piece;
use peft::train::{Event, Observer, StepRecord};

use crate::terminal::{bytes, grouped};

/// Lines of progress in a pipe, about.
const LINES: usize = 50;

/// Draws the events of a run.
pub(crate) struct Screen {
    bar: Option<ProgressBar>,
    total: usize,
    begun: (Instant, usize),
    /// Set by Ctrl-C.
    stop: Arc<AtomicBool>,
}

impl Screen {
    /// A screen that asks the run to stop once `stop` is set.
    pub(crate) fn new(stop: Arc<AtomicBool>) -> Screen {
        let terminal = std::io::stderr().is_terminal() && std::io::stdout().is_terminal();
        Screen {
            bar: terminal.then(|| bar(0)),
            total: 0,
            begun: (Instant::now(), 0),
            stop,
        }
    }

    /// Takes the bar away.
    pub(crate) fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| println!("{line}")),
            None => println!("{line}"),
        }
    }

    fn left(&self, done: usize) -> Duration {
        let taken = done.saturating_sub(self.begun.1).max(1);
        let each = self.begun.0.elapsed() / taken as u32;
        each * self.total.saturating_sub(done) as u32
    }

    fn step(&self, done: usize, record: Option<&StepRecord>) {
        let figures = record.map(|it| {
            let memory = it
                .memory
                .map(|it| format!(" · {}", bytes(it)))
                .unwrap_or_default();
            let speed = grouped(it.tokens_per_second.round() as i64);
            format!(
                "loss {:.4} · lr {:.2e} · {speed} tokens/s{memory}",
                it.loss, it.learning_rate
            )
        });
        match &self.bar {
            Some(bar) => {
                bar.set_position(done as u64);
                if let Some(figures) = figures {
                    let left = duration(self.left(done));
                    bar.set_message(format!("{figures} · {left} left"));
                }
            }
            None => {
                let every = self.total.div_ceil(LINES).max(1);
                if let Some(figures) =
                    figures.filter(|_| done.is_multiple_of(every) || done == self.total)
                {
                    let left = duration(self.left(done));
                    println!("step {done}/{}  {figures} · {left} left", self.total);
                }
            }
        }
    }
}

impl Observer for Screen {
    fn on(&mut self, event: &Event<'_>) {
        match event {
            Event::Start { done, total, .. } => {
                self.total = *total;
                self.begun = (Instant::now(), *done);
                if let Some(bar) = &self.bar {
                    bar.set_length(*total as u64);
                    bar.set_position(*done as u64);
                }
            }
            Event::Step { done, record } => self.step(*done, *record),
            Event::Evaluating { done, of } => {
                if let Some(bar) = &self.bar {
                    bar.set_message(format!("evaluating, {done} of {of}"));
                }
            }
            Event::Eval(it) => {
                let best = if it.best { "  best so far" } else { "" };
                let mut figures = it
                    .figures
                    .iter()
                    .fold(String::new(), |text, (name, value)| {
                        format!("{text}, {name} {value:.4}")
                    });
                if figures.is_empty() {
                    figures = format!(", perplexity {:.2}", it.perplexity);
                }
                let line = format!("held-out loss {:.4}{figures}{best}", it.eval_loss);
                self.say(&format!(
                    "step {}/{}  {}",
                    it.step,
                    self.total,
                    style(line).cyan()
                ));
                if it.step == 0 {
                    self.begun.0 = Instant::now();
                }
            }
            _ => {}
        }
    }

    fn stop(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

fn bar(total: u64) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
    let template = "{bar:24.cyan/dim} {pos}/{len} {wide_msg}";
    if let Ok(look) = ProgressStyle::with_template(template) {
        bar.set_style(look.progress_chars("━━─"));
    }
    bar
}

/// `2 min 5 s`.
pub(crate) fn duration(time: Duration) -> String {
    match time.as_secs() {
        s if s < 60 => format!("{s} s"),
        s if s < 3600 => format!("{} min {} s", s / 60, s % 60),
        s => format!("{} h {} min", s / 3600, s % 3600 / 60),
    }
}

/// One line of the overview: a name and what it is.
pub(crate) fn row(name: &str, value: impl std::fmt::Display) {
    println!("  {} {value}", style(format!("{name:<10}")).bold());
}

/// A row of the data as the model sees it: what is not learnt is dimmed, or where there are no
/// colours, what is learnt stands between ⟦ and ⟧. `gap` goes between tokens.
pub(crate) fn paint(pieces: &[Piece], gap: &str) -> String {
    let colours = console::colors_enabled();
    let mut text = String::new();
    for (i, piece) in pieces.iter().enumerate() {
        let starts = piece.trained && (i == 0 || !pieces[i - 1].trained);
        let ends = piece.trained && pieces.get(i + 1).is_none_or(|next| !next.trained);
        if i > 0 {
            text.push_str(&style(gap).dim().to_string());
        }
        if starts && !colours {
            text.push('⟦');
        }
        let shown = visible(&piece.text);
        // Styles are put on line by line: many pagers end a style where a line ends.
        let lines: Vec<String> = shown
            .split('\n')
            .map(|line| match (line.is_empty(), piece.trained) {
                (true, _) => String::new(),
                (_, true) => style(line).green().to_string(),
                (_, false) => style(line).dim().to_string(),
            })
            .collect();
        text.push_str(&lines.join("\n"));
        if ends && !colours {
            text.push('⟧');
        }
    }
    text
}

/// Control characters, which a terminal would obey, as signs.
fn visible(text: &str) -> String {
    let sign = |c: char| match c {
        '\n' | '\t' => c,
        c if c.is_control() => '\u{fffd}',
        c => c,
    };
    text.chars().map(sign).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_learnt_part_is_marked() {
        let piece = |text: &str, trained| Piece {
            id: 0,
            text: text.into(),
            trained,
        };
        console::set_colors_enabled(false);
        let pieces = [
            piece("ask\n", false),
            piece("an", true),
            piece("swer", true),
            piece("\u{1b}[2J", false),
        ];
        assert_eq!(paint(&pieces, ""), "ask\n⟦answer⟧\u{fffd}[2J");
        assert_eq!(paint(&pieces[1..3], "|"), "⟦an|swer⟧");
    }

    #[test]
    fn times_are_short() {
        assert_eq!(duration(Duration::from_secs(125)), "2 min 5 s");
        assert_eq!(duration(Duration::from_secs(7322)), "2 h 2 min");
    }
}
