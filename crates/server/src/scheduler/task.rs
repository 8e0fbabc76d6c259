//! What is asked of the scheduler and what it answers.

use std::time::Instant;

use tegula_engine::{Constraint, SamplerOptions};

/// One prompt and what to do with it.
pub struct Task {
    /// Token ids, not empty.
    pub prompt: Vec<u32>,
    pub work: Work,
    /// Who asks: only tasks of one owner share cached prefixes, since how fast an answer
    /// begins shows whether somebody asked the like before.
    pub owner: u32,
    /// Use cached prefixes, and leave this one behind.
    pub reuse: bool,
    /// When it is no longer wanted.
    pub deadline: Option<Instant>,
    pub sink: Box<dyn Sink>,
}

/// What to do with a prompt.
pub enum Work {
    Generate(Box<Generate>),
    Embed(Pooling),
}

/// How to go on behind the prompt.
pub struct Generate {
    /// Tokens at most; `None`: until the context is full.
    pub limit: Option<usize>,
    /// Texts that end the answer.
    pub stop: Vec<String>,
    pub sampler: SamplerOptions,
    pub ignore_eog: bool,
    /// Report each token's log-probability, and those of this many likeliest ones.
    pub logprobs: Option<usize>,
    pub constraint: Option<Box<dyn Constraint>>,
}

/// How the hidden states of a text become one vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// Their mean.
    Mean,
    /// That of the last token.
    Last,
}

impl Pooling {
    /// As flags and metadata name it.
    pub fn parse(name: &str) -> Option<Pooling> {
        match name {
            "mean" => Some(Pooling::Mean),
            "last" => Some(Pooling::Last),
            _ => None,
        }
    }
}

/// Where a task's events go.
pub trait Sink: Send {
    /// Delivers an event; false if nobody listens any more.
    fn send(&mut self, event: Event) -> bool;

    /// Whether somebody listens.
    fn is_open(&self) -> bool;
}

/// What happens to a task. The last event is [`Event::Done`], [`Event::Embedding`] or
/// [`Event::Failed`]; none follows if nobody listens.
#[derive(Clone, Debug)]
pub enum Event {
    /// More of the answer.
    Text(Piece),
    /// The answer is complete.
    Done(Finished),
    /// The text's vector, of length 1.
    Embedding(Vec<f32>),
    Failed(Failure),
}

/// A part of an answer: text that is certain, and the tokens that it consists of.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Piece {
    pub text: String,
    /// Only if they were asked for.
    pub tokens: Vec<TokenLogprob>,
}

/// How likely a token was, before sampling changed anything.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprob {
    pub id: u32,
    pub logprob: f32,
    /// The likeliest tokens, best first.
    pub top: Vec<(u32, f32)>,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The model ended it, a stop string came up, or the grammar allows no more.
    Stop,
    /// The limit was reached or the context is full.
    Length,
}

/// The end of an answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Finished {
    pub reason: Reason,
    pub prompt_tokens: usize,
    /// Of these, how many were already in the cache.
    pub cached_tokens: usize,
    pub generated_tokens: usize,
    /// From the first prompt token's run to the first token.
    pub prompt_ms: f64,
    /// From the first token to the last.
    pub decode_ms: f64,
}

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Failure {
    #[error("the request took longer than it may")]
    Deadline,
    #[error("the server is shutting down")]
    Shutdown,
    #[error("the grammar can't go on: {0}")]
    Constraint(String),
    #[error("the model failed: {0}")]
    Engine(String),
}

/// Why tasks were not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refused {
    #[error("{waiting} requests are waiting already")]
    Full {
        waiting: usize,
        /// When to try again.
        retry_after_s: u64,
    },
    #[error("the server is shutting down")]
    ShuttingDown,
    #[error("the inference thread has ended")]
    Dead,
}
