//! Conversations from a pipe.

use crate::{path, tegula_with_input, text};
use serde_json::Value;
use std::fs;

/// A conversation with the embedded model, from a pipe.
fn chat(args: &[&str], input: &str) -> (String, String) {
    let all = [&["chat", "--temp", "0", "-n", "4"][..], args].concat();
    let out = tegula_with_input(&all, input.as_bytes());
    assert!(out.status.success(), "{}", text(&out.stderr));
    (text(&out.stdout), text(&out.stderr))
}

#[test]
fn commands_shape_the_conversation() {
    let dir = tempfile::tempdir().unwrap();
    let saved = dir.path().join("saved.json");
    let notes = dir.path().join("notes.txt");
    fs::write(&notes, "Some notes.\n").unwrap();
    let (file, notes) = (path(&saved), path(&notes));
    let input = format!(
        "/system Be brief.\nHello\\\nthere\n/read {notes}\n\"\"\"\nAnd\n/now?\n\"\"\"\n\
         One too many\n/undo\n//not a command\n/save {file}\n"
    );
    chat(&[], &input);
    let json: Value = serde_json::from_str(&fs::read_to_string(&saved).unwrap()).unwrap();
    let said: Vec<(&str, &str)> = json["messages"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| (m["role"].as_str().unwrap(), m["content"].as_str().unwrap()))
        .filter(|(role, _)| *role != "assistant")
        .collect();
    assert_eq!(
        said,
        [
            ("system", "Be brief."),
            ("user", "Hello\nthere"),
            ("user", "Some notes.\n\nAnd\n/now?"),
            ("user", "/not a command"),
        ]
    );
    // Loaded, the conversation goes on as if it had not been interrupted.
    let (whole, _) = chat(&[], "Hello\nAnd now?\n");
    chat(&[], &format!("Hello\n/save {file}\n"));
    let (rest, _) = chat(&[], &format!("/load {file}\nAnd now?\n"));
    assert!(
        !rest.is_empty() && whole.ends_with(&rest),
        "{whole:?} {rest:?}"
    );
    let left: Vec<_> = fs::read_dir(dir.path()).unwrap().collect();
    assert_eq!(left.len(), 2, "{left:?}");
}

#[test]
fn answers_can_be_had_anew_and_settings_changed() {
    let (same, _) = chat(&[], "Hello\n/regen\n");
    let (first, second) = same.split_at(same.len() / 2);
    assert_eq!(first, second, "always the likeliest token");
    let (_, said) = chat(&[], "/set temp 0.5\n/set think off\n/set\n/stats\n");
    assert!(said.contains("temp               0.5"), "{said}");
    assert!(said.contains("think              off"), "{said}");
    assert!(said.contains("context 0 of "), "{said}");
    let (shorter, _) = chat(&[], "/set n_predict 1\nHello\n");
    assert!(shorter.len() < first.len(), "{shorter:?} {first:?}");
    let (history, _) = chat(&["--system", "S"], "Hi\n/clear\n/history\n");
    assert!(
        history.ends_with("[system] S\n") && !history.contains("[user]"),
        "{history}"
    );
}

#[test]
fn a_script_hears_of_what_goes_wrong() {
    for (input, code, what) in [
        ("/frobnicate\n", 2, "no command /frobnicate"),
        ("/regen\n", 2, "nothing has been asked"),
        ("/set temp hot\n", 2, "temp: expected a number"),
        ("/load /no/such/file\n", 3, "cannot read"),
        ("/save /no/such/directory/x\n", 3, "cannot write"),
    ] {
        let out = tegula_with_input(&["chat", "-n", "1"], input.as_bytes());
        let said = text(&out.stderr);
        assert_eq!(out.status.code(), Some(code), "{said}");
        assert!(said.contains(what), "{said}");
    }
    let long = "word ".repeat(3000);
    let out = tegula_with_input(&["chat", "-c", "64"], long.as_bytes());
    assert_eq!(out.status.code(), Some(3));
    assert!(text(&out.stderr).contains("context is full"));
}

#[test]
fn templates_of_the_model_lead_to_its_answer() {
    // The prompt ends inside reasoning: all that the model writes is that.
    let dir = tempfile::tempdir().unwrap();
    let template = dir.path().join("t.jinja");
    let saved = dir.path().join("saved.json");
    fs::write(
        &template,
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: <think>\n",
    )
    .unwrap();
    let args = ["--chat-template", path(&template)];
    let (shown, _) = chat(&args, &format!("Hi\n/save {}\n", path(&saved)));
    let json: Value = serde_json::from_str(&fs::read_to_string(&saved).unwrap()).unwrap();
    let answer = &json["messages"][1];
    assert_eq!(answer["content"], "");
    assert_eq!(answer["reasoning_content"], shown.trim());
    assert!(!shown.contains('\x1b'), "colours in a pipe: {shown:?}");
}
