//! The server as a process, and plain HTTP to it.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    process::{Child, Command, ExitStatus, Stdio},
    thread::JoinHandle,
    time::{Duration, Instant},
};

pub use rustix::process::Signal;
use rustix::process::{Pid, kill_process};
use serde_json::Value;

/// Longer than anything here takes.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub struct Server {
    child: Child,
    pub address: SocketAddr,
    stderr: Option<JoinHandle<String>>,
}

impl Server {
    /// Serves the embedded model on a free port.
    pub fn start(args: &[&str]) -> Server {
        Server::start_with(&[], args)
    }

    /// The same with variables of the environment; nothing else of it changes what it does.
    pub fn start_with(variables: &[(&str, &str)], args: &[&str]) -> Server {
        let mut child = Command::new(env!("CARGO_BIN_EXE_tegula"))
            .args(["serve", "--port", "0", "-t", "2"])
            .args(args)
            .env_remove("TEGULA_CONFIG")
            .env("XDG_CONFIG_HOME", "/nonexistent")
            .envs(variables.iter().copied())
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap());
        let mut said = String::new();
        let address = loop {
            let mut line = String::new();
            if lines.read_line(&mut line).unwrap() == 0 {
                panic!("it ended: {:?}\n{said}", child.wait());
            }
            said += &line;
            if let Some((_, address)) = line.split_once("at http://") {
                break address.trim().parse().unwrap();
            }
        };
        let stderr = std::thread::spawn(move || {
            // What can't be read can't be compared either.
            let _ = lines.read_to_string(&mut said);
            said
        });
        Server {
            child,
            address,
            stderr: Some(stderr),
        }
    }

    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// Sends a request and reads the response.
    pub fn request(&self, method: &str, path: &str, headers: &[&str], body: &[u8]) -> Response {
        let mut stream = self.connect();
        // A server that has enough of a body may answer and close before it has all.
        let _ = stream.write_all(&head(self.address, method, path, headers, Some(body.len())));
        let _ = stream.write_all(body);
        Response::read(stream)
    }

    pub fn get(&self, path: &str) -> Response {
        self.request("GET", path, &[], b"")
    }

    pub fn post(&self, path: &str, body: &Value) -> Response {
        self.request("POST", path, &[], body.to_string().as_bytes())
    }

    /// Sends a request for a stream, without waiting for it.
    pub fn open_stream(&self, path: &str, body: &Value) -> BufReader<TcpStream> {
        let body = body.to_string();
        let mut stream = self.connect();
        let head = head(self.address, "POST", path, &[], Some(body.len()));
        stream.write_all(&head).unwrap();
        stream.write_all(body.as_bytes()).unwrap();
        BufReader::new(stream)
    }

    /// A number of `/metrics`.
    pub fn metric(&self, name: &str) -> f64 {
        self.metrics(&[name])
    }

    /// The sum of some numbers of one answer of `/metrics`, so of one moment.
    pub fn metrics(&self, names: &[&str]) -> f64 {
        let text = self.get("/metrics").text();
        let number = |name: &&str| -> f64 {
            let line = text
                .lines()
                .find_map(|l| l.strip_prefix(&format!("tegula_{name} ")));
            line.unwrap_or_else(|| panic!("no {name} in\n{text}"))
                .parse()
                .unwrap()
        };
        names.iter().map(number).sum()
    }

    /// It answers, and correctly.
    pub fn assert_well(&self) {
        let body = serde_json::json!({"prompt": "The vector", "max_tokens": 3, "temperature": 0});
        let answer = self.post("/v1/completions", &body);
        assert_eq!(answer.status, 200, "{}", answer.text());
        assert_eq!(answer.json()["usage"]["completion_tokens"], 3);
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Waits for its end: how it ended and what it said.
    pub fn wait(&mut self) -> (ExitStatus, String) {
        let start = Instant::now();
        while self.child.try_wait().unwrap().is_none() {
            assert!(start.elapsed() < PATIENCE, "it does not end");
            std::thread::sleep(Duration::from_millis(20));
        }
        let said = self.stderr.take().unwrap().join().unwrap();
        (self.child.wait().unwrap(), said)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn head(
    address: SocketAddr,
    method: &str,
    path: &str,
    headers: &[&str],
    length: Option<usize>,
) -> Vec<u8> {
    let mut text = format!("{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n");
    for header in headers {
        text += header;
        text += "\r\n";
    }
    if let Some(length) = length {
        text += &format!("Content-Length: {length}\r\n");
    }
    (text + "\r\n").into_bytes()
}

#[derive(Debug)]
pub struct Response {
    pub status: u16,
    pub headers: String,
    pub body: Vec<u8>,
}

impl Response {
    /// Reads until the connection closes.
    pub fn read(mut stream: TcpStream) -> Response {
        let mut bytes = Vec::new();
        // A connection that breaks behind the response has done its work.
        let _ = stream.read_to_end(&mut bytes);
        Response::parse(&bytes).unwrap_or_else(|| {
            panic!("no response: {:?}", String::from_utf8_lossy(&bytes));
        })
    }

    pub fn parse(bytes: &[u8]) -> Option<Response> {
        let end = bytes.windows(4).position(|w| w == b"\r\n\r\n")?;
        let headers = String::from_utf8(bytes[..end].to_vec()).ok()?;
        let status = headers.strip_prefix("HTTP/1.1 ")?.get(..3)?.parse().ok()?;
        let mut body = bytes[end + 4..].to_vec();
        if headers
            .to_lowercase()
            .contains("transfer-encoding: chunked")
        {
            body = unchunk(&body);
        }
        Some(Response {
            status,
            headers,
            body,
        })
    }

    pub fn text(&self) -> String {
        String::from_utf8(self.body.clone()).unwrap()
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.text()))
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.lines().find_map(|line| {
            let (key, value) = line.split_once(": ")?;
            key.eq_ignore_ascii_case(name).then_some(value)
        })
    }

    /// An error of OpenAI's shape that the handbook knows; its code.
    pub fn error(&self) -> String {
        assert_eq!(self.header("Content-Type"), Some("application/json"));
        let code = error_code(&self.json());
        assert!(
            is_documented(self.status, &code),
            "the handbook has no {} {code}",
            self.status
        );
        code
    }
}

/// The code of an error of OpenAI's shape.
pub fn error_code(json: &Value) -> String {
    let error = json["error"]
        .as_object()
        .unwrap_or_else(|| panic!("{json}"));
    assert!(!error["message"].as_str().unwrap().is_empty());
    assert!(
        error["type"].is_string() && error.contains_key("param"),
        "{json}"
    );
    error["code"].as_str().unwrap().to_owned()
}

/// Whether the handbook's table of errors has this status with this code.
fn is_documented(status: u16, code: &str) -> bool {
    let (status, code) = (status.to_string(), format!("`{code}`"));
    let rows = include_str!("../../../../docs/book/src/server.md").lines();
    let mut rows = rows.filter_map(|line| line.strip_prefix("| ")?.split_once(" | "));
    rows.any(|(statuses, codes)| statuses.split(", ").any(|s| s == status) && codes.contains(&code))
}

fn unchunk(mut bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    while let Some(end) = bytes.windows(2).position(|w| w == b"\r\n") {
        let size = std::str::from_utf8(&bytes[..end]).unwrap();
        let size = usize::from_str_radix(size, 16).unwrap();
        bytes = &bytes[end + 2..];
        if size == 0 || bytes.len() < size {
            break;
        }
        out.extend_from_slice(&bytes[..size]);
        bytes = &bytes[(size + 2).min(bytes.len())..];
    }
    out
}
