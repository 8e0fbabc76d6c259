//! Flags from the environment and from the configuration file.

use crate::{path, program, text};
use std::{fs, process::Output};

/// Runs the program with variables and, if there is a text, a configuration file.
fn with(variables: &[(&str, &str)], file: Option<&str>, args: &[&str]) -> Output {
    let dir = tempfile::tempdir().unwrap();
    let mut command = program(args);
    command.env("XDG_CONFIG_HOME", dir.path());
    command.envs(variables.iter().copied());
    if let Some(file) = file {
        fs::create_dir(dir.path().join("tegula")).unwrap();
        fs::write(dir.path().join("tegula/config.toml"), file).unwrap();
    }
    command.output().unwrap()
}

/// The row of a flag in `config show COMMAND --origin`.
fn shown(variables: &[(&str, &str)], file: Option<&str>, command: &str, flag: &str) -> String {
    let out = with(variables, file, &["config", "show", command, "--origin"]);
    assert!(out.status.success(), "{}", text(&out.stderr));
    let out = text(&out.stdout);
    let row = out.lines().find(|l| l.starts_with(&format!("{flag} = ")));
    row.unwrap_or_else(|| panic!("{flag}: {out}")).to_owned()
}

const FILE: &str =
    "temp = 0.25\nthreads = 2\nstop = [\"a\", \"b\"]\n\n[run]\ntemp = 0.5\nverbose = true\n";

/// Tokens that a run generated.
fn tokens(out: &Output) -> usize {
    assert!(out.status.success(), "{}", text(&out.stderr));
    let json: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    json["tokens"].as_array().unwrap().len()
}

#[test]
fn the_command_line_wins_over_the_environment_over_the_file_over_the_default() {
    let variable = [("TEGULA_TEMP", "0.75")];
    let ends = |row: String, value: &str, origin: &str| {
        assert!(
            row.starts_with(&format!("temp = {value} ")) && row.ends_with(origin),
            "{row}"
        );
    };
    ends(shown(&[], None, "run", "temp"), "0.8", "# default");
    ends(
        shown(&[], Some(FILE), "chat", "temp"),
        "0.25",
        "config.toml",
    );
    ends(
        shown(&[], Some(FILE), "run", "temp"),
        "0.5",
        "config.toml [run]",
    );
    ends(
        shown(&variable, Some(FILE), "run", "temp"),
        "0.75",
        "# TEGULA_TEMP",
    );
    assert!(shown(&[], Some(FILE), "run", "verbose").starts_with("verbose = true"));
    assert!(shown(&[], Some(FILE), "run", "stop").starts_with("stop = a,b"));

    let run = [
        "run",
        "-p",
        "fn main",
        "--json",
        "--no-warmup",
        "--ignore-eos",
    ];
    let limited = [&run[..], &["-n", "2"]].concat();
    let three = Some("[run]\nn-predict = 3\n");
    assert_eq!(tokens(&with(&[], three, &run)), 3);
    assert_eq!(tokens(&with(&[("TEGULA_N_PREDICT", "4")], three, &run)), 4);
    assert_eq!(
        tokens(&with(&[("TEGULA_N_PREDICT", "4")], three, &limited)),
        2
    );
    // Set but empty is not set.
    assert_eq!(tokens(&with(&[("TEGULA_N_PREDICT", "")], three, &run)), 3);
}

#[test]
fn flags_without_a_value_are_switched() {
    let run = ["run", "-p", "x", "-n", "1", "--no-warmup"];
    for (value, json) in [("1", true), ("yes", true), ("false", false), ("0", false)] {
        let out = with(&[("TEGULA_JSON", value)], None, &run);
        assert_eq!(text(&out.stdout).starts_with('{'), json, "{value}");
    }
    let out = with(&[("TEGULA_JSON", "perhaps")], None, &run);
    assert_eq!(out.status.code(), Some(2));
    assert!(text(&out.stderr).contains("TEGULA_JSON: expected true or false"));
    // A flag that may go without its value.
    let doctor = text(&with(&[], None, &["doctor"]).stdout);
    let emulated = with(&[("TEGULA_AMX", "emulate")], None, &run);
    let said = text(&emulated.stderr);
    assert!(
        said.contains("emulat") || !doctor.contains("avx2: yes"),
        "{said}"
    );
}

