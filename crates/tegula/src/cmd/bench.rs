//! `bench`: measures prompts and generation, in llama-bench's terms, alone or taking turns
//! with other engines.

use crate::{
    args::{self, AmxMode},
    exit::Refusal,
    facts,
    gpu::GpuArgs,
    interrupt,
    lora::LoraArgs,
    output,
};
use clap::{Args, ValueEnum};
use phase2_perf::{
    bench::{Options, Test},
    matrix::{Engine, Group, contexts},
    peers::Peer,
    plot,
    probe::{Probe, ProbeOptions},
    quiet::Throttling,
    ranges,
    record::{BenchRecord, BenchRecordError, Row, State},
    report,
};
use serde::Serialize;
use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tegula_engine::{
    LoadOptions, Model, Source, UBATCH,
    plan::{Placement, TileUse},
    threads::default_threads,
};
use tegula_gguf::Gguf;
use tegula_kernels::{
    Amx, Numa, Tier,
    kv::{KvType, pruned::KvSparsity},
};
use tegula_lab::{Env, Host, Need, Record};

/// The commit that the program is built from, and whether with changes.
const COMMIT: &str = env!("TEGULA_COMMIT");
const DIRTY: bool = matches!(env!("TEGULA_DIRTY").as_bytes(), b"1");

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  tegula bench model.gguf
  tegula bench model.gguf -p 512,2048 -n 128 -d 0-8192+4096 -t 1-14*2
  tegula bench -m a.gguf,b.gguf --isa avx2,avx512 -o json > record.json
  tegula bench model.gguf --amx=off,on --probe --plot bench.svg
  tegula bench model.gguf --peer llama-bench=build/bin/llama-bench \\
    --peer \"ik-llama-bench-rtr=ik/build/bin/llama-bench:-rtr 1 -fmoe 1\"
  tegula bench --probe=only
  tegula bench --analysis --record docs/bench/DATE-HOST

Numbers are lists of numbers and ranges: 512,1024 or 1-4 or 8-64+8 or 1-16*2. Each combination is
measured. pp N: a prompt of N tokens; tg N: N tokens one by one; @ dN: behind N tokens of
context. t/s is the mean of -r repetitions ± standard deviation; csv and JSON have every sample,
percentiles, the time to the first token and between tokens. Rows appear as they are done;
Ctrl-C ends with those that are.

