//! `config`: which flags are set, and by what.

use crate::{
    cmd::Cli,
    exit::Refusal,
    output,
    settings::{self, Origin},
};
use clap::{Args, CommandFactory as _, Subcommand};
use serde::Serialize;
use std::path::Path;

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  tegula config show                 # what environment and file set, for all commands
  tegula config show chat --origin   # every flag of chat, with where its value comes from
  tegula config path

A flag's value is what the command line says; or the variable TEGULA_ with the flag's name
(TEGULA_CTX_SIZE for --ctx-size); or the configuration file; or the default. The file has flags'
names without dashes at its top, for all commands that have them, and in tables for one command:

  threads = 8
  [chat]
  temp = 0.6
  stop = [\"###\"]")]
pub struct ConfigArgs {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand, Debug)]
enum Action {
    /// Show the flags of a command, or those that are set of all commands
    Show(ShowArgs),
    /// Print where the configuration file is or would be
    Path,
}

#[derive(Args, Debug)]
struct ShowArgs {
    /// Whose flags
    #[arg(value_name = "COMMAND")]
    of: Option<String>,
    /// Say where each value comes from
    #[arg(long)]
    origin: bool,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Row {
    command: String,
    flag: String,
    /// `null`: not set, and no default. Of a secret only that it is set.
    value: Option<String>,
    origin: String,
}

pub fn run(args: &ConfigArgs, file: Option<&Path>) -> anyhow::Result<()> {
    match &args.action {
        Action::Show(args) => show(args, file),
        Action::Path => {
            let path = settings::file(file).or_else(settings::default_file);
            let path = path.ok_or_else(|| {
                let what = "there is no home directory: set XDG_CONFIG_HOME or TEGULA_CONFIG";
                Refusal::Requirement(what.to_owned())
            })?;
            output::line(&path.display().to_string())
        }
    }
}

fn show(args: &ShowArgs, file: Option<&Path>) -> anyhow::Result<()> {
    let mut all = Cli::command();
    all.build();
    let rows = match &args.of {
        Some(name) => {
            let found = all.find_subcommand(name);
            let command =
                found.ok_or_else(|| Refusal::Usage(format!("there is no command `{name}`")))?;
            rows(&all, command, file, true)?
        }
        None => {
            let mut every = Vec::new();
            for command in all.get_subcommands() {
                every.extend(rows(&all, command, file, false)?);
            }
            every
        }
    };
    if args.json {
        return output::json(&rows);
    }
    for row in &rows {
        let command = match args.of {
            Some(_) => String::new(),
            None => format!("{} ", row.command),
        };
        let value = row.value.as_deref().unwrap_or("(unset)");
        let line = format!("{command}{} = {value}", row.flag);
        match args.origin {
            true => output::line(&format!("{line:40} # {}", row.origin))?,
            false => output::line(&line)?,
        }
    }
    if rows.is_empty() {
        say!("neither environment nor configuration file set a flag");
    }
    Ok(())
}

/// The flags of a command that are set or, with `defaults`, all of them.
fn rows(
    all: &clap::Command,
    command: &clap::Command,
    file: Option<&Path>,
    defaults: bool,
) -> Result<Vec<Row>, Refusal> {
    let set = settings::collect(all, command, file)?;
    let row = |flag: &str, value: Option<String>, origin: &Origin| Row {
        command: command.get_name().to_owned(),
        flag: flag.to_owned(),
        value,
        origin: origin.to_string(),
    };
    let mut rows = Vec::new();
    for arg in command.get_arguments().filter(|a| settings::is_settable(a)) {
        let flag = arg.get_long().unwrap_or_default();
        if let Some(s) = set.iter().find(|s| s.flag == flag) {
            let value = match s.values.as_slice() {
                _ if settings::is_secret(flag) => "(a secret)".to_owned(),
                [] => "true".to_owned(),
                values => values.join(","),
            };
            rows.push(row(flag, Some(value), &s.origin));
        } else if defaults {
            let values = arg.get_default_values().iter();
            let values: Vec<_> = values.map(|v| v.to_string_lossy()).collect();
            let value = (!values.is_empty()).then(|| values.join(","));
            rows.push(row(flag, value, &Origin::Default));
        }
    }
    Ok(rows)
}
