//! A task that has a slot.

use std::time::{Duration, Instant};

use tegula_engine::{ConstraintError, Outputs, Sampler, TextStream, Top};
use tegula_gguf::{Tokenizer, tokenizer::Decoder};

use super::{
    Event, Failure, Finished, Generate, Piece, Pooling, Reason, Sink, SlotInfo, SlotState,
    TokenLogprob, Totals, Work, queue::Waiting,
};

pub(super) struct Slot {
    pub number: u64,
    /// When the task arrived.
    pub since: Instant,
    started: Instant,
    pub prompt: Vec<u32>,
    pub owner: u32,
    pub reuse: bool,
    pub deadline: Option<Instant>,
    pub sink: Box<dyn Sink>,
    /// When its prompt should have been run; see [`super::prompts`].
    pub due: u64,
    /// Prompt tokens that were in the cache.
    pub cached: usize,
    /// Prompt tokens that the sequence holds.
    pub done: usize,
    pub active: Active,
}

pub(super) enum Active {
    Generate(Box<Generation>),
    Embed(Embedding),
}

/// How a slot's task ended, with the last event, which is sent when the end has been counted.
pub(super) enum End {
    Finished(Event),
    /// Nobody listens any more.
    Cancelled,
    Failed(Failure),
}

impl Slot {
    /// The task in a slot whose sequence holds its first `cached` tokens. The rest is `due` as
    /// [`super::prompts`] says.
    pub fn new(waiting: Waiting, cached: usize, due: u64, tokenizer: &Tokenizer) -> Slot {
        let Waiting {
            task,
            number,
            since,
        } = waiting;
        let active = match task.work {
            Work::Generate(options) => {
                let mut sampler = Sampler::new(options.sampler.clone());
                task.prompt.iter().for_each(|&id| sampler.accept(id));
                Active::Generate(Box::new(Generation {
                    sampler,
                    text: TextStream::new(Decoder::new(tokenizer), &options.stop),
                    options: *options,
                    next: None,
                    generated: 0,
                    pending: Vec::new(),
                    first: None,
                    last: None,
                }))
            }
            Work::Embed(pooling) => Active::Embed(Embedding {
                pooling,
                sum: Vec::new(),
            }),
        };
        Slot {
            number,
            since,
            started: Instant::now(),
            prompt: task.prompt,
            owner: task.owner,
            reuse: task.reuse,
            deadline: task.deadline,
            sink: task.sink,
            due,
            cached,
            done: cached,
            active,
        }
    }

    pub fn is_open(&self) -> bool {
        self.sink.is_open()
    }

    /// Prompt tokens that are still to be run.
    pub fn left(&self) -> usize {
        self.prompt.len() - self.done
    }

    /// Whether a vector is wanted, not an answer.
    pub fn embeds(&self) -> bool {
        matches!(self.active, Active::Embed(_))
    }

    pub fn generation(&self) -> Option<&Generation> {
        match &self.active {
            Active::Generate(generation) => Some(generation),
            Active::Embed(_) => None,
        }
    }

    pub fn info(&self) -> SlotInfo {
        let generation = self.generation();
        SlotInfo {
            state: match generation {
                None => SlotState::Embedding,
                Some(_) if self.left() > 0 => SlotState::Prompt,
                Some(_) => SlotState::Generating,
            },
            task: self.number,
            prompt_tokens: self.prompt.len(),
            prompt_done: self.done,
            cached_tokens: self.cached,
            generated_tokens: generation.map_or(0, |g| g.generated),
            limit: generation.and_then(|g| g.options.limit),
        }
    }

