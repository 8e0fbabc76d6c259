//! Thirty-two clients for as long as `TEGULA_SOAK_SECONDS` says, not in the ordinary run:
//!
//! ```text
//! TEGULA_SOAK_SECONDS=600 cargo test --release -p tegula --test server -- --ignored --nocapture soak
//! ```

use std::{
    io::{BufRead as _, BufReader},
    net::TcpStream,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use crate::support::Server;
use serde_json::{Value, json};
use tegula_gguf::fuzz::driver::Random;

const CLIENTS: u64 = 32;

/// What a client may ask for.
fn body(r: &mut Random) -> Value {
    let words =
        "An iterator adaptor yields the elements of a vector until the predicate is false. ";
    let prompt = words.repeat(1 + r.below(12));
    let user = format!("{} {prompt}", r.below(50));
    let mut body = json!({
        "messages": [{"role": "system", "content": "Answer in the style of a manual."}, {"role": "user", "content": user}],
        "max_tokens": 1 + r.below(120), "stream": true, "seed": r.below(1000),
    });
    match r.below(4) {
        0 => {
            body["response_format"] = json!({"type": "json_schema", "json_schema": {"name": "x", "schema": {
                "type": "object", "properties": {"name": {"type": "string", "maxLength": 20}, "n": {"type": "integer", "maximum": 99}},
                "required": ["name", "n"], "additionalProperties": false}}});
        }
        1 => body["logprobs"] = true.into(),
        _ => {}
    }
    body
}

/// Reads a stream; the time to its first text, unless the client leaves before its end.
fn read(
    stream: BufReader<TcpStream>,
    start: Instant,
    leave: bool,
) -> Result<Option<Duration>, String> {
    let mut first = None;
    for line in stream.lines() {
        let line = line.map_err(|e| e.to_string())?;
        let Some(data) = line.strip_prefix("data: ") else {
            continue;
        };
        if data == "[DONE]" {
            return Ok(first);
        }
        // An event that is an error; the word may stand in an answer.
        if data.starts_with("{\"error\"") {
            return Err(data.to_owned());
        }
        first.get_or_insert_with(|| start.elapsed());
        if leave {
            return Ok(None);
        }
    }
    Err("the stream ended early".to_owned())
}

#[test]
#[ignore = "takes as long as TEGULA_SOAK_SECONDS says"]
fn soak() {
    let seconds = std::env::var("TEGULA_SOAK_SECONDS").ok();
    let seconds: u64 = seconds.map_or(60, |s| s.parse().unwrap());
    let server = Server::start(&["-np", "16", "--queue", "64"]);
    let over = AtomicBool::new(false);
    let (done, left) = (AtomicU64::new(0), AtomicU64::new(0));
    let resident = || {
        let statm = std::fs::read_to_string(format!("/proc/{}/statm", server.pid())).unwrap();
        statm.split(' ').nth(1).unwrap().parse::<f64>().unwrap() * 4096.0 / f64::from(1 << 20)
    };
    let (mut firsts, memory) = thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|client| {
                let (server, over, done, left) = (&server, &over, &done, &left);
                scope.spawn(move || {
                    let mut r = Random::new(client);
                    let mut firsts = Vec::new();
                    while !over.load(Ordering::Relaxed) {
                        if r.below(10) == 0 {
                            let body = json!({"input": ["a vector", "an iterator over it"]});
                            assert_eq!(server.post("/v1/embeddings", &body).status, 200);
                        }
                        let start = Instant::now();
                        let leave = r.below(10) == 0;
                        let stream = server.open_stream("/v1/chat/completions", &body(&mut r));
                        firsts.extend(read(stream, start, leave).unwrap());
                        let counter = if leave { left } else { done };
                        counter.fetch_add(1, Ordering::Relaxed);
                    }
                    firsts
                })
            })
            .collect();
        // Memory is compared from the second third on: caches and arenas have filled by then.
        let mut memory = Vec::new();
        for i in 0..30 {
            thread::sleep(Duration::from_secs(seconds) / 30);
            if i >= 10 {
                memory.push(resident());
            }
        }
        over.store(true, Ordering::Relaxed);
        let firsts = clients.into_iter().flat_map(|c| c.join().unwrap());
        (firsts.collect::<Vec<Duration>>(), memory)
    });
    firsts.sort_unstable();
    let at = |p: f64| firsts[((firsts.len() - 1) as f64 * p) as usize].as_secs_f64() * 1e3;
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
    let (early, late) = (mean(&memory[..5]), mean(&memory[15..]));
    eprintln!(
        "{seconds} s, {CLIENTS} clients: {} answers, {} left early; {:.0} tokens/s; first token: \
         p50 {:.0} ms, p99 {:.0} ms; resident memory {early:.1} MiB, then {late:.1} MiB",
        done.load(Ordering::Relaxed),
        left.load(Ordering::Relaxed),
        server.metric("generated_tokens_total") / seconds as f64,
        at(0.5),
        at(0.99),
    );
    assert!((late - early) / early < 0.02, "memory grows: {memory:.1?}");
    assert_eq!(server.metric("tasks_failed_total"), 0.0);
    server.assert_well();
}
