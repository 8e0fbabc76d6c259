//! What enemies and accidents do, and that the server goes on.

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpStream,
    time::{Duration, Instant},
};

use crate::support::{PATIENCE, Response, Server, Signal, error_code, head};
use serde_json::{Value, json};
use tegula_gguf::fuzz::driver::Random;

/// Waits until it holds.
fn eventually(what: &str, holds: impl Fn() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < PATIENCE, "{what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// What counts the tasks that the scheduler is done with.
const ENDED: [&str; 2] = ["tasks_finished_total", "tasks_cancelled_total"];

/// What counts the tasks that the scheduler has.
const AT_WORK: [&str; 3] = ["slots_generating", "slots_prompt", "requests_waiting"];

/// Tasks that the scheduler has or has had.
fn arrived(server: &Server) -> f64 {
    server.metrics(&[&ENDED[..], &AT_WORK].concat())
}

#[test]
fn a_thousand_slow_and_half_open_connections() {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let raised = rustix::process::Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, raised).unwrap();
    let server = Server::start(&["--header-timeout", "3", "--body-timeout", "3"]);
    let half_body = head(server.address, "POST", "/v1/completions", &[], Some(1000));
    let begin = Instant::now();
    let mut idle: Vec<TcpStream> = Vec::new();
    for i in 0..1000 {
        let mut stream = server.connect();
        let part: &[u8] = match i % 4 {
            // Connected, and nothing.
            0 => b"",
            1 => b"GET /health HT",
            2 => b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-A",
            _ => &half_body,
        };
        stream.write_all(part).unwrap();
        idle.push(stream);
    }
    server.assert_well();
    assert!(begin.elapsed() < PATIENCE);
    for (i, mut stream) in idle.into_iter().enumerate() {
        let mut bytes = Vec::new();
        stream
            .read_to_end(&mut bytes)
            .expect("the server closes it");
        if i % 4 == 3 {
            let response = Response::parse(&bytes).expect("half a body gets an answer");
            assert_eq!(
                (response.status, response.error().as_str()),
                (408, "body_timeout")
            );
        }
    }
    server.assert_well();
}

#[test]
fn more_connections_than_allowed_wait_for_their_turn() {
    let server = Server::start(&["--max-connections", "2", "--header-timeout", "2"]);
    let idle: Vec<TcpStream> = (0..4).map(|_| server.connect()).collect();
    // Two are served, two wait; all are closed in time, and then it is our turn.
    server.assert_well();
    drop(idle);
}

#[test]
fn clients_that_vanish_in_the_middle() {
    let server = Server::start(&["-np", "4", "--queue", "32"]);
    let endless = json!({"messages": [{"role": "user", "content": "x"}], "ignore_eos": true, "stream": true, "logit_bias": {"0": -100}});
    let mut whole = endless.clone();
    whole["stream"] = false.into();
    let mut streams = Vec::new();
    for i in 0..12 {
        let body = if i % 3 == 0 { &whole } else { &endless };
        streams.push(server.open_stream("/v1/chat/completions", body));
    }
    let mut line = String::new();
    streams[1].read_line(&mut line).unwrap();
    eventually("all have arrived", || arrived(&server) >= 12.0);
    drop(streams);
    // Those that ran to the end of their context before we were gone are finished.
    eventually("all have ended", || server.metrics(&ENDED) >= 12.0);
    assert_eq!(server.metric("tasks_failed_total"), 0.0);
    assert!(server.metric("tasks_cancelled_total") > 0.0);
    assert_eq!(server.metrics(&AT_WORK), 0.0);
    server.assert_well();
}

