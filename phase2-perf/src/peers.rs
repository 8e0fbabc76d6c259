//! Other engines' benchmark programs, run as they are installed: llama.cpp's llama-bench and
//! ik_llama.cpp's.

use crate::bench::Test;
use serde::Deserialize;
use std::{
    fmt,
    io::Read,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    str::FromStr,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};
use tegula_lab::without_places;

/// Whose program it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// llama.cpp's.
    Llama,
    /// ik_llama.cpp's, which knows no depth.
    Ik,
}

/// A program to compare with, and how it is called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// As rows name it.
    pub label: String,
    pub kind: Kind,
    pub program: PathBuf,
    /// Flags besides those of the matrix.
    pub flags: Vec<String>,
}

/// The text is no peer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is no peer; expected llama-bench[-NAME]=PATH[:FLAGS] or ik-llama-bench[-NAME]=PATH[:FLAGS]"
)]
pub struct NoPeer(String);

/// `llama-bench=PATH`, `ik-llama-bench-rtr=PATH:-rtr 1 -fa 1`: the name's beginning says whose
/// program it is, flags stand behind a colon.
impl FromStr for Peer {
    type Err = NoPeer;

    fn from_str(text: &str) -> Result<Peer, NoPeer> {
        let no = || NoPeer(text.to_owned());
        let (label, rest) = text.split_once('=').ok_or_else(no)?;
        let kinds = [("llama-bench", Kind::Llama), ("ik-llama-bench", Kind::Ik)];
        let named = |(name, _): &&(&str, Kind)| {
            let more = label.strip_prefix(name);
            more.is_some_and(|more| more.is_empty() || more.starts_with('-'))
        };
        let (_, kind) = kinds.iter().find(named).ok_or_else(no)?;
        let (program, flags) = rest.split_once(':').unwrap_or((rest, ""));
        if program.is_empty() {
            return Err(no());
        }
        Ok(Peer {
            label: label.to_owned(),
            kind: *kind,
            program: program.into(),
            flags: flags.split_whitespace().map(str::to_owned).collect(),
        })
    }
}

/// What a peer is asked to measure once: tests at one depth.
#[derive(Clone, Debug)]
pub struct Job<'a> {
    pub model: &'a Path,
    pub tests: &'a [Test],
    pub threads: usize,
    pub batch: usize,
    pub ubatch: usize,
    pub type_k: &'a str,
    pub type_v: &'a str,
}

/// One test of a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerSample {
    pub test: Test,
    pub ns: u64,
    /// The commit or build that the peer states.
    pub version: String,
}

/// Why a peer has no figure.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    #[error("cannot start {program}: {error}")]
    Start {
        /// Its file's name.
        program: String,
        error: std::io::Error,
    },
    #[error("ended with {status}{}", behind(said))]
    Exit { status: ExitStatus, said: String },
    #[error("printed no llama-bench JSON ({why}){}", behind(said))]
    Format { why: String, said: String },
    #[error("printed no figure for {0}")]
    Missing(Test),
    #[error("did not end within {0:?}")]
    Timeout(Duration),
    #[error("ik_llama.cpp's llama-bench knows no depth")]
    Depth,
    #[error("stopped")]
    Cancelled,
}

fn behind(said: &str) -> String {
    match said.is_empty() {
        true => String::new(),
        false => format!(": {said}"),
    }
}

/// A result as llama-bench prints it, without what isn't needed.
#[derive(Deserialize)]
struct Printed {
    n_prompt: usize,
    n_gen: usize,
    #[serde(default)]
    n_depth: usize,
    samples_ns: Vec<u64>,
    #[serde(default)]
    build_commit: String,
}

impl Peer {
    /// The whole command for a job.
    pub fn arguments(&self, job: &Job) -> Vec<String> {
        let list = |numbers: Vec<usize>| {
            let numbers: Vec<_> = numbers.iter().map(usize::to_string).collect();
            match numbers.is_empty() {
                true => "0".to_owned(),
                false => numbers.join(","),
            }
        };
        let tests = job.tests.iter();
        let prompts = tests.clone().filter(|t| t.generate == 0).map(|t| t.prompt);
        let generated = tests.clone().filter(|t| t.prompt == 0).map(|t| t.generate);
        let mut args: Vec<String> = [
            ("-m", job.model.display().to_string()),
            ("-p", list(prompts.collect())),
            ("-n", list(generated.collect())),
            ("-t", job.threads.to_string()),
            ("-b", job.batch.to_string()),
            ("-ub", job.ubatch.to_string()),
            ("-r", "1".to_owned()),
            ("-o", "json".to_owned()),
        ]
        .into_iter()
        .flat_map(|(flag, value)| [flag.to_owned(), value])
        .collect();
        for test in tests.filter(|t| t.prompt > 0 && t.generate > 0) {
            args.extend([
                "-pg".to_owned(),
                format!("{},{}", test.prompt, test.generate),
            ]);
        }
        let depth = job.tests.first().map_or(0, |t| t.depth);
        let optional = [
            ("-d", depth.to_string(), depth > 0),
            ("-ctk", job.type_k.to_owned(), job.type_k != "f16"),
            ("-ctv", job.type_v.to_owned(), job.type_v != "f16"),
        ];
        for (flag, value, _) in optional.into_iter().filter(|o| o.2) {
            args.extend([flag.to_owned(), value]);
        }
        args.extend(self.flags.iter().cloned());
        args
    }