Peers run the same tests, and all take turns repetition by repetition; ratios are of the samples
of the same turn. A peer that fails has its reason in the table, and the run goes on.")]
pub struct BenchArgs {
    /// GGUF file, or hf:OWNER/REPO[:QUANT] [default: the embedded ferrous-moe-21m]
    #[arg(value_name = "MODEL")]
    models: Vec<PathBuf>,
    /// The same as MODEL, separated by commas
    #[arg(
        short = 'm',
        long = "model",
        value_name = "MODEL",
        value_delimiter = ','
    )]
    model_flags: Vec<PathBuf>,
    /// Fetch nothing: a model hf:… must be in the cache (also HF_HUB_OFFLINE=1)
    #[arg(long)]
    offline: bool,
    /// Prompt lengths; 0: none
    #[arg(short = 'p', long, value_name = "LIST", default_value = "512", value_parser = numbers)]
    n_prompt: Vec<Numbers>,
    /// Generation lengths; 0: none
    #[arg(short = 'n', long, value_name = "LIST", default_value = "128", value_parser = numbers)]
    n_gen: Vec<Numbers>,
    /// A prompt and a generation together (-pg); may be repeated
    #[arg(long, value_name = "P,N", value_parser = prompt_gen)]
    prompt_gen: Vec<(usize, usize)>,
    /// Tokens in the context before the clock starts
    #[arg(short = 'd', long, value_name = "LIST", default_value = "0", value_parser = numbers)]
    n_depth: Vec<Numbers>,
    #[command(flatten)]
    lora: LoraArgs,
    #[command(flatten)]
    gpu: GpuArgs,
    /// Tokens that are submitted together
    #[arg(short, long, value_name = "LIST", default_value = "2048", value_parser = numbers)]
    batch_size: Vec<Numbers>,
    /// Tokens that run through the layers together (-ub)
    #[arg(long, value_name = "LIST", default_value = UBATCH.to_string(), value_parser = numbers)]
    ubatch_size: Vec<Numbers>,
    /// Types of the cached keys (-ctk): f16, bf16, q8_0
    #[arg(long, value_name = "TYPE", value_delimiter = ',', default_value = "f16",
          value_parser = args::kv_type)]
    cache_type_k: Vec<KvType>,
    /// Types of the cached values (-ctv): f16, bf16, q8_0
    #[arg(long, value_name = "TYPE", value_delimiter = ',', default_value = "f16",
          value_parser = args::kv_type)]
    cache_type_v: Vec<KvType>,
    /// Shares of keys and values that full pages of the cache lose, such as K=0.3,V=0.5; may be
    /// repeated, with off: none
    #[arg(long, value_name = "K=X,V=Y", value_parser = sparse_kv, action = clap::ArgAction::Append)]
    sparse_kv: Vec<SparseKv>,
    /// Flash attention (-fa): on or auto; there is no other
    #[arg(long, value_name = "on|off|auto", value_delimiter = ',', default_value = "auto",
          value_parser = args::flash_attn, action = clap::ArgAction::Append)]
    flash_attn: Vec<bool>,
    /// Threads [default: the physical cores that this process may use]
    #[arg(short, long, value_name = "LIST", value_parser = numbers)]
    threads: Vec<Numbers>,
    /// Instruction sets: scalar, avx2, avx512 [default: the CPU's best]
    #[arg(long, value_name = "TIER", value_delimiter = ',')]
    isa: Vec<Tier>,
    /// Use Intel AMX; =off,on: without and with it
    #[arg(long, value_name = "off|on", num_args = 0..=1, require_equals = true,
          value_delimiter = ',', default_missing_value = "on", value_parser = amx_choice,
          action = clap::ArgAction::Append)]
    amx: Vec<bool>,
    /// Read the file instead of mapping it
    #[arg(long)]
    no_mmap: bool,
    /// Leave matrices as they are in the file
    #[arg(long)]
    no_repack: bool,
    /// Don't pack matrices without their zeros
    #[arg(long)]
    no_sparse_pack: bool,
    /// On several memory nodes: distribute threads over all of them, isolate them on the node
    /// where the program started, or leave it to numactl
    #[arg(long, value_name = "distribute|isolate|numactl")]
    numa: Option<Numa>,
    /// Repetitions
    #[arg(short, long, value_name = "N", default_value_t = 5)]
    repetitions: usize,
    /// Also tell where the time goes, per kind of operation (last repetition)
    #[arg(long)]
    profile: bool,
    /// No repetition before those that count
    #[arg(long)]
    no_warmup: bool,
    /// Measure the machine's bandwidths and peaks first, and tell what part of them is used;
    /// =only: nothing else
    #[arg(long, value_name = "also|only", num_args = 0..=1, require_equals = true, value_enum,
          default_missing_value = "also", hide_possible_values = true)]
    probe: Option<Probing>,
    /// Milliseconds of each of the five repetitions of a probe
    #[arg(long, value_name = "MS", default_value_t = 100)]
    probe_time: u64,
    /// Another engine to compare with: llama-bench[-NAME]=PATH[:FLAGS] or
    /// ik-llama-bench[-NAME]=PATH[:FLAGS]; may be repeated
    #[arg(long, value_name = "PEER")]
    peer: Vec<Peer>,
    /// More flags for every peer
    #[arg(
        long,
        value_name = "FLAGS",
        allow_hyphen_values = true,
        default_value = "",
        hide_default_value = true
    )]
    peer_args: String,
    /// Seconds that a peer may take for one repetition of all tests
    #[arg(long, value_name = "S", default_value_t = 3600)]
    peer_timeout: u64,
    /// Let the settings of --isa and --amx take turns, as with peers
    #[arg(long)]
    interleave: bool,
    /// Write a record into this folder; refused for development builds, builds with changes
    /// that aren't committed, and throttled runs
    #[arg(long, value_name = "DIR")]
    record: Option<PathBuf>,
    /// Run phase 3's laboratory instead, and print (or --record as phase-3.json) what it measured
    #[arg(long)]
    analysis: bool,
    /// Draw throughput by depth, threads and batch, and the roofline
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
    /// How to print: md, csv, json or jsonl
    #[arg(short, long, value_name = "FORMAT", value_enum, default_value_t = Format::Md,
          hide_possible_values = true)]
    output: Format,
    /// The same as -o json
    #[arg(long, conflicts_with = "output")]
    json: bool,
}

