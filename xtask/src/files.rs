//! Copying files, with errors that name both ends.

use anyhow::{Context, Result};
use std::fs;
use std::path::Path;

/// Copies a folder with all that is in it.
pub(crate) fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let path = entry?.path();
        let to = to.join(path.file_name().context("a file without a name")?);
        if path.is_dir() {
            copy_tree(&path, &to)?
        } else {
            copy(&path, &to)?
        }
    }
    Ok(())
}

/// Copies a file, following links.
pub(crate) fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to)
        .with_context(|| format!("cannot copy `{}` to `{}`", from.display(), to.display()))?;
    Ok(())
}