    /// Runs the program once: one repetition of each test, after its own warm-up.
    ///
    /// # Errors
    /// [`PeerError`]: it did not run, or not to its end, or printed something else.
    pub fn run(
        &self,
        job: &Job,
        timeout: Duration,
        cancel: &AtomicBool,
    ) -> Result<Vec<PeerSample>, PeerError> {
        if self.kind == Kind::Ik && job.tests.iter().any(|t| t.depth > 0) {
            return Err(PeerError::Depth);
        }
        let mut child = Command::new(&self.program)
            .args(self.arguments(job))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| PeerError::Start {
                program: without_places(&self.program.to_string_lossy()),
                error,
            })?;
        let (out, err) = (drain(child.stdout.take()), drain(child.stderr.take()));
        let status = wait(&mut child, timeout, cancel)?;
        let text = |reader: thread::JoinHandle<Vec<u8>>| {
            let bytes = reader.join().unwrap_or_default();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        let (out, err) = (text(out), text(err));
        if !status.success() {
            let said = last_line(&err).or(last_line(&out)).unwrap_or_default();
            return Err(PeerError::Exit { status, said });
        }
        let results = parse(&out).map_err(|why| PeerError::Format {
            why,
            said: last_line(&out).or(last_line(&err)).unwrap_or_default(),
        })?;
        let sample = |&test: &Test| {
            let same = |r: &&Printed| {
                (r.n_prompt, r.n_gen, r.n_depth) == (test.prompt, test.generate, test.depth)
            };
            let found = results.iter().find(same);
            let found = found.and_then(|r| Some((r, *r.samples_ns.first().filter(|ns| **ns > 0)?)));
            let (result, ns) = found.ok_or(PeerError::Missing(test))?;
            Ok(PeerSample {
                test,
                ns,
                version: result.build_commit.clone(),
            })
        };
        job.tests.iter().map(sample).collect()
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.label)
    }
}

/// The results in what was printed; lines before the array don't count.
fn parse(out: &str) -> Result<Vec<Printed>, String> {
    let start = match out.starts_with('[') {
        true => 0,
        false => out.find("\n[").ok_or("no JSON array")? + 1,
    };
    let mut documents = serde_json::Deserializer::from_str(&out[start..]).into_iter();
    match documents.next() {
        Some(Ok(results)) => Ok(results),
        Some(Err(error)) => Err(error.to_string()),
        None => Err("no JSON array".to_owned()),
    }
}

/// The last line that isn't empty, not too long, and without places.
fn last_line(text: &str) -> Option<String> {
    let line = text.lines().map(str::trim).rfind(|line| !line.is_empty())?;
    Some(without_places(line).chars().take(200).collect())
}

/// Reads to the end on a thread of its own, so that the program never waits for us.
fn drain(pipe: Option<impl Read + Send + 'static>) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            // What has been read counts; an error ends it as the end does.
            let _ = pipe.read_to_end(&mut bytes);
        }
        bytes
    })
}