    /// Goes on behind a chosen token. `room` is how many tokens the sequence can still take.
    pub fn advance(
        &mut self,
        id: Result<Choice, ConstraintError>,
        room: usize,
        tokenizer: &Tokenizer,
        totals: &mut Totals,
    ) -> Option<End> {
        let Active::Generate(g) = &mut self.active else {
            return None;
        };
        let Choice { id, logprob } = match id {
            Ok(choice) => choice,
            Err(e) => return Some(End::Failed(Failure::Constraint(e.0))),
        };
        let now = Instant::now();
        match g.last {
            None => totals.first_token.add(now - self.since),
            Some(last) => totals.token.add(now - last),
        }
        g.first.get_or_insert(now);
        g.last = Some(now);
        let constrained = g.options.constraint.is_some();
        if tokenizer.is_eog(id) && (constrained || !g.options.ignore_eog) {
            return Some(self.finish(Reason::Stop));
        }
        g.generated += 1;
        totals.generated_tokens += 1;
        g.pending.extend(logprob);
        let mut piece = Piece::default();
        let stopped = g.text.push(id, &mut |s| piece.text.push_str(s)).is_some();
        if stopped {
            // What belongs to the stop string is no part of the answer.
            g.pending.clear();
        } else if g.text.is_flushed() {
            piece.tokens = std::mem::take(&mut g.pending);
        }
        let complete = g
            .options
            .constraint
            .as_ref()
            .is_some_and(|c| c.is_complete());
        let full = room == 0 || g.options.limit.is_some_and(|limit| g.generated >= limit);
        g.next = Some(id);
        let something = !piece.text.is_empty() || !piece.tokens.is_empty();
        if something && !self.sink.send(Event::Text(piece)) {
            return Some(End::Cancelled);
        }
        match (stopped || complete, full) {
            (true, _) => Some(self.finish(Reason::Stop)),
            (false, true) => Some(self.finish(Reason::Length)),
            (false, false) => None,
        }
    }

    fn finish(&mut self, mut reason: Reason) -> End {
        let Active::Generate(g) = &mut self.active else {
            return End::Cancelled;
        };
        let mut piece = Piece::default();
        if g.text.finish(&mut |s| piece.text.push_str(s)).is_some() {
            reason = Reason::Stop;
            g.pending.clear();
        }
        piece.tokens = std::mem::take(&mut g.pending);
        let something = !piece.text.is_empty() || !piece.tokens.is_empty();
        if something && !self.sink.send(Event::Text(piece)) {
            return End::Cancelled;
        }
        let millis = |d: Duration| d.as_secs_f64() * 1e3;
        let first = g.first.unwrap_or(self.started);
        End::Finished(Event::Done(Finished {
            reason,
            prompt_tokens: self.prompt.len(),
            cached_tokens: self.cached,
            generated_tokens: g.generated,
            prompt_ms: millis(first - self.started),
            decode_ms: millis(g.last.map_or(Duration::ZERO, |last| last - first)),
        }))
    }

    /// The pooled vector.
    pub fn finish_embedding(&self) -> End {
        match &self.active {
            Active::Embed(embedding) => End::Finished(Event::Embedding(embedding.vector())),
            Active::Generate(_) => End::Cancelled,
        }
    }
}

/// A token, and how likely it was if that is wanted.
pub(super) struct Choice {
    id: u32,
    logprob: Option<TokenLogprob>,
}

pub(super) struct Generation {
    options: Generate,
    sampler: Sampler,
    text: TextStream,
    /// The last token, which the sequence doesn't hold yet.
    pub next: Option<u32>,
    generated: usize,
    /// Tokens whose text is held back.
    pending: Vec<TokenLogprob>,
    first: Option<Instant>,
    last: Option<Instant>,
}

impl Generation {
    /// The logits with which it can choose; `None` where that takes all.
    pub fn needs(&self) -> Option<Top> {
        let all = self.options.constraint.is_some() || self.options.logprobs.is_some();
        if all { None } else { self.sampler.needs() }
    }

