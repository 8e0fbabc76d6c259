//! `bench`: measures prompts and generation, in llama-bench's terms.

use crate::{
    args::{self, AmxMode, ModelArgs},
    exit::Refusal,
    facts, interrupt, output,
};
use clap::{Args, ValueEnum};
use phase2_perf::bench::{Options, Test, mean_and_deviation, measure};
use serde::Serialize;
use std::{
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};
use tegula_engine::{ContextOptions, LoadOptions, Model, Source, threads::default_threads};
use tegula_kernels::{Tier, kv::KvType, profile::Share};
use tegula_lab::{Date, Host, Record, Series};

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  tegula bench model.gguf
  tegula bench model.gguf -p 512,2048 -n 128 -d 0,4096 -t 1,2,4
  tegula bench -m a.gguf,b.gguf --isa avx2,avx512 -o json > record.json

Each combination of the lists is measured. pp N: a prompt of N tokens; tg N: N tokens one by
one; @ dN: behind N tokens of context. t/s is the mean of -r repetitions ± standard deviation.
Rows appear as they are done; Ctrl-C ends with those that are.")]
pub struct BenchArgs {
    /// GGUF file [default: the embedded ferrous-moe-21m]
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
    /// Prompt lengths; 0: none
    #[arg(
        short = 'p',
        long,
        value_name = "N",
        value_delimiter = ',',
        default_value = "512"
    )]
    n_prompt: Vec<usize>,
    /// Generation lengths; 0: none
    #[arg(
        short = 'n',
        long,
        value_name = "N",
        value_delimiter = ',',
        default_value = "128"
    )]
    n_gen: Vec<usize>,
    /// A prompt and a generation together (-pg); may be repeated
    #[arg(long, value_name = "P,N", value_parser = prompt_gen)]
    prompt_gen: Vec<(usize, usize)>,
    /// Tokens in the context before the clock starts
    #[arg(
        short = 'd',
        long,
        value_name = "N",
        value_delimiter = ',',
        default_value = "0"
    )]
    n_depth: Vec<usize>,
    /// Tokens that are submitted together
    #[arg(
        short,
        long,
        value_name = "N",
        value_delimiter = ',',
        default_value = "2048"
    )]
    batch_size: Vec<usize>,
    /// Tokens that run through the layers together (-ub)
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "512")]
    ubatch_size: Vec<usize>,
    /// Types of the cached keys (-ctk): f16, bf16, q8_0
    #[arg(long, value_name = "TYPE", value_delimiter = ',', default_value = "f16",
          value_parser = args::kv_type)]
    cache_type_k: Vec<KvType>,
    /// Types of the cached values (-ctv): f16, bf16, q8_0
    #[arg(long, value_name = "TYPE", value_delimiter = ',', default_value = "f16",
          value_parser = args::kv_type)]
    cache_type_v: Vec<KvType>,
    /// Threads [default: the physical cores that this process may use]
    #[arg(short, long, value_name = "N", value_delimiter = ',', value_parser = args::thread_count)]
    threads: Vec<usize>,
    /// Instruction sets: scalar, avx2, avx512 [default: the CPU's best]
    #[arg(long, value_name = "TIER", value_delimiter = ',', env = "TEGULA_ISA")]
    isa: Vec<Tier>,
    /// Use Intel AMX
    #[arg(long)]
    amx: bool,
    /// Read the file instead of mapping it
    #[arg(long)]
    no_mmap: bool,
    /// Leave matrices as they are in the file
    #[arg(long)]
    no_repack: bool,
    /// Repetitions
    #[arg(short, long, value_name = "N", default_value_t = 5)]
    repetitions: usize,
    /// Also tell where the time goes, per kind of operation (last repetition)
    #[arg(long)]
    profile: bool,
    /// No repetition before those that count
    #[arg(long)]
    no_warmup: bool,
    /// How to print: md, csv, json or jsonl
    #[arg(short, long, value_name = "FORMAT", value_enum, default_value_t = Format::Md,
          hide_possible_values = true)]
    output: Format,
    /// The same as -o json
    #[arg(long, conflicts_with = "output")]
    json: bool,
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

fn prompt_gen(s: &str) -> Result<(usize, usize), String> {
    let parse = || {
        let (p, n) = s.split_once(',')?;
        Some((p.parse().ok()?, n.parse().ok()?))
    };
    parse().ok_or_else(|| "expected two numbers, such as 512,128".to_owned())
}

