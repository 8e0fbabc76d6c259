//! A mutation fuzzer that needs no nightly compiler and no coverage: the driver behind
//! `examples/fuzz.rs` of this crate and of those above it. It mutates a corpus and stops at an
//! input that panics or takes too long.

use std::{
    fmt, fs, io,
    panic::catch_unwind,
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

/// An input that takes longer is a finding.
const SLOW: Duration = Duration::from_secs(10);

/// SplitMix64: the same seed gives the same numbers, here and in measurements and tests above.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// Begins with a seed.
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    /// Any number.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Less than `n`, which is not zero.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next_u64() % n as u64) as usize
    }

    /// A place in data that are not empty, and a length of at most `most` from there on.
    pub fn stretch(&mut self, data: &[u8], most: usize) -> (usize, usize) {
        let at = self.below(data.len());
        (at, 1 + self.below((data.len() - at).min(most)))
    }
}

/// A change to an input that is not empty, with the corpus to take from.
pub type Mutation = fn(&mut Vec<u8>, &[Vec<u8>], &mut Random);

/// A change that suits inputs of any kind: a bit, an end, a part taken out or put in twice, the
/// rest of another input.
pub fn mutate(data: &mut Vec<u8>, corpus: &[Vec<u8>], r: &mut Random) {
    let (at, some) = r.stretch(data, 64);
    match r.below(5) {
        0 => data[at] ^= 1 << r.below(8),
        1 => data.truncate(at),
        2 => {
            data.drain(at..at + some);
        }
        3 => {
            let copy = data[at..at + some].to_vec();
            let to = r.below(data.len());
            data.splice(to..to, copy);
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

/// What is fuzzed, and with what.
#[derive(Clone, Debug)]
pub struct Target {
    /// In reports and in the name of the file that an input is written to.
    pub name: String,
    /// Panics where something is wrong.
    pub run: fn(&[u8]),
    /// One change; an input gets up to six.
    pub mutate: Mutation,
    /// A directory of inputs.
    pub corpus: PathBuf,
}

/// How a run ended.
#[derive(Clone, Debug)]
pub struct Report {
    text: String,
    clean: bool,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Report {
    /// Success if nothing was found.
    pub fn exit_code(&self) -> ExitCode {
        match self.clean {
            true => ExitCode::SUCCESS,
            false => ExitCode::FAILURE,
        }
    }
}

/// Fuzzes as the options say: `--seconds N` (60), `--seed N` (1), `--corpus DIR`. An input that
/// panics or takes more than ten seconds is written to the working directory.
///
/// # Errors
/// When an option is unknown, the corpus is empty, or a file can't be read or written.
pub fn run(mut target: Target, options: impl Iterator<Item = String>) -> io::Result<Report> {
    let wrong = |what: String| io::Error::new(io::ErrorKind::InvalidInput, what);
    let (mut seconds, mut seed) = (60, 1);
    let mut options = options;
    while let Some(option) = options.next() {
        let value = options.next();
        let value = value.ok_or_else(|| wrong(format!("{option} takes a value")))?;
        let number = || {
            let parsed = value.parse::<u64>();
            parsed.map_err(|_| wrong(format!("{option} {value}: expected a number")))
        };
        match option.as_str() {
            "--seconds" => seconds = number()?,
            "--seed" => seed = number()?,
            "--corpus" => target.corpus = value.into(),
            _ => return Err(wrong(format!("unknown option {option}"))),
        }
    }
    let mut corpus = Vec::new();
    for entry in fs::read_dir(&target.corpus)? {
        corpus.push(fs::read(entry?.path())?);
    }
    corpus.sort();
    if corpus.is_empty() {
        return Err(wrong(format!("{}: empty", target.corpus.display())));
    }
    let name = &target.name;
    let (start, limit) = (Instant::now(), Duration::from_secs(seconds));
    let mut random = Random::new(seed);
    let (mut runs, mut slowest) = (0u64, Duration::ZERO);
    while start.elapsed() < limit {
        let mut data = corpus[random.below(corpus.len())].clone();
        for _ in 0..1 + random.below(6) {
            if !data.is_empty() {
                (target.mutate)(&mut data, &corpus, &mut random);
            }
        }
        let began = Instant::now();
        let panicked = catch_unwind(|| (target.run)(&data)).is_err();
        let took = began.elapsed();
        if panicked || took > SLOW {
            let path = format!("crash-{name}-{seed}-{runs}");
            fs::write(&path, &data)?;
            let what = if panicked {
                "panicked"
            } else {
                "took too long"
            };
            return Ok(Report {
                text: format!("{name}: {what} after {runs} inputs; the input is {path}"),
                clean: false,
            });
        }
        slowest = slowest.max(took);
        runs += 1;
    }
    let seconds = start.elapsed().as_secs_f64();
    Ok(Report {
        text: format!(
            "{name}: {runs} inputs in {seconds:.0} s, seed {seed}: clean; the slowest took \
             {slowest:.1?}"
        ),
        clean: true,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fuzz(run_it: fn(&[u8])) -> io::Result<Report> {
        let corpus = std::env::temp_dir().join(format!("tegula-driver-{}", std::process::id()));
        fs::create_dir_all(&corpus)?;
        fs::write(corpus.join("one"), b"some bytes to begin with")?;
        let target = Target {
            name: "itself".into(),
            run: run_it,
            mutate,
            corpus,
        };
        run(
            target,
            ["--seconds", "1", "--seed", "3"]
                .map(String::from)
                .into_iter(),
        )
    }

    #[test]
    fn clean_runs_are_reported_and_wrong_options_refused() {
        let report = fuzz(|data| assert!(data.len() < 4096)).unwrap();
        assert!(report.clean && report.to_string().contains("inputs in 1 s, seed 3: clean"));
        let target = Target {
            name: "x".into(),
            run: |_| {},
            mutate,
            corpus: "/nonexistent".into(),
        };
        for options in [&["--seed"][..], &["--seed", "x"], &["--what", "1"], &[]] {
            let options = options.iter().map(|o| (*o).to_owned());
            assert!(run(target.clone(), options).is_err());
        }
    }
}
