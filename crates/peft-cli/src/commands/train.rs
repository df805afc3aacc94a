//! `peft train`.

use anyhow::Result;

/// Flags of `peft train`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {}

/// Runs `peft train`.
pub(crate) fn run(_args: Args) -> Result<()> {
    Err(crate::error::usage("`peft train` is being written"))
}
