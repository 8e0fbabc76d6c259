//! The thread pool of the kernels.
//!
//! One job at a time, hundreds a token: what counts is the time from one job's last task to
//! the next job's first. Workers spin for the next job and sleep only when none comes; a thread's
//! first task is its own, the others are taken from one counter, so a slow core takes fewer.
//! What nobody came for is anybody's in the end.
//!
//! Between two jobs nobody would read memory. So a caller who knows the next job tells what each
//! thread's first task will read ([`Pool::ahead`]), and threads that wait ask for it.
//!
//! A job ends when its tasks are done, not when every worker has been seen: a worker that
//! the operating system keeps from its CPU is waited for only if it holds a task. So other
//! processes on the same CPUs take their share of the time and no more.
//!
//! Results never depend on which thread runs a task.

use crate::{ahead::Told, numa::nodes};
use std::{
    any::Any,
    cell::{Cell, UnsafeCell},
    iter::repeat_with,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// How to make a [`Pool`].
#[derive(Clone, Debug)]
pub struct PoolConfig {
    /// Threads that work on a job, the caller among them; at least 1.
    pub threads: usize,
    /// Keep the workers to one CPU of each core while there are cores enough. Within that
    /// set they move freely: a thread bound to a single CPU waits whenever anybody else,
    /// the caller of the pool included, runs there.
    pub pin: bool,
    /// Workers in turn on every memory node; each then stays on its node.
    pub distribute: bool,
    /// How long an idle thread spins before it sleeps.
    pub spin: Duration,
}

impl PoolConfig {
    /// Pinned workers that spin for 2 ms: with 200 µs prompts and single tokens were 3 to 4 % slower
    /// on a virtual machine (`docs/bench`).
    pub fn new(threads: usize) -> PoolConfig {
        PoolConfig {
            threads: threads.max(1),
            pin: true,
            distribute: false,
            spin: Duration::from_millis(2),
        }
    }
}

/// The CPUs of a worker: those of its node, if it has one, and of these the ones in `set`.
fn within(set: &Option<Vec<usize>>, node: Option<&Vec<usize>>) -> Option<Vec<usize>> {
    let Some(node) = node else { return set.clone() };
    let both = |cpu: &&usize| set.as_ref().is_none_or(|set| set.contains(cpu));
    let cpus: Vec<usize> = node.iter().filter(both).copied().collect();
    Some(if cpus.is_empty() { node.clone() } else { cpus })
}

/// Keeps a value away from its neighbours' cache lines (two: they are fetched in pairs).
#[repr(align(128))]
struct Padded<T>(T);

type Task<'a> = &'a (dyn Fn(usize) + Sync);

/// The current job.
#[derive(Clone, Copy)]
struct Job {
    /// Lifetime erased; valid while a thread holds a ticket that it has not reported.
    task: Task<'static>,
    count: u32,
}

/// What gives a thread a task.
enum Claim {
    /// The first task of this thread.
    First(u32),
    Ticket(u32),
}

/// One more than the last ticket of every job. A counter at or past it has no tasks left,
/// whichever job it belonged to, so a ticket tells by itself whether there is a job behind
/// it.
const TICKETS: u32 = 1 << 31;

/// Set in a word that some thread sleeps on.
const ASLEEP: u32 = 1 << 31;

/// How long a thread spins without giving its CPU away: longer than the gap between two jobs
/// of one token, much shorter than a time slice.
const PAUSE: Duration = Duration::from_micros(20);

/// What idle workers look at, in one cache line.
struct Signals {
    /// Counts jobs in its lower bits; idle workers wait for it to change.
    epoch: AtomicU32,
    /// Counts what [`Pool::ahead`] has told.
    told: AtomicU32,
}

struct Shared {
    signals: Padded<Signals>,
    /// For each thread.
    told: Vec<Padded<Told>>,
    /// A bit for each thread's first task that nobody has begun: the tasks before those with
    /// tickets.
    firsts: Vec<Padded<AtomicU64>>,
    /// The next ticket: up to [`TICKETS`].
    ticket: Padded<AtomicU32>,
    /// Tasks of the current job that are not done; the caller waits for none.
    left: Padded<AtomicU32>,
    job: UnsafeCell<Job>,
    stop: AtomicBool,
    /// What the first panicking task threw.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    spin: Duration,
}

// SAFETY: `job` is written only by the thread that holds `Pool::running`, while there are no
// tickets and no first tasks, and published by the release stores of `firsts` and `ticket`; it is
// read only by threads whose acquiring change of one of them gave them a task, before they report
// that task as done.
unsafe impl Sync for Shared {}
// SAFETY: `Job::task` refers to a `Sync` closure.
unsafe impl Send for Shared {}

/// A fixed set of threads that run jobs together.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Held while a job runs.
    running: Mutex<Running>,
}

