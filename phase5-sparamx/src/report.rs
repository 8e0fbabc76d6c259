//! What the phase's page says of format, plan and measurements.

use std::{collections::BTreeMap, fmt::Write as _, path::Path};

use tegula_gguf::GgmlType;
use tegula_lab::{Record, Series};

use crate::bench::Name;

/// How much faster a sparse side was than its dense (or staged) one.
#[derive(Clone, Debug, PartialEq)]
pub struct Gain {
    /// Of the sparse side.
    pub name: Name,
    /// Median milliseconds of the dense and of the sparse side.
    pub ms: [f64; 2],
    /// Bytes of the dense side.
    pub dense_bytes: u64,
    /// The first through the second.
    pub gain: f64,
}

/// The gains of all pairs of series, in the order in which they were measured.
pub fn gains(series: &[Series]) -> Vec<Gain> {
    let named = |s: &Series| Some((s.name.parse::<Name>().ok()?, s.median()));
    let all: Vec<(Name, f64)> = series.iter().filter_map(named).collect();
    let mut out = Vec::new();
    for (name, ms) in all.iter().filter(|(name, _)| name.side == "sparse") {
        let twin = |(other, _): &&(Name, f64)| {
            let like = Name {
                side: name.side.clone(),
                bytes: name.bytes,
                kernels: name.kernels.clone(),
                ..other.clone()
            };
            other.side != "sparse" && like == *name
        };
        if let Some((dense, dense_ms)) = all.iter().find(twin) {
            out.push(Gain {
                name: name.clone(),
                ms: [*dense_ms, *ms],
                dense_bytes: dense.bytes,
                gain: dense_ms / ms,
            });
        }
    }
    out
}

/// The least gain that was asked for, if one was.
pub fn floor(name: &Name) -> Option<f64> {
    let half = name.percent == 50;
    match (name.kind.as_str(), name.m) {
        ("layer", 1) if name.shape == "14336x4096" => match (name.ty, name.percent) {
            (GgmlType::S_BF16, 50) => Some(1.60),
            (GgmlType::S8, 50) => Some(1.45),
            (GgmlType::S8, 70) => Some(1.95),
            (GgmlType::S8, 80) => Some(2.50),
            (GgmlType::S4, 50) => Some(1.15),
            (GgmlType::S4, 70) => Some(1.35),
            _ => None,
        },
        ("experts", 1) if half => Some(1.35),
        ("model", 1) if half && name.ty == GgmlType::S_BF16 => Some(1.55),
        ("model", 1) if half && name.ty == GgmlType::S8 => Some(1.35),
        ("staged", 1) => Some(1.15),
        ("staged", 2..=4) => Some(1.0),
        ("layer" | "model", 16 | 64) => Some(1.0),
        // Else too few tokens go to tiles.
        ("tiles", _) => Some(1.0),
        _ => None,
    }
}

/// What the measurements add to the phase's page.
///
/// # Errors
/// Names a record that can't be read.
pub fn page(root: &Path) -> Result<String, String> {
    let mut out = crate::quality::page(root)?;
    out += "\n";
    out += PLAN;
    out += "\n## Speed\n";
    let records = records(root)?;
    if records.is_empty() {
        out += "\nThere is no record yet (`cargo run --release -p xtask -- phase 5 bench`).\n";
    }
    for record in &records {
        let figure = |name: &str| {
            let found = record.series.iter().find(|s| s.name == name);
            found.map_or(f64::NAN, Series::median)
        };
        let bandwidth = figure("sparse-bandwidth");
        let _ = write!(
            out,
            "\n### {}, {} threads, commit {}, {}\n\n\
             Dense and sparse in turns, at least a gigabyte of copies of each; memory is read \
             at {bandwidth:.1} GB/s. A limit is the ratio of bytes; `staged` and `tiles` stand beside the staged algorithm and \
             beside vectors instead of dense weights.\n\n\
             | what | zeros | shape | tokens | kernels | dense ms | sparse ms | GB/s | gain | limit | asked for |\n\
             |---|---|---|---|---|---|---|---|---|---|---|\n",
            record.host.cpu,
            figure("sparse-threads"),
            record.commit.get(..10).unwrap_or(&record.commit),
            record.date.get(..10).unwrap_or(&record.date)
        );
        for g in gains(&record.series) {
            let n = &g.name;
            let speed = |bytes: u64, ms: f64| bytes as f64 / ms / 1e6;
            let _ = writeln!(
                out,
                "| {} {} | {} % | {} | {} | {} | {:.3} | {:.3} | {:.1}, {:.1} | {:.2} | {:.2} | {} |",
                n.kind,
                n.ty,
                n.percent,
                n.shape,
                n.m,
                n.kernels,
                g.ms[0],
                g.ms[1],
                speed(g.dense_bytes, g.ms[0]),
                speed(n.bytes, g.ms[1]),
                g.gain,
                g.dense_bytes as f64 / n.bytes as f64,
                match floor(n) {
                    None => String::new(),
                    Some(floor) if g.gain < floor => format!("{floor:.2}: **missed**"),
                    Some(floor) => format!("{floor:.2}"),
                }
            );
        }
    }
    Ok(out)
}

