//! Real clients against `tegula serve`: the openai packages for Python and for JavaScript, and
//! Chromium on the page. They are looked for in `target/clients` or where `TEGULA_CLIENTS` points;
//! `install.sh` beside this file puts them there. What is absent is marked as ignored.

#[path = "../server/support.rs"]
#[allow(dead_code)]
mod support;

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use libtest_mimic::{Arguments, Failed, Trial};
use support::Server;

const KEY: &str = "sk-test";

/// Runs a program against a server of its own; it must succeed and say so.
fn run(program: &Path, args: impl FnOnce(&Server) -> Vec<String>) -> Result<(), Failed> {
    let server = Server::start(&["--api-key", KEY]);
    let out = Command::new(program).args(args(&server)).output()?;
    let (said, errors) = (
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr),
    );
    match out.status.success() && said.starts_with("ok") {
        true => Ok(()),
        false => Err(format!("{}: {said}\n{errors}", program.display()).into()),
    }
}

fn main() {
    let args = Arguments::from_args();
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients");
    let clients = std::env::var_os("TEGULA_CLIENTS").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/clients"),
        PathBuf::from,
    );
    let script = |name: &str| here.join(name).to_string_lossy().into_owned();
    let modules = clients.to_string_lossy().into_owned();
    let found = |path: &str| clients.join(path).exists();
    let on_path = |name: &str| {
        let dirs = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&dirs)
            .map(|dir| dir.join(name))
            .find(|path| path.exists())
    };
    let python = clients.join("py/bin/python");
    let node = on_path("node");
    let chromium = on_path("chromium");

    let openai_python = {
        let absent = !python_has_openai(&python);
        let script = script("clients.py");
        Trial::test("openai_for_python", move || {
            run(&python, |server| {
                vec![
                    script,
                    format!("http://{}/v1", server.address),
                    KEY.to_owned(),
                ]
            })
        })
        .with_ignored_flag(absent)
    };
    let openai_node = {
        let (node, script, modules) = (node.clone(), script("clients.mjs"), modules.clone());
        let absent = node.is_none() || !found("node_modules/openai");
        Trial::test("openai_for_javascript", move || {
            run(&node.unwrap_or_default(), |server| {
                let url = format!("http://{}/v1", server.address);
                vec![script, url, KEY.to_owned(), modules]
            })
        })
        .with_ignored_flag(absent)
    };
    let page = {
        let script = script("page.cjs");
        let absent = node.is_none() || chromium.is_none() || !found("node_modules/playwright-core");
        Trial::test("page_in_chromium", move || {
            run(&node.unwrap_or_default(), |server| {
                let browser = chromium.unwrap_or_default().to_string_lossy().into_owned();
                let url = format!("http://{}", server.address);
                vec![script, url, KEY.to_owned(), modules, browser]
            })
        })
        .with_ignored_flag(absent)
    };
    libtest_mimic::run(&args, vec![openai_python, openai_node, page]).exit();
}

fn python_has_openai(python: &Path) -> bool {
    let mut check = Command::new(python);
    check.args(["-c", "import openai"]);
    check.output().is_ok_and(|out| out.status.success())
}
