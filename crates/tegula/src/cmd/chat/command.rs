//! What begins with a slash.

use tegula_engine::SamplerOptions;

/// For completion; one per command.
pub const NAMES: &[&str] = &[
    "/help", "/exit", "/clear", "/system", "/regen", "/undo", "/set", "/read", "/save", "/load",
    "/history", "/stats",
];

pub const HELP: &str = "\
/help                 this list
/exit, Ctrl-D         end the conversation (also /quit, /bye)
/clear                start over (also /reset, /new)
/system [TEXT]        show or change what the system says first
/regen                answer the last message anew (also /retry)
/undo                 take the last message and its answer back
/set [NAME VALUE]     show or change temp, top_k, top_p, min_p, typical, repeat_penalty,
                      repeat_last_n, presence_penalty, frequency_penalty, seed, n_predict,
                      think (on, off, auto)
/read FILE            put a file's text in front of the next message
/save FILE            write the conversation as JSON
/load FILE            go on with a conversation from /save
/history              show the conversation
/stats                show the last answer's speed and how full the context is
Several lines: Alt-Enter or a backslash at a line's end, or \"\"\" before and after them.
Ctrl-C ends an answer. // begins a message that begins with a slash.";

/// A line's meaning.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command<'a> {
    Message(&'a str),
    Help,
    Exit,
    Clear,
    System(Option<&'a str>),
    Regenerate,
    Undo,
    Set(Option<(&'a str, &'a str)>),
    Read(&'a str),
    Save(&'a str),
    Load(&'a str),
    History,
    Stats,
}

impl<'a> Command<'a> {
    /// Reads a line. What begins like a path is a message.
    pub fn parse(text: &'a str) -> Result<Command<'a>, String> {
        let text = text.trim();
        let Some(rest) = text.strip_prefix('/') else {
            return Ok(Command::Message(text));
        };
        if rest.starts_with('/') {
            return Ok(Command::Message(rest));
        }
        let (name, argument) = match rest.split_once(char::is_whitespace) {
            Some((name, argument)) => (name, Some(argument.trim())),
            None => (rest, None),
        };
        if name.contains('/') {
            return Ok(Command::Message(text));
        }
        let none = |command| match argument {
            None => Ok(command),
            Some(_) => Err(format!("/{name} takes nothing")),
        };
        let file = || argument.ok_or_else(|| format!("/{name} takes a file's name"));
        match name {
            "help" | "?" => none(Command::Help),
            "exit" | "quit" | "bye" => none(Command::Exit),
            "clear" | "reset" | "new" => none(Command::Clear),
            "system" => Ok(Command::System(argument)),
            "regen" | "retry" => none(Command::Regenerate),
            "undo" => none(Command::Undo),
            "history" => none(Command::History),
            "stats" => none(Command::Stats),
            "read" => Ok(Command::Read(file()?)),
            "save" => Ok(Command::Save(file()?)),
            "load" => Ok(Command::Load(file()?)),
            "set" => match argument.map(|a| a.split_once([' ', '=', '\t'])) {
                None => Ok(Command::Set(None)),
                Some(Some((name, value))) => Ok(Command::Set(Some((name, value.trim())))),
                Some(None) => Err("/set takes a name and a value".to_owned()),
            },
            _ => Err(format!("there is no command /{name}; /help lists them")),
        }
    }
}

/// What `/set` changes.
#[derive(Clone, Debug)]
pub struct Settings {
    pub sampler: SamplerOptions,
    /// Tokens of an answer at most.
    pub limit: Option<usize>,
    /// Whether a model that can think before it answers shall; `None` leaves it to the template.
    pub think: Option<bool>,
}

impl Settings {
    /// Changes one setting; on error none.
    pub fn set(&mut self, name: &str, value: &str) -> Result<(), String> {
        let float = |least: f32| match value.parse() {
            Ok(x) if x >= least && x < f32::INFINITY => Ok(x),
            _ => Err(format!("{name}: expected a number")),
        };
        let s = &mut self.sampler;
        let whole = || {
            value
                .parse()
                .map_err(|_| format!("{name}: expected a number from 0"))
        };
        // -1 and the like: without a limit.
        let open = || match value.parse::<i64>() {
            Ok(n) => Ok(usize::try_from(n).ok()),
            Err(_) => Err(format!("{name}: expected a whole number")),
        };
        match name.trim_start_matches('-').replace('-', "_").as_str() {
            "temp" | "temperature" => s.temperature = float(0.0)?,
            "top_k" => s.top_k = whole()?,
            "top_p" => s.top_p = float(0.0)?,
            "min_p" => s.min_p = float(0.0)?,
            "typical" => s.typical = float(0.0)?,
            "repeat_penalty" => s.repeat_penalty = float(f32::MIN_POSITIVE)?,
            "repeat_last_n" => s.penalty_last_n = open()?.unwrap_or(usize::MAX),
            "presence_penalty" => s.presence_penalty = float(f32::MIN)?,
            "frequency_penalty" => s.frequency_penalty = float(f32::MIN)?,
            "seed" => {
                let seed = value.parse::<u64>();
                s.seed = seed.map_err(|_| "seed: expected a number from 0".to_owned())?;
            }
            "n_predict" => self.limit = open()?,
            "think" => {
                self.think = match value {
                    "on" => Some(true),
                    "off" => Some(false),
                    "auto" => None,
                    _ => return Err("think: expected on, off or auto".to_owned()),
                }
            }
            _ => {
                return Err(format!(
                    "nothing is called {name}; /help names what there is"
                ));
            }
        }
        Ok(())
    }

    /// All of them, a line each.
    pub fn show(&self) -> String {
        let s = &self.sampler;
        let open = |n: Option<usize>| n.map_or_else(|| "-1".to_owned(), |n| n.to_string());
        let think = match self.think {
            Some(true) => "on",
            Some(false) => "off",
            None => "auto",
        };
        let last_n = Some(s.penalty_last_n).filter(|&n| n != usize::MAX);
        let rows = [
            ("temp", s.temperature.to_string()),
            ("top_k", s.top_k.to_string()),
            ("top_p", s.top_p.to_string()),
            ("min_p", s.min_p.to_string()),
            ("typical", s.typical.to_string()),
            ("repeat_penalty", s.repeat_penalty.to_string()),
            ("repeat_last_n", open(last_n)),
            ("presence_penalty", s.presence_penalty.to_string()),
            ("frequency_penalty", s.frequency_penalty.to_string()),
            ("seed", s.seed.to_string()),
            ("n_predict", open(self.limit)),
            ("think", think.to_owned()),
        ];
        let lines = rows.map(|(name, value)| format!("{name:18} {value}"));
        lines.join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_commands_or_messages() {
        for (line, command) in [
            (" hello ", Command::Message("hello")),
            ("//x", Command::Message("/x")),
            ("/usr/bin is what?", Command::Message("/usr/bin is what?")),
            ("/reset", Command::Clear),
            ("/system  Be kind. ", Command::System(Some("Be kind."))),
            ("/set temp=0.5", Command::Set(Some(("temp", "0.5")))),
            ("/set", Command::Set(None)),
            ("/save a b.json", Command::Save("a b.json")),
        ] {
            assert_eq!(Command::parse(line), Ok(command), "{line}");
        }
        for wrong in ["/frobnicate", "/save", "/set temp", "/clear it", "/"] {
            assert!(Command::parse(wrong).is_err(), "{wrong}");
        }
        for name in NAMES {
            assert!(HELP.contains(name), "{name}");
        }
    }

    #[test]
    fn settings_are_checked() {
        let mut settings = Settings {
            sampler: SamplerOptions::default(),
            limit: None,
            think: None,
        };
        // Every setting that is shown can be set to what is shown.
        for line in settings.clone().show().lines() {
            let (name, value) = line.split_once(char::is_whitespace).unwrap();
            settings.set(name, value.trim()).expect(line);
        }
        settings.set("--top-k", "7").unwrap();
        settings.set("think", "off").unwrap();
        settings.set("n_predict", "9").unwrap();
        assert_eq!(settings.sampler.top_k, 7);
        assert_eq!((settings.think, settings.limit), (Some(false), Some(9)));
        for (name, value) in [
            ("temp", "hot"),
            ("temp", "-1"),
            ("temp", "nan"),
            ("temp", "inf"),
            ("top_k", "-1"),
            ("repeat_penalty", "0"),
            ("think", "maybe"),
            ("seed", "-1"),
            ("speed", "1"),
        ] {
            assert!(settings.set(name, value).is_err(), "{name} {value}");
        }
        assert_eq!(
            settings.sampler.temperature,
            SamplerOptions::default().temperature
        );
    }
}
