//! Answers of `/v1/completions`.

use serde_json::{Map, Value, json};

use super::{Common, chat::finite, timings};
use crate::scheduler::{Event, Finished, Reason, TokenLogprob};

/// One choice on its way.
#[derive(Default)]
pub(crate) struct CompletionChoice {
    /// The prompt, where it is to be repeated, until it is.
    echo: Option<String>,
    text: String,
    logprobs: Logprobs,
    /// Characters so far, for the offsets.
    offset: usize,
}

impl CompletionChoice {
    pub fn new(echo: Option<String>) -> CompletionChoice {
        CompletionChoice {
            echo,
            ..CompletionChoice::default()
        }
    }
}

#[derive(Default)]
struct Logprobs {
    tokens: Vec<String>,
    logprobs: Vec<f32>,
    top: Vec<Value>,
    offsets: Vec<usize>,
}

impl Logprobs {
    fn json(&mut self) -> Value {
        let Logprobs {
            tokens,
            logprobs,
            top,
            offsets,
        } = std::mem::take(self);
        json!({
            "tokens": tokens,
            "token_logprobs": logprobs,
            "top_logprobs": top,
            "text_offset": offsets,
        })
    }
}

/// The answer to a completion request: `n` choices for each of its prompts.
pub struct CompletionAnswer {
    pub(crate) common: Common,
    pub(crate) choices: Vec<CompletionChoice>,
    /// Choices per prompt.
    pub(crate) n: usize,
    pub(crate) logprobs: bool,
}

impl CompletionAnswer {
    pub(crate) fn event(&mut self, task: usize, event: Event) -> Vec<Value> {
        match event {
            Event::Text(piece) => self.text(task, &piece.text, &piece.tokens),
            Event::Done(done) => self.finish(task, done),
            Event::Embedding(_) | Event::Failed(_) => Vec::new(),
        }
    }

    fn text(&mut self, task: usize, text: &str, tokens: &[TokenLogprob]) -> Vec<Value> {
        let choice = &mut self.choices[task];
        let mut shown = choice.echo.take().unwrap_or_default();
        choice.offset += shown.chars().count();
        for token in tokens {
            let (text, _) = self.common.token(token.id);
            let top: Map<String, Value> = token
                .top
                .iter()
                .map(|&(id, p)| (self.common.token(id).0, finite(p).into()))
                .collect();
            choice.logprobs.offsets.push(choice.offset);
            choice.offset += text.chars().count();
            choice.logprobs.tokens.push(text);
            choice.logprobs.logprobs.push(finite(token.logprob));
            choice.logprobs.top.push(top.into());
        }
        shown += text;
        if !self.common.stream {
            choice.text += &shown;
            return Vec::new();
        }
        let logprobs = match self.logprobs {
            true => choice.logprobs.json(),
            false => Value::Null,
        };
        vec![self.chunk(json!({
            "index": task, "text": shown, "logprobs": logprobs, "finish_reason": null,
        }))]
    }

    fn chunk(&self, choice: Value) -> Value {
        let mut rest = json!({"choices": [choice]});
        if self.common.include_usage {
            rest["usage"] = Value::Null;
        }
        self.common.object("text_completion", rest)
    }

    fn finish(&mut self, task: usize, done: Finished) -> Vec<Value> {
        let mut chunks = Vec::new();
        if self.choices[task].echo.is_some() {
            // Nothing was generated: the prompt is still to be shown.
            chunks = self.text(task, "", &[]);
        }
        let (reason, times) = (reason(&done), timings(&done));
        self.common.finished[task] = Some(done);
        if !self.common.stream {
            return Vec::new();
        }
        let mut last = self.chunk(json!({
            "index": task, "text": "", "logprobs": null, "finish_reason": reason,
        }));
        last["timings"] = times;
        chunks.push(last);
        if self.common.include_usage && self.common.is_done() {
            let usage = json!({"choices": [], "usage": self.usage()});
            chunks.push(self.common.object("text_completion", usage));
        }
        chunks
    }

    /// Each prompt counts once.
    fn usage(&self) -> Value {
        let sum = |of: fn(&Finished) -> usize, step: usize| -> usize {
            let done = self.common.finished.iter().step_by(step).flatten();
            done.map(of).sum()
        };
        let prompt = sum(|f| f.prompt_tokens, self.n);
        let generated = sum(|f| f.generated_tokens, 1);
        json!({
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": sum(|f| f.cached_tokens, self.n)},
        })
    }

    pub(crate) fn body(mut self) -> Value {
        let mut choices = Vec::new();
        for (i, choice) in self.choices.iter_mut().enumerate() {
            let done = self.common.finished[i].as_ref();
            let logprobs = match self.logprobs {
                true => choice.logprobs.json(),
                false => Value::Null,
            };
            choices.push(json!({
                "index": i,
                "text": std::mem::take(&mut choice.text),
                "logprobs": logprobs,
                "finish_reason": done.map(reason),
            }));
        }
        let first = self.common.finished.first().and_then(Option::as_ref);
        let rest = json!({
            "choices": choices,
            "usage": self.usage(),
            "timings": first.map(timings),
        });
        self.common.object("text_completion", rest)
    }
}

fn reason(done: &Finished) -> &'static str {
    match done.reason {
        Reason::Stop => "stop",
        Reason::Length => "length",
    }
}