/// One measured test.
#[derive(Clone, Debug, Serialize)]
struct Row {
    /// The file's name.
    model: String,
    arch: String,
    file_type: String,
    /// Bytes of the file.
    size: u64,
    params: u64,
    isa: String,
    threads: usize,
    batch: usize,
    ubatch: usize,
    type_k: &'static str,
    type_v: &'static str,
    repack: bool,
    mmap: bool,
    load_ms: f64,
    test: String,
    n_prompt: usize,
    n_gen: usize,
    n_depth: usize,
    date: String,
    avg_ts: f64,
    stddev_ts: f64,
    samples_ts: Vec<f64>,
    samples_ns: Vec<u64>,
    /// The last repetition's time per kind of operation, with --profile.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    profile: Vec<Part>,
}

/// A kind of operation's part of a repetition.
#[derive(Clone, Debug, Serialize)]
struct Part {
    operation: &'static str,
    calls: u64,
    ms: f64,
}

impl From<Share> for Part {
    fn from(share: Share) -> Part {
        Part {
            operation: share.op.name(),
            calls: share.calls,
            ms: share.time.as_secs_f64() * 1e3,
        }
    }
}

/// What `-o json` prints: a record of the laboratory, and the rows.
#[derive(Serialize)]
struct Report {
    #[serde(flatten)]
    record: Record,
    rows: Vec<Row>,
}

/// What `-o jsonl` prints for each row.
#[derive(Serialize)]
struct Line<'a> {
    commit: &'a str,
    host: &'a Host,
    #[serde(flatten)]
    row: &'a Row,
}

pub fn run(args: &BenchArgs) -> anyhow::Result<()> {
    let tests = tests(args)?;
    let tiers = match args.isa.as_slice() {
        [] => vec![Tier::detect_max()],
        given => given.to_vec(),
    };
    for &tier in &tiers {
        args::require_tier(tier)?;
    }
    let threads = match args.threads.as_slice() {
        [] => vec![default_threads()],
        given => given.to_vec(),
    };
    if args.repetitions == 0 {
        return Err(Refusal::Usage("-r 0: nothing would be measured".to_owned()).into());
    }
    let mut printer = Printer::new(args)?;
    let cancel = interrupt::flag()?;
    for source in sources(args) {
        for &tier in &tiers {
            for &threads in &threads {
                if cancel.load(Ordering::Relaxed) {
                    break;
                }
                let load = LoadOptions {
                    mmap: !args.no_mmap,
                    repack: !args.no_repack,
                    tier,
                    amx: args::amx(args.amx.then_some(AmxMode::On), tier)?,
                    threads,
                    memory: facts::available_memory(),
                    ..LoadOptions::new(source.clone())
                };
                let model = args::load(&load)?;
                for context in contexts(args) {
                    for &test in &tests {
                        let row = row(args, &load, &model, context, test, &cancel)?;
                        if let Some(row) = row {
                            printer.row(row)?;
                        }
                    }
                }
            }
        }
    }
    printer.finish()
}

