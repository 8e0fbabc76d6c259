//! Tells the program which commit it is built from, for the records that it writes.

use std::process::Command;

fn main() {
    let root = "../..";
    let git = |args: &[&str]| {
        let out = Command::new("git").arg("-C").arg(root).args(args).output();
        let out = out.ok().filter(|out| out.status.success())?;
        Some(String::from_utf8_lossy(&out.stdout).trim().to_owned())
    };
    // Documents are no part of the program, and records must not taint the next one.
    let changed = git(&["status", "--porcelain", "--", ".", ":(exclude)docs"]);
    let commit = git(&["rev-parse", "HEAD"]).unwrap_or_default();
    println!("cargo::rustc-env=TEGULA_COMMIT={commit}");
    let dirty = changed.is_none_or(|changed| !changed.is_empty());
    println!("cargo::rustc-env=TEGULA_DIRTY={}", u8::from(dirty));

    for file in ["HEAD", "logs/HEAD"] {
        if let Some(path) = git(&["rev-parse", "--path-format=absolute", "--git-path", file]) {
            println!("cargo::rerun-if-changed={path}");
        }
    }
    // Whatever git would call a change: cargo looks into directories.
    let entries = git(&["ls-tree", "--name-only", "HEAD"]).unwrap_or_default();
    for entry in entries.lines().filter(|entry| *entry != "docs") {
        println!("cargo::rerun-if-changed={root}/{entry}");
    }
}
