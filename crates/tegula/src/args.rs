//! What several commands take: the model, the CPU, the context, prompts, sampling.

use crate::{
    exit::Refusal,
    facts,
    gpu::GpuArgs,
    hub::{self, Reference},
    lora::LoraArgs,
    output,
    progress::{Progress, Unit},
};
use anyhow::Context as _;
use clap::{Args, ValueEnum as _};
use std::{
    ffi::{OsStr, OsString},
    fs,
    io::Read as _,
    path::{Path, PathBuf},
    sync::Arc,
};
use tegula_engine::{
    Context, ContextOptions, LoadEvent, LoadOptions, Model, SamplerOptions, Source, UBATCH,
    threads::default_threads,
};
use tegula_gguf::Gguf;
use tegula_kernels::{
    Amx, AmxUnavailable, Numa, Tier,
    kv::{KV_PAGE, KvShape, KvType, pruned::KvSparsity},
};

/// The model inside the program: 21 M parameters, 12 MB.
static EMBEDDED: &[u8] = include_bytes!("../assets/ferrous-moe-21m-Q4_0.gguf");

/// What the embedded model is called.
const EMBEDDED_NAME: &str = "the embedded ferrous-moe-21m";

/// llama.cpp's flags of several letters behind one dash, which clap doesn't know.
const SPELT_OUT: &[(&str, &str)] = &[
    ("-ub", "--ubatch-size"),
    ("-tb", "--threads-batch"),
    ("-ctk", "--cache-type-k"),
    ("-ctv", "--cache-type-v"),
    ("-fa", "--flash-attn"),
    ("-pg", "--prompt-gen"),
    ("-np", "--parallel"),
    ("-ngl", "--gpu-layers"),
    ("-sm", "--split-mode"),
    ("-ts", "--tensor-split"),
    ("-mg", "--main-gpu"),
    ("-dev", "--device"),
    ("-ot", "--override-tensor"),
    ("-nkvo", "--no-kv-offload"),
    ("-cmoe", "--cpu-moe"),
    ("-ncmoe", "--n-cpu-moe"),
];

/// Flags whose value is text of any kind.
const TAKES_TEXT: &[&str] = &[
    "-p",
    "--prompt",
    "--stop",
    "--system",
    "-f",
    "--file",
    "--regex",
    "--grammar",
];

/// Gives the flags that llama.cpp writes with several letters behind one dash the names
/// that clap knows them by. Values of flags that take text, and everything behind `--`, stay
/// as they are.
pub fn spell_out(args: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut out: Vec<OsString> = Vec::new();
    let mut literal = false;
    for arg in args {
        let value = out
            .last()
            .is_some_and(|previous| TAKES_TEXT.iter().any(|f| previous == OsStr::new(f)));
        literal |= arg == "--" && !value;
        let known = |(short, long): &(&str, &str)| {
            let rest = arg.to_str()?.strip_prefix(short)?;
            (rest.is_empty() || rest.starts_with('=')).then(|| format!("{long}{rest}"))
        };
        let long = if literal || value {
            None
        } else {
            SPELT_OUT.iter().find_map(known)
        };
        out.push(long.map_or(arg, OsString::from));
    }
    out
}

/// Which model.
#[derive(Args, Clone, Debug, Default)]
pub struct ModelArgs {
    /// GGUF file (of a split model, any part), or hf:OWNER/REPO[:QUANT] [default: the embedded
    /// ferrous-moe-21m]
    #[arg(value_name = "MODEL", conflicts_with = "model_flag")]
    model: Option<PathBuf>,
    /// The same as MODEL
    #[arg(short = 'm', long = "model", value_name = "MODEL")]
    model_flag: Option<PathBuf>,
    /// Fetch nothing: a model hf:… must be in the cache (also HF_HUB_OFFLINE=1)
    #[arg(long)]
    offline: bool,
}

impl ModelArgs {
    /// Where the model comes from. One of a hub is fetched if it isn't in the cache.
    pub fn source(&self) -> anyhow::Result<Source> {
        match self.model.as_ref().or(self.model_flag.as_ref()) {
            Some(path) => Ok(Source::Path(model_path(path, self.offline)?)),
            None => Ok(embedded()),
        }
    }

