//! The file that holds a tokenised data set, read where it lies.
//!
//! ```text
//! magic "PEFTDATA" | version u32 | 0 u32 | key [32] | checksum [32] | body u64 | rows u64 | tokens u64 | spans u64
//! ids     u32 × tokens, then padding to 8 bytes
//! ends    u64 × rows         where each row's ids end
//! spans   u64 × rows         where each row's spans end
//! trained [u32; 2] × spans   half-open ranges within a row
//! report  JSON, the rest of the body
//! ```
//!
//! Integers are in the machine's own order; a machine with the other one reads
//! another version and makes its own file. The mask is kept as ranges: a
//! conversation has a handful of turns, a byte for each token would be a
//! hundred times that.
//!
//! A file is written beside its place and renamed, so it is there whole or not
//! at all; length and checksum tell a damaged one, which is then made again.
//! Two runs that make the same file at once both succeed, the later rename
//! wins.

use std::fs::{self, File};
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use tempfile::TempPath;

use crate::error::{Error, Result};
use crate::map::Map;
use crate::prepare::Report;
use crate::sample::Sample;
use crate::tokenizer::readable_by_all;

const MAGIC: &[u8; 8] = b"PEFTDATA";
/// Changes whenever the same options would make other bytes.
pub(crate) const VERSION: u32 = 3;
const HEADER: usize = 112;
/// How the names of files under construction begin.
const PARTIAL: &str = "partial-";
/// A file under construction that was not touched for so long is left over.
const ABANDONED: Duration = Duration::from_secs(3600);

/// A tokenised data set in a mapped file.
#[derive(Debug)]
pub(crate) struct Cache {
    map: Map,
    parts: Parts,
    pub(crate) report: Report,
}

/// Where the parts of the body lie in the file.
#[derive(Debug)]
struct Parts {
    ids: Range<usize>,
    ends: Range<usize>,
    span_ends: Range<usize>,
    trained: Range<usize>,
    report: Range<usize>,
}

impl Parts {
    fn of(rows: usize, tokens: usize, spans: usize, length: usize) -> Option<Self> {
        let ids_end = HEADER.checked_add(tokens.checked_mul(4)?)?;
        let ends = ids_end.checked_next_multiple_of(8)?;
        let span_ends = ends.checked_add(rows.checked_mul(8)?)?;
        let trained = span_ends.checked_add(rows.checked_mul(8)?)?;
        let report = trained.checked_add(spans.checked_mul(8)?)?;
        (report <= length).then_some(Self {
            ids: HEADER..ids_end,
            ends: ends..span_ends,
            span_ends: span_ends..trained,
            trained: trained..report,
            report: report..length,
        })
    }
}

impl Cache {
    /// The cache at `path`, if it is there, whole, and made for `key`.
    pub(crate) fn open(path: &Path, key: &[u8; 32]) -> Option<Cache> {
        let file = File::open(path).ok()?;
        Self::read(Map::of(&file).ok()?, key)
    }

    fn read(map: Map, key: &[u8; 32]) -> Option<Cache> {
        let header = map.get(..HEADER)?;
        let number = |at: usize| {
            let bytes = header[at..at + 8].try_into().ok()?;
            usize::try_from(u64::from_ne_bytes(bytes)).ok()
        };
        let body = &map[HEADER..];
        let whole = header[..8] == MAGIC[..]
            && header[8..12] == VERSION.to_ne_bytes()
            && header[16..48] == key[..]
            && number(80)? == body.len()
            && header[48..80]
                == blake3::Hasher::new()
                    .update_rayon(body)
                    .finalize()
                    .as_bytes()[..];
        if !whole {
            return None;
        }
        let (rows, tokens, spans) = (number(88)?, number(96)?, number(104)?);
        let parts = Parts::of(rows, tokens, spans, map.len())?;
        let report = serde_json::from_slice(&map[parts.report.clone()]).ok()?;
        let cache = Cache { map, parts, report };
        // The checksum holds, so this fails only for a file made to deceive.
        let climbs = |ends: &[u64], last: usize| {
            ends.is_sorted() && ends.last().is_none_or(|end| *end == last as u64)
        };
        (climbs(cache.ends(), tokens) && climbs(cache.span_ends(), spans)).then_some(cache)
    }

    pub(crate) fn len(&self) -> usize {
        self.ends().len()
    }

    /// The ids of row `at` and the ranges of them that are trained.
    pub(crate) fn row(&self, at: usize) -> (&[u32], &[[u32; 2]]) {
        let ids: &[u32] = bytemuck::cast_slice(&self.map[self.parts.ids.clone()]);
        let trained: &[[u32; 2]] = bytemuck::cast_slice(&self.map[self.parts.trained.clone()]);
        (
            &ids[span(self.ends(), at)],
            &trained[span(self.span_ends(), at)],
        )
    }

    /// How many ids row `at` has.
    pub(crate) fn row_len(&self, at: usize) -> usize {
        span(self.ends(), at).len()
    }

    fn ends(&self) -> &[u64] {
        bytemuck::cast_slice(&self.map[self.parts.ends.clone()])
    }

    fn span_ends(&self) -> &[u64] {
        bytemuck::cast_slice(&self.map[self.parts.span_ends.clone()])
    }
}

/// Part `at` of what ends at `ends[0]`, `ends[1]`, …
fn span(ends: &[u64], at: usize) -> Range<usize> {
    let start = if at == 0 { 0 } else { ends[at - 1] };
    // In range of usize: they are at most the length of a mapped file.
    start as usize..ends[at] as usize
}

