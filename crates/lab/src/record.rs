//! Records: results with the circumstances that they come from.

use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::Command,
    time::{SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};

use crate::{CheckResult, Host};

/// The layout of [`Record`] that this version writes; it reads this and every earlier one.
pub const SCHEMA_VERSION: u32 = 1;

/// Outcomes or measurements, and where they come from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// [`SCHEMA_VERSION`] of the writer.
    pub schema_version: u32,
    /// What it records: `"phase-1"` to `"phase-5"`, or a benchmark's name.
    pub subject: String,
    /// When, in UTC: `2026-11-23T21:05:00Z`.
    pub date: String,
    /// The commit checked out; empty outside a repository.
    pub commit: String,
    /// True if tracked files other than `docs/` differed from that commit.
    pub dirty: bool,
    /// The command line, without the directories of absolute paths.
    pub command: Vec<String>,
    /// The machine.
    pub host: Host,
    /// Outcomes of checks.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub checks: Vec<CheckResult>,
    /// Measurements.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub series: Vec<Series>,
}

/// Raw samples of one quantity.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Series {
    /// What was measured.
    pub name: String,
    /// Its unit: `"t/s"`, `"ms"`.
    pub unit: String,
    /// Every repetition, in order.
    pub samples: Vec<f64>,
}

impl Series {
    /// The middle sample, or the mean of the two in the middle; not a number if there is none.
    pub fn median(&self) -> f64 {
        let mut sorted = self.samples.clone();
        sorted.sort_by(f64::total_cmp);
        match (sorted.len(), sorted.len() / 2) {
            (0, _) => f64::NAN,
            (n, half) if n % 2 == 0 => (sorted[half - 1] + sorted[half]) / 2.0,
            (_, half) => sorted[half],
        }
    }
}

/// Why a record could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The file system said no.
    #[error("{}: {error}", path.display())]
    Io {
        path: PathBuf,
        error: std::io::Error,
    },
    /// The file is no record.
    #[error("{}: no record: {error}", path.display())]
    Json {
        path: PathBuf,
        error: serde_json::Error,
    },
    /// The file was written by a later version.
    #[error("{}: schema version {found}, but this build knows only up to {SCHEMA_VERSION}", path.display())]
    Newer { path: PathBuf, found: u32 },
}

impl Record {
    /// An empty record of `subject`, taken now in the repository at `root`.
    pub fn new(subject: &str, root: &Path, host: Host) -> Record {
        let git = |args: &[&str]| {
            let out = Command::new("git").arg("-C").arg(root).args(args).output();
            out.ok()
                .filter(|o| o.status.success())
                .map(|o| String::from_utf8_lossy(&o.stdout).trim().to_owned())
        };
        // Recording a phase rewrites files under `docs/`, which must not taint the next one.
        let changed = git(&["status", "--porcelain", "--", ".", ":(exclude)docs"]);
        let commit = git(&["rev-parse", "HEAD"]).unwrap_or_default();
        let dirty = changed.is_none_or(|c| !c.is_empty());
        Record::built(subject, &commit, dirty, host)
    }

    /// An empty record of `subject`, taken now by a program that was built from this commit
    /// (empty: from none), with or without changes.
    pub fn built(subject: &str, commit: &str, dirty: bool, host: Host) -> Record {
        Record {
            schema_version: SCHEMA_VERSION,
            subject: subject.to_owned(),
            date: Date::now().to_string(),
            commit: commit.to_owned(),
            dirty,
            command: std::env::args().map(|arg| without_places(&arg)).collect(),
            host,
            checks: Vec::new(),
            series: Vec::new(),
        }
    }

    /// Reads a record.
    ///
    /// # Errors
    /// [`RecordError`], naming the file.
    pub fn read(path: &Path) -> Result<Record, RecordError> {
        #[derive(Deserialize)]
        struct Version {
            schema_version: u32,
        }
        let text = fs::read_to_string(path).map_err(|error| RecordError::Io {
            path: path.to_owned(),
            error,
        })?;
        let json = |error| RecordError::Json {
            path: path.to_owned(),
            error,
        };
        let Version { schema_version } = serde_json::from_str(&text).map_err(json)?;
        if schema_version > SCHEMA_VERSION {
            return Err(RecordError::Newer {
                path: path.to_owned(),
                found: schema_version,
            });
        }
        serde_json::from_str(&text).map_err(json)
    }

    /// Every record directly in the directories under `dir`, in the order of their paths.
    /// A missing `dir` holds none.
    ///
    /// # Errors
    /// [`RecordError`] for a directory or a `.json` file that can't be read.
    pub fn read_all(dir: &Path) -> Result<Vec<Record>, RecordError> {
        let list = |dir: &Path| -> Result<Vec<PathBuf>, RecordError> {
            let io = |error| RecordError::Io {
                path: dir.to_owned(),
                error,
            };
            let entries = fs::read_dir(dir).map_err(io)?;
            let mut paths = entries
                .map(|e| e.map(|e| e.path()))
                .collect::<Result<Vec<_>, _>>()
                .map_err(io)?;
            paths.sort();
            Ok(paths)
        };
        let mut records = Vec::new();
        if dir.is_dir() {
            for host in list(dir)?.into_iter().filter(|p| p.is_dir()) {
                for path in list(&host)? {
                    if path.extension().is_some_and(|e| e == "json") {
                        records.push(Record::read(&path)?);
                    }
                }
            }
        }
        Ok(records)
    }