/// Waits for the end; a program that is late or no longer wanted is killed.
fn wait(
    child: &mut Child,
    timeout: Duration,
    cancel: &AtomicBool,
) -> Result<ExitStatus, PeerError> {
    let start = Instant::now();
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Ok(status),
            Ok(None) => {}
            Err(error) => {
                return Err(PeerError::Format {
                    why: error.to_string(),
                    said: String::new(),
                });
            }
        }
        let cancelled = cancel.load(Ordering::Relaxed);
        if cancelled || start.elapsed() > timeout {
            // It may have ended meanwhile.
            let _ = child.kill();
            let _ = child.wait();
            return Err(match cancelled {
                true => PeerError::Cancelled,
                false => PeerError::Timeout(timeout),
            });
        }
        // Rarely enough not to disturb what is measured.
        thread::sleep(Duration::from_millis(20));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, os::unix::fs::PermissionsExt as _};

    const MINUTE: Duration = Duration::from_secs(60);

    fn test(prompt: usize, generate: usize, depth: usize) -> Test {
        Test {
            prompt,
            generate,
            depth,
        }
    }

    fn job(tests: &[Test]) -> Job<'_> {
        Job {
            model: Path::new("m.gguf"),
            tests,
            threads: 14,
            batch: 2048,
            ubatch: 512,
            type_k: "f16",
            type_v: "f16",
        }
    }

    /// A peer that is a shell script.
    fn script(dir: &Path, body: &str) -> Peer {
        let path = dir.join("peer.sh");
        fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        format!("llama-bench={}", path.display()).parse().unwrap()
    }

    fn run(body: &str, tests: &[Test]) -> Result<Vec<PeerSample>, PeerError> {
        let dir = tempfile::tempdir().unwrap();
        let peer = script(dir.path(), body);
        peer.run(&job(tests), MINUTE, &AtomicBool::new(false))
    }

    #[test]
    fn peers_are_named_with_their_flags() {
        let peer: Peer = "ik-llama-bench-rtr=/opt/ik:-rtr 1  -fmoe 1"
            .parse()
            .unwrap();
        assert_eq!(
            (peer.kind, peer.label.as_str()),
            (Kind::Ik, "ik-llama-bench-rtr")
        );
        assert_eq!(peer.program, Path::new("/opt/ik"));
        assert_eq!(peer.flags, ["-rtr", "1", "-fmoe", "1"]);
        for bad in [
            "llama-bench",
            "llama-bench=",
            "vllm=/x",
            "llama-benchmark=/x",
            "=x",
        ] {
            let error = bad.parse::<Peer>().unwrap_err().to_string();
            assert!(error.contains(&format!("`{bad}`")), "{error}");
        }
    }

    #[test]
    fn a_job_is_one_call() {
        let peer: Peer = "llama-bench=/x:--repack 0".parse().unwrap();
        let tests = [
            test(512, 0, 64),
            test(0, 32, 64),
            test(0, 64, 64),
            test(8, 4, 64),
        ];
        let job = Job {
            type_k: "q8_0",
            ..job(&tests)
        };
        assert_eq!(
            peer.arguments(&job).join(" "),
            "-m m.gguf -p 512 -n 32,64 -t 14 -b 2048 -ub 512 -r 1 -o json -pg 8,4 -d 64 \
             -ctk q8_0 --repack 0"
        );
        let only = [test(0, 32, 0)];
        assert!(
            peer.arguments(&self::job(&only))
                .join(" ")
                .contains("-p 0 -n 32")
        );
    }

    #[test]
    fn figures_are_found_whatever_surrounds_them() {
        let body = r#"echo 'warming [up]'
echo '[{"build_commit":"abc","n_prompt":512,"n_gen":0,"n_depth":0,"samples_ns":[2000],"x":1},
       {"build_commit":"abc","n_prompt":0,"n_gen":64,"samples_ns":[3000]}]'
echo done"#;
        let samples = run(body, &[test(0, 64, 0), test(512, 0, 0)]).unwrap();
        let ns: Vec<_> = samples.iter().map(|s| (s.ns, s.version.as_str())).collect();
        assert_eq!(ns, [(3000, "abc"), (2000, "abc")]);
    }

    #[test]
    fn what_goes_wrong_is_told() {
        let one = [test(0, 64, 0)];
        let crash = run("echo 'out of memory' >&2; kill -SEGV $$", &one).unwrap_err();
        let crash = crash.to_string();
        assert!(
            crash.contains("signal: 11") && crash.ends_with("out of memory"),
            "{crash}"
        );
        let refused = run("echo 'unknown argument: -pg'; exit 1", &one).unwrap_err();
        assert!(
            refused
                .to_string()
                .contains("exit status: 1: unknown argument")
        );
        let other = run("echo '| model | t/s |'", &one).unwrap_err().to_string();
        assert!(other.starts_with("printed no llama-bench JSON"), "{other}");
        let fields = run("echo '[{\"tps\": 5}]'", &one).unwrap_err().to_string();
        assert!(fields.contains("n_prompt"), "{fields}");
        let missing = run("echo '[]'", &one).unwrap_err().to_string();
        assert_eq!(missing, "printed no figure for tg64");
        let nothing: Peer = "llama-bench=/no/such/program".parse().unwrap();
        let nothing = nothing.run(&job(&one), MINUTE, &AtomicBool::new(false));
        assert!(
            nothing
                .unwrap_err()
                .to_string()
                .starts_with("cannot start program: ")
        );
        let ik: Peer = "ik-llama-bench=/x".parse().unwrap();
        let deep = ik.run(&job(&[test(0, 64, 8)]), MINUTE, &AtomicBool::new(false));
        assert!(matches!(deep, Err(PeerError::Depth)));
    }

    #[test]
    fn a_peer_that_hangs_or_is_not_wanted_is_killed() {
        let dir = tempfile::tempdir().unwrap();
        let peer = script(dir.path(), "exec sleep 600");
        let tests = [test(0, 64, 0)];
        let short = Duration::from_millis(50);
        let late = peer.run(&job(&tests), short, &AtomicBool::new(false));
        assert!(matches!(late, Err(PeerError::Timeout(t)) if t == short));
        let cancelled = peer.run(&job(&tests), MINUTE, &AtomicBool::new(true));
        assert!(matches!(cancelled, Err(PeerError::Cancelled)));
    }
}
