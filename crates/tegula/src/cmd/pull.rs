//! `pull`: fetches a model into the cache.

use crate::{
    hub::{Cache, Client, Reference},
    output,
};
use clap::Args;
use serde::Serialize;
use std::path::Path;

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  tegula pull hf:Qwen/Qwen3-0.6B-GGUF:Q8_0
  tegula pull hf:OWNER/REPO            # of several types the first of a list, Q4_K_M before all
  tegula pull hf:OWNER/REPO/dir/model-Q4_0.gguf

Files go to the cache that Python's huggingface_hub uses, too: HF_HUB_CACHE, or hub in HF_HOME
[default: ~/.cache/huggingface/hub]. Other variables: HF_ENDPOINT (another hub), HF_TOKEN (for
what is gated or private), HTTPS_PROXY. What breaks off goes on where it was. Every file's
SHA-256 sum is checked.")]
pub struct PullArgs {
    /// hf:OWNER/REPO[@REVISION][:QUANT], or hf:OWNER/REPO/FILE.gguf
    #[arg(value_name = "NAME")]
    name: Reference,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report<'a> {
    model: String,
    path: &'a Path,
    files: &'a [String],
    bytes: u64,
    fetched_bytes: u64,
}

pub fn run(args: &PullArgs) -> anyhow::Result<()> {
    let pulled = Client::from_env(Cache::from_env()?)?.pull(&args.name)?;
    if args.json {
        return output::json(&Report {
            model: args.name.to_string(),
            path: &pulled.first,
            files: &pulled.files,
            bytes: pulled.bytes,
            fetched_bytes: pulled.fetched,
        });
    }
    let how = match pulled.fetched {
        0 => "was there already".to_owned(),
        n => format!("{} fetched", output::bytes(n)),
    };
    say!("{}: {}, {how}", args.name, output::bytes(pulled.bytes));
    output::line(&pulled.first.display().to_string())
}
