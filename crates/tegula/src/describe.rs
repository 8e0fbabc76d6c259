//! What describes the program, made from what it is: the command line's page, manual pages and
//! completions from its definition of commands, the page of formats from the kernels' tables.

mod formats;

use crate::{args, cmd::Cli, settings};
use clap::{Arg, Command, CommandFactory as _};
use clap_complete::Shell;
use std::{collections::BTreeMap, fmt::Write as _, io};

/// The definition of all commands.
fn command() -> Command {
    let mut command = Cli::command();
    command.build();
    // Filled in by clap; those of `help` would describe it thrice.
    command
}

/// The script that completes commands and flags in a shell.
pub fn completions(shell: Shell) -> String {
    let mut out = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "tegula", &mut out);
    // Generated from this program's own text, which is UTF-8.
    String::from_utf8_lossy(&out).into_owned()
}

/// Everything that is generated, by its path under `docs/`: the page `cli.md`, the book's page of
/// formats, manual pages in `man/`, completions in `completions/`.
pub fn files() -> io::Result<BTreeMap<String, String>> {
    let mut files = BTreeMap::from([
        ("cli.md".to_owned(), page()),
        ("book/src/formats.md".to_owned(), formats::page()),
    ]);
    for (shell, name) in [
        (Shell::Bash, "tegula.bash"),
        (Shell::Fish, "tegula.fish"),
        (Shell::Zsh, "_tegula"),
    ] {
        files.insert(format!("completions/{name}"), completions(shell));
    }
    manuals(&command(), "tegula", &mut files)?;
    Ok(files)
}

/// Whether the words behind `tegula` are a command line, without running it; otherwise what is
/// wrong with them.
pub fn understands(words: &[String]) -> Result<(), String> {
    let program = std::iter::once("tegula".into());
    let line = args::spell_out(program.chain(words.iter().map(Into::into)));
    match Cli::command().try_get_matches_from(line) {
        // To ask for help is understood, too.
        Err(e) if e.use_stderr() => Err(e.to_string()),
        _ => Ok(()),
    }
}

/// A manual page per command.
fn manuals(command: &Command, name: &str, files: &mut BTreeMap<String, String>) -> io::Result<()> {
    let named = command.clone().name(name.to_owned());
    let mut out = Vec::new();
    clap_mangen::Man::new(named)
        .title(name.to_uppercase())
        .render(&mut out)?;
    let text = String::from_utf8_lossy(&out).into_owned();
    files.insert(format!("man/{name}.1"), text);
    for sub in commands(command) {
        manuals(sub, &format!("{name}-{}", sub.get_name()), files)?;
    }
    Ok(())
}

/// Subcommands except clap's own `help`.
fn commands(command: &Command) -> impl Iterator<Item = &Command> {
    command.get_subcommands().filter(|c| c.get_name() != "help")
}

const INTRODUCTION: &str = "# The command line

Flags behind one dash with several letters (`-ub`, `-ctk`) are llama.cpp's names of the long flags
that mention them.

Every flag with a variable beside it can be set by the environment, too, and by a configuration
file: `tegula/config.toml` in `$XDG_CONFIG_HOME` or `~/.config`, or what `--config` or
`TEGULA_CONFIG` name. The command line wins over the environment, the environment over the file
(a command's table over its top), the file over the default; `tegula config show COMMAND --origin`
shows who won. Flags that take no value are set by `true`, `1`, `yes` or `on`. In the file names are
written without dashes:

```toml
threads = 8          # every command that has --threads

[chat]
temp = 0.6
system = \"Answer in one sentence.\"
```

Exit codes: 0 ok, 2 usage, 3 bad model or input, 4 requirement not met, 70 internal error.
";

/// The page of all commands and flags.
fn page() -> String {
    let mut out = INTRODUCTION.to_owned();
    section(&command(), "tegula", &mut out);
    out
}

fn section(command: &Command, name: &str, out: &mut String) {
    for sub in commands(command) {
        let name = format!("{name} {}", sub.get_name());
        let usage = sub.clone().render_usage().to_string();
        let usage = usage.trim_start_matches("Usage: ");
        let about = sub.get_about().map(ToString::to_string).unwrap_or_default();
        // Writing to a String can't fail.
        let _ = write!(out, "\n## {name}\n\n{about}.\n\n```\n{usage}\n```\n");
        let mut table = String::new();
        for arg in sub.get_arguments().filter(|a| !a.is_hide_set()) {
            row(arg, &mut table);
        }
        if !table.is_empty() {
            let _ = write!(
                out,
                "\n| argument | meaning | default | variable |\n|---|---|---|---|\n{table}"
            );
        }
        if let Some(help) = sub.get_after_help() {
            let _ = write!(out, "\n```text\n{}\n```\n", help.to_string().trim_end());
        }
        section(sub, &name, out);
    }
}

fn row(arg: &Arg, out: &mut String) {
    let cell = |text: &str| text.replace('|', "\\|").replace('\n', " ");
    let values = arg.get_value_names().unwrap_or_default();
    let values: Vec<&str> = values.iter().map(clap::builder::Str::as_str).collect();
    let values = match arg.get_action().takes_values() {
        true => values.join(" "),
        false => String::new(),
    };
    let mut names = Vec::new();
    names.extend(arg.get_short().map(|c| format!("-{c}")));
    names.extend(arg.get_long().map(|l| format!("--{l}")));
    let optional = arg.get_num_args().is_some_and(|n| n.min_values() == 0);
    let name = match (names.is_empty(), values.is_empty(), optional) {
        (true, _, _) => values,
        (false, true, _) => names.join(", "),
        (false, false, true) => format!("{}[={values}]", names.join(", ")),
        (false, false, false) => format!("{} {values}", names.join(", ")),
    };
    let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
    let defaults: Vec<_> = arg
        .get_default_values()
        .iter()
        .map(|v| v.to_string_lossy())
        .collect();
    let default = match arg.get_action().takes_values() && !defaults.is_empty() {
        true => format!("`{}`", defaults.join(",")),
        false => String::new(),
    };
    let variable = match arg.get_long().filter(|_| settings::is_settable(arg)) {
        Some(long) => format!("`{}`", settings::variable(long)),
        None => String::new(),
    };
    let _ = writeln!(
        out,
        "| `{}` | {} | {} | {} |",
        cell(&name),
        cell(&help),
        cell(&default),
        variable
    );
}