    /// The file, mapped and not loaded.
    pub fn open(&self) -> anyhow::Result<Gguf> {
        Ok(match self.source()? {
            Source::Path(path) => Gguf::open(path)?,
            Source::Embedded { bytes, name } => Gguf::from_static(bytes, name)?,
        })
    }
}

/// The model inside the program.
pub fn embedded() -> Source {
    Source::Embedded {
        bytes: EMBEDDED,
        name: EMBEDDED_NAME,
    }
}

/// A value of `--amx`, which takes it behind an equals sign only.
fn is_amx_mode(s: &str) -> bool {
    s == "off" || AmxMode::from_str(s, true).is_ok()
}

/// The file that a MODEL means: itself, or what hf:… is in the cache.
pub fn model_path(model: &Path, offline: bool) -> anyhow::Result<PathBuf> {
    let name = model
        .to_str()
        .filter(|n| Reference::strip_prefix(n).is_some());
    let Some(name) = name else {
        let mode = model.to_str().filter(|s| s.split(',').all(is_amx_mode));
        return match mode {
            Some(mode) if !model.exists() => {
                let what = format!("`{mode}` is taken for a model: write --amx={mode}");
                Err(Refusal::Usage(what).into())
            }
            _ => Ok(model.to_owned()),
        };
    };
    let no = ["", "0", "false", "no", "off"];
    let set = std::env::var("HF_HUB_OFFLINE").unwrap_or_default();
    let offline = offline || !no.contains(&set.to_lowercase().as_str());
    hub::resolve(&name.parse()?, offline)
}

/// How to load it and what to run it on.
#[derive(Args, Clone, Debug)]
pub struct CpuArgs {
    /// Threads [default: the physical cores that this process may use]
    #[arg(short, long, value_name = "N", value_parser = thread_count)]
    pub threads: Option<usize>,
    /// Threads for prompts (-tb); one pool does both, so it must equal -t
    #[arg(long, value_name = "N", value_parser = thread_count)]
    threads_batch: Option<usize>,
    /// Highest instruction set to use: scalar, avx2 or avx512 [default: the CPU's best]
    #[arg(long, value_name = "TIER")]
    isa: Option<Tier>,
    /// Use Intel AMX, or say why it can't be; =auto: only where it can be; =emulate: in software,
    /// for tests
    #[arg(long, value_name = "MODE", num_args = 0..=1, require_equals = true,
          default_missing_value = "on", hide_possible_values = true)]
    amx: Option<AmxMode>,
    /// Read the file instead of mapping it
    #[arg(long)]
    no_mmap: bool,
    /// Lock the model in memory
    #[arg(long)]
    mlock: bool,
    /// Leave matrices as they are in the file; slower
    #[arg(long)]
    no_repack: bool,
    /// Don't pack matrices without their zeros where that takes a tenth of their bytes away
    #[arg(long)]
    no_sparse_pack: bool,
    /// On several memory nodes: distribute threads over all of them, isolate them on the node
    /// where the program started, or leave it to numactl
    #[arg(long, value_name = "distribute|isolate|numactl")]
    numa: Option<Numa>,
    /// Keep repacked matrices in a file, by default MODEL.tegula-packed, and map them from there
    #[arg(
        long,
        value_name = "FILE",
        require_equals = true,
        conflicts_with = "no_repack"
    )]
    packed_cache: Option<Option<PathBuf>>,
    #[command(flatten)]
    lora: LoraArgs,
    #[command(flatten)]
    gpu: GpuArgs,
}

/// Does what `--numa` asks for before there are threads; whether they are to be spread over the
/// nodes.
pub fn numa(numa: Option<Numa>) -> bool {
    if numa == Some(Numa::Isolate) {
        tegula_kernels::numa::isolate();
    }
    numa == Some(Numa::Distribute)
}

/// What `--amx` asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum AmxMode {
    /// An error where it can't be had
    On,
    /// Without it where it can't be had, and says so
    Auto,
    /// The same instructions in software
    Emulate,
}

