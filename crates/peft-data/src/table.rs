//! Tables: CSV and TSV, the first line naming the columns.
//!
//! A record becomes the object `{column: cell}`, every cell a string; what a
//! string means (a number, several labels) the task's reader says. The `csv`
//! crate finds the records, and it is generous: a quote that is never closed
//! takes the rest of the file into one cell, and words after a closing quote
//! are glued on. Generosity loses rows in silence, so each record is looked at
//! again: quotes must be closed and stand around a whole cell, every record has
//! as many cells as there are columns, and in TSV, where a line is a record by
//! definition, no cell goes over the end of its line.

use std::borrow::Cow;
use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::message::quoted;
use crate::source::{NUL, RawRow, count_lines};

/// The columns of a table.
#[derive(Debug)]
pub(crate) struct Table {
    columns: Vec<String>,
    delimiter: u8,
}

impl Table {
    /// Reads the line that names the columns.
    pub(crate) fn of(path: &Path, bytes: &[u8], delimiter: u8) -> Result<Self> {
        let Some(head) = records(bytes, delimiter).next() else {
            return Err(Error::file(path, "empty, there is no row in it"));
        };
        let refuse = |what: String| Error::row(path, head.line, what);
        if head.bytes.contains(&0) {
            return Err(refuse(NUL.into()));
        }
        let text = std::str::from_utf8(head.bytes)
            .map_err(|error| refuse(format!("byte {} is not UTF-8", error.valid_up_to() + 1)))?;
        let columns: Vec<String> = cells(text, delimiter)
            .map_err(refuse)?
            .into_iter()
            .map(|name| name.trim().to_owned())
            .collect();
        for (at, name) in columns.iter().enumerate() {
            if name.is_empty() {
                return Err(refuse(format!(
                    "column {} has no name; the first line must name the columns",
                    at + 1
                )));
            }
            if columns[..at].contains(name) {
                return Err(refuse(format!("two columns are named `{name}`")));
            }
        }
        Ok(Self { columns, delimiter })
    }

    /// One record as an object.
    pub(crate) fn object(&self, record: &str) -> Result<Map<String, Value>, String> {
        let cells = cells(record, self.delimiter)?;
        if cells.len() != self.columns.len() {
            return Err(format!(
                "{} cells, but the first line names {} columns {}",
                cells.len(),
                self.columns.len(),
                quoted(&self.columns)
            ));
        }
        let pairs = self.columns.iter().cloned().zip(cells);
        Ok(pairs
            .map(|(name, cell)| (name, Value::String(cell)))
            .collect())
    }
}

/// The records of a table where they lie, the first line's included.
pub(crate) fn records(bytes: &[u8], delimiter: u8) -> impl Iterator<Item = RawRow<'_>> {
    let mut reader = reader(bytes, delimiter);
    let mut record = csv::ByteRecord::new();
    let (mut line, mut counted) = (1, 0);
    std::iter::from_fn(move || {
        let start = usize::try_from(reader.position().byte()).ok()?;
        // Reading from memory with any number of cells cannot fail.
        if !reader.read_byte_record(&mut record).ok()? {
            return None;
        }
        let end = usize::try_from(reader.position().byte()).ok()?;
        let record = bytes.get(start..end.min(bytes.len()))?;
        // Blank lines before a record, and the second half of a CRLF, come with it.
        let blank = record
            .iter()
            .take_while(|byte| matches!(byte, b'\r' | b'\n'))
            .count();
        let start = start + blank;
        line += count_lines(&bytes[counted..start]);
        counted = start;
        let mut record = &record[blank..];
        while let [rest @ .., b'\r' | b'\n'] = record {
            record = rest;
        }
        Some(RawRow {
            line,
            bytes: record,
        })
    })
}

const BOM: char = '\u{feff}';

/// The cells of one record.
fn cells(record: &str, delimiter: u8) -> Result<Vec<String>, String> {
    well_quoted(record, delimiter)?;
    let mut cells = csv::StringRecord::new();
    // A reader takes what begins its input for a byte order mark; that of the file has gone.
    let record = match record.strip_prefix(BOM) {
        Some(_) => Cow::Owned(format!("{BOM}{record}")),
        None => Cow::Borrowed(record),
    };
    let read = reader(record.as_bytes(), delimiter)
        .read_record(&mut cells)
        .map_err(|error| error.to_string())?;
    if !read {
        return Ok(vec![String::new()]);
    }
    Ok(cells.iter().map(str::to_owned).collect())
}

