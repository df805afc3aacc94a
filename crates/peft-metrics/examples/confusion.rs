//! Draws confusions of several sizes, to be looked at.
//!
//! ```text
//! cargo run -p peft-metrics --example confusion -- FOLDER
//! ```

use std::path::PathBuf;

use peft_metrics::Confusion;

fn main() -> peft_metrics::Result<()> {
    let folder = PathBuf::from(std::env::args().nth(1).unwrap_or_else(|| ".".into()));
    let words = [
        "animal",
        "food",
        "location",
        "person",
        "plant",
        "time",
        "artifact",
        "communication",
        "phenomenon of nature",
        "the longest name of any class here",
    ];
    for n in [2, 3, 6, 10, 20, 30, 50] {
        let names: Vec<String> = (0..n)
            .map(|at| match n <= words.len() {
                true => words[at].to_owned(),
                false => format!("{} {at}", words[at % words.len()]),
            })
            .collect();
        let rows = 0..n * 137;
        let truth: Vec<usize> = rows.clone().map(|at| (at * at + at / 11) % n).collect();
        let said: Vec<usize> = rows
            .map(|at| match (at * 2_654_435_761) % 9 {
                0 => (truth[at] + 1 + at % 3) % n,
                1 if truth[at].is_multiple_of(3) => 0,
                _ => truth[at],
            })
            .collect();
        let seen = Confusion::of(&names, &truth, &said)?;
        for ending in ["png", "svg"] {
            let path = folder.join(format!("confusion-{n}.{ending}"));
            seen.draw(&path, &format!("WordNet glosses, {n} classes"))?;
        }
        println!("{}\n{}", seen.report(), seen.table());
    }
    Ok(())
}
