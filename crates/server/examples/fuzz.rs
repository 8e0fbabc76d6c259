//! A mutation fuzzer that needs no nightly compiler and no coverage:
//!
//! ```text
//! cargo run --release -p tegula-server --example fuzz -- --seconds 600 --seed 1
//! ```
//!
//! It mutates the committed corpus, mostly by what JSON is made of, and writes an input that
//! panics to the working directory. The libFuzzer target in `crates/server/fuzz` finds more per
//! input; this one runs anywhere.

use std::{
    error::Error,
    fs,
    panic::catch_unwind,
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use tegula_server::fuzz::fuzz_request;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Less than `n`, which is not zero.
    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
}

/// What JSON, schemas and grammars are made of.
const WORDS: [&str; 40] = [
    "null",
    "true",
    "false",
    "0",
    "-1",
    "1e400",
    "18446744073709551616",
    "0.1",
    "\"\"",
    "[]",
    "{}",
    "\"x\"",
    "[[]]",
    "\"\\ud800\"",
    "\"\\u0000\"",
    ",",
    ":",
    "{\"",
    "\"}",
    "[",
    "]",
    "\"type\":\"object\"",
    "\"type\":\"array\"",
    "\"type\":\"string\"",
    "\"type\":\"integer\"",
    "\"properties\":",
    "\"required\":",
    "\"items\":",
    "\"anyOf\":",
    "\"$ref\":\"#\"",
    "\"enum\":",
    "\"pattern\":\"(a|b)*\"",
    "\"minLength\":",
    "\"maxItems\":",
    "\"const\":",
    "root ::= ",
    "(a{1,9}){1,9}",
    "start: ",
    "\"role\":\"user\"",
    "\"content\":",
];

fn mutate(data: &mut Vec<u8>, corpus: &[Vec<u8>], r: &mut Random) {
    for _ in 0..1 + r.below(5) {
        let len = data.len();
        if len == 0 {
            return;
        }
        let at = r.below(len);
        let some = 1 + r.below((len - at).min(40));
        match r.below(8) {
            0 => data[at] ^= 1 << r.below(8),
            1 => data.truncate(at),
            2 => {
                data.drain(at..at + some);
            }
            3 => {
                let copy = data[at..at + some].to_vec();
                let to = r.below(len);
                data.splice(to..to, copy);
            }
            4 | 5 => {
                let word = WORDS[r.below(WORDS.len())];
                data.splice(at..at + some, word.bytes());
            }
            6 => {
                let word = WORDS[r.below(WORDS.len())];
                data.splice(at..at, word.bytes());
            }
            _ => {
                let other = &corpus[r.below(corpus.len())];
                if !other.is_empty() {
                    let from = r.below(other.len());
                    let end = other.len().min(from + some * 4);
                    data.splice(at.., other[from..end].iter().copied());
                }
            }
        }
    }
}

fn main() -> Result<ExitCode, Box<dyn Error>> {
    let (mut seconds, mut seed) = (60, 1);
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let value = args.next().ok_or("every option takes a value")?;
        match arg.as_str() {
            "--seconds" => seconds = value.parse()?,
            "--seed" => seed = value.parse()?,
            _ => return Err(format!("unknown option {arg}").into()),
        }
    }
    let corpus = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/request");
    let mut inputs = Vec::new();
    for entry in fs::read_dir(&corpus)? {
        inputs.push(fs::read(entry?.path())?);
    }
    inputs.sort();
    if inputs.is_empty() {
        return Err("the corpus is empty".into());
    }
    let (start, limit) = (Instant::now(), Duration::from_secs(seconds));
    let mut random = Random(seed);
    let (mut runs, mut slowest) = (0u64, Duration::ZERO);
    while start.elapsed() < limit {
        let mut data = inputs[random.below(inputs.len())].clone();
        mutate(&mut data, &inputs, &mut random);
        let begin = Instant::now();
        let fine = catch_unwind(|| fuzz_request(&data)).is_ok();
        let took = begin.elapsed();
        let slow = took > Duration::from_secs(10);
        if !fine || slow {
            let path = format!("crash-request-{seed}-{runs}");
            fs::write(&path, &data)?;
            let what = if slow { "took too long" } else { "panicked" };
            eprintln!("{what} after {runs} inputs; the input is {path}");
            return Ok(ExitCode::FAILURE);
        }
        slowest = slowest.max(took);
        runs += 1;
    }
    println!(
        "request: {runs} inputs in {:.0} s, seed {seed}: clean; the slowest took {slowest:.1?}",
        start.elapsed().as_secs_f64()
    );
    Ok(ExitCode::SUCCESS)
}
