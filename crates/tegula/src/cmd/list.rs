//! `list`: the models in the cache.

use crate::{hub::Cache, output};
use clap::Args;
use serde::Serialize;
use std::path::Path;

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  tegula list
  tegula list --json

Lists the complete GGUF files in the cache of models (see `tegula pull --help`), whoever put
them there.")]
pub struct ListArgs {
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Row<'a> {
    model: String,
    commit: &'a str,
    bytes: u64,
    path: &'a Path,
}

pub fn run(args: &ListArgs) -> anyhow::Result<()> {
    let all = Cache::from_env()?.list()?;
    let rows: Vec<Row> = all
        .iter()
        .map(|c| Row {
            model: format!("hf:{}/{}", c.repo, c.files[0]),
            commit: &c.commit,
            bytes: c.bytes,
            path: &c.first,
        })
        .collect();
    if args.json {
        return output::json(&rows);
    }
    let wide = rows.iter().map(|r| r.model.len()).max().unwrap_or(0);
    for row in &rows {
        let size = output::bytes(row.bytes);
        output::line(&format!("{:wide$}  {size:>12}", row.model))?;
    }
    if rows.is_empty() {
        say!("no models in the cache; `tegula pull` fetches one");
    }
    Ok(())
}
