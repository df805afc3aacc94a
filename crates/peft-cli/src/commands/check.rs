//! `peft check`.

use anyhow::Result;

/// Flags of `peft check`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {}

/// Runs `peft check`.
pub(crate) fn run(_args: Args) -> Result<()> {
    Err(crate::error::usage("`peft check` is being written"))
}
