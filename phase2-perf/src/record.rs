//! Records of `tegula bench`: rows with raw samples, and where they come from.

use crate::{probe::Probe, stats::Summary};
use serde::{Deserialize, Serialize};
use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
};
use tegula_lab::Record;

/// The layout of [`BenchRecord`] that this version writes; it reads this and earlier ones.
pub const BENCH_SCHEMA: u32 = 1;

/// How far a run came.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Still running, or killed.
    #[default]
    Running,
    /// Stopped by its user.
    Interrupted,
    /// Came to its end.
    Complete,
}

/// A run of `tegula bench`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BenchRecord {
    /// [`BENCH_SCHEMA`] of the writer.
    pub bench_schema: u32,
    /// Host, commit, date, command line.
    #[serde(flatten)]
    pub record: Record,
    pub state: State,
    /// Engines took turns, repetition by repetition: samples with the same index are pairs.
    pub interleaved: bool,
    /// What slowed the machine down meanwhile.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub throttled: Option<String>,
    /// The machine's limits, one per number of threads.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub probes: Vec<Probe>,
    #[serde(default)]
    pub rows: Vec<Row>,
}

/// One test of one engine in one setting.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// `tegula`, or the peer's label.
    pub engine: String,
    /// Of a peer: the commit or version that it states.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub version: String,
    /// Of a peer: its flags besides those of the matrix.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub flags: Vec<String>,
    /// The file's name.
    pub model: String,
    pub arch: String,
    pub file_type: String,
    /// Bytes of the file.
    pub size: u64,
    pub params: u64,
    /// Instruction sets; empty for a peer, which keeps its own counsel.
    pub isa: String,
    /// From how many tokens that run together tiles multiply some matrix, with AMX.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub amx_from: Option<usize>,
    /// GPUs that hold weights.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gpus: Vec<String>,
    pub threads: usize,
    pub batch: usize,
    pub ubatch: usize,
    pub type_k: String,
    pub type_v: String,
    pub repack: bool,
    pub mmap: bool,
    pub load_ms: f64,
    pub test: String,
    pub n_prompt: usize,
    pub n_gen: usize,
    pub n_depth: usize,
    /// When the test ended.
    pub date: String,
    /// Tokens per second.
    #[serde(flatten)]
    pub summary: Summary,
    pub samples_ts: Vec<f64>,
    pub samples_ns: Vec<u64>,
    /// Milliseconds until the first token could be chosen; median.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_token_ms: Option<f64>,
    /// Milliseconds per generated token over all repetitions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_p50_ms: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_p95_ms: Option<f64>,
    /// Bytes of weights and cache that the test has to read, per token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_per_token: Option<f64>,
    /// Multiplications and additions, per token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operations_per_token: Option<f64>,
    /// Bytes read per second as a part of the measured bandwidth, with a probe.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth_share: Option<f64>,
    /// Operations per second as a part of the measured peak, with a probe.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak_share: Option<f64>,
    /// Which peak.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak: Option<String>,
    /// Energy of the CPU packages per token, where it can be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub joules_per_token: Option<f64>,
    /// The last repetition's time per kind of operation, with --profile.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub profile: Vec<Part>,
    /// Why there are no samples, or fewer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// A kind of operation's part of a repetition.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Part {
    pub operation: String,
    pub calls: u64,
    pub ms: f64,
}

impl Row {
    /// Sets the samples and all that follows from them.
    pub fn set_samples(&mut self, ns: Vec<u64>) {
        let tokens = (self.n_prompt + self.n_gen) as f64;
        self.samples_ts = ns.iter().map(|&ns| tokens * 1e9 / ns as f64).collect();
        self.samples_ns = ns;
        self.summary = Summary::of(&self.samples_ts);
    }

