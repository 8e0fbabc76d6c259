//! Runs a group of tests with the engine in one or more settings and with its peers: one
//! after the other, or all taking turns repetition by repetition.

use crate::{
    bench::{Options, Sample, Samples, Test, measure},
    cost::Cost,
    peers::{Job, Peer, PeerError},
    probe::Probe,
    record::{Part, Row},
    stats::{median, percentile},
};
use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tegula_engine::{ContextOptions, Model};
use tegula_kernels::kv::{KvType, pruned::KvSparsity};
use tegula_lab::{Date, without_places};

/// A loaded model, and what rows say of it.
#[derive(Debug)]
pub struct Engine {
    pub model: Arc<Model>,
    /// The fields that don't depend on the test.
    pub row: Row,
    /// The machine's limits, if they were measured.
    pub probe: Option<Probe>,
}

/// What is run together: engines and peers on the same tests.
#[derive(Debug)]
pub struct Group<'a> {
    pub engines: &'a [Engine],
    pub peers: &'a [Peer],
    /// The file, for peers.
    pub file: Option<&'a Path>,
    pub tests: &'a [Test],
    pub options: Options,
    /// All take turns.
    pub interleave: bool,
    /// How long a peer may take for one repetition of all tests.
    pub timeout: Duration,
}

impl Group<'_> {
    /// Runs everything; rows come as they are done. When `cancel` is set, rows of what was
    /// done until then.
    ///
    /// # Errors
    /// What the engine can't do. What a peer can't do stands in its row.
    pub fn run(
        &self,
        cancel: &AtomicBool,
        on_row: &mut dyn FnMut(Row),
    ) -> tegula_engine::Result<()> {
        if !self.interleave {
            for engine in self.engines {
                for &test in self.tests {
                    let samples = measure(&engine.model, test, &self.options, cancel, &mut |_| {})?;
                    if !samples.runs.is_empty() {
                        on_row(self.own_row(engine, &samples));
                    }
                }
            }
            return Ok(());
        }
        let none = |test: &Test| Samples {
            test: *test,
            runs: Vec::new(),
            joules: None,
            profile: Vec::new(),
        };
        let mut own: Vec<Vec<Samples>> = self
            .engines
            .iter()
            .map(|_| self.tests.iter().map(none).collect())
            .collect();
        let mut theirs: Vec<Vec<PeerCell>> = self
            .peers
            .iter()
            .map(|_| vec![PeerCell::default(); self.tests.len()])
            .collect();
        for round in 0..self.options.repetitions {
            for (engine, cells) in self.engines.iter().zip(&mut own) {
                let once = Options {
                    repetitions: 1,
                    warm_up: self.options.warm_up,
                    profile: self.options.profile && round + 1 == self.options.repetitions,
                    ..self.options
                };
                for cell in cells {
                    let more = measure(&engine.model, cell.test, &once, cancel, &mut |_| {})?;
                    cell.runs.extend(more.runs);
                    cell.profile = more.profile;
                    if let Some(joules) = more.joules {
                        *cell.joules.get_or_insert(0.0) += joules;
                    }
                }
            }
            for (peer, cells) in self.peers.iter().zip(&mut theirs) {
                self.peer_round(peer, cells, cancel);
            }
            if cancel.load(Ordering::Relaxed) {
                break;
            }
        }
        for (i, &test) in self.tests.iter().enumerate() {
            for (engine, cells) in self.engines.iter().zip(&own) {
                if !cells[i].runs.is_empty() {
                    on_row(self.own_row(engine, &cells[i]));
                }
            }
            for (peer, cells) in self.peers.iter().zip(&theirs) {
                if let Some(row) = self.peer_row(peer, test, &cells[i]) {
                    on_row(row);
                }
            }
        }
        Ok(())
    }

    /// One repetition of every test that the peer has not failed at, one call per depth.
    fn peer_round(&self, peer: &Peer, cells: &mut [PeerCell], cancel: &AtomicBool) {
        let mut depths: Vec<usize> = self.tests.iter().map(|t| t.depth).collect();
        depths.sort_unstable();
        depths.dedup();
        for depth in depths {
            let whole = |i: &usize| cells[*i].error.is_none() && self.tests[*i].depth == depth;
            let chosen: Vec<usize> = (0..self.tests.len()).filter(whole).collect();
            if chosen.is_empty() || cancel.load(Ordering::Relaxed) {
                continue;
            }
            let tests: Vec<Test> = chosen.iter().map(|&i| self.tests[i]).collect();
            let context = &self.options.context;
            let Some(file) = self.file else {
                for i in chosen {
                    cells[i].error = Some("the embedded model is no file".to_owned());
                }
                continue;
            };
            let job = Job {
                model: file,
                tests: &tests,
                threads: self.engines.first().map_or(1, |engine| engine.row.threads),
                batch: context.batch,
                ubatch: context.ubatch,
                type_k: context.k_type.name(),
                type_v: context.v_type.name(),
            };
            match peer.run(&job, self.timeout, cancel) {
                Ok(samples) => {
                    for (i, sample) in chosen.into_iter().zip(samples) {
                        cells[i].ns.push(sample.ns);
                        cells[i].version = sample.version;
                    }
                }
                Err(PeerError::Cancelled) => {}
                Err(error) => {
                    for i in chosen {
                        cells[i].error = Some(error.to_string());
                    }
                }
            }
        }
    }

    fn row(&self, base: &Row, test: Test) -> Row {
        let context = &self.options.context;
        Row {
            batch: context.batch,
            ubatch: context.ubatch,
            type_k: cache_type(context.k_type, context.sparsity.map(|s| s.k())),
            type_v: cache_type(context.v_type, context.sparsity.map(|s| s.v())),
            test: test.to_string(),
            n_prompt: test.prompt,
            n_gen: test.generate,
            n_depth: test.depth,
            date: Date::now().to_string(),
            ..base.clone()
        }
    }

    fn own_row(&self, engine: &Engine, samples: &Samples) -> Row {
        let test = samples.test;
        let mut row = self.row(&engine.row, test);
        row.set_samples(samples.runs.iter().map(|run| run.ns).collect());
        let ms = |ns: u64| ns as f64 / 1e6;
        let first: Vec<f64> = samples.runs.iter().map(|r| ms(r.first_ns)).collect();
        row.first_token_ms = Some(median(&first));
        let tokens: Vec<f64> = samples.runs.iter().flat_map(token_ms).collect();
        if !tokens.is_empty() {
            row.token_p50_ms = Some(percentile(&tokens, 50.0));
            row.token_p95_ms = Some(percentile(&tokens, 95.0));
        }
        let cost = Cost::of(&engine.model, test, &self.options.context);
        let count = test.tokens() as f64;
        row.bytes_per_token = Some(cost.bytes / count);
        row.operations_per_token = Some(cost.operations / count);
        let measured = count * samples.runs.len() as f64;
        row.joules_per_token = samples.joules.map(|joules| joules / measured);
        if let Some(probe) = &engine.probe {
            row.set_limits(probe);
        }
        let part = |share: &tegula_kernels::profile::Share| Part {
            operation: share.op.name().to_owned(),
            calls: share.calls,
            ms: share.time.as_secs_f64() * 1e3,
        };
        row.profile = samples.profile.iter().map(part).collect();
        row
    }

    /// Nothing for a test that was never tried.
    fn peer_row(&self, peer: &Peer, test: Test, cell: &PeerCell) -> Option<Row> {
        if cell.ns.is_empty() && cell.error.is_none() {
            return None;
        }
        let base = self.engines.first().map(|e| &e.row)?;
        let base = Row {
            engine: peer.label.clone(),
            version: cell.version.clone(),
            flags: peer.flags.iter().map(|f| without_places(f)).collect(),
            isa: String::new(),
            load_ms: 0.0,
            error: cell.error.clone(),
            ..base.clone()
        };
        let mut row = self.row(&base, test);
        row.set_samples(cell.ns.clone());
        Some(row)
    }
}