/// The newest record of each machine, in order of their directories.
fn records(root: &Path) -> Result<Vec<Record>, String> {
    let dir = root.join("docs/bench");
    let mut newest = BTreeMap::new();
    let entries = std::fs::read_dir(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    for entry in entries {
        let path = entry
            .map_err(|e| e.to_string())?
            .path()
            .join("phase-5.json");
        if path.is_file() {
            let record = Record::read(&path).map_err(|e| e.to_string())?;
            newest.insert(path, record);
        }
    }
    Ok(newest.into_values().collect())
}

/// What does not change from record to record.
const PLAN: &str = "\
## The format

[sparse-format.md](sparse-format.md): strips of 16 outputs, each one contiguous stream of \
super-blocks (scales and bitmaps of up to 16 groups of 32 inputs, then their values); `S-BF16`, \
`S8` and `S4` hold the rows of `BF16`, `Q8_0` and `Q4_0` without their zeros, losslessly.

## What differs from SparAMX, and why

| SparAMX | here | because |
|---|---|---|
| positions stored per thread of the packer | a table of strips, work shared out by strips | a file serves any number of threads; odd shares are right |
| one scale per row for 8 bits, never above 1 | the scales of `Q8_0` and `Q4_0`, 32 weights each | usual weights do not round to zero; products equal the dense ones bit for bit |
| values expanded to memory, loaded as tiles, at any batch | registers up to 8 tokens (`vpexpandb` into a vector of zero points, `vpdpbusd`; `vpexpandw`, `vdpbf16ps`), beyond that once per batch to a panel or to tiles | at batch 1 nothing is written; at batch 512 nothing is expanded twice |
| prefix sums of population counts in vectors | one scalar count per step moves the cursor | the shuffling port has three operations per step, not seven |
| 16-bit and 8-bit values | 4-bit ones, too | equal bytes are what sparse formats are judged by |
| dense experts | stacks of experts, two dispatches per layer | mixtures are what CPUs run best |

## What one token waits for

A step is what a mask covers: 64 weights of `S8` and `S4`, 32 of `S-BF16`. Three of its eleven or \
so operations are for port 5 (the mask on its way to its register, two for the expansion), so a \
core takes a step every three cycles at best.

| 50 % zeros | bytes a step | GB/s that a core can take at 2.6 GHz | limit of the gain, by bytes |
|---|---|---|---|
| `S-BF16` | 36 | 31 | 1.78 |
| `S8` | 44 | 38 | 1.55 |
| `S4` | 28, of which 12 are scales and bitmap | 24 | 1.29 |

Eight cores can take two to three times what their memory gives, so bytes are the limit wherever \
enough lines are on their way all the time. Up to four strips take turns for that, group by group; \
each asks for memory at an even pace, its bytes through its steps, because an `S4` super-block is \
read unevenly: the first half of its groups has 78 % of its bytes. Experts' strips are short: at the \
end of each the thread asks for the next one's first 3 KiB.

The fewer bytes a step has, the nearer its instructions come: with all threads at work each takes a \
step every three nanoseconds at best. So a token's sums stay in registers, memory is asked for every other step \
where two have no more than a line, and only 3 KiB ahead: with 4 KiB of four strips each two threads \
push each other out of the first-level cache (`docs/bench/2026-11-28-h100`).

On the way to tiles a step costs about ten cycles of ports 0 and 5 where codes are converted and \
scaled, and the expansion's three come on top. Codes therefore become f32 by being put into the \
mantissa of a power of two (`vpternlog`), which saves about as much as the expansion costs.

## Why one staging buffer, not two

Of up to 64 tokens or so a pair of strips goes to tiles 512 inputs at a time, which is a super-block, \
the least that can be read by itself: 32 KiB of tiles in a first-level cache of 48 KiB. A second \
buffer would put both into the second-level cache; one strip at a time would fit twice, but loads the \
activations once per strip instead of once per pair. What could overlap is reckoned, not measured: \
16 tokens are 32 tile products of 16 cycles per stretch, beside 2,500 to 3,300 for putting 16,384 \
weights on their way, so that hiding all of them would save a sixth at most, and a core that looks \
512 instructions ahead already begins with the next stretch while they run: they are 160 \
instructions. With 64 tokens they are 2,048 cycles, two fifths of a stretch, and about 1,700 \
instructions, so that little of it overlaps: there a better loop has something to win. More overlap needs decoding and products in one assembler block (tiles must not live \
across two of them), or sums that go to memory and back every few steps, which is what SparAMX's \
dense kernel loses by. Neither is simple, so the order is: a stretch to tiles, its products, the next.

## Limits

- `S8` and `S4` take rows that are multiples of 32; `S-BF16` any.
- The kernels need AVX-512 VBMI2 (and BF16 for `S-BF16`); elsewhere strips are made dense for \
each product, which is right and slow.
- GPUs get sparse matrices as dense ones.
- Wanda measures a layer's inputs behind the pruned layers before it, as its own program does; within \
a layer all inputs are those of its dense matrices, as there. Nothing is retrained.
- A sparse KV cache holds 16-bit values and lies on the CPU; \
within a finished page of 64 positions it can't be cut.
- SparAMX saves layers, not models: `cargo run --release -p phase5-sparamx --example sparamx -- \
OUT.gguf NAME=LAYER.pt` makes tensors of them (8-bit factors become f16 scales, codes and zeros stay).
";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_asked_for_depends_on_what_was_measured() {
        let floor = |name: &str| floor(&name.parse().unwrap());
        let layer = |rest: &str| floor(&format!("sparse|layer|{rest}|avx512|sparse|1"));
        assert_eq!(layer("S8|70|14336x4096|1"), Some(1.95));
        assert_eq!(layer("S8|70|14336x4096|2"), None);
        assert_eq!(layer("S8|50|1024x4096|1"), None);
        assert_eq!(layer("S4|50|14336x4096|64"), Some(1.0));
        assert_eq!(
            floor("sparse|model|S-BF16|50|llama-3-8b|1|avx512|sparse|1").map(|f| f > 1.5),
            Some(true)
        );
    }

    #[test]
    fn sides_find_each_other() {
        let series = |name: &str, samples: &[f64]| Series {
            name: name.into(),
            unit: "ms".into(),
            samples: samples.to_vec(),
        };
        let all = [
            series(
                "sparse|layer|S8|50|64x64|1|avx512|dense|100",
                &[3.0, 2.0, 4.0],
            ),
            series("sparse|layer|S8|50|64x64|1|avx512|sparse|60", &[2.0]),
            series("sparse|layer|S8|70|64x64|1|avx512|dense|100", &[3.0]),
            series("sparse-bandwidth", &[9.0]),
        ];
        let gains = gains(&all);
        assert_eq!(gains.len(), 1);
        assert_eq!((gains[0].gain, gains[0].dense_bytes), (1.5, 100));
    }
}