/// What `--sparse-kv` may say here.
#[derive(Clone, Copy, Debug)]
struct SparseKv(Option<KvSparsity>);

fn sparse_kv(s: &str) -> Result<SparseKv, String> {
    match s {
        "off" => Ok(SparseKv(None)),
        s => args::sparse_kv(s).map(|shares| SparseKv(Some(shares))),
    }
}

/// A list of numbers and ranges.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Numbers(Vec<usize>);

fn numbers(list: &str) -> Result<Numbers, String> {
    ranges::numbers(list).map(Numbers)
}

fn all(lists: &[Numbers]) -> Vec<usize> {
    lists
        .iter()
        .flat_map(|list| list.0.iter().copied())
        .collect()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Probing {
    /// Before the tests
    Also,
    /// And no tests
    Only,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// A table
    Md,
    /// Comma-separated values
    Csv,
    /// One document: a record with all rows
    Json,
    /// One document per row
    Jsonl,
}

fn amx_choice(s: &str) -> Result<bool, String> {
    match s {
        "on" | "1" => Ok(true),
        "off" | "0" => Ok(false),
        "emulate" => Err("emulated instructions have no speed worth measuring".to_owned()),
        _ => Err("expected on or off".to_owned()),
    }
}

fn prompt_gen(s: &str) -> Result<(usize, usize), String> {
    let parse = || {
        let (p, n) = s.split_once(',')?;
        Some((p.parse().ok()?, n.parse().ok()?))
    };
    parse().ok_or_else(|| "expected two numbers, such as 512,128".to_owned())
}

/// What `-o jsonl` prints for each row.
#[derive(Serialize)]
struct Line<'a> {
    commit: &'a str,
    host: &'a Host,
    #[serde(flatten)]
    row: &'a Row,
}

/// One way to run a model.
#[derive(Clone, Copy, Debug)]
struct Setting {
    tier: Tier,
    amx: Option<Amx>,
}

pub fn run(args: &BenchArgs) -> anyhow::Result<()> {
    if args.analysis {
        return analysis(args);
    }
    debug_assert!(args.flash_attn.iter().all(|on| *on));
    let only_probe = args.probe == Some(Probing::Only);
    let tests = if only_probe { Vec::new() } else { tests(args)? };
    let settings = settings(args)?;
    // Before threads are counted and started.
    args::numa(args.numa);
    let threads = match args.threads.as_slice() {
        [] => vec![default_threads()],
        lists => all(lists),
    };
    if let Some(n) = threads.iter().find(|n| !(1..=1024).contains(*n)) {
        return Err(Refusal::Usage(format!("-t {n}: expected a number from 1 to 1024")).into());
    }
    if args.repetitions == 0 {
        return Err(Refusal::Usage("-r 0: nothing would be measured".to_owned()).into());
    }
    if !args.peer.is_empty() && !args.lora.files().is_empty() {
        let what = "--lora is not for peers, whose times would be of another model";
        return Err(Refusal::Usage(what.to_owned()).into());
    }
    let interleave = args.interleave || !args.peer.is_empty();
    let record = Record::built("bench", COMMIT, DIRTY, Host::detect());
    let mut printer = Printer::new(args, BenchRecord::new(record, interleave))?;
    let cancel = interrupt::flag()?;
    let before = Throttling::read();
    for &threads in &threads {
        printer.probe(args, &settings, threads)?;
    }
    let peers: Vec<Peer> = args
        .peer
        .iter()
        .cloned()
        .map(|p| with_flags(p, args))
        .collect();
    for source in if only_probe {
        Vec::new()
    } else {
        sources(args)?
    } {
        for &threads in &threads {
            let together = match interleave {
                true => vec![settings.clone()],
                false => settings.iter().map(|&setting| vec![setting]).collect(),
            };
            for settings in together {
                if cancel.load(Ordering::Relaxed) {
                    break;
                }
                let engines: Vec<Engine> = settings
                    .iter()
                    .map(|&setting| engine(args, &source, setting, threads, &printer))
                    .collect::<anyhow::Result<_>>()?;
                let file = match &source {
                    Source::Path(path) => Some(path.as_path()),
                    Source::Embedded { .. } => None,
                };
                groups(args, &engines, &peers, file, &tests, &cancel, &mut printer)?;
                engines.iter().for_each(|e| facts::say_notes(&e.model));
            }
        }
    }
    printer.record.throttled = Throttling::read().since(&before);
    printer.record.state = match cancel.load(Ordering::Relaxed) {
        true => State::Interrupted,
        false => State::Complete,
    };
    printer.finish(args)
}

