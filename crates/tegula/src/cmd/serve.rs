//! `serve`: a model over HTTP.

use crate::{
    args::{self, CacheArgs, CpuArgs, ModelArgs, SamplingArgs, check_biases, read_text},
    cmd::{explain, run::warm_up},
    exit::Refusal,
    facts,
    serve::{self, Access, App, Limits, Ready},
};
use anyhow::Context as _;
use clap::Args;
use serde_json::json;
use std::{
    net::{IpAddr, SocketAddr, TcpListener},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use tegula_engine::{AdapterInfo, Model, Source};
use tegula_gguf::{ChatTemplate, Gguf};
use tegula_server::{Defaults, Pooling, Scheduler, SchedulerOptions, Service, ServiceOptions};

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  tegula serve model.gguf
  tegula serve model.gguf -np 8 -c 65536 --amx
  tegula serve model.gguf --host 0.0.0.0 --api-key-file keys.txt

Then http://127.0.0.1:8080 is a page to talk to the model, and http://127.0.0.1:8080/v1 is the base
URL for OpenAI's clients. The handbook (docs/book/src/server.md) lists the routes. SIGTERM or Ctrl-C ends the server when
what is under way is done; a second one ends it at once.")]
pub struct ServeArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Address to listen on
    #[arg(long, value_name = "IP", default_value = "127.0.0.1")]
    host: IpAddr,
    /// Port to listen on; 0: any that is free
    #[arg(long, value_name = "PORT", default_value_t = 8080)]
    port: u16,
    /// Requests that run at once (-np)
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = slots)]
    parallel: usize,
    /// Tokens of context for all slots together, each of which gets an equal part; 0: for each what
    /// the model was trained with
    #[arg(short, long, value_name = "N", default_value_t = 0)]
    ctx_size: usize,
    /// Tokens of an answer at most, whatever requests say; -1: until the context is full
    #[arg(short, long, value_name = "N", default_value_t = -1, allow_negative_numbers = true)]
    n_predict: i64,
    /// What the model is called in /v1/models and in answers [default: its name]
    #[arg(short, long, value_name = "NAME")]
    alias: Option<String>,
    /// Jinja template to use instead of the model's own
    #[arg(long, value_name = "FILE")]
    chat_template: Option<PathBuf>,
    /// How /v1/embeddings makes one vector of a text: mean or last [default: what the model says, or
    /// mean]
    #[arg(long, value_name = "HOW", value_parser = pooling)]
    pooling: Option<Pooling>,
    /// Prompt tokens that run between two tokens of those who are being answered; 0: of -ub the part
    /// that prompts are of all requests at work, a quarter at least
    #[arg(long, value_name = "N", default_value_t = 0)]
    prompt_chunk: usize,
    /// A key that requests must bear; may be repeated. Other users of the machine can see it in the
    /// list of processes: rather use --api-key-file
    #[arg(long, value_name = "KEY", help_heading = "Access")]
    api_key: Vec<String>,
    /// File of keys, one a line
    #[arg(long, value_name = "FILE", help_heading = "Access")]
    api_key_file: Option<PathBuf>,
    /// Origin whose pages may use the server, such as https://example.com, or `*`; may be repeated
    /// [default: none but the server's own]
    #[arg(long, value_name = "ORIGIN", help_heading = "Access")]
    cors_origin: Vec<String>,
    /// Name by which the server may be addressed although it listens on loopback only and asks for
    /// no key; may be repeated [default: localhost and loopback addresses]
    #[arg(long, value_name = "NAME", help_heading = "Access")]
    allowed_host: Vec<String>,
    /// Requests that may wait; more are refused with status 429
    #[arg(long, value_name = "N", default_value_t = 64, help_heading = "Limits")]
    queue: usize,
    /// Seconds that a request may take, waiting included; 0: any time
    #[arg(long, value_name = "S", default_value_t = 600, help_heading = "Limits")]
    timeout: u64,
    /// Seconds that a client may take to send a request's head
    #[arg(long, value_name = "S", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..),
          help_heading = "Limits")]
    header_timeout: u64,
    /// Seconds that a client may take to send a request's body, or to take in a part of the answer
    #[arg(long, value_name = "S", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..),
          help_heading = "Limits")]
    body_timeout: u64,
    /// Mebibytes of a request's body at most
    #[arg(long, value_name = "MIB", default_value_t = 8, value_parser = clap::value_parser!(u64).range(1..=1024),
          help_heading = "Limits")]
    max_body: u64,
    /// Connections at once
    #[arg(
        long,
        value_name = "N",
        default_value_t = 4096,
        help_heading = "Limits"
    )]
    max_connections: usize,
    /// Seconds that requests under way have to end in when the server is told to
    #[arg(long, value_name = "S", default_value_t = 30, help_heading = "Limits")]
    drain_timeout: u64,
    #[command(flatten)]
    cache: CacheArgs,
    #[command(flatten)]
    cpu: CpuArgs,
    /// Say a line about each request
    #[arg(short, long)]
    verbose: bool,
    #[command(flatten)]
    sampling: SamplingArgs,
}

