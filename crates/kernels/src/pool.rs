//! The thread pool of the kernels.
//!
//! One job at a time, hundreds a token: what counts is the time from one job's last task to
//! the next job's first. Workers spin for the next job and park only when none comes; tasks
//! are taken from one counter, so a slow core takes fewer. Work stealing would add nothing
//! and cost locality.
//!
//! Results never depend on which thread runs a task.

use std::{
    any::Any,
    cell::{Cell, UnsafeCell},
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// How to make a [`Pool`].
#[derive(Clone, Debug)]
pub struct PoolConfig {
    /// Threads that work on a job, the caller among them; at least 1.
    pub threads: usize,
    /// Bind each worker to a CPU of its own while there are enough in the process's set.
    pub pin: bool,
    /// How long an idle worker spins before it parks.
    pub spin: Duration,
}

impl PoolConfig {
    /// Pinned workers that spin for 200 µs.
    pub fn new(threads: usize) -> PoolConfig {
        PoolConfig {
            threads: threads.max(1),
            pin: true,
            spin: Duration::from_micros(200),
        }
    }
}

/// Keeps a value away from its neighbours' cache lines (two: they are fetched in pairs).
#[repr(align(128))]
struct Padded<T>(T);

type Task<'a> = &'a (dyn Fn(usize) + Sync);

/// The job of the current epoch.
#[derive(Clone, Copy)]
struct Job {
    /// Lifetime erased; valid until every worker has checked in for the epoch.
    task: Option<Task<'static>>,
    count: usize,
}

struct Shared {
    /// Counts jobs; workers wait for it to change.
    epoch: Padded<AtomicU32>,
    /// The next task to take.
    next: Padded<AtomicUsize>,
    /// Workers that have not finished the current job.
    busy: Padded<AtomicUsize>,
    job: UnsafeCell<Job>,
    stop: AtomicBool,
    /// Workers that are parked or about to.
    parked: AtomicUsize,
    park: Mutex<()>,
    wake: Condvar,
    /// What the first panicking task threw.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    spin: Duration,
}

// SAFETY: `job` is written only by the thread that holds `Pool::running`, while no worker
// is busy, and published by the release store of `epoch`; workers read it after acquiring.
unsafe impl Sync for Shared {}
// SAFETY: `Job::task` refers to a `Sync` closure.
unsafe impl Send for Shared {}

/// A fixed set of threads that run jobs together.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    running: Mutex<()>,
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
        let cpus = allowed_cpus();
        let threads = config.threads.max(1);
        // Spinning threads would keep each other from the CPU when there are too few.
        let enough = threads <= cpus.len().max(1);
        let shared = Arc::new(Shared {
            epoch: Padded(AtomicU32::new(0)),
            next: Padded(AtomicUsize::new(0)),
            busy: Padded(AtomicUsize::new(0)),
            job: UnsafeCell::new(Job {
                task: None,
                count: 0,
            }),
            stop: AtomicBool::new(false),
            parked: AtomicUsize::new(0),
            park: Mutex::new(()),
            wake: Condvar::new(),
            panic: Mutex::new(None),
            spin: if enough { config.spin } else { Duration::ZERO },
        });
        let workers = (1..threads)
            .map(|i| {
                let shared = Arc::clone(&shared);
                let cpu = (config.pin && enough).then(|| cpus[i]);
                thread::Builder::new()
                    .name(format!("tegula-{i}"))
                    .spawn(move || {
                        if let Some(cpu) = cpu {
                            pin(cpu);
                        }
                        shared.work();
                    })
                    .expect("the operating system starts threads")
            })
            .collect();
        Pool {
            shared,
            workers,
            running: Mutex::new(()),
        }
    }

    /// Threads that work on a job, the caller among them.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `task(0)` … `task(count - 1)`, each once, in no particular order, and returns
    /// when all are done. Jobs from several threads run one after the other.
    ///
    /// # Panics
    /// When a task panics, with its payload, after all threads have come to rest; when
    /// called from inside a task.
    pub fn run(&self, count: usize, task: Task<'_>) {
        assert!(!INSIDE.get(), "a task started another job");
        if count == 0 {
            return;
        }
        let running = lock(&self.running);
        if self.workers.is_empty() || count == 1 {
            INSIDE.set(true);
            let result = catch_unwind(AssertUnwindSafe(|| (0..count).for_each(task)));
            INSIDE.set(false);
            drop(running);
            if let Err(payload) = result {
                resume_unwind(payload);
            }
            return;
        }
        let shared = &*self.shared;
        // SAFETY: no worker is busy, so nobody reads `job`. The erased lifetime ends after
        // `busy` has reached zero below, when no worker holds the reference any more.
        unsafe {
            let task = std::mem::transmute::<Task<'_>, Task<'static>>(task);
            *shared.job.get() = Job {
                task: Some(task),
                count,
            };
        }
        shared.next.0.store(0, Ordering::Relaxed);
        shared.busy.0.store(self.workers.len(), Ordering::Relaxed);
        // Sequentially consistent with the worker's `parked` and `epoch`: either it sees
        // the new epoch or we see it parked.
        shared.epoch.0.fetch_add(1, Ordering::SeqCst);
        if shared.parked.load(Ordering::SeqCst) > 0 {
            let _guard = lock(&shared.park);
            shared.wake.notify_all();
        }
        shared.take_tasks(task, count);
        let mut spins = 0u32;
        while shared.busy.0.load(Ordering::Acquire) != 0 {
            spins += 1;
            if shared.spin.is_zero() || spins > 20_000 {
                thread::yield_now();
            } else {
                std::hint::spin_loop();
            }
        }
        let panic = lock(&shared.panic).take();
        drop(running);
        if let Some(payload) = panic {
            resume_unwind(payload);
        }
    }
}

