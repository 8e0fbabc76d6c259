//! HTTP for `tegula serve`: sockets, limits, access, routes. What requests mean is
//! `tegula-server`'s.
//!
//! Two threads serve all connections; what takes longer (templates, tokens, grammars) happens
//! on blocking threads, few at a time; the model runs on the scheduler's thread and the pool.

mod access;
mod body;
mod connections;
mod page;
mod routes;
mod stall;

pub use access::{Access, MAX_KEY};
pub use connections::start;

use std::{sync::OnceLock, time::Duration};
use tegula_server::{ApiError, Scheduler, Service};
use tokio::sync::Semaphore;

/// What clients may take of the server.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of a request's body.
    pub body: usize,
    /// Time for a request's head.
    pub header_time: Duration,
    /// Time for its body, and for taking in a part of the answer.
    pub body_time: Duration,
    pub connections: usize,
    /// Time for what is under way at the end.
    pub drain: Duration,
}

/// What there is once the model is loaded.
pub struct Ready {
    pub service: Service,
    pub scheduler: Scheduler,
    pub slots: usize,
    /// What runs where, as JSON.
    pub explain: String,
    /// What `GET /lora-adapters` answers.
    pub lora: String,
}

/// Requests that are being understood at once, each on a thread of its own.
const PARSERS: usize = 4;

/// The server's state.
pub struct App {
    access: Access,
    limits: Limits,
    verbose: bool,
    ready: OnceLock<Ready>,
    parsers: Semaphore,
}

impl App {
    /// A server without a model yet.
    pub fn new(access: Access, limits: Limits, verbose: bool) -> App {
        App {
            access,
            limits,
            verbose,
            ready: OnceLock::new(),
            parsers: Semaphore::new(PARSERS),
        }
    }

    /// The model is there. Only the first call counts.
    pub fn set_ready(&self, ready: Ready) {
        // There is one caller.
        let _ = self.ready.set(ready);
    }

    /// What is served.
    pub fn ready(&self) -> Result<&Ready, ApiError> {
        self.ready.get().ok_or_else(|| {
            ApiError::new(503, "loading", "the model is being loaded").with_retry_after(5)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        io::{Read as _, Write as _},
        net::{TcpListener, TcpStream},
        sync::Arc,
    };

    /// While the model is being loaded every route that needs it says so, and the page is there.
    #[test]
    fn a_server_without_a_model_yet_tells_when_to_come_back() {
        let limits = Limits {
            body: 1 << 20,
            header_time: Duration::from_secs(10),
            body_time: Duration::from_secs(10),
            connections: 10,
            drain: Duration::from_secs(1),
        };
        let access = Access {
            loopback: true,
            ..Access::default()
        };
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = start(listener, Arc::new(App::new(access, limits, false))).unwrap();
        let ask = |method: &str, path: &str| {
            let mut stream = TcpStream::connect(server.address()).unwrap();
            let head = format!(
                "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\
                 Content-Length: 2\r\n\r\n{{}}"
            );
            stream.write_all(head.as_bytes()).unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            answer
        };
        for (method, path) in [
            ("GET", "/health"),
            ("GET", "/v1/models"),
            ("GET", "/metrics"),
            ("POST", "/v1/chat/completions"),
            ("POST", "/tokenize"),
        ] {
            let answer = ask(method, path);
            assert!(answer.starts_with("HTTP/1.1 503 "), "{path}: {answer}");
            assert!(answer.contains("\r\nretry-after: 5\r\n"), "{answer}");
            assert!(answer.contains("\"code\":\"loading\""), "{answer}");
            assert!(answer.contains("\"type\":\"overloaded_error\""));
        }
        assert!(ask("GET", "/").starts_with("HTTP/1.1 200 "));
    }
}
