//! The release archive: the program with all that belongs to it, packed so that the same commit
//! gives the same bytes, and tried on a root directory that has nothing but the C library.

use std::{
    collections::BTreeMap,
    env,
    ffi::OsStr,
    fmt::Write as _,
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    process::{Command, Output},
};

use anyhow::{Context as _, Result, bail, ensure};
use cargo_metadata::{DependencyKind, Metadata, MetadataCommand, Package};
use sha2::{Digest as _, Sha256};

const TARGET: &str = "x86_64-unknown-linux-gnu";
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The newest C library that the program may ask for: 2.34 is in every distribution whose kernel
/// knows AMX, and the first that has threads in `libc.so.6` itself.
const NEWEST_GLIBC: (u32, u32) = (2, 34);

/// What the program may be linked with: parts of the C library, which are everywhere.
const LIBRARIES: [&str; 3] = ["libc.so.6", "libm.so.6", "ld-linux-x86-64.so.2"];

/// Builds the program (unless there is a `binary`), packs it into `out`, and tries what was packed.
pub fn run(root: &Path, binary: Option<&Path>, out: &Path) -> Result<()> {
    // What others have built may have the compiler's library beside the C library's.
    let (binary, also) = match binary {
        Some(binary) => (binary.to_owned(), Some("libgcc_s.so.1")),
        None => (build(root)?, None),
    };
    let glibc = oldest_glibc(&binary)?;
    let libraries = libraries(&binary, also)?;
    let name = format!("tegula-{VERSION}-{TARGET}");
    let work = Scratch::new("pack")?;
    let files = stage(root, &binary, glibc, &work.path().join(&name))?;
    fs::create_dir_all(out).with_context(|| out.display().to_string())?;
    let archive = out.join(format!("{name}.tar.gz"));
    pack(root, work.path(), &name, &archive)?;
    let sum = sha256(&archive)?;
    let sums = out.join(format!("{name}.tar.gz.sha256"));
    fs::write(&sums, format!("{sum}  {name}.tar.gz\n"))
        .with_context(|| sums.display().to_string())?;
    println!(
        "{}: {files} files, {} KiB, glibc {}.{} or later",
        archive.display(),
        fs::metadata(&archive)?.len() / 1024,
        glibc.0,
        glibc.1
    );
    try_out(&archive, &name, &libraries)
}

/// A release build, linked with the compiler's own unwinder instead of the system's.
fn build(root: &Path) -> Result<PathBuf> {
    let linking = root.join("target/dist-link");
    let mut cargo = Command::new("cargo");
    cargo
        .args([
            "rustc",
            "--release",
            "--locked",
            "--package",
            "tegula",
            "--bin",
            "tegula",
        ])
        .arg("--")
        .arg(own_unwinder(&linking)?)
        .args(["-C", "strip=debuginfo"])
        .current_dir(root);
    let target = match env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => root.join(dir),
        None => root.join("target"),
    };
    ensure!(
        cargo.status().context("cargo")?.success(),
        "the build failed"
    );
    Ok(target.join("release/tegula"))
}

/// Makes a directory for the linker; rustc's flag that lets the program have its unwinder inside,
/// at no newer glibc than without it.
fn own_unwinder(dir: &Path) -> Result<String> {
    fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
    let dir = dir.canonicalize()?;
    let (source, object) = (dir.join("find_object.c"), dir.join("find_object.o"));
    fs::write(&source, include_str!("dist/find_object.c"))?;
    let mut cc = Command::new("cc");
    cc.args(["-std=c11", "-O2", "-fPIC", "-ffunction-sections", "-Wall"]);
    cc.args(["-Wextra", "-Werror", "-c", "-o"]);
    let out = cc.arg(&object).arg(&source).output().context("cc")?;
    ensure!(out.status.success(), "cc: {}", said(&out));
    // The standard library asks for `gcc_s`, which exists as a shared library alone. This directory
    // has something else by that name: the archive of the same functions, and what that may lack.
    let script = format!("INPUT(-lgcc_eh \"{}\")\n", object.display());
    fs::write(dir.join("libgcc_s.so"), script)?;
    Ok("-Lnative=".to_owned() + dir.to_str().context("the path is not UTF-8")?)
}

