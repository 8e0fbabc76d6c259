//! A disk that fills up while a file is written: a clear error, the right exit code, and nothing
//! left behind.
//!
//! The disk is a small tmpfs in namespaces of its own. Where a process may not make these, the
//! tests are listed as ignored, and a limit on the file's size stands in for it.

use libtest_mimic::{Arguments, Failed, Trial};
use std::{
    path::Path,
    process::{Command, ExitCode, Output},
};

/// Mounts a tmpfs of `$1` on `$2`, runs the rest in it, and lists what it left.
const ON_A_SMALL_DISK: &str = r#"
size=$1 dir=$2; shift 2
mount -t tmpfs -o "size=$size" tmpfs "$dir" || exit 99
cd "$dir" && "$@"; code=$?
ls -A "$dir"
exit $code"#;

/// Runs the rest with files of at most `$1` blocks of 512 bytes, in `$2`.
const WITH_A_LIMIT: &str = r#"
blocks=$1 dir=$2; shift 2
trap '' XFSZ
cd "$dir" && ulimit -f "$blocks" && "$@"; code=$?
ls -A "$dir"
exit $code"#;

fn tegula() -> Command {
    Command::new(env!("CARGO_BIN_EXE_tegula"))
}

/// Whether this process may mount a tmpfs in a namespace of its own.
fn may_mount() -> bool {
    let dir = tempfile::tempdir().expect("a directory");
    let mounted = Command::new("unshare")
        .args(["-Urm", "sh", "-c", ON_A_SMALL_DISK, "sh", "64k"])
        .arg(dir.path())
        .arg("true")
        .output();
    mounted.is_ok_and(|out| out.status.success())
}

/// Runs `args` of the program where only so much fits.
fn on_a_small_disk(size: &str, args: &[&str]) -> Output {
    let dir = tempfile::tempdir().expect("a directory");
    Command::new("unshare")
        .args(["-Urm", "sh", "-c", ON_A_SMALL_DISK, "sh", size])
        .arg(dir.path())
        .arg(env!("CARGO_BIN_EXE_tegula"))
        .args(args)
        .output()
        .expect("unshare runs")
}

fn with_a_limit(blocks: &str, args: &[&str]) -> Output {
    let dir = tempfile::tempdir().expect("a directory");
    Command::new("sh")
        .args(["-c", WITH_A_LIMIT, "sh", blocks])
        .arg(dir.path())
        .arg(env!("CARGO_BIN_EXE_tegula"))
        .args(args)
        .output()
        .expect("sh runs")
}

/// A small model of random weights, 2.5 MB in F32.
fn model(dir: &Path) -> String {
    let path = dir.join("model.gguf");
    let path = path.to_str().expect("UTF-8").to_owned();
    let made = tegula().args(["synth", "llama", "F32", &path]).output();
    assert!(made.expect("synth runs").status.success());
    path
}

/// Exit code 3, an error that names the file and the cause, and an empty directory.
fn failed_cleanly(out: &Output, cause: &str) -> Result<(), Failed> {
    let said = String::from_utf8_lossy(&out.stderr);
    let left = String::from_utf8_lossy(&out.stdout);
    for (holds, what) in [
        (out.status.code() == Some(3), "exit code 3"),
        (said.contains("error: "), "an error"),
        (said.contains("out.gguf"), "the file's name"),
        (said.contains(cause), cause),
        (!said.contains("panicked"), "no panic"),
        (left.is_empty(), "nothing left"),
    ] {
        if !holds {
            let code = out.status.code();
            return Err(format!("expected {what}: code {code:?}, left {left:?}: {said}").into());
        }
    }
    Ok(())
}

fn quantize(run: impl Fn(&[&str]) -> Output, cause: &str) -> Result<(), Failed> {
    let dir = tempfile::tempdir()?;
    let model = model(dir.path());
    failed_cleanly(&run(&["quantize", &model, "out.gguf", "BF16"]), cause)
}

fn synth(run: impl Fn(&[&str]) -> Output, cause: &str) -> Result<(), Failed> {
    failed_cleanly(&run(&["synth", "llama", "F32", "out.gguf"]), cause)
}

/// What fits is written: the failures are the disk's doing.
fn large_enough() -> Result<(), Failed> {
    let out = on_a_small_disk("64m", &["synth", "llama", "F32", "out.gguf"]);
    match (out.status.code(), out.stdout.as_slice()) {
        (Some(0), b"out.gguf\n") => Ok(()),
        _ => Err(format!("{out:?}").into()),
    }
}

fn main() -> ExitCode {
    let absent = !may_mount();
    let disk = |size: &'static str| move |args: &[&str]| on_a_small_disk(size, args);
    let limit = |args: &[&str]| with_a_limit("64", args);
    let full = "No space left";
    let mut trials = Vec::new();
    // Full in the header, in the first tensors, and near the end.
    for size in ["4k", "200k", "800k"] {
        let quantize = move || quantize(disk(size), full);
        let synth = move || synth(disk(size), full);
        trials.push(Trial::test(
            format!("quantize_to_a_disk_of_{size}"),
            quantize,
        ));
        trials.push(Trial::test(format!("synth_to_a_disk_of_{size}"), synth));
    }
    trials.push(Trial::test("a_large_enough_disk", large_enough));
    let mut trials: Vec<_> = trials
        .into_iter()
        .map(|t| t.with_kind("needs namespaces").with_ignored_flag(absent))
        .collect();
    trials.push(Trial::test("quantize_under_a_limit", move || {
        quantize(limit, "File too large")
    }));
    trials.push(Trial::test("synth_under_a_limit", move || {
        synth(limit, "File too large")
    }));
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}
