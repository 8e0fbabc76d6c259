//! Chat templates: from a list of messages to the prompt that a model was trained on.
//!
//! A GGUF file carries its template as Jinja text written for the Python library
//! `transformers`. It is rendered by `minijinja`, set up as `transformers` sets up Jinja:
//! block trimming, `break` and `continue`, methods of Python's strings, lists and
//! dictionaries, `raise_exception`, `strftime_now`, and a `tojson` that doesn't escape HTML.
//! A file without a template falls back to ChatML when its vocabulary has ChatML's tokens.
//!
//! Templates come from strangers: instructions, memory and output of a rendering are bounded
//! by a budget that grows with the messages.

mod json;
mod time;

use std::collections::BTreeMap;
use std::io;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Kwargs;
use minijinja::{Environment, Error as JinjaError, ErrorKind, State};
use serde::{Deserialize, Serialize};

use crate::Gguf;
use crate::metadata::Metadata;

/// A value that templates can see; anything that implements `Serialize` becomes one by
/// [`Serde`], and JSON by `serde_json::from_str`. Keys keep their order.
pub use minijinja::{Value, value::Serde};

/// Why there is no prompt. Messages are lower-case fragments.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TemplateError {
    /// No template, and no tokens to fall back to ChatML.
    #[error(
        "the model has no chat template (tokenizer.chat_template) and no ChatML tokens: it is probably not a chat model"
    )]
    Missing,
    /// The template isn't Jinja as `minijinja` knows it.
    #[error("chat template: {0}")]
    Syntax(String),
    /// The template itself refused the messages with `raise_exception`.
    #[error("the chat template refuses the messages: {0}")]
    Refused(String),
    /// Something failed inside the template.
    #[error("chat template: {0}")]
    Render(String),
    /// The template does too much work for these messages.
    #[error("chat template: exceeded its budget of work and memory")]
    Budget,
    /// The prompt is too long for these messages.
    #[error("chat template: the prompt is longer than {0} bytes")]
    TooLong(usize),
}

/// One message of a conversation.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant`, `tool` or what else the template knows.
    pub role: String,
    /// A string for nearly all templates; some take a list of parts, or `none` beside tool calls.
    #[serde(default)]
    pub content: Value,
    /// Everything else: `tool_calls`, `reasoning_content`, `name`, `tool_call_id`.
    #[serde(flatten)]
    pub extra: BTreeMap<String, Value>,
}

impl Message {
    /// A message of text.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Message {
        Message {
            role: role.into(),
            content: Value::from(content.into()),
            extra: BTreeMap::new(),
        }
    }
}

/// What templates may take into account besides the messages.
#[derive(Clone, Debug, Default)]
pub struct RenderOptions {
    /// End with the beginning of the assistant's answer.
    pub add_generation_prompt: bool,
    /// Tools that the model may call: a list of function descriptions.
    pub tools: Option<Value>,
    /// Documents to answer from.
    pub documents: Option<Value>,
    /// Whether a model that can think before it answers shall; `None` leaves it to the template.
    pub enable_thinking: Option<bool>,
    /// Further variables, which win over those above.
    pub extra: BTreeMap<String, Value>,
    /// What `strftime_now` takes for the present, as seconds since 1970 in the zone to be
    /// shown; `None` is now, UTC.
    pub now: Option<i64>,
}

/// A template that is known to be well-formed.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    source: String,
    /// Used instead when there are tools, as some models have a second template for them.
    tool_use: Option<String>,
    bos: Option<String>,
    eos: Option<String>,
    fallback: bool,
}

const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

/// What a rendering may cost besides what its messages explain: about this many instructions,
/// or 64 times this many bytes.
const BASE_FUEL: u64 = 1_000_000;
/// The longest prompt, besides what the messages explain.
const BASE_OUTPUT: usize = 1 << 20;
/// How many times the messages' size may a prompt have: some templates repeat the tools.
const OUTPUT_FACTOR: usize = 8;
/// Real templates have at most some tens of KiB.
const MAX_SOURCE_BYTES: usize = 1 << 17;
/// `minijinja` folds a chain of constant concatenations in cubic time; real templates have at
/// most some dozens.
const MAX_CONCATENATIONS: usize = 1000;
/// How a panic inside the renderer is reported; the fuzzers look for it.
pub(crate) const PANICKED: &str = "the renderer failed";
/// For as many levels as [`MAX_SOURCE_BYTES`] and [`BASE_FUEL`] can nest.
const STACK_BYTES: usize = 1 << 30;