/// The newest version of the C library's symbols that the program asks for.
fn oldest_glibc(binary: &Path) -> Result<(u32, u32)> {
    let bytes = fs::read(binary).with_context(|| binary.display().to_string())?;
    let needed = glibc_versions(&bytes);
    let most = needed.into_iter().max();
    let most = most.with_context(|| format!("{}: asks for no glibc", binary.display()))?;
    ensure!(
        most <= NEWEST_GLIBC,
        "{} asks for glibc {}.{}, newer than {}.{}: build it on an older system",
        binary.display(),
        most.0,
        most.1,
        NEWEST_GLIBC.0,
        NEWEST_GLIBC.1
    );
    Ok(most)
}

/// Every `GLIBC_x.y` that stands in the file as a whole string, as names of versions do.
fn glibc_versions(bytes: &[u8]) -> Vec<(u32, u32)> {
    let strings = bytes.split(|&b| b == 0);
    let version = |s: &[u8]| {
        let text = std::str::from_utf8(s).ok()?.strip_prefix("GLIBC_")?;
        let mut numbers = text.split('.').map(str::parse);
        Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
    };
    strings.filter_map(version).collect()
}

/// Where the shared libraries are that the program is linked with.
fn libraries(binary: &Path, also: Option<&str>) -> Result<Vec<PathBuf>> {
    let out = Command::new("ldd").arg(binary).output().context("ldd")?;
    ensure!(out.status.success(), "ldd: {}", said(&out));
    let mut found = Vec::new();
    for line in String::from_utf8_lossy(&out.stdout).lines() {
        let line = line.trim();
        if line.starts_with("linux-vdso") {
            continue;
        }
        let path = line.split_once("=> ").map_or(line, |(_, path)| path);
        let path = PathBuf::from(path.split(" (").next().unwrap_or(path));
        let name = path.file_name().and_then(OsStr::to_str).unwrap_or(line);
        ensure!(
            LIBRARIES.contains(&name) || also == Some(name),
            "{}: is linked with {name}, which a bare machine may lack",
            binary.display()
        );
        found.push(path);
    }
    Ok(found)
}

/// Lays the archive's files out; how many they are.
fn stage(root: &Path, binary: &Path, glibc: (u32, u32), dir: &Path) -> Result<usize> {
    let mut files: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    for name in ["README.md", "CHANGELOG.md", "LICENSE-MIT", "LICENSE-APACHE"] {
        files.insert(name.to_owned(), fs::read(root.join(name)).context(name)?);
    }
    files.insert("INSTALL.md".to_owned(), install(glibc).into_bytes());
    files.insert("THIRD-PARTY.md".to_owned(), third_party(root)?.into_bytes());
    for (name, text) in tegula::describe::files()? {
        let place = match name.split_once('/') {
            None => format!("share/doc/tegula/{name}"),
            Some(("man", page)) => format!("share/man/man1/{page}"),
            Some(("completions", "_tegula")) => "share/zsh/site-functions/_tegula".to_owned(),
            Some(("completions", "tegula.bash")) => {
                "share/bash-completion/completions/tegula".to_owned()
            }
            Some(("completions", "tegula.fish")) => {
                "share/fish/vendor_completions.d/tegula.fish".to_owned()
            }
            // The book's own copies follow.
            Some(("book", _)) => continue,
            Some(_) => bail!("{name}: nobody said where in the archive it belongs"),
        };
        files.insert(place, text.into_bytes());
    }
    let pages = root.join("docs/book/src");
    for entry in fs::read_dir(&pages).context("docs/book/src")? {
        let name = entry?.file_name();
        let name = name.to_str().context("a page's name is not UTF-8")?;
        if name != "cli.md" {
            let text = fs::read(pages.join(name)).context(name.to_owned())?;
            files.insert(format!("share/doc/tegula/{name}"), text);
        }
    }
    let program = fs::read(binary).with_context(|| binary.display().to_string())?;
    files.insert("bin/tegula".to_owned(), program);
    let mut sums = String::new();
    for (name, bytes) in &files {
        // Writing to a String can't fail.
        let _ = writeln!(sums, "{}  {name}", hex(&Sha256::digest(bytes)));
    }
    files.insert("SHA256SUMS".to_owned(), sums.into_bytes());
    for (name, bytes) in &files {
        let path = dir.join(name);
        fs::create_dir_all(path.parent().unwrap_or(dir))?;
        fs::write(&path, bytes).with_context(|| name.clone())?;
        let mode = if name == "bin/tegula" { 0o755 } else { 0o644 };
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
    }
    Ok(files.len())
}

