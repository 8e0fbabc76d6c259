//! The phase's page: answers with figures, from records and nothing else.

use crate::{
    ablations::{IDEAS, KIND},
    code::Kind,
    lab::{CODE, LIMIT, TRAFFIC},
    products::BYTE_TILES,
    series::{Product, parts},
};
use std::{collections::BTreeMap, fmt::Write as _, path::Path};
use tegula_lab::{Record, Series};

/// Where records lie, from the workspace's root.
pub const RECORDS: &str = "docs/bench";

/// What this phase's records say they are of.
pub const SUBJECT: &str = "phase-3";

/// The phase's records under the workspace's root: `phase-3.json` in the folders of
/// `docs/bench`.
///
/// # Errors
/// Names a folder or record that can't be read.
pub fn records(root: &Path) -> Result<Vec<Record>, String> {
    let dir = root.join(RECORDS);
    if !dir.is_dir() {
        return Ok(Vec::new());
    }
    let entries = std::fs::read_dir(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    let mut paths: Vec<_> = entries
        .flatten()
        .map(|entry| entry.path().join("phase-3.json"))
        .filter(|path| path.is_file())
        .collect();
    paths.sort();
    let read = |path: &std::path::PathBuf| Record::read(path).map_err(|e| e.to_string());
    paths.iter().map(read).collect()
}

/// A product and a figure by two names.
type Cell = BTreeMap<(String, String), (Product, f64)>;

/// The timed products of a record: medians in milliseconds by everything but the way and
/// tier, and by these.
pub struct Times(BTreeMap<(String, String, usize), Cell>);

/// How many times as fast one thing is as another over several cells.
#[derive(Clone, Debug, PartialEq)]
pub struct Gain {
    /// Geometric mean.
    pub mean: f64,
    pub least: f64,
    pub most: f64,
    pub cells: usize,
}

impl Gain {
    /// Of these ratios; nothing if there are none.
    pub fn of(ratios: &[f64]) -> Option<Gain> {
        let cells = ratios.len();
        let logs: f64 = ratios.iter().map(|r| r.ln()).sum();
        (cells > 0).then(|| Gain {
            mean: (logs / cells as f64).exp(),
            least: ratios.iter().copied().fold(f64::INFINITY, f64::min),
            most: ratios.iter().copied().fold(0.0, f64::max),
            cells,
        })
    }
}

impl std::fmt::Display for Gain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.2} ({:.2}–{:.2})", self.mean, self.least, self.most)
    }
}

/// A way's name and a tier's.
type Side<'a> = (&'a str, &'a str);

impl Times {
    /// Those of a record.
    pub fn of(record: &Record) -> Times {
        let mut times: BTreeMap<_, BTreeMap<_, _>> = BTreeMap::new();
        for s in &record.series {
            if let Ok(p) = s.name.parse::<Product>() {
                let cell = (p.ty.clone(), p.shape.clone(), p.m);
                let side = (p.way.clone(), p.tier.clone());
                times.entry(cell).or_default().insert(side, (p, s.median()));
            }
        }
        Times(times)
    }

    /// How many times as fast `ours` is as `theirs` with `m` tokens, over all types and
    /// shapes (or those of one type).
    pub fn gain(&self, ours: Side, theirs: Side, m: usize, ty: Option<&str>) -> Option<Gain> {
        let key = |side: Side| (side.0.to_owned(), side.1.to_owned());
        let (ours, theirs) = (key(ours), key(theirs));
        let cells = self
            .0
            .iter()
            .filter(|((t, _, tokens), _)| *tokens == m && ty.is_none_or(|ty| t == ty));
        let ratios: Vec<f64> = cells
            .filter_map(|(_, sides)| Some(sides.get(&theirs)?.1 / sides.get(&ours)?.1))
            .collect();
        Gain::of(&ratios)
    }

    fn types(&self) -> Vec<String> {
        let mut types: Vec<String> = self.0.keys().map(|k| k.0.clone()).collect();
        types.dedup();
        types
    }

    fn tokens(&self) -> Vec<usize> {
        let mut tokens: Vec<usize> = self.0.keys().map(|k| k.2).collect();
        tokens.sort_unstable();
        tokens.dedup();
        tokens
    }

