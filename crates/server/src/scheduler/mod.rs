//! The scheduler: one thread that owns the context and serves many tasks at once.
//!
//! Every turn it runs one batch: the next token of each task that generates, and with them a
//! chunk of the prompts that are on their way (continuous batching). What a task gets doesn't
//! depend on the others, since a token's result depends on its own sequence alone.
//!
//! - **Fairness.** Requests wait in one queue and take turns ([`queue`]). Answers get their next
//!   token in every turn; prompts are run one after the other, in the order of when they are due
//!   ([`prompts`]), so that a long one doesn't keep a short one waiting, nor short ones a long one.
//! - **Prefix cache.** A finished sequence is kept, and shares its pages with whoever begins
//!   alike; so does a sequence in a slot. A prompt whose beginning is being run right now
//!   waits for it rather than run it a second time. What is kept goes, the longest unused
//!   first, when pages are needed.
//! - **Cancellation.** A task whose client has gone ends before the next turn.
//! - **Draining.** No new tasks are taken; those that are there end as they would have.

mod prompts;
mod queue;
mod slot;
mod stats;
mod task;

pub use stats::{Histogram, SlotInfo, SlotState, Snapshot, Totals};
pub use task::{
    Event, Failure, Finished, Generate, Piece, Pooling, Reason, Refused, Sink, Task, TokenLogprob,
    Work,
};

use std::{
    io,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use prompts::{Parts, Prompt};
use queue::{Queue, Waiting};
use slot::{Active, End, Slot};
use tegula_engine::{Batch, BatchToken, Context, ContextOptions, Outputs, Top};
use tegula_gguf::Tokenizer;
use tegula_kernels::kv::KV_PAGE;

/// Finished sequences that are kept for each slot.
const KEPT_PER_SLOT: usize = 4;
/// How often it is seen to whether those who wait still want to.
const SWEEP: Duration = Duration::from_millis(200);

/// How to schedule.
#[derive(Clone, Copy, Debug)]
pub struct SchedulerOptions {
    /// Tasks that run at once (`-np`).
    pub slots: usize,
    /// Requests that may wait for a slot.
    pub queue: usize,
    /// Prompt tokens per turn while others generate; 0: the part of the micro-batch that slots
    /// with prompts are of all that have work, a quarter at least.
    pub chunk: usize,
}

impl SchedulerOptions {
    /// The context that the scheduler needs: slots and kept sequences, and room for as many
    /// full ones as there are slots.
    pub fn context(&self, base: ContextOptions) -> ContextOptions {
        let slots = self.slots.max(1);
        ContextOptions {
            sequences: slots * (1 + KEPT_PER_SLOT),
            room: slots,
            ..base
        }
    }
}

/// Whether tasks are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Open,
    /// No more; those that are there are finished.
    Draining,
    /// No more; those that are there fail.
    Stopping,
    /// The thread has ended.
    Ended,
}

struct Inbox {
    queue: Queue,
    state: State,
    tasks: u64,
    refused: u64,
}

struct Shared {
    inbox: Mutex<Inbox>,
    wake: Condvar,
    snapshot: Mutex<Snapshot>,
    /// Seconds that a task holds its slot, on average.
    service: Mutex<f64>,
}