fn install(glibc: (u32, u32)) -> String {
    format!(
        "# Installing Tegula {VERSION}\n\n\
         It runs on x86-64 Linux with glibc {}.{} or later and wants nothing else. GPUs need \
         NVIDIA's driver, and no CUDA.\n\n```sh\n\
         sha256sum --check --quiet SHA256SUMS\n\
         bin/tegula doctor\n\
         sudo cp -r bin share /usr/local/    # or ~/.local\n```\n\n\
         `share` has manual pages, completions for bash, fish and zsh, and in `doc/tegula` the \
         handbook, which begins with `introduction.md`.\n",
        glibc.0, glibc.1
    )
}

/// What is linked in, with the notices that must be kept.
fn third_party(root: &Path) -> Result<String> {
    let metadata = MetadataCommand::new()
        .manifest_path(root.join("Cargo.toml"))
        .other_options(["--locked".to_owned(), format!("--filter-platform={TARGET}")])
        .exec()
        .context("cargo metadata")?;
    let packages = linked(&metadata)?;
    let mut out =
        "# Third-party software\n\nLinked into the program, besides the standard library \
                   of Rust (MIT or Apache-2.0):\n\n| package | licence |\n|---|---|\n"
            .to_owned();
    let mut texts: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for package in &packages {
        let name = format!("{} {}", package.name, package.version);
        let licence = package.license.as_deref().unwrap_or("see below");
        let _ = writeln!(out, "| {name} | {licence} |");
        for text in notices(package)? {
            texts.entry(text).or_default().push(name.clone());
        }
    }
    let mut texts: Vec<(String, Vec<String>)> = texts.into_iter().collect();
    texts.sort_by(|a, b| a.1.cmp(&b.1));
    for (text, names) in texts {
        let _ = write!(
            out,
            "\n## {}\n\n````text\n{}\n````\n",
            names.join(", "),
            text.trim_end()
        );
    }
    Ok(out)
}

/// What the program's normal dependencies lead to, outside the workspace, by name.
fn linked(metadata: &Metadata) -> Result<Vec<&Package>> {
    let resolve = metadata
        .resolve
        .as_ref()
        .context("cargo resolved nothing")?;
    let package = |id| metadata.packages.iter().find(|p| p.id == id);
    let program = metadata
        .packages
        .iter()
        .find(|p| p.name.as_str() == "tegula");
    let mut waiting = vec![program.context("there is no package tegula")?.id.clone()];
    let mut seen = Vec::new();
    while let Some(id) = waiting.pop() {
        if seen.contains(&id) {
            continue;
        }
        let node = resolve.nodes.iter().find(|n| n.id == id);
        let deps = node.map(|n| n.deps.as_slice()).unwrap_or_default();
        let normal = deps.iter().filter(|dep| {
            let mut kinds = dep.dep_kinds.iter();
            kinds.any(|k| k.kind == DependencyKind::Normal)
        });
        waiting.extend(normal.map(|dep| dep.pkg.clone()));
        seen.push(id);
    }
    let mut packages: Vec<&Package> = seen
        .into_iter()
        .filter_map(package)
        .filter(|p| !metadata.workspace_members.contains(&p.id))
        .collect();
    packages.sort_by(|a, b| (&a.name, &a.version).cmp(&(&b.name, &b.version)));
    Ok(packages)
}