    /// Sets the shares of the CPU's limits, which say nothing of what GPUs do.
    pub fn set_limits(&mut self, probe: &Probe) {
        if !self.gpus.is_empty() {
            return;
        }
        let rate = self.summary.median_ts;
        let bandwidth = self.bytes_per_token.zip(probe.memory());
        self.bandwidth_share = bandwidth.map(|(bytes, limit)| bytes * rate / limit);
        if let Some((operations, (name, limit))) = self
            .operations_per_token
            .zip(probe.peak(&self.isa, &self.file_type))
        {
            self.peak_share = Some(operations * rate / limit);
            self.peak = Some(name.to_owned());
        }
    }

    /// Ran with AMX.
    pub fn amx(&self) -> bool {
        self.isa.contains("amx")
    }

    /// What rows that may be compared have in common.
    pub fn cell(&self) -> impl Ord + use<> {
        (
            self.model.clone(),
            self.threads,
            (self.n_depth, self.n_prompt, self.n_gen),
            (self.batch, self.ubatch, self.gpus.clone()),
            (self.type_k.clone(), self.type_v.clone()),
        )
    }
}

/// Why a run is not recorded, or a record can't be read.
#[derive(Debug, thiserror::Error)]
pub enum BenchRecordError {
    /// The run proves nothing.
    #[error("not recorded: {0}")]
    Refused(String),
    #[error("{}: {error}", path.display())]
    Io {
        path: PathBuf,
        error: std::io::Error,
    },
    #[error("{}: no record: {error}", path.display())]
    Json {
        path: PathBuf,
        error: serde_json::Error,
    },
    #[error(
        "{}: schema {found} of a later version; this build knows only up to {BENCH_SCHEMA}",
        path.display()
    )]
    Newer { path: PathBuf, found: u32 },
}

impl BenchRecord {
    /// A record without rows.
    pub fn new(record: Record, interleaved: bool) -> BenchRecord {
        BenchRecord {
            bench_schema: BENCH_SCHEMA,
            record,
            state: State::Running,
            interleaved,
            throttled: None,
            probes: Vec::new(),
            rows: Vec::new(),
        }
    }

    /// Why this run must not be recorded, if so: nobody could run it again, or it does not
    /// say what the machine can do.
    pub fn refusal(&self) -> Option<String> {
        if self.record.commit.is_empty() {
            return Some("the program was not built from a commit".to_owned());
        }
        if self.record.dirty {
            let short = self.record.commit.get(..10).unwrap_or(&self.record.commit);
            return Some(format!(
                "the program was built from {short} with changes; commit them and build again"
            ));
        }
        if self.rows.iter().any(|row| row.isa.contains("emulated")) {
            return Some("AMX was emulated".to_owned());
        }
        self.throttled.clone()
    }

    /// The file's name in its folder; of a run that is not complete one that says so.
    pub fn file_name(&self) -> String {
        let stamp: String = self
            .record
            .date
            .chars()
            .filter(char::is_ascii_alphanumeric)
            .collect();
        match self.state {
            State::Complete => format!("bench-{stamp}.json"),
            State::Running | State::Interrupted => format!("bench-{stamp}.partial.json"),
        }
    }

    /// Writes the record into the folder under a temporary name, and renames it; what an
    /// earlier moment of the same run left there goes.
    ///
    /// # Errors
    /// [`BenchRecordError::Refused`] for a run that proves nothing, `Io` otherwise; nothing
    /// half-written is left behind.
    pub fn write(&self, dir: &Path) -> Result<PathBuf, BenchRecordError> {
        if let Some(why) = self.refusal() {
            return Err(BenchRecordError::Refused(why));
        }
        let path = dir.join(self.file_name());
        let temporary = path.with_extension(format!("{}.tmp", std::process::id()));
        let result = (|| {
            fs::create_dir_all(dir)?;
            let mut text = serde_json::to_string_pretty(self).map_err(std::io::Error::other)?;
            text.push('\n');
            let mut file = fs::File::create(&temporary)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            fs::rename(&temporary, &path)
        })();
        if let Err(error) = result {
            // The first error is the one to report.
            let _ = fs::remove_file(&temporary);
            return Err(BenchRecordError::Io { path, error });
        }
        if self.state == State::Complete {
            self.remove_partial(dir);
        }
        Ok(path)
    }

