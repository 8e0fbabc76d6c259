//! Tables from records, and from nothing else.

use crate::{
    probe::Probe,
    record::{BenchRecord, Row, State, ratios},
    stats::{NOISE, Summary, median},
};
use std::{
    collections::{BTreeMap, btree_map::Entry},
    fmt::Write as _,
    path::Path,
};

/// Where records lie, from the workspace's root.
pub const RECORDS: &str = "docs/bench";

/// What has been probed, as a table.
pub fn probe_table(probe: &Probe) -> String {
    let mut out = format!(
        "| limit, {} threads | median | p10 | p90 |\n|---|---:|---:|---:|\n",
        probe.threads
    );
    for rate in probe.bandwidth.iter().chain(&probe.compute) {
        let s = Summary::of(&rate.samples);
        let name = match rate.bytes {
            Some(bytes) if bytes >= 1 << 20 => format!("{} ({} MiB)", rate.name, bytes >> 20),
            Some(bytes) => format!("{} ({} KiB)", rate.name, bytes >> 10),
            None => rate.name.clone(),
        };
        let _ = writeln!(
            out,
            "| {name} | {:.1} {} | {:.1} | {:.1} |",
            s.median_ts, rate.unit, s.p10_ts, s.p90_ts
        );
    }
    out
}

/// How two engines or settings compare in one cell.
#[derive(Clone, Debug, PartialEq)]
pub struct Pair<'a> {
    pub ours: &'a Row,
    pub theirs: &'a Row,
    /// Of the same repetition.
    pub ratios: Vec<f64>,
}

impl Pair<'_> {
    /// The middle of the ratios.
    pub fn median(&self) -> f64 {
        median(&self.ratios)
    }

    /// Too noisy for a claim, or too few.
    pub fn no_claim(&self) -> Option<&'static str> {
        if self.ratios.len() < 3 {
            Some("fewer than 3 pairs")
        } else if Summary::of(&self.ratios).noisy {
            Some("noisy")
        } else {
            None
        }
    }
}

/// Every row of ours beside every other row of the same cell: peers, and with AMX the same
/// without it. Only where all took turns.
pub fn pairs(record: &BenchRecord) -> Vec<Pair<'_>> {
    let mut pairs = Vec::new();
    if !record.interleaved {
        return pairs;
    }
    let sampled = || record.rows.iter().filter(|r| !r.samples_ts.is_empty());
    for ours in sampled().filter(|r| r.engine == "tegula") {
        let cell = ours.cell();
        for theirs in sampled() {
            let other_setting = theirs.engine == "tegula" && ours.amx() && !theirs.amx();
            if (theirs.engine != "tegula" || other_setting) && theirs.cell() == cell {
                pairs.push(Pair {
                    ours,
                    theirs,
                    ratios: ratios(ours, theirs),
                });
            }
        }
    }
    pairs
}

/// What a row is called beside others.
fn name(row: &Row) -> String {
    let mut name = row.engine.clone();
    if !row.isa.is_empty() {
        name += &format!(", {}", row.isa);
    }
    if !row.flags.is_empty() {
        name += &format!(" `{}`", row.flags.join(" "));
    }
    name
}

/// Ratios pair by pair, and what failed; empty if there is neither.
pub fn pairs_table(record: &BenchRecord) -> String {
    let mut out = String::new();
    let pairs = pairs(record);
    if !pairs.is_empty() {
        out += "\n| model | threads | test | engine | t/s | beside | t/s | ratio | of pairs |\n\
                |---|---:|---|---|---:|---|---:|---:|---|\n";
    }
    for pair in &pairs {
        let (low, high) = pair
            .ratios
            .iter()
            .fold((f64::MAX, 0f64), |(low, high), &r| {
                (low.min(r), high.max(r))
            });
        let claim = match pair.no_claim() {
            Some(why) => format!("({:.2}: {why}, no claim)", pair.median()),
            None => format!("{:.2}", pair.median()),
        };
        let _ = writeln!(
            out,
            "| {} | {} | {} | {} | {:.2} | {} | {:.2} | {claim} | {}: {low:.2}–{high:.2} |",
            pair.ours.model,
            pair.ours.threads,
            pair.ours.test,
            name(pair.ours),
            pair.ours.summary.median_ts,
            name(pair.theirs),
            pair.theirs.summary.median_ts,
            pair.ratios.len()
        );
    }
    for row in &record.rows {
        if let Some(error) = &row.error {
            let _ = writeln!(out, "\n{} {} {}: {error}", name(row), row.model, row.test);
        }
    }
    out
}

