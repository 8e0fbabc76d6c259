//! Answers of `/v1/chat/completions`.

use serde_json::{Value, json};

use super::{Common, timings};
use crate::{
    answer::{AnswerReader, Part},
    scheduler::{Event, Finished, Reason, TokenLogprob},
};

/// One choice on its way.
pub(crate) struct ChatChoice {
    pub reader: AnswerReader,
    /// Whether the role has been sent.
    begun: bool,
    content: String,
    reasoning: String,
    calls: Vec<Value>,
    logprobs: Vec<Value>,
}

impl ChatChoice {
    pub fn new(reader: AnswerReader) -> ChatChoice {
        ChatChoice {
            reader,
            begun: false,
            content: String::new(),
            reasoning: String::new(),
            calls: Vec::new(),
            logprobs: Vec::new(),
        }
    }
}

/// The answer to a chat request.
pub struct ChatAnswer {
    pub(crate) common: Common,
    pub(crate) choices: Vec<ChatChoice>,
    pub(crate) logprobs: bool,
}

impl ChatAnswer {
    pub(crate) fn event(&mut self, task: usize, event: Event) -> Vec<Value> {
        match event {
            Event::Text(piece) => {
                let parts = self.choices[task].reader.push(&piece.text);
                self.parts(task, parts, piece.tokens)
            }
            Event::Done(done) => {
                let parts = self.choices[task].reader.finish();
                let mut chunks = self.parts(task, parts, Vec::new());
                chunks.extend(self.finish(task, done));
                chunks
            }
            Event::Embedding(_) | Event::Failed(_) => Vec::new(),
        }
    }

    fn parts(&mut self, task: usize, parts: Vec<Part>, tokens: Vec<TokenLogprob>) -> Vec<Value> {
        let mut logprobs: Vec<Value> = tokens.iter().map(|t| self.logprob(t)).collect();
        let stream = self.common.stream;
        let choice = &mut self.choices[task];
        let mut deltas = Vec::new();
        if stream && !choice.begun {
            choice.begun = true;
            deltas.push(json!({"role": "assistant", "content": ""}));
        }
        for part in parts {
            deltas.push(match part {
                Part::Content(text) if stream => json!({"content": text}),
                Part::Reasoning(text) if stream => json!({"reasoning_content": text}),
                Part::Content(text) => {
                    choice.content += &text;
                    continue;
                }
                Part::Reasoning(text) => {
                    choice.reasoning += &text;
                    continue;
                }
                Part::Call(call) => {
                    let index = choice.calls.len();
                    let mut value = json!({
                        "id": format!("call_{}_{task}_{index}", self.common.id),
                        "type": "function",
                        "function": {"name": call.name, "arguments": call.arguments},
                    });
                    choice.calls.push(value.clone());
                    value["index"] = index.into();
                    json!({"tool_calls": [value]})
                }
            });
        }
        if !stream {
            choice.logprobs.append(&mut logprobs);
            return Vec::new();
        }
        if !logprobs.is_empty() && deltas.is_empty() {
            deltas.push(json!({"content": ""}));
        }
        let last = deltas.len().wrapping_sub(1);
        let chunk = |(i, delta): (usize, Value)| {
            let mut choice = json!({"index": task, "delta": delta, "finish_reason": null});
            choice["logprobs"] = match i == last && !logprobs.is_empty() {
                true => json!({"content": std::mem::take(&mut logprobs)}),
                false => Value::Null,
            };
            choice
        };
        let choices: Vec<_> = deltas.into_iter().enumerate().map(chunk).collect();
        choices.into_iter().map(|c| self.chunk(c)).collect()
    }

    fn chunk(&self, choice: Value) -> Value {
        let mut rest = json!({"choices": [choice]});
        if self.common.include_usage {
            rest["usage"] = Value::Null;
        }
        self.common.object("chat.completion.chunk", rest)
    }

    fn finish(&mut self, task: usize, done: Finished) -> Vec<Value> {
        let reason = self.reason(task, &done);
        let times = timings(&done);
        self.common.finished[task] = Some(done);
        if !self.common.stream {
            return Vec::new();
        }
        let mut chunks = Vec::new();
        let mut last = self.chunk(json!({
            "index": task, "delta": {}, "logprobs": null, "finish_reason": reason,
        }));
        last["timings"] = times;
        chunks.push(last);
        if self.common.include_usage && self.common.is_done() {
            let usage = json!({"choices": [], "usage": self.common.usage()});
            chunks.push(self.common.object("chat.completion.chunk", usage));
        }
        chunks
    }

    fn reason(&self, task: usize, done: &Finished) -> &'static str {
        match done.reason {
            Reason::Length => "length",
            Reason::Stop if !self.choices[task].calls.is_empty() => "tool_calls",
            Reason::Stop => "stop",
        }
    }

    fn logprob(&self, token: &TokenLogprob) -> Value {
        let one = |id: u32, logprob: f32| {
            let (text, bytes) = self.common.token(id);
            json!({"token": text, "logprob": finite(logprob), "bytes": bytes})
        };
        let mut value = one(token.id, token.logprob);
        value["top_logprobs"] = token.top.iter().map(|&(id, p)| one(id, p)).collect();
        value
    }

    pub(crate) fn body(mut self) -> Value {
        let finished = std::mem::take(&mut self.common.finished);
        let mut choices = Vec::new();
        for (i, done) in finished.iter().enumerate() {
            let reason = done.as_ref().map(|done| self.reason(i, done));
            let choice = &mut self.choices[i];
            let mut message = json!({"role": "assistant"});
            let content = std::mem::take(&mut choice.content);
            message["content"] = match content.is_empty() && !choice.calls.is_empty() {
                true => Value::Null,
                false => content.into(),
            };
            message["refusal"] = Value::Null;
            if !choice.reasoning.is_empty() {
                message["reasoning_content"] = std::mem::take(&mut choice.reasoning).into();
            }
            if !choice.calls.is_empty() {
                message["tool_calls"] = std::mem::take(&mut choice.calls).into();
            }
            let logprobs = match self.logprobs {
                true => json!({"content": std::mem::take(&mut choice.logprobs)}),
                false => Value::Null,
            };
            choices.push(json!({
                "index": i,
                "message": message,
                "logprobs": logprobs,
                "finish_reason": reason,
            }));
        }
        self.common.finished = finished;
        let first = self.common.finished.first().and_then(Option::as_ref);
        let rest = json!({
            "choices": choices,
            "usage": self.common.usage(),
            "timings": first.map(timings),
        });
        self.common.object("chat.completion", rest)
    }
}

/// JSON has no infinity: what can't be is as good as impossible at this.
pub(crate) fn finite(logprob: f32) -> f32 {
    logprob.max(-9999.0)
}
