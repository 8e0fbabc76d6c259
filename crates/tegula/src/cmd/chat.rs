//! `chat`: a conversation, line by line.

use crate::{
    args::{CacheArgs, CpuArgs, ModelArgs, SamplingArgs, check_biases, read_text},
    cmd::run::{Stdout, print_timings, warm_up},
    constrain::{ConstraintArgs, guide},
    exit::Refusal,
    interrupt,
};
use anyhow::Context as _;
use clap::Args;
use std::{
    io::{BufRead as _, IsTerminal as _, Write as _},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};
use tegula_engine::{Constraint, Context, GenerateOptions, StopReason, generate_constrained};
use tegula_gguf::{
    ChatTemplate,
    chat::{Message, RenderOptions},
};
use tegula_grammar::Guide;

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  tegula chat model.gguf --system \"Answer in one sentence.\"
  printf 'Hello!\\nAnd now?\\n' | tegula chat model.gguf --temp 0

Each line of standard input is a message. /clear starts over, /exit or the end of the input ends
the conversation. Ctrl-C ends an answer; at the prompt it ends the program.")]
pub struct ChatArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// What the system says first
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    system: Option<String>,
    /// Jinja template to use instead of the model's own
    #[arg(long, value_name = "FILE")]
    chat_template: Option<PathBuf>,
    /// Tokens of an answer at most; -1: until the model ends or the context is full
    #[arg(short, long, value_name = "N", default_value_t = -1, allow_negative_numbers = true)]
    n_predict: i64,
    /// Tokens that the context holds; 0: what the model was trained with
    #[arg(short, long, value_name = "N", default_value_t = 0)]
    ctx_size: usize,
    #[command(flatten)]
    cache: CacheArgs,
    #[command(flatten)]
    cpu: CpuArgs,
    /// Show statistics of each answer
    #[arg(short, long)]
    verbose: bool,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    constraint: ConstraintArgs,
}

pub fn run(args: &ChatArgs) -> anyhow::Result<()> {
    let generation = GenerateOptions {
        limit: usize::try_from(args.n_predict).ok(),
        sampler: args.sampling.options()?,
        ..GenerateOptions::default()
    };
    let grammar = args.constraint.grammar()?;
    // Before the weights: without a template there is no conversation.
    let mut template = template(args)?;
    let model = args.cpu.load(&args.model)?;
    check_biases(&generation.sampler, model.config().vocab)?;
    if args.chat_template.is_some() {
        let tokenizer = model.tokenizer();
        let text = |id: Option<u32>| Some(tokenizer.token_text(id?)?.to_owned());
        template = template.with_tokens(text(tokenizer.bos()), text(tokenizer.eos()));
    }
    let mut ctx = args.cache.context(&model, args.ctx_size)?;
    warm_up(&mut ctx)?;
    let guide = match grammar {
        Some(grammar) => Some(guide(&grammar, model.tokenizer())?),
        None => None,
    };
    let mut chat = Chat {
        template,
        guide,
        generation,
        messages: Vec::new(),
        verbose: args.verbose,
        ctx,
        cancel: interrupt::flag()?,
    };
    chat.clear(args.system.as_deref());
    let terminal = std::io::stdin().is_terminal();
    while let Some(line) = chat.next_line(terminal)? {
        match line.trim() {
            "" => {}
            "/exit" => break,
            "/clear" => chat.clear(args.system.as_deref()),
            message => chat.answer(message)?,
        }
    }
    Ok(())
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
    generation: GenerateOptions,
    messages: Vec<Message>,
    verbose: bool,
    ctx: Context,
    cancel: Arc<AtomicBool>,
}

impl Chat {
    /// Starts over.
    fn clear(&mut self, system: Option<&str>) {
        self.messages.clear();
        self.messages
            .extend(system.map(|text| Message::new("system", text)));
    }

    /// The next line of the input; `None` at its end.
    fn next_line(&self, terminal: bool) -> anyhow::Result<Option<String>> {
        // Nothing to interrupt: from here on Ctrl-C ends the program.
        self.cancel.store(true, Ordering::Relaxed);
        if terminal {
            // On a terminal that is gone nobody waits for the prompt.
            let _ = std::io::stderr().write_all(b"> ");
        }
        let mut bytes = Vec::new();
        std::io::stdin()
            .lock()
            .read_until(b'\n', &mut bytes)
            .context("cannot read standard input")?;
        if bytes.is_empty() {
            return Ok(None);
        }
        let line = String::from_utf8(bytes)
            .map_err(|_| Refusal::Input("standard input: not UTF-8 text".to_owned()))?;
        Ok(Some(line))
    }

    /// Answers a message of the user.
    fn answer(&mut self, message: &str) -> anyhow::Result<()> {
        self.messages.push(Message::new("user", message));
        let options = RenderOptions {
            add_generation_prompt: true,
            ..RenderOptions::default()
        };
        let rendered = self.template.render(&self.messages, &options)?;
        let prompt = self.ctx.model().tokenizer().encode_chat(&rendered);
        self.cancel.store(false, Ordering::Relaxed);
        let mut out = Stdout::new(true);
        let cancel = &self.cancel;
        let mut guide = self.guide.clone();
        let generation = generate_constrained(
            &mut self.ctx,
            0,
            &prompt,
            &self.generation,
            guide.as_mut().map(|guide| guide as &mut dyn Constraint),
            cancel,
            &mut |piece| out.show(piece, cancel),
        )?;
        out.finish(&generation)?;
        match generation.reason {
            StopReason::ContextFull => say!("the context is full: /clear starts over"),
            StopReason::Cancelled => say!("interrupted"),
            _ => {}
        }
        if self.verbose {
            print_timings(&generation.timings);
        }
        self.messages
            .push(Message::new("assistant", generation.text));
        Ok(())
    }
}