#[test]
fn what_the_command_line_contradicts_is_left_out() {
    let dir = tempfile::tempdir().unwrap();
    let prompt = dir.path().join("prompt.txt");
    fs::write(&prompt, "from the file").unwrap();
    let args = ["tokenize", "-f", path(&prompt), "--json"];
    let plain = with(&[], None, &args);
    let out = with(&[("TEGULA_PROMPT", "from the variable")], None, &args);
    assert!(out.status.success(), "{}", text(&out.stderr));
    assert_eq!(out.stdout, plain.stdout);
    // A model that is named wins over one that is set.
    let (_dir, model) = crate::small_model("qwen3", "Q4_0");
    let inspect = ["inspect", path(&model), "--json"];
    let out = with(&[("TEGULA_MODEL", "/no/such/model")], None, &inspect);
    assert!(out.status.success(), "{}", text(&out.stderr));
}

#[test]
fn secrets_are_used_and_not_shown() {
    let variable = [("TEGULA_API_KEY", "of-the-variable")];
    let file = Some("[serve]\napi-key = [\"of-the-file\", \"another\"]\n");
    for (variables, origin) in [
        (&variable[..], "# TEGULA_API_KEY"),
        (&[], "config.toml [serve]"),
    ] {
        for args in [
            &["config", "show"][..],
            &["config", "show", "--json"],
            &["config", "show", "serve", "--origin"],
        ] {
            let out = with(variables, file, args);
            let all = text(&out.stdout) + &text(&out.stderr);
            assert!(out.status.success(), "{all}");
            assert!(
                all.contains("api-key") && all.contains("(a secret)"),
                "{all}"
            );
            assert!(
                !all.contains("of-the-") && !all.contains("another"),
                "{all}"
            );
        }
        let row = shown(variables, file, "serve", "api-key");
        assert!(row.ends_with(origin), "{row}");
    }
    let unset = shown(&[], None, "serve", "api-key");
    assert!(unset.starts_with("api-key = (unset)"), "{unset}");
    // One that is refused isn't quoted either.
    let long = "k".repeat(5000);
    let out = with(
        &[("TEGULA_API_KEY", &long)],
        None,
        &["serve", "--port", "0"],
    );
    assert_eq!(out.status.code(), Some(2));
    assert!(!text(&out.stderr).contains("kkkk"));
}

#[test]
fn errors_say_where_a_setting_is() {
    let run = ["run", "-p", "x", "-n", "1"];
    for (variables, file, said) in [
        (&[("TEGULA_TEMP", "hot")][..], None, "set by TEGULA_TEMP"),
        (&[], Some("temp = \"hot\""), "config.toml"),
        (
            &[],
            Some("[run]\ntop-k = [1, 2]"),
            "config.toml [run]: top-k",
        ),
        (&[], Some("tempo = 1"), "no command has a flag --tempo"),
        (&[], Some("[runs]\ntemp = 1"), "[runs] is no command"),
        (
            &[],
            Some("[run]\npath = 1"),
            "`tegula run` has no flag --path",
        ),
        (&[], Some("json = 3"), "expected true or false"),
        (&[], Some("temp = = 3"), "line 1"),
        (
            &[("TEGULA_CONFIG", "/no/such/file")],
            None,
            "/no/such/file: cannot read",
        ),
    ] {
        let out = with(variables, file, &run);
        let all = text(&out.stderr);
        assert_eq!(out.status.code(), Some(2), "{said}: {all}");
        assert!(all.contains(said), "{said}: {all}");
    }
}

#[test]
fn a_file_can_be_named() {
    let dir = tempfile::tempdir().unwrap();
    let named = dir.path().join("named.toml");
    fs::write(&named, "[run]\nn-predict = 1\n").unwrap();
    let run = ["run", "-p", "x", "--json", "--no-warmup", "--ignore-eos"];
    let flag = ["--config", path(&named)];
    let before = [&flag[..], &run[..]].concat();
    let behind = [&run[..], &flag[..]].concat();
    for args in [before, behind] {
        assert_eq!(tokens(&with(&[], Some("n-predict = 2"), &args)), 1);
    }
    let out = with(
        &[("TEGULA_CONFIG", path(&named))],
        None,
        &["config", "path"],
    );
    assert_eq!(text(&out.stdout).trim_end(), path(&named));
}
