//! `tokenize`: text to token ids.

use crate::{
    args::{ModelArgs, read_text, unescape},
    output,
};
use clap::Args;
use serde::Serialize;
use std::path::{Path, PathBuf};
use tegula_gguf::{Tokenizer, tokenizer::EncodeOptions};

#[derive(Args, Debug)]
#[command(group = clap::ArgGroup::new("text").required(true))]
#[command(after_help = "Examples:
  tegula tokenize -p \"Hello, world\"
  tegula tokenize vocab.gguf --stdin --ids < text.txt

Works on vocabulary-only files.")]
pub struct TokenizeArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// The text
    #[arg(
        short,
        long,
        value_name = "TEXT",
        allow_hyphen_values = true,
        group = "text"
    )]
    prompt: Option<String>,
    /// File with the text
    #[arg(short, long, value_name = "FILE", group = "text")]
    file: Option<PathBuf>,
    /// Read the text from standard input
    #[arg(long, group = "text")]
    stdin: bool,
    /// Print the ids alone, as a list
    #[arg(long)]
    ids: bool,
    /// Don't add the tokens that the model wants at the beginning and the end
    #[arg(long)]
    no_bos: bool,
    /// Control tokens in the text are text like any other
    #[arg(long)]
    no_parse_special: bool,
    /// Take backslashes as they are
    #[arg(long)]
    no_escape: bool,
    /// Print the number of tokens, too
    #[arg(long)]
    show_count: bool,
    /// Print one JSON document
    #[arg(long, conflicts_with_all = ["ids", "show_count"])]
    json: bool,
}

#[derive(Serialize)]
struct Report<'a> {
    tokens: &'a [u32],
    pieces: Vec<String>,
}

pub fn run(args: &TokenizeArgs) -> anyhow::Result<()> {
    let mut text = match (&args.prompt, &args.file) {
        (Some(text), _) => text.clone(),
        (None, Some(path)) => read_text(path)?,
        (None, None) => read_text(Path::new("-"))?,
    };
    if !args.no_escape {
        text = unescape(&text);
    }
    let gguf = args.model.open()?;
    let tokenizer = Tokenizer::from_gguf(&gguf)?;
    for warning in tokenizer.warnings() {
        say!("warning: {warning}");
    }
    let options = EncodeOptions {
        add_special: !args.no_bos,
        parse_special: !args.no_parse_special,
    };
    let tokens = tokenizer.encode(&text, options);
    let piece = |&id: &u32| String::from_utf8_lossy(&tokenizer.piece(id)).into_owned();
    if args.json {
        return output::json(&Report {
            tokens: &tokens,
            pieces: tokens.iter().map(piece).collect(),
        });
    }
    let mut out = String::new();
    if args.ids {
        out = format!("{tokens:?}\n");
    } else {
        for id in &tokens {
            out += &format!("{id:6} -> '{}'\n", piece(id));
        }
    }
    if args.show_count {
        out += &format!("Total number of tokens: {}\n", tokens.len());
    }
    output::text(&out)
}
