//! Progress on stderr: a bar on a terminal, now and then a plain line elsewhere.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::{
    io::IsTerminal as _,
    time::{Duration, Instant},
};

/// Without a terminal a line at most this often, and none for work that is done sooner.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    Bytes,
    Chunks,
}

/// A task whose progress is shown. Dropped, it takes its bar away.
pub struct Progress {
    label: &'static str,
    message: String,
    view: View,
}

enum View {
    Bar(ProgressBar),
    Lines(Instant),
}

impl Progress {
    /// Starts to show a task.
    pub fn new(label: &'static str, unit: Unit) -> Progress {
        let view = if std::io::stderr().is_terminal() {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
            bar.set_style(style(unit));
            bar.set_prefix(label);
            View::Bar(bar)
        } else {
            View::Lines(Instant::now())
        };
        Progress {
            label,
            message: String::new(),
            view,
        }
    }

    /// Says what is being done or has come out so far.
    pub fn message(&mut self, message: impl Into<String>) {
        self.message = message.into();
        if let View::Bar(bar) = &self.view {
            bar.set_message(self.message.clone());
        }
    }

    /// So much of the total is done.
    pub fn done(&mut self, done: u64, total: u64) {
        match &mut self.view {
            View::Bar(bar) => {
                bar.set_length(total);
                bar.set_position(done);
            }
            View::Lines(last) => {
                if last.elapsed() >= LINE_EVERY {
                    *last = Instant::now();
                    let percent = done as f64 / total.max(1) as f64 * 100.0;
                    say!("{}: {percent:.0} % {}", self.label, self.message);
                }
            }
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let View::Bar(bar) = &self.view {
            bar.finish_and_clear();
        }
    }
}

fn style(unit: Unit) -> ProgressStyle {
    let template = match unit {
        Unit::Bytes => {
            "{prefix} [{bar:30}] {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta} {wide_msg}"
        }
        Unit::Chunks => "{prefix} [{bar:30}] {pos}/{len} {eta} {wide_msg}",
    };
    ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ")
}