/// Why a run of this program, built from this commit, must not be recorded.
fn refusal() -> Option<String> {
    let development = cfg!(debug_assertions)
        .then(|| "this is a development build; build with --release".to_owned());
    let record = Record::built("bench", COMMIT, DIRTY, Host::default());
    development.or_else(|| BenchRecord::new(record, false).refusal())
}

/// Phase 3's laboratory.
fn analysis(args: &BenchArgs) -> anyhow::Result<()> {
    if let (Some(_), Some(why)) = (&args.record, refusal()) {
        return Err(BenchRecordError::Refused(why).into());
    }
    let env = Env::detect(".");
    let lacks = tegula_lab::lacking(&[Need::Avx2], &env);
    if !lacks.is_empty() {
        return Err(Refusal::Requirement(format!("--analysis wants {}", lacks.join(", "))).into());
    }
    let subject = phase3_analysis::report::SUBJECT;
    let mut record = Record::built(subject, COMMIT, DIRTY, env.host.clone());
    record.series = phase3_analysis::lab::run(&env).map_err(anyhow::Error::msg)?;
    match &args.record {
        Some(dir) => {
            let path = dir.join(format!("{subject}.json"));
            record.write(&path)?;
            say!("recorded in {}", path.display());
            Ok(())
        }
        None => output::json(&record),
    }
}

/// The instruction sets to measure.
fn settings(args: &BenchArgs) -> Result<Vec<Setting>, Refusal> {
    let tiers = match args.isa.as_slice() {
        [] => vec![Tier::detect_max()],
        given => given.to_vec(),
    };
    let amx = match args.amx.as_slice() {
        [] => vec![false],
        given => given.to_vec(),
    };
    let mut settings = Vec::new();
    for tier in tiers {
        args::require_tier(tier)?;
        for &on in &amx {
            let amx = args::amx(on.then_some(AmxMode::On), tier)?;
            settings.push(Setting { tier, amx });
        }
    }
    Ok(settings)
}

fn with_flags(mut peer: Peer, args: &BenchArgs) -> Peer {
    let more = args.peer_args.split_whitespace();
    peer.flags.extend(more.map(str::to_owned));
    peer
}

/// Loads the model to run in this setting.
fn engine(
    args: &BenchArgs,
    source: &Source,
    setting: Setting,
    threads: usize,
    printer: &Printer,
) -> anyhow::Result<Engine> {
    let load = LoadOptions {
        mmap: !args.no_mmap,
        repack: !args.no_repack,
        sparse_pack: !args.no_sparse_pack,
        lora: args.lora.files(),
        tier: setting.tier,
        amx: setting.amx,
        threads,
        distribute: args.numa == Some(Numa::Distribute),
        memory: facts::available_memory(),
        ..LoadOptions::new(source.clone())
    };
    let load = args.gpu.apply(load)?;
    let model = args::load(&load)?;
    let probes = &printer.record.probes;
    Ok(Engine {
        row: base_row(&load, &model),
        model,
        probe: probes.iter().find(|p| p.threads == threads).cloned(),
    })
}

fn base_row(load: &LoadOptions, model: &Arc<Model>) -> Row {
    let gguf = model.gguf();
    let name = |file: &str| {
        let name = Path::new(file).file_name();
        name.map_or_else(String::new, |n| n.to_string_lossy().into_owned())
    };
    // A model with adapters is another one.
    let adapters = model.adapters().iter();
    let parts = adapters.map(|a| format!(" + {} x {}", name(&a.file), a.scale));
    Row {
        engine: "tegula".to_owned(),
        model: name(gguf.metadata().origin()) + &parts.collect::<String>(),
        arch: model.config().arch.to_string(),
        file_type: facts::file_type(gguf),
        size: gguf.file_bytes(),
        params: facts::parameters(gguf),
        isa: facts::isa(model),
        amx_from: amx_from(model),
        gpus: facts::gpus(model),
        threads: load.threads,
        repack: load.repack,
        mmap: load.mmap,
        load_ms: model.load_ms(),
        ..Row::default()
    }
}