/// What callers keep from job to job.
#[derive(Default)]
struct Running {
    dispatched: Dispatched,
    /// The last telling that they have seen.
    told: u32,
}

/// The jobs that a pool has run, for comparing how two runs cut their work up.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Dispatched {
    /// Jobs of at least one task.
    pub jobs: u64,
    /// Tasks of all jobs.
    pub tasks: u64,
    /// A hash of the numbers of tasks in the order of the jobs.
    pub order: u64,
}

impl Dispatched {
    fn add(&mut self, count: usize) {
        self.jobs += 1;
        self.tasks += count as u64;
        // FNV-1a, by words.
        self.order = (self.order ^ count as u64).wrapping_mul(0x100_0000_01b3);
    }
}

thread_local! {
    /// Set while this thread runs a task.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pool {
    /// Starts the workers.
    ///
    /// # Panics
    /// When the operating system refuses a thread.
    pub fn new(config: PoolConfig) -> Pool {
        let (cores, siblings) = cpus();
        let threads = config.threads.max(1);
        // Spinning threads would keep each other from the CPU when there are too few.
        let enough = threads <= cores.len() + siblings.len();
        let shared = Arc::new(Shared {
            signals: Padded(Signals {
                epoch: AtomicU32::new(0),
                told: AtomicU32::new(0),
            }),
            told: repeat_with(|| Padded(Told::default()))
                .take(threads)
                .collect(),
            firsts: repeat_with(|| Padded(AtomicU64::new(0)))
                .take(threads.div_ceil(64))
                .collect(),
            ticket: Padded(AtomicU32::new(TICKETS)),
            left: Padded(AtomicU32::new(0)),
            job: UnsafeCell::new(Job {
                task: &|_| {},
                count: 0,
            }),
            stop: AtomicBool::new(false),
            panic: Mutex::new(None),
            spin: if enough { config.spin } else { Duration::ZERO },
        });
        let set = (config.pin && threads <= cores.len() && !siblings.is_empty()).then_some(cores);
        let nodes = match config.distribute {
            true => nodes(),
            false => Vec::new(),
        };
        let workers = (1..threads)
            .map(|i| {
                let node = nodes
                    .get(i % nodes.len().max(1))
                    .filter(|_| nodes.len() > 1);
                let (shared, set) = (Arc::clone(&shared), within(&set, node));
                thread::Builder::new()
                    .name(format!("tegula-{i}"))
                    .spawn(move || {
                        if let Some(set) = set {
                            pin(&set);
                        }
                        shared.work(i);
                    })
                    .expect("the operating system starts threads")
            })
            .collect();
        Pool {
            shared,
            workers,
            running: Mutex::default(),
        }
    }

    /// Threads that work on a job, the caller among them.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// The jobs so far.
    pub fn dispatched(&self) -> Dispatched {
        lock(&self.running).dispatched
    }

    /// Tells threads what their first tasks of the next job will read: up to [`PIECES`] pieces each,
    /// by ascending numbers of threads, which are those of the tasks. To be called beside the job
    /// before that one, or between both: whoever has no task asks for it, until the next job begins.
    ///
    /// [`PIECES`]: crate::ahead::PIECES
    pub fn ahead<'m>(&self, pieces: impl IntoIterator<Item = (usize, &'m [u8])>) {
        if self.workers.is_empty() {
            return;
        }
        let mut pieces = pieces.into_iter().peekable();
        for (thread, told) in self.shared.told.iter().enumerate() {
            told.0.tell(|| {
                let own = pieces.next_if(|(of, _)| *of == thread);
                own.map(|(_, piece)| piece)
            });
        }
        self.shared.signals.0.told.fetch_add(1, Ordering::Release);
    }

    /// Runs `task(0)` … `task(count - 1)`, each once, in no particular order, and returns
    /// when all are done. Jobs from several threads run one after the other.
    ///
    /// # Panics
    /// When a task panics, with the payload of the first to do so, after all threads have
    /// left the job; tasks that nobody had begun are then left out. When called from inside
    /// a task, of this pool or another. When there are 2³¹ tasks or more.
    pub fn run(&self, count: usize, task: Task<'_>) {
        self.run_beside(count, task, || {});
    }

    /// The same, where the caller first does something else while workers have begun: issues work
    /// to a device, say. It is no task, so it may start jobs of other pools.
    ///
    /// # Panics
    /// As [`Pool::run`], and when `beside` does.
    pub fn run_beside(&self, count: usize, task: Task<'_>, beside: impl FnOnce()) {
        assert!(!INSIDE.get(), "a task started another job");
        if count == 0 {
            return beside();
        }
        let mut running = lock(&self.running);
        running.dispatched.add(count);
        let shared = &*self.shared;
        // Whatever becomes of it, workers must have left the job before this returns.
        let beside = || catch_unwind(AssertUnwindSafe(beside));
        let besides;
        if self.workers.is_empty() || count == 1 {
            besides = beside();
            let _ = (0..count).try_for_each(|i| shared.call(task, i));
        } else {
            let count = u32::try_from(count).ok().filter(|&n| n < TICKETS);
            let count = count.expect("a job has fewer than 2^31 tasks");
            // SAFETY: no thread has a task, so nobody reads `job`. The erased lifetime ends
            // after `await_tasks` below, when each task has been reported.
            unsafe {
                let task = std::mem::transmute::<Task<'_>, Task<'static>>(task);
                *shared.job.get() = Job { task, count };
            }
            shared.left.0.store(count, Ordering::Relaxed);
            let firsts = count.min(self.threads() as u32);
            for (word, at) in shared.firsts.iter().zip((0..firsts).step_by(64)) {
                word.0
                    .store(u64::MAX >> (64 - (firsts - at).min(64)), Ordering::Release);
            }
            let tickets = count - firsts;
            shared.ticket.0.store(TICKETS - tickets, Ordering::Release);
            shared.announce();
            besides = beside();
            shared.take_tasks(0);
            shared.await_tasks(&mut running.told);
        }
        let panic = lock(&shared.panic).take();
        drop(running);
        if let Some(payload) = panic.or(besides.err()) {
            resume_unwind(payload);
        }
    }
}

