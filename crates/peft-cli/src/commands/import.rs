//! `peft import`.

use anyhow::Result;

/// Flags of `peft import`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {}

/// Runs `peft import`.
pub(crate) fn run(_args: Args) -> Result<()> {
    Err(crate::error::usage("`peft import` is being written"))
}
