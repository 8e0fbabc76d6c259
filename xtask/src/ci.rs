//! What CI holds every commit to. `.ci/run` installs what is missing and then comes here.

use std::{
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Command, ExitCode, Stdio},
    time::Instant,
};

use anyhow::{Context as _, Result};

/// The steps as one would type them; the last is the README's own test command.
const STEPS: [&str; 5] = [
    "cargo fmt --all --check",
    "cargo clippy --workspace --all-targets -- -D warnings",
    "cargo clippy --package tegula --no-default-features -- -D warnings",
    "cargo xtask codegen --check",
    "cargo test --workspace",
];

/// Runs every step, also after one that failed, and prints how each ended.
pub fn run(root: &Path) -> Result<ExitCode> {
    let mut summary = Vec::new();
    let mut tally = Tally::default();
    for line in STEPS {
        println!("\n== {line}");
        let start = Instant::now();
        let holds = step(root, line, &mut tally)?;
        summary.push((line, holds, start.elapsed().as_secs()));
    }
    println!("\n== summary");
    for (line, holds, seconds) in &summary {
        let word = if *holds { "passed" } else { "FAILED" };
        println!("{word}  {seconds:>4} s  {line}");
    }
    println!("{}", tally.line());
    Ok(match summary.iter().all(|(_, holds, _)| *holds) {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

/// Runs a command line, passing its output on and counting the tests in it.
fn step(root: &Path, line: &str, tally: &mut Tally) -> Result<bool> {
    let mut words = line.split_whitespace();
    let program = words.next().context("an empty step")?;
    let mut child = Command::new(program)
        .args(words)
        .current_dir(root)
        .env("CI", "1")
        .env("INSTA_UPDATE", "no")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("{line}: can't be started"))?;
    let mut output = BufReader::new(child.stdout.take().context("no pipe to the step")?);
    let mut bytes = Vec::new();
    while output.read_until(b'\n', &mut bytes)? > 0 {
        let text = String::from_utf8_lossy(&bytes);
        print!("{text}");
        tally.add(&text);
        bytes.clear();
    }
    Ok(child.wait()?.success())
}

/// Tests counted over all test binaries.
#[derive(Debug, Default, PartialEq, Eq)]
struct Tally {
    binaries: usize,
    passed: usize,
    failed: usize,
    ignored: usize,
}

impl Tally {
    /// Adds a line of output if it is a test binary's closing line:
    /// `test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; …`.
    fn add(&mut self, line: &str) {
        let Some(result) = line.strip_prefix("test result: ") else {
            return;
        };
        let Some((_, counts)) = result.split_once(". ") else {
            return;
        };
        self.binaries += 1;
        for part in counts.split(';') {
            let Some((count, what)) = part.trim().split_once(' ') else {
                continue;
            };
            let Ok(count) = count.parse::<usize>() else {
                continue;
            };
            match what {
                "passed" => self.passed += count,
                "failed" => self.failed += count,
                "ignored" => self.ignored += count,
                _ => {}
            }
        }
    }

    fn line(&self) -> String {
        let Tally {
            binaries,
            passed,
            failed,
            ignored,
        } = self;
        let rest = match failed {
            0 => "",
            _ => "; those after the first with a failure did not run",
        };
        format!(
            "tests: {passed} passed, {failed} failed, {ignored} ignored, \
             in {binaries} test binaries{rest}"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_test_command_is_the_readmes() {
        let readme = include_str!("../../README.md");
        let last = STEPS[STEPS.len() - 1];
        assert!(readme.contains(&format!("\n{last}\n")), "{last}");
    }

    #[test]
    fn closing_lines_are_added_up_and_others_are_not() {
        let mut tally = Tally::default();
        for line in [
            "running 3 tests\n",
            "test test_result: ok. 9 passed ... ok\n",
            "test result: ok. 12 passed; 0 failed; 3 ignored; 0 measured; 0 filtered out; finished in 0.1s\n",
            "test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured; 5 filtered out; finished in 0s\n",
        ] {
            tally.add(line);
        }
        let want = Tally {
            binaries: 2,
            passed: 13,
            failed: 2,
            ignored: 3,
        };
        assert_eq!(tally, want);
    }
}
