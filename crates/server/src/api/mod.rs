//! The requests and responses of OpenAI's API.

pub mod chat;
pub mod completion;
pub mod embedding;
pub(crate) mod messages;
pub(crate) mod params;

pub use params::Defaults;
pub(crate) use params::{fields, parse_body};

use serde_json::{Value, json};
use tegula_gguf::Tokenizer;

use crate::{
    error::ApiError,
    scheduler::{Event, Finished, Work},
};

/// A task to be, without its sink.
pub struct Draft {
    pub prompt: Vec<u32>,
    pub work: Work,
    pub reuse: bool,
}

/// A request that is understood: what is to be run, and how the answer is written.
pub struct Prepared {
    pub drafts: Vec<Draft>,
    /// Answer with a stream of chunks.
    pub stream: bool,
    pub answer: Answer,
}

/// Writes an answer from the tasks' events.
pub enum Answer {
    Chat(Box<chat::ChatAnswer>),
    Completion(Box<completion::CompletionAnswer>),
    Embedding(embedding::EmbeddingAnswer),
}

impl Answer {
    /// Takes an event of the task with this number in [`Prepared::drafts`] and returns the
    /// chunks that a stream sends for it.
    ///
    /// # Errors
    /// When the task failed.
    pub fn event(&mut self, task: usize, event: Event) -> Result<Vec<Value>, ApiError> {
        let event = match event {
            Event::Failed(failure) => return Err(failure.into()),
            event => event,
        };
        Ok(match self {
            Answer::Chat(answer) => answer.event(task, event),
            Answer::Completion(answer) => answer.event(task, event),
            Answer::Embedding(answer) => {
                answer.event(task, event);
                Vec::new()
            }
        })
    }

    /// Whether all tasks are done.
    pub fn is_done(&self) -> bool {
        match self {
            Answer::Chat(answer) => answer.common.is_done(),
            Answer::Completion(answer) => answer.common.is_done(),
            Answer::Embedding(answer) => answer.is_done(),
        }
    }

    /// The whole response, when all tasks are done.
    pub fn body(self) -> Value {
        match self {
            Answer::Chat(answer) => answer.body(),
            Answer::Completion(answer) => answer.body(),
            Answer::Embedding(answer) => answer.body(),
        }
    }
}

/// What chat and completion answers have in common.
pub(crate) struct Common {
    pub id: String,
    pub created: u64,
    pub model: String,
    pub stream: bool,
    pub include_usage: bool,
    pub tokenizer: Tokenizer,
    pub finished: Vec<Option<Finished>>,
}

impl Common {
    pub fn is_done(&self) -> bool {
        self.finished.iter().all(Option::is_some)
    }

    /// An object of the API: the head, and what `rest` adds.
    pub fn object(&self, name: &str, rest: Value) -> Value {
        let mut object = json!({
            "id": self.id,
            "object": name,
            "created": self.created,
            "model": self.model,
        });
        if let (Value::Object(to), Value::Object(from)) = (&mut object, rest) {
            to.extend(from);
        }
        object
    }

    /// Tokens of all choices; the prompt counts once.
    pub fn usage(&self) -> Value {
        let done = self.finished.iter().flatten();
        let generated: usize = done.map(|f| f.generated_tokens).sum();
        let first = self.finished.first().and_then(Option::as_ref);
        let prompt = first.map_or(0, |f| f.prompt_tokens);
        json!({
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": first.map_or(0, |f| f.cached_tokens)},
        })
    }

    /// A token as log-probabilities name it.
    pub fn token(&self, id: u32) -> (String, Vec<u8>) {
        let bytes = self.tokenizer.piece(id);
        (String::from_utf8_lossy(&bytes).into_owned(), bytes)
    }
}

/// llama.cpp's account of the time an answer took.
pub(crate) fn timings(done: &Finished) -> Value {
    let rate = |n: usize, ms: f64| if ms > 0.0 { n as f64 * 1e3 / ms } else { 0.0 };
    let run = done.prompt_tokens - done.cached_tokens;
    let behind_first = done.generated_tokens.saturating_sub(1);
    json!({
        "cache_n": done.cached_tokens,
        "prompt_n": run,
        "prompt_ms": done.prompt_ms,
        "prompt_per_second": rate(run, done.prompt_ms),
        "predicted_n": done.generated_tokens,
        "predicted_ms": done.decode_ms,
        "predicted_per_second": rate(behind_first, done.decode_ms),
    })
}
