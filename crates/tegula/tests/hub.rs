//! Models from a hub: a server on the loopback interface that answers as the hub does, or fails
//! as networks and servers fail.

use rustix::{
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
    termios::{Winsize, tcsetwinsize},
};
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, VecDeque},
    ffi::OsString,
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    os::unix::{ffi::OsStringExt as _, fs::OpenOptionsExt as _},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};
use tempfile::TempDir;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What the server does with a request for a file instead of answering well.
#[derive(Clone, Debug)]
enum Fault {
    Status(u16, &'static str),
    /// Sends so many bytes and closes the connection.
    CloseAfter(usize),
    /// The same, having promised only these.
    Promise(usize),
    /// Closes before it answers.
    Hangup,
    /// Another byte in the middle.
    Damage,
    /// The whole file, whatever was asked for.
    IgnoreRange,
    /// Other bytes than were asked for.
    WrongRange,
    /// To this address.
    Redirect(String),
}

#[derive(Default)]
struct State {
    /// Files by name.
    files: BTreeMap<String, Vec<u8>>,
    /// Of the next requests for files.
    faults: VecDeque<Fault>,
    /// Of the next requests for the listing.
    listing_faults: VecDeque<Fault>,
    /// Instead of the listing.
    listing: Option<String>,
    /// `path range authorization` of each request.
    seen: Vec<String>,
    /// Whether every request must carry this.
    token: Option<&'static str>,
}

struct Hub {
    state: Arc<Mutex<State>>,
    address: String,
    home: TempDir,
}

impl Hub {
    fn new(files: &[(&str, &[u8])]) -> Hub {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let state = Arc::new(Mutex::new(State::default()));
        let owned = |(name, bytes): &(&str, &[u8])| ((*name).to_owned(), bytes.to_vec());
        state.lock().unwrap().files = files.iter().map(owned).collect();
        let shared = Arc::clone(&state);
        // Ends with the process.
        thread::spawn(move || {
            for stream in listener.incoming() {
                let shared = Arc::clone(&shared);
                // A client that goes away is its own affair.
                thread::spawn(move || drop(serve(&stream.unwrap(), &shared)));
            }
        });
        let home = tempfile::tempdir().unwrap();
        Hub {
            state,
            address,
            home,
        }
    }

    fn faults(&self, faults: &[Fault]) {
        self.state
            .lock()
            .unwrap()
            .faults
            .extend(faults.iter().cloned());
    }

    fn seen(&self) -> Vec<String> {
        std::mem::take(&mut self.state.lock().unwrap().seen)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tegula"));
        for (name, _) in std::env::vars_os() {
            let name = name.to_string_lossy();
            let proxy = name.to_lowercase().ends_with("_proxy");
            if name.starts_with("TEGULA_") || name.starts_with("HF_") || proxy {
                command.env_remove(&*name);
            }
        }
        command
            .args(args)
            .env("HF_HOME", self.home.path())
            .env("HF_ENDPOINT", &self.address)
            .env("XDG_CONFIG_HOME", "/nonexistent")
            .stdin(Stdio::null());
        command
    }