    /// Chooses the next token by a row of logits. `room` is how many the sequence can still take.
    pub fn choose(
        &mut self,
        outputs: &Outputs,
        row: usize,
        room: usize,
    ) -> Result<Choice, ConstraintError> {
        let limit = self.options.limit.map(|limit| limit - self.generated);
        let left = limit.map_or(room + 1, |limit| limit.min(room + 1));
        let allowed = match &mut self.options.constraint {
            Some(constraint) => Some(constraint.allowed_with(left, self.generated)?),
            None => None,
        };
        let id = match outputs.top(row) {
            // Of all that choose together what any of them needs: more than it needs itself.
            Some(top) => self.sampler.sample_among(top),
            None => {
                let logits = outputs.logits(row);
                self.sampler.sample_allowed(logits, allowed.as_ref())
            }
        };
        self.sampler.accept(id);
        if let Some(constraint) = &mut self.options.constraint {
            constraint.accept(id)?;
        }
        let logprob = self.options.logprobs;
        let logprob = logprob.map(|n| logprobs(outputs.logits(row), id, n));
        Ok(Choice { id, logprob })
    }
}

/// The log-probability of `id` and those of the `n` likeliest.
fn logprobs(logits: &[f32], id: u32, n: usize) -> TokenLogprob {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|l| f64::from(l - max).exp()).sum();
    let norm = max + sum.ln() as f32;
    let mut top: Vec<u32> = (0..logits.len() as u32).collect();
    let better = |a: &u32, b: &u32| {
        let (la, lb) = (logits[*a as usize], logits[*b as usize]);
        lb.total_cmp(&la).then(a.cmp(b))
    };
    let n = n.min(top.len());
    if n > 0 && n < top.len() {
        top.select_nth_unstable_by(n - 1, better);
    }
    top.truncate(n);
    top.sort_unstable_by(better);
    let of = |id: u32| logits[id as usize] - norm;
    TokenLogprob {
        id,
        logprob: of(id),
        top: top.into_iter().map(|id| (id, of(id))).collect(),
    }
}

pub(super) struct Embedding {
    pub pooling: Pooling,
    /// `[embd]`; f64, so that long texts lose nothing.
    sum: Vec<f64>,
}

impl Embedding {
    /// Adds a token's hidden state.
    pub fn add(&mut self, hidden: &[f32]) {
        self.sum.resize(hidden.len(), 0.0);
        for (sum, &x) in self.sum.iter_mut().zip(hidden) {
            *sum += f64::from(x);
        }
    }

    /// The sum at length 1. Dividing by the number of tokens first would change nothing.
    fn vector(&self) -> Vec<f32> {
        let length = self.sum.iter().map(|x| x * x).sum::<f64>().sqrt();
        let scale = if length > 0.0 { 1.0 / length } else { 0.0 };
        self.sum.iter().map(|x| (x * scale) as f32).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logprobs_are_of_a_distribution() {
        let logits = [1.0, 3.0, 3.0, -2.0f32];
        let all = logprobs(&logits, 0, 9);
        let sum: f32 = all.top.iter().map(|(_, p)| p.exp()).sum();
        assert!((sum - 1.0).abs() < 1e-6);
        assert_eq!(
            all.top.iter().map(|t| t.0).collect::<Vec<_>>(),
            [1, 2, 0, 3]
        );
        assert_eq!(all.logprob, all.top[2].1);
        let two = logprobs(&logits, 3, 1);
        assert_eq!((two.top[0].0, two.top.len()), (1, 1));
        assert!((two.logprob - two.top[0].1 + 5.0).abs() < 1e-6);
        assert!(logprobs(&logits, 3, 0).top.is_empty());
    }

    #[test]
    fn vectors_have_length_one() {
        let mut e = Embedding {
            pooling: Pooling::Mean,
            sum: Vec::new(),
        };
        e.add(&[1.0, 2.0]);
        e.add(&[2.0, 2.0]);
        let v = e.vector();
        assert!((v[0] - 0.6).abs() < 1e-7 && (v[1] - 0.8).abs() < 1e-7);
    }
}