/// The right to use AMX, as far as `mode` asks for it.
pub fn amx(mode: Option<AmxMode>, tier: Tier) -> Result<Option<Amx>, Refusal> {
    amx_from(mode, tier, Amx::acquire)
}

/// The same with `acquire` asked for it.
fn amx_from(
    mode: Option<AmxMode>,
    tier: Tier,
    acquire: impl FnOnce() -> Result<Amx, AmxUnavailable>,
) -> Result<Option<Amx>, Refusal> {
    let refuse = |why: &dyn std::fmt::Display| {
        Refusal::Requirement(format!("--amx is not available: {why}"))
    };
    let Some(mode) = mode else { return Ok(None) };
    if tier == Tier::Scalar {
        return Err(refuse(&"the scalar kernels can't decode weights for it"));
    }
    match mode {
        AmxMode::On => acquire().map(Some).map_err(|e| refuse(&e)),
        AmxMode::Emulate => Amx::emulate().map(Some).map_err(|e| refuse(&e)),
        AmxMode::Auto => Ok(acquire().inspect_err(|e| say!("AMX: off ({e})")).ok()),
    }
}

/// A number of threads.
pub fn thread_count(s: &str) -> Result<usize, String> {
    match s.parse() {
        Ok(n @ 1..=1024) => Ok(n),
        _ => Err("expected a number from 1 to 1024".to_owned()),
    }
}

/// The tier, if the CPU has it.
pub fn require_tier(tier: Tier) -> Result<Tier, Refusal> {
    match tier.why_not() {
        None => Ok(tier),
        Some(why) => {
            let best = Tier::detect_max();
            let what = format!("--isa {tier} is not available: {why} (the best here is {best})");
            Err(Refusal::Requirement(what))
        }
    }
}

impl CpuArgs {
    /// The engine's options for loading from `source`.
    pub fn options(&self, source: Source) -> anyhow::Result<LoadOptions> {
        let tier = self.isa.unwrap_or_else(Tier::detect_max);
        let distribute = numa(self.numa);
        let threads = self.threads.unwrap_or_else(default_threads);
        if self.threads_batch.is_some_and(|n| n != threads) {
            let what = format!(
                "-tb must equal -t, which is {threads}: one pool of threads runs prompts and \
                 generation"
            );
            return Err(Refusal::Usage(what).into());
        }
        self.gpu.apply(LoadOptions {
            packed_cache: self.packed_file(&source)?,
            mmap: !self.no_mmap,
            mlock: self.mlock,
            repack: !self.no_repack,
            sparse_pack: !self.no_sparse_pack,
            lora: self.lora.files(),
            tier: require_tier(tier)?,
            amx: amx(self.amx, tier)?,
            threads,
            distribute,
            memory: facts::available_memory(),
            ..LoadOptions::new(source)
        })
    }

    /// The packed file's path.
    fn packed_file(&self, source: &Source) -> Result<Option<PathBuf>, Refusal> {
        let Some(given) = &self.packed_cache else {
            return Ok(None);
        };
        let Source::Path(model) = source else {
            let what = "--packed-cache is for model files; the embedded model has none";
            return Err(Refusal::Usage(what.to_owned()));
        };
        if let Some(path) = given {
            return Ok(Some(path.clone()));
        }
        let mut beside = model.as_os_str().to_owned();
        beside.push(".tegula-packed");
        Ok(Some(beside.into()))
    }

    /// Loads the model and shows how far it is.
    pub fn load(&self, model: &ModelArgs) -> anyhow::Result<Arc<Model>> {
        load(&self.options(model.source()?)?)
    }
}

/// Loads a model, shows how far it is, and warns of what is doubtful about it.
pub fn load(options: &LoadOptions) -> anyhow::Result<Arc<Model>> {
    let mut progress = Progress::new("loading", Unit::Bytes);
    let mut became = None;
    let model = Model::load(options, &mut |event| match event {
        LoadEvent::Tensor { name, done, total } => {
            progress.message(name);
            progress.done(done, total);
        }
        LoadEvent::Packed { name, done, total } => {
            progress.message(format!("packing {name}"));
            progress.done(done, total);
        }
        LoadEvent::PackedFile(file) => became = Some(file.to_string()),
    })?;
    drop(progress);
    if let Some(became) = became {
        say!("packed file {became}");
    }
    if let Some(line) = facts::amx(&model) {
        say!("{line}");
    }
    for adapter in model.adapters() {
        say!("LoRA {}: {}", adapter.file, adapter.describe());
    }
    if !model.plan().offload.summary.is_empty() {
        say!("GPUs: {}", model.plan().offload.summary);
    }
    let warnings = model.gguf().warnings().iter();
    for warning in warnings.chain(model.tokenizer().warnings()) {
        say!("warning: {warning}");
    }
    Ok(Arc::new(model))
}

