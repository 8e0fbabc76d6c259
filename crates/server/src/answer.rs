//! Tells an answer's text apart: reasoning, content, calls of tools.

use tegula_engine::overlap;

use crate::tools::{Call, Form, Reasoning, Tools, parse_call};

const THINK: &str = "<think>";
const THOUGHT: &str = "</think>";
const CALL: &str = "<tool_call>";
const CALLED: &str = "</tool_call>";

/// A part of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    Reasoning(String),
    Content(String),
    Call(Call),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Nothing but white space so far.
    Start,
    Reasoning,
    /// Behind reasoning or a call: white space is no content yet.
    Between,
    Content,
    /// Inside `<tool_call>`.
    Call,
    /// An answer that is a call as a whole, or isn't.
    Whole,
}

/// Takes text as it comes and gives parts as they are certain.
#[derive(Debug)]
pub struct AnswerReader {
    state: State,
    may_reason: bool,
    tools: Option<(Form, Tools)>,
    pending: String,
}

impl AnswerReader {
    /// A reader for an answer that may have reasoning and calls.
    pub fn new(reasoning: Reasoning, tools: Option<(Form, Tools)>) -> AnswerReader {
        AnswerReader {
            state: match reasoning {
                Reasoning::Open => State::Reasoning,
                Reasoning::May => State::Start,
                Reasoning::No if tools.is_some() => State::Start,
                Reasoning::No => State::Content,
            },
            may_reason: reasoning != Reasoning::No,
            tools,
            pending: String::new(),
        }
    }

    /// Adds text.
    pub fn push(&mut self, text: &str) -> Vec<Part> {
        self.pending.push_str(text);
        let mut parts = Vec::new();
        while self.step(&mut parts) {}
        parts
    }

    /// What was held back.
    pub fn finish(&mut self) -> Vec<Part> {
        let rest = std::mem::take(&mut self.pending);
        let mut parts = Vec::new();
        match self.state {
            State::Start | State::Content => push(&mut parts, Part::Content, &rest),
            State::Between => push(&mut parts, Part::Content, rest.trim()),
            State::Reasoning => push(&mut parts, Part::Reasoning, &rest),
            State::Call => match self.call(&rest) {
                Some(call) => parts.push(Part::Call(call)),
                None => push(&mut parts, Part::Content, &format!("{CALL}{rest}")),
            },
            State::Whole => match self.call(&rest) {
                Some(call) => parts.push(Part::Call(call)),
                None => push(&mut parts, Part::Content, &rest),
            },
        }
        self.state = State::Content;
        parts
    }

    fn call(&self, text: &str) -> Option<Call> {
        parse_call(text, &self.tools.as_ref()?.1)
    }

    fn has_tags(&self) -> bool {
        matches!(&self.tools, Some((Form::Hermes | Form::Ours, _)))
    }

    /// Goes on as far as is certain; true if there is more to do.
    fn step(&mut self, parts: &mut Vec<Part>) -> bool {
        match self.state {
            State::Start => {
                let text = self.pending.trim_start();
                if text.is_empty() {
                    return false;
                }
                if self.may_reason && text.starts_with(THINK) {
                    self.pending = text[THINK.len()..].to_owned();
                    self.state = State::Reasoning;
                    return true;
                }
                if self.may_reason && THINK.starts_with(text) {
                    return false;
                }
                let whole = matches!(&self.tools, Some((Form::Llama3, _))) && text.starts_with('{');
                self.state = if whole { State::Whole } else { State::Content };
                true
            }
            State::Reasoning => {
                let end = self.pending.find(THOUGHT);
                let keep = overlap(&self.pending, THOUGHT);
                let upto = end.unwrap_or(self.pending.len() - keep);
                push(parts, Part::Reasoning, &self.pending[..upto]);
                self.pending
                    .drain(..upto + end.map_or(0, |_| THOUGHT.len()));
                if end.is_some() {
                    self.state = State::Between;
                }
                end.is_some()
            }
            State::Between => {
                let text = self.pending.trim_start();
                if text.is_empty() {
                    return false;
                }
                self.pending = text.to_owned();
                let whole =
                    matches!(&self.tools, Some((Form::Llama3, _))) && self.pending.starts_with('{');
                self.state = if whole { State::Whole } else { State::Content };
                true
            }
            State::Content if self.has_tags() => {
                if let Some(at) = self.pending.find(CALL) {
                    push(parts, Part::Content, self.pending[..at].trim_end());
                    self.pending.drain(..at + CALL.len());
                    self.state = State::Call;
                    return true;
                }
                // White space before a call is no content either.
                let keep = overlap(&self.pending, CALL);
                let certain = self.pending[..self.pending.len() - keep].trim_end().len();
                push(parts, Part::Content, &self.pending[..certain]);
                self.pending.drain(..certain);
                false
            }
            State::Content => {
                let text = std::mem::take(&mut self.pending);
                push(parts, Part::Content, &text);
                false
            }
            State::Call => {
                let Some(at) = self.pending.find(CALLED) else {
                    return false;
                };
                let text = self.pending[..at].to_owned();
                self.pending.drain(..at + CALLED.len());
                match self.call(&text) {
                    Some(call) => parts.push(Part::Call(call)),
                    // Not a call of a tool that there is: the client may make something of it.
                    None => push(parts, Part::Content, &format!("{CALL}{text}{CALLED}")),
                }
                self.state = State::Between;
                true
            }
            State::Whole => false,
        }
    }
}

fn push(parts: &mut Vec<Part>, part: fn(String) -> Part, text: &str) {
    if !text.is_empty() {
        parts.push(part(text.to_owned()));
    }
}