#[test]
fn requests_that_make_no_sense() {
    let server = Server::start(&["-c", "512", "-np", "1"]);
    let user = json!([{"role": "user", "content": "x"}]);
    let chat = |fields: Value| {
        let mut body = json!({"messages": user});
        body.as_object_mut()
            .unwrap()
            .extend(fields.as_object().unwrap().clone());
        ("/v1/chat/completions", body.to_string())
    };
    let raw = |path, body: &str| (path, body.to_owned());
    let long = "long ".repeat(2000);
    let nested = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    let cases: Vec<((&str, String), &str)> = vec![
        (raw("/v1/chat/completions", ""), "invalid_json"),
        (raw("/v1/chat/completions", "{"), "invalid_json"),
        (raw("/v1/chat/completions", "[]"), "invalid_json"),
        (
            raw("/v1/chat/completions", "{\"messages\": NaN}"),
            "invalid_json",
        ),
        (raw("/v1/chat/completions", &nested), "invalid_json"),
        (
            raw("/v1/completions", "{\"prompt\": \"\\ud800\"}"),
            "invalid_json",
        ),
        (raw("/v1/chat/completions", "{}"), "invalid_value"),
        (chat(json!({"messages": []})), "invalid_value"),
        (chat(json!({"messages": "x"})), "invalid_value"),
        (
            chat(json!({"messages": [{"content": "x"}]})),
            "invalid_value",
        ),
        (
            chat(json!({"messages": [{"role": "user"}]})),
            "invalid_value",
        ),
        (
            chat(
                json!({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]}),
            ),
            "unsupported_value",
        ),
        (chat(json!({"max_tokens": "many"})), "invalid_type"),
        (chat(json!({"max_tokens": -7})), "invalid_value"),
        (chat(json!({"temperature": 1e30})), "invalid_value"),
        (chat(json!({"n": 1000})), "invalid_value"),
        (chat(json!({"top_logprobs": 5})), "invalid_value"),
        (
            chat(json!({"logprobs": true, "top_logprobs": 21})),
            "invalid_value",
        ),
        (chat(json!({"logit_bias": {"999999": 1}})), "invalid_value"),
        (
            chat(json!({"tools": [{"type": "function", "function": {"name": "a b"}}]})),
            "invalid_value",
        ),
        (chat(json!({"tool_choice": "required"})), "invalid_value"),
        (
            chat(json!({"response_format": {"type": "xml"}})),
            "invalid_value",
        ),
        (
            chat(
                json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}}),
            ),
            "invalid_grammar",
        ),
        (
            chat(json!({"grammar": "root ::= nowhere"})),
            "invalid_grammar",
        ),
        (chat(json!({"regex": "("})), "invalid_grammar"),
        (
            chat(json!({"messages": [{"role": "user", "content": long}]})),
            "context_length_exceeded",
        ),
        (
            raw("/v1/completions", "{\"prompt\": [1, 2, 999999]}"),
            "invalid_value",
        ),
        (raw("/v1/completions", "{\"prompt\": {}}"), "invalid_value"),
        (
            raw("/v1/completions", "{\"prompt\": \"x\", \"suffix\": \"y\"}"),
            "unsupported_value",
        ),
        (
            raw("/v1/completions", &json!({"prompt": long}).to_string()),
            "context_length_exceeded",
        ),
        (raw("/v1/embeddings", "{}"), "invalid_value"),
        (
            raw("/v1/embeddings", "{\"input\": \"x\", \"dimensions\": 7}"),
            "unsupported_value",
        ),
        (
            raw("/v1/embeddings", &json!({"input": [long]}).to_string()),
            "context_length_exceeded",
        ),
        (raw("/tokenize", "{}"), "invalid_type"),
        (raw("/detokenize", "{\"tokens\": [-1]}"), "invalid_type"),
        (raw("/detokenize", "{\"tokens\": [99999]}"), "invalid_value"),
    ];
    for ((path, body), code) in &cases {
        let response = server.request("POST", path, &[], body.as_bytes());
        let shown = body.get(..200).unwrap_or(body);
        assert_eq!(response.status, 400, "{path} {shown}");
        assert_eq!(response.error(), *code, "{path} {shown}");
    }
    // Bytes that are no text.
    let response = server.request(
        "POST",
        "/v1/completions",
        &[],
        b"{\"prompt\": \"\xff\xfe\"}",
    );
    assert_eq!(
        (response.status, response.error().as_str()),
        (400, "invalid_json")
    );
    // Metrics and the like need no body, and mind none.
    assert_eq!(
        server.request("GET", "/metrics", &[], b"\xff\xff").status,
        200
    );
    server.assert_well();
}

#[test]
fn bodies_of_a_hundred_megabytes() {
    let server = Server::start(&["--max-body", "1"]);
    let block = vec![b' '; 1 << 20];
    for chunked in [false, true] {
        let stream = server.connect();
        let mut out = stream.try_clone().unwrap();
        let length = if chunked { None } else { Some(100 << 20) };
        let headers: &[&str] = if chunked {
            &["Transfer-Encoding: chunked"]
        } else {
            &[]
        };
        out.write_all(&head(
            server.address,
            "POST",
            "/v1/chat/completions",
            headers,
            length,
        ))
        .unwrap();
        for _ in 0..100 {
            if chunked {
                out.write_all(b"100000\r\n").unwrap();
            }
            out.write_all(&block).unwrap();
            if chunked {
                out.write_all(b"\r\n").unwrap();
            }
        }
        if chunked {
            out.write_all(b"0\r\n\r\n").unwrap();
        }
        let response = Response::read(stream);
        assert_eq!(
            (response.status, response.error().as_str()),
            (413, "body_too_large")
        );
    }
    server.assert_well();
}