/// What a peer has measured of a test.
#[derive(Clone, Debug, Default)]
struct PeerCell {
    ns: Vec<u64>,
    version: String,
    error: Option<String>,
}

fn token_ms(run: &Sample) -> impl Iterator<Item = f64> + '_ {
    run.token_ns.iter().map(|&ns| ns as f64 / 1e6)
}

/// A type of the cache, and what its full pages lose.
fn cache_type(ty: KvType, dropped: Option<f32>) -> String {
    match dropped {
        Some(share) => format!("{}-{:.0}%", ty.name(), 100.0 * share),
        None => ty.name().to_owned(),
    }
}

/// Every combination of batches, cache types and shares that a cache loses.
pub fn contexts(
    batches: &[usize],
    ubatches: &[usize],
    k_types: &[KvType],
    v_types: &[KvType],
    sparsities: &[Option<KvSparsity>],
) -> Vec<ContextOptions> {
    let mut all = Vec::new();
    for &batch in batches {
        for &ubatch in ubatches {
            for &k_type in k_types {
                for &v_type in v_types {
                    all.extend(sparsities.iter().map(|&sparsity| ContextOptions {
                        batch,
                        ubatch,
                        k_type,
                        v_type,
                        sparsity,
                        ..ContextOptions::default()
                    }));
                }
            }
        }
    }
    all
}
