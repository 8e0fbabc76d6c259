//! One model being served: requests become tasks, and what the server tells of itself.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use serde::Deserialize;
use serde_json::{Value, json};
use tegula_engine::Constraint;
use tegula_gguf::{
    ChatTemplate, Tokenizer,
    chat::{Message, RenderOptions, Serde, Value as TemplateValue},
    tokenizer::EncodeOptions,
};
use tegula_grammar::{Compiler, Grammar, Guide};

use crate::{
    answer::AnswerReader,
    api::{
        Answer, Common, Defaults, Draft, Prepared,
        chat::{ChatAnswer, ChatChoice},
        completion::{CompletionAnswer, CompletionChoice},
        embedding::EmbeddingAnswer,
        fields, messages,
        params::{Fields, MAX_TOP, OneOrMany},
        parse_body,
    },
    error::ApiError,
    scheduler::{Generate, Pooling, Scheduler, Sink, SlotState, Snapshot, Task, Work},
    tools::{self, Form, Reasoning, Tools},
};

/// Texts per request at most, to complete or to embed.
const MAX_TEXTS: usize = 2048;

/// What a service is made of, besides its scheduler.
#[derive(Clone, Debug)]
pub struct ServiceOptions {
    /// What `/v1/models` calls the model.
    pub name: String,
    /// Tokens that a sequence holds.
    pub context: usize,
    /// Rows of the output matrix.
    pub vocab: usize,
    /// Width of the hidden states.
    pub embedding: usize,
    pub defaults: Defaults,
    pub pooling: Pooling,
    /// How long a request may take, from its arrival on.
    pub timeout: Option<Duration>,
}

/// Understands requests. Everything here may be called from any thread, and what takes time
/// (templates, tokens, grammars) does so in the caller's.
pub struct Service {
    options: ServiceOptions,
    tokenizer: Tokenizer,
    /// Or why the model can't chat.
    template: Result<ChatTemplate, String>,
    form: Form,
    compiler: Compiler,
    started: SystemTime,
    requests: AtomicU64,
}

