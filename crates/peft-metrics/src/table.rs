//! Scores and confusions as text that fits 80 columns.
//!
//! A row of a confusion is what became of one true class, in percent of it: with
//! unequal classes the counts themselves hide how well a rare one is told. The
//! classes on top are numbered, since names do not fit there; names at the side
//! are cut. Where there are too many classes for the width, the columns go on
//! in further blocks.

use crate::confusion::{Confusion, Score, part};

const WIDTH: usize = 80;
/// The longest name, in characters.
const NAME: usize = 20;

/// A line for each class and each mean.
pub(crate) fn report(
    classes: Vec<(&str, Score)>,
    accuracy: Option<(f64, u64)>,
    means: &[(&str, Score)],
) -> String {
    let names = classes.iter().chain(means).map(|(name, _)| length(name));
    let width = names.max().unwrap_or(0).clamp(8, 40);
    let line = |name: &str, score: &Score| {
        format!(
            "{}  {:>9.4}  {:>6.4}  {:>6.4}  {:>7}\n",
            fit(name, width),
            score.precision,
            score.recall,
            score.f1,
            score.support
        )
    };
    let mut text = format!(
        "{:width$}  precision  recall      F1  support\n",
        "",
        width = width
    );
    for (name, score) in &classes {
        text.push_str(&line(name, score));
    }
    text.push('\n');
    if let Some((accuracy, total)) = accuracy {
        text.push_str(&format!(
            "{}  {:>9}  {:>6}  {accuracy:>6.4}  {total:>7}\n",
            fit("accuracy", width),
            "",
            ""
        ));
    }
    for (name, score) in means {
        text.push_str(&line(name, score));
    }
    text
}

/// Percent of each true class, the classes on top numbered.
pub(crate) fn confusion(seen: &Confusion) -> String {
    let classes = seen.classes();
    let digits = classes.len().to_string().len();
    let side = classes.iter().map(|name| length(name)).max().unwrap_or(0);
    let side = side.clamp(4, NAME);
    let totals: Vec<u64> = (0..classes.len())
        .map(|at| seen.row(at).iter().sum())
        .collect();
    let rows = totals
        .iter()
        .max()
        .map_or(1, |most| most.to_string().len())
        .max(4);
    let head = digits + 1 + side + 1 + rows;
    const CELL: usize = 5;
    let columns = (WIDTH.saturating_sub(head) / CELL).max(1);
    let all: Vec<usize> = (0..classes.len()).collect();
    let mut text = String::from("percent of each true class (row) that is said to be … (column)\n");
    for block in all.chunks(columns) {
        text.push_str(&format!(
            "{:digits$} {} {:>rows$}",
            "",
            fit("", side),
            "rows"
        ));
        for said in block {
            text.push_str(&format!("{:>CELL$}", said + 1));
        }
        text.push('\n');
        for (truth, total) in totals.iter().enumerate() {
            text.push_str(&format!(
                "{:>digits$} {} {total:>rows$}",
                truth + 1,
                fit(&classes[truth], side)
            ));
            for said in block {
                let cell = percent(seen.count(truth, *said), *total);
                text.push_str(&format!("{cell:>CELL$}"));
            }
            text.push('\n');
        }
    }
    text
}

/// A part in percent: `·` for none, and 100 and 0 only where it is all and almost none.
pub(crate) fn percent(some: u64, all: u64) -> String {
    match some {
        0 => "·".into(),
        some if some == all => "100".into(),
        some => {
            let value = 100.0 * part(some, all);
            match value {
                value if value < 0.5 => "<1".into(),
                value if value > 99.5 => ">99".into(),
                value => format!("{value:.0}"),
            }
        }
    }
}

/// How wide a name is on a screen, roughly: wide scripts take two columns a letter.
fn length(name: &str) -> usize {
    name.chars().map(columns).sum()
}

fn columns(letter: char) -> usize {
    match letter as u32 {
        0x0300..=0x036F | 0x200B..=0x200F => 0,
        0x1100..=0x115F
        | 0x2E80..=0xA4CF
        | 0xAC00..=0xD7A3
        | 0xF900..=0xFAFF
        | 0xFE30..=0xFE6F
        | 0xFF00..=0xFF60
        | 0xFFE0..=0xFFE6
        | 0x1F300..=0x1FAFF
        | 0x20000..=0x3FFFD => 2,
        _ => 1,
    }
}

/// A name in just this width: cut with `…`, or filled up. Its end stays where there is room, as it is often what differs.
pub(crate) fn fit(name: &str, width: usize) -> String {
    // A line break in a name would end the line.
    let name: String = name
        .chars()
        .map(|letter| if letter.is_control() { ' ' } else { letter })
        .collect();
    let mut text = String::new();
    let mut used = 0;
    if length(&name) <= width {
        used = length(&name);
        text.push_str(&name);
    } else {
        let (mut end, mut tail) = (String::new(), 0);
        for letter in name.chars().rev() {
            if width < 10 || tail + columns(letter) > width / 3 {
                break;
            }
            tail += columns(letter);
            end.insert(0, letter);
        }
        for letter in name.chars() {
            if used + columns(letter) + 1 + tail > width {
                break;
            }
            used += columns(letter);
            text.push(letter);
        }
        text.push('…');
        text.push_str(&end);
        used += 1 + tail;
    }
    text.extend(std::iter::repeat_n(' ', width.saturating_sub(used)));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percents_do_not_lie_at_the_ends() {
        assert_eq!(
            [(0, 9), (9, 9), (1, 1000), (999, 1000), (1, 3), (0, 0)].map(|(a, b)| percent(a, b)),
            ["·", "100", "<1", ">99", "33", "·"]
        );
    }

    #[test]
    fn thirty_long_names_fit_eighty_columns() {
        let names: Vec<String> = (0..30)
            .map(|at| format!("a very long name of a class {at} 汉字汉字"))
            .collect();
        let truth: Vec<usize> = (0..30_000).map(|at| at % 30).collect();
        let said: Vec<usize> = (0..30_000).map(|at| (at % 30 + at / 9000) % 30).collect();
        let seen = Confusion::of(&names, &truth, &said).unwrap();
        for line in seen.table().lines().chain(seen.report().lines()) {
            assert!(length(line) <= WIDTH, "{} {line:?}", length(line));
        }
        assert_eq!(length(&fit("汉字汉字", 6)), 6);
    }
}