/// Refuses what needs more than the machine's available memory.
fn require_memory(what: &str, needed: u64, instead: &str) -> anyhow::Result<()> {
    let Some(available) = facts::available_memory() else {
        return Ok(());
    };
    if needed <= available {
        return Ok(());
    }
    let message = format!(
        "{what} need {} of memory and {} are available; use {instead}",
        output::bytes(needed),
        output::bytes(available)
    );
    Err(Refusal::Requirement(message).into())
}

/// How long what is generated may become.
#[derive(Args, Clone, Debug)]
pub struct LengthArgs {
    /// Tokens to generate at most; -1: until the model ends or the context is full
    #[arg(short, long, value_name = "N", default_value_t = -1, allow_negative_numbers = true)]
    n_predict: i64,
    /// Tokens that the context holds; 0: what the model was trained with
    #[arg(short, long, value_name = "N", default_value_t = 0)]
    pub ctx_size: usize,
}

impl LengthArgs {
    /// Tokens to generate at most, if there is a limit.
    pub fn limit(&self) -> Option<usize> {
        usize::try_from(self.n_predict).ok()
    }
}

/// Batches and the context's cache.
#[derive(Args, Clone, Debug)]
pub struct CacheArgs {
    /// Tokens that are submitted together
    #[arg(short, long = "batch-size", value_name = "N", default_value_t = 2048)]
    batch_size: usize,
    /// Tokens that run through the layers together (-ub)
    #[arg(long, value_name = "N", default_value_t = UBATCH)]
    ubatch_size: usize,
    /// Type of the cached keys (-ctk): f16, bf16 or q8_0
    #[arg(long, value_name = "TYPE", default_value = "f16", value_parser = kv_type)]
    cache_type_k: KvType,
    /// Type of the cached values (-ctv): f16, bf16 or q8_0
    #[arg(long, value_name = "TYPE", default_value = "f16", value_parser = kv_type)]
    cache_type_v: KvType,
    /// Flash attention (-fa): on or auto; there is no other
    #[arg(long, value_name = "on|off|auto", default_value = "auto", value_parser = flash_attn,
          action = clap::ArgAction::Set)]
    flash_attn: bool,
}

/// The same, with a cache that may be sparse.
#[derive(Args, Clone, Debug)]
pub struct SparseCacheArgs {
    #[command(flatten)]
    cache: CacheArgs,
    /// Drop the smallest keys and values of every full page of 64 positions, such shares of each
    /// head's; the cache takes so much less memory: K=0.3,V=0.5, or a number for both
    #[arg(long, value_name = "K=X,V=Y", value_parser = sparse_kv)]
    sparse_kv: Option<KvSparsity>,
}

impl SparseCacheArgs {
    /// A context of the model for `size` tokens; 0: for as many as it was trained with.
    pub fn context(&self, model: &Arc<Model>, size: usize) -> anyhow::Result<Context> {
        let options = ContextOptions {
            sparsity: self.sparse_kv,
            ..self.cache.options(size)
        };
        context(model, &options)
    }
}

/// Shares of keys and values to drop: `K=0.3,V=0.5`, one of them, or a number for both.
pub fn sparse_kv(s: &str) -> Result<KvSparsity, String> {
    let number = |s: &str| s.trim().parse::<f32>().ok();
    let parse = || {
        if let Some(both) = number(s) {
            return Some((both, both));
        }
        let (mut k, mut v) = (None, None);
        for part in s.split(',') {
            let (name, share) = part.split_once('=')?;
            let to = match name.trim() {
                "K" | "k" => &mut k,
                "V" | "v" => &mut v,
                _ => return None,
            };
            if to.replace(number(share)?).is_some() {
                return None;
            }
        }
        Some((k.unwrap_or(0.0), v.unwrap_or(0.0)))
    };
    parse()
        .and_then(|(k, v)| KvSparsity::new(k, v))
        .ok_or_else(|| "expected shares from 0 to below 1, such as K=0.3,V=0.5".to_owned())
}

