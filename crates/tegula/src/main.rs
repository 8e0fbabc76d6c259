//! The program: `tegula COMMAND …`.
#![forbid(unsafe_code)]

mod args;
mod cmd;
mod exit;
mod facts;
mod interrupt;
mod output;
mod progress;
mod synth;

use clap::Parser as _;
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = cmd::Cli::parse_from(args::spell_out(std::env::args_os()));
    exit::guard(|| cmd::run(cli))
}