    /// Of one side with `m` tokens: giga-bytes and giga-operations per second, medians over
    /// shapes of a type.
    fn rates(&self, side: Side, m: usize, ty: &str) -> Option<(f64, f64)> {
        let key = (side.0.to_owned(), side.1.to_owned());
        let cells = self.0.iter().filter(|((t, _, n), _)| t == ty && *n == m);
        let rates: Vec<(f64, f64)> = cells
            .filter_map(|(_, sides)| {
                let (p, ms) = sides.get(&key)?;
                Some((p.bytes as f64 / ms / 1e6, p.operations as f64 / ms / 1e6))
            })
            .collect();
        let middle = |f: fn(&(f64, f64)) -> f64| {
            let series = Series {
                name: String::new(),
                unit: String::new(),
                samples: rates.iter().map(f).collect(),
            };
            series.median()
        };
        (!rates.is_empty()).then(|| (middle(|r| r.0), middle(|r| r.1)))
    }
}

fn limit(record: &Record, name: &str) -> Option<f64> {
    let is = |s: &&Series| parts(s, LIMIT).is_some_and(|p| p == [name]);
    record.series.iter().find(is).map(Series::median)
}

/// The part of the page that comes from the records under the workspace's root.
///
/// # Errors
/// Names a record that can't be read.
pub fn page(root: &Path) -> Result<String, String> {
    let records = records(root)?;
    let mut out = "## Answers\n".to_owned();
    if records.is_empty() {
        out += "\nThere is no record of the laboratory yet (`cargo run --release -p xtask -- phase \
                3 bench`).\n";
    }
    for record in &records {
        let _ = write!(
            out,
            "\n### {}, {} threads, commit {}, {}\n",
            record.host.cpu,
            limit(record, "threads").unwrap_or(f64::NAN),
            record.commit.get(..10).unwrap_or(&record.commit),
            record.date.get(..10).unwrap_or(&record.date)
        );
        answers(record, &mut out);
        code_table(record, &mut out);
        traffic_table(record, &mut out);
    }
    Ok(out)
}

/// Gains with 1, 8, … tokens as cells of a table's row.
fn gains(times: &Times, ours: Side, theirs: Side, ty: Option<&str>) -> String {
    let cell = |&m: &usize| match times.gain(ours, theirs, m, ty) {
        Some(gain) => format!(" {gain} |"),
        None => " |".to_owned(),
    };
    times.tokens().iter().map(cell).collect()
}

fn head(times: &Times, first: &str) -> String {
    let tokens = times.tokens();
    let names: String = tokens.iter().map(|m| format!(" M = {m} |")).collect();
    format!(
        "\n| {first} |{names}\n|---|{}\n",
        "---|".repeat(tokens.len())
    )
}

