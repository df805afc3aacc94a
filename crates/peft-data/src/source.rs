//! A data file as a run of rows, each with its line.
//!
//! Three shapes hold rows: JSONL (one object a line, also where the name ends with `.json`), JSON (one list of
//! objects) and tables (CSV and TSV, see [`crate::table`]); plain text has none.
//! Which one it is, the file name's ending says: guessing from the content would
//! read a broken JSON file as prose and train on it. A byte order mark, CRLF and
//! blank lines are the traces of editors, so they are accepted; a NUL byte is
//! the trace of a file that is no text.

use std::fs::File;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result, nearest};
use crate::map::Map;
use crate::table::{self, Table};

/// An open data file.
#[derive(Debug)]
pub(crate) struct Source {
    pub(crate) path: PathBuf,
    pub(crate) shape: Shape,
    /// The columns, where the file is a table.
    pub(crate) table: Option<Table>,
    map: Map,
}

/// How a file holds its rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shape {
    /// One JSON object a line.
    Lines,
    /// One JSON list of objects.
    List,
    /// One record of a table a row, its first line names the columns.
    Table {
        /// What stands between two cells.
        delimiter: u8,
    },
    /// Prose.
    Text,
}

/// One row where it lies: `line` counts from 1.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RawRow<'a> {
    pub(crate) line: usize,
    pub(crate) bytes: &'a [u8],
}

/// The file name endings that say a shape.
const ENDINGS: [(&str, Shape); 9] = [
    ("jsonl", Shape::Lines),
    ("ndjson", Shape::Lines),
    ("json", Shape::List),
    ("csv", Shape::Table { delimiter: b',' }),
    ("tsv", Shape::Table { delimiter: b'\t' }),
    ("txt", Shape::Text),
    ("text", Shape::Text),
    ("md", Shape::Text),
    ("markdown", Shape::Text),
];

/// The longest row, in bytes. A longer one is a file without line breaks.
pub(crate) const MAX_ROW: usize = 16 << 20;

impl Source {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let place = std::fs::metadata(path).map_err(|source| Error::Io {
            path: path.to_owned(),
            source,
        })?;
        if place.is_dir() {
            return Err(Error::File {
                path: path.to_owned(),
                what: "a folder, expected a file of rows or text".to_owned(),
            });
        }
        let ending = path.extension().and_then(|ending| ending.to_str());
        let ending = ending.unwrap_or_default().to_ascii_lowercase();
        let known = ENDINGS.iter().find(|(name, _)| *name == ending);
        let Some((_, shape)) = known else {
            let names = ENDINGS.map(|(name, _)| name);
            let mut what = format!(
                "unknown ending `.{ending}`, this build reads {}",
                crate::message::quoted(names.iter().map(|name| format!(".{name}")))
            );
            if let Some(near) = nearest(&ending, names) {
                what.push_str(&format!(", the nearest is `.{near}`"));
            }
            return Err(Error::file(path, what));
        };
        let file = File::open(path).map_err(Error::io(path))?;
        if file.metadata().map_err(Error::io(path))?.is_dir() {
            return Err(Error::file(path, "a folder, not a data file"));
        }
        let map = Map::of(&file).map_err(Error::io(path))?;
        let mut source = Self {
            path: path.to_owned(),
            shape: *shape,
            table: None,
            map,
        };
        if source.text_bytes().iter().all(u8::is_ascii_whitespace) {
            return Err(Error::file(path, "empty, there is no row in it"));
        }
        if source.shape == Shape::List && source.begins_with_a_row() {
            source.shape = Shape::Lines;
        }
        if let Shape::Table { delimiter } = source.shape {
            source.table = Some(Table::of(path, source.text_bytes(), delimiter)?);
        }
        Ok(source)
    }

    /// Whether its first line is an object: many a `.json` is JSONL.
    fn begins_with_a_row(&self) -> bool {
        let first = self.text_bytes().trim_ascii_start();
        let line = first.split(|it| *it == b'\n').next().unwrap_or_default();
        let object = serde_json::from_slice::<serde_json::Map<_, serde_json::Value>>(line);
        object.is_ok()
    }

    /// All bytes, as they are on disk.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// The bytes after a byte order mark.
    fn text_bytes(&self) -> &[u8] {
        self.map.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(&self.map)
    }

    /// The whole file as text.
    pub(crate) fn text(&self) -> Result<&str> {
        let bytes = self.text_bytes();
        if let Some(at) = bytes.iter().position(|byte| *byte == 0) {
            return Err(Error::row(&self.path, line_at(bytes, at), NUL));
        }
        std::str::from_utf8(bytes).map_err(|error| {
            let at = error.valid_up_to();
            Error::row(
                &self.path,
                line_at(bytes, at),
                format!("byte {at} of the file is not UTF-8"),
            )
        })
    }

    /// The rows in order.
    pub(crate) fn rows(&self) -> Result<Box<dyn Iterator<Item = RawRow<'_>> + '_>> {
        match self.shape {
            Shape::Lines => Ok(Box::new(lines(self.text_bytes()))),
            Shape::List => Ok(Box::new(self.list()?.into_iter())),
            Shape::Table { delimiter } => {
                let records = table::records(self.text_bytes(), delimiter);
                // The first names the columns.
                Ok(Box::new(records.skip(1)))
            }
            Shape::Text => Ok(Box::new(std::iter::empty())),
        }
    }

    /// The items of a JSON list, each where it lies.
    fn list(&self) -> Result<Vec<RawRow<'_>>> {
        let text = self.text()?;
        let items: Vec<&serde_json::value::RawValue> =
            serde_json::from_str(text).map_err(|error| {
                Error::row(
                    &self.path,
                    error.line(),
                    format!("expected a JSON list of rows: {error}"),
                )
            })?;
        let start = text.as_ptr() as usize;
        let (mut line, mut counted) = (1, 0);
        let rows = items.into_iter().map(|item| {
            let at = item.get().as_ptr() as usize - start;
            line += count_lines(&text.as_bytes()[counted..at]);
            counted = at;
            RawRow {
                line,
                bytes: item.get().as_bytes(),
            }
        });
        Ok(rows.collect())
    }

    /// The text of one row.
    pub(crate) fn row_text<'a>(&self, row: RawRow<'a>) -> Result<&'a str> {
        let refuse = |what: String| Error::row(&self.path, row.line, what);
        if row.bytes.len() > MAX_ROW {
            return Err(refuse(format!(
                "a row of {} bytes, the most is {MAX_ROW}",
                row.bytes.len()
            )));
        }
        if row.bytes.contains(&0) {
            return Err(refuse(NUL.into()));
        }
        std::str::from_utf8(row.bytes)
            .map_err(|error| refuse(format!("byte {} is not UTF-8", error.valid_up_to() + 1)))
    }
}

pub(crate) const NUL: &str = "a NUL byte, so this is not a text file";

/// The lines that are not blank, without their ends.
fn lines(bytes: &[u8]) -> impl Iterator<Item = RawRow<'_>> {
    bytes
        .split(|byte| *byte == b'\n')
        .enumerate()
        .map(|(at, line)| RawRow {
            line: at + 1,
            bytes: line.trim_ascii(),
        })
        .filter(|row| !row.bytes.is_empty())
}

pub(crate) fn count_lines(bytes: &[u8]) -> usize {
    bytes.iter().filter(|byte| **byte == b'\n').count()
}

fn line_at(bytes: &[u8], at: usize) -> usize {
    count_lines(&bytes[..at]) + 1
}
