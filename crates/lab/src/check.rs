//! Checks: the tasks of the master task list, made executable.

use std::{
    collections::BTreeMap,
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    time::Instant,
};

use serde::{Deserialize, Serialize};

use crate::{Host, Series};

/// One of the five research phases.
#[derive(Clone, Debug)]
pub struct Phase {
    /// 1 to 5.
    pub number: u8,
    /// A few words, as a heading.
    pub title: &'static str,
    /// What the phase has to show, in a sentence or two.
    pub goal: &'static str,
    /// Its tasks in the order of the master task list.
    pub checks: Vec<Check>,
    /// What it can measure.
    pub benches: Vec<Bench>,
    /// Facts that are no outcomes, for the phase's page.
    pub tables: Vec<Table>,
}

/// A table on a phase's page.
#[derive(Clone, Debug)]
pub struct Table {
    /// A few words, as a heading.
    pub title: &'static str,
    /// What the columns are.
    pub header: &'static [&'static str],
    /// Cells, as many as the header has.
    pub rows: Vec<Vec<String>>,
}

/// A task that can be verified.
#[derive(Clone, Debug)]
pub struct Check {
    /// The task's number in the master task list: `"1.1"`.
    pub id: &'static str,
    /// What holds when the check passes.
    pub title: &'static str,
    /// What the check can't run without.
    pub requires: &'static [Need],
    /// Runs the check; called only if every need is met.
    pub run: fn(&Env) -> Outcome,
}

/// A measurement.
#[derive(Clone, Debug)]
pub struct Bench {
    /// A few words, as a heading.
    pub title: &'static str,
    /// What the measurement can't be taken without.
    pub requires: &'static [Need],
    /// Takes it, every repetition; called only if every need is met. An error says why there
    /// are no figures.
    pub run: fn(&Env) -> Result<Vec<Series>, String>,
}

/// Something that a check or a measurement can't do without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// The subject does not exist yet; names what is waited for. Never met.
    Unbuilt(&'static str),
    /// The directory of models beside the checkout.
    Shared,
    /// A CPU with AMX (tile, int8 and bf16).
    Amx,
    /// A CPU with AVX2, FMA, F16C and BMI2.
    Avx2,
    /// A CPU with AVX-512 F, BW, VL, DQ and VNNI.
    Avx512,
    /// At least so many GPUs.
    Gpus(usize),
    /// At least so many logical CPUs.
    Cores(usize),
}

impl Need {
    /// What is lacking, or `None` if the need is met.
    pub fn lacks(&self, env: &Env) -> Option<String> {
        let flags = |names: &[&str]| {
            let missing: Vec<&str> = names
                .iter()
                .copied()
                .filter(|n| !env.host.flags.iter().any(|f| f == n))
                .collect();
            (!missing.is_empty()).then(|| format!("a CPU with {}", missing.join(", ")))
        };
        match *self {
            Need::Unbuilt(what) => Some(what.to_owned()),
            Need::Shared => env
                .shared
                .is_none()
                .then(|| "the shared models (`../shared`, or TEGULA_SHARED)".to_owned()),
            Need::Amx => flags(&["amx_tile", "amx_int8", "amx_bf16"]),
            Need::Avx2 => flags(&["avx2", "fma", "f16c", "bmi2"]),
            Need::Avx512 => flags(&["avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"]),
            Need::Gpus(n) => (env.host.gpus < n).then(|| match n {
                1 => "a GPU".to_owned(),
                n => format!("{n} GPUs (found {})", env.host.gpus),
            }),
            Need::Cores(n) => {
                (env.host.cores < n).then(|| format!("{n} logical CPUs (found {})", env.host.cores))
            }
        }
    }
}

/// The need itself, whether met or not.
impl fmt::Display for Need {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Need::Unbuilt(what) => f.write_str(what),
            Need::Shared => f.write_str("the shared models"),
            Need::Amx => f.write_str("a CPU with AMX"),
            Need::Avx2 => f.write_str("a CPU with AVX2"),
            Need::Avx512 => f.write_str("a CPU with AVX-512 and VNNI"),
            Need::Gpus(1) => f.write_str("a GPU"),
            Need::Gpus(n) => write!(f, "{n} GPUs"),
            Need::Cores(n) => write!(f, "{n} logical CPUs"),
        }
    }
}

/// How a check ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "status", rename_all = "lowercase")]
pub enum Outcome {
    /// It holds; `facts` says what was seen, by name.
    Passed { facts: BTreeMap<String, String> },
    /// It does not hold.
    Failed { why: String },
    /// It could not be looked at.
    Blocked { lacks: Vec<String> },
}

impl Outcome {
    /// Passed with these facts.
    pub fn passed<K: Into<String>, V: Into<String>>(
        facts: impl IntoIterator<Item = (K, V)>,
    ) -> Outcome {
        Outcome::Passed {
            facts: facts
                .into_iter()
                .map(|(k, v)| (k.into(), v.into()))
                .collect(),
        }
    }

    /// Failed for this reason.
    pub fn failed(why: impl Into<String>) -> Outcome {
        Outcome::Failed { why: why.into() }
    }

    /// Blocked for lack of this.
    pub fn blocked(lacks: impl Into<String>) -> Outcome {
        Outcome::Blocked {
            lacks: vec![lacks.into()],
        }
    }

