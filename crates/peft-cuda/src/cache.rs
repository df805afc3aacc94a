//! Compiled kernels, kept between runs: a file for each source and architecture.
//!
//! ```text
//! ~/.cache/peft/cuda/dequantise.cu-sm90-1f0c…: BLAKE3 of the image, 32 bytes; the image
//! ```
//!
//! The name holds a hash of the text and of the options it is compiled with, so another version of this crate has files of its own. A
//! file is written beside and renamed; one that is cut short or changed does not agree with its hash and counts as none.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
};

use crate::{kernels::Source, nvrtc};

/// Where an image is kept.
#[derive(Debug)]
pub(crate) struct Place {
    folder: PathBuf,
    name: String,
}

impl Place {
    /// In the user's cache; none where there is no user's cache.
    pub(crate) fn of(source: Source, arch: u32) -> Option<Place> {
        let named = |name| {
            std::env::var_os(name)
                .filter(|it| !it.is_empty())
                .map(PathBuf::from)
        };
        let user =
            named("XDG_CACHE_HOME").or_else(|| named("HOME").map(|home| home.join(".cache")))?;
        Some(Place::within(&user.join("peft").join("cuda"), source, arch))
    }

    fn within(folder: &Path, source: Source, arch: u32) -> Place {
        let mut hash = blake3::Hasher::new();
        hash.update(source.text().as_bytes());
        for option in nvrtc::OPTIONS {
            hash.update(b"\0").update(option.to_bytes());
        }
        let hash = hash.finalize().to_hex();
        Place {
            folder: folder.to_owned(),
            name: format!("{}-sm{arch}-{}", source.file(), &hash[..32]),
        }
    }

    /// The image, if it is there and whole.
    pub(crate) fn read(&self) -> Option<Vec<u8>> {
        let bytes = fs::read(self.folder.join(&self.name)).ok()?;
        let (hash, image) = bytes.split_at_checked(blake3::OUT_LEN)?;
        (blake3::hash(image).as_bytes()[..] == *hash).then(|| image.to_owned())
    }

    /// Keeps an image. What cannot be kept is compiled again the next time, so a full disk is nobody's error.
    pub(crate) fn write(&self, image: &[u8]) {
        let _ = self.try_write(image);
    }

    fn try_write(&self, image: &[u8]) -> std::io::Result<()> {
        fs::create_dir_all(&self.folder)?;
        let mut file = tempfile::NamedTempFile::new_in(&self.folder)?;
        file.write_all(blake3::hash(image).as_bytes())?;
        file.write_all(image)?;
        file.persist(self.folder.join(&self.name))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_kept_is_read_and_what_is_damaged_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let place = Place::within(&folder.path().join("new"), Source::Quantise, 90);
        assert_eq!(place.read(), None);
        place.write(b"an image");
        assert_eq!(place.read().unwrap(), b"an image");
        place.write(b"another");
        assert_eq!(place.read().unwrap(), b"another");
        let path = place.folder.join(&place.name);
        let whole = fs::read(&path).unwrap();
        for cut in [0, 31, 32, whole.len() - 1] {
            fs::write(&path, &whole[..cut]).unwrap();
            assert_eq!(place.read(), None, "{cut} bytes");
        }
        for at in [0, 31, 32, whole.len() - 1] {
            let mut changed = whole.clone();
            changed[at] ^= 1;
            fs::write(&path, &changed).unwrap();
            assert_eq!(place.read(), None, "byte {at}");
        }
        assert_eq!(fs::read_dir(&place.folder).unwrap().count(), 1);
    }

    #[test]
    fn each_source_and_architecture_has_its_file() {
        let name = |source, arch| Place::within(Path::new("a"), source, arch).name;
        assert_ne!(name(Source::Quantise, 80), name(Source::Quantise, 90));
        assert_ne!(name(Source::Quantise, 80), name(Source::AdamW, 80));
    }
}