/// The part of the phase's page that comes from the records under the workspace's root.
///
/// # Errors
/// Names a record that can't be read.
pub fn page(root: &Path) -> Result<String, String> {
    let records = BenchRecord::read_all(&root.join(RECORDS)).map_err(|e| e.to_string())?;
    let mut out = "## Measurements\n\n\
        From the records in `docs/bench`; t/s are medians of the raw samples, `noisy` says that \
        the ninetieth percentile is more than "
        .to_owned();
    let _ = writeln!(
        out,
        "{NOISE:.2} times the tenth. Ratios are medians over pairs of samples taken in turns in \
         one run; from noisy ones, or fewer than three, nothing is claimed."
    );
    let whole = || records.iter().filter(|(_, r)| r.state == State::Complete);
    if whole().next().is_none() {
        out += "\nThere are no records yet.\n";
    }
    for (path, record) in whole() {
        let _ = write!(out, "\n### {}\n", heading(root, path, record));
        for probe in &record.probes {
            let _ = write!(out, "\n{}", probe_table(probe));
        }
        let _ = write!(out, "\n{}", rows_table(record));
        out += &pairs_table(record);
    }
    Ok(out)
}

fn heading(root: &Path, path: &Path, record: &BenchRecord) -> String {
    let host = &record.record.host;
    let file = path.strip_prefix(root).unwrap_or(path);
    format!(
        "{}, {} logical CPUs, commit {}, {}\n\n[`{}`](../{})",
        host.cpu,
        host.cores,
        record
            .record
            .commit
            .get(..10)
            .unwrap_or(&record.record.commit),
        record.record.date.get(..10).unwrap_or(&record.record.date),
        file.display(),
        file.display()
    )
}

fn rows_table(record: &BenchRecord) -> String {
    let share =
        |share: Option<f64>| share.map_or_else(String::new, |s| format!("{:.0} %", 100.0 * s));
    let ms = |ms: Option<f64>| ms.map_or_else(String::new, |ms| format!("{ms:.1}"));
    let mut out = "| model | engine | threads | test | t/s | p10–p90 | first token ms | \
                   token p50, p95 ms | bandwidth | peak |\n\
                   |---|---|---:|---|---:|---|---:|---|---:|---:|\n"
        .to_owned();
    for row in &record.rows {
        let s = &row.summary;
        let speed = match (&row.error, row.samples_ts.is_empty()) {
            (Some(_), true) => "failed".to_owned(),
            _ => format!("{:.2}", s.median_ts),
        };
        let tokens = match row.token_p50_ms {
            Some(_) => format!("{}, {}", ms(row.token_p50_ms), ms(row.token_p95_ms)),
            None => String::new(),
        };
        let spread = match (row.samples_ts.len(), s.noisy) {
            (0 | 1, _) => String::new(),
            (_, false) => format!("{:.2}–{:.2}", s.p10_ts, s.p90_ts),
            (_, true) => format!("{:.2}–{:.2} noisy", s.p10_ts, s.p90_ts),
        };
        let _ = writeln!(
            out,
            "| {} | {} | {} | {} | {speed} | {spread} | {} | {tokens} | {} | {} |",
            row.model,
            name(row),
            row.threads,
            row.test,
            ms(row.first_token_ms),
            share(row.bandwidth_share),
            share(row.peak_share)
        );
    }
    out
}

/// Where a run had the model: the flags that say so, or the CPU.
fn placement(record: &BenchRecord, row: &Row) -> String {
    if row.gpus.is_empty() {
        return "CPU".to_owned();
    }
    let mut said = Vec::new();
    let mut words = record.record.command.iter();
    while let Some(word) = words.next() {
        match word.as_str() {
            "--cpu-moe" => said.push(word.clone()),
            "-ngl" | "--n-cpu-moe" => {
                said.extend([word.clone(), words.next().cloned().unwrap_or_default()]);
            }
            _ => {}
        }
    }
    format!("`{}`", said.join(" "))
}

