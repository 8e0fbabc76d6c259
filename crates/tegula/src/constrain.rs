//! `--json-schema`, `--grammar`, `--regex`: what the output has to be, for run and chat.

use crate::{args::read_text, exit::Refusal};
use clap::Args;
use std::path::PathBuf;
use tegula_gguf::Tokenizer;
use tegula_grammar::{Compiler, Grammar, Guide};

/// What the output has to be.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Constrained output")]
#[group(id = "constraint", multiple = false)]
pub struct ConstraintArgs {
    /// Write JSON that this schema describes; {} for any JSON
    #[arg(short, long, value_name = "SCHEMA")]
    json_schema: Option<String>,
    /// File with the schema
    #[arg(long, value_name = "FILE")]
    json_schema_file: Option<PathBuf>,
    /// Write what this grammar describes, in GBNF or in Lark's syntax
    #[arg(long, value_name = "GRAMMAR")]
    grammar: Option<String>,
    /// File with the grammar
    #[arg(long, value_name = "FILE")]
    grammar_file: Option<PathBuf>,
    /// Write what this regular expression matches as a whole
    #[arg(long, value_name = "REGEX", allow_hyphen_values = true)]
    regex: Option<String>,
}

impl ConstraintArgs {
    /// The grammar, if one was given.
    pub fn grammar(&self) -> anyhow::Result<Option<Grammar>> {
        let schema = |text: &str, from: &str| {
            let parsed = serde_json::from_str(text);
            parsed
                .map(Grammar::JsonSchema)
                .map_err(|e| Refusal::Input(format!("{from}: the schema is not JSON: {e}")))
        };
        Ok(if let Some(text) = &self.json_schema {
            Some(schema(text, "--json-schema")?)
        } else if let Some(path) = &self.json_schema_file {
            Some(schema(&read_text(path)?, &path.display().to_string())?)
        } else if let Some(text) = &self.grammar {
            Some(Grammar::Grammar(text.clone()))
        } else if let Some(path) = &self.grammar_file {
            Some(Grammar::Grammar(read_text(path)?))
        } else {
            self.regex.clone().map(Grammar::Regex)
        })
    }
}

/// The constraint of one answer.
pub fn guide(grammar: &Grammar, tokenizer: &Tokenizer) -> Result<Guide, Refusal> {
    let guide = Compiler::new(tokenizer).compile(grammar);
    guide.map_err(|e| Refusal::Input(e.to_string()))
}
