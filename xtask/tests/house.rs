//! House rules that no compiler knows, held over every file that git tracks or would.

use std::{fs, path::PathBuf, process::Command};

/// A file's path within the repository, and its text.
type Text = (String, String);

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Every file that is not ignored, except those that are not text.
fn texts() -> Vec<Text> {
    let listed = Command::new("git")
        .args([
            "ls-files",
            "-z",
            "--cached",
            "--others",
            "--exclude-standard",
        ])
        .current_dir(root())
        .output()
        .expect("git lists the files");
    // A copy of the tree without its history has no list; then everything there counts.
    let paths = match listed.status.success() {
        true => String::from_utf8(listed.stdout)
            .expect("names are UTF-8")
            .split_terminator('\0')
            .map(str::to_owned)
            .collect(),
        false => walk(""),
    };
    let texts: Vec<Text> = paths
        .into_iter()
        .filter_map(|path| {
            let text = fs::read_to_string(root().join(&path)).ok()?;
            Some((path, text))
        })
        .collect();
    let has = |path| texts.iter().any(|(p, _)| p == path);
    assert!(has("Cargo.toml") && has("xtask/tests/house.rs"));
    texts
}

fn walk(dir: &str) -> Vec<String> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(root().join(dir)).expect("a directory") {
        let entry = entry.expect("an entry");
        let name = entry.file_name().into_string().expect("names are UTF-8");
        if ["target", ".git"].contains(&name.as_str()) {
            continue;
        }
        let path = match dir {
            "" => name,
            dir => format!("{dir}/{name}"),
        };
        match entry.file_type().expect("a type").is_dir() {
            true => paths.extend(walk(&path)),
            false => paths.push(path),
        }
    }
    paths
}

/// `path:line: text` of every line of the chosen files that a rule dislikes.
fn offences(chosen: impl Fn(&str) -> bool, dislikes: impl Fn(&str) -> bool) -> Vec<String> {
    let mut found = Vec::new();
    for (path, text) in texts().into_iter().filter(|(path, _)| chosen(path)) {
        for (i, line) in text.lines().enumerate().filter(|(_, line)| dislikes(line)) {
            found.push(format!("{path}:{}: {}", i + 1, line.trim()));
        }
    }
    found
}

fn assert_none(found: &[String], rule: &str) {
    assert!(found.is_empty(), "{rule}:\n{}", found.join("\n"));
}

/// Whether `line` has `word` with nothing before and after it that a name could go on with.
fn has_word(line: &str, word: &str) -> bool {
    let of_name = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(word).any(|(at, _)| {
        !line[..at].ends_with(of_name) && !line[at + word.len()..].starts_with(of_name)
    })
}

fn is_rust(path: &str) -> bool {
    path.ends_with(".rs")
}

#[test]
fn nothing_is_left_to_be_done_later() {
    // In two halves, so that this file does not offend.
    let marks = [
        concat!("TO", "DO"),
        concat!("FIX", "ME"),
        concat!("XX", "X"),
        concat!("to", "do!"),
        concat!("unimple", "mented!"),
    ];
    let found = offences(
        |path| is_rust(path) || path.ends_with(".md") || path.ends_with(".toml"),
        |line| marks.iter().any(|mark| has_word(line, mark)),
    );
    assert_none(&found, "finish it, or open an issue");
}

#[test]
fn unsafe_code_lives_where_it_may() {
    let may = |path: &str| {
        ["crates/kernels/", "crates/amx-emu/", "crates/cuda/"]
            .iter()
            .any(|dir| path.starts_with(dir))
            || path == "crates/gguf/src/mmap.rs"
    };
    let word = concat!("un", "safe");
    let found = offences(
        |path| is_rust(path) && !may(path),
        |line| {
            let code = line.split("//").next().unwrap_or(line);
            has_word(code, word)
        },
    );
    assert_none(
        &found,
        "only kernels, amx-emu, cuda and gguf's mmap module may",
    );
}

#[test]
fn modules_are_short() {
    const LIMIT: usize = 1_000;
    let long: Vec<String> = texts()
        .into_iter()
        .filter(|(path, text)| is_rust(path) && !text.starts_with("// @generated"))
        .map(|(path, text)| (path, text.lines().count()))
        .filter(|(_, lines)| *lines >= LIMIT)
        .map(|(path, lines)| format!("{path}: {lines} lines"))
        .collect();
    assert_none(
        &long,
        "split it (generated tables start with `// @generated`)",
    );
}

#[test]
fn no_machine_is_named() {
    let mut paths = vec![
        concat!("/ho", "me/").to_owned(),
        concat!("/ro", "ot/").to_owned(),
        concat!("/Us", "ers/").to_owned(),
    ];
    // The checkout's own place, unless it is so short that it could be any path.
    let here = root().canonicalize().expect("the root exists");
    if here.components().count() > 2 {
        paths.push(here.to_string_lossy().into_owned());
    }
    let inside_a_path = |c: char| c.is_alphanumeric() || "._-}$".contains(c);
    let found = offences(
        |_| true,
        |line| {
            paths.iter().any(|path| {
                let mut at = line.match_indices(path.as_str());
                at.any(|(i, _)| !line[..i].ends_with(inside_a_path))
            })
        },
    );
    assert_none(&found, "no path of one machine");
}

#[test]
fn no_registry_is_named_but_the_public_one() {
    let public = concat!("regis", "try+https://github.com/rust-lang/crates.io-index");
    let marks = [
        concat!("regis", "try+"),
        concat!("spar", "se+http"),
        concat!("[sour", "ce."),
        concat!("[regis", "tries"),
        concat!("replace", "-with"),
        concat!("index", "-url"),
    ];
    let found = offences(
        |_| true,
        |line| {
            marks
                .iter()
                .any(|mark| line.replace(public, "").contains(mark))
        },
    );
    assert_none(&found, "dependencies come from crates.io, by its own name");
}

#[test]
fn the_readme_has_every_command_and_no_other() {
    let texts = texts();
    let modules = texts.iter().filter_map(|(path, _)| {
        let module = path.strip_prefix("crates/tegula/src/cmd/")?;
        let name = module.strip_suffix(".rs").unwrap_or(module);
        name.split('/').next()
    });
    let mut commands: Vec<&str> = modules.filter(|name| *name != "mod").collect();
    commands.sort_unstable();
    commands.dedup();
    let readme = texts.iter().find(|(path, _)| path == "README.md");
    let (_, readme) = readme.expect("there is a readme");
    let rows = readme.lines().filter_map(|line| {
        let (name, rest) = line.strip_prefix("| `")?.split_once('`')?;
        rest.contains(&format!("`tegula {name}")).then_some(name)
    });
    let mut listed: Vec<&str> = rows.collect();
    listed.sort_unstable();
    assert_eq!(listed, commands, "commands in README.md and in the program");
}
