//! `peft forward`.

use anyhow::Result;

/// Flags of `peft forward`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {}

/// Runs `peft forward`.
pub(crate) fn run(_args: Args) -> Result<()> {
    Err(crate::error::usage("`peft forward` is being written"))
}
