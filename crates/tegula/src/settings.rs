//! Flags from elsewhere than the command line.
//!
//! A flag's value is, in this order: what the command line says, the environment variable
//! `TEGULA_` with the flag's name, the configuration file (the command's table before the
//! top), the default. Everything but the default is put in front of the command line's own
//! flags, so clap reads and checks all of them alike; what the command line contradicts is
//! left out.

use crate::exit::Refusal;
use clap::{
    Arg, ArgAction, ArgMatches, Command,
    error::{ContextKind, ContextValue},
    parser::ValueSource,
};
use std::{
    env,
    ffi::{OsStr, OsString},
    fmt, fs, io,
    path::{Path, PathBuf},
};
use toml::{Table, Value};

/// Where a flag's value comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The default.
    Default,
    /// This file, in this table (empty: the top).
    File(PathBuf, String),
    /// This variable of the environment.
    Variable(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Default => f.write_str("default"),
            Origin::File(path, table) if table.is_empty() => write!(f, "{}", path.display()),
            Origin::File(path, table) => write!(f, "{} [{table}]", path.display()),
            Origin::Variable(name) => f.write_str(name),
        }
    }
}

/// A flag that is set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// Without the dashes.
    pub flag: String,
    /// Several for flags that may be repeated; none for those that take no value.
    pub values: Vec<String>,
    pub origin: Origin,
}

impl Setting {
    /// As arguments: `--flag=value`.
    fn arguments(&self) -> Vec<OsString> {
        match self.values.is_empty() {
            true => vec![format!("--{}", self.flag).into()],
            false => {
                let of = |v: &String| format!("--{}={v}", self.flag).into();
                self.values.iter().map(of).collect()
            }
        }
    }
}

/// A command line with the settings that belong to it.
pub struct Given {
    arguments: Vec<OsString>,
    settings: Vec<Setting>,
}

impl Given {
    /// Parses the command line; an error in a setting says where it is.
    pub fn parse(self, command: Command) -> Result<ArgMatches, clap::Error> {
        command
            .try_get_matches_from(self.arguments)
            .map_err(|mut e| {
                let named = match e.get(ContextKind::InvalidArg) {
                    Some(ContextValue::String(arg)) => arg.clone(),
                    _ => return e,
                };
                let flag = named.split([' ', '=', '[']).next().unwrap_or(&named);
                let at_fault = |s: &&Setting| flag.strip_prefix("--") == Some(s.flag.as_str());
                if let Some(setting) = self.settings.iter().find(at_fault) {
                    let name = format!("{named} (set by {})", setting.origin);
                    e.insert(ContextKind::InvalidArg, ContextValue::String(name));
                }
                e
            })
    }
}

/// Whether a flag can be set from outside the command line.
pub fn is_settable(arg: &Arg) -> bool {
    let once = matches!(
        arg.get_action(),
        ArgAction::Help | ArgAction::HelpShort | ArgAction::HelpLong | ArgAction::Version
    );
    arg.get_long().is_some() && !once && arg.get_id() != "config"
}

/// Flags whose values are shown to nobody.
const SECRET: &[&str] = &["api-key"];

/// Whether a flag's value is a secret: it may be set anywhere, and is shown nowhere.
pub fn is_secret(flag: &str) -> bool {
    SECRET.contains(&flag)
}

/// The variable that sets a flag.
pub fn variable(flag: &str) -> String {
    format!("TEGULA_{}", flag.to_uppercase().replace('-', "_"))
}

/// The configuration file that is used: the one that was named, which must be there, or the
/// user's, if there is one.
pub fn file(named: Option<&Path>) -> Option<PathBuf> {
    let set = |name: &str| {
        env::var_os(name)
            .filter(|v| !v.is_empty())
            .map(PathBuf::from)
    };
    if let Some(path) = named.map(Path::to_owned).or_else(|| set("TEGULA_CONFIG")) {
        return Some(path);
    }
    default_file().filter(|path| path.exists())
}

/// Where the user's configuration file is looked for.
pub fn default_file() -> Option<PathBuf> {
    let config = match env::var_os("XDG_CONFIG_HOME").filter(|v| !v.is_empty()) {
        Some(dir) => PathBuf::from(dir),
        None => env::home_dir()?.join(".config"),
    };
    Some(config.join("tegula/config.toml"))
}