/// A type of the KV cache by its name.
pub fn kv_type(s: &str) -> Result<KvType, String> {
    KvType::parse(s).ok_or_else(|| "expected f16, bf16 or q8_0".to_owned())
}

/// Attention is always flash attention: anything else is an error.
pub fn flash_attn(s: &str) -> Result<bool, String> {
    match s {
        "on" | "auto" | "1" => Ok(true),
        "off" | "0" => Err("attention is always flash attention here".to_owned()),
        _ => Err("expected on or auto".to_owned()),
    }
}

impl CacheArgs {
    /// The engine's options for one sequence of `size` tokens.
    pub fn options(&self, size: usize) -> ContextOptions {
        debug_assert!(self.flash_attn);
        ContextOptions {
            context: size,
            batch: self.batch_size,
            ubatch: self.ubatch_size,
            sequences: 1,
            room: 0,
            k_type: self.cache_type_k,
            v_type: self.cache_type_v,
            sparsity: None,
        }
    }
}

/// A context of the model, if the memory suffices.
pub fn context(model: &Arc<Model>, options: &ContextOptions) -> anyhow::Result<Context> {
    let c = model.config();
    let positions = match options.context {
        0 => c.context,
        n => n,
    };
    let shape = KvShape {
        layers: model.plan().offload.cpu_cache_layers(),
        heads: c.kv_heads,
        dim: c.head_dim,
        k: options.k_type,
        v: options.v_type,
    };
    let page = match options.sparsity {
        Some(sparsity) => shape.pruned_bytes(sparsity, 1),
        None => Ok(shape.bytes(1)),
    };
    let page = page.map_err(|e| Refusal::Usage(format!("--sparse-kv: {e} (-ctk, -ctv)")))? as u64;
    let sequences = match options.room {
        0 => options.sequences,
        room => room,
    };
    let pages = positions.div_ceil(KV_PAGE) as u64 * sequences as u64;
    let what = format!("{positions} tokens of context");
    require_memory(&what, page.saturating_mul(pages), "a smaller -c")?;
    Ok(Context::new(Arc::clone(model), options)?)
}

/// The prompt.
#[derive(Args, Clone, Debug)]
pub struct PromptArgs {
    /// The prompt; escapes such as \n are understood
    #[arg(short, long, value_name = "TEXT", allow_hyphen_values = true)]
    pub prompt: Option<String>,
    /// File with the prompt, as it is but for a line break at its end; `-`: standard input
    #[arg(short, long, value_name = "FILE", conflicts_with = "prompt")]
    pub file: Option<PathBuf>,
    /// Take backslashes in -p as they are
    #[arg(long)]
    no_escape: bool,
}

impl PromptArgs {
    /// The prompt, if one was given.
    pub fn read(&self) -> anyhow::Result<Option<String>> {
        match (&self.prompt, &self.file) {
            (Some(text), _) if self.no_escape => Ok(Some(text.clone())),
            (Some(text), _) => Ok(Some(unescape(text))),
            (None, Some(path)) => {
                let mut text = read_text(path)?;
                // Editors end files with a line break; as in llama.cpp it is no part.
                text.truncate(text.strip_suffix('\n').unwrap_or(&text).len());
                Ok(Some(text))
            }
            (None, None) => Ok(None),
        }
    }
}

/// A file (or, for `-`, standard input) as UTF-8 text.
pub fn read_text(path: &Path) -> anyhow::Result<String> {
    let shown = path.display();
    let bytes = if path == Path::new("-") {
        let mut bytes = Vec::new();
        std::io::stdin()
            .read_to_end(&mut bytes)
            .context("cannot read standard input")?;
        bytes
    } else {
        fs::read(path).with_context(|| format!("{shown}: cannot read"))?
    };
    String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        Refusal::Input(format!("{shown}: not UTF-8 text: invalid at byte {at}")).into()
    })
}

