//! Requests that wait. A request may consist of several tasks (choices, texts to embed); the
//! requests take turns, one task each, so a large one doesn't keep the small ones waiting.

use std::{collections::VecDeque, time::Instant};

use super::Task;

pub(super) struct Waiting {
    pub task: Task,
    pub number: u64,
    pub since: Instant,
}

#[derive(Default)]
pub(super) struct Queue {
    requests: VecDeque<VecDeque<Waiting>>,
}

impl Queue {
    /// Requests that wait, as a whole or in part.
    pub fn len(&self) -> usize {
        self.requests.len()
    }

    pub fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }

    pub fn push(&mut self, tasks: VecDeque<Waiting>) {
        if !tasks.is_empty() {
            self.requests.push_back(tasks);
        }
    }

    /// Takes out every task that `end` wants to end.
    pub fn sweep(&mut self, mut end: impl FnMut(&mut Waiting) -> bool) {
        for tasks in &mut self.requests {
            tasks.retain_mut(|task| !end(task));
        }
        self.requests.retain(|tasks| !tasks.is_empty());
    }

    /// The next task that `may_start`: the first of the first request for which it may. That
    /// request goes behind the others.
    pub fn pop(&mut self, mut may_start: impl FnMut(&Task) -> bool) -> Option<Waiting> {
        let at = self
            .requests
            .iter()
            .position(|tasks| tasks.front().is_some_and(|w| may_start(&w.task)))?;
        let mut tasks = self.requests.remove(at)?;
        let first = tasks.pop_front();
        self.push(tasks);
        first
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduler::{Event, Pooling, Sink, Work};

    struct Nowhere;

    impl Sink for Nowhere {
        fn send(&mut self, _: Event) -> bool {
            true
        }

        fn is_open(&self) -> bool {
            true
        }
    }

    fn request(numbers: &[u64]) -> VecDeque<Waiting> {
        let waiting = |&number| Waiting {
            task: Task {
                prompt: vec![number as u32],
                work: Work::Embed(Pooling::Mean),
                owner: 0,
                reuse: true,
                deadline: None,
                sink: Box::new(Nowhere),
            },
            number,
            since: Instant::now(),
        };
        numbers.iter().map(waiting).collect()
    }

    #[test]
    fn requests_take_turns() {
        let mut queue = Queue::default();
        queue.push(request(&[1, 2, 3, 4]));
        queue.push(request(&[10]));
        queue.push(request(&[20, 21]));
        let order: Vec<u64> =
            std::iter::from_fn(|| queue.pop(|_| true).map(|w| w.number)).collect();
        assert_eq!(order, [1, 10, 20, 2, 21, 3, 4]);
    }

    #[test]
    fn who_must_wait_is_passed_by_and_keeps_its_place() {
        let mut queue = Queue::default();
        queue.push(request(&[1]));
        queue.push(request(&[2]));
        queue.push(request(&[3]));
        let next = |queue: &mut Queue, not: u32| queue.pop(|t| t.prompt[0] != not).unwrap().number;
        assert_eq!(next(&mut queue, 1), 2);
        assert_eq!(next(&mut queue, 9), 1);
        queue.sweep(|w| w.number == 3);
        assert!(queue.is_empty());
        assert!(queue.pop(|_| true).is_none());
    }
}