impl std::str::FromStr for ChatTemplate {
    type Err = TemplateError;

    /// A template given by its text, with no beginning- and end-of-sequence tokens.
    fn from_str(source: &str) -> Result<ChatTemplate, TemplateError> {
        let template = ChatTemplate {
            source: without_generation_tags(source),
            tool_use: None,
            bos: None,
            eos: None,
            fallback: false,
        };
        check(&template.source)?;
        Ok(template)
    }
}

impl ChatTemplate {
    /// The template of a model file.
    ///
    /// # Errors
    /// No template and no ChatML tokens, or a template that can't be parsed.
    pub fn from_gguf(gguf: &Gguf) -> crate::Result<ChatTemplate> {
        Self::from_metadata(gguf.metadata())
    }

    /// The same from metadata alone.
    ///
    /// # Errors
    /// As [`ChatTemplate::from_gguf`].
    pub fn from_metadata(md: &Metadata) -> crate::Result<ChatTemplate> {
        let error = |source| crate::Error::Template {
            file: md.origin().to_owned(),
            source,
        };
        let tokens = md.strings("tokenizer.ggml.tokens")?.unwrap_or_default();
        let token = |key: &str| {
            let id = md.get(key).and_then(|v| v.as_int())?;
            tokens.get(usize::try_from(id).ok()?).cloned()
        };
        let mut template = match md.str("tokenizer.chat_template")? {
            Some(source) => source.parse().map_err(error)?,
            None => {
                let has = |text| tokens.iter().any(|t| t == text);
                if !has("<|im_start|>") || !has("<|im_end|>") {
                    return Err(error(TemplateError::Missing));
                }
                Self::chatml()
            }
        };
        if let Some(source) = md.str("tokenizer.chat_template.tool_use")? {
            let source = without_generation_tags(source);
            check(&source).map_err(error)?;
            template.tool_use = Some(source);
        }
        template.bos = token("tokenizer.ggml.bos_token_id");
        template.eos = token("tokenizer.ggml.eos_token_id");
        Ok(template)
    }

    /// ChatML: `<|im_start|>role`, a line break, the text and `<|im_end|>`.
    pub fn chatml() -> ChatTemplate {
        ChatTemplate {
            source: CHATML.to_owned(),
            tool_use: None,
            bos: None,
            eos: None,
            fallback: true,
        }
    }

    /// Sets what the template sees as `bos_token` and `eos_token`.
    pub fn with_tokens(mut self, bos: Option<String>, eos: Option<String>) -> ChatTemplate {
        self.bos = bos;
        self.eos = eos;
        self
    }

    /// The template's text.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Whether this is ChatML because the file has no template.
    pub fn is_fallback(&self) -> bool {
        self.fallback
    }

    /// The prompt for `messages`.
    ///
    /// The result is for [`Tokenizer::encode_chat`](crate::Tokenizer::encode_chat), which
    /// adds the beginning-of-sequence token if the template didn't.
    ///
    /// # Errors
    /// The template refuses the messages, fails, or exceeds its budget.
    pub fn render(
        &self,
        messages: &[Message],
        options: &RenderOptions,
    ) -> Result<String, TemplateError> {
        on_large_stack(|| self.render_here(messages, options))
    }

