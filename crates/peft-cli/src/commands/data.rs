//! `peft data`.

use anyhow::Result;

/// Flags of `peft data`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {}

/// Runs `peft data`.
pub(crate) fn run(_args: Args) -> Result<()> {
    Err(crate::error::usage("`peft data` is being written"))
}
