//! The release archive of a program that was built already.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// The program as the other tests of this workspace have built it, or built now.
fn program() -> PathBuf {
    let xtask = Path::new(env!("CARGO_BIN_EXE_xtask"));
    let program = xtask.with_file_name("tegula");
    if !program.exists() {
        let mut cargo = Command::new("cargo");
        cargo.args(["build", "--package", "tegula"]);
        assert!(cargo.status().expect("cargo").success());
    }
    program
}

fn dist(program: &Path, out: &Path) -> String {
    let done = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .arg("dist")
        .arg("--binary")
        .arg(program)
        .arg("--out")
        .arg(out)
        .output()
        .expect("xtask runs");
    let text = String::from_utf8_lossy(&done.stdout).into_owned();
    assert!(
        done.status.success(),
        "{text}{}",
        String::from_utf8_lossy(&done.stderr)
    );
    text
}

#[test]
fn the_archive_has_what_belongs_to_the_program_and_it_runs_alone() {
    let dir = std::env::temp_dir().join(format!("tegula-dist-test-{}", std::process::id()));
    let (first, second) = (dir.join("a"), dir.join("b"));
    fs::create_dir(&dir).expect("a directory");
    // Without what debuggers want it is packed in half the time.
    let small = dir.join("tegula");
    let mut strip = Command::new("strip");
    strip.arg(program()).arg("-o").arg(&small);
    if !strip.status().is_ok_and(|status| status.success()) {
        fs::copy(program(), &small).expect("copied");
    }
    let said = dist(&small, &first);
    assert!(
        said.contains("tried on a bare root") || said.contains("skipped: "),
        "{said}"
    );
    eprintln!("{said}");
    dist(&small, &second);
    let name = format!(
        "tegula-{}-x86_64-unknown-linux-gnu",
        env!("CARGO_PKG_VERSION")
    );
    let archive = first.join(format!("{name}.tar.gz"));
    let bytes = |dir: &Path| fs::read(dir.join(format!("{name}.tar.gz"))).expect("an archive");
    assert!(
        bytes(&first) == bytes(&second),
        "the same again is the same"
    );
    let list = Command::new("tar").arg("-tf").arg(&archive).output();
    let list = String::from_utf8(list.expect("tar").stdout).expect("names are UTF-8");
    for file in [
        "bin/tegula",
        "INSTALL.md",
        "README.md",
        "LICENSE-MIT",
        "LICENSE-APACHE",
        "THIRD-PARTY.md",
        "SHA256SUMS",
        "share/man/man1/tegula.1",
        "share/man/man1/tegula-serve.1",
        "share/bash-completion/completions/tegula",
        "share/fish/vendor_completions.d/tegula.fish",
        "share/zsh/site-functions/_tegula",
        "share/doc/tegula/cli.md",
        "share/doc/tegula/formats.md",
        "share/doc/tegula/server.md",
    ] {
        let line = format!("{name}/{file}");
        assert!(list.lines().any(|l| l == line), "no {file} in\n{list}");
    }
    let sum = Command::new("sha256sum")
        .args(["--check", "--strict"])
        .arg(format!("{name}.tar.gz.sha256"))
        .current_dir(&first)
        .output()
        .expect("sha256sum");
    assert!(sum.status.success());
    let third = Command::new("tar")
        .args(["-xOf"])
        .arg(&archive)
        .arg(format!("{name}/THIRD-PARTY.md"))
        .output();
    let third = String::from_utf8(third.expect("tar").stdout).expect("UTF-8");
    for package in ["| clap 4.", "| tokio 1.", "| ring 0.", "| webpki-roots 1."] {
        assert!(third.contains(package), "{package}");
    }
    assert!(!third.contains("| criterion "), "only what is linked in");
    fs::remove_dir_all(&dir).expect("removed");
}
