//! The commands, one module each.

mod bench;
mod run;
mod synth;

use clap::{Parser, Subcommand};

/// Runs GGUF models on CPUs, fast where there is AMX.
#[derive(Parser, Debug)]
#[command(name = "tegula", version, max_term_width = 100)]
#[command(after_help = "Examples:
  tegula run -p \"An iterator adaptor that\" -n 64
  tegula run model.gguf -p \"Once upon a time\" --temp 0
  tegula bench model.gguf
  tegula doctor

Exit codes: 0 ok, 2 usage, 3 bad model or input, 4 requirement not met, 70 internal error.")]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Continue a text
    Run(Box<run::RunArgs>),
    /// Measure prompts and generation
    Bench(Box<bench::BenchArgs>),
    /// Write a model of random weights, of a real or any shape
    Synth(Box<synth::SynthArgs>),
}

/// Runs the command.
pub fn run(cli: Cli) -> anyhow::Result<()> {
    match cli.command {
        Command::Run(args) => run::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Synth(args) => synth::run(&args),
    }
}
