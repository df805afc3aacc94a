//! Tokenises a data file and says how long it took.
//!
//! ```text
//! cargo run -p peft-data --example tokenize -- TOKENIZER_FOLDER FILE…
//! ```

use std::path::PathBuf;
use std::time::Instant;

use peft_data::{Options, Tokenizer, prepare};

fn main() -> peft_data::Result<()> {
    let mut args = std::env::args_os().skip(1).map(PathBuf::from);
    let Some(dir) = args.next() else {
        eprintln!("usage: tokenize TOKENIZER_FOLDER FILE…");
        return Ok(());
    };
    let files: Vec<PathBuf> = args.collect();
    let start = Instant::now();
    let tokenizer = Tokenizer::open(&dir)?;
    let opened = start.elapsed();
    let data = prepare(&files, &tokenizer, &Options::default(), &|_| {})?;
    println!(
        "{} rows, {} tokens, {} trained; tokenizer {opened:.2?}, all {:.2?}",
        data.len(),
        data.report().tokens,
        data.report().trained_tokens,
        start.elapsed()
    );
    Ok(())
}
