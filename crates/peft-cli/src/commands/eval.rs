//! `peft eval`.

use anyhow::Result;

/// Flags of `peft eval`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {}

/// Runs `peft eval`.
pub(crate) fn run(_args: Args) -> Result<()> {
    Err(crate::error::usage("`peft eval` is being written"))
}