/// The tests in llama-bench's order.
fn tests(args: &BenchArgs) -> Result<Vec<Test>, Refusal> {
    let prompts = args.n_prompt.iter().map(|&p| (p, 0));
    let generations = args.n_gen.iter().map(|&n| (0, n));
    let all = prompts
        .chain(generations)
        .chain(args.prompt_gen.iter().copied());
    let pairs: Vec<_> = all.filter(|&(p, n)| p + n > 0).collect();
    let tests: Vec<_> = args
        .n_depth
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

fn sources(args: &BenchArgs) -> Vec<Source> {
    let paths: Vec<_> = args.models.iter().chain(&args.model_flags).collect();
    match paths.as_slice() {
        [] => vec![ModelArgs::default().source()],
        paths => paths.iter().map(|&p| Source::Path(p.clone())).collect(),
    }
}

/// Every combination of batches and cache types.
fn contexts(args: &BenchArgs) -> Vec<ContextOptions> {
    let mut all = Vec::new();
    for &batch in &args.batch_size {
        for &ubatch in &args.ubatch_size {
            for &k_type in &args.cache_type_k {
                for &v_type in &args.cache_type_v {
                    all.push(ContextOptions {
                        batch,
                        ubatch,
                        k_type,
                        v_type,
                        ..ContextOptions::default()
                    });
                }
            }
        }
    }
    all
}

/// Measures one test; nothing if not a single repetition was done.
fn row(
    args: &BenchArgs,
    load: &LoadOptions,
    model: &std::sync::Arc<Model>,
    context: ContextOptions,
    test: Test,
    cancel: &AtomicBool,
) -> anyhow::Result<Option<Row>> {
    let options = Options {
        context,
        repetitions: args.repetitions,
        warm_up: !args.no_warmup,
        profile: args.profile,
    };
    let samples = measure(model, test, &options, cancel, &mut |_| {})?;
    if samples.ns.is_empty() {
        return Ok(None);
    }
    let samples_ts = samples.tps();
    let (avg_ts, stddev_ts) = mean_and_deviation(&samples_ts);
    let gguf = model.gguf();
    let name = Path::new(gguf.metadata().origin()).file_name();
    Ok(Some(Row {
        model: name.map_or_else(String::new, |n| n.to_string_lossy().into_owned()),
        arch: model.config().arch.to_string(),
        file_type: facts::file_type(gguf),
        size: gguf.file_bytes(),
        params: facts::parameters(gguf),
        isa: facts::isa(model),
        threads: load.threads,
        batch: context.batch,
        ubatch: context.ubatch,
        type_k: context.k_type.name(),
        type_v: context.v_type.name(),
        repack: load.repack,
        mmap: load.mmap,
        load_ms: model.load_ms(),
        test: test.to_string(),
        n_prompt: test.prompt,
        n_gen: test.generate,
        n_depth: test.depth,
        date: Date::now().to_string(),
        avg_ts,
        stddev_ts,
        samples_ts,
        samples_ns: samples.ns,
        profile: samples.profile.into_iter().map(Part::from).collect(),
    }))
}

/// Prints rows as they come.
struct Printer {
    format: Format,
    record: Record,
    rows: Vec<Row>,
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

impl Printer {
    fn new(args: &BenchArgs) -> anyhow::Result<Printer> {
        let mut columns = vec![
            column("model", 24, |r| format!("{} {}", r.arch, r.file_type)),
            column("size", 10, |r| output::bytes(r.size)),
            column("params", 9, |r| output::count(r.params)),
            column("isa", 7, |r| r.isa.clone()),
            column("threads", 7, |r| r.threads.to_string()),
        ];
        let optional = [
            (
                args.batch_size != [2048],
                column("n_batch", 7, |r| r.batch.to_string()),
            ),
            (
                args.ubatch_size != [512],
                column("n_ubatch", 8, |r| r.ubatch.to_string()),
            ),
            (
                args.cache_type_k != [KvType::F16],
                column("type_k", 6, |r| r.type_k.to_owned()),
            ),
            (
                args.cache_type_v != [KvType::F16],
                column("type_v", 6, |r| r.type_v.to_owned()),
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
            format!("{:.2} ± {:.2}", r.avg_ts, r.stddev_ts)
        }));
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        Ok(Printer {
            format: if args.json { Format::Json } else { args.output },
            record: Record::new("bench", root, Host::detect()),
            rows: Vec::new(),
            columns,
            started: false,
        })
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
                        "  {:<12} {:7} calls {:10.2} ms {:5.1} %",
                        p.operation,
                        p.calls,
                        p.ms,
                        100.0 * p.ms / whole
                    );
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
                commit: &self.record.commit,
                host: &self.record.host,
                row: &row,
            })?,
            Format::Json => {}
        }
        self.record.series.push(Series {
            name: format!(
                "{} {} {} t{} {}",
                row.model, row.file_type, row.isa, row.threads, row.test
            ),
            unit: "t/s".to_owned(),
            samples: row.samples_ts.clone(),
        });
        self.rows.push(row);
        Ok(())
    }

    fn finish(self) -> anyhow::Result<()> {
        match self.format {
            Format::Json => output::json(&Report {
                record: self.record,
                rows: self.rows,
            }),
            _ => Ok(()),
        }
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
            ("commit", self.record.commit.clone()),
            ("cpu", self.record.host.cpu.clone()),
            ("model", r.model.clone()),
            ("arch", r.arch.clone()),
            ("file_type", r.file_type.clone()),
            ("size", r.size.to_string()),
            ("params", r.params.to_string()),
            ("isa", r.isa.clone()),
            ("threads", r.threads.to_string()),
            ("batch", r.batch.to_string()),
            ("ubatch", r.ubatch.to_string()),
            ("type_k", r.type_k.to_owned()),
            ("type_v", r.type_v.to_owned()),
            ("repack", u8::from(r.repack).to_string()),
            ("mmap", u8::from(r.mmap).to_string()),
            ("n_prompt", r.n_prompt.to_string()),
            ("n_gen", r.n_gen.to_string()),
            ("n_depth", r.n_depth.to_string()),
            ("date", r.date.clone()),
            ("avg_ts", r.avg_ts.to_string()),
            ("stddev_ts", r.stddev_ts.to_string()),
        ]
    }
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
