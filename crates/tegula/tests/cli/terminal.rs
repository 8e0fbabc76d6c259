//! Conversations on a terminal: the program behind a pseudo-terminal that is its controlling one,
//! so that keys become signals as they do for its users.

use crate::{path, program, text};
use rustix::{
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
    termios::{Winsize, tcsetwinsize},
};
use std::{
    ffi::OsString,
    fs::{self, File, OpenOptions},
    io::{Read as _, Write as _},
    os::unix::{ffi::OsStringExt as _, fs::OpenOptionsExt as _},
    path::Path,
    process::{Child, Command, ExitStatus},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};
use tempfile::TempDir;

/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);

const CTRL_C: &str = "\x03";
const CTRL_D: &str = "\x04";
const ENTER: &str = "\r";
const ALT_ENTER: &str = "\x1b\r";
const UP: &str = "\x1b[A";
/// An answer that ends only when it is told to: the tokens that end one are forbidden.
const ENDLESS: [&str; 4] = ["--logit-bias", "0-inf", "--logit-bias", "2-inf"];

/// A terminal with the program on it.
struct Terminal {
    keys: File,
    /// Everything that was shown.
    shown: Arc<Mutex<Vec<u8>>>,
    /// Up to where it has been looked at.
    seen: usize,
    child: Child,
}