/// The texts of a package's licences and notices.
fn notices(package: &Package) -> Result<Vec<String>> {
    let dir = package
        .manifest_path
        .parent()
        .context("a package without a directory")?;
    let mut texts = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| package.name.to_string())? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().to_lowercase();
        let begins = [
            "license",
            "licence",
            "copying",
            "copyright",
            "notice",
            "unlicense",
        ];
        if begins.iter().any(|b| name.starts_with(b)) && entry.file_type()?.is_file() {
            let text = fs::read(entry.path())?;
            texts.push(String::from_utf8_lossy(&text).into_owned());
        }
    }
    Ok(texts)
}

/// Packs `dir/name`: sorted, nobody's, as old as the commit.
fn pack(root: &Path, dir: &Path, name: &str, archive: &Path) -> Result<()> {
    let git = Command::new("git")
        .args(["log", "-1", "--format=%ct"])
        .current_dir(root)
        .output()
        .context("git")?;
    ensure!(git.status.success(), "git log: {}", said(&git));
    let time = String::from_utf8_lossy(&git.stdout).trim().to_owned();
    let temporary = archive.with_extension("tmp");
    let tar = Command::new("tar")
        .args(["--create", "--sort=name", "--format=gnu", "--numeric-owner"])
        .args(["--owner=0", "--group=0", "--use-compress-program=gzip -n6"])
        .arg(format!("--mtime=@{time}"))
        .arg("--file")
        .arg(&temporary)
        .arg("--directory")
        .arg(dir)
        .arg(name)
        .output()
        .context("tar")?;
    ensure!(tar.status.success(), "tar: {}", said(&tar));
    fs::rename(&temporary, archive).with_context(|| archive.display().to_string())
}

/// Unpacks the archive, compares its sums, and runs the program on a root that has nothing but it
/// and the C library; where there can be no such root, says so.
fn try_out(archive: &Path, name: &str, libraries: &[PathBuf]) -> Result<()> {
    let work = Scratch::new("try")?;
    let tar = Command::new("tar")
        .arg("--extract")
        .arg("--file")
        .arg(archive)
        .arg("--directory")
        .arg(work.path())
        .output()
        .context("tar")?;
    ensure!(tar.status.success(), "tar: {}", said(&tar));
    let unpacked = work.path().join(name);
    let sums = Command::new("sha256sum")
        .args(["--check", "--quiet", "--strict", "SHA256SUMS"])
        .current_dir(&unpacked)
        .output()
        .context("sha256sum")?;
    ensure!(sums.status.success(), "SHA256SUMS: {}", said(&sums));

    let bare = work.path().join("bare");
    let copy = |from: &Path, to: &Path| -> Result<()> {
        let to = bare.join(to.strip_prefix("/").unwrap_or(to));
        fs::create_dir_all(to.parent().unwrap_or(&bare))?;
        fs::copy(from, &to).with_context(|| from.display().to_string())?;
        Ok(())
    };
    copy(&unpacked.join("bin/tegula"), Path::new("tegula"))?;
    for library in libraries {
        copy(library, library)?;
    }
    let version = match in_root(&bare, &["--version"])? {
        Err(why) => {
            println!("skipped: the run on a bare root: {why}");
            return Ok(());
        }
        Ok(out) => succeeded(&out, "--version")?,
    };
    ensure!(
        version == format!("tegula {VERSION}\n"),
        "it says it is {version:?}"
    );
    let run = [
        "run",
        "-p",
        "An iterator adaptor",
        "-n",
        "8",
        "--temp",
        "0",
        "-t",
        "1",
    ];
    let text = in_root(&bare, &run)?.map_err(anyhow::Error::msg)?;
    let text = succeeded(&text, "run")?;
    ensure!(!text.trim().is_empty(), "run wrote nothing");
    println!("tried on a bare root: {text:?}");
    Ok(())
}