/// Replaces `\n \t \r \' \" \\ \xHH` (one or two digits) by what they stand for; everything
/// else, also bytes that would not be UTF-8, stays.
pub fn unescape(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('\\') {
        out.extend(before.as_bytes());
        let plain = |c: char| match c {
            'n' => Some(b'\n'),
            't' => Some(b'\t'),
            'r' => Some(b'\r'),
            '\'' | '"' | '\\' => Some(c as u8),
            _ => None,
        };
        let digits = after.strip_prefix('x').map_or(0, |hex| {
            hex.bytes()
                .take(2)
                .take_while(u8::is_ascii_hexdigit)
                .count()
        });
        if digits > 0 {
            // At most two hexadecimal digits: always a byte.
            out.extend(u8::from_str_radix(&after[1..=digits], 16).ok());
            rest = &after[1 + digits..];
        } else if let Some(byte) = after.chars().next().and_then(plain) {
            out.push(byte);
            rest = &after[1..];
        } else {
            out.push(b'\\');
            rest = after;
        }
    }
    out.extend(rest.as_bytes());
    String::from_utf8(out).unwrap_or_else(|_| text.to_owned())
}

/// How tokens are chosen.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingArgs {
    /// Temperature; 0: always the most likely token
    #[arg(long = "temp", value_name = "T", default_value_t = 0.8)]
    temperature: f32,
    /// Keep the K most likely; 0: all
    #[arg(long, value_name = "K", default_value_t = 40)]
    top_k: usize,
    /// Keep the most likely that sum to P; 1: all
    #[arg(long, value_name = "P", default_value_t = 0.95)]
    top_p: f32,
    /// Keep those at least P times as likely as the best; 0: all
    #[arg(long, value_name = "P", default_value_t = 0.05)]
    min_p: f32,
    /// Locally typical sampling; 1: off
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    typical: f32,
    /// Divide the logits of what was seen; 1: off
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    repeat_penalty: f32,
    /// Tokens back that penalties look; 0: off, -1: the whole context
    #[arg(
        long,
        value_name = "N",
        default_value_t = 64,
        allow_negative_numbers = true
    )]
    repeat_last_n: i64,
    /// Subtract this from the logits of what was seen; 0: off
    #[arg(
        long,
        value_name = "X",
        default_value_t = 0.0,
        allow_negative_numbers = true
    )]
    presence_penalty: f32,
    /// Subtract this for each time it was seen; 0: off
    #[arg(
        long,
        value_name = "X",
        default_value_t = 0.0,
        allow_negative_numbers = true
    )]
    frequency_penalty: f32,
    /// Seed of the random choice; -1: another one each time
    #[arg(short, long, value_name = "N", default_value_t = -1, allow_negative_numbers = true)]
    seed: i64,
    /// Add to a token's logit: ID+X or ID-X, `ID-inf` forbids it; may be repeated
    #[arg(long, value_name = "ID(+/-)X", value_parser = logit_bias)]
    logit_bias: Vec<(u32, f32)>,
}

fn logit_bias(s: &str) -> Result<(u32, f32), String> {
    let parse = || {
        let (id, bias) = s.split_at(s.find(['+', '-'])?);
        let bias: f32 = bias.parse().ok()?;
        (!bias.is_nan()).then_some((id.parse().ok()?, bias))
    };
    parse().ok_or_else(|| "expected a token id with a bias, such as 15+1.5 or 15-inf".to_owned())
}