    fn render_here(
        &self,
        messages: &[Message],
        options: &RenderOptions,
    ) -> Result<String, TemplateError> {
        let mut context: BTreeMap<&str, Value> = BTreeMap::new();
        context.insert("messages", Value::from(Serde(messages)));
        context.insert(
            "add_generation_prompt",
            options.add_generation_prompt.into(),
        );
        // Templates tell "no tools" by `none`, not by the variable's absence.
        context.insert("tools", options.tools.clone().unwrap_or_else(|| ().into()));
        context.insert(
            "documents",
            options.documents.clone().unwrap_or_else(|| ().into()),
        );
        if let Some(think) = options.enable_thinking {
            context.insert("enable_thinking", think.into());
        }
        for (name, token) in [("bos_token", &self.bos), ("eos_token", &self.eos)] {
            if let Some(token) = token {
                context.insert(name, token.as_str().into());
            }
        }
        context.extend(
            options
                .extra
                .iter()
                .map(|(name, value)| (name.as_str(), value.clone())),
        );

        let mut size = Counter(0);
        serde_json::to_writer(&mut size, &context)
            .map_err(|e| TemplateError::Render(format!("messages that aren't plain data: {e}")))?;
        let mut env = environment(options.now).map_err(|e| render_error(&e))?;
        env.set_fuel(Some(BASE_FUEL.saturating_add(size.0 as u64)));
        let source = match &self.tool_use {
            Some(source) if options.tools.is_some() => source,
            _ => &self.source,
        };
        let max = size
            .0
            .saturating_mul(OUTPUT_FACTOR)
            .saturating_add(BASE_OUTPUT);
        let mut output = Limited {
            bytes: Vec::new(),
            max,
            exceeded: false,
        };
        let result = env.template_from_str(source).and_then(|t| {
            t.render_captured_to(Value::from(Serde(&context)), &mut output)
                .map(drop)
        });
        match result {
            Ok(()) => Ok(String::from_utf8_lossy(&output.bytes).into_owned()),
            Err(_) if output.exceeded => Err(TemplateError::TooLong(max)),
            Err(e) => Err(render_error(&e)),
        }
    }
}

/// Whether `source` can be parsed.
fn check(source: &str) -> Result<(), TemplateError> {
    if source.len() > MAX_SOURCE_BYTES {
        return Err(TemplateError::Syntax(format!(
            "{} bytes long; at most {MAX_SOURCE_BYTES} are supported",
            source.len()
        )));
    }
    if source.bytes().filter(|&b| b == b'~').count() > MAX_CONCATENATIONS {
        return Err(TemplateError::Syntax(format!(
            "more than {MAX_CONCATENATIONS} concatenations"
        )));
    }
    on_large_stack(|| {
        environment(Some(0))
            .and_then(|env| env.template_from_str(source).map(drop))
            .map_err(|e| TemplateError::Syntax(describe(&e)))
    })
}

/// Runs `work` where neither deeply nested templates nor deeply nested values, whose parsing
/// and dropping recurse, exhaust the stack. The memory is only taken as it is used.
fn on_large_stack<T: Send>(
    work: impl FnOnce() -> Result<T, TemplateError> + Send,
) -> Result<T, TemplateError> {
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .name("chat-template".into())
            .stack_size(STACK_BYTES)
            .spawn_scoped(scope, work)
            .map_err(|e| TemplateError::Render(format!("cannot start a thread: {e}")))?
            .join()
            .unwrap_or_else(|_| Err(TemplateError::Render(PANICKED.into())))
    })
}

/// What `raise_exception` puts before its message, to be told from other errors.
const REFUSED: &str = "raise_exception: ";

fn render_error(error: &JinjaError) -> TemplateError {
    let mut cause: Option<&dyn std::error::Error> = Some(error);
    while let Some(e) = cause {
        if let Some(e) = e.downcast_ref::<JinjaError>() {
            if e.kind() == ErrorKind::OutOfFuel {
                return TemplateError::Budget;
            }
            if let Some(message) = e.detail().and_then(|d| d.strip_prefix(REFUSED)) {
                return TemplateError::Refused(message.to_owned());
            }
        }
        cause = e.source();
    }
    TemplateError::Render(describe(error))
}

fn describe(error: &JinjaError) -> String {
    let what = match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    };
    match error.line() {
        Some(line) => format!("line {line}: {what}"),
        None => what,
    }
}

