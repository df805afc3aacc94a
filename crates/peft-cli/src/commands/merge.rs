//! `peft merge`.

use anyhow::Result;

/// Flags of `peft merge`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {}

/// Runs `peft merge`.
pub(crate) fn run(_args: Args) -> Result<()> {
    Err(crate::error::usage("`peft merge` is being written"))
}