impl SamplingArgs {
    /// The engine's options.
    pub fn options(&self) -> Result<SamplerOptions, Refusal> {
        let not_negative = [
            ("--temp", self.temperature),
            ("--top-p", self.top_p),
            ("--min-p", self.min_p),
            ("--typical", self.typical),
        ];
        if let Some((flag, x)) = not_negative.iter().find(|(_, x)| x.is_nan() || *x < 0.0) {
            return Err(Refusal::Usage(format!("{flag} {x}: must be 0 or more")));
        }
        if self.repeat_penalty.is_nan() || self.repeat_penalty <= 0.0 {
            let what = format!("--repeat-penalty {}: must be positive", self.repeat_penalty);
            return Err(Refusal::Usage(what));
        }
        Ok(SamplerOptions {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            typical: self.typical,
            penalty_last_n: usize::try_from(self.repeat_last_n).unwrap_or(usize::MAX),
            repeat_penalty: self.repeat_penalty,
            frequency_penalty: self.frequency_penalty,
            presence_penalty: self.presence_penalty,
            logit_bias: self.logit_bias.clone(),
            seed: u64::try_from(self.seed).unwrap_or_else(|_| random_seed()),
            ..SamplerOptions::default()
        })
    }
}

/// Refuses biases for tokens that the vocabulary doesn't have.
pub fn check_biases(options: &SamplerOptions, vocab: usize) -> Result<(), Refusal> {
    match options.logit_bias.iter().find(|b| b.0 as usize >= vocab) {
        None => Ok(()),
        Some((id, _)) => Err(Refusal::Input(format!(
            "--logit-bias: token {id} is outside the vocabulary of {vocab}"
        ))),
    }
}

/// Another number each time.
fn random_seed() -> u64 {
    use std::hash::{BuildHasher as _, RandomState};
    RandomState::new().hash_one(std::process::id()) >> 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_stand_for_what_they_say() {
        assert_eq!(unescape(r"a\nb\t\\n\'\"), "a\nb\t\\n'\\");
        assert_eq!(unescape(r"\x41\x4g \xzz"), "A\u{4}g \\xzz");
        assert_eq!(unescape(r"\xc3\xa4"), "ä");
        assert_eq!(unescape(r"\xff stays"), r"\xff stays");
        assert_eq!(unescape("\\ä"), "\\ä");
    }

    #[test]
    fn flags_of_several_letters_are_spelt_out() {
        let spelt = |args: &[&str]| spell_out(args.iter().map(OsString::from));
        assert_eq!(
            spelt(&["run", "-ub", "64", "-ctk=q8_0", "-u"]),
            ["run", "--ubatch-size", "64", "--cache-type-k=q8_0", "-u"]
        );
        assert_eq!(spelt(&["-p", "-fa", "-fa"]), ["-p", "-fa", "--flash-attn"]);
        assert_eq!(spelt(&["--", "-fa"]), ["--", "-fa"]);
    }

    #[test]
    fn every_refusal_of_amx_is_a_requirement_with_its_cause() {
        let causes = [
            (AmxUnavailable::NotBuilt, "no AMX code"),
            (AmxUnavailable::Cpu(vec!["amx-bf16"]), "lacks amx-bf16"),
            (AmxUnavailable::Os { xcr0: 0x2e7 }, "XCR0 is 0x2e7"),
            (AmxUnavailable::Permission("EPERM".into()), "the permission"),
        ];
        for (cause, said) in causes {
            let refuse = || Err(cause.clone());
            let on = amx_from(Some(AmxMode::On), Tier::Avx512, refuse).unwrap_err();
            assert!(on.to_string().contains(said), "{on}");
            assert_eq!(crate::exit::code(&on.into()), 4);
            let auto = amx_from(Some(AmxMode::Auto), Tier::Avx512, refuse);
            assert_eq!(auto, Ok(None));
        }
        // Without the flag nobody asks, and the scalar tier has nothing that could use it.
        let never = || panic!("asked for AMX");
        assert_eq!(amx_from(None, Tier::Avx512, never), Ok(None));
        for mode in [AmxMode::On, AmxMode::Auto, AmxMode::Emulate] {
            let scalar = amx_from(Some(mode), Tier::Scalar, never).unwrap_err();
            assert_eq!(crate::exit::code(&scalar.into()), 4);
        }
    }

    #[test]
    fn biases_are_read_as_llama_cpp_writes_them() {
        assert_eq!(logit_bias("15+1.5"), Ok((15, 1.5)));
        assert_eq!(logit_bias("15-inf"), Ok((15, f32::NEG_INFINITY)));
        for bad in ["15", "x+1", "15+", "15+nan", "+1"] {
            assert!(logit_bias(bad).is_err(), "{bad}");
        }
    }
}
