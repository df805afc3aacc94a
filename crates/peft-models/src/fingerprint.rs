//! Which base a model was: a hash that another one of the same shapes does not have.
//!
//! A run that goes on, or an adapter that is looked at a year later, wants to know whether the base is still the same.
//! To hash all of it takes as long as to read it, so this takes `config.json`, the names and sizes of the files, the
//! first pages of each, where a safetensors file has its header, and pages at even distances from there to the end. A
//! model that was trained on, converted or fetched anew in another revision differs in nearly all of them.

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::{Path, PathBuf},
};

use peft_core::{Error, Result};

use crate::Source;

/// What is read at once.
const PAGE: u64 = 4096;
/// From the beginning of a file.
const FIRST: u64 = 16 * PAGE;
/// Pages at even distances.
const PAGES: u64 = 256;

impl Source {
    /// 32 hexadecimal digits: those of the same files wherever they lie.
    pub fn fingerprint(&self) -> Result<String> {
        let mut hash = blake3::Hasher::new();
        match self {
            Source::Gguf(path) => sample(path, &mut hash)?,
            Source::Folder(dir) => {
                let config = dir.join("config.json");
                hash.update(&std::fs::read(&config).map_err(Error::io(&config))?);
                for path in weights_of(dir)? {
                    let name = path.file_name().unwrap_or_default();
                    hash.update(name.as_encoded_bytes());
                    sample(&path, &mut hash)?;
                }
            }
        }
        Ok(hash.finalize().to_hex()[..32].to_owned())
    }
}

fn weights_of(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(Error::io(dir))? {
        let path = entry.map_err(Error::io(dir))?.path();
        if path.extension().is_some_and(|it| it == "safetensors") {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

fn sample(path: &Path, hash: &mut blake3::Hasher) -> Result<()> {
    let mut read = || {
        let mut file = File::open(path)?;
        let len = file.metadata()?.len();
        hash.update(&len.to_le_bytes());
        let mut room = Vec::new();
        let mut take = |from: u64, count: u64| {
            room.clear();
            file.seek(SeekFrom::Start(from))?;
            file.by_ref().take(count).read_to_end(&mut room)?;
            hash.update(&room);
            Ok(())
        };
        take(0, FIRST)?;
        let step = len.saturating_sub(FIRST).div_ceil(PAGES).max(PAGE);
        (0..PAGES)
            .map(|i| FIRST + i * step)
            .take_while(|from| *from < len)
            .try_for_each(|from| take(from, PAGE))
    };
    read().map_err(Error::io(path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn another_base_has_another_one() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (dir.path().join("one"), dir.path().join("two"));
        let mut bytes = vec![7u8; 3_000_000];
        for to in [&one, &two] {
            fs::create_dir(to).unwrap();
            fs::write(to.join("config.json"), "{}").unwrap();
            fs::write(to.join("model.safetensors"), &bytes).unwrap();
        }
        let of = |dir: &Path| Source::Folder(dir.to_owned()).fingerprint().unwrap();
        let before = of(&one);
        assert_eq!(before.len(), 32);
        assert_eq!(before, of(&two), "the same wherever it lies");

        fs::write(two.join("notes.txt"), "mine").unwrap();
        assert_eq!(before, of(&two), "other files do not count");
        bytes[1_500_000..].fill(8);
        fs::write(two.join("model.safetensors"), &bytes).unwrap();
        assert_ne!(before, of(&two), "other weights");
        bytes.fill(7);
        fs::write(two.join("model.safetensors"), &bytes[..2_999_999]).unwrap();
        assert_ne!(before, of(&two), "a shorter file");
        fs::write(two.join("model.safetensors"), &bytes).unwrap();
        assert_eq!(before, of(&two));
        fs::write(two.join("config.json"), r#"{"rope_theta": 1}"#).unwrap();
        assert_ne!(before, of(&two), "another configuration");

        let file = one.join("model.safetensors");
        assert_eq!(Source::Gguf(file.clone()).fingerprint().unwrap().len(), 32);
        fs::remove_file(&file).unwrap();
        let gone = Source::Gguf(file).fingerprint().unwrap_err().to_string();
        assert!(gone.contains("model.safetensors"), "{gone}");
    }
}