/// From how many tokens that run together tiles multiply some matrix.
fn amx_from(model: &Model) -> Option<usize> {
    let from = |p: &Placement| match p.tiles {
        Some(TileUse::From(n)) => Some(n),
        Some(TileUse::Never(_)) | None => None,
    };
    model.plan().placements.iter().filter_map(from).min()
}

/// Runs the tests in every combination of batches and cache types.
fn groups(
    args: &BenchArgs,
    engines: &[Engine],
    peers: &[Peer],
    file: Option<&Path>,
    tests: &[Test],
    cancel: &AtomicBool,
    printer: &mut Printer,
) -> anyhow::Result<()> {
    let (batches, ubatches) = (all(&args.batch_size), all(&args.ubatch_size));
    let sparsities: Vec<_> = match args.sparse_kv.as_slice() {
        [] => vec![None],
        given => given.iter().map(|s| s.0).collect(),
    };
    let (k, v) = (&args.cache_type_k, &args.cache_type_v);
    for context in contexts(&batches, &ubatches, k, v, &sparsities) {
        let group = Group {
            engines,
            peers,
            file,
            tests,
            options: Options {
                context,
                repetitions: args.repetitions,
                warm_up: !args.no_warmup,
                profile: args.profile,
            },
            interleave: printer.record.interleaved,
            timeout: Duration::from_secs(args.peer_timeout),
        };
        let mut printed = Ok(());
        group.run(cancel, &mut |row| {
            if printed.is_ok() {
                printed = printer.row(row);
            }
        })?;
        printed?;
        printer.save(args)?;
    }
    Ok(())
}

/// The tests in llama-bench's order.
fn tests(args: &BenchArgs) -> Result<Vec<Test>, Refusal> {
    let prompts = all(&args.n_prompt).into_iter().map(|p| (p, 0));
    let generations = all(&args.n_gen).into_iter().map(|n| (0, n));
    let lengths = prompts
        .chain(generations)
        .chain(args.prompt_gen.iter().copied());
    let pairs: Vec<_> = lengths.filter(|&(p, n)| p + n > 0).collect();
    let depths = all(&args.n_depth);
    let tests: Vec<_> = depths
        .iter()
        .flat_map(|&depth| {
            pairs.iter().map(move |&(prompt, generate)| Test {
                prompt,
                generate,
                depth,
            })
        })
        .collect();
    if tests.is_empty() {
        let what = "no test: give a length with -p, -n or -pg".to_owned();
        return Err(Refusal::Usage(what));
    }
    Ok(tests)
}

/// The models, each of them opened once: a last one that is not there is told of before the first is
/// measured.
fn sources(args: &BenchArgs) -> anyhow::Result<Vec<Source>> {
    let given = args.models.iter().chain(&args.model_flags);
    let path = |model: &PathBuf| {
        let path = args::model_path(model, args.offline)?;
        Gguf::open(&path)?;
        Ok(Source::Path(path))
    };
    let sources: Vec<_> = given.map(path).collect::<anyhow::Result<_>>()?;
    match sources.is_empty() {
        true => Ok(vec![args::embedded()]),
        false => Ok(sources),
    }
}

/// Prints rows as they come, and keeps the record.
struct Printer {
    format: Format,
    record: BenchRecord,
    /// Names and texts of the columns that not every table needs.
    columns: Vec<Column>,
    started: bool,
}

/// A column of the table.
#[derive(Clone, Copy)]
struct Column {
    name: &'static str,
    width: usize,
    text: fn(&Row) -> String,
}

const fn column(name: &'static str, width: usize, text: fn(&Row) -> String) -> Column {
    Column { name, width, text }
}

fn percent(share: Option<f64>) -> String {
    share.map_or_else(|| "-".to_owned(), |share| format!("{:.1}", 100.0 * share))
}

