//! The commands, one module each.

mod bench;
mod chat;
mod completions;
mod config;
mod doctor;
mod explain;
mod inspect;
mod list;
mod logits;
mod perplexity;
mod prune;
mod pull;
mod quantize;
mod rm;
mod run;
mod serve;
mod synth;
mod tokenize;

use clap::{Parser, Subcommand};

/// Runs GGUF models on CPUs, fast where there is AMX.
#[derive(Parser, Debug)]
#[command(name = "tegula", version, max_term_width = 100)]
#[command(after_help = "Examples:
  tegula run -p \"An iterator adaptor that\" -n 64
  tegula run model.gguf -p \"Once upon a time\" --temp 0
  tegula bench model.gguf
  tegula doctor

Every flag can also be set by a variable TEGULA_FLAG or in a file: see `tegula config --help`.

Exit codes: 0 ok, 2 usage, 3 bad model or input, 4 requirement not met, 70 internal error.")]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Configuration file [default: tegula/config.toml in XDG_CONFIG_HOME or ~/.config]
    #[arg(long, value_name = "FILE", global = true)]
    config: Option<std::path::PathBuf>,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Continue a text
    Run(Box<run::RunArgs>),
    /// Have a conversation
    Chat(Box<chat::ChatArgs>),
    /// Serve a model over HTTP, as OpenAI's API and as a page
    Serve(Box<serve::ServeArgs>),
    /// Fetch a model from a Hugging Face hub
    Pull(pull::PullArgs),
    /// List the models that were fetched
    List(list::ListArgs),
    /// Remove a model that was fetched
    Rm(rm::RmArgs),
    /// Measure prompts and generation
    Bench(Box<bench::BenchArgs>),
    /// Score a text: perplexity as llama.cpp counts it
    Perplexity(Box<perplexity::PerplexityArgs>),
    /// Show what the model makes of a prompt's last position
    Logits(Box<logits::LogitsArgs>),
    /// Turn text into token ids
    Tokenize(tokenize::TokenizeArgs),
    /// List a file's metadata, tensors and types
    Inspect(inspect::InspectArgs),
    /// Say where each tensor goes, which kernel reads it, and why
    Explain(Box<explain::ExplainArgs>),
    /// Say what this machine has for inference, and why not more
    Doctor(doctor::DoctorArgs),
    /// Write a model in smaller types
    Quantize(Box<quantize::QuantizeArgs>),
    /// Make weights zero, by magnitude or with the norms of their inputs (Wanda)
    Prune(Box<prune::PruneArgs>),
    /// Write a model of random weights, of a real or any shape
    Synth(Box<synth::SynthArgs>),
    /// Show which flags are set, and by what
    Config(config::ConfigArgs),
    /// Print a script that completes commands and flags in a shell
    Completions(completions::CompletionsArgs),
}

/// Runs the command.
pub fn run(cli: Cli) -> anyhow::Result<()> {
    match cli.command {
        Command::Run(args) => run::run(&args),
        Command::Chat(args) => chat::run(&args),
        Command::Serve(args) => serve::run(&args),
        Command::Pull(args) => pull::run(&args),
        Command::List(args) => list::run(&args),
        Command::Rm(args) => rm::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Perplexity(args) => perplexity::run(&args),
        Command::Logits(args) => logits::run(&args),
        Command::Tokenize(args) => tokenize::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Explain(args) => explain::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Quantize(args) => quantize::run(&args),
        Command::Prune(args) => prune::run(&args),
        Command::Synth(args) => synth::run(&args),
        Command::Config(args) => config::run(&args, cli.config.as_deref()),
        Command::Completions(args) => completions::run(&args),
    }
}