fn slots(s: &str) -> Result<usize, String> {
    match s.parse() {
        Ok(n @ 1..=1024) => Ok(n),
        _ => Err("expected a number from 1 to 1024".to_owned()),
    }
}

fn pooling(s: &str) -> Result<Pooling, String> {
    Pooling::parse(s).ok_or_else(|| "expected mean or last".to_owned())
}

pub fn run(args: &ServeArgs) -> anyhow::Result<()> {
    let defaults = Defaults {
        sampler: args.sampling.options()?,
        limit: usize::try_from(args.n_predict).ok(),
    };
    let access = access(args)?;
    let gguf = args.model.open()?;
    let template = template(args, &gguf)?;
    // Before the weights: a port in use is known at once, and clients are told to wait.
    let address = SocketAddr::new(args.host, args.port);
    let listener = TcpListener::bind(address).map_err(|e| {
        Refusal::Requirement(format!(
            "cannot listen on {address}: {e}; give another --port or --host"
        ))
    })?;
    if !args.host.is_loopback() && access.keys.is_empty() {
        say!("warning: whoever reaches {address} can use the model: no --api-key is asked for");
    }
    let app = Arc::new(App::new(access, limits(args), args.verbose));
    let server = serve::start(listener, Arc::clone(&app))?;

    let model = args.cpu.load(&args.model)?;
    check_biases(&defaults.sampler, model.config().vocab)?;
    app.set_ready(ready(args, &model, &gguf, template, defaults)?);
    let ready = app.ready().map_err(|e| anyhow::anyhow!(e))?;
    let options = ready.service.options();
    say!(
        "serving {} ({}), {} slots of {} tokens, at http://{}",
        options.name,
        facts::isa(&model),
        args.parallel,
        options.context,
        server.address()
    );
    server.run()
}

/// What is served, from the loaded model.
fn ready(
    args: &ServeArgs,
    model: &Arc<Model>,
    gguf: &Gguf,
    template: Result<ChatTemplate, String>,
    defaults: Defaults,
) -> anyhow::Result<Ready> {
    let scheduling = SchedulerOptions {
        slots: args.parallel,
        queue: args.queue,
        chunk: args.prompt_chunk,
    };
    let size = match args.ctx_size {
        0 => 0,
        n => (n / args.parallel).max(1),
    };
    let options = scheduling.context(args.cache.options(size));
    let mut context = args::context(model, &options)?;
    warm_up(&mut context)?;
    let c = model.config();
    let template = template.map(|template| match args.chat_template {
        None => template,
        Some(_) => {
            let tokenizer = model.tokenizer();
            let text = |id: Option<u32>| Some(tokenizer.token_text(id?)?.to_owned());
            template.with_tokens(text(tokenizer.bos()), text(tokenizer.eos()))
        }
    });
    if let Err(why) = &template {
        say!("warning: /v1/chat/completions is not there: {why}");
    } else if template.as_ref().is_ok_and(ChatTemplate::is_fallback) {
        say!("warning: the model has no chat template: ChatML is used");
    }
    let service = ServiceOptions {
        name: name(args, model)?,
        context: context.options().context,
        vocab: c.vocab,
        embedding: c.embd,
        defaults,
        pooling: args.pooling.unwrap_or_else(|| stated_pooling(gguf)),
        timeout: match args.timeout {
            0 => None,
            s => Some(Duration::from_secs(s)),
        },
    };
    let isa = facts::isa(model);
    let mut report =
        serde_json::to_value(explain::report(c, &isa, model.plan(), model.adapters()))?;
    report["threads"] = model.compute().pool.threads().into();
    Ok(Ready {
        service: Service::new(service, model.tokenizer(), template),
        scheduler: Scheduler::start(context, scheduling).context("cannot start a thread")?,
        slots: args.parallel,
        explain: report.to_string(),
        lora: lora_adapters(model.adapters()),
    })
}

