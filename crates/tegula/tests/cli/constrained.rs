//! Output that has to be what a schema, an expression or a grammar says.

use crate::{fails, json, path, stdout, tegula_with_input, text};
use serde_json::Value;
use std::fs;

const SCHEMA: &str = r#"{"type": "object", "additionalProperties": false, "required": ["name", "n"],
    "properties": {"name": {"type": "string", "maxLength": 12}, "n": {"type": "integer", "maximum": 9}}}"#;
const GBNF: &str = "root ::= (\"yes\" | \"no\") \"!\"{2}";
const LARK: &str = "start: (\"yes\" | \"no\") \"!!\"";

/// Whether it is what the schema describes.
fn fits(value: &Value) -> bool {
    let name = value["name"].as_str();
    name.is_some_and(|name| name.chars().count() <= 12)
        && value["n"].as_i64().is_some_and(|n| n <= 9)
        && value.as_object().is_some_and(|o| o.len() == 2)
}

/// Of a continuation.
const RUN: [&str; 5] = ["run", "-p", "It is ", "-n", "60"];

/// What `run` writes behind a prompt with this seed and these flags.
fn continued(seed: &str, flags: &[&str]) -> String {
    let answer = json(&[&RUN[..], &["--json", "--seed", seed], flags].concat());
    answer["text"].as_str().unwrap().to_owned()
}

#[test]
fn run_writes_what_it_may() {
    for seed in ["1", "2", "3"] {
        let value = continued(seed, &["--json-schema", SCHEMA]);
        let value = serde_json::from_str(&value).unwrap_or_else(|e| panic!("{e}: {value}"));
        assert!(fits(&value), "{value}");
    }
    let date = continued("3", &["--regex", "20[0-9]{2}-[01][0-9]"]);
    assert_eq!((date.len(), &date[..2], &date[4..5]), (7, "20", "-"));
    // As a stream it is the same.
    let streamed = stdout(
        &[
            &RUN[..],
            &["--seed", "3", "--regex", "20[0-9]{2}-[01][0-9]"],
        ]
        .concat(),
    );
    assert_eq!(streamed, format!("{date}\n"));
    for grammar in [GBNF, LARK] {
        let said = continued("3", &["--grammar", grammar]);
        assert!(["yes!!", "no!!"].contains(&said.as_str()), "{said}");
    }
}

#[test]
fn schemas_and_grammars_come_from_files() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let file = dir.path().join(name);
        fs::write(&file, text).unwrap();
        path(&file).to_owned()
    };
    let schema = continued("3", &["--json-schema-file", &file("schema.json", SCHEMA)]);
    assert_eq!(schema, continued("3", &["--json-schema", SCHEMA]));
    let grammar = continued("3", &["--grammar-file", &file("yes.gbnf", GBNF)]);
    assert_eq!(grammar, continued("3", &["--grammar", GBNF]));
}

/// Every answer of a conversation, and the next one begins anew.
#[test]
fn chat_answers_what_it_may() {
    for (flags, good) in [
        (["--regex", "(yes|no)!!"], 2),
        (["--grammar", GBNF], 2),
        (["--grammar", LARK], 2),
    ] {
        let chat = ["chat", "-n", "20", "--seed", "1"];
        let out = tegula_with_input(&[&chat[..], &flags].concat(), b"Is it?\nAnd now?\n");
        assert!(out.status.success(), "{}", text(&out.stderr));
        let said = text(&out.stdout);
        let answers = said.matches("yes!!").count() + said.matches("no!!").count();
        let letters = said.chars().filter(|c| c.is_alphabetic()).count();
        assert_eq!(answers, good, "{flags:?}: {said}");
        assert!(letters <= 6, "nothing else: {said}");
    }
    let chat = ["chat", "-n", "60", "--json-schema", SCHEMA];
    let out = tegula_with_input(&chat, b"A thing as JSON\n");
    assert!(out.status.success(), "{}", text(&out.stderr));
    let said = text(&out.stdout);
    let value = serde_json::from_str(said.trim()).unwrap_or_else(|e| panic!("{e}: {said}"));
    assert!(fits(&value), "{value}");
}

#[test]
fn what_cannot_be_written_is_refused_before_anything_is() {
    let refused = |code: i32, flags: &[&str]| {
        let run = ["run", "-p", "x"];
        fails(code, &[&run[..], flags].concat())
    };
    let said = refused(3, &["--json-schema", "{"]);
    assert!(
        said.contains("--json-schema: the schema is not JSON"),
        "{said}"
    );
    refused(3, &["--json-schema", r#"{"type": "nonsense"}"#]);
    refused(3, &["--regex", "("]);
    let said = refused(3, &["--grammar", "root ::= nowhere"]);
    assert!(said.contains("nowhere"), "{said}");
    refused(3, &["--grammar-file", "/nowhere.gbnf"]);
    refused(2, &["--grammar", GBNF, "--regex", "x"]);
}
