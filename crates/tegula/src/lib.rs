//! The program `tegula`, as a library so that what describes it (pages, completions, checks) has
//! the same definition of its commands as the program itself.
#![forbid(unsafe_code)]

#[macro_use]
mod output;
mod args;
mod cmd;
mod constrain;
pub mod describe;
mod exit;
mod facts;
mod gpu;
mod hub;
mod interrupt;
mod lora;
mod progress;
mod serve;
mod settings;
mod synth;

use clap::{CommandFactory as _, FromArgMatches as _};
use std::process::ExitCode;

/// Runs the program with the process's arguments.
pub fn main() -> ExitCode {
    let given = args::spell_out(std::env::args_os());
    exit::guard(|| {
        let command = cmd::Cli::command();
        let given = settings::apply(&command, given)?;
        let mut matches = given.parse(command).unwrap_or_else(|e| e.exit());
        let cli = cmd::Cli::from_arg_matches_mut(&mut matches).unwrap_or_else(|e| e.exit());
        cmd::run(cli)
    })
}