#[test]
fn bodies_that_break_off() {
    let server = Server::start(&[]);
    // Chunks whose length is none, or that are not there.
    for body in [&b"zz\r\n"[..], b"10\r\n{\"prompt\"", b""] {
        let chunked = ["Transfer-Encoding: chunked"];
        let mut stream = server.connect();
        let head = head(server.address, "POST", "/v1/completions", &chunked, None);
        stream.write_all(&head).unwrap();
        stream.write_all(body).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let response = Response::read(stream);
        assert_eq!(
            (response.status, response.error().as_str()),
            (400, "broken_body"),
            "{body:?}"
        );
    }
    server.assert_well();
}

#[test]
fn heads_that_are_too_large_or_no_http() {
    let server = Server::start(&[]);
    let long = format!("X-Long: {}", "x".repeat(200_000));
    assert_eq!(server.request("GET", "/health", &[&long], b"").status, 431);
    let many: Vec<String> = (0..500).map(|i| format!("X-{i}: x")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    assert_eq!(server.request("GET", "/health", &many, b"").status, 431);
    for garbage in [
        &b"\x16\x03\x01\x02\x00\x01\x00"[..],
        b"\0\0\0\0",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
    ] {
        let mut stream = server.connect();
        stream.write_all(garbage).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = Vec::new();
        // It may be a refusal or nothing, but the connection is closed.
        let _ = stream.read_to_end(&mut answer);
        assert!(!answer.starts_with(b"HTTP/1.1 2"), "{garbage:?}");
    }
    server.assert_well();
}

#[test]
fn templates_that_never_end_or_eat_memory() {
    let dir = tempfile::tempdir().unwrap();
    for (i, source) in [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{{ 'a' * 99999 }}{% endfor %}",
        "{% set ns = namespace(x='aaaaaaaa') %}{% for a in range(64) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ raise_exception('not you') }}",
    ]
    .iter()
    .enumerate()
    {
        let file = dir.path().join(format!("{i}.jinja"));
        fs::write(&file, source).unwrap();
        let server = Server::start(&["--chat-template", file.to_str().unwrap()]);
        let body = json!({"messages": [{"role": "user", "content": "x"}]});
        let start = Instant::now();
        let response = server.post("/v1/chat/completions", &body);
        assert_eq!((response.status, response.error().as_str()), (400, "template_error"), "{source}");
        assert!(start.elapsed() < PATIENCE);
        server.assert_well();
    }
}

#[test]
fn grammars_that_would_explode() {
    let server = Server::start(&[]);
    let deep = json!({"type": "object", "properties": {"x": {"$ref": "#"}}, "required": ["x"]});
    let bombs = [
        json!({"regex": "((((a{1,1000}){1,1000}){1,1000}){1,1000})"}),
        json!({"regex": "(a|b)*a(a|b){60}"}),
        json!({"grammar": "root ::= a{1,100000}\na ::= b{1,100000}\nb ::= \"x\"{1,100000}"}),
        json!({"grammar": "start: s\ns: s s s | s s | \"a\" | \"\""}),
        json!({"json_schema": {"type": "string", "minLength": 100_000_000}}),
        json!({"json_schema": {"type": "array", "minItems": 1_000_000_000}}),
        json!({"json_schema": {"allOf": vec![json!({"anyOf": [{"required": ["a"]}, {"required": ["b"]}]}); 60]}}),
        json!({"json_schema": deep}),
        json!({"regex": "x".repeat(300_000)}),
    ];
    for bomb in bombs {
        let mut body = json!({"prompt": "x", "max_tokens": 20});
        body.as_object_mut()
            .unwrap()
            .extend(bomb.as_object().unwrap().clone());
        let start = Instant::now();
        let response = server.post("/v1/completions", &body);
        match response.status {
            200 => {}
            400 => assert_eq!(response.error(), "invalid_grammar"),
            other => panic!("{other}: {}", response.text()),
        }
        assert!(start.elapsed() < PATIENCE);
    }
    server.assert_well();
}

#[test]
fn a_full_queue_says_when_to_come_back() {
    let server = Server::start(&["-np", "1", "--queue", "1"]);
    let endless = json!({"prompt": "x", "ignore_eos": true, "stream": true, "logit_bias": {"0": -100},
                         "regex": "[a-z \\n]{100000}"});
    let mut first = server.open_stream("/v1/completions", &endless);
    // The status comes with the queue, text only with the slot.
    let mut line = String::new();
    while !line.starts_with("data: ") {
        line.clear();
        assert!(first.read_line(&mut line).unwrap() > 0);
    }
    let _second = server.open_stream("/v1/completions", &endless);
    eventually("one waits", || server.metric("requests_waiting") == 1.0);
    let third = server.post("/v1/completions", &json!({"prompt": "x"}));
    assert_eq!((third.status, third.error().as_str()), (429, "queue_full"));
    let after: u64 = third.header("Retry-After").unwrap().parse().unwrap();
    assert!((1..=600).contains(&after));
    assert_eq!(server.metric("requests_refused_total"), 1.0);
}

/// Slow enough for every machine: each token is one of few, and there are many.
fn slow(max_tokens: usize) -> Value {
    json!({"prompt": "x", "max_tokens": max_tokens, "ignore_eos": true, "stream": true, "regex": "([a-z ]{4}\\n)*"})
}

#[test]
fn time_runs_out() {
    let server = Server::start(&["-np", "1", "-c", "2048", "--timeout", "1"]);
    // More than a second's worth for one slot.
    let mut bodies = Vec::new();
    for _ in 0..40 {
        let mut body = slow(2000);
        body["stream"] = false.into();
        body["regex"] = "[a-z\\n ]{5000}".into();
        bodies.push(body.to_string());
    }
    let streams: Vec<_> = bodies
        .iter()
        .map(|body| {
            let mut stream = server.connect();
            let head = head(
                server.address,
                "POST",
                "/v1/completions",
                &[],
                Some(body.len()),
            );
            stream.write_all(&head).unwrap();
            stream.write_all(body.as_bytes()).unwrap();
            stream
        })
        .collect();
    let responses: Vec<Response> = streams.into_iter().map(Response::read).collect();
    let late: Vec<&Response> = responses.iter().filter(|r| r.status == 504).collect();
    assert!(!late.is_empty());
    assert!(responses.iter().all(|r| matches!(r.status, 200 | 504)));
    assert_eq!(late[0].error(), "deadline_exceeded");
    server.assert_well();
}

/// Reads a stream to its end; whether it came to `[DONE]`, and its last data.
fn finish(stream: BufReader<TcpStream>) -> (bool, String) {
    let mut last = String::new();
    for line in stream.lines() {
        let Ok(line) = line else { break };
        if line == "data: [DONE]" {
            return (true, last);
        }
        if let Some(data) = line.strip_prefix("data: ") {
            last = data.to_owned();
        }
    }
    (false, last)
}

#[test]
fn a_signal_under_load_lets_all_finish() {
    let mut server = Server::start(&["-np", "2"]);
    let mut streams: Vec<_> = (0..6)
        .map(|_| server.open_stream("/v1/completions", &slow(400)))
        .collect();
    streams[0].read_line(&mut String::new()).unwrap();
    eventually("all have arrived", || arrived(&server) >= 6.0);
    let mut open = server.connect();
    server.signal(Signal::TERM);
    let (status, said) = {
        let done: Vec<_> = streams.into_iter().map(finish).collect();
        assert!(done.iter().all(|(done, _)| *done), "{done:?}");
        server.wait()
    };
    assert_eq!(status.code(), Some(0), "{said}");
    assert!(said.contains("ending: no new requests"), "{said}");
    // An idle connection was closed, and there is nobody to connect to.
    assert_eq!(open.read(&mut [0; 1]).unwrap_or(0), 0);
    assert!(TcpStream::connect(server.address).is_err());
}

#[test]
fn what_does_not_end_in_time_is_told_so() {
    let mut server = Server::start(&["-np", "1", "--drain-timeout", "1", "-c", "2048"]);
    // Forty of them take longer than a second on every machine.
    let streams: Vec<_> = (0..40)
        .map(|_| {
            let mut body = slow(2000);
            body["regex"] = "[a-z\\n ]{5000}".into();
            server.open_stream("/v1/completions", &body)
        })
        .collect();
    eventually("they have arrived", || {
        server.metric("requests_waiting") >= 30.0
    });
    server.signal(Signal::TERM);
    let ends: Vec<_> = streams.into_iter().map(finish).collect();
    let told: Vec<Value> = ends
        .iter()
        .filter(|(done, last)| !done && last.starts_with("{\"error\""))
        .map(|(_, last)| serde_json::from_str(last).unwrap())
        .collect();
    assert!(!told.is_empty(), "{ends:?}");
    assert!(told.iter().all(|e| error_code(e) == "shutting_down"));
    let (status, said) = server.wait();
    assert_eq!(status.code(), Some(0), "{said}");
    assert!(said.contains("did not end in time"), "{said}");
}

/// Whoever can't wait for the end of what is under way sends a second signal.
#[test]
fn a_second_signal_ends_at_once() {
    for (first, second, code) in [
        (Signal::TERM, Signal::TERM, 143),
        (Signal::INT, Signal::INT, 130),
        (Signal::TERM, Signal::INT, 130),
    ] {
        let mut server = Server::start(&["-np", "1", "--drain-timeout", "600", "--timeout", "0"]);
        // Work for far longer than the signals take.
        let mut streams: Vec<_> = (0..40)
            .map(|_| server.open_stream("/v1/completions", &slow(1_000_000)))
            .collect();
        streams[0].read_line(&mut String::new()).unwrap();
        eventually("all have arrived", || arrived(&server) >= 40.0);
        server.signal(first);
        eventually("the port is closed", || {
            TcpStream::connect(server.address).is_err()
        });
        server.signal(second);
        let (status, said) = server.wait();
        assert_eq!(status.code(), Some(code), "{said}");
        assert!(said.contains("a second signal ends at once"), "{said}");
        assert!(streams.into_iter().any(|stream| !finish(stream).0));
    }
}

#[test]
fn a_port_in_use_and_other_things_that_prevent_the_start() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let dir = tempfile::tempdir().unwrap();
    let empty = dir.path().join("keys");
    fs::write(&empty, "# none\n").unwrap();
    let empty = empty.to_str().unwrap();
    for (args, code, part) in [
        (vec!["--port", port.as_str()], 4, "give another --port"),
        (vec!["--api-key-file", "/nowhere/keys"], 3, "/nowhere/keys"),
        (vec!["--api-key-file", empty], 3, "no keys in it"),
        (vec!["--api-key", ""], 2, "a key has 1 to 256 bytes"),
        (vec!["--host", "nowhere"], 2, "--host"),
        (vec!["-np", "0"], 2, "1 to 1024"),
        (vec!["--chat-template", "/nowhere"], 3, "/nowhere"),
    ] {
        let out = std::process::Command::new(env!("CARGO_BIN_EXE_tegula"))
            .arg("serve")
            .args(&args)
            .output()
            .unwrap();
        let said = String::from_utf8(out.stderr).unwrap();
        assert_eq!(out.status.code(), Some(code), "{args:?}: {said}");
        assert!(said.contains(part), "{args:?}: {said}");
    }
}