    /// Writes the record under a temporary name and renames it, so that `path` holds a whole
    /// record at every moment. Creates the directory.
    ///
    /// # Errors
    /// [`RecordError::Io`]; then nothing is left behind.
    pub fn write(&self, path: &Path) -> Result<(), RecordError> {
        let temporary = path.with_extension(format!("json.{}.tmp", std::process::id()));
        let result = (|| {
            if let Some(dir) = path.parent() {
                fs::create_dir_all(dir)?;
            }
            let mut text = serde_json::to_string_pretty(self).map_err(std::io::Error::other)?;
            text.push('\n');
            let mut file = fs::File::create(&temporary)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            fs::rename(&temporary, path)
        })();
        result.map_err(|error| {
            // The first error is the one to report.
            let _ = fs::remove_file(&temporary);
            RecordError::Io {
                path: path.to_owned(),
                error,
            }
        })
    }
}

/// The text with every absolute path in it cut down to its last part: records are public, and
/// where things lie on a machine is nobody's business.
pub fn without_places(text: &str) -> String {
    let ends = |c: char| c.is_whitespace() || "=:,;'\"`()[]".contains(c);
    let mut out = String::with_capacity(text.len());
    for part in text.split_inclusive(ends) {
        let (path, end) = match part.chars().next_back() {
            Some(c) if ends(c) => part.split_at(part.len() - c.len_utf8()),
            _ => (part, ""),
        };
        out += match path.strip_prefix('/') {
            Some(_) => path.trim_end_matches('/').rsplit('/').next().unwrap_or(""),
            None => path,
        };
        out += end;
    }
    out
}

/// A moment in UTC, to the second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Date {
    seconds: u64,
}

impl Date {
    /// Now; 1970 if the clock is before it.
    pub fn now() -> Date {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        Date::from_unix(since.map_or(0, |d| d.as_secs()))
    }

    /// Seconds since the start of 1970.
    pub fn from_unix(seconds: u64) -> Date {
        Date { seconds }
    }
}

/// `2026-11-23T21:05:00Z`.
impl std::fmt::Display for Date {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (days, rest) = (self.seconds / 86_400, self.seconds % 86_400);
        // Days are counted from March 1st of year 0, so that a leap day is a year's last.
        let z = days + 719_468;
        let era = z / 146_097;
        let doe = z % 146_097;
        let yoe = (doe - doe / 1_460 + doe / 36_524 - doe / 146_096) / 365;
        let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
        let mp = (5 * doy + 2) / 153;
        let day = doy - (153 * mp + 2) / 5 + 1;
        let month = if mp < 10 { mp + 3 } else { mp - 9 };
        let year = yoe + era * 400 + u64::from(month <= 2);
        let (h, m, s) = (rest / 3_600, rest / 60 % 60, rest % 60);
        write!(f, "{year:04}-{month:02}-{day:02}T{h:02}:{m:02}:{s:02}Z")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Outcome;

    fn record() -> Record {
        Record {
            schema_version: SCHEMA_VERSION,
            subject: "phase-4".into(),
            date: Date::from_unix(0).to_string(),
            commit: "0123".into(),
            dirty: false,
            command: vec!["xtask".into()],
            host: Host::default(),
            checks: vec![CheckResult {
                id: "4.1".into(),
                outcome: Outcome::failed("no"),
                seconds: 1.5,
            }],
            series: vec![Series {
                name: "tg64".into(),
                unit: "t/s".into(),
                samples: vec![1.0, 2.5],
            }],
        }
    }

    #[test]
    fn medians_are_in_the_middle() {
        let median = |samples: &[f64]| {
            let series = Series {
                name: "tg64".into(),
                unit: "t/s".into(),
                samples: samples.to_vec(),
            };
            series.median()
        };
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 9.0]), 3.0);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn places_are_left_out() {
        for (text, want) in [
            ("/opt/a/tegula", "tegula"),
            (
                "--peer=llama-bench=/opt/b/llama-bench:-m /x/y.gguf",
                "--peer=llama-bench=llama-bench:-m y.gguf",
            ),
            ("cannot read '/a/b c/'", "cannot read 'b c/'"),
            ("docs/bench/x", "docs/bench/x"),
            ("a,/b/c,/d", "a,c,d"),
            ("", ""),
        ] {
            assert_eq!(without_places(text), want);
        }
    }

    #[test]
    fn dates_are_civil() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_709_251_199, "2024-02-29T23:59:59Z"),
            (1_709_251_200, "2024-03-01T00:00:00Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(Date::from_unix(seconds).to_string(), text);
        }
    }

    #[test]
    fn records_come_back_and_leave_no_temporary_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("host/phase-4.json");
        record().write(&path).unwrap();
        assert_eq!(Record::read(&path).unwrap(), record());
        assert_eq!(Record::read_all(dir.path()).unwrap(), [record()]);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
        assert_eq!(Record::read_all(&dir.path().join("none")).unwrap(), []);
    }

    #[test]
    fn newer_and_broken_records_are_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r.json");
        fs::write(&path, r#"{"schema_version": 99, "later": true}"#).unwrap();
        let newer = Record::read(&path).unwrap_err().to_string();
        assert!(newer.contains("r.json: schema version 99"), "{newer}");
        fs::write(&path, "{").unwrap();
        let broken = Record::read(&path).unwrap_err().to_string();
        assert!(broken.contains("r.json: no record"), "{broken}");
    }

    #[test]
    fn an_unwritable_place_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), "").unwrap();
        let path = dir.path().join("file/phase-1.json");
        assert!(matches!(record().write(&path), Err(RecordError::Io { .. })));
    }
}