fn succeeded(out: &Output, what: &str) -> Result<String> {
    ensure!(out.status.success(), "{what} on a bare root: {}", said(out));
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

/// Runs the program in a directory as if that were everything, without an environment; otherwise
/// why there can be no such root here.
fn in_root(bare: &Path, args: &[&str]) -> Result<Result<Output, String>> {
    let path = env::var_os("PATH").unwrap_or_default();
    let places = env::split_paths(&path).chain(["/usr/sbin", "/sbin"].map(PathBuf::from));
    let places: Vec<PathBuf> = places.collect();
    let find = |name: &str| {
        places
            .iter()
            .map(|dir| dir.join(name))
            .find(|p| p.is_file())
    };
    let Some(chroot) = find("chroot") else {
        return Ok(Err("there is no chroot".to_owned()));
    };
    // The directory was made by this process: its owner is who runs this.
    let is_root = fs::metadata(bare)?.uid() == 0;
    let mut command = match (is_root, find("unshare")) {
        (true, _) => Command::new(chroot),
        (false, Some(unshare)) => {
            let mut command = Command::new(unshare);
            command.arg("--map-root-user").arg(chroot);
            command
        }
        (false, None) => return Ok(Err("there is no unshare, and this is not root".to_owned())),
    };
    let out = command
        .arg(bare)
        .arg("/tegula")
        .args(args)
        .env_clear()
        .output()?;
    // 125: chroot itself failed; 1 with its name: unshare did.
    let text = said(&out);
    match out.status.code() {
        Some(125) => Ok(Err(text)),
        Some(1) if text.starts_with("unshare: ") => Ok(Err(text)),
        _ => Ok(Ok(out)),
    }
}

/// What a program said when it failed.
fn said(out: &Output) -> String {
    String::from_utf8_lossy(&out.stderr).trim().to_owned()
}

fn sha256(path: &Path) -> Result<String> {
    let bytes = fs::read(path).with_context(|| path.display().to_string())?;
    Ok(hex(&Sha256::digest(bytes)))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String can't fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// A directory that goes when it is no longer used.
struct Scratch(PathBuf);

impl Scratch {
    fn new(what: &str) -> Result<Scratch> {
        let path = env::temp_dir().join(format!("tegula-dist-{what}-{}", std::process::id()));
        fs::create_dir(&path).with_context(|| path.display().to_string())?;
        Ok(Scratch(path))
    }

    fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What can't be removed stays with the system's other temporary files.
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_whole_strings() {
        let bytes = b"\0GLIBC_2.34\0GLIBC_2.2.5\0xGLIBC_2.99\0GLIBC_PRIVATE\0GLIBC_2.40x\0";
        assert_eq!(glibc_versions(bytes), [(2, 34), (2, 2)]);
    }

    /// A program that catches a panic, built as the release is: it asks for nothing newer and
    /// nothing else than the release may.
    #[test]
    fn the_own_unwinder_unwinds_and_asks_for_no_newer_glibc() {
        let dir = Scratch::new("unwinder").unwrap();
        let (source, program) = (dir.path().join("main.rs"), dir.path().join("main"));
        let text = r#"fn main() {
            let caught = std::panic::catch_unwind(|| {
                let text = String::from("a value with a destructor");
                assert!(text.is_empty());
            });
            println!("caught: {}", caught.is_err());
        }"#;
        fs::write(&source, text).unwrap();
        let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
        let built = Command::new(rustc)
            .args(["--edition=2024", "-O", "-o"])
            .arg(&program)
            .arg(own_unwinder(&dir.path().join("link")).unwrap())
            .arg(&source)
            .output()
            .unwrap();
        assert!(built.status.success(), "{}", said(&built));
        oldest_glibc(&program).unwrap();
        libraries(&program, None).unwrap();
        let out = Command::new(&program).output().unwrap();
        assert!(out.status.success(), "{}", said(&out));
        assert_eq!(String::from_utf8_lossy(&out.stdout), "caught: true\n");
    }

    #[test]
    fn sums_are_those_of_sha256sum() {
        assert_eq!(
            hex(&Sha256::digest(b"abc")),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }
}
