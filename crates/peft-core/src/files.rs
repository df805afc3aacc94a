//! Files that are there whole or not at all.

use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
};

use crate::{Error, Result};

/// Writes a file under another name and renames it when it is on the disk. A link stays one: what it points to is replaced.
///
/// # Errors
/// If something is there that is no file, such as a folder or a device.
///
/// Whatever happens, a full disk or a kill, `path` holds the old content or the new, never half.
pub fn write(
    path: &Path,
    content: impl FnOnce(&mut dyn Write) -> std::io::Result<()>,
) -> Result<()> {
    let path = &replaceable(path)?;
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder).map_err(Error::io(folder))?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let partial = path.with_file_name(format!(".{name}.{}.partial", std::process::id()));
    let written = (|| {
        let mut file = BufWriter::new(File::create(&partial)?);
        content(&mut file)?;
        file.flush()?;
        file.get_ref().sync_all()?;
        fs::rename(&partial, path)
    })();
    written.map_err(|source| {
        let _ = fs::remove_file(&partial);
        Error::Io {
            path: path.to_owned(),
            source,
        }
    })
}

/// Where a file is put so that it lies at this path.
fn replaceable(path: &Path) -> Result<PathBuf> {
    match fs::metadata(path) {
        Ok(there) if there.is_file() && path.is_symlink() => {
            fs::canonicalize(path).map_err(Error::io(path))
        }
        Ok(there) if there.is_dir() => Err(Error::file(path, "is a folder, not a file")),
        Ok(there) if !there.is_file() => {
            Err(Error::file(path, "is no file, and is not replaced by one"))
        }
        _ => Ok(path.to_owned()),
    }
}

/// Writes text whole or not at all.
pub fn write_text(path: &Path, text: &str) -> Result<()> {
    write(path, |file| file.write_all(text.as_bytes()))
}

/// Writes JSON as Python's `json.dump(…, indent=2)` lays it out, with the outermost keys sorted.
///
/// Python sorts the inner ones too, and so changes what they mean: of two patterns the first wins.
pub fn write_json(path: &Path, json: &serde_json::Value) -> Result<()> {
    let mut json = json.clone();
    if let serde_json::Value::Object(keys) = &mut json {
        keys.sort_keys();
    }
    let text = serde_json::to_string_pretty(&json).map_err(|e| Error::file(path, e))?;
    write_text(path, &format!("{text}\n"))
}

/// Reads a JSON file; errors name file, line and column.
pub fn read_json(path: &Path) -> Result<serde_json::Value> {
    let text = fs::read_to_string(path).map_err(Error::io(path))?;
    serde_json::from_str(&text).map_err(|error| Error::file(path, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(unix)]
    fn links_stay_and_devices_too() {
        let dir = tempfile::tempdir().unwrap();
        let (file, link) = (dir.path().join("a"), dir.path().join("b"));
        write_text(&file, "1").unwrap();
        std::os::unix::fs::symlink("a", &link).unwrap();
        write_text(&link, "2").unwrap();
        assert!(link.is_symlink());
        assert_eq!(fs::read_to_string(&file).unwrap(), "2");

        let folder = write_text(dir.path(), "3").unwrap_err().to_string();
        assert!(folder.contains("is a folder"), "{folder}");
        let device = write_text(Path::new("/dev/null"), "4").unwrap_err();
        assert!(
            device.to_string().contains("/dev/null: is no file"),
            "{device}"
        );
    }
}