/// What `GET /lora-adapters` answers, as llama-server does.
fn lora_adapters(adapters: &[AdapterInfo]) -> String {
    let one = |(id, a): (usize, &AdapterInfo)| json!({"id": id, "path": a.file, "scale": a.scale});
    serde_json::Value::from_iter(adapters.iter().enumerate().map(one)).to_string()
}

/// `general.name`, or the file's.
fn name(args: &ServeArgs, model: &Model) -> anyhow::Result<String> {
    if let Some(alias) = &args.alias {
        return Ok(alias.clone());
    }
    let stated = model.config().name.clone();
    Ok(match args.model.source()? {
        Source::Path(path) if stated.is_empty() || stated == "unnamed" => {
            let stem = path.file_stem().map(|stem| stem.to_string_lossy());
            stem.map_or(stated, |stem| stem.into_owned())
        }
        _ => stated,
    })
}

/// As `ARCH.pooling_type` says: 3 is the last token's state.
fn stated_pooling(gguf: &Gguf) -> Pooling {
    let m = gguf.metadata();
    let arch = m.str("general.architecture").ok().flatten();
    let key = format!("{}.pooling_type", arch.unwrap_or_default());
    match m.u32(&key) {
        Ok(Some(3)) => Pooling::Last,
        _ => Pooling::Mean,
    }
}

/// The template that was given, still without the model's tokens, or the model's own, or why
/// there is none.
fn template(args: &ServeArgs, gguf: &Gguf) -> anyhow::Result<Result<ChatTemplate, String>> {
    let Some(path) = &args.chat_template else {
        return Ok(ChatTemplate::from_gguf(gguf).map_err(|e| e.to_string()));
    };
    let parsed = read_text(path)?.parse();
    Ok(Ok(parsed.with_context(|| path.display().to_string())?))
}

fn access(args: &ServeArgs) -> anyhow::Result<Access> {
    let mut keys = args.api_key.clone();
    if let Some(path) = &args.api_key_file {
        keys.extend(read_keys(path)?);
    }
    if keys
        .iter()
        .any(|key| key.is_empty() || key.len() > serve::MAX_KEY)
    {
        let what = format!("a key has 1 to {} bytes", serve::MAX_KEY);
        return Err(Refusal::Usage(what).into());
    }
    Ok(Access {
        keys,
        origins: args.cors_origin.clone(),
        hosts: args.allowed_host.clone(),
        loopback: args.host.is_loopback(),
    })
}

fn read_keys(path: &Path) -> anyhow::Result<Vec<String>> {
    let text = read_text(path)?;
    let keys: Vec<String> = text
        .lines()
        .map(|line| line.trim().to_owned())
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .collect();
    match keys.is_empty() {
        false => Ok(keys),
        true => Err(Refusal::Input(format!("{}: no keys in it", path.display())).into()),
    }
}

fn limits(args: &ServeArgs) -> Limits {
    Limits {
        body: (args.max_body as usize) << 20,
        header_time: Duration::from_secs(args.header_timeout),
        body_time: Duration::from_secs(args.body_timeout),
        connections: args.max_connections.max(1),
        drain: Duration::from_secs(args.drain_timeout),
    }
}