impl Terminal {
    /// `tegula chat` with these flags; its history is in `home`.
    fn chat(home: &Path, args: &[&str]) -> Terminal {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let size = Winsize {
            ws_row: 40,
            ws_col: 100,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(&master, size).unwrap();
        let name = OsString::from_vec(ptsname(&master, Vec::new()).unwrap().into_bytes());
        let slave = || {
            let mut options = OpenOptions::new();
            let opened = options.read(true).write(true).custom_flags(NOCTTY);
            opened.open(&name).unwrap()
        };
        let own = program(&[&["chat", "-t", "2", "--temp", "0"][..], args].concat());
        // It makes the terminal the controlling one, and then it is the program.
        let mut command = Command::new("setsid");
        command.arg("--ctty").arg(own.get_program());
        command.args(own.get_args());
        for (name, value) in own.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        command.env("XDG_STATE_HOME", home).env("TERM", "xterm");
        command.env_remove("NO_COLOR");
        let child = command
            .stdin(slave())
            .stdout(slave())
            .stderr(slave())
            .spawn()
            .unwrap();
        let keys = File::from(master);
        let mut screen = keys.try_clone().unwrap();
        let shown = Arc::new(Mutex::new(Vec::new()));
        let to = Arc::clone(&shown);
        std::thread::spawn(move || {
            let mut some = [0; 4096];
            // Reading fails when the program is gone.
            while let Ok(n @ 1..) = screen.read(&mut some) {
                to.lock().unwrap().extend_from_slice(&some[..n]);
            }
        });
        Terminal {
            keys,
            shown,
            seen: 0,
            child,
        }
    }

    /// Types keys.
    fn keys(&mut self, keys: &[&str]) {
        self.keys.write_all(keys.concat().as_bytes()).unwrap();
    }

    /// Waits for a text behind the last one that was waited for; what was shown before it.
    fn expect(&mut self, what: &str) -> String {
        let start = Instant::now();
        loop {
            {
                let shown = self.shown.lock().unwrap();
                let rest = String::from_utf8_lossy(&shown[self.seen..]).into_owned();
                if let Some(at) = rest.find(what) {
                    // Positions are those of bytes as long as these are whole characters, which
                    // they are up to what was found.
                    self.seen += at + what.len();
                    return rest[..at].to_owned();
                }
                assert!(start.elapsed() < PATIENCE, "no {what:?} in {rest:?}");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits for the editor. Behind its switching on come the prompt and, already before, keys that
    /// are keys: until then the terminal itself still turns Enter into a line's end.
    fn prompt(&mut self) {
        self.expect("\x1b[?2004h");
        self.expect("> ");
    }

    /// Waits until that many bytes more were shown.
    fn more(&mut self, bytes: usize) {
        let start = Instant::now();
        while self.shown.lock().unwrap().len() < self.seen + bytes {
            assert!(start.elapsed() < PATIENCE, "nothing more is shown");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The program ends by itself.
    fn end(mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(start.elapsed() < PATIENCE, "it does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `O_NOCTTY`: the test's own process is to keep its terminal.
const NOCTTY: i32 = OpenptFlags::NOCTTY.bits() as i32;

fn home() -> TempDir {
    tempfile::tempdir().unwrap()
}

#[test]
fn ctrl_c_ends_an_answer_and_not_the_program() {
    let home = home();
    let mut t = Terminal::chat(home.path(), &ENDLESS);
    t.expect("/help lists the commands");
    t.prompt();
    for _ in 0..2 {
        t.keys(&["Hello", ENTER]);
        t.expect("Hello");
        // Into the answer.
        t.more(200);
        t.keys(&[CTRL_C]);
        t.expect("interrupted");
        t.prompt();
    }
    // The conversation goes on, and holds the answers as far as they came.
    t.keys(&["/history", ENTER]);
    for role in [
        "[user] Hello",
        "[assistant] ",
        "[user] Hello",
        "[assistant] ",
    ] {
        t.expect(role);
    }
    t.prompt();
    // At the prompt one Ctrl-C asks, whatever was typed, and only a second one ends.
    t.keys(&["half a mess", CTRL_C]);
    t.expect("Ctrl-C again");
    t.prompt();
    t.keys(&["/stats", ENTER]);
    t.expect("context ");
    t.prompt();
    t.keys(&[CTRL_C]);
    t.expect("Ctrl-C again");
    t.prompt();
    t.keys(&[CTRL_C]);
    assert_eq!(t.end().code(), Some(0));
}

#[test]
fn messages_of_several_lines_and_commands_are_typed() {
    let home = home();
    let saved = home.path().join("saved.json");
    let mut t = Terminal::chat(home.path(), &["-n", "3"]);
    t.prompt();
    for message in [
        ["one\\", ENTER, "two"],
        ["three", ALT_ENTER, "four"],
        ["\"\"\"five", ENTER, "/six\"\"\""],
    ] {
        t.keys(&message);
        t.keys(&[ENTER]);
        t.expect(message[2]);
        t.prompt();
    }
    // Tab completes a command's name.
    t.keys(&["/sav\t", path(&saved), ENTER]);
    t.expect("6 messages");
    t.keys(&["/frobnicate", ENTER]);
    t.expect("there is no command /frobnicate");
    t.prompt();
    t.keys(&["/exit", ENTER]);
    assert_eq!(t.end().code(), Some(0));
    let json: serde_json::Value = serde_json::from_slice(&fs::read(&saved).unwrap()).unwrap();
    let messages = json["messages"].as_array().unwrap();
    let asked = messages.iter().filter(|m| m["role"] == "user");
    let asked: Vec<_> = asked.map(|m| m["content"].as_str().unwrap()).collect();
    assert_eq!(asked, ["one\ntwo", "three\nfour", "five\n/six"]);
}

#[test]
fn the_history_is_kept_unless_it_is_not_wanted() {
    let home = home();
    let file = home.path().join("tegula/chat-history");
    let mut t = Terminal::chat(home.path(), &["-n", "1", "--no-history"]);
    t.prompt();
    t.keys(&["/undo", ENTER]);
    t.expect("nothing has been asked");
    t.prompt();
    t.keys(&[CTRL_D]);
    assert_eq!(t.end().code(), Some(0));
    assert!(!file.exists());

    let mut t = Terminal::chat(home.path(), &["-n", "1"]);
    t.prompt();
    t.keys(&["/system Be brief.", ENTER]);
    t.expect("Be brief.");
    t.prompt();
    t.keys(&[CTRL_D]);
    assert_eq!(t.end().code(), Some(0));
    assert!(text(&fs::read(&file).unwrap()).contains("/system Be brief."));

    // In the next conversation it comes back by a key, to be changed and sent.
    let mut t = Terminal::chat(home.path(), &["-n", "1"]);
    t.prompt();
    t.keys(&[UP]);
    t.expect("/system Be brief.");
    t.keys(&[" Be kind.", ENTER]);
    t.expect("kind.");
    t.prompt();
    t.keys(&["/system", ENTER]);
    t.expect("\nBe brief. Be kind.");
    t.prompt();
    t.keys(&[CTRL_D]);
    assert_eq!(t.end().code(), Some(0));
}

#[test]
fn reasoning_is_dimmed() {
    let home = home();
    let template = home.path().join("t.jinja");
    fs::write(&template, "{{ messages[-1].content }} <think>").unwrap();
    let mut t = Terminal::chat(
        home.path(),
        &["-n", "3", "--chat-template", path(&template)],
    );
    t.prompt();
    t.keys(&["Hello", ENTER]);
    t.expect("\x1b[2m");
    let reasoning = t.expect("\x1b[0m");
    assert!(!reasoning.trim().is_empty());
    t.prompt();
    t.keys(&[CTRL_D]);
    assert_eq!(t.end().code(), Some(0));
}