/// Our best beside the best of the others, for the README: of each machine, model, placement, test
/// and instruction set the newest run in which engines took turns, of those from which something is claimed if
/// there are any.
///
/// # Errors
/// Names a record that can't be read.
pub fn summary(root: &Path) -> Result<String, String> {
    let records = BenchRecord::read_all(&root.join(RECORDS)).map_err(|e| e.to_string())?;
    let complete = records.iter().filter(|(_, r)| r.state == State::Complete);
    let mut machines: BTreeMap<String, BTreeMap<_, (bool, String)>> = BTreeMap::new();
    for (path, record) in complete {
        let host = &record.record.host;
        let machine = format!("{}, {} logical CPUs", host.cpu, host.cores);
        let file = path.strip_prefix(root).unwrap_or(path).display();
        let date = record.record.date.get(..10).unwrap_or(&record.record.date);
        for best in best_pairs(record) {
            let no_claim = best.no_claim();
            let claim = match no_claim {
                Some(why) => {
                    let s = Summary::of(&best.ratios);
                    format!("{why}: {:.2} to {:.2}", s.p10_ts, s.p90_ts)
                }
                None => format!("{:.2}", best.median()),
            };
            let placement = placement(record, best.ours);
            let line = format!(
                "| {} | {placement} | {} | {:.1} ({}) | {:.1} ({}) | {claim} | [{date}]({file}) |\n",
                titled(best.ours),
                best.ours.test,
                best.ours.summary.median_ts,
                best.ours.isa,
                best.theirs.summary.median_ts,
                name(best.theirs)
            );
            let lines = machines.entry(machine.clone()).or_default();
            // The same weights may have been called otherwise.
            let ours = best.ours;
            let weights = (ours.arch.clone(), ours.params, ours.file_type.clone());
            let claimed = no_claim.is_none();
            match lines.entry((placement, weights, ours.test.clone(), ours.isa.clone())) {
                Entry::Occupied(older) if older.get().0 && !claimed => {}
                entry => _ = entry.insert_entry((claimed, line)),
            }
        }
    }
    if machines.is_empty() {
        return Ok("\nThere is no record yet in which engines took turns.\n".to_owned());
    }
    let mut out = String::new();
    for (machine, lines) in machines {
        let _ = write!(
            out,
            "\n{machine}:\n\n| model | where | test | Tegula | best of the others | ratio | record |\n\
             |---|---|---|---:|---|---:|---|\n{}",
            lines
                .into_values()
                .map(|(_, line)| line)
                .collect::<String>()
        );
    }
    Ok(out)
}

/// A file's name, and its type if the name does not tell.
fn titled(row: &Row) -> String {
    match row.model.contains(&row.file_type) {
        true => row.model.clone(),
        false => format!("{} ({})", row.model, row.file_type),
    }
}