/// A poisoned lock means that the scheduler's thread has panicked; its data are plain values
/// that are still as good as they were.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A handle on the scheduler's thread.
pub struct Scheduler {
    shared: Arc<Shared>,
    options: SchedulerOptions,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Scheduler {
    /// Starts the thread. The context is as [`SchedulerOptions::context`] wants it.
    ///
    /// # Errors
    /// When the system gives no thread.
    ///
    /// # Panics
    /// When the context has fewer sequences than there are slots.
    pub fn start(context: Context, mut options: SchedulerOptions) -> io::Result<Scheduler> {
        options.slots = options.slots.max(1);
        options.queue = options.queue.max(1);
        let sequences = context.options().sequences;
        assert!(sequences >= options.slots, "a sequence for each slot");
        let (pages, free_pages) = context.pages();
        let shared = Arc::new(Shared {
            inbox: Mutex::new(Inbox {
                queue: Queue::default(),
                state: State::Open,
                tasks: 0,
                refused: 0,
            }),
            wake: Condvar::new(),
            snapshot: Mutex::new(Snapshot {
                slots: vec![SlotInfo::IDLE; options.slots],
                waiting: 0,
                pages,
                free_pages,
                cached_sequences: 0,
                totals: Totals::default(),
            }),
            service: Mutex::new(1.0),
        });
        let worker = Worker {
            shared: Arc::clone(&shared),
            tokenizer: context.model().tokenizer().clone(),
            chunk: options.chunk,
            slots: (0..options.slots).map(|_| None).collect(),
            kept: (options.slots..sequences).map(Kept::empty).collect(),
            last: vec![SlotInfo::IDLE; options.slots],
            totals: Totals::default(),
            clock: 0,
            outbox: Vec::new(),
            context,
        };
        let thread = thread::Builder::new()
            .name("scheduler".into())
            .spawn(move || worker.run())?;
        Ok(Scheduler {
            shared,
            options,
            thread: Mutex::new(Some(thread)),
        })
    }

    /// Hands in the tasks of one request, all or none.
    ///
    /// # Errors
    /// When the queue is full, or nothing is taken any more.
    pub fn submit(&self, tasks: Vec<Task>) -> Result<(), Refused> {
        let mut inbox = lock(&self.shared.inbox);
        match inbox.state {
            State::Open => {}
            State::Draining | State::Stopping => return Err(Refused::ShuttingDown),
            State::Ended => return Err(Refused::Dead),
        }
        let waiting = inbox.queue.len();
        if waiting >= self.options.queue {
            inbox.refused += 1;
            let turns = (waiting as f64 / self.options.slots as f64).max(1.0);
            let seconds = turns * *lock(&self.shared.service);
            return Err(Refused::Full {
                waiting,
                retry_after_s: seconds.ceil().clamp(1.0, 600.0) as u64,
            });
        }
        let since = Instant::now();
        let first = inbox.tasks;
        inbox.tasks += tasks.len() as u64;
        let numbered = tasks.into_iter().zip(first + 1..);
        let tasks = numbered.map(|(task, number)| Waiting {
            task,
            number,
            since,
        });
        inbox.queue.push(tasks.collect());
        drop(inbox);
        self.shared.wake.notify_one();
        Ok(())
    }

    /// The scheduler at this moment.
    pub fn snapshot(&self) -> Snapshot {
        let mut snapshot = lock(&self.shared.snapshot).clone();
        let inbox = lock(&self.shared.inbox);
        snapshot.waiting = inbox.queue.len();
        snapshot.totals.refused = inbox.refused;
        snapshot
    }

    /// Takes no more tasks; the thread ends with the last of those that are there.
    pub fn drain(&self) {
        self.change(State::Draining);
    }

    /// Takes no more tasks; those that are there fail.
    pub fn stop(&self) {
        self.change(State::Stopping);
    }

    fn change(&self, to: State) {
        let mut inbox = lock(&self.shared.inbox);
        if inbox.state != State::Ended && inbox.state != State::Stopping {
            inbox.state = to;
        }
        drop(inbox);
        self.shared.wake.notify_one();
    }

    /// Whether the thread has ended: drained, stopped, or by a defect.
    pub fn has_ended(&self) -> bool {
        lock(&self.shared.inbox).state == State::Ended
    }

    /// Waits for the thread's end; false if it panicked.
    pub fn join(&self) -> bool {
        let thread = lock(&self.thread).take();
        thread.is_none_or(|thread| thread.join().is_ok())
    }
}

impl Drop for Scheduler {
    fn drop(&mut self) {
        self.stop();
        self.join();
    }
}

/// A finished sequence.
struct Kept {
    sequence: usize,
    owner: u32,
    /// When it was last of use; 0: it is empty.
    used: u64,
}

impl Kept {
    fn empty(sequence: usize) -> Kept {
        Kept {
            sequence,
            owner: 0,
            used: 0,
        }
    }
}

/// Marks the end, however the thread comes to it; those who wait see their sinks go.
struct EndMark(Arc<Shared>);

impl Drop for EndMark {
    fn drop(&mut self) {
        let mut inbox = lock(&self.0.inbox);
        inbox.state = State::Ended;
        inbox.queue = Queue::default();
    }
}

struct Worker {
    shared: Arc<Shared>,
    context: Context,
    tokenizer: Tokenizer,
    chunk: usize,
    /// Slot `i` has sequence `i`.
    slots: Vec<Option<Slot>>,
    kept: Vec<Kept>,
    /// What an idle slot did last.
    last: Vec<SlotInfo>,
    totals: Totals,
    clock: u64,
    /// Last events that are to be sent.
    outbox: Vec<(Box<dyn Sink>, Event)>,
}

impl Worker {
    fn run(mut self) {
        let _mark = EndMark(Arc::clone(&self.shared));
        while self.admit() {
            self.end_unwanted();
            let start = Instant::now();
            let steps = self.totals.steps;
            let (texts, prompts) = self.prompt_parts();
            self.generate(&prompts);
            self.embed(&texts);
            if self.totals.steps > steps {
                self.totals.busy += start.elapsed();
            }
            self.publish();
        }
        self.publish();
    }

