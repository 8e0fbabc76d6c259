//! The program: `tegula COMMAND …`.
#![forbid(unsafe_code)]

#[macro_use]
mod output;
mod args;
mod cmd;
mod constrain;
mod exit;
mod facts;
mod gpu;
mod interrupt;
mod progress;
mod serve;
mod synth;

use clap::Parser as _;
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = cmd::Cli::parse_from(args::spell_out(std::env::args_os()));
    exit::guard(|| cmd::run(cli))
}