    /// `"passed"`, `"failed"` or `"blocked"`.
    pub fn status(&self) -> &'static str {
        match self {
            Outcome::Passed { .. } => "passed",
            Outcome::Failed { .. } => "failed",
            Outcome::Blocked { .. } => "blocked",
        }
    }

    /// Facts, reason or lacks, on one line.
    pub fn detail(&self) -> String {
        let text = match self {
            Outcome::Passed { facts } => facts
                .iter()
                .map(|(k, v)| format!("{k}: {v}"))
                .collect::<Vec<_>>()
                .join("; "),
            Outcome::Failed { why } => why.clone(),
            Outcome::Blocked { lacks } => format!("waits for {}", lacks.join("; ")),
        };
        text.split_whitespace().collect::<Vec<_>>().join(" ")
    }
}

/// For `?` in a check: an error is a failure.
impl From<Result<Outcome, String>> for Outcome {
    fn from(result: Result<Outcome, String>) -> Outcome {
        result.unwrap_or_else(|why| Outcome::Failed { why })
    }
}

/// The `run` of a check whose subject is not built yet; its [`Need::Unbuilt`] says what is
/// waited for. Never passes.
pub fn unbuilt(_: &Env) -> Outcome {
    Outcome::blocked("its subject, which is not built yet")
}

/// What checks run in.
#[derive(Clone, Debug)]
pub struct Env {
    /// The workspace's root.
    pub root: PathBuf,
    /// The directory of shared models, if there is one.
    pub shared: Option<PathBuf>,
    /// The machine.
    pub host: Host,
}

impl Env {
    /// The environment of the workspace at `root`: shared models from `TEGULA_SHARED` or
    /// `../shared`, the host as found.
    pub fn detect(root: impl Into<PathBuf>) -> Env {
        let root = root.into();
        let shared =
            std::env::var_os("TEGULA_SHARED").map_or_else(|| root.join("../shared"), PathBuf::from);
        Env {
            shared: shared.join("models").is_dir().then_some(shared),
            host: Host::detect(),
            root,
        }
    }

    /// A file of the shared models' directory.
    ///
    /// # Errors
    /// Says which file is missing.
    pub fn model(&self, name: &str) -> Result<PathBuf, String> {
        let dir = self.shared.as_deref().unwrap_or(Path::new("../shared"));
        let path = dir.join("models").join(name);
        match path.is_file() {
            true => Ok(path),
            false => Err(format!("shared models: {name}: no such file")),
        }
    }
}

/// A check's outcome as recorded.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CheckResult {
    /// The task's number.
    pub id: String,
    /// How it ended.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// Seconds that it ran.
    pub seconds: f64,
}

/// What of `needs` is not met.
pub fn lacking(needs: &[Need], env: &Env) -> Vec<String> {
    needs.iter().filter_map(|need| need.lacks(env)).collect()
}

/// Runs a check, or says what it lacks. A panic in it is a failure.
pub fn verify(check: &Check, env: &Env) -> CheckResult {
    let lacks = lacking(check.requires, env);
    let start = Instant::now();
    let outcome = match lacks.is_empty() {
        false => Outcome::Blocked { lacks },
        true => catch_unwind(AssertUnwindSafe(|| (check.run)(env))).unwrap_or_else(|panic| {
            let text = panic
                .downcast_ref::<String>()
                .map(String::as_str)
                .or_else(|| panic.downcast_ref::<&str>().copied());
            Outcome::failed(format!("panicked: {}", text.unwrap_or("no message")))
        }),
    };
    CheckResult {
        id: check.id.to_owned(),
        outcome,
        seconds: (start.elapsed().as_secs_f64() * 100.0).round() / 100.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env() -> Env {
        Env {
            root: PathBuf::from("."),
            shared: None,
            host: Host {
                flags: vec!["avx2".into(), "amx_tile".into()],
                cores: 2,
                ..Host::default()
            },
        }
    }

    fn holds(_: &Env) -> Outcome {
        Outcome::passed([("seen", "yes")])
    }

    fn check(requires: &'static [Need], run: fn(&Env) -> Outcome) -> Check {
        Check {
            id: "0.1",
            title: "a check",
            requires,
            run,
        }
    }

    #[test]
    fn a_met_need_runs_and_an_unmet_one_blocks() {
        let done = verify(&check(&[Need::Cores(2)], holds), &env());
        assert_eq!(done.outcome, Outcome::passed([("seen", "yes")]));
        let needs = &[Need::Cores(3), Need::Amx, Need::Gpus(2), Need::Shared];
        let Outcome::Blocked { lacks } = verify(&check(needs, holds), &env()).outcome else {
            panic!("ran without what it needs");
        };
        assert_eq!(lacks.len(), 4);
        assert_eq!(lacks[1], "a CPU with amx_int8, amx_bf16");
    }

    #[test]
    fn what_is_not_built_never_passes() {
        let blocked = verify(&check(&[Need::Unbuilt("the AMX tier")], holds), &env());
        assert_eq!(blocked.outcome.status(), "blocked");
        assert_eq!(blocked.outcome.detail(), "waits for the AMX tier");
        assert_eq!(unbuilt(&env()).status(), "blocked");
    }

    #[test]
    fn a_panic_is_a_failure() {
        fn broken(env: &Env) -> Outcome {
            assert!(env.shared.is_some(), "nothing there");
            Outcome::passed([("", "")])
        }
        let failed = verify(&check(&[], broken), &env()).outcome;
        assert_eq!(failed, Outcome::failed("panicked: nothing there"));
    }

    #[test]
    fn outcomes_survive_json() {
        for outcome in [
            Outcome::passed([("a", "1")]),
            Outcome::failed("no"),
            Outcome::blocked("a GPU"),
        ] {
            let result = CheckResult {
                id: "1.1".into(),
                outcome,
                seconds: 0.25,
            };
            let json = serde_json::to_string(&result).unwrap();
            assert_eq!(serde_json::from_str::<CheckResult>(&json).unwrap(), result);
        }
    }
}