fn answers(record: &Record, out: &mut String) {
    let times = Times::of(record);
    *out += "\nTimes as fast: geometric means over types and shapes of the medians' ratios, in \
             parentheses the least and the greatest. The way called `row-wise` is upstream's \
             classic one, `interleaved` is IQK's, `tegula` the product's own.\n";

    *out += "\n**What makes the fork fast.** Interleaved, decoded once, against row by row, \
             decoded for each token; then each idea alone.\n";
    *out += &head(&times, "AVX2");
    let avx2 = |way| (way, "avx2");
    for (name, ours, theirs) in [
        ("both ideas", "interleaved", "row-wise"),
        (
            "interleaving, rows decoded once",
            "interleaved",
            "row-wise, decoded once",
        ),
        (
            "decoding once, rows interleaved",
            "interleaved",
            "interleaved, decoded each time",
        ),
        (
            "decoding once, row by row",
            "row-wise, decoded once",
            "row-wise",
        ),
        (
            "byte activations, not f32",
            "interleaved",
            "interleaved, f32 activations",
        ),
    ] {
        let row = gains(&times, avx2(ours), avx2(theirs), None);
        let _ = writeln!(out, "| {name} |{row}");
    }
    *out += &head(&times, "both ideas, by type");
    for ty in times.types() {
        let row = gains(&times, avx2("interleaved"), avx2("row-wise"), Some(&ty));
        let _ = writeln!(out, "| {ty} |{row}");
    }

    *out += "\n**What AVX-512 is worth over AVX2.** Row by row vectors stay 256 bits wide, as \
             upstream's do.\n";
    *out += &head(&times, "AVX-512 over AVX2");
    for way in ["row-wise", "interleaved", "tegula"] {
        let row = gains(&times, (way, "avx512"), (way, "avx2"), None);
        let _ = writeln!(out, "| {way} |{row}");
    }

    *out += "\n**What the panel adds** to decoding once for eight tokens.\n";
    *out += &head(&times, "tegula over interleaved");
    for tier in ["avx2", "avx512"] {
        let row = gains(&times, ("tegula", tier), ("interleaved", tier), None);
        let _ = writeln!(out, "| {tier} |{row}");
    }

    *out += "\n**What AMX adds, and where it cannot.** Below the number of tokens from which on \
             tiles are used the product is that of AVX-512.\n";
    if times
        .gain(("tegula", "amx"), ("tegula", "avx512"), 512, None)
        .is_none()
    {
        *out += "\nThis machine has no AMX.\n";
    } else {
        *out += &head(&times, "AMX over AVX-512");
        for ty in times.types() {
            let row = gains(&times, ("tegula", "amx"), ("tegula", "avx512"), Some(&ty));
            let _ = writeln!(out, "| {ty} |{row}");
        }
    }

    let sides = (("tegula", "amx"), (BYTE_TILES, "amx"));
    let mut types = times.types();
    types.retain(|ty| times.gain(sides.0, sides.1, 512, Some(ty)).is_some());
    if !types.is_empty() {
        *out += "\n**bf16 or 8-bit tiles.** Tegula's bf16 tiles, which hold codes times scales, \
                 against 8-bit tiles, whose integer sums are scaled for every 32 inputs.\n";
        *out += &head(&times, "bf16 over 8 bits");
        for ty in types {
            let row = gains(&times, sides.0, sides.1, Some(&ty));
            let _ = writeln!(out, "| {ty} |{row}");
        }
    }

    *out += "\n**What is left to the roofline.** Bytes of weights per second with one token as a \
             part of the bandwidth measured beside, operations per second with 512 as a part of \
             the peak of the instruction that multiplies.\n\n\
             | type | tier | M = 1, GB/s | of memory | M = 512, GOP/s | of the peak |\n\
             |---|---|---:|---:|---:|---:|\n";
    let memory = limit(record, "memory");
    for ty in times.types() {
        for (tier, peaks) in [
            ("avx2", &["avx2 int8", "avx vnni int8"][..]),
            ("avx512", &["avx512 vnni int8"]),
            ("amx", &["amx bf16"]),
        ] {
            let one = times.rates(("tegula", tier), 1, &ty);
            let many = times.rates(("tegula", tier), 512, &ty);
            let peak = peaks
                .iter()
                .filter_map(|p| limit(record, p))
                .reduce(f64::max);
            let number = |x: Option<f64>| x.map_or_else(String::new, |x| format!("{x:.1}"));
            let part = |x: Option<f64>, of: Option<f64>| {
                let share = x.zip(of).map(|(x, of)| 100.0 * x / of);
                share.map_or_else(String::new, |s| format!("{s:.0} %"))
            };
            if one.is_some() || many.is_some() {
                let (bytes, operations) = (one.map(|r| r.0), many.map(|r| r.1));
                let _ = writeln!(
                    out,
                    "| {ty} | {tier} | {} | {} | {} | {} |",
                    number(bytes),
                    part(bytes, memory),
                    number(operations),
                    part(operations, peak)
                );
            }
        }
    }
    ablation_table(record, out);
}

/// With and without each of the other ideas: idea, case, median milliseconds of both.
pub fn ablated(record: &Record) -> Vec<(String, String, f64, f64)> {
    let side = |idea: &str, case: &str, side: &str| {
        let is = |s: &&Series| parts(s, KIND).is_some_and(|p| p == [idea, case, side]);
        record.series.iter().find(is).map(Series::median)
    };
    let mut out = Vec::new();
    for idea in IDEAS {
        for s in &record.series {
            let Some(parts) = parts(s, KIND) else {
                continue;
            };
            let [name, case, "with"] = parts[..] else {
                continue;
            };
            if let (true, Some(without)) = (name == idea, side(idea, case, "without")) {
                out.push((idea.to_owned(), case.to_owned(), s.median(), without));
            }
        }
    }
    out
}

fn ablation_table(record: &Record, out: &mut String) {
    *out += "\n**Other ideas, each switched off alone.**\n\n\
             | idea | case | with, ms | without, ms | times as fast |\n|---|---|---:|---:|---:|\n";
    for (idea, case, with, without) in ablated(record) {
        let ratio = without / with;
        let _ = writeln!(
            out,
            "| {idea} | {case} | {with:.3} | {without:.3} | {ratio:.2} |"
        );
    }
}

/// Instructions per 32 weights can't be told from a loop alone; the mix can.
fn code_table(record: &Record, out: &mut String) {
    *out += "\n**Instructions** between start and end of the loop over blocks, decoded from the \
             program that measured; of ways that decode once, the code for eight tokens.\n\n\
             | type | way | tier | tokens |";
    for kind in Kind::ALL {
        let _ = write!(out, " {} |", kind.name());
    }
    let _ = writeln!(
        out,
        "\n|---|---|---|---:|{}",
        "---:|".repeat(Kind::ALL.len())
    );
    let mut rows: Vec<(Vec<String>, Vec<f64>)> = Vec::new();
    for s in &record.series {
        let Some(p) = parts(s, CODE).filter(|p| p.len() == 5) else {
            continue;
        };
        let key: Vec<String> = p[..4].iter().map(|&p| p.to_owned()).collect();
        match rows.last_mut() {
            Some((last, counts)) if *last == key => counts.push(s.median()),
            _ => rows.push((key, vec![s.median()])),
        }
    }
    for (key, counts) in rows {
        let counts: Vec<String> = counts.iter().map(|c| format!("{c:.0}")).collect();
        let _ = writeln!(out, "| {} | {} |", key.join(" | "), counts.join(" | "));
    }
}