impl Shared {
    /// Takes tasks until there are none.
    fn take_tasks(&self, task: Task<'_>, count: usize) {
        INSIDE.set(true);
        let result = catch_unwind(AssertUnwindSafe(|| {
            loop {
                let i = self.next.0.fetch_add(1, Ordering::Relaxed);
                if i >= count {
                    break;
                }
                task(i);
            }
        }));
        INSIDE.set(false);
        if let Err(payload) = result {
            // Nobody need begin another task of a job that has failed.
            self.next.0.store(count, Ordering::Relaxed);
            lock(&self.panic).get_or_insert(payload);
        }
    }

    fn work(&self) {
        let mut seen = 0;
        loop {
            seen = self.await_epoch(seen);
            if self.stop.load(Ordering::Acquire) {
                return;
            }
            // SAFETY: published by the epoch that was just acquired; not written again
            // before this thread has checked in.
            let Job { task, count } = unsafe { *self.job.get() };
            if let Some(task) = task {
                self.take_tasks(task, count);
            }
            self.busy.0.fetch_sub(1, Ordering::Release);
        }
    }

    /// Waits for an epoch other than `seen`.
    fn await_epoch(&self, seen: u32) -> u32 {
        let changed = || {
            let epoch = self.epoch.0.load(Ordering::Acquire);
            (epoch != seen).then_some(epoch)
        };
        if !self.spin.is_zero() {
            let start = Instant::now();
            loop {
                for _ in 0..256 {
                    if let Some(epoch) = changed() {
                        return epoch;
                    }
                    std::hint::spin_loop();
                }
                if start.elapsed() > self.spin {
                    break;
                }
            }
        }
        self.parked.fetch_add(1, Ordering::SeqCst);
        let mut guard = lock(&self.park);
        let epoch = loop {
            let epoch = self.epoch.0.load(Ordering::SeqCst);
            if epoch != seen {
                break epoch;
            }
            guard = self
                .wake
                .wait(guard)
                .unwrap_or_else(PoisonError::into_inner);
        };
        drop(guard);
        self.parked.fetch_sub(1, Ordering::SeqCst);
        epoch
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.epoch.0.fetch_add(1, Ordering::SeqCst);
        {
            let _guard = lock(&self.shared.park);
            self.shared.wake.notify_all();
        }
        for worker in self.workers.drain(..) {
            // A worker can't panic outside a task, and tasks are caught.
            let _ = worker.join();
        }
    }
}

/// The CPUs that this process may run on, one of each core first, then their siblings.
pub fn allowed_cpus() -> Vec<usize> {
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
    let (mut cores, siblings): (Vec<_>, Vec<_>) = allowed.into_iter().partition(first_sibling);
    cores.extend(siblings);
    cores
}

/// Binds the calling thread to one CPU. A refusal is harmless: the thread just may move.
fn pin(cpu: usize) {
    // SAFETY: the set is plain data of the size that is passed.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(PoolConfig::new(3));
        let result = catch_unwind(AssertUnwindSafe(|| {
            pool.run(50, &|i| assert!(i != 17, "task seventeen"));
        }));
        let payload = result.unwrap_err();
        assert!(
            payload
                .downcast_ref::<&str>()
                .is_some_and(|s| s.contains("task seventeen"))
        );
        let count = AtomicUsize::new(0);
        pool.run(50, &|_| {
            count.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(count.load(Ordering::Relaxed), 50);
    }

    #[test]
    fn a_job_inside_a_task_is_refused() {
        let pool = Pool::new(PoolConfig::new(2));
        let inner = || pool.run(2, &|_| {});
        let result = catch_unwind(AssertUnwindSafe(|| pool.run(4, &|_| inner())));
        assert!(result.is_err());
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