/// Adds to a command line what environment and configuration file set for its command.
pub fn apply(command: &Command, mut arguments: Vec<OsString>) -> Result<Given, Refusal> {
    let unchanged = |arguments| Given {
        arguments,
        settings: Vec::new(),
    };
    // What the command line itself says, as far as it makes sense; the real parse complains.
    let lenient = command.clone().ignore_errors(true);
    let Ok(matches) = lenient.try_get_matches_from(&arguments) else {
        return Ok(unchanged(arguments));
    };
    let Some((name, given)) = matches.subcommand() else {
        return Ok(unchanged(arguments));
    };
    let mut built = command.clone();
    built.build();
    let Some(sub) = built.find_subcommand(name) else {
        return Ok(unchanged(arguments));
    };
    if sub.get_arguments().filter(|a| is_settable(a)).count() == 0 || name == "config" {
        return Ok(unchanged(arguments));
    }
    let named = given.try_get_one::<PathBuf>("config").ok().flatten();
    let mut settings = collect(&built, sub, named.map(PathBuf::as_path))?;
    let explicit = |arg: &Arg| {
        let source = given.value_source(arg.get_id().as_str());
        source == Some(ValueSource::CommandLine)
    };
    settings.retain(|setting| {
        let of_flag = |a: &&Arg| a.get_long() == Some(setting.flag.as_str());
        let arg = sub.get_arguments().find(of_flag);
        arg.is_some_and(|arg| {
            let conflicts = |other: &&Arg| {
                let against = |a: &Arg, b: &Arg| {
                    let of_a = sub.get_arg_conflicts_with(a);
                    of_a.iter().any(|c| c.get_id() == b.get_id())
                };
                against(arg, other) || against(other, arg) || exclude(sub, arg, other)
            };
            !explicit(arg) && !sub.get_arguments().filter(conflicts).any(explicit)
        })
    });
    let at = arguments.iter().position(|a| a == OsStr::new(name));
    let at = at.map_or(arguments.len(), |at| at + 1);
    let added = settings.iter().flat_map(Setting::arguments);
    arguments.splice(at..at, added.collect::<Vec<_>>());
    Ok(Given {
        arguments,
        settings,
    })
}

/// Whether both are in a group of which only one may be given.
fn exclude(command: &Command, a: &Arg, b: &Arg) -> bool {
    a.get_id() != b.get_id()
        && command.get_groups().any(|group| {
            let has = |arg: &Arg| group.get_args().any(|id| id == arg.get_id());
            has(a) && has(b) && !group.clone().is_multiple()
        })
}

/// What environment and file set for a command, in the order of its flags.
pub fn collect(
    all: &Command,
    command: &Command,
    named: Option<&Path>,
) -> Result<Vec<Setting>, Refusal> {
    let file = file(named);
    let table = match &file {
        Some(path) => read(path, all)?,
        None => Table::new(),
    };
    let own = table.get(command.get_name()).and_then(Value::as_table);
    let mut settings = Vec::new();
    for arg in command.get_arguments().filter(|a| is_settable(a)) {
        let flag = arg.get_long().unwrap_or_default();
        let name = variable(flag);
        if let Some(value) = env::var_os(&name) {
            let value = value
                .into_string()
                .map_err(|_| Refusal::Usage(format!("{name}: not UTF-8")))?;
            // Empty means unset, as a shell's `VAR= command` says.
            if !value.is_empty() {
                let values = from_text(arg, value, &name)?;
                settings.extend(setting(flag, values, Origin::Variable(name)));
                continue;
            }
        }
        let Some(path) = &file else { continue };
        let in_own = own.and_then(|t| t.get(flag));
        let section = in_own.map(|_| command.get_name()).unwrap_or_default();
        if let Some(value) = in_own.or_else(|| table.get(flag)) {
            let origin = Origin::File(path.clone(), section.to_owned());
            let values = from_toml(arg, value, &format!("{origin}: {flag}"))?;
            settings.extend(setting(flag, values, origin));
        }
    }
    Ok(settings)
}

/// A flag without a value that is set to "no" isn't set.
fn setting(flag: &str, values: Option<Vec<String>>, origin: Origin) -> Option<Setting> {
    let flag = flag.to_owned();
    values.map(|values| Setting {
        flag,
        values,
        origin,
    })
}

