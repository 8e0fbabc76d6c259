//! A mutation fuzzer that needs no nightly compiler and no coverage:
//!
//! ```text
//! cargo run --release -p tegula-gguf --example fuzz -- read --seconds 600 --seed 1
//! ```
//!
//! The targets are `read`, `sparse`, `template` and `tokenizer`. It mutates the committed
//! corpus (`--corpus DIR` for another) and writes an input that panics, or takes longer than ten seconds, to the working
//! directory. The libFuzzer targets in
//! `crates/gguf/fuzz` find more per input; this one runs anywhere.

use std::{
    error::Error,
    fs,
    panic::catch_unwind,
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use tegula_gguf::fuzz::{fuzz_read, fuzz_sparse, fuzz_template, fuzz_tokenizer};

/// An input that takes longer is a finding.
const SLOW: Duration = Duration::from_secs(10);

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

/// Numbers at which lengths, counts and ids go wrong.
const NUMBERS: [u64; 16] = [
    0,
    1,
    2,
    4,
    8,
    9,
    31,
    33,
    39,
    0xff,
    0xffff,
    0x7fff_ffff,
    0xffff_ffff,
    1 << 40,
    i64::MAX as u64,
    u64::MAX,
];

fn mutate(data: &mut Vec<u8>, corpus: &[Vec<u8>], r: &mut Random) {
    for _ in 0..1 + r.below(6) {
        let len = data.len();
        if len == 0 {
            return;
        }
        let at = r.below(len);
        let some = 1 + r.below((len - at).min(64));
        match r.below(9) {
            0 => data[at] ^= 1 << r.below(8),
            1 => data[at] = r.next() as u8,
            2 => data.truncate(at),
            3 => {
                data.drain(at..at + some);
            }
            4 => {
                let copy = data[at..at + some].to_vec();
                let to = r.below(len);
                data.splice(to..to, copy);
            }
            5 | 6 => {
                let width = [1, 2, 4, 8][r.below(4)];
                let number = NUMBERS[r.below(NUMBERS.len())].to_le_bytes();
                let end = len.min(at + width);
                data[at..end].copy_from_slice(&number[..end - at]);
            }
            7 => {
                // Small changes to what is there: off-by-some lengths and offsets.
                if let Some(word) = data.get_mut(at..at + 4) {
                    let old = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
                    let new = old.wrapping_add(r.below(65) as u32).wrapping_sub(32);
                    word.copy_from_slice(&new.to_le_bytes());
                }
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
    let name = args
        .next()
        .ok_or("the target is missing: read, sparse, template or tokenizer")?;
    let target: fn(&[u8]) = match name.as_str() {
        "read" => fuzz_read,
        "sparse" => fuzz_sparse,
        "template" => fuzz_template,
        "tokenizer" => fuzz_tokenizer,
        _ => return Err(format!("unknown target {name}").into()),
    };
    let mut corpus = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/corpus")
        .join(&name);
    while let Some(arg) = args.next() {
        let value = args.next().ok_or("every option takes a value")?;
        match arg.as_str() {
            "--seconds" => seconds = value.parse()?,
            "--seed" => seed = value.parse()?,
            "--corpus" => corpus = value.into(),
            _ => return Err(format!("unknown option {arg}").into()),
        }
    }
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
    let mut runs = 0u64;
    while start.elapsed() < limit {
        for _ in 0..256 {
            let mut data = inputs[random.below(inputs.len())].clone();
            mutate(&mut data, &inputs, &mut random);
            let began = Instant::now();
            let panicked = catch_unwind(|| target(&data)).is_err();
            if panicked || began.elapsed() > SLOW {
                let path = format!("crash-{name}-{seed}-{runs}");
                fs::write(&path, &data)?;
                let what = if panicked { "panicked" } else { "slow" };
                eprintln!("{what} after {runs} inputs; the input is {path}");
                return Ok(ExitCode::FAILURE);
            }
            runs += 1;
        }
    }
    println!(
        "{name}: {runs} inputs in {:.0} s, seed {seed}: clean",
        start.elapsed().as_secs_f64()
    );
    Ok(ExitCode::SUCCESS)
}