impl Shared {
    /// Asks for what thread `me` was told of, if it is something new, until `ready`.
    fn ask(&self, me: usize, seen: &mut u32, ready: impl Fn() -> bool) {
        let told = self.signals.0.told.load(Ordering::Acquire);
        if told == *seen {
            return;
        }
        *seen = told;
        self.told[me].0.ask(ready);
    }

    /// Begins an epoch, and wakes the workers that sleep.
    fn announce(&self) {
        let epoch = &self.signals.0.epoch;
        let next = (epoch.load(Ordering::Relaxed) + 1) & !ASLEEP;
        if epoch.swap(next, Ordering::AcqRel) & ASLEEP != 0 {
            futex_wake(epoch, i32::MAX);
        }
    }

    /// Calls the task and keeps what it throws; `Err` if it did.
    fn call(&self, task: Task<'_>, i: usize) -> Result<(), ()> {
        INSIDE.set(true);
        let result = catch_unwind(AssertUnwindSafe(|| task(i)));
        INSIDE.set(false);
        result.map_err(|payload| {
            lock(&self.panic).get_or_insert(payload);
        })
    }

    /// A task for thread `me`, which `begins` with its own.
    fn next_task(&self, me: usize, begins: bool) -> Option<Claim> {
        let claim = |thread: usize| {
            let bit = 1 << (thread % 64);
            let before = self.firsts[thread / 64]
                .0
                .fetch_and(!bit, Ordering::Acquire);
            (before & bit != 0).then_some(Claim::First(thread as u32))
        };
        if begins && let Some(own) = claim(me) {
            return Some(own);
        }
        let ticket = self.ticket.0.fetch_add(1, Ordering::Acquire);
        if ticket < TICKETS {
            return Some(Claim::Ticket(ticket));
        }
        // Those of threads that have not come.
        self.firsts.iter().enumerate().find_map(|(i, word)| {
            loop {
                let left = word.0.load(Ordering::Relaxed);
                if left == 0 {
                    return None;
                }
                if let Some(other) = claim(64 * i + left.trailing_zeros() as usize) {
                    return Some(other);
                }
            }
        })
    }