/// A flag that takes no value, or may go without one (`--amx`).
fn takes_value(arg: &Arg) -> bool {
    arg.get_action().takes_values()
}

fn from_text(arg: &Arg, value: String, place: &str) -> Result<Option<Vec<String>>, Refusal> {
    let may_go_without = arg.get_num_args().is_some_and(|n| n.min_values() == 0);
    if takes_value(arg) && !may_go_without {
        return Ok(Some(vec![value]));
    }
    match value.to_lowercase().as_str() {
        "1" | "true" | "yes" | "on" => Ok(Some(Vec::new())),
        "0" | "false" | "no" | "off" => Ok(None),
        _ if takes_value(arg) => Ok(Some(vec![value])),
        _ => Err(Refusal::Usage(format!(
            "{place}: expected true or false, found {value:?}"
        ))),
    }
}

fn from_toml(arg: &Arg, value: &Value, place: &str) -> Result<Option<Vec<String>>, Refusal> {
    let wrong = |what: &str| {
        let found = value.type_str();
        Refusal::Usage(format!("{place}: expected {what}, found {found}"))
    };
    let scalar = |value: &Value| match value {
        Value::String(s) => Some(s.clone()),
        Value::Integer(n) => Some(n.to_string()),
        Value::Float(x) => Some(x.to_string()),
        _ => None,
    };
    let repeatable =
        matches!(arg.get_action(), ArgAction::Append) || arg.get_value_delimiter().is_some();
    match value {
        Value::Boolean(b) => from_text(arg, b.to_string(), place),
        _ if !takes_value(arg) => Err(wrong("true or false")),
        Value::Array(values) if repeatable => {
            let values = values
                .iter()
                .map(|v| scalar(v).ok_or_else(|| wrong("plain values")));
            Ok(Some(values.collect::<Result<_, _>>()?))
        }
        value => {
            let what = if repeatable {
                "a value or an array"
            } else {
                "a value"
            };
            Ok(Some(vec![scalar(value).ok_or_else(|| wrong(what))?]))
        }
    }
}

/// Reads the file and refuses names that no command has.
fn read(path: &Path, all: &Command) -> Result<Table, Refusal> {
    let shown = path.display();
    let text = fs::read_to_string(path).map_err(|e| match e.kind() {
        io::ErrorKind::InvalidData => Refusal::Usage(format!("{shown}: not UTF-8 text")),
        _ => Refusal::Usage(format!("{shown}: cannot read: {e}")),
    })?;
    let table: Table = text
        .parse()
        .map_err(|e: toml::de::Error| Refusal::Usage(format!("{shown}: {e}")))?;
    let has = |command: &Command, flag: &str| {
        let mut args = command.get_arguments().filter(|a| is_settable(a));
        args.any(|a| a.get_long() == Some(flag))
    };
    for (key, value) in &table {
        let command = all.get_subcommands().find(|c| c.get_name() == key);
        match (command, value) {
            (Some(command), Value::Table(own)) => {
                if let Some(flag) = own.keys().find(|flag| !has(command, flag)) {
                    let what = format!("{shown}: [{key}]: `tegula {key}` has no flag --{flag}");
                    return Err(Refusal::Usage(what));
                }
            }
            (_, Value::Table(_)) => {
                return Err(Refusal::Usage(format!("{shown}: [{key}] is no command")));
            }
            _ if all.get_subcommands().any(|c| has(c, key)) => {}
            _ => {
                return Err(Refusal::Usage(format!(
                    "{shown}: no command has a flag --{key}"
                )));
            }
        }
    }
    Ok(table)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cmd::Cli;
    use clap::CommandFactory as _;

    #[test]
    fn secrets_are_flags_that_can_be_set() {
        let mut all = Cli::command();
        all.build();
        for secret in SECRET {
            let mut args = all.get_subcommands().flat_map(Command::get_arguments);
            assert!(
                args.any(|a| a.get_long() == Some(secret) && is_settable(a)),
                "no command has --{secret}"
            );
        }
        // What sounds like a secret is one, unless it is where to find one.
        for arg in all.get_subcommands().flat_map(Command::get_arguments) {
            let Some(flag) = arg.get_long() else { continue };
            let sounds = ["key", "token", "password", "secret"];
            let last = flag.rsplit('-').next().unwrap_or(flag);
            assert!(!sounds.contains(&last) || is_secret(flag), "--{flag}");
        }
    }
}
