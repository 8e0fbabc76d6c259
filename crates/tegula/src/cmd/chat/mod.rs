//! `chat`: a conversation.

mod command;
mod input;
mod thinking;

use crate::{
    args::{
        CpuArgs, LengthArgs, ModelArgs, SamplingArgs, SparseCacheArgs, check_biases, read_text,
    },
    cmd::run::{Stdout, print_timings, warm_up},
    constrain::{ConstraintArgs, guide},
    exit::{self, Refusal},
    interrupt, output,
};
use anyhow::Context as _;
use clap::Args;
use command::{Command, Settings};
use input::Input;
use serde::{Deserialize, Serialize};
use std::{
    fs::{self, File},
    io::{IsTerminal as _, Write as _},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};
use tegula_engine::{
    Constraint, Context, GenerateOptions, StopReason, Timings, generate_constrained,
};
use tegula_gguf::{
    ChatTemplate,
    chat::{Message, RenderOptions},
};
use tegula_grammar::Guide;
use thinking::Dimmer;

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  tegula chat model.gguf --system \"Answer in one sentence.\"
  tegula chat hf:Qwen/Qwen3-0.6B-GGUF:Q8_0 --think off
  printf 'Hello!\\nAnd now?\\n' | tegula chat model.gguf --temp 0

On a terminal /help lists the commands; lines can be edited, Tab completes commands, the history
is kept in ~/.local/state/tegula/chat-history (or in XDG_STATE_HOME). From a pipe each line is a
message or a command. Ctrl-C ends an answer, not the program.")]
pub struct ChatArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// What the system says first
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    system: Option<String>,
    /// Jinja template to use instead of the model's own
    #[arg(long, value_name = "FILE")]
    chat_template: Option<PathBuf>,
    /// Whether a model that can think before it answers shall; auto: as its template has it
    #[arg(
        long,
        value_name = "on|off|auto",
        default_value = "auto",
        hide_possible_values = true
    )]
    think: Think,
    /// End an answer before this text; may be repeated
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    stop: Vec<String>,
    #[command(flatten)]
    length: LengthArgs,
    #[command(flatten)]
    cache: SparseCacheArgs,
    #[command(flatten)]
    cpu: CpuArgs,
    /// Neither read nor write the history
    #[arg(long)]
    no_history: bool,
    /// Show statistics of each answer
    #[arg(short, long)]
    verbose: bool,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    constraint: ConstraintArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Think {
    On,
    Off,
    Auto,
}

pub fn run(args: &ChatArgs) -> anyhow::Result<()> {
    let settings = Settings {
        sampler: args.sampling.options()?,
        limit: args.length.limit(),
        think: match args.think {
            Think::On => Some(true),
            Think::Off => Some(false),
            Think::Auto => None,
        },
    };
    let grammar = args.constraint.grammar()?;
    // Before the weights: without a template there is no conversation.
    let mut template = template(args)?;
    let model = args.cpu.load(&args.model)?;
    check_biases(&settings.sampler, model.config().vocab)?;
    if args.chat_template.is_some() {
        let tokenizer = model.tokenizer();
        let text = |id: Option<u32>| Some(tokenizer.token_text(id?)?.to_owned());
        template = template.with_tokens(text(tokenizer.bos()), text(tokenizer.eos()));
    }
    let mut ctx = args.cache.context(&model, args.length.ctx_size)?;
    warm_up(&mut ctx)?;
    let guide = match grammar {
        Some(grammar) => Some(guide(&grammar, model.tokenizer())?),
        None => None,
    };
    let mut input = Input::new(!args.no_history)?;
    let colour = std::io::stdout().is_terminal()
        && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
    let mut chat = Chat {
        template,
        guide,
        settings,
        stop: args.stop.clone(),
        messages: Vec::new(),
        read: String::new(),
        verbose: args.verbose,
        colour,
        timings: None,
        ctx,
        cancel: interrupt::flag()?,
    };
    chat.clear(args.system.as_deref());
    if input.is_terminal() {
        let c = model.config();
        say!(
            "{} ({}), {} tokens of context; /help lists the commands",
            c.name,
            c.arch,
            chat.ctx.options().context
        );
    }
    chat.converse(&mut input)
}