/// Jinja as `transformers` sets it up.
fn environment(now: Option<i64>) -> Result<Environment<'static>, JinjaError> {
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build()?;
    let mut env = Environment::new();
    env.set_syntax(syntax);
    env.set_recursion_limit(100);
    env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    env.add_function(
        "raise_exception",
        |message: String| -> Result<Value, JinjaError> {
            Err(JinjaError::new(
                ErrorKind::InvalidOperation,
                format!("{REFUSED}{message}"),
            ))
        },
    );
    env.add_function("strftime_now", move |format: &str| {
        time::strftime(format, now.unwrap_or_else(time::unix_now))
            .map_err(|e| JinjaError::new(ErrorKind::InvalidOperation, e))
    });
    env.add_filter("tojson", tojson);
    Ok(env)
}

/// `json.dumps` as `transformers` calls it: characters outside ASCII stay as they are.
fn tojson(state: &State, value: &Value, kwargs: Kwargs) -> Result<Value, JinjaError> {
    let failed = |e: String| JinjaError::new(ErrorKind::InvalidOperation, e);
    let indent: Option<Value> = kwargs.get("indent")?;
    let style = json::Style {
        indent: match indent.filter(|i| !i.is_none()) {
            Some(indent) => Some(usize::try_from(indent)?.min(64)),
            None => None,
        },
        ascii: kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        separators: match kwargs.get::<Option<Vec<String>>>("separators")? {
            Some(two) => match <[String; 2]>::try_from(two) {
                Ok([element, key]) => Some((element, key)),
                Err(_) => return Err(failed("tojson takes two separators".to_owned())),
            },
            None => None,
        },
    };
    let sort: Option<bool> = kwargs.get("sort_keys")?;
    kwargs.assert_all_used()?;
    let text = json::dumps(value, &style, sort.unwrap_or(false)).map_err(failed)?;
    state.consume_fuel(text.len() as u64 / 64)?;
    Ok(Value::from(text))
}

/// Takes out `{% generation %}` and `{% endgeneration %}`, by which `transformers` finds the
/// assistant's part of a text for training; white-space control stays.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(open) = rest.find("{%") {
        let (before, tag) = rest.split_at(open);
        out.push_str(before);
        // Behind the opening: in `{%}` its sign isn't the closing's.
        let Some(len) = tag[2..].find("%}").map(|at| at + 4) else {
            rest = tag;
            break;
        };
        let inner = &tag[2..len - 2];
        let (left, name) = match inner.strip_prefix(['-', '+']) {
            Some(name) => (&inner[..1], name),
            None => ("", inner),
        };
        let (right, name) = match name.strip_suffix(['-', '+']) {
            Some(stripped) => (&name[stripped.len()..], stripped),
            None => ("", name),
        };
        match name.trim() {
            "generation" => out.push_str(&format!("{{%{left} if true {right}%}}")),
            "endgeneration" => out.push_str(&format!("{{%{left} endif {right}%}}")),
            _ => out.push_str(&tag[..len]),
        }
        rest = &tag[len..];
    }
    out.push_str(rest);
    out
}

/// Counts what is written.
struct Counter(usize);

impl io::Write for Counter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 = self.0.saturating_add(bytes.len());
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Keeps what is written until it is too much.
struct Limited {
    bytes: Vec<u8>,
    max: usize,
    exceeded: bool,
}

impl io::Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len().saturating_add(bytes.len()) > self.max {
            self.exceeded = true;
            return Err(io::Error::other("the prompt is too long"));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::without_generation_tags;

    #[test]
    fn generation_tags_go_and_their_white_space_control_stays() {
        for (from, to) in [
            (
                "a{% generation %}b{% endgeneration %}c",
                "a{% if true %}b{% endif %}c",
            ),
            (
                "{%- generation -%}x{%-endgeneration+%}",
                "{%- if true -%}x{%- endif +%}",
            ),
            (
                "{% set generation = 1 %}{{ generation }}{% broken",
                "{% set generation = 1 %}{{ generation }}{% broken",
            ),
            ("no tags", "no tags"),
            ("{%} {%}{% x %}", "{%} {%}{% x %}"),
        ] {
            assert_eq!(without_generation_tags(from), to);
        }
    }
}