impl Printer {
    /// # Errors
    /// When a record is wanted that could not be kept.
    fn new(args: &BenchArgs, record: BenchRecord) -> anyhow::Result<Printer> {
        if let (Some(_), Some(why)) = (&args.record, refusal()) {
            return Err(BenchRecordError::Refused(why).into());
        }
        let mut columns = vec![
            column("model", 24, |r| format!("{} {}", r.arch, r.file_type)),
            column("size", 10, |r| output::bytes(r.size)),
            column("params", 9, |r| output::count(r.params)),
            column("isa", 7, |r| match r.isa.as_str() {
                "" => "-".to_owned(),
                isa => isa.to_owned(),
            }),
            column("threads", 7, |r| r.threads.to_string()),
        ];
        if !args.peer.is_empty() {
            columns.insert(3, column("engine", 18, |r| r.engine.clone()));
        }
        // f16-30%
        let cache_width = if args.sparse_kv.is_empty() { 6 } else { 8 };
        let optional = [
            (
                all(&args.batch_size) != [2048],
                column("n_batch", 7, |r| r.batch.to_string()),
            ),
            (
                all(&args.ubatch_size) != [UBATCH],
                column("n_ubatch", 8, |r| r.ubatch.to_string()),
            ),
            (
                args.cache_type_k != [KvType::F16] || !args.sparse_kv.is_empty(),
                column("type_k", cache_width, |r| r.type_k.clone()),
            ),
            (
                args.cache_type_v != [KvType::F16] || !args.sparse_kv.is_empty(),
                column("type_v", cache_width, |r| r.type_v.clone()),
            ),
            (
                args.no_repack,
                column("repack", 6, |r| u8::from(r.repack).to_string()),
            ),
            (
                args.no_mmap,
                column("mmap", 4, |r| u8::from(r.mmap).to_string()),
            ),
        ];
        columns.extend(
            optional
                .into_iter()
                .filter(|(shown, _)| *shown)
                .map(|o| o.1),
        );
        columns.push(column("test", 15, |r| r.test.clone()));
        columns.push(column("t/s", 18, |r| {
            match (r.samples_ts.is_empty(), &r.error) {
                (true, Some(error)) => format!("failed: {error}"),
                _ => format!("{:.2} ± {:.2}", r.summary.avg_ts, r.summary.stddev_ts),
            }
        }));
        if args.probe.is_some() {
            columns.push(column("% bandwidth", 11, |r| percent(r.bandwidth_share)));
            columns.push(column("% peak", 6, |r| percent(r.peak_share)));
        }
        Ok(Printer {
            format: if args.json { Format::Json } else { args.output },
            record,
            columns,
            started: false,
        })
    }

    /// Measures the machine's limits, if they are wanted.
    fn probe(
        &mut self,
        args: &BenchArgs,
        settings: &[Setting],
        threads: usize,
    ) -> anyhow::Result<()> {
        if args.probe.is_none() {
            return Ok(());
        }
        let available = facts::available_memory().unwrap_or(1 << 30);
        let options = ProbeOptions {
            memory: ProbeOptions::default().memory.min(available / 4),
            time: Duration::from_millis(args.probe_time.max(1)),
            ..ProbeOptions::default()
        };
        let amx = settings.iter().find_map(|setting| setting.amx);
        let probe = Probe::run(threads, amx, &options);
        if self.format == Format::Md {
            output::line(&report::probe_table(&probe))?;
        }
        self.record.probes.push(probe);
        Ok(())
    }

    fn row(&mut self, row: Row) -> anyhow::Result<()> {
        let first = !std::mem::replace(&mut self.started, true);
        match self.format {
            Format::Md => {
                if first {
                    output::line(&self.table_head())?;
                }
                let cells: Vec<_> = self
                    .columns
                    .iter()
                    .map(|c| pad(&(c.text)(&row), c))
                    .collect();
                output::line(&format!("| {} |", cells.join(" | ")))?;
                let whole = row.samples_ns.last().map_or(0.0, |&ns| ns as f64 / 1e6);
                for p in &row.profile {
                    say!(
                        "  {:<19} {:7} calls {:10.2} ms {:5.1} %",
                        p.operation,
                        p.calls,
                        p.ms,
                        100.0 * p.ms / whole
                    );
                }
                if !row.profile.is_empty() {
                    let between = whole - row.profile.iter().map(|p| p.ms).sum::<f64>();
                    let share = 100.0 * between / whole;
                    say!("  {:<19} {:21.2} ms {share:5.1} %", "between them", between);
                }
            }
            Format::Csv => {
                let fields = self.fields(&row);
                if first {
                    let names: Vec<_> = fields.iter().map(|f| f.0).collect();
                    output::line(&names.join(","))?;
                }
                let values: Vec<_> = fields.iter().map(|f| quote(&f.1)).collect();
                output::line(&values.join(","))?;
            }
            Format::Jsonl => output::json(&Line {
                commit: &self.record.record.commit,
                host: &self.record.record.host,
                row: &row,
            })?,
            Format::Json => {}
        }
        self.record.rows.push(row);
        Ok(())
    }

