//! Help texts are part of the interface: a change shows up in review.

use crate::stdout;

#[test]
fn the_commands() {
    insta::assert_snapshot!(stdout(&["--help"]));
}

#[test]
fn each_command() {
    for command in [
        "run",
        "chat",
        "serve",
        "pull",
        "list",
        "rm",
        "bench",
        "perplexity",
        "logits",
        "tokenize",
        "inspect",
        "explain",
        "doctor",
        "quantize",
        "prune",
        "synth",
        "config",
        "completions",
    ] {
        insta::assert_snapshot!(command, stdout(&[command, "--help"]));
    }
}
