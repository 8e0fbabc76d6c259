//! The program as its users start it.

mod chat;
mod commands;
mod constrained;
mod errors;
mod help;
mod lora;
mod settings;
mod sparse;
mod synthetic;
mod terminal;

use serde_json::Value;
use std::{
    ffi::OsStr,
    io::Write as _,
    path::Path,
    process::{Command, Output, Stdio},
};

/// The program, with nothing from the environment that changes what it does.
pub fn program<S: AsRef<OsStr>>(args: &[S]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tegula"));
    command.args(args);
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy();
        if name.starts_with("TEGULA_") || name.starts_with("HF_") {
            command.env_remove(&*name);
        }
    }
    // Nor from the user's own files.
    command.env("XDG_CONFIG_HOME", "/nonexistent");
    command
}

/// Runs the program to its end.
pub fn tegula<S: AsRef<OsStr>>(args: &[S]) -> Output {
    program(args).stdin(Stdio::null()).output().unwrap()
}

/// Runs the program with text on its standard input.
pub fn tegula_with_input<S: AsRef<OsStr>>(args: &[S], input: &[u8]) -> Output {
    let mut child = program(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input).unwrap();
    child.wait_with_output().unwrap()
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// What it prints when it succeeds.
pub fn stdout<S: AsRef<OsStr>>(args: &[S]) -> String {
    let out = tegula(args);
    assert!(out.status.success(), "{}", text(&out.stderr));
    text(&out.stdout)
}

/// The one JSON document that it prints, all of the output.
pub fn json<S: AsRef<OsStr>>(args: &[S]) -> Value {
    serde_json::from_str(&stdout(args)).unwrap()
}

/// Runs it, expects this exit code and nothing on stdout, and returns what it says.
pub fn fails<S: AsRef<OsStr>>(code: i32, args: &[S]) -> String {
    let out = tegula(args);
    let said = text(&out.stderr);
    assert_eq!(out.status.code(), Some(code), "{said}");
    assert!(
        said.starts_with("error: ") || said.contains("\nerror: "),
        "{said}"
    );
    assert!(out.stdout.is_empty());
    said
}

/// The names and types of a document: of arrays the first element.
pub fn shape(value: &Value) -> Value {
    match value {
        Value::Null => "null".into(),
        Value::Bool(_) => "bool".into(),
        Value::Number(_) => "number".into(),
        Value::String(_) => "string".into(),
        Value::Array(a) => a.iter().take(1).map(shape).collect(),
        Value::Object(o) => o.iter().map(|(k, v)| (k.clone(), shape(v))).collect(),
    }
}

pub fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A directory with a small model of random weights in it.
pub fn small_model(shape: &str, ty: &str) -> (tempfile::TempDir, std::path::PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model.gguf");
    stdout(&["synth", shape, ty, path(&model)]);
    (dir, model)
}
