//! The generated pages are what the lists and the records say; the lists are complete.

use std::process::Command;

fn xtask(args: &[&str]) -> (bool, String) {
    let out = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(args)
        .output()
        .expect("xtask runs");
    let text = [out.stdout, out.stderr].concat();
    (
        out.status.success(),
        String::from_utf8_lossy(&text).into_owned(),
    )
}

#[test]
fn pages_are_up_to_date() {
    let (ok, text) = xtask(&["codegen", "--check"]);
    assert!(ok, "{text}");
}

#[test]
fn the_task_numbers_are_the_master_lists() {
    let phases = [
        (phase1_isolation::phase(), 8),
        (phase2_perf::phase(), 6),
        (phase3_analysis::phase(), 6),
        (phase4_parity::phase(), 6),
        (phase5_sparamx::phase(), 10),
    ];
    for (number, (phase, tasks)) in (1..).zip(phases) {
        assert_eq!(phase.number, number);
        let ids: Vec<&str> = phase.checks.iter().map(|c| c.id).collect();
        let want: Vec<String> = (1..=tasks).map(|t| format!("{number}.{t}")).collect();
        assert_eq!(ids, want);
    }
}

#[test]
fn status_counts_every_task() {
    let (ok, text) = xtask(&["status"]);
    assert!(ok, "{text}");
    let total = text.lines().find(|line| line.starts_with("| all | 36 |"));
    assert!(total.is_some(), "{text}");
}

#[test]
fn wrong_usage_is_refused_by_name() {
    for (args, names) in [
        (&["phase", "6", "verify"][..], "6"),
        (&["phase", "1", "dance"], "dance"),
        (&["dance"], "dance"),
    ] {
        let (ok, text) = xtask(args);
        assert!(
            !ok && text.contains(&format!("'{names}'")),
            "{args:?}: {text}"
        );
    }
}