fn traffic_table(record: &Record, out: &mut String) {
    *out += "\n**Lines moved**, by a model of this machine's first two caches without \
             prefetching: per 1,000 multiplications, Q4_0, 4,096 inputs.\n\n\
             | way | tokens | reads | L1 misses | L2 misses |\n|---|---:|---:|---:|---:|\n";
    let mut rows: Vec<(String, Vec<String>)> = Vec::new();
    for s in &record.series {
        let Some(p) = parts(s, TRAFFIC).filter(|p| p.len() == 3) else {
            continue;
        };
        let (key, count) = (format!("{} | {}", p[0], p[1]), format!("{:.3}", s.median()));
        match rows.last_mut() {
            Some((last, counts)) if *last == key => counts.push(count),
            _ => rows.push((key, vec![count])),
        }
    }
    for (key, counts) in rows {
        let _ = writeln!(out, "| {key} | {} |", counts.join(" | "));
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::series::series;
    use tegula_lab::Host;

    fn product(way: &str, tier: &str, m: usize, ms: f64) -> Series {
        let product = Product {
            ty: "Q4_0".into(),
            shape: "gate".into(),
            m,
            way: way.into(),
            tier: tier.into(),
            operations: 2_000_000_000,
            bytes: 50_000_000,
        };
        Series {
            name: product.to_string(),
            unit: "ms".into(),
            samples: vec![ms; 3],
        }
    }

    /// A small record whose figures are easily told.
    pub(crate) fn record() -> Record {
        let mut record = Record::built(SUBJECT, "0123456789abcdef", false, Host::default());
        for m in [1, 512] {
            record.series.extend([
                product("row-wise", "avx2", m, 12.0),
                product("row-wise, decoded once", "avx2", m, 8.0),
                product("interleaved", "avx2", m, 4.0),
                product("interleaved", "avx512", m, 2.0),
                product("tegula", "avx512", m, 1.0),
            ]);
        }
        record
            .series
            .push(series(LIMIT, &["memory"], "GB/s", vec![100.0]));
        record
            .series
            .push(series(LIMIT, &["avx512 vnni int8"], "GOP/s", vec![4000.0]));
        record
            .series
            .push(series(LIMIT, &["threads"], "threads", vec![14.0]));
        for (side, ms) in [("with", 2.0), ("without", 3.0)] {
            let parts = ["huge pages", "a case", side];
            record.series.push(series(KIND, &parts, "ms", vec![ms]));
        }
        record
    }

    #[test]
    fn answers_follow_from_the_figures() {
        let mut text = String::new();
        answers(&record(), &mut text);
        for line in [
            "| both ideas | 3.00 (3.00–3.00) | 3.00 (3.00–3.00) |",
            "| interleaving, rows decoded once | 2.00 (2.00–2.00) |",
            "| decoding once, row by row | 1.50 (1.50–1.50) |",
            "| interleaved | 2.00 (2.00–2.00) |",
            "This machine has no AMX.",
            "| Q4_0 | avx512 | 50.0 | 50 % | 2000.0 | 50 % |",
            "| huge pages | a case | 2.000 | 3.000 | 1.50 |",
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
    }

    #[test]
    fn pages_come_from_records_alone() {
        let dir = tempfile::tempdir().unwrap();
        assert!(page(dir.path()).unwrap().contains("no record"));
        let path = dir.path().join(RECORDS).join("host/phase-3.json");
        record().write(&path).unwrap();
        let text = page(dir.path()).unwrap();
        assert!(text.contains("14 threads, commit 0123456789"), "{text}");
        std::fs::write(&path, "{").unwrap();
        assert!(page(dir.path()).unwrap_err().contains("phase-3.json"));
    }

    #[test]
    fn gains_are_geometric() {
        let gain = Gain::of(&[1.0, 4.0]).unwrap();
        assert_eq!(
            (gain.mean, gain.least, gain.most, gain.cells),
            (2.0, 1.0, 4.0, 2)
        );
        assert_eq!(Gain::of(&[]), None);
    }
}