    /// Shows how things stand, and then tells those who are done.
    fn publish(&mut self) {
        self.show();
        for (mut sink, event) in self.outbox.drain(..) {
            sink.send(event);
        }
    }

    /// Waits for something to do and fills the slots; false when all is done.
    fn admit(&mut self) -> bool {
        let shared = Arc::clone(&self.shared);
        let mut inbox = lock(&shared.inbox);
        loop {
            let now = Instant::now();
            let stopping = inbox.state == State::Stopping;
            let mut gone = 0;
            let mut late = 0;
            inbox.queue.sweep(|waiting| {
                let failure = match waiting.task.deadline {
                    _ if stopping => Failure::Shutdown,
                    Some(deadline) if deadline <= now => Failure::Deadline,
                    _ if !waiting.task.sink.is_open() => {
                        gone += 1;
                        return true;
                    }
                    _ => return false,
                };
                waiting.task.sink.send(Event::Failed(failure));
                late += 1;
                true
            });
            self.totals.cancelled += gone;
            self.totals.failed += late;
            if gone + late > 0 {
                // With nothing else to do there may be no turn for long that would show it.
                self.show();
            }
            if stopping {
                for i in 0..self.slots.len() {
                    self.release(i, End::Failed(Failure::Shutdown));
                }
                return false;
            }
            while let Some(free) = self.slots.iter().position(Option::is_none) {
                let Some(waiting) = inbox.queue.pop(|task| !self.is_being_run(task)) else {
                    break;
                };
                self.place(free, waiting);
            }
            if self.slots.iter().any(Option::is_some) {
                return true;
            }
            if inbox.state == State::Draining && inbox.queue.is_empty() {
                return false;
            }
            let wait = shared.wake.wait_timeout(inbox, SWEEP);
            inbox = wait.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Whether a slot is running a prompt that begins as this one does, further than what is
    /// there already: then it pays to wait for it.
    fn is_being_run(&self, task: &Task) -> bool {
        if !task.reuse || matches!(task.work, Work::Embed(_)) {
            return false;
        }
        let mut have = None;
        let mut ahead = self.slots.iter().flatten().filter(|slot| {
            slot.left() > 0 && slot.owner == task.owner && slot.generation().is_some()
        });
        ahead.any(|slot| {
            let common = common(&slot.prompt, &task.prompt).min(task.prompt.len() - 1);
            let have = *have.get_or_insert_with(|| {
                let found = self.best_prefix(&task.prompt, task.owner, false);
                found.map_or(0, |found| found.1)
            });
            common > slot.done && common >= have + KV_PAGE
        })
    }

    /// The sequence that has most of the prompt's beginning, and how much; never all of it,
    /// since the last token's logits are wanted. `running`: also those whose prompts are being
    /// run.
    fn best_prefix(&self, prompt: &[u32], owner: u32, running: bool) -> Option<(usize, usize)> {
        let kept = self.kept.iter().filter(|k| k.used > 0 && k.owner == owner);
        let slots = self.slots.iter().enumerate().filter(|(_, slot)| {
            let fits = |s: &Slot| s.owner == owner && (running || s.left() == 0);
            slot.as_ref().is_some_and(fits)
        });
        let sequences = slots.map(|(i, _)| i).chain(kept.map(|k| k.sequence));
        sequences
            .filter_map(|sequence| {
                let held = self.context.tokens(sequence).ok()?;
                let common = common(held, prompt).min(prompt.len() - 1);
                (common > 0).then_some((sequence, common))
            })
            // The first of the longest.
            .rev()
            .max_by_key(|found| found.1)
    }

    fn place(&mut self, i: usize, waiting: Waiting) {
        self.totals.queue_wait.add(waiting.since.elapsed());
        let task = &waiting.task;
        let reuse = task.reuse && matches!(task.work, Work::Generate(_));
        let found = match reuse {
            true => self.best_prefix(&task.prompt, task.owner, true),
            false => None,
        };
        let mut cached = 0;
        if let Some((sequence, common)) = found
            && self.context.copy(sequence, i, common).is_ok()
        {
            cached = common;
            self.clock += 1;
            if let Some(kept) = self.kept.iter_mut().find(|k| k.sequence == sequence) {
                kept.used = self.clock;
            }
        }
        self.totals.cached_tokens += cached as u64;
        let due = self.totals.prompt_tokens + (task.prompt.len() - cached) as u64;
        self.slots[i] = Some(Slot::new(waiting, cached, due, &self.tokenizer));
    }

    fn end_unwanted(&mut self) {
        let now = Instant::now();
        for i in 0..self.slots.len() {
            let Some(slot) = &self.slots[i] else {
                continue;
            };
            if !slot.is_open() {
                self.release(i, End::Cancelled);
            } else if slot.deadline.is_some_and(|deadline| deadline <= now) {
                self.release(i, End::Failed(Failure::Deadline));
            }
        }
    }

    /// One batch of tokens that generate and parts of prompts on their way to that.
    fn generate(&mut self, parts: &[(usize, usize)]) {
        let mut batch = Batch::default();
        let mut rows = Vec::new();
        for (sequence, slot) in self.slots.iter().enumerate() {
            let next = slot.as_ref().and_then(|s| s.generation()?.next);
            if let Some(id) = next {
                let logits = true;
                batch.tokens.push(BatchToken {
                    id,
                    sequence,
                    logits,
                });
                rows.push(sequence);
            }
        }
        for &(sequence, len) in parts {
            let Some(slot) = &self.slots[sequence] else {
                continue;
            };
            let ends = slot.left() == len;
            let ids = slot.prompt[slot.done..slot.done + len].iter();
            batch
                .tokens
                .extend(ids.enumerate().map(|(k, &id)| BatchToken {
                    id,
                    sequence,
                    logits: ends && k + 1 == len,
                }));
            if ends {
                rows.push(sequence);
            }
        }
        let top = self.needs(&rows);
        let run = |context: &mut Context, batch: &Batch| match &top {
            Some(top) => context.decode_top(batch, top),
            None => context.decode(batch),
        };
        let Some(outputs) = self.decode(&batch, parts, run) else {
            return;
        };
        self.choose(&rows, &outputs);
    }

    /// The logits with which all of these slots can choose, where that is not all of them.
    fn needs(&self, rows: &[usize]) -> Option<Top> {
        let mut all = Top::default();
        for &i in rows {
            let slot = self.slots[i].as_ref()?;
            let Active::Generate(generation) = &slot.active else {
                return None;
            };
            let Top { k, ids } = generation.needs()?;
            all.k = all.k.max(k);
            all.ids.extend(ids);
        }
        all.ids.sort_unstable();
        all.ids.dedup();
        Some(all)
    }

    /// Runs a batch and counts it. On an error, which no task is to blame for, all that are
    /// in the batch fail.
    fn decode(
        &mut self,
        batch: &Batch,
        parts: &[(usize, usize)],
        run: impl FnOnce(&mut Context, &Batch) -> tegula_engine::Result<Outputs>,
    ) -> Option<Outputs> {
        if batch.tokens.is_empty() {
            return None;
        }
        self.make_room(batch);
        match run(&mut self.context, batch) {
            Ok(outputs) => {
                self.totals.steps += 1;
                self.totals.step_tokens += batch.tokens.len() as u64;
                for &(sequence, len) in parts {
                    self.totals.prompt_tokens += len as u64;
                    if let Some(slot) = &mut self.slots[sequence] {
                        slot.done += len;
                    }
                }
                Some(outputs)
            }
            Err(error) => {
                let mut sequences: Vec<_> = batch.tokens.iter().map(|t| t.sequence).collect();
                sequences.dedup();
                for i in sequences {
                    self.release(i, End::Failed(Failure::Engine(error.to_string())));
                }
                None
            }
        }
    }

    /// Which slots go on with their prompts, and by how many tokens: texts to embed, and prompts
    /// to answer.
    fn prompt_parts(&self) -> (Parts, Parts) {
        let mut prompts = Vec::new();
        let mut answering = 0;
        for (i, slot) in self.slots.iter().enumerate() {
            let Some(slot) = slot else { continue };
            match slot.left() {
                0 => answering += 1,
                left => prompts.push(Prompt {
                    due: slot.due,
                    number: slot.number,
                    slot: i,
                    left,
                }),
            }
        }
        let ubatch = self.context.options().ubatch;
        let budget = prompts::budget(ubatch, self.chunk, answering, prompts.len());
        let embeds = |i: usize| self.slots[i].as_ref().is_some_and(Slot::embeds);
        let parts = prompts::fill(budget, prompts);
        parts.into_iter().partition(|part| embeds(part.0))
    }

    /// Lets kept sequences go, the longest unused first, until the batch fits.
    fn make_room(&mut self, batch: &Batch) {
        let mut added = vec![0; self.slots.len()];
        batch.tokens.iter().for_each(|t| added[t.sequence] += 1);
        loop {
            let needed: usize = added
                .iter()
                .enumerate()
                .map(|(i, &n)| self.context.pages_needed(i, n).unwrap_or(0))
                .sum();
            let oldest = self.kept.iter_mut().filter(|k| k.used > 0);
            match oldest.min_by_key(|k| k.used) {
                Some(kept) if needed > self.context.pages().1 => {
                    kept.used = 0;
                    // The sequence exists: it was made with the context.
                    let _ = self.context.truncate(kept.sequence, 0);
                }
                _ => return,
            }
        }
    }

    /// Chooses a token for each slot that has logits, on all threads, and goes on with it.
    fn choose(&mut self, rows: &[usize], outputs: &Outputs) {
        let size = self.context.options().context;
        let room = |i| size - self.context.tokens(i).map_or(size, <[u32]>::len);
        let rooms: Vec<usize> = (0..self.slots.len()).map(room).collect();
        let mut jobs = Vec::with_capacity(rows.len());
        for (i, slot) in self.slots.iter_mut().enumerate() {
            let row = rows.iter().position(|&sequence| sequence == i);
            if let (Some(row), Some(slot)) = (row, slot)
                && let Active::Generate(generation) = &mut slot.active
            {
                jobs.push(Mutex::new((i, row, generation, None)));
            }
        }
        let pool = &self.context.model().compute().pool;
        pool.run(jobs.len(), &|k| {
            let mut job = lock(&jobs[k]);
            let (i, row, generation, choice) = &mut *job;
            *choice = Some(generation.choose(outputs, *row, rooms[*i]));
        });
        let choices: Vec<_> = jobs
            .into_iter()
            .map(|job| {
                let (i, _, _, choice) = job.into_inner().unwrap_or_else(PoisonError::into_inner);
                (i, choice)
            })
            .collect();
        for (i, choice) in choices {
            let (Some(slot), Some(choice)) = (&mut self.slots[i], choice) else {
                continue;
            };
            if let Some(end) = slot.advance(choice, rooms[i], &self.tokenizer, &mut self.totals) {
                self.release(i, end);
            }
        }
    }

    /// One batch of parts of texts to embed.
    fn embed(&mut self, parts: &[(usize, usize)]) {
        let mut batch = Batch::default();
        for &(sequence, len) in parts {
            let Some(slot) = &self.slots[sequence] else {
                continue;
            };
            let every = matches!(&slot.active, Active::Embed(e) if e.pooling == Pooling::Mean);
            let ends = slot.left() == len;
            let ids = slot.prompt[slot.done..slot.done + len].iter();
            batch
                .tokens
                .extend(ids.enumerate().map(|(k, &id)| BatchToken {
                    id,
                    sequence,
                    logits: every || (ends && k + 1 == len),
                }));
        }
        let Some(outputs) = self.decode(&batch, parts, Context::decode_hidden) else {
            return;
        };
        let wanted = batch.tokens.iter().filter(|t| t.logits);
        for (row, token) in wanted.enumerate() {
            if let Some(slot) = &mut self.slots[token.sequence]
                && let Active::Embed(embedding) = &mut slot.active
            {
                embedding.add(outputs.hidden(row));
            }
        }
        for &(i, _) in parts {
            if let Some(slot) = &self.slots[i]
                && slot.left() == 0
            {
                let end = slot.finish_embedding();
                self.release(i, end);
            }
        }
    }

    /// Empties a slot and keeps its sequence, if it may be of use.
    fn release(&mut self, i: usize, end: End) {
        let Some(slot) = self.slots[i].take() else {
            return;
        };
        self.last[i] = SlotInfo {
            state: SlotState::Idle,
            ..slot.info()
        };
        {
            let mut service = lock(&self.shared.service);
            *service += (slot.since.elapsed().as_secs_f64() - *service) * 0.1;
        }
        if slot.reuse && slot.generation().is_some() {
            self.keep(i, slot.owner);
        }
        match end {
            End::Finished(event) => {
                self.totals.finished += 1;
                self.outbox.push((slot.sink, event));
            }
            End::Cancelled => self.totals.cancelled += 1,
            End::Failed(failure) => {
                self.totals.failed += 1;
                self.outbox.push((slot.sink, Event::Failed(failure)));
            }
        }
        // The sequence exists: it was made with the context.
        let _ = self.context.truncate(i, 0);
    }

    /// Keeps the sequence of slot `i` in place of one that it contains, or of the longest
    /// unused.
    fn keep(&mut self, i: usize, owner: u32) {
        let Ok(tokens) = self.context.tokens(i) else {
            return;
        };
        let len = tokens.len();
        if len < KV_PAGE / 2 {
            return;
        }
        let contained = |k: &&mut Kept| {
            let held = self.context.tokens(k.sequence).unwrap_or_default();
            k.used > 0 && k.owner == owner && tokens.starts_with(held)
        };
        let place = match self.kept.iter_mut().find(contained) {
            Some(kept) => Some(kept),
            None => self.kept.iter_mut().min_by_key(|k| k.used),
        };
        let Some(kept) = place else { return };
        if self.context.copy(i, kept.sequence, len).is_ok() {
            self.clock += 1;
            kept.used = self.clock;
            kept.owner = owner;
        }
    }

    fn show(&self) {
        let (pages, free_pages) = self.context.pages();
        let slots = self.slots.iter().zip(&self.last);
        let slots = slots.map(|(slot, last)| slot.as_ref().map_or(*last, Slot::info));
        *lock(&self.shared.snapshot) = Snapshot {
            slots: slots.collect(),
            waiting: 0,
            pages,
            free_pages,
            cached_sequences: self.kept.iter().filter(|k| k.used > 0).count(),
            totals: self.totals.clone(),
        };
    }
}

/// Tokens that both begin with.
fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}