/// The template that was given, still without the model's tokens, or the model's own.
fn template(args: &ChatArgs) -> anyhow::Result<ChatTemplate> {
    if let Some(path) = &args.chat_template {
        let parsed = read_text(path)?.parse();
        return parsed.with_context(|| path.display().to_string());
    }
    let own = ChatTemplate::from_gguf(&args.model.open()?).map_err(|e| {
        Refusal::Input(format!(
            "{e}; give one with --chat-template, or use `tegula run`"
        ))
    })?;
    if own.is_fallback() {
        say!("warning: the model has no chat template: ChatML is used");
    }
    Ok(own)
}

/// A conversation.
struct Chat {
    template: ChatTemplate,
    /// What each answer has to be.
    guide: Option<Guide>,
    settings: Settings,
    stop: Vec<String>,
    messages: Vec<Message>,
    /// What goes in front of the next message.
    read: String,
    verbose: bool,
    /// Reasoning is dimmed.
    colour: bool,
    /// Of the last answer.
    timings: Option<Timings>,
    ctx: Context,
    cancel: Arc<AtomicBool>,
}

/// What `/save` writes.
#[derive(Serialize, Deserialize)]
struct Saved {
    model: String,
    messages: Vec<Message>,
}

impl Chat {
    /// Answers until the input ends. On a terminal a failure is shown and the conversation goes
    /// on; from a pipe it ends the program, since a script should hear of it.
    fn converse(&mut self, input: &mut Input) -> anyhow::Result<()> {
        loop {
            // Nothing to interrupt: from here on SIGINT ends the program. (An editor reads
            // Ctrl-C as a key.)
            self.cancel.store(true, Ordering::Relaxed);
            let Some(text) = input.next()? else {
                return Ok(());
            };
            let done = match Command::parse(&text) {
                Ok(Command::Exit) => return Ok(()),
                Ok(command) => self.execute(&command),
                Err(what) => Err(Refusal::Usage(what).into()),
            };
            if let Err(error) = done {
                let closed = error
                    .downcast_ref::<std::io::Error>()
                    .is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe);
                if !input.is_terminal() || closed {
                    return Err(error);
                }
                say!("{}", exit::describe(&error));
            }
        }
    }

    fn execute(&mut self, command: &Command) -> anyhow::Result<()> {
        match command {
            Command::Message("") | Command::Exit => {}
            Command::Message(text) => {
                let mut message = std::mem::take(&mut self.read);
                message.push_str(text);
                self.messages.push(Message::new("user", message));
                self.answer()?;
            }
            Command::Help => say!("{}", command::HELP),
            Command::Clear => {
                let system = self.system().map(str::to_owned);
                self.clear(system.as_deref());
            }
            Command::System(None) => match self.system() {
                Some(text) => say!("{text}"),
                None => say!("(nothing)"),
            },
            Command::System(Some(text)) => {
                if self.system().is_some() {
                    self.messages.remove(0);
                }
                self.messages.insert(0, Message::new("system", *text));
            }
            Command::Regenerate => {
                let user = |m: &Message| m.role == "user";
                let Some(last) = self.messages.iter().rposition(user) else {
                    return Err(Refusal::Usage("nothing has been asked yet".to_owned()).into());
                };
                self.messages.truncate(last + 1);
                // Another answer, not the same one again.
                self.settings.sampler.seed = self.settings.sampler.seed.wrapping_add(1);
                self.answer()?;
            }
            Command::Undo => match self.messages.iter().rposition(|m| m.role == "user") {
                Some(last) => self.messages.truncate(last),
                None => return Err(Refusal::Usage("nothing has been asked yet".to_owned()).into()),
            },
            Command::Set(None) => say!("{}", self.settings.show()),
            Command::Set(Some((name, value))) => {
                self.settings.set(name, value).map_err(Refusal::Usage)?;
            }
            Command::Read(file) => {
                self.read
                    .push_str(read_text(Path::new(file))?.trim_end_matches('\n'));
                self.read.push_str("\n\n");
                say!("{file}: goes in front of the next message");
            }
            Command::Save(file) => self.save(Path::new(file))?,
            Command::Load(file) => self.load(Path::new(file))?,
            Command::History => {
                for message in &self.messages {
                    let content = message.content.as_str().unwrap_or_default();
                    output::line(&format!("[{}] {content}", message.role))?;
                }
            }
            Command::Stats => {
                if let Some(timings) = &self.timings {
                    print_timings(timings);
                }
                let (held, all) = (self.ctx.tokens(0)?.len(), self.ctx.options().context);
                say!("context {held} of {all} tokens");
            }
        }
        Ok(())
    }

    /// What the system says first.
    fn system(&self) -> Option<&str> {
        let first = self.messages.first().filter(|m| m.role == "system")?;
        first.content.as_str()
    }

    /// Starts over.
    fn clear(&mut self, system: Option<&str>) {
        self.messages.clear();
        self.read.clear();
        let system = system.map(|text| Message::new("system", text));
        self.messages.extend(system);
    }

    fn save(&self, path: &Path) -> anyhow::Result<()> {
        let saved = Saved {
            model: self.ctx.model().config().name.clone(),
            messages: self.messages.clone(),
        };
        let text = serde_json::to_string_pretty(&saved)? + "\n";
        let mut name = path.as_os_str().to_owned();
        name.push(format!(".{}.tmp", std::process::id()));
        let temporary = PathBuf::from(name);
        File::create(&temporary)
            .and_then(|mut f| f.write_all(text.as_bytes()).and_then(|()| f.sync_all()))
            .and_then(|()| fs::rename(&temporary, path))
            .inspect_err(|_| {
                // The first error is the one to tell of.
                let _ = fs::remove_file(&temporary);
            })
            .with_context(|| format!("{}: cannot write", path.display()))?;
        say!("{}: {} messages", path.display(), self.messages.len());
        Ok(())
    }

    fn load(&mut self, path: &Path) -> anyhow::Result<()> {
        let saved: Saved = serde_json::from_str(&read_text(path)?)
            .map_err(|e| Refusal::Input(format!("{}: not a conversation: {e}", path.display())))?;
        self.messages = saved.messages;
        self.read.clear();
        say!("{}: {} messages", path.display(), self.messages.len());
        Ok(())
    }

    /// Answers the last message; if that fails, takes it back.
    fn answer(&mut self) -> anyhow::Result<()> {
        let result = self.try_to_answer();
        if result.is_err() {
            self.messages.pop();
        }
        result
    }

    fn try_to_answer(&mut self) -> anyhow::Result<()> {
        let options = RenderOptions {
            add_generation_prompt: true,
            enable_thinking: self.settings.think,
            ..RenderOptions::default()
        };
        let rendered = self.template.render(&self.messages, &options)?;
        let prompt = self.ctx.model().tokenizer().encode_chat(&rendered);
        let options = GenerateOptions {
            limit: self.settings.limit,
            stop: self.stop.clone(),
            sampler: self.settings.sampler.clone(),
            ..GenerateOptions::default()
        };
        self.cancel.store(false, Ordering::Relaxed);
        let mut out = Stdout::new(true);
        let mut dimmer = Dimmer::new(self.colour, &rendered);
        let cancel = &self.cancel;
        out.show(dimmer.start(), cancel);
        let mut guide = self.guide.clone();
        let generation = generate_constrained(
            &mut self.ctx,
            0,
            &prompt,
            &options,
            guide.as_mut().map(|guide| guide as &mut dyn Constraint),
            cancel,
            &mut |piece| out.show(&dimmer.push(piece), cancel),
        );
        // Also behind an error the terminal's text is to be plain again.
        out.show(&dimmer.finish(), cancel);
        let generation = generation?;
        out.finish(&generation)?;
        match generation.reason {
            StopReason::ContextFull => {
                say!("the context is full: /clear starts over, /undo takes back");
            }
            StopReason::Cancelled => say!("interrupted"),
            _ => {}
        }
        if self.verbose {
            print_timings(&generation.timings);
        }
        self.timings = Some(generation.timings);
        let (reasoning, text) = thinking::split(&generation.text, &rendered);
        let mut message = Message::new("assistant", text);
        if let Some(reasoning) = reasoning {
            message
                .extra
                .insert("reasoning_content".into(), reasoning.into());
        }
        self.messages.push(message);
        Ok(())
    }
}
