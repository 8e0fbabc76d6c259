//! Which prompts go on in a turn, and by how many tokens.
//!
//! A turn has a budget of prompt tokens ([`budget`]), and it is filled with one prompt after the
//! other ([`fill`]) rather than with a part of each: of prompts that are alike the first is then
//! done after its own time, not after that of all, and the last no later than otherwise.
//!
//! The order is that of when they are due ([`Prompt::due`]). Time is counted in prompt tokens
//! that have been run: a prompt is due as many of them after it got its slot as it has itself.
//! Prompts that are alike are thus served as they come, and a short one passes a long one that
//! has more of its time left. Nobody waits forever: who comes when a prompt is due doesn't pass
//! it any more.

/// A prompt in a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Prompt {
    /// When it should have been run, in prompt tokens since the start.
    pub due: u64,
    /// The task's number, which decides between equals.
    pub number: u64,
    pub slot: usize,
    /// Tokens that are still to be run, at least one.
    pub left: usize,
}

/// Slots with how many tokens of their prompts are run.
pub(super) type Parts = Vec<(usize, usize)>;

/// Prompt tokens of a turn with `answering` slots that get their next token in it and `prompts`
/// that wait for their first; `ubatch` is what runs through the model at once.
///
/// A turn never takes more than what the answers leave of a micro-batch: another one would read
/// all weights again. Where somebody is answering, `chunk` bounds it further, and with it how
/// long they wait for the turn. 0 lets the two kinds share a micro-batch by their numbers, but a
/// quarter of it is always for prompts: many who wait count for more than a few who read.
pub(super) fn budget(ubatch: usize, chunk: usize, answering: usize, prompts: usize) -> usize {
    let room = ubatch - answering % ubatch;
    let most = match (answering, chunk) {
        (0, _) => ubatch,
        (_, 0) => (ubatch / 4).max(ubatch * prompts / (prompts + answering)),
        (_, chunk) => chunk,
    };
    most.clamp(1, room)
}

/// Gives the budget to the prompts, in their order.
pub(super) fn fill(mut budget: usize, mut prompts: Vec<Prompt>) -> Parts {
    prompts.sort_unstable();
    let parts = prompts.into_iter().map(|prompt| {
        let len = prompt.left.min(budget);
        budget -= len;
        (prompt.slot, len)
    });
    parts.filter(|part| part.1 > 0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Prompts of these lengths that come at these turns, run to their end with so much a turn:
    /// the turn in which each is done.
    fn turns(budget: usize, prompts: &[(usize, usize)]) -> Vec<usize> {
        let mut done = vec![0; prompts.len()];
        let mut there: Vec<Prompt> = Vec::new();
        let mut run = 0;
        for turn in 1.. {
            for (slot, &(_, len)) in prompts.iter().enumerate().filter(|p| p.1.0 + 1 == turn) {
                there.push(Prompt {
                    due: run + len as u64,
                    number: slot as u64,
                    slot,
                    left: len,
                });
            }
            for (slot, len) in fill(budget, there.clone()) {
                run += len as u64;
                let at = there.iter().position(|p| p.slot == slot).unwrap();
                there[at].left -= len;
                if there[at].left == 0 {
                    there.remove(at);
                    done[slot] = turn;
                }
            }
            if done.iter().all(|&turn| turn > 0) {
                break;
            }
        }
        done
    }

    #[test]
    fn prompts_that_are_alike_are_done_one_after_the_other() {
        let eight = turns(512, &[(0, 335); 8]);
        // Shared equally, all would be done in turn 6.
        assert_eq!(eight, [1, 2, 2, 3, 4, 4, 5, 6]);
        assert_eq!(turns(100, &[(0, 250), (1, 250)]), [3, 5]);
    }

    #[test]
    fn a_short_prompt_passes_a_long_one_but_not_at_its_end() {
        // Ten turns are left of the long one, or half of one.
        assert_eq!(turns(100, &[(0, 2000), (10, 90)])[1], 11);
        assert_eq!(turns(100, &[(0, 2000), (19, 150)]), [20, 22]);
        // Together from the beginning.
        assert_eq!(turns(100, &[(0, 2000), (0, 90)]), [21, 1]);
    }

    #[test]
    fn a_long_prompt_is_not_passed_for_ever() {
        // Every turn brings a short prompt that fills it. Those that come before the long one is
        // due go first, which are as many tokens as it has; then it is run whole.
        let mut prompts = vec![(0, 1000)];
        prompts.extend((0..50).map(|turn| (turn, 100)));
        let done = turns(100, &prompts);
        assert_eq!(done[0], 19);
        assert_eq!(done[1..10], (1..10).collect::<Vec<_>>());
        assert_eq!(done[10], 20);
    }

    #[test]
    fn answers_leave_a_bounded_part_of_a_micro_batch() {
        // Nobody waits for a token: all of it.
        assert_eq!(budget(512, 0, 0, 1), 512);
        assert_eq!(budget(512, 64, 0, 9), 512);
        // By numbers, but a quarter at least.
        assert_eq!(budget(512, 0, 1, 7), 448);
        assert_eq!(budget(512, 0, 4, 4), 256);
        assert_eq!(budget(512, 0, 7, 1), 128);
        // What was asked for, as far as there is room.
        assert_eq!(budget(512, 64, 1, 7), 64);
        assert_eq!(budget(512, 9999, 12, 4), 500);
        // Answers fill a micro-batch, or more than that.
        assert_eq!(budget(16, 0, 15, 1), 1);
        assert_eq!(budget(16, 0, 16, 16), 8);
        assert_eq!(budget(16, 99, 20, 4), 12);
        assert_eq!(budget(1, 0, 3, 1), 1);
    }
}