/// A cache file under construction.
pub(crate) struct Writer {
    out: BufWriter<File>,
    path: Option<TempPath>,
    hasher: blake3::Hasher,
    tokens: u64,
    ends: Vec<u64>,
    span_ends: Vec<u64>,
    spans: Vec<[u32; 2]>,
}

impl Writer {
    /// Starts a file in `dir`, or one without a name where there is none.
    pub(crate) fn new(dir: Option<&Path>) -> Result<Self> {
        let (file, path) = match dir {
            None => (
                tempfile::tempfile().map_err(Error::io(&std::env::temp_dir()))?,
                None,
            ),
            Some(dir) => {
                fs::create_dir_all(dir).map_err(Error::io(dir))?;
                sweep(dir);
                let file = tempfile::Builder::new()
                    .prefix(PARTIAL)
                    .tempfile_in(dir)
                    .map_err(Error::io(dir))?;
                let (file, path) = file.into_parts();
                (file, Some(path))
            }
        };
        let mut out = BufWriter::with_capacity(1 << 20, file);
        out.write_all(&[0; HEADER]).map_err(write_error(&path))?;
        Ok(Self {
            out,
            path,
            hasher: blake3::Hasher::new(),
            tokens: 0,
            ends: Vec::new(),
            span_ends: Vec::new(),
            spans: Vec::new(),
        })
    }

    /// Appends a row.
    pub(crate) fn push(&mut self, sample: &Sample) -> Result<()> {
        self.write(bytemuck::cast_slice(&sample.ids))?;
        self.tokens += sample.ids.len() as u64;
        self.ends.push(self.tokens);
        self.spans.extend(runs(&sample.trained));
        self.span_ends.push(self.spans.len() as u64);
        Ok(())
    }

    /// Completes the file and puts it at `place`, if it has a name at all.
    pub(crate) fn finish(mut self, key: &[u8; 32], report: &Report, place: &Path) -> Result<Cache> {
        if self.tokens % 2 == 1 {
            self.write(&[0; 4])?;
        }
        let (ends, span_ends) = (
            std::mem::take(&mut self.ends),
            std::mem::take(&mut self.span_ends),
        );
        let spans = std::mem::take(&mut self.spans);
        self.write(bytemuck::cast_slice(&ends))?;
        self.write(bytemuck::cast_slice(&span_ends))?;
        self.write(bytemuck::cast_slice(&spans))?;
        let json = serde_json::to_vec(report).map_err(|error| Error::Option(error.to_string()))?;
        self.write(&json)?;

        let Self {
            out,
            path,
            hasher,
            tokens,
            ..
        } = self;
        let name = path.as_deref().unwrap_or(place).to_owned();
        let mut file = out
            .into_inner()
            .map_err(|error| Error::io(&name)(error.into_error()))?;
        let end = file.stream_position().map_err(Error::io(&name))?;
        let mut header = Vec::with_capacity(HEADER);
        header.extend(MAGIC);
        header.extend(VERSION.to_ne_bytes());
        header.extend([0; 4]);
        header.extend(key);
        header.extend(hasher.finalize().as_bytes());
        for number in [
            end - HEADER as u64,
            ends.len() as u64,
            tokens,
            spans.len() as u64,
        ] {
            header.extend(number.to_ne_bytes());
        }
        file.seek(SeekFrom::Start(0)).map_err(Error::io(&name))?;
        file.write_all(&header).map_err(Error::io(&name))?;
        if let Some(path) = path {
            readable_by_all(&file).map_err(Error::io(&name))?;
            path.persist(place)
                .map_err(|error| Error::io(place)(error.error))?;
        }
        let map = Map::of(&file).map_err(Error::io(place))?;
        Cache::read(map, key)
            .ok_or_else(|| Error::file(place, "does not read back as it was written"))
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.hasher.update(bytes);
        self.out.write_all(bytes).map_err(write_error(&self.path))
    }
}

fn write_error(path: &Option<TempPath>) -> impl FnOnce(io::Error) -> Error + '_ {
    move |source| Error::Io {
        path: path
            .as_deref()
            .map_or_else(std::env::temp_dir, Path::to_owned),
        source,
    }
}

/// The runs of `true`, as half-open ranges.
fn runs(trained: &[bool]) -> Vec<[u32; 2]> {
    let mut runs: Vec<[u32; 2]> = Vec::new();
    for (at, _) in (0u32..).zip(trained).filter(|(_, trained)| **trained) {
        match runs.last_mut() {
            Some(run) if run[1] == at => run[1] = at + 1,
            _ => runs.push([at, at + 1]),
        }
    }
    runs
}

/// Removes what killed runs left behind. Best effort: it is only rubbish.
fn sweep(dir: &Path) {
    let Ok(entries) = fs::read_dir(dir) else {
        return;
    };
    for entry in entries.flatten() {
        let partial = entry.file_name().to_string_lossy().starts_with(PARTIAL);
        let age = entry
            .metadata()
            .and_then(|about| about.modified())
            .map(|time| time.elapsed().unwrap_or_default());
        if partial && age.is_ok_and(|age| age > ABANDONED) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_a_mask() {
        assert_eq!(runs(&[true, true, false, true]), vec![[0, 2], [3, 4]]);
        assert_eq!(runs(&[]), Vec::<[u32; 2]>::new());
    }
}
