//! `peft info`.

use anyhow::Result;

/// Flags of `peft info`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {}

/// Runs `peft info`.
pub(crate) fn run(_args: Args) -> Result<()> {
    Err(crate::error::usage("`peft info` is being written"))
}