    /// Removes what an earlier moment of this run has left in the folder.
    pub fn remove_partial(&self, dir: &Path) {
        let partial = BenchRecord {
            state: State::Running,
            rows: Vec::new(),
            probes: Vec::new(),
            ..self.clone()
        };
        // It need not be there.
        let _ = fs::remove_file(dir.join(partial.file_name()));
    }

    /// Reads a record.
    ///
    /// # Errors
    /// Names the file and what is wrong with it.
    pub fn read(path: &Path) -> Result<BenchRecord, BenchRecordError> {
        #[derive(Deserialize)]
        struct Version {
            bench_schema: u32,
        }
        let text = fs::read_to_string(path).map_err(|error| BenchRecordError::Io {
            path: path.to_owned(),
            error,
        })?;
        let json = |error| BenchRecordError::Json {
            path: path.to_owned(),
            error,
        };
        let Version { bench_schema } = serde_json::from_str(&text).map_err(json)?;
        if bench_schema > BENCH_SCHEMA {
            return Err(BenchRecordError::Newer {
                path: path.to_owned(),
                found: bench_schema,
            });
        }
        serde_json::from_str(&text).map_err(json)
    }

    /// Every record `bench-*.json` in the folders under `dir`, in the order of their paths,
    /// partial ones included. A missing `dir` holds none.
    ///
    /// # Errors
    /// For a folder or a record that can't be read.
    pub fn read_all(dir: &Path) -> Result<Vec<(PathBuf, BenchRecord)>, BenchRecordError> {
        let list = |dir: &Path| -> Result<Vec<PathBuf>, BenchRecordError> {
            let io = |error| BenchRecordError::Io {
                path: dir.to_owned(),
                error,
            };
            let entries = fs::read_dir(dir).map_err(io)?;
            let paths = entries.map(|e| e.map(|e| e.path()));
            let mut paths = paths.collect::<Result<Vec<_>, _>>().map_err(io)?;
            paths.sort();
            Ok(paths)
        };
        let mut records = Vec::new();
        if dir.is_dir() {
            for folder in list(dir)?.into_iter().filter(|p| p.is_dir()) {
                for path in list(&folder)? {
                    let name = path.file_name().and_then(|n| n.to_str()).unwrap_or("");
                    if name.starts_with("bench-") && name.ends_with(".json") {
                        let record = BenchRecord::read(&path)?;
                        records.push((path, record));
                    }
                }
            }
        }
        Ok(records)
    }
}