impl std::fmt::Debug for Service {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Service({})", self.options.name)
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct ChatFields {
    tools: Option<Value>,
    tool_choice: Option<Value>,
    parallel_tool_calls: Option<bool>,
    functions: Option<Value>,
    logprobs: Option<bool>,
    top_logprobs: Option<u32>,
    chat_template_kwargs: Option<BTreeMap<String, Value>>,
    reasoning_effort: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct CompletionFields {
    prompt: Option<Value>,
    echo: Option<bool>,
    suffix: Option<String>,
    best_of: Option<u32>,
    logprobs: Option<u32>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct EmbeddingFields {
    input: Option<Value>,
    encoding_format: Option<String>,
    dimensions: Option<usize>,
}

#[derive(Debug, Deserialize)]
struct TokenizeFields {
    content: String,
    #[serde(default)]
    add_special: bool,
    #[serde(default = "yes")]
    parse_special: bool,
    #[serde(default)]
    with_pieces: bool,
}

#[derive(Debug, Deserialize)]
struct DetokenizeFields {
    tokens: Vec<u32>,
}

fn yes() -> bool {
    true
}

impl Service {
    /// A service for the model with this tokenizer and, if it has one, template.
    pub fn new(
        options: ServiceOptions,
        tokenizer: &Tokenizer,
        template: Result<ChatTemplate, String>,
    ) -> Service {
        Service {
            options,
            form: template.as_ref().map_or(Form::Ours, Form::of),
            template,
            compiler: Compiler::new(tokenizer),
            tokenizer: tokenizer.clone(),
            started: SystemTime::now(),
            requests: AtomicU64::new(0),
        }
    }

    pub fn options(&self) -> &ServiceOptions {
        &self.options
    }

    /// The model's template, or why there is none.
    pub fn template(&self) -> Result<&ChatTemplate, &str> {
        self.template.as_ref().map_err(String::as_str)
    }

    /// Hands a request's tasks to the scheduler.
    ///
    /// # Errors
    /// When the queue is full or the server is about to end.
    pub fn submit(
        &self,
        scheduler: &Scheduler,
        owner: u32,
        drafts: Vec<Draft>,
        mut sink: impl FnMut(usize) -> Box<dyn Sink>,
    ) -> Result<(), ApiError> {
        let deadline = self.options.timeout.map(|timeout| Instant::now() + timeout);
        let tasks = drafts.into_iter().enumerate().map(|(i, draft)| Task {
            prompt: draft.prompt,
            work: draft.work,
            owner,
            reuse: draft.reuse,
            deadline,
            sink: sink(i),
        });
        Ok(scheduler.submit(tasks.collect())?)
    }

    /// Understands a request of `/v1/chat/completions`.
    ///
    /// # Errors
    /// Everything that is wrong with it.
    pub fn chat(&self, body: &[u8]) -> Result<Prepared, ApiError> {
        let value = parse_body(body)?;
        let common: Fields = fields(&value)?;
        let chat: ChatFields = fields(&value)?;
        if chat.functions.is_some_and(|functions| !functions.is_null()) {
            let message = "functions: superseded by tools, which are supported";
            return Err(ApiError::unsupported("functions", message));
        }
        let n = common.choices()?;
        let logprobs = top(
            chat.logprobs.unwrap_or(false),
            chat.top_logprobs,
            "top_logprobs",
        )?;
        let samplers = common.samplers(&self.options.defaults, self.options.vocab, n)?;
        let limit = common.limit(&self.options.defaults)?;
        let stop = common.stops()?;
        let tools = Tools::parse(
            chat.tools.as_ref(),
            chat.tool_choice.as_ref(),
            chat.parallel_tool_calls.unwrap_or(true),
        )?;
        let messages = messages::messages(&value["messages"])?;
        let think = match chat.reasoning_effort.as_deref() {
            Some("none" | "minimal") => Some(false),
            _ => None,
        };
        let extra = chat.chat_template_kwargs.unwrap_or_default();
        let (prompt, reasoning) = self.render(messages, tools.as_ref(), think, extra)?;
        self.check_prompt(&prompt, "messages")?;
        let format = common.format()?;
        let guide = self.chat_guide(tools.as_ref(), format.as_ref(), reasoning)?;
        let choices = (0..n).map(|_| {
            let tools = tools.clone().map(|tools| (self.form, tools));
            ChatChoice::new(AnswerReader::new(reasoning, tools))
        });
        let choices = choices.collect();
        let drafts = samplers.into_iter().map(|sampler| Draft {
            prompt: prompt.clone(),
            work: Work::Generate(Box::new(Generate {
                limit,
                stop: stop.clone(),
                sampler,
                ignore_eog: common.ignore_eos.unwrap_or(false),
                logprobs,
                constraint: boxed(guide.as_ref()),
            })),
            reuse: common.cache_prompt.unwrap_or(true),
        });
        Ok(Prepared {
            drafts: drafts.collect(),
            stream: common.stream.unwrap_or(false),
            answer: Answer::Chat(Box::new(ChatAnswer {
                common: self.common("chatcmpl", &common, n),
                choices,
                logprobs: logprobs.is_some(),
            })),
        })
    }

    /// The prompt of a conversation, and whether its answer reasons.
    fn render(
        &self,
        mut messages: Vec<Message>,
        tools: Option<&Tools>,
        think: Option<bool>,
        extra: BTreeMap<String, Value>,
    ) -> Result<(Vec<u32>, Reasoning), ApiError> {
        let template = self.template.as_ref().map_err(|why| {
            ApiError::new(
                400,
                "no_chat_template",
                format!("{why}; use /v1/completions"),
            )
        })?;
        let ours = self.form == Form::Ours;
        if ours {
            messages = tools::explain(messages, tools);
        }
        let tools = tools.filter(|_| !ours).map(Tools::json);
        let options = RenderOptions {
            add_generation_prompt: true,
            tools: tools.map(|tools| TemplateValue::from(Serde(&tools))),
            enable_thinking: think,
            extra: extra
                .into_iter()
                .map(|(key, value)| (key, TemplateValue::from(Serde(&value))))
                .collect(),
            ..RenderOptions::default()
        };
        let text = template.render(&messages, &options)?;
        let reasoning = if text.trim_end().ends_with("<think>") {
            Reasoning::Open
        } else if template.source().contains("<think>") {
            Reasoning::May
        } else {
            Reasoning::No
        };
        Ok((self.tokenizer.encode_chat(&text), reasoning))
    }

    fn chat_guide(
        &self,
        tools: Option<&Tools>,
        format: Option<&Grammar>,
        reasoning: Reasoning,
    ) -> Result<Option<Guide>, ApiError> {
        if let Some(grammar @ Grammar::Grammar(_)) = format {
            if tools.is_some() {
                let message = "grammar: can't be combined with tools";
                return Err(ApiError::field("grammar", message));
            }
            return Ok(Some(self.compiler.compile(grammar)?));
        }
        let lark = tools::answer_grammar(self.form, tools, format, reasoning)?;
        let what = match tools.is_some() {
            true => "tools' parameters",
            false => "format of the response",
        };
        Ok(match lark {
            None => None,
            Some(lark) => Some(self.compiler.compile_lark(what, lark)?),
        })
    }

    /// Understands a request of `/v1/completions`.
    ///
    /// # Errors
    /// Everything that is wrong with it.
    pub fn completion(&self, body: &[u8]) -> Result<Prepared, ApiError> {
        let value = parse_body(body)?;
        let common: Fields = fields(&value)?;
        let own: CompletionFields = fields(&value)?;
        let n = common.choices()?;
        if own.suffix.is_some_and(|suffix| !suffix.is_empty()) {
            let message = "suffix: filling in the middle is not supported";
            return Err(ApiError::unsupported("suffix", message));
        }
        if own.best_of.is_some_and(|best| best as usize > n) {
            let message = "best_of: choosing among more than n is not supported";
            return Err(ApiError::unsupported("best_of", message));
        }
        let logprobs = top(own.logprobs.is_some(), own.logprobs, "logprobs")?;
        let echo = own.echo.unwrap_or(false);
        if echo && logprobs.is_some() {
            let message = "echo: log-probabilities of the prompt are not supported";
            return Err(ApiError::unsupported("echo", message));
        }
        let prompts = self.texts(own.prompt.as_ref(), "prompt")?;
        let samplers = common.samplers(&self.options.defaults, self.options.vocab, n)?;
        let limit = common.limit(&self.options.defaults)?;
        let stop = common.stops()?;
        let guide = match common.format()? {
            None => None,
            Some(grammar) => Some(self.compiler.compile(&grammar)?),
        };
        let mut drafts = Vec::new();
        let mut choices = Vec::new();
        for prompt in prompts {
            self.check_prompt(&prompt, "prompt")?;
            for sampler in &samplers {
                let shown = echo.then(|| self.tokenizer.decode(&prompt));
                choices.push(CompletionChoice::new(shown));
                drafts.push(Draft {
                    prompt: prompt.clone(),
                    work: Work::Generate(Box::new(Generate {
                        limit,
                        stop: stop.clone(),
                        sampler: sampler.clone(),
                        ignore_eog: common.ignore_eos.unwrap_or(false),
                        logprobs,
                        constraint: boxed(guide.as_ref()),
                    })),
                    reuse: common.cache_prompt.unwrap_or(true),
                });
            }
        }
        if drafts.len() > MAX_TEXTS {
            let message = format!("prompt: at most {MAX_TEXTS} answers per request");
            return Err(ApiError::field("prompt", message));
        }
        let common_part = self.common("cmpl", &common, drafts.len());
        Ok(Prepared {
            drafts,
            stream: common.stream.unwrap_or(false),
            answer: Answer::Completion(Box::new(CompletionAnswer {
                common: common_part,
                choices,
                n,
                logprobs: logprobs.is_some(),
            })),
        })
    }

    /// Understands a request of `/v1/embeddings`.
    ///
    /// # Errors
    /// Everything that is wrong with it.
    pub fn embedding(&self, body: &[u8]) -> Result<Prepared, ApiError> {
        let value = parse_body(body)?;
        let own: EmbeddingFields = fields(&value)?;
        let base64 = match own.encoding_format.as_deref() {
            None | Some("float") => false,
            Some("base64") => true,
            Some(_) => {
                let message = "encoding_format: expected float or base64";
                return Err(ApiError::field("encoding_format", message));
            }
        };
        let width = self.options.embedding;
        if own.dimensions.is_some_and(|d| d != width) {
            let message = format!("dimensions: this model has {width}, no more and no fewer");
            return Err(ApiError::unsupported("dimensions", message));
        }
        let texts = self.texts(own.input.as_ref(), "input")?;
        let mut tokens = 0;
        for text in &texts {
            self.check_prompt(text, "input")?;
            tokens += text.len();
        }
        let pooling = self.options.pooling;
        let drafts: Vec<_> = texts
            .into_iter()
            .map(|prompt| Draft {
                prompt,
                work: Work::Embed(pooling),
                reuse: false,
            })
            .collect();
        let answer = EmbeddingAnswer {
            model: self.options.name.clone(),
            vectors: vec![None; drafts.len()],
            tokens,
            base64,
        };
        Ok(Prepared {
            drafts,
            stream: false,
            answer: Answer::Embedding(answer),
        })
    }

    /// A string, tokens, or a list of either.
    fn texts(&self, value: Option<&Value>, param: &str) -> Result<Vec<Vec<u32>>, ApiError> {
        let wrong = || {
            let message = format!("{param}: expected a string, tokens, or a list of either");
            ApiError::field(param, message)
        };
        let value = match value {
            None | Some(Value::Null) => {
                return Err(ApiError::field(param, format!("{param} is missing")));
            }
            Some(value) => value,
        };
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Text {
            Text(String),
            Tokens(Vec<u32>),
        }
        let tokens = Vec::<u32>::deserialize(value)
            .ok()
            .filter(|t| !t.is_empty());
        let texts: Vec<Text> = match tokens {
            Some(tokens) => vec![Text::Tokens(tokens)],
            None => OneOrMany::<Text>::deserialize(value)
                .map_err(|_| wrong())?
                .into_vec(),
        };
        if texts.is_empty() || texts.len() > MAX_TEXTS {
            let message = format!("{param}: {} texts, not 1 to {MAX_TEXTS}", texts.len());
            return Err(ApiError::field(param, message));
        }
        texts
            .into_iter()
            .map(|text| match text {
                Text::Text(text) => Ok(self.tokenizer.encode(&text, EncodeOptions::default())),
                Text::Tokens(tokens) => match tokens.iter().find(|&&id| !self.has_token(id)) {
                    None => Ok(tokens),
                    Some(id) => {
                        let message = format!("{param}: token {id} is outside the vocabulary");
                        Err(ApiError::field(param, message))
                    }
                },
            })
            // A text of nothing: what a model takes for its beginning.
            .map(|ids| {
                let mut ids = ids?;
                if ids.is_empty() {
                    ids.extend(self.tokenizer.bos().or(self.tokenizer.eos()));
                }
                match ids.is_empty() {
                    false => Ok(ids),
                    true => Err(ApiError::field(param, format!("{param} is empty"))),
                }
            })
            .collect()
    }

    fn has_token(&self, id: u32) -> bool {
        (id as usize) < self.options.vocab.min(self.tokenizer.vocab_size())
    }

    fn check_prompt(&self, prompt: &[u32], param: &str) -> Result<(), ApiError> {
        let (len, context) = (prompt.len(), self.options.context);
        if len > context {
            let message = format!(
                "{param}: {len} tokens are more than the context of {context} holds; shorten it, \
                 or give the server a larger -c"
            );
            return Err(ApiError::new(400, "context_length_exceeded", message).with_param(param));
        }
        if prompt.is_empty() {
            return Err(ApiError::field(
                param,
                format!("{param}: there is nothing to answer"),
            ));
        }
        Ok(())
    }

    fn common(&self, prefix: &str, fields: &Fields, tasks: usize) -> Common {
        let number = self.requests.fetch_add(1, Ordering::Relaxed);
        let start = seconds(self.started);
        Common {
            id: format!("{prefix}-{start:x}-{number:x}"),
            created: seconds(SystemTime::now()),
            model: self.options.name.clone(),
            stream: fields.stream.unwrap_or(false),
            include_usage: fields.include_usage(),
            tokenizer: self.tokenizer.clone(),
            finished: vec![None; tasks],
        }
    }

    /// The response of `/v1/models`.
    pub fn models(&self) -> Value {
        json!({"object": "list", "data": [self.model()]})
    }

    /// One model of [`Service::models`].
    pub fn model(&self) -> Value {
        json!({
            "id": self.options.name,
            "object": "model",
            "created": seconds(self.started),
            "owned_by": "tegula",
            "meta": {
                "n_ctx_train": self.options.context,
                "n_embd": self.options.embedding,
                "n_vocab": self.options.vocab,
            },
        })
    }

    /// The response of `/tokenize`.
    ///
    /// # Errors
    /// A body without a text.
    pub fn tokenize(&self, body: &[u8]) -> Result<Value, ApiError> {
        let value = parse_body(body)?;
        let f: TokenizeFields = fields(&value)?;
        let options = EncodeOptions {
            add_special: f.add_special,
            parse_special: f.parse_special,
        };
        let ids = self.tokenizer.encode(&f.content, options);
        let tokens: Value = match f.with_pieces {
            false => ids.into(),
            true => ids
                .into_iter()
                .map(|id| {
                    // Bytes that are no text on their own are shown as numbers.
                    let piece = match String::from_utf8(self.tokenizer.piece(id)) {
                        Ok(text) => Value::from(text),
                        Err(e) => e.into_bytes().into(),
                    };
                    json!({"id": id, "piece": piece})
                })
                .collect(),
        };
        Ok(json!({"tokens": tokens}))
    }

    /// The response of `/detokenize`.
    ///
    /// # Errors
    /// A body without tokens of the vocabulary.
    pub fn detokenize(&self, body: &[u8]) -> Result<Value, ApiError> {
        let value = parse_body(body)?;
        let f: DetokenizeFields = fields(&value)?;
        if let Some(id) = f.tokens.iter().find(|&&id| !self.has_token(id)) {
            let message = format!("tokens: {id} is outside the vocabulary");
            return Err(ApiError::field("tokens", message));
        }
        let pieces = f.tokens.iter().flat_map(|&id| self.tokenizer.piece(id));
        let bytes: Vec<u8> = pieces.collect();
        Ok(json!({"content": String::from_utf8_lossy(&bytes)}))
    }

    /// The response of `/props`.
    pub fn props(&self, slots: usize) -> Value {
        let text = |id: Option<u32>| Some(self.tokenizer.token_text(id?)?.to_owned());
        let s = &self.options.defaults.sampler;
        json!({
            "model_alias": self.options.name,
            "total_slots": slots,
            "chat_template": self.template().map_or("", ChatTemplate::source),
            "bos_token": text(self.tokenizer.bos()).unwrap_or_default(),
            "eos_token": text(self.tokenizer.eos()).unwrap_or_default(),
            "build_info": concat!("tegula ", env!("CARGO_PKG_VERSION")),
            "modalities": {"vision": false, "audio": false},
            "default_generation_settings": {
                "n_ctx": self.options.context,
                "params": {
                    "n_predict": self.options.defaults.limit.map_or(-1, |n| n as i64),
                    "temperature": s.temperature,
                    "top_k": s.top_k,
                    "top_p": s.top_p,
                    "min_p": s.min_p,
                    "typical_p": s.typical,
                    "repeat_penalty": s.repeat_penalty,
                    "repeat_last_n": s.penalty_last_n.min(self.options.context),
                    "presence_penalty": s.presence_penalty,
                    "frequency_penalty": s.frequency_penalty,
                },
            },
        })
    }

    /// The response of `/slots`.
    pub fn slots(&self, snapshot: &Snapshot) -> Value {
        let state = |state| match state {
            SlotState::Idle => "idle",
            SlotState::Prompt => "prompt",
            SlotState::Generating => "generating",
            SlotState::Embedding => "embedding",
        };
        let slots = snapshot.slots.iter().enumerate().map(|(id, slot)| {
            json!({
                "id": id,
                "id_task": slot.task,
                "n_ctx": self.options.context,
                "state": state(slot.state),
                "is_processing": slot.state != SlotState::Idle,
                "n_prompt_tokens": slot.prompt_tokens,
                "n_prompt_tokens_processed": slot.prompt_done,
                "n_prompt_tokens_cache": slot.cached_tokens,
                "n_decoded": slot.generated_tokens,
                "n_predict": slot.limit,
            })
        });
        slots.collect()
    }
}

/// How many of the likeliest tokens are wanted, if any.
fn top(wanted: bool, count: Option<u32>, param: &str) -> Result<Option<usize>, ApiError> {
    let count = count.unwrap_or(0);
    if count > MAX_TOP {
        let message = format!("{param}: {count} is more than {MAX_TOP}");
        return Err(ApiError::field(param, message));
    }
    if !wanted && count > 0 {
        let message = format!("{param}: needs logprobs to be true");
        return Err(ApiError::field(param, message));
    }
    Ok(wanted.then_some(count as usize))
}

fn boxed(guide: Option<&Guide>) -> Option<Box<dyn Constraint>> {
    guide.map(|guide| Box::new(guide.clone()) as Box<dyn Constraint>)
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}