    /// Takes tasks until there are none.
    fn take_tasks(&self, me: usize) {
        let (mut taken, mut failed) = (0, false);
        while let Some(claim) = self.next_task(me, taken == 0) {
            taken += 1;
            // Nobody need begin another task of a job that has failed.
            if !failed {
                // SAFETY: the claim was published after the job, which is not written again
                // before this thread has reported it below.
                let Job { task, count } = unsafe { *self.job.get() };
                let i = match claim {
                    Claim::First(i) => i,
                    Claim::Ticket(ticket) => ticket - (TICKETS - count),
                };
                failed = self.call(task, i as usize).is_err();
            }
        }
        if taken != 0 {
            let left = self.left.0.fetch_sub(taken, Ordering::Release);
            if left == taken | ASLEEP {
                futex_wake(&self.left.0, 1);
            }
        }
    }

    /// Waits until every task of the job is done.
    fn await_tasks(&self, told: &mut u32) {
        let done = || self.left.0.load(Ordering::Acquire) == 0;
        // The caller is thread 0; nobody tells it anything while it waits.
        self.ask(0, told, done);
        if spin(self.spin, done) {
            return;
        }
        loop {
            let left = self.left.0.fetch_or(ASLEEP, Ordering::Acquire) | ASLEEP;
            if left == ASLEEP {
                return;
            }
            futex_wait(&self.left.0, left);
        }
    }

    fn work(&self, me: usize) {
        let (mut seen, mut told) = (0, 0);
        loop {
            seen = self.await_epoch(me, seen, &mut told);
            if self.stop.load(Ordering::Acquire) {
                return;
            }
            self.take_tasks(me);
        }
    }

    /// Waits for an epoch other than `seen`, and asks for what thread `me` is told meanwhile.
    fn await_epoch(&self, me: usize, seen: u32, told: &mut u32) -> u32 {
        let word = &self.signals.0.epoch;
        let epoch = || word.load(Ordering::Acquire) & !ASLEEP;
        let ready = || epoch() != seen;
        let ready_or_asks = || {
            ready() || {
                self.ask(me, told, ready);
                ready()
            }
        };
        if !spin(self.spin, ready_or_asks) {
            let asleep = seen | ASLEEP;
            let order = (Ordering::AcqRel, Ordering::Acquire);
            loop {
                match word.compare_exchange(seen, asleep, order.0, order.1) {
                    Err(other) if other != asleep => break,
                    _ => futex_wait(word, asleep),
                }
            }
        }
        epoch()
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.announce();
        for worker in self.workers.drain(..) {
            // A worker can't panic outside a task, and tasks are caught.
            let _ = worker.join();
        }
    }
}

/// Spins until `ready` or for the time `limit`, whichever comes first; tells if `ready`.
/// After [`PAUSE`] anybody else who wants the CPU gets it.
fn spin(limit: Duration, mut ready: impl FnMut() -> bool) -> bool {
    if ready() || limit.is_zero() {
        return ready();
    }
    let start = Instant::now();
    loop {
        for _ in 0..32 {
            std::hint::spin_loop();
            if ready() {
                return true;
            }
        }
        let waited = start.elapsed();
        if waited > limit {
            return false;
        }
        if waited > PAUSE {
            thread::yield_now();
        }
    }
}

/// Sleeps while `word` is `value`; may also return without a reason.
fn futex_wait(word: &AtomicU32, value: u32) {
    let operation = libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG;
    let no_timeout = std::ptr::null::<libc::timespec>();
    // SAFETY: the word outlives the call, which only reads it.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), operation, value, no_timeout) };
}

/// Wakes up to `threads` threads that sleep on `word`.
fn futex_wake(word: &AtomicU32, threads: i32) {
    let operation = libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG;
    // SAFETY: the call takes the address only to find the sleepers.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), operation, threads) };
}

/// The CPUs that this process may run on, one of each core first, then their siblings.
pub fn allowed_cpus() -> Vec<usize> {
    let (mut cores, siblings) = cpus();
    cores.extend(siblings);
    cores
}

/// The CPUs that this process may run on: the first one of each core, and their siblings.
fn cpus() -> (Vec<usize>, Vec<usize>) {
    let mut allowed = Vec::new();
    // SAFETY: the set is plain data of the size that is passed.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        if libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set) == 0 {
            allowed.extend((0..libc::CPU_SETSIZE as usize).filter(|&c| libc::CPU_ISSET(c, &set)));
        }
    }
    if allowed.is_empty() {
        allowed.extend(0..thread::available_parallelism().map_or(1, |n| n.get()));
    }
    let first_sibling = |cpu: &usize| {
        let path = format!("/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list");
        let list = std::fs::read_to_string(path).unwrap_or_default();
        let first = list
            .trim()
            .split([',', '-'])
            .next()
            .and_then(|s| s.parse().ok());
        first.is_none_or(|first: usize| first == *cpu)
    };
    allowed.into_iter().partition(first_sibling)
}

