//! `peft generate`.

use anyhow::Result;

/// Flags of `peft generate`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {}

/// Runs `peft generate`.
pub(crate) fn run(_args: Args) -> Result<()> {
    Err(crate::error::usage("`peft generate` is being written"))
}
