//! The checks that need nothing but AVX2, in the ordinary test run.

use std::path::PathBuf;

use tegula_lab::{Env, Outcome, verify};

#[test]
fn amx_is_touched_only_where_it_was_asked_for() {
    let env = Env::detect(PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/..")));
    let checks = phase1_isolation::checks();
    for check in checks.iter().filter(|c| ["1.2", "1.3"].contains(&c.id)) {
        let outcome = verify(check, &env).outcome;
        let failed = matches!(outcome, Outcome::Failed { .. });
        assert!(!failed, "{}: {}", check.id, outcome.detail());
    }
}