fn reader(bytes: &[u8], delimiter: u8) -> csv::Reader<&[u8]> {
    csv::ReaderBuilder::new()
        .delimiter(delimiter)
        .has_headers(false)
        .flexible(true)
        .from_reader(bytes)
}

/// Whether quotes stand around whole cells and are closed.
fn well_quoted(record: &str, delimiter: u8) -> Result<(), String> {
    let bytes = record.as_bytes();
    let mut at = 0;
    let mut cell = 1;
    while at < bytes.len() {
        if bytes[at] == b'"' {
            at += 1;
            loop {
                match (bytes.get(at), bytes.get(at + 1)) {
                    (None, _) => {
                        return Err(format!(
                            "the quote that opens cell {cell} is never closed (a quote within a \
                             cell is written twice)"
                        ));
                    }
                    (Some(b'"'), Some(b'"')) => at += 2,
                    (Some(b'"'), after) => {
                        if after.is_some_and(|byte| *byte != delimiter) {
                            return Err(format!(
                                "cell {cell} goes on after its closing quote (a quote within a \
                                 cell is written twice)"
                            ));
                        }
                        at += 1;
                        break;
                    }
                    (Some(b'\n' | b'\r'), _) if delimiter == b'\t' => {
                        return Err(format!(
                            "the quote that opens cell {cell} is not closed on its line, and a \
                             TSV record is one line (a quote within a cell is written twice)"
                        ));
                    }
                    _ => at += 1,
                }
            }
        }
        // To the next cell.
        while at < bytes.len() && bytes[at] != delimiter {
            at += 1;
        }
        at += 1;
        cell += 1;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(text: &str, delimiter: u8) -> Vec<(usize, Result<Vec<String>, String>)> {
        records(text.as_bytes(), delimiter)
            .map(|row| {
                let text = std::str::from_utf8(row.bytes).unwrap();
                (row.line, cells(text, delimiter))
            })
            .collect()
    }

    fn check(text: &str, expected: &[(usize, &[&str])]) {
        for text in [text.to_owned(), text.replace('\n', "\r\n")] {
            let made: Vec<(usize, Vec<String>)> = rows(&text, b',')
                .into_iter()
                .map(|(line, cells)| (line, cells.unwrap()))
                .collect();
            let wanted: Vec<(usize, Vec<String>)> = expected
                .iter()
                .map(|(line, cells)| {
                    let ended = |cell: &&str| match text.contains('\r') {
                        true => cell.replace('\n', "\r\n"),
                        false => cell.to_string(),
                    };
                    (*line, cells.iter().map(ended).collect())
                })
                .collect();
            assert_eq!(made, wanted, "{text:?}");
        }
    }

    #[test]
    fn records_and_their_lines() {
        check(
            "text,label\na,b\n\n\n\"c, \"\"d\"\"\",\ne,\"two\nlines\"\nf, g",
            &[
                (1, &["text", "label"]),
                (2, &["a", "b"]),
                (5, &["c, \"d\"", ""]),
                (6, &["e", "two\nlines"]),
                (8, &["f", " g"]),
            ],
        );
        check("a\n\"\"\nx\n", &[(1, &["a"]), (2, &[""]), (3, &["x"])]);
        check(
            "a\n\u{feff}b,\u{feff}\n",
            &[(1, &["a"]), (2, &["\u{feff}b", "\u{feff}"])],
        );
    }

    #[test]
    fn quotes_that_would_swallow_rows_are_refused() {
        let error = |text: &str, delimiter: u8| {
            let made = rows(text, delimiter);
            made.into_iter().find_map(|(_, cells)| cells.err()).unwrap()
        };
        assert!(error("a,b\n\"c,d\ne,f\n", b',').contains("never closed"));
        assert!(error("a,b\n\"c\"d,e\n", b',').contains("goes on after"));
        assert!(error("a\tb\n\"c\t1\nd\t\"e\"\n", b'\t').contains("one line"));
        assert!(rows("a,b\n5\" pipe,d\n", b',')[1].1.is_ok());
    }
}
