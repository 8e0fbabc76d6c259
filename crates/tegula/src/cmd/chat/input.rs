//! Messages from a terminal, by a line editor with a history, or from a pipe, line by line.

use super::command::NAMES;
use crate::exit::Refusal;
use anyhow::Context as _;
use rustyline::{
    Behavior, Cmd, CompletionType, Config, Context, Editor, Helper, KeyCode, KeyEvent, Modifiers,
    completion::Completer,
    error::ReadlineError,
    highlight::Highlighter,
    hint::Hinter,
    history::FileHistory,
    validate::{ValidationContext, ValidationResult, Validator},
};
use std::{
    env, fs,
    io::{self, BufRead as _, IsTerminal as _},
    path::PathBuf,
};

/// Around a message of several lines.
const FENCE: &str = "\"\"\"";
/// Messages that the history keeps.
const REMEMBERED: usize = 2000;

/// Where messages come from.
pub enum Input {
    Terminal(Box<Terminal>),
    Pipe,
}

pub struct Terminal {
    editor: Editor<Commands, FileHistory>,
    history: Option<PathBuf>,
    /// The last thing that happened was Ctrl-C.
    interrupted: bool,
}

impl Input {
    /// An editor if standard input is a terminal.
    pub fn new(keep_history: bool) -> anyhow::Result<Input> {
        if !io::stdin().is_terminal() {
            return Ok(Input::Pipe);
        }
        // With the answers in a file, prompts still belong on the terminal.
        let behavior = match io::stdout().is_terminal() {
            true => Behavior::Stdio,
            false => Behavior::PreferTerm,
        };
        let config = Config::builder()
            .behavior(behavior)
            .completion_type(CompletionType::List)
            .max_history_size(REMEMBERED)
            .and_then(|c| c.history_ignore_dups(true))
            .context("cannot set up the line editor")?
            .build();
        let mut editor = Editor::with_config(config).context("cannot set up the line editor")?;
        editor.set_helper(Some(Commands));
        editor.bind_sequence(KeyEvent(KeyCode::Enter, Modifiers::ALT), Cmd::Newline);
        let history = keep_history.then(history_file).flatten();
        if let Some(path) = history.as_ref().filter(|path| path.exists())
            && let Err(e) = editor.load_history(path)
        {
            say!("warning: {}: cannot read the history: {e}", path.display());
        }
        Ok(Input::Terminal(Box::new(Terminal {
            editor,
            history,
            interrupted: false,
        })))
    }

    pub fn is_terminal(&self) -> bool {
        matches!(self, Input::Terminal(_))
    }

    /// The next message or command; `None` at the end.
    pub fn next(&mut self) -> anyhow::Result<Option<String>> {
        let text = match self {
            Input::Terminal(terminal) => terminal.next()?,
            Input::Pipe => from_pipe()?,
        };
        Ok(text.map(|text| joined(&text)))
    }
}

impl Terminal {
    fn next(&mut self) -> anyhow::Result<Option<String>> {
        loop {
            match self.editor.readline("> ") {
                Ok(text) => {
                    self.interrupted = false;
                    if !text.trim().is_empty() {
                        self.remember(&text);
                    }
                    return Ok(Some(text));
                }
                Err(ReadlineError::Interrupted) if self.interrupted => return Ok(None),
                Err(ReadlineError::Interrupted) => {
                    self.interrupted = true;
                    say!("Ctrl-C again, Ctrl-D or /exit end the conversation");
                }
                Err(ReadlineError::Eof) => return Ok(None),
                Err(e) => return Err(e).context("cannot read from the terminal"),
            }
        }
    }

    /// Adds to the history, in the file at once: a killed program forgets nothing.
    fn remember(&mut self, text: &str) {
        let added = self.editor.add_history_entry(text);
        let Some(path) = &self.history else { return };
        let dir = path.parent().map_or(Ok(()), fs::create_dir_all);
        let saved = added.and_then(|_| {
            dir?;
            self.editor.append_history(path)
        });
        if let Err(e) = saved {
            say!("warning: {}: cannot write the history: {e}", path.display());
            self.history = None;
        }
    }
}

/// In the user's directory for state.
fn history_file() -> Option<PathBuf> {
    let state = match env::var_os("XDG_STATE_HOME").filter(|v| !v.is_empty()) {
        Some(dir) => PathBuf::from(dir),
        None => env::home_dir()?.join(".local/state"),
    };
    Some(state.join("tegula/chat-history"))
}

/// Lines until a message is whole.
fn from_pipe() -> anyhow::Result<Option<String>> {
    let mut bytes = Vec::new();
    loop {
        let more = io::stdin()
            .lock()
            .read_until(b'\n', &mut bytes)
            .context("cannot read standard input")?;
        let text = std::str::from_utf8(&bytes)
            .map_err(|_| Refusal::Input("standard input: not UTF-8 text".to_owned()))?;
        let line = text.strip_suffix('\n').unwrap_or(text);
        if bytes.is_empty() {
            return Ok(None);
        }
        // An end of the input ends a message, too.
        if more == 0 || is_whole(line) {
            return Ok(Some(line.to_owned()));
        }
    }
}

/// Whether a message ends here: not behind a backslash, nor in the middle of a fence.
fn is_whole(text: &str) -> bool {
    match text.trim_start().strip_prefix(FENCE) {
        Some(rest) => rest.trim_end().ends_with(FENCE),
        None => !text.ends_with('\\'),
    }
}

/// The message without what held its lines together.
fn joined(text: &str) -> String {
    let fenced = text.trim().strip_prefix(FENCE);
    match fenced {
        Some(rest) => rest
            .strip_suffix(FENCE)
            .unwrap_or(rest)
            .trim_matches('\n')
            .to_owned(),
        None => text.replace("\\\n", "\n"),
    }
}

/// What the editor knows: when a message is whole, and the commands' names.
pub struct Commands;

impl Helper for Commands {}
impl Highlighter for Commands {}
impl Hinter for Commands {
    type Hint = String;
}

impl Validator for Commands {
    fn validate(&self, ctx: &mut ValidationContext) -> rustyline::Result<ValidationResult> {
        Ok(match is_whole(ctx.input()) {
            true => ValidationResult::Valid(None),
            false => ValidationResult::Incomplete,
        })
    }
}

impl Completer for Commands {
    type Candidate = String;

    fn complete(
        &self,
        line: &str,
        pos: usize,
        _: &Context<'_>,
    ) -> rustyline::Result<(usize, Vec<String>)> {
        let typed = &line[..pos];
        if !typed.starts_with('/') || typed.contains(char::is_whitespace) {
            return Ok((pos, Vec::new()));
        }
        let fits = NAMES.iter().filter(|name| name.starts_with(typed));
        Ok((0, fits.map(|name| format!("{name} ")).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_may_have_several_lines() {
        for (text, whole, message) in [
            ("one", true, "one"),
            ("a\\", false, "a\\"),
            ("a\\\nb", true, "a\nb"),
            ("\"\"\"a", false, "a"),
            ("\"\"\"a\nb\\\n\"\"\"", true, "a\nb\\"),
            ("\"\"\"", false, ""),
            ("\"\"\"\nx\n\"\"\" ", true, "x"),
        ] {
            assert_eq!(is_whole(text), whole, "{text:?}");
            assert_eq!(joined(text), message, "{text:?}");
        }
    }
}
