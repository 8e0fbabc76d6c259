//! `completions`: scripts for shells.

use crate::{describe, output};
use clap::Args;
use clap_complete::Shell;

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  tegula completions bash > ~/.local/share/bash-completion/completions/tegula
  tegula completions zsh > ~/.zfunc/_tegula
  tegula completions fish > ~/.config/fish/completions/tegula.fish")]
pub struct CompletionsArgs {
    /// Which shell
    #[arg(value_name = "SHELL")]
    shell: Shell,
}

pub fn run(args: &CompletionsArgs) -> anyhow::Result<()> {
    output::text(&describe::completions(args.shell))
}