    /// Keeps what there is so far, for the case that the run does not end.
    fn save(&self, args: &BenchArgs) -> anyhow::Result<()> {
        if let Some(dir) = &args.record {
            self.record.write(dir)?;
        }
        Ok(())
    }

    fn finish(self, args: &BenchArgs) -> anyhow::Result<()> {
        let record = &self.record;
        match self.format {
            Format::Json => output::json(record)?,
            Format::Md if record.interleaved => {
                output::text(&report::pairs_table(record))?;
            }
            _ => {}
        }
        if let Some(path) = &args.plot {
            plot::write(path, record)?;
        }
        if let Some(why) = &record.throttled {
            say!("warning: {why}: this run says little about the machine");
        }
        if let Some(dir) = &args.record {
            if record.throttled.is_some() {
                record.remove_partial(dir);
            }
            let path = record.write(dir)?;
            say!("recorded in {}", path.display());
        }
        Ok(())
    }

    fn table_head(&self) -> String {
        let names: Vec<_> = self.columns.iter().map(|c| pad(c.name, c)).collect();
        let rules = self.columns.iter().map(|c| match c.name {
            "model" => "-".repeat(c.width),
            _ => format!("{}:", "-".repeat(c.width - 1)),
        });
        let rules: Vec<_> = rules.collect();
        format!("| {} |\n| {} |", names.join(" | "), rules.join(" | "))
    }

    fn fields(&self, r: &Row) -> Vec<(&'static str, String)> {
        vec![
            ("commit", self.record.record.commit.clone()),
            ("cpu", self.record.record.host.cpu.clone()),
            ("engine", r.engine.clone()),
            ("model", r.model.clone()),
            ("arch", r.arch.clone()),
            ("file_type", r.file_type.clone()),
            ("size", r.size.to_string()),
            ("params", r.params.to_string()),
            ("isa", r.isa.clone()),
            ("threads", r.threads.to_string()),
            ("batch", r.batch.to_string()),
            ("ubatch", r.ubatch.to_string()),
            ("type_k", r.type_k.clone()),
            ("type_v", r.type_v.clone()),
            ("repack", u8::from(r.repack).to_string()),
            ("mmap", u8::from(r.mmap).to_string()),
            ("n_prompt", r.n_prompt.to_string()),
            ("n_gen", r.n_gen.to_string()),
            ("n_depth", r.n_depth.to_string()),
            ("date", r.date.clone()),
            ("avg_ts", r.summary.avg_ts.to_string()),
            ("stddev_ts", r.summary.stddev_ts.to_string()),
            ("median_ts", r.summary.median_ts.to_string()),
            ("p10_ts", r.summary.p10_ts.to_string()),
            ("p90_ts", r.summary.p90_ts.to_string()),
            ("noisy", u8::from(r.summary.noisy).to_string()),
            ("first_token_ms", number(r.first_token_ms)),
            ("token_p50_ms", number(r.token_p50_ms)),
            ("token_p95_ms", number(r.token_p95_ms)),
            ("bytes_per_token", number(r.bytes_per_token)),
            ("operations_per_token", number(r.operations_per_token)),
            ("bandwidth_share", number(r.bandwidth_share)),
            ("peak_share", number(r.peak_share)),
            ("joules_per_token", number(r.joules_per_token)),
            ("error", r.error.clone().unwrap_or_default()),
        ]
    }
}

/// Empty where there is none.
fn number(value: Option<f64>) -> String {
    value.map_or_else(String::new, |value| value.to_string())
}

/// The model is flush left, all else right.
fn pad(text: &str, column: &Column) -> String {
    let width = column.width;
    match column.name {
        "model" => format!("{text:width$}"),
        _ => format!("{text:>width$}"),
    }
}

fn quote(value: &str) -> String {
    format!("\"{}\"", value.replace('"', "\"\""))
}