/// How many times as fast `ours` is, sample by sample; only samples that both have.
pub fn ratios(ours: &Row, theirs: &Row) -> Vec<f64> {
    let pairs = ours.samples_ts.iter().zip(&theirs.samples_ts);
    pairs.map(|(ours, theirs)| ours / theirs).collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use tegula_lab::Host;

    /// A record as from a clean tree.
    pub(crate) fn record(rows: Vec<Row>) -> BenchRecord {
        let record = Record::built("bench", "0123456789abcdef", false, Host::default());
        BenchRecord {
            rows,
            state: State::Complete,
            ..BenchRecord::new(record, true)
        }
    }

    /// A row of 64 tokens at these speeds.
    pub(crate) fn row(engine: &str, isa: &str, samples: &[f64]) -> Row {
        let mut row = Row {
            engine: engine.to_owned(),
            isa: isa.to_owned(),
            model: "m.gguf".to_owned(),
            arch: "qwen3".to_owned(),
            file_type: "Q4_0".to_owned(),
            threads: 14,
            test: "tg64".to_owned(),
            n_gen: 64,
            ..Row::default()
        };
        row.set_samples(samples.iter().map(|s| (64e9 / s) as u64).collect());
        row
    }

    #[test]
    fn records_come_back() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("2026-11-26-host");
        let mut whole = record(vec![row("tegula", "avx512", &[10.0, 20.0])]);
        whole.state = State::Running;
        let partial = whole.write(&folder).unwrap();
        assert!(partial.to_str().unwrap().ends_with(".partial.json"));
        whole.state = State::Complete;
        let path = whole.write(&folder).unwrap();
        assert_eq!(BenchRecord::read(&path).unwrap(), whole);
        // The partial one is gone, and nothing else is there.
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1);
        assert_eq!(BenchRecord::read_all(dir.path()).unwrap(), [(path, whole)]);
    }

    #[test]
    fn what_proves_nothing_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let refused = |change: fn(&mut BenchRecord)| {
            let mut record = record(vec![row("tegula", "avx512, amx", &[1.0])]);
            change(&mut record);
            let error = record.write(dir.path()).unwrap_err();
            assert!(matches!(error, BenchRecordError::Refused(_)));
            error.to_string()
        };
        assert!(refused(|r| r.record.dirty = true).contains("with changes"));
        assert!(refused(|r| r.record.commit.clear()).contains("not built from a commit"));
        assert!(
            refused(|r| r.throttled = Some("cores were throttled".into())).contains("throttled")
        );
        assert!(refused(|r| r.rows[0].isa = "avx512, amx: emulated".into()).contains("emulated"));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn later_and_broken_records_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bench-1.json");
        fs::write(&path, r#"{"bench_schema": 99}"#).unwrap();
        let later = BenchRecord::read(&path).unwrap_err().to_string();
        assert!(later.contains("bench-1.json: schema 99"), "{later}");
        fs::write(&path, "{").unwrap();
        let broken = BenchRecord::read(&path).unwrap_err().to_string();
        assert!(broken.contains("bench-1.json: no record"), "{broken}");
        fs::write(dir.path().join("file"), "").unwrap();
        let blocked = record(Vec::new()).write(&dir.path().join("file/x"));
        assert!(matches!(blocked, Err(BenchRecordError::Io { .. })));
    }

    #[test]
    fn pairs_are_of_the_same_repetition() {
        let (ours, theirs) = (
            row("tegula", "avx2", &[10.0, 30.0, 5.0]),
            row("peer", "", &[5.0, 10.0]),
        );
        let ratios = ratios(&ours, &theirs);
        assert_eq!(ratios.len(), 2);
        assert!((ratios[0] - 2.0).abs() < 1e-6 && (ratios[1] - 3.0).abs() < 1e-6);
    }

    #[test]
    fn limits_are_what_was_probed() {
        let mut row = row("tegula", "avx512", &[10.0]);
        row.bytes_per_token = Some(5e9);
        row.operations_per_token = Some(1e10);
        let rate = |name: &str, giga: f64| crate::probe::Rate {
            name: name.to_owned(),
            samples: vec![giga],
            ..Default::default()
        };
        let probe = Probe {
            threads: 14,
            bandwidth: vec![rate("memory", 100.0)],
            compute: vec![rate("avx512 vnni int8", 1000.0)],
        };
        // A GPU's rate is no share of the CPU's.
        let mut on_gpu = Row {
            gpus: vec!["CUDA0".to_owned()],
            ..row.clone()
        };
        on_gpu.set_limits(&probe);
        assert_eq!((on_gpu.bandwidth_share, on_gpu.peak_share), (None, None));
        row.set_limits(&probe);
        assert!((row.bandwidth_share.unwrap() - 0.5).abs() < 1e-6);
        assert!((row.peak_share.unwrap() - 0.1).abs() < 1e-6);
        assert_eq!(row.peak.as_deref(), Some("avx512 vnni int8"));
    }
}