/// Binds the calling thread to `cpus`. A refusal is harmless: the thread just may move.
pub(crate) fn pin(cpus: &[usize]) {
    // SAFETY: the set is plain data of the size that is passed.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        for &cpu in cpus {
            libc::CPU_SET(cpu, &mut set);
        }
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ahead::asked;
    use std::sync::{Barrier, atomic::AtomicUsize, mpsc};

    #[test]
    fn workers_stay_on_their_node() {
        let set = Some(vec![0, 2, 4, 6]);
        assert_eq!(within(&set, None), set);
        assert_eq!(within(&set, Some(&vec![4, 5, 6, 7])), Some(vec![4, 6]));
        assert_eq!(within(&set, Some(&vec![1, 3])), Some(vec![1, 3]));
        assert_eq!(within(&None, Some(&vec![1, 3])), Some(vec![1, 3]));
        assert_eq!(within(&None, None), None);
        let pool = Pool::new(PoolConfig {
            distribute: true,
            ..PoolConfig::new(4)
        });
        let ran = AtomicUsize::new(0);
        pool.run(100, &|_| {
            ran.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(ran.load(Ordering::Relaxed), 100);
    }

    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 3, 8] {
            let pool = Pool::new(PoolConfig::new(threads));
            assert_eq!(pool.threads(), threads);
            for count in [0, 1, 2, 7, 100, 1000] {
                let ran: Vec<_> = (0..count).map(|_| AtomicUsize::new(0)).collect();
                pool.run(count, &|i| {
                    ran[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(ran.iter().all(|n| n.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn many_small_jobs_and_parking_between_them() {
        let pool = Pool::new(PoolConfig {
            spin: Duration::from_micros(1),
            ..PoolConfig::new(4)
        });
        let sum = AtomicUsize::new(0);
        for job in 0..2000 {
            pool.run(5, &|i| {
                sum.fetch_add(i, Ordering::Relaxed);
            });
            if job % 500 == 0 {
                thread::sleep(Duration::from_millis(2));
            }
        }
        assert_eq!(sum.load(Ordering::Relaxed), 2000 * 10);
    }

    #[test]
    fn threads_that_sleep_at_once_are_woken() {
        let pool = Pool::new(PoolConfig {
            spin: Duration::ZERO,
            ..PoolConfig::new(3)
        });
        let sum = AtomicUsize::new(0);
        for _ in 0..3000 {
            pool.run(4, &|i| {
                sum.fetch_add(i, Ordering::Relaxed);
            });
        }
        assert_eq!(sum.load(Ordering::Relaxed), 3000 * 6);
    }

    #[test]
    fn workers_that_never_come_are_not_waited_for() {
        let mut pool = Pool::new(PoolConfig::new(1));
        let (release, held) = mpsc::channel::<()>();
        pool.workers.push(thread::spawn(move || {
            // Ends when the sender is dropped.
            let _ = held.recv();
        }));
        let ran = AtomicUsize::new(0);
        for _ in 0..3 {
            pool.run(100, &|_| {
                ran.fetch_add(1, Ordering::Relaxed);
            });
        }
        assert_eq!(ran.load(Ordering::Relaxed), 300);
        drop(release);
    }

    #[test]
    fn every_thread_takes_tasks() {
        // Each task waits for all others: together they need all threads, the caller's too.
        let pool = Pool::new(PoolConfig::new(4));
        for _ in 0..50 {
            let barrier = Barrier::new(4);
            pool.run(4, &|_| {
                barrier.wait();
            });
        }
    }

    #[test]
    fn threads_begin_with_their_own_task() {
        let pool = Pool::new(PoolConfig::new(4));
        let mut owners: [_; 4] = std::array::from_fn(|_| None);
        for _ in 0..50 {
            let barrier = Barrier::new(4);
            let ran: [_; 4] = std::array::from_fn(|_| Mutex::new(None));
            pool.run(4, &|i| {
                // Nobody takes a second task before all have one.
                barrier.wait();
                *lock(&ran[i]) = Some(thread::current().id());
            });
            let ran = ran.map(|id| *lock(&id));
            assert!(owners == [None; 4] || owners == ran);
            owners = ran;
        }
        assert_eq!(owners[0], Some(thread::current().id()));
    }

    #[test]
    fn threads_ask_for_what_they_are_told_of() {
        let pool = Pool::new(PoolConfig {
            spin: Duration::from_secs(60),
            ..PoolConfig::new(3)
        });
        let memory = [0u8; 3 * 64];
        let of = |thread: usize| &memory[thread * 64..(thread + 1) * 64];
        // The caller sees it when it waits for a job's end.
        for waits in [0, 1, 1, 1] {
            pool.ahead((0..3).map(|thread| (thread, of(thread))));
            thread::sleep(Duration::from_millis(10 * waits));
            let barrier = Barrier::new(3);
            pool.run(3, &|i| {
                barrier.wait();
                if waits > 0 && i > 0 {
                    assert_eq!(asked(of(i).as_ptr()), 64);
                }
            });
        }
    }

    #[test]
    fn several_pools_at_once() {
        thread::scope(|scope| {
            for seed in 0..4 {
                scope.spawn(move || {
                    let pool = Pool::new(PoolConfig::new(2 + seed % 2));
                    for job in 0..500 {
                        let count = (job * 7 + seed) % 40;
                        let sum = AtomicUsize::new(0);
                        pool.run(count, &|i| {
                            sum.fetch_add(i + 1, Ordering::Relaxed);
                        });
                        assert_eq!(sum.load(Ordering::Relaxed), count * (count + 1) / 2);
                    }
                });
            }
        });
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        for threads in [1, 2, 3, 8] {
            let pool = Pool::new(PoolConfig::new(threads));
            for count in [1, 2, 50] {
                for _ in 0..20 {
                    // The last task and, where there are enough, others before it.
                    let fails = |i: usize| i + 1 == count || i % 16 == 9;
                    let result = catch_unwind(AssertUnwindSafe(|| {
                        pool.run(count, &|i| assert!(!fails(i), "task {i}"));
                    }));
                    let payload = result.unwrap_err();
                    let text = payload.downcast_ref::<String>().unwrap();
                    let task: usize = text.strip_prefix("task ").unwrap().parse().unwrap();
                    assert!(fails(task), "{text}");
                    let ran = AtomicUsize::new(0);
                    pool.run(count, &|_| {
                        ran.fetch_add(1, Ordering::Relaxed);
                    });
                    assert_eq!(ran.load(Ordering::Relaxed), count);
                }
            }
        }
    }

    #[test]
    fn a_job_inside_a_task_is_refused() {
        let (pool, other) = (Pool::new(PoolConfig::new(2)), Pool::new(PoolConfig::new(2)));
        for inner in [&pool, &other] {
            for count in [1, 4] {
                let outer = || pool.run(count, &|_| inner.run(2, &|_| {}));
                let payload = catch_unwind(AssertUnwindSafe(outer)).unwrap_err();
                assert_eq!(
                    payload.downcast_ref::<&str>(),
                    Some(&"a task started another job")
                );
            }
        }
        pool.run(4, &|_| {});
    }

    #[test]
    fn what_runs_beside_a_job_may_start_others_and_panic() {
        for threads in [1, 3] {
            let (pool, other) = (
                Pool::new(PoolConfig::new(threads)),
                Pool::new(PoolConfig::new(1)),
            );
            let sum = AtomicUsize::new(0);
            for count in [0, 1, 7] {
                let before = sum.load(Ordering::SeqCst);
                let task = |_| {
                    sum.fetch_add(1, Ordering::SeqCst);
                };
                pool.run_beside(count, &task, || {
                    other.run(2, &|_| {
                        sum.fetch_add(10, Ordering::SeqCst);
                    });
                });
                assert_eq!(sum.load(Ordering::SeqCst), before + count + 20);
                // The job is done all the same.
                let beside = || pool.run_beside(count, &task, || panic!("beside"));
                let payload = catch_unwind(AssertUnwindSafe(beside)).unwrap_err();
                assert_eq!(payload.downcast_ref::<&str>(), Some(&"beside"));
                assert_eq!(sum.load(Ordering::SeqCst), before + 2 * count + 20);
            }
        }
    }

    #[test]
    fn jobs_from_several_threads_take_turns() {
        let pool = Pool::new(PoolConfig::new(2));
        let active = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..100 {
                        let inside = AtomicUsize::new(0);
                        pool.run(8, &|i| {
                            if i == 0 {
                                assert_eq!(active.fetch_add(1, Ordering::SeqCst), 0);
                                active.fetch_sub(1, Ordering::SeqCst);
                            }
                            inside.fetch_add(1, Ordering::Relaxed);
                        });
                        assert_eq!(inside.load(Ordering::Relaxed), 8);
                    }
                });
            }
        });
    }
}