    fn tegula(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    fn ok(&self, args: &[&str]) -> String {
        let out = self.tegula(args);
        assert!(out.status.success(), "{}", text(&out.stderr));
        text(&out.stdout)
    }

    fn fails(&self, code: i32, args: &[&str]) -> String {
        let out = self.tegula(args);
        let said = text(&out.stderr);
        assert_eq!(out.status.code(), Some(code), "{said}");
        assert!(
            said.contains("error: ") && !said.contains("panicked"),
            "{said}"
        );
        said
    }

    fn repo(&self) -> PathBuf {
        self.home.path().join("hub/models--owner--repo")
    }

    /// Names and sizes of the blobs.
    fn blobs(&self) -> Vec<(String, u64)> {
        let Ok(dir) = fs::read_dir(self.repo().join("blobs")) else {
            return Vec::new();
        };
        let of = |entry: std::io::Result<fs::DirEntry>| {
            let entry = entry.unwrap();
            (
                entry.file_name().into_string().unwrap(),
                entry.metadata().unwrap().len(),
            )
        };
        let mut all: Vec<_> = dir.map(of).collect();
        all.sort();
        all
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// SHA-256 by the system's program: another implementation than the one that is tested.
fn sha256(bytes: &[u8]) -> String {
    let mut child = Command::new("sha256sum")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("sha256sum is there");
    child.stdin.take().unwrap().write_all(bytes).unwrap();
    let out = child.wait_with_output().unwrap();
    text(&out.stdout).split(' ').next().unwrap().to_owned()
}

fn listing(files: &BTreeMap<String, Vec<u8>>) -> String {
    let sibling = |(name, bytes): (&String, &Vec<u8>)| -> Value {
        let (sha256, size) = (sha256(bytes), bytes.len());
        json!({"rfilename": name, "size": size, "blobId": "x", "lfs": {"sha256": sha256, "size": size}})
    };
    let mut siblings: Vec<Value> = files.iter().map(sibling).collect();
    siblings.push(json!({"rfilename": "README.md", "size": 3, "blobId": "y"}));
    json!({"id": "owner/repo", "sha": COMMIT, "siblings": siblings}).to_string()
}

/// Answers one request.
fn serve(mut stream: &TcpStream, state: &Mutex<State>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let target = line.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(": ") else {
            break;
        };
        headers.insert(name.to_lowercase(), value.to_owned());
    }
    let header = |name: &str| headers.get(name).map_or("-", String::as_str);
    let from: Option<usize> = header("range")
        .strip_prefix("bytes=")
        .and_then(|r| r.strip_suffix('-')?.parse().ok());
    let (fault, body, token) = {
        let mut state = state.lock().unwrap();
        let seen = format!("{target} {} {}", header("range"), header("authorization"));
        state.seen.push(seen);
        let is_listing = target.starts_with("/api/models/owner/repo/revision/main?blobs=true");
        let body = if is_listing {
            let own = state.listing.clone();
            Some(own.unwrap_or_else(|| listing(&state.files)).into_bytes())
        } else {
            let prefix = format!("/owner/repo/resolve/{COMMIT}/");
            let name = target
                .strip_prefix(&prefix)
                .or(target.strip_prefix("/elsewhere/"));
            name.and_then(|name| state.files.get(name).cloned())
        };
        let fault = match is_listing {
            true => state.listing_faults.pop_front(),
            false => state.faults.pop_front(),
        };
        (fault, body, state.token)
    };
    let end = |stream: &mut &TcpStream, status: u16, more: &str| {
        write!(
            stream,
            "HTTP/1.1 {status} x\r\n{more}content-length: 0\r\nconnection: close\r\n\r\n"
        )
    };
    if token.is_some_and(|t| header("authorization") != format!("Bearer {t}")) {
        return end(&mut stream, 401, "");
    }
    let Some(mut body) = body else {
        return end(&mut stream, 404, "");
    };
    match fault.clone() {
        Some(Fault::Hangup) => return Ok(()),
        Some(Fault::Status(status, more)) => return end(&mut stream, status, more),
        Some(Fault::Redirect(to)) => return end(&mut stream, 302, &format!("location: {to}\r\n")),
        Some(Fault::Damage) => {
            let at = body.len() / 2;
            body[at] ^= 1;
        }
        _ => {}
    }
    let all = body.len();
    let from = match fault {
        Some(Fault::IgnoreRange) => None,
        _ => from,
    };
    if from.is_some_and(|from| from >= all) {
        return end(&mut stream, 416, "");
    }
    let mut part = &body[from.unwrap_or(0)..];
    match from {
        None => write!(stream, "HTTP/1.1 200 OK\r\n")?,
        Some(from) => {
            let first = match fault {
                Some(Fault::WrongRange) => from / 2,
                _ => from,
            };
            let last = all - 1;
            write!(
                stream,
                "HTTP/1.1 206 x\r\ncontent-range: bytes {first}-{last}/{all}\r\n"
            )?;
        }
    }
    let promised = match fault {
        Some(Fault::Promise(n)) => n.min(part.len()),
        _ => part.len(),
    };
    if let Some(Fault::CloseAfter(n)) = fault {
        part = &part[..n.min(part.len())];
    }
    write!(
        stream,
        "content-length: {promised}\r\nconnection: close\r\n\r\n"
    )?;
    stream.write_all(part)
}

/// Bytes of no particular kind.
fn noise(len: usize) -> Vec<u8> {
    let mut x = 1u32;
    let mut next = || {
        x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (x >> 24) as u8
    };
    (0..len).map(|_| next()).collect()
}

/// A model that runs.
fn model() -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let made = Command::new(env!("CARGO_BIN_EXE_tegula"))
        .args(["synth", "qwen3", "Q4_0"])
        .arg(&path)
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", text(&made.stderr));
    fs::read(path).unwrap()
}

const PULL: [&str; 2] = ["pull", "hf:owner/repo:Q4_0"];

#[test]
fn a_model_is_pulled_run_listed_and_removed() {
    let bytes = model();
    let hub = Hub::new(&[("m-Q4_0.gguf", &bytes), ("m-Q8_0.gguf", b"another")]);
    let run = ["run", "hf:owner/repo:q4_0", "-p", "x", "-n", "2", "--json"];
    let said = hub.fails(3, &[&run[..], &["--offline"]].concat());
    assert!(
        said.contains("--offline") && hub.seen().is_empty(),
        "{said}"
    );
    let first = hub.ok(&run);
    let seen = hub.seen();
    assert_eq!(seen.len(), 2, "a listing and a file: {seen:?}");
    assert!(
        seen[1].starts_with(&format!("/owner/repo/resolve/{COMMIT}/m-Q4_0.gguf")),
        "{seen:?}"
    );

    // The layout that huggingface_hub reads.
    let sum = sha256(&bytes);
    assert_eq!(
        fs::read_to_string(hub.repo().join("refs/main")).unwrap(),
        COMMIT
    );
    let file = hub.repo().join(format!("snapshots/{COMMIT}/m-Q4_0.gguf"));
    assert_eq!(
        fs::read_link(&file).unwrap(),
        Path::new(&format!("../../blobs/{sum}"))
    );
    assert!(fs::read(&file).unwrap() == bytes);
    assert_eq!(hub.blobs(), [(sum, bytes.len() as u64)]);

    // From now on nobody is asked.
    let tokens = |out: &str| serde_json::from_str::<Value>(out).unwrap()["tokens"].clone();
    let again = hub.ok(&[&run[..], &["--offline", "--temp", "0"]].concat());
    assert_eq!(tokens(&again).as_array().unwrap().len(), 2);
    assert_eq!(tokens(&first).as_array().unwrap().len(), 2);
    assert!(hub.seen().is_empty());
    let pulled: Value =
        serde_json::from_str(&hub.ok(&["pull", "hf:owner/repo:Q4_0", "--json"])).unwrap();
    assert_eq!(
        (&pulled["fetched_bytes"], &pulled["bytes"]),
        (&json!(0), &json!(bytes.len()))
    );
    assert_eq!(hub.seen().len(), 1, "pull looks for something newer");

    let listed: Value = serde_json::from_str(&hub.ok(&["list", "--json"])).unwrap();
    assert_eq!(listed[0]["model"], "hf:owner/repo/m-Q4_0.gguf");
    assert_eq!(listed.as_array().unwrap().len(), 1);
    let name = listed[0]["model"].as_str().unwrap();
    hub.ok(&["inspect", name, "--offline"]);
    hub.ok(&["pull", "hf:owner/repo:Q8_0"]);
    let said = hub.fails(3, &["rm", "hf:owner/repo:F16"]);
    assert!(said.contains("Q4_0, Q8_0"), "{said}");
    hub.ok(&["rm", "hf:owner/repo:Q4_0"]);
    assert_eq!(hub.blobs(), [(sha256(b"another"), 7)]);
    hub.ok(&["rm", "hf:owner/repo"]);
    assert!(!hub.repo().exists());
    assert_eq!(hub.ok(&["list"]), "");
    hub.fails(3, &["rm", "hf:owner/repo"]);
}

#[test]
fn what_breaks_off_goes_on() {
    let bytes = noise(3_000_000);
    let hub = Hub::new(&[("m-Q4_0.gguf", &bytes)]);
    hub.state.lock().unwrap().listing_faults.extend([
        Fault::Status(503, "retry-after: 0\r\n"),
        Fault::Hangup,
        Fault::CloseAfter(20),
    ]);
    hub.faults(&[
        Fault::CloseAfter(1_000_000),
        Fault::Status(500, ""),
        Fault::Status(429, "retry-after: 0\r\n"),
        Fault::Hangup,
        Fault::Promise(500_000),
        Fault::WrongRange,
        Fault::CloseAfter(100_000),
        Fault::CloseAfter(0),
    ]);
    let path = hub.ok(&PULL);
    assert!(fs::read(path.trim_end()).unwrap() == bytes);
    let seen = hub.seen();
    assert!(
        seen.iter().any(|s| s.contains("bytes=1000000-")),
        "{seen:?}"
    );
    assert!(
        seen.iter().any(|s| s.contains("bytes=1500000-")),
        "{seen:?}"
    );
    assert_eq!(hub.blobs(), [(sha256(&bytes), bytes.len() as u64)]);
}

#[test]
fn another_run_goes_on_where_one_gave_up() {
    let bytes = noise(2_000_000);
    let hub = Hub::new(&[("m-Q4_0.gguf", &bytes)]);
    hub.faults(&[Fault::CloseAfter(700_000)]);
    hub.faults(&vec![Fault::Status(502, ""); 5]);
    let said = hub.fails(3, &PULL);
    assert!(said.contains("status 502"), "{said}");
    let incomplete = format!("{}.incomplete", sha256(&bytes));
    assert_eq!(hub.blobs(), [(incomplete, 700_000)]);
    // What isn't complete is no model.
    assert_eq!(hub.ok(&["list"]), "");
    hub.fails(3, &["run", "hf:owner/repo:Q4_0", "-p", "x", "--offline"]);
    hub.seen();
    let path = hub.ok(&PULL);
    assert!(fs::read(path.trim_end()).unwrap() == bytes);
    assert!(hub.seen()[1].contains("bytes=700000-"));
}

#[test]
fn servers_without_ranges_start_over() {
    let bytes = noise(1_000_000);
    let hub = Hub::new(&[("m-Q4_0.gguf", &bytes)]);
    hub.faults(&[Fault::CloseAfter(400_000), Fault::IgnoreRange]);
    let path = hub.ok(&PULL);
    assert!(fs::read(path.trim_end()).unwrap() == bytes);
    // What an earlier program left may be anything, also longer than the file.
    hub.ok(&["rm", "hf:owner/repo"]);
    fs::create_dir_all(hub.repo().join("blobs")).unwrap();
    let incomplete = hub
        .repo()
        .join(format!("blobs/{}.incomplete", sha256(&bytes)));
    for rubbish in [noise(10), noise(1_000_000)[1..].to_vec(), noise(1_000_001)] {
        fs::write(&incomplete, rubbish).unwrap();
        let path = hub.ok(&PULL);
        assert!(fs::read(path.trim_end()).unwrap() == bytes);
        fs::remove_file(hub.repo().join("blobs").join(sha256(&bytes))).unwrap();
    }
}

#[test]
fn damage_is_seen() {
    let bytes = noise(100_000);
    let hub = Hub::new(&[("m-Q4_0.gguf", &bytes)]);
    hub.faults(&[Fault::Damage]);
    hub.ok(&PULL);
    hub.ok(&["rm", "hf:owner/repo"]);
    hub.faults(&[Fault::Damage, Fault::Damage]);
    let said = hub.fails(3, &PULL);
    assert!(
        said.contains("SHA-256") && said.contains(&sha256(&bytes)),
        "{said}"
    );
    assert_eq!(hub.blobs(), []);
    assert_eq!(hub.ok(&["list"]), "");
}

#[test]
fn refusals_are_told_apart() {
    let hub = Hub::new(&[("m-Q4_0.gguf", b"x")]);
    let said = hub.fails(3, &["pull", "hf:owner/nothing"]);
    assert!(said.contains("not found"), "{said}");
    let said = hub.fails(3, &["pull", "hf:owner/repo:Q9_9"]);
    assert!(said.contains("there are: Q4_0"), "{said}");
    assert!(
        hub.fails(2, &["pull", "hf:owner"])
            .contains("expected hf:OWNER/REPO")
    );
    assert!(
        hub.fails(3, &["run", "hf:owner", "-p", "x"])
            .contains("expected hf:OWNER/REPO")
    );
    hub.faults(&[Fault::Status(403, "")]);
    assert!(hub.fails(3, &PULL).contains("HF_TOKEN"));
    hub.state.lock().unwrap().token = Some("secret");
    assert!(hub.fails(3, &PULL).contains("denied (401)"));
    let with_token = hub
        .command(&PULL)
        .env("HF_TOKEN", "secret")
        .output()
        .unwrap();
    assert!(with_token.status.success(), "{}", text(&with_token.stderr));
    // The file where `hf auth login` puts it.
    hub.ok(&["rm", "hf:owner/repo"]);
    fs::write(hub.home.path().join("token"), "secret\n").unwrap();
    hub.ok(&PULL);
}

#[test]
fn tokens_do_not_follow_redirects_to_other_hosts() {
    let hub = Hub::new(&[("m-Q4_0.gguf", b"x")]);
    let other = Hub::new(&[("m-Q4_0.gguf", b"x")]);
    // The same machine under another name.
    let to = other.address.replace("127.0.0.1", "localhost");
    hub.faults(&[Fault::Redirect(format!("{to}/elsewhere/m-Q4_0.gguf"))]);
    let out = hub
        .command(&PULL)
        .env("HF_TOKEN", "secret")
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", text(&out.stderr));
    assert!(hub.seen().iter().all(|s| s.ends_with("Bearer secret")));
    assert_eq!(other.seen(), ["/elsewhere/m-Q4_0.gguf - -"]);
}

#[test]
fn hostile_listings_are_refused() {
    let hub = Hub::new(&[]);
    let good = sha256(b"x");
    let listing = |name: &str, sum: &str, commit: &str| {
        let file = json!({"rfilename": name, "lfs": {"sha256": sum, "size": 1}});
        json!({"sha": commit, "siblings": [file]}).to_string()
    };
    for (answer, said) in [
        (
            listing("../../../x-Q4_0.gguf", &good, COMMIT),
            "no file's name",
        ),
        (listing("/tmp/x-Q4_0.gguf", &good, COMMIT), "no file's name"),
        (listing("x-Q4_0.gguf", "../../x", COMMIT), "checksum"),
        (listing("x-Q4_0.gguf", &good, "../.."), "commit"),
        (
            json!({"sha": COMMIT, "siblings": [{"rfilename": "x-Q4_0.gguf"}]}).to_string(),
            "without a checksum",
        ),
        ("<html>".to_owned(), "not what a hub answers"),
        ("{}".to_owned(), "not what a hub answers"),
    ] {
        hub.state.lock().unwrap().listing = Some(answer);
        let all = hub.fails(3, &PULL);
        assert!(all.contains(said), "{said}: {all}");
    }
    assert_eq!(
        fs::read_dir(hub.home.path()).unwrap().count(),
        0,
        "nothing was written"
    );
}

#[test]
fn split_models_come_whole() {
    let parts = [
        "big/m-Q4_0-00001-of-00002.gguf",
        "big/m-Q4_0-00002-of-00002.gguf",
    ];
    let hub = Hub::new(&[
        (parts[0], b"one"),
        (parts[1], b"two"),
        ("m-Q8_0-00001-of-00002.gguf", b"x"),
    ]);
    let path = hub.ok(&PULL);
    assert!(path.trim_end().ends_with(parts[0]));
    let listed: Value = serde_json::from_str(&hub.ok(&["list", "--json"])).unwrap();
    assert_eq!(listed[0]["bytes"], 6);
    for (part, bytes) in parts.iter().zip([b"one", b"two"]) {
        let file = hub.repo().join(format!("snapshots/{COMMIT}")).join(part);
        assert_eq!(fs::read(file).unwrap(), bytes);
    }
    let said = hub.fails(3, &["pull", "hf:owner/repo:Q8_0"]);
    assert!(said.contains("Q4_0"), "one part of two: {said}");
}

#[test]
fn nobody_there() {
    let hub = Hub::new(&[]);
    let free = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let mut command = hub.command(&PULL);
    let out = command
        .env("HF_ENDPOINT", format!("http://{free}"))
        .output()
        .unwrap();
    assert_eq!(out.status.code(), Some(3));
    assert!(
        text(&out.stderr).contains("refused"),
        "{}",
        text(&out.stderr)
    );
    let mut command = hub.command(&PULL);
    let out = command
        .env("HF_ENDPOINT", "not an address")
        .output()
        .unwrap();
    assert_eq!(out.status.code(), Some(3), "{}", text(&out.stderr));
}

#[test]
fn two_at_once_fetch_once() {
    let bytes = noise(2_000_000);
    let hub = Hub::new(&[("m-Q4_0.gguf", &bytes)]);
    let start = |_| {
        hub.command(&PULL)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    };
    let children: Vec<_> = (0..3).map(start).collect();
    for child in children {
        let out = child.wait_with_output().unwrap();
        assert!(out.status.success(), "{}", text(&out.stderr));
    }
    let files = hub
        .seen()
        .iter()
        .filter(|s| s.starts_with("/owner"))
        .count();
    assert_eq!(files, 1);
}

#[test]
fn ctrl_c_keeps_what_has_arrived() {
    let bytes = noise(500_000);
    let hub = Hub::new(&[("m-Q4_0.gguf", &bytes)]);
    hub.faults(&[
        Fault::CloseAfter(300_000),
        // A pause in which to press it.
        Fault::Status(503, "retry-after: 60\r\n"),
    ]);
    let child = hub.command(&PULL).stderr(Stdio::piped()).spawn().unwrap();
    let begin = Instant::now();
    while hub.state.lock().unwrap().seen.len() < 3 {
        assert!(
            begin.elapsed() < Duration::from_secs(60),
            "{:?}",
            hub.seen()
        );
        thread::sleep(Duration::from_millis(20));
    }
    let kill = Command::new("kill")
        .args(["-INT", &child.id().to_string()])
        .status();
    assert!(kill.unwrap().success());
    let out = child.wait_with_output().unwrap();
    assert_eq!(out.status.code(), Some(3));
    assert!(
        text(&out.stderr).contains("interrupted"),
        "{}",
        text(&out.stderr)
    );
    assert_eq!(
        hub.blobs(),
        [(format!("{}.incomplete", sha256(&bytes)), 300_000)]
    );
    hub.ok(&PULL);
}

/// On a terminal a bar shows what has come of how much, and goes when all is there.
#[test]
fn progress_is_seen_on_a_terminal() {
    let bytes = noise(1_000_000);
    let hub = Hub::new(&[("m-Q4_0.gguf", &bytes)]);
    hub.faults(&[
        Fault::CloseAfter(300_000),
        Fault::Status(503, "retry-after: 1\r\n"),
    ]);
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let size = Winsize {
        ws_row: 40,
        ws_col: 120,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(&master, size).unwrap();
    let name = OsString::from_vec(ptsname(&master, Vec::new()).unwrap().into_bytes());
    let mut options = fs::OpenOptions::new();
    let slave = options
        .write(true)
        .custom_flags(OpenptFlags::NOCTTY.bits() as i32)
        .open(&name)
        .unwrap();
    let mut child = {
        let mut command = hub.command(&PULL);
        command.env("TERM", "xterm").stdout(Stdio::null());
        command.stderr(slave).spawn().unwrap()
    };
    let mut shown = Vec::new();
    // Reading fails when nobody has the terminal open any more.
    let _ = fs::File::from(master).read_to_end(&mut shown);
    assert!(child.wait().unwrap().success());
    let shown = text(&shown);
    assert!(shown.contains("fetching ["), "{shown}");
    assert!(shown.contains("292.97 KiB/976.56 KiB"), "{shown}");
    assert!(shown.contains("m-Q4_0.gguf"), "{shown}");
}