/// Per cell our best setting beside the peer's best.
pub fn best_pairs(record: &BenchRecord) -> Vec<Pair<'_>> {
    let mut best: Vec<Pair> = Vec::new();
    for pair in pairs(record) {
        if pair.theirs.engine == "tegula" {
            continue;
        }
        let speed = |row: &Row| row.summary.median_ts;
        match best.iter_mut().find(|b| b.ours.cell() == pair.ours.cell()) {
            None => best.push(pair),
            Some(b) => {
                let ours = speed(pair.ours) > speed(b.ours);
                let theirs = speed(pair.theirs) > speed(b.theirs);
                let as_good =
                    speed(pair.ours) >= speed(b.ours) && speed(pair.theirs) >= speed(b.theirs);
                if as_good && (ours || theirs) {
                    *b = pair;
                }
            }
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::tests::{record, row};

    fn compared() -> BenchRecord {
        let mut failed = row("ik-llama-bench", "", &[]);
        failed.error = Some("ended with signal: 11".to_owned());
        let mut slow = row("llama-bench-plain", "", &[5.0, 5.0, 5.0]);
        slow.flags = vec!["--repack".to_owned(), "0".to_owned()];
        record(vec![
            row("tegula", "avx512", &[20.0, 21.0, 20.5]),
            row("tegula", "avx512, amx", &[30.0, 31.0, 30.5]),
            slow,
            row("llama-bench", "", &[10.0, 10.0, 10.0]),
            failed,
        ])
    }

    #[test]
    fn everything_is_paired_with_what_it_beats() {
        let record = compared();
        let named: Vec<_> = pairs(&record)
            .iter()
            .map(|p| {
                (
                    p.ours.isa.clone(),
                    p.theirs.engine.clone(),
                    (p.median() * 100.0).round(),
                )
            })
            .collect();
        let want = [
            ("avx512", "llama-bench-plain", 410.0),
            ("avx512", "llama-bench", 205.0),
            ("avx512, amx", "tegula", 149.0),
            ("avx512, amx", "llama-bench-plain", 610.0),
            ("avx512, amx", "llama-bench", 305.0),
        ];
        assert_eq!(named, want.map(|(a, b, c)| (a.to_owned(), b.to_owned(), c)));
        let best = best_pairs(&record);
        assert_eq!(best.len(), 1);
        assert_eq!(
            (best[0].ours.isa.as_str(), best[0].theirs.engine.as_str()),
            ("avx512, amx", "llama-bench")
        );
        let apart = BenchRecord {
            interleaved: false,
            ..record
        };
        assert!(pairs(&apart).is_empty());
    }

    #[test]
    fn noise_and_failures_are_told_and_claim_nothing() {
        let mut record = compared();
        record.rows[3].set_samples(
            [10.0f64, 7.0, 13.0]
                .iter()
                .map(|s| (64e9 / s) as u64)
                .collect(),
        );
        let table = pairs_table(&record);
        assert!(table.contains("noisy, no claim"), "{table}");
        assert!(
            table.contains("ik-llama-bench m.gguf tg64: ended with signal: 11"),
            "{table}"
        );
        assert!(table.contains("`--repack 0`"), "{table}");
    }

    #[test]
    fn partial_records_are_not_reported() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join(RECORDS).join("2026-11-26-host");
        let mut partial = compared();
        partial.state = State::Interrupted;
        partial.write(&folder).unwrap();
        assert!(page(dir.path()).unwrap().contains("no records yet"));
        assert!(summary(dir.path()).unwrap().contains("no record yet"));
        compared().write(&folder).unwrap();
        let text = page(dir.path()).unwrap();
        assert!(
            text.contains("| m.gguf | tegula, avx512, amx | 14 | tg64 | 30.50 |"),
            "{text}"
        );
        assert!(text.contains("failed"), "{text}");
        let short = summary(dir.path()).unwrap();
        assert!(
            short.contains(
                "| m.gguf (Q4_0) | CPU | tg64 | 30.5 (avx512, amx) | 10.0 (llama-bench) | 3.05 | ["
            ),
            "{short}"
        );
        // Of the same weights, whatever their file is called, the newest says how it is.
        let mut newer = compared();
        newer
            .rows
            .iter_mut()
            .for_each(|r| r.model = "m-Q4_0.gguf".to_owned());
        newer.rows[1].samples_ts = vec![40.0; 3];
        newer.rows[1].summary = Summary::of(&[40.0; 3]);
        newer
            .write(&dir.path().join(RECORDS).join("2026-11-27-host"))
            .unwrap();
        let short = summary(dir.path()).unwrap();
        assert!(
            short.contains("| m-Q4_0.gguf | CPU | tg64 | 40.0 (avx512, amx) |")
                && !short.contains("30.5"),
            "{short}"
        );
        // A noisy run does not take the place of a claim.
        newer.rows[1].samples_ts = vec![20.0, 50.0, 90.0];
        newer.rows[1].summary = Summary::of(&[20.0, 50.0, 90.0]);
        newer
            .write(&dir.path().join(RECORDS).join("2026-11-28-host"))
            .unwrap();
        assert_eq!(summary(dir.path()).unwrap(), short);
        // What runs without tiles says nothing about them.
        newer.rows.remove(1);
        newer
            .write(&dir.path().join(RECORDS).join("2026-11-29-host"))
            .unwrap();
        let both = summary(dir.path()).unwrap();
        assert!(
            both.contains("| 20.5 (avx512) |") && both.contains("| 40.0 (avx512, amx) |"),
            "{both}"
        );
    }
}
