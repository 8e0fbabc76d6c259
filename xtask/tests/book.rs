//! The handbook in docs/book, and the other pages: every page is listed, every link leads
//! somewhere, every command line that is shown is one.

use std::{
    collections::BTreeSet,
    fs,
    path::{Component, Path, PathBuf},
};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn book() -> PathBuf {
    root().join("docs/book/src")
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The markdown files of a directory by name.
fn pages(dir: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    entries
        .map(|entry| entry.expect("an entry").file_name())
        .map(|name| name.into_string().expect("names are UTF-8"))
        .filter(|name| name.ends_with(".md"))
        .collect()
}

/// A page's text with what it includes in place.
fn text(path: &Path) -> String {
    let mut out = String::new();
    for line in read(path).lines() {
        let included = line
            .strip_prefix("{{#include ")
            .and_then(|rest| rest.strip_suffix("}}"));
        match included {
            Some(file) => out += &read(&path.with_file_name(file)),
            None => out += line,
        }
        out.push('\n');
    }
    assert!(
        !out.contains("{{#"),
        "{}: unknown directive",
        path.display()
    );
    out
}

/// The text outside of code, and the lines of fenced code with the fence's language.
fn prose_and_code(text: &str) -> (String, Vec<(String, String)>) {
    let (mut prose, mut code) = (String::new(), Vec::new());
    let mut fence: Option<(usize, String)> = None;
    for line in text.lines() {
        let ticks = line.len() - line.trim_start_matches('`').len();
        match &fence {
            Some((n, _)) if ticks >= *n && line.len() == ticks => fence = None,
            Some((_, language)) => code.push((language.clone(), line.to_owned())),
            None if ticks >= 3 => fence = Some((ticks, line[ticks..].to_owned())),
            None => {
                // Of `code` in a line only the outside.
                prose.extend(line.split('`').step_by(2));
                prose.push('\n');
            }
        }
    }
    assert!(fence.is_none(), "code without an end");
    (prose, code)
}

/// What a heading is called in links: letters and digits in lower case, dashes for spaces.
fn anchors(text: &str) -> BTreeSet<String> {
    let headings = text.lines().filter(|line| line.starts_with('#'));
    headings
        .map(|line| {
            let title = line.trim_start_matches('#').trim().to_lowercase();
            let kept = |c: &char| c.is_alphanumeric() || " -_".contains(*c);
            title
                .chars()
                .filter(kept)
                .collect::<String>()
                .replace(' ', "-")
        })
        .collect()
}

/// The targets of a page's links.
fn links(prose: &str) -> Vec<String> {
    let behind = prose.split("](").skip(1);
    behind
        .filter_map(|rest| Some(rest.split_once(')')?.0.to_owned()))
        .collect()
}

/// The path without `..`.
fn resolved(path: &Path) -> PathBuf {
    let mut out = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => {
                out.pop();
            }
            Component::CurDir => {}
            part => out.push(part),
        }
    }
    out
}

#[test]
fn the_summary_lists_every_page_once() {
    let summary = read(&book().join("SUMMARY.md"));
    let mut listed = links(&summary);
    listed.sort();
    let mut there = pages(&book());
    assert!(there.remove("SUMMARY.md"));
    assert_eq!(listed, there.into_iter().collect::<Vec<_>>());
    let toml = read(&root().join("docs/book/book.toml"));
    assert!(toml.contains("\nsrc = \"src\"\n"));
}

#[test]
fn every_link_leads_somewhere() {
    let root = resolved(&root());
    let mut files: Vec<PathBuf> = ["", "docs", "docs/bench", "docs/decisions", "docs/book/src"]
        .iter()
        .flat_map(|dir| {
            let dir = root.join(dir);
            pages(&dir).into_iter().map(move |name| dir.join(name))
        })
        .collect();
    files.sort();
    assert!(files.len() > 15, "{files:?}");
    let mut dead = Vec::new();
    for file in &files {
        let whole = text(file);
        let (prose, _) = prose_and_code(&whole);
        let in_book = file.starts_with(root.join("docs/book"));
        for link in links(&prose) {
            if link.starts_with("https://") || link.starts_with("http://") {
                continue;
            }
            let (target, anchor) = link.split_once('#').unwrap_or((&link, ""));
            let path = match target {
                "" => file.clone(),
                target => resolved(&file.with_file_name(target)),
            };
            let inside = !in_book || path.starts_with(root.join("docs/book/src"));
            let there = inside && path.exists();
            let found = anchor.is_empty() || (there && anchors(&text(&path)).contains(anchor));
            if !there || !found {
                let name = file.strip_prefix(&root).unwrap_or(file);
                dead.push(format!("{}: {link}", name.display()));
            }
        }
    }
    assert!(dead.is_empty(), "{}", dead.join("\n"));
}

/// The words of a shell's line, as far as quotes go; up to a pipe, a redirection or a comment.
fn words(line: &str) -> Vec<String> {
    let (mut words, mut word, mut quote) = (Vec::new(), None::<String>, None);
    for c in line.chars() {
        match (quote, c) {
            (Some(q), c) if c == q => quote = None,
            (Some(_), c) => word.get_or_insert_default().push(c),
            (None, '\'' | '"') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (None, '|' | '>' | '#' | ';') => break,
            (None, c) if c.is_whitespace() => words.extend(word.take()),
            (None, c) => word.get_or_insert_default().push(c),
        }
    }
    assert!(quote.is_none(), "{line}");
    words.extend(word);
    words
}

#[test]
fn command_lines_are_understood() {
    let mut wrong = Vec::new();
    let mut seen = 0;
    let mut check = |place: &str, line: &str| {
        for part in line.split(" | ") {
            let words = words(part);
            let is_program = |w: &String| w == "tegula" || w.ends_with("/tegula");
            let Some(at) = words.iter().position(is_program) else {
                continue;
            };
            seen += 1;
            if let Err(e) = tegula::describe::understands(&words[at + 1..]) {
                wrong.push(format!("{place}: {line}\n{e}"));
            }
        }
    };
    for name in pages(&book()) {
        let (_, code) = prose_and_code(&text(&book().join(&name)));
        for (_, line) in code.iter().filter(|(language, _)| language == "sh") {
            check(&name, line);
        }
    }
    // Of the README the examples of commands, and its blocks.
    let readme = read(&root().join("README.md"));
    for line in readme.lines().filter(|line| line.starts_with("| `")) {
        let example = line.split('`').rfind(|code| code.starts_with("tegula "));
        example
            .into_iter()
            .for_each(|code| check("README.md", code));
    }
    for (_, line) in prose_and_code(&readme).1 {
        if line.starts_with("target/release/tegula ") || line.starts_with("tegula ") {
            check("README.md", &line);
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(seen > 50, "only {seen} command lines were found");
}