/// Requests with random damage, on the wire: each is answered with a status that is documented
/// or the connection is closed, and the server goes on.
#[test]
fn damaged_requests() {
    let server = Server::start(&["--header-timeout", "1", "--body-timeout", "1"]);
    let good: Vec<Vec<u8>> = [
        ("/v1/chat/completions", json!({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "stream": true, "stop": ["x"], "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]})),
        ("/v1/completions", json!({"prompt": ["a", "b"], "max_tokens": 2, "n": 2, "logit_bias": {"5": 1.5}, "regex": "[ab]+"})),
        ("/v1/embeddings", json!({"input": [[1, 2, 3]], "encoding_format": "base64"})),
        ("/tokenize", json!({"content": "Grüße", "with_pieces": true})),
    ]
    .into_iter()
    .map(|(path, body)| {
        let body = body.to_string();
        let mut bytes = head(server.address, "POST", path, &["Content-Type: application/json"], Some(body.len()));
        bytes.extend(body.as_bytes());
        bytes
    })
    .collect();
    let mut r = Random::new(7);
    let mut answered = 0;
    for round in 0..300 {
        let mut bytes = good[r.below(good.len())].clone();
        for _ in 0..1 + r.below(4) {
            let at = r.below(bytes.len());
            match r.below(5) {
                0 => bytes[at] ^= 1 << r.below(8),
                1 => bytes[at] = r.below(256) as u8,
                2 => {
                    bytes.remove(at);
                }
                3 => {
                    let end = bytes.len().min(at + 1 + r.below(30));
                    let copy = bytes[at..end].to_vec();
                    let to = r.below(bytes.len());
                    bytes.splice(to..to, copy);
                }
                _ => bytes.truncate(at + 1),
            }
        }
        let mut stream = server.connect();
        // It may close the connection at the first byte.
        let _ = stream.write_all(&bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        if let Some(response) = Response::parse(&answer) {
            answered += 1;
            let known = [200, 400, 403, 404, 405, 408, 413, 429, 431, 505];
            assert!(
                known.contains(&response.status),
                "{round}: {}",
                response.status
            );
        }
    }
    assert!(answered > 100, "{answered}");
    server.assert_well();
}
