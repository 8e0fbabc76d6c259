//! `rm`: removes a model from the cache.

use crate::{
    hub::{Cache, Reference},
    output,
};
use clap::Args;
use serde::Serialize;

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  tegula rm hf:Qwen/Qwen3-0.6B-GGUF:Q8_0
  tegula rm hf:Qwen/Qwen3-0.6B-GGUF        # all its models, and what an interrupted pull left

Files of the repository that are no GGUF models stay, since other programs may use them.")]
pub struct RmArgs {
    /// hf:OWNER/REPO[:QUANT], or hf:OWNER/REPO/FILE.gguf
    #[arg(value_name = "NAME")]
    name: Reference,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    removed: Vec<String>,
    freed_bytes: u64,
}

pub fn run(args: &RmArgs) -> anyhow::Result<()> {
    let (removed, freed_bytes) = Cache::from_env()?.remove(&args.name)?;
    if args.json {
        return output::json(&Report {
            removed,
            freed_bytes,
        });
    }
    for file in removed {
        say!("removed {file}");
    }
    say!("freed {}", output::bytes(freed_bytes));
    Ok(())
}
