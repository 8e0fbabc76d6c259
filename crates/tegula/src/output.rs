//! Standard output: JSON documents and text; lines on stderr; how sizes are written.

use anyhow::Context as _;
use serde::Serialize;
use std::io::Write as _;

/// Writes a line to stderr, as `eprintln!` does, but is silent where nobody listens any more.
macro_rules! say {
    ($($message:tt)*) => {{
        use std::io::Write as _;
        // There is nowhere left to report to.
        let _ = writeln!(std::io::stderr(), $($message)*);
    }};
}

/// Writes text to stdout at once.
pub fn text(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .context("cannot write to standard output")
}

/// Writes a line to stdout.
pub fn line(line: &str) -> anyhow::Result<()> {
    text(&format!("{line}\n"))
}

/// Writes one JSON document to stdout.
pub fn json(value: &impl Serialize) -> anyhow::Result<()> {
    line(&serde_json::to_string(value)?)
}

/// Bytes in binary units: `12.3 MiB`.
pub fn bytes(n: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    match unit {
        0 => format!("{n} B"),
        _ => format!("{value:.2} {}", units[unit]),
    }
}

/// A count in decimal units: `7.31 M`.
pub fn count(n: u64) -> String {
    match n {
        0..1_000 => n.to_string(),
        1_000..1_000_000 => format!("{:.2} K", n as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.2} M", n as f64 / 1e6),
        _ => format!("{:.2} B", n as f64 / 1e9),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn sizes_are_readable() {
        assert_eq!(super::bytes(17), "17 B");
        assert_eq!(super::bytes(1536), "1.50 KiB");
        assert_eq!(super::bytes(5 << 30), "5.00 GiB");
        assert_eq!(super::count(999), "999");
        assert_eq!(super::count(7_310_000), "7.31 M");
        assert_eq!(super::count(30_530_000_000), "30.53 B");
    }
}
