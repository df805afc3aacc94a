//! A file seen as memory: for data files and for the cache.
//!
//! Rows are read where they lie, so a data set larger than memory works, and
//! runs over the same cache share its pages. This is the crate's one `unsafe`.

use std::fs::File;
use std::ops::Deref;

/// The bytes of a file.
#[derive(Debug)]
pub(crate) struct Map(Option<memmap2::Mmap>);

impl Map {
    /// Maps the whole of `file`. An empty file, which cannot be mapped, is no bytes.
    pub(crate) fn of(file: &File) -> std::io::Result<Self> {
        if file.metadata()?.len() == 0 {
            return Ok(Self(None));
        }
        // SAFETY: the map is read-only and only ever seen as bytes or plain
        // integers, for which any content is valid; text in it is checked and
        // copied before use. Cache files are replaced, never written to.
        let map = unsafe { memmap2::Mmap::map(file)? };
        Ok(Self(Some(map)))
    }
}

impl Deref for Map {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.0.as_deref().unwrap_or_default()
    }
}
