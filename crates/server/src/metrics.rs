//! The scheduler's state in Prometheus' text format.

use std::fmt::Write as _;

use crate::scheduler::{Histogram, SlotState, Snapshot};

/// The text of `/metrics`.
pub fn render(s: &Snapshot) -> String {
    let mut out = String::new();
    let t = &s.totals;
    let busy = |state| s.slots.iter().filter(|slot| slot.state == state).count() as f64;
    let counters = [
        (
            "prompt_tokens_total",
            "Prompt tokens that were run",
            t.prompt_tokens as f64,
        ),
        (
            "prompt_tokens_cached_total",
            "Prompt tokens that were found in the cache",
            t.cached_tokens as f64,
        ),
        (
            "generated_tokens_total",
            "Tokens that were generated",
            t.generated_tokens as f64,
        ),
        (
            "tasks_finished_total",
            "Answers and embeddings that were completed",
            t.finished as f64,
        ),
        (
            "tasks_cancelled_total",
            "Tasks whose client went away",
            t.cancelled as f64,
        ),
        (
            "tasks_failed_total",
            "Tasks that ended in an error",
            t.failed as f64,
        ),
        (
            "requests_refused_total",
            "Requests that found the queue full",
            t.refused as f64,
        ),
        ("steps_total", "Runs of the model", t.steps as f64),
        (
            "step_tokens_total",
            "Tokens in the runs of the model",
            t.step_tokens as f64,
        ),
        (
            "busy_seconds_total",
            "Time in the runs of the model",
            t.busy.as_secs_f64(),
        ),
    ];
    for (name, help, value) in counters {
        metric(&mut out, name, help, "counter", value);
    }
    let gauges = [
        (
            "requests_waiting",
            "Requests that wait for a slot",
            s.waiting as f64,
        ),
        ("slots", "Slots", s.slots.len() as f64),
        (
            "slots_prompt",
            "Slots that run a prompt",
            busy(SlotState::Prompt),
        ),
        (
            "slots_generating",
            "Slots that generate",
            busy(SlotState::Generating),
        ),
        (
            "slots_embedding",
            "Slots that embed a text",
            busy(SlotState::Embedding),
        ),
        ("kv_pages", "Pages of the KV cache", s.pages as f64),
        (
            "kv_pages_free",
            "Pages of the KV cache that nothing holds",
            s.free_pages as f64,
        ),
        (
            "cached_sequences",
            "Finished sequences kept for reuse",
            s.cached_sequences as f64,
        ),
    ];
    for (name, help, value) in gauges {
        metric(&mut out, name, help, "gauge", value);
    }
    let histograms = [
        (
            "queue_seconds",
            "Time from a task's arrival to its slot",
            &t.queue_wait,
        ),
        (
            "first_token_seconds",
            "Time from a task's arrival to its first token",
            &t.first_token,
        ),
        (
            "token_seconds",
            "Time from one token of a task to the next",
            &t.token,
        ),
    ];
    for (name, help, histogram) in histograms {
        write_histogram(&mut out, name, help, histogram);
    }
    out
}

// Writing to a String can't fail.
fn metric(out: &mut String, name: &str, help: &str, kind: &str, value: f64) {
    let _ = writeln!(out, "# HELP tegula_{name} {help}.");
    let _ = writeln!(out, "# TYPE tegula_{name} {kind}");
    let _ = writeln!(out, "tegula_{name} {value}");
}

fn write_histogram(out: &mut String, name: &str, help: &str, h: &Histogram) {
    let _ = writeln!(out, "# HELP tegula_{name} {help}.");
    let _ = writeln!(out, "# TYPE tegula_{name} histogram");
    for (bound, count) in h.buckets() {
        let _ = writeln!(out, "tegula_{name}_bucket{{le=\"{bound}\"}} {count}");
    }
    let _ = writeln!(out, "tegula_{name}_bucket{{le=\"+Inf\"}} {}", h.count());
    let _ = writeln!(out, "tegula_{name}_sum {}", h.sum());
    let _ = writeln!(out, "tegula_{name}_count {}", h.count());
}
