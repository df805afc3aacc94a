//! `peft completions`: what a shell needs to complete our command line.

use anyhow::Result;
use clap::CommandFactory;
use clap_complete::Shell;

/// Which shell.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "For bash: peft completions bash > ~/.local/share/bash-completion/completions/peft"
)]
pub(crate) struct Args {
    /// The shell
    shell: Shell,
}

/// Prints the script.
pub(crate) fn run<Cli: CommandFactory>(args: Args) -> Result<()> {
    clap_complete::generate(
        args.shell,
        &mut Cli::command(),
        "peft",
        &mut std::io::stdout(),
    );
    Ok(())
}
