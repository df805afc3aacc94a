//! `peft chat`.

use anyhow::Result;

/// Flags of `peft chat`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {}

/// Runs `peft chat`.
pub(crate) fn run(_args: Args) -> Result<()> {
    Err(crate::error::usage("`peft chat` is being written"))
}
