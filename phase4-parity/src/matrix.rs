//! The matrix of what upstream's AMX does (llama.cpp, `ggml-cpu/amx`) and what this project
//! makes of it: 22 rows, each with evidence that is looked at, or a reason for its absence.

use std::{
    ffi::OsString,
    fs,
    path::Path,
    process::{Command, Stdio},
};

use crate::tiles;

/// One capability.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// 1 to 22.
    pub number: u8,
    /// What it is about.
    pub capability: &'static str,
    /// What upstream does.
    pub upstream: &'static str,
    /// What this project does.
    pub tegula: &'static str,
    /// What shows it.
    pub evidence: &'static [Evidence],
}

/// What shows that a row is as it says.
#[derive(Clone, Copy, Debug)]
pub enum Evidence {
    /// A function of this crate that looks, by its name.
    Here(&'static str, fn() -> Result<String, String>),
    /// A test of this workspace: package, test binary (or `lib`), and its whole name.
    Test(&'static str, &'static str, &'static str),
    /// A record, and the words in it that are the measurement.
    Record(&'static str, &'static str),
    /// It is not there; what it waits for, or why it won't be.
    Not(&'static str),
}

use Evidence::{Here, Not, Record, Test};

const KERNELS: &str = "tegula-kernels";
const ENGINE: &str = "tegula-engine";
const PEERS: &str = "docs/bench/2026-11-24-emerald-rapids/peers.jsonl";
const OURS: &str = "docs/bench/2026-11-24-emerald-rapids/tegula.jsonl";
const LOADS: &str = "docs/bench/2026-11-24-emerald-rapids/tile-loads.txt";
const HYBRID: &str = "docs/bench/2026-11-28-h100-b/bench-20261128T031740Z.json";
/// Perplexities beside llama.cpp's.
const BESIDE: &str = "docs/bench/2026-11-28-h200-c/nvfp4-lora.txt";
const WAYS: &str = "docs/bench/intel-xeon-16c-1gpu/phase-3.json";

/// All rows.
pub const ROWS: [Row; 22] = [
    Row {
        number: 1,
        capability: "the 7 types Q4_0 Q4_1 Q8_0 Q4_K Q5_K Q6_K IQ4_XS",
        upstream: "int8 tiles, activations of 8 bits",
        tegula: "up to 16 tokens int8 tiles and the activations of vectors, beyond bf16 tiles, \
                 weights decoded once per batch",
        evidence: &[Here("tiles::upstreams_types", tiles::upstreams_types)],
    },
    Row {
        number: 2,
        capability: "Q2_K, Q3_K, Q5_0, Q5_1",
        upstream: "no",
        tegula: "the same tiles",
        evidence: &[Here("tiles::more_k_types", tiles::more_k_types)],
    },
    Row {
        number: 3,
        capability: "IQ1 to IQ3, IQ4_NL, MXFP4, NVFP4",
        upstream: "no",
        tegula: "the same tiles; of NVFP4 also the factors of whole matrices (`.scale`), on the CPU",
        evidence: &[
            Here("tiles::codebooks", tiles::codebooks),
            Test(ENGINE, "scales", "products_are_multiplied_by_them"),
            Record(BESIDE, "ferrous-moe-21m-NVFP4-scaled.gguf"),
        ],
    },
    Row {
        number: 4,
        capability: "ik_llama.cpp's own types (IQ*_K, *_KS, *_KT)",
        upstream: "no",
        tegula: "no",
        evidence: &[Not(
            "they are no types of GGUF as ggml defines it; no file of this project's models has them",
        )],
    },
    Row {
        number: 5,
        capability: "BF16",
        upstream: "no",
        tegula: "strips are tiles as they lie: exact weights, no decoding",
        evidence: &[Here("tiles::bf16", tiles::bf16)],
    },
    Row {
        number: 6,
        capability: "F16",
        upstream: "AVX-512 only",
        tegula: "weights rounded to bf16 on the way to tiles, with `--amx` alone",
        evidence: &[
            Here("tiles::f16", tiles::f16),
            Not("f16 tiles: no machine with AMX-FP16 was there to measure them on"),
        ],
    },
    Row {
        number: 7,
        capability: "experts (MUL_MAT_ID)",
        upstream: "no",
        tegula: "tokens grouped by expert, one task list; experts with few tokens on vectors",
        evidence: &[
            Here("tiles::experts", tiles::experts),
            Record(PEERS, "qwen3moe 30B.A3B Q4_0"),
        ],
    },
    Row {
        number: 8,
        capability: "gate, up and activation in one",
        upstream: "no",
        tegula: "one dispatch, shared activations, SwiGLU and the form for down in the epilogue",
        evidence: &[
            Here("tiles::experts", tiles::experts),
            Test(KERNELS, "checkasm", "gate_up::avx2"),
        ],
    },
    Row {
        number: 9,
        capability: "full tiles",
        upstream: "half full (32 of 64 bytes), a quarter for Q6_K",
        tegula: "full bf16 tiles for every type beyond 16 tokens: 1.2 to 2 times as fast at 512 as \
                 int8 tiles with GGUF's scales per block",
        evidence: &[
            Record(LOADS, "14.25 TFLOP/s"),
            Record(WAYS, "product|Q4_0|llama-3-8b gate|512|8-bit tiles|amx"),
        ],
    },
    Row {
        number: 10,
        capability: "few tokens",
        upstream: "tiles of 16 rows from 2 on",
        tegula: "vectors below a measured number of tokens",
        evidence: &[
            Here("tiles::crossover", tiles::crossover),
            Record(OURS, "\"test\": \"pp16\""),
        ],
    },
    Row {
        number: 11,
        capability: "balance of one token's products",
        upstream: "static split by blocks of 64 rows",
        tegula: "runs of strips of 16 rows that get shorter, from one counter",
        evidence: &[Here("tiles::balance", tiles::balance)],
    },
    Row {
        number: 12,
        capability: "quantising activations",
        upstream: "Q8_K by a scalar routine",
        tegula: "vectors that give the scalar routine's codes",
        evidence: &[Test(KERNELS, "checkasm", "quantize_q8::avx2")],
    },
    Row {
        number: 13,
        capability: "reuse of decoded weights",
        upstream: "for 32 tokens",
        tegula: "for up to 512 tokens",
        evidence: &[
            Test(KERNELS, "checkasm", "large_batches::avx2+amx"),
            Record(OURS, "\"test\": \"pp512\""),
        ],
    },
    Row {
        number: 14,
        capability: "batched, broadcast, 3-D, more than 2 GiB",
        upstream: "wrong or out of bounds, as we read it",
        tegula: "right",
        evidence: &[
            Here("tiles::attention", tiles::attention),
            Here("tiles::beyond_two_gib", tiles::beyond_two_gib),
        ],
    },
    Row {
        number: 15,
        capability: "beside GPUs",
        upstream: "with --no-host, without pinned memory",
        tegula: "`--amx` packs what stays on the CPU and changes nothing on devices; \
                 memory for copies is pinned all the same",
        evidence: &[
            Test(
                ENGINE,
                "devices",
                "amx_changes_nothing_on_devices_and_nothing_of_it_is_left_by_full_offload",
            ),
            Record(HYBRID, "--cpu-moe"),
        ],
    },
    Row {
        number: 16,
        capability: "GPUs multiplying packed weights of the CPU",
        upstream: "impossible",
        tegula: "batches of many tokens take them to the GPU where that is faster; `explain` says \
                 from how many on",
        evidence: &[
            Test(
                ENGINE,
                "devices",
                "weights_that_stream_give_the_logits_of_the_cpu",
            ),
            Test(
                ENGINE,
                "devices",
                "the_plan_says_what_streams_and_from_when",
            ),
        ],
    },
    Row {
        number: 17,
        capability: "NUMA",
        upstream: "none",
        tegula: "who packs a page first places it, `--numa` spreads threads; no shards per node",
        evidence: &[Not("a machine of two nodes to measure shards on")],
    },
    Row {
        number: 18,
        capability: "huge pages, packed file",
        upstream: "no",
        tegula: "packed memory on huge pages; `--packed-cache` keeps strips in a file that is mapped",
        evidence: &[
            Test(
                ENGINE,
                "embedded",
                "packed_files_are_written_used_and_replaced_when_they_do_not_fit",
            ),
            Test(
                KERNELS,
                "lib",
                "mem::tests::buffers_are_zero_aligned_and_writable",
            ),
        ],
    },
    Row {
        number: 19,
        capability: "unpacking",
        upstream: "null pointer",
        tegula: "exact inverse, by rows too: tied embeddings need no second copy",
        evidence: &[Here("tiles::inverse", tiles::inverse)],
    },
    Row {
        number: 20,
        capability: "LoRA, saved states, tensor checks with packed weights",
        upstream: "fragile",
        tegula: "LoRA at run time over weights that stay as they are packed, on vectors and tiles, of \
                 dense matrices, experts and routers; saved states; sums of packed files",
        evidence: &[
            Test(ENGINE, "lora", "an_adapter_is_what_merging_it_gives"),
            Test(ENGINE, "lora", "adapters_of_experts_and_routers_are_too"),
            Test(
                ENGINE,
                "lora",
                "weights_of_every_encoding_and_tiles_take_them",
            ),
            Record(BESIDE, "--lora ferrous-moe-21m-lora.gguf"),
            Test(ENGINE, "embedded", "a_saved_state_goes_on_where_it_was"),
        ],
    },
    Row {
        number: 21,
        capability: "attention on tiles",
        upstream: "no",
        tegula: "prompts: scores and weighted values in bf16, softmax in f32",
        evidence: &[Here("tiles::attention", tiles::attention)],
    },
    Row {
        number: 22,
        capability: "saying what runs",
        upstream: "a buffer's size",
        tegula: "`explain --amx` per tensor with the reason, a line at start, exit 4 if AMX can't be had",
        evidence: &[
            Test("tegula", "cli", "commands::emulated_amx_says_so_everywhere"),
            Test("tegula", "cli", "errors::what_the_machine_lacks"),
        ],
    },
];

impl Evidence {
    /// As the table has it.
    pub fn name(&self) -> String {
        match self {
            Here(name, _) => format!("`{name}`"),
            Test(package, target, name) => format!("`{package}` `{target}` `{name}`"),
            Record(path, words) => format!("`{path}`: {words}"),
            Not(why) => format!("not there: {why}"),
        }
    }

    /// Looks at it in the repository at `root`.
    ///
    /// # Errors
    /// Says what does not hold.
    pub fn look(&self, root: &Path) -> Result<String, String> {
        match *self {
            Here(_, look) => look(),
            Test(package, target, name) => test(root, package, target, name),
            Record(path, words) => {
                let text =
                    fs::read_to_string(root.join(path)).map_err(|e| format!("{path}: {e}"))?;
                match text.contains(words) {
                    true => Ok(words.to_owned()),
                    false => Err(format!("{path} says nothing of `{words}`")),
                }
            }
            Not(why) => Ok(why.to_owned()),
        }
    }
}

/// Runs one test.
fn test(root: &Path, package: &str, target: &str, name: &str) -> Result<String, String> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
    let mut command = Command::new(cargo);
    command.args(["test", "--quiet", "--package", package]);
    match target {
        "lib" => command.arg("--lib"),
        target => command.args(["--test", target]),
    };
    let output = command
        .args(["--", "--exact", name])
        .current_dir(root)
        .env("INSTA_UPDATE", "no")
        .stdin(Stdio::null())
        .output()
        .map_err(|e| format!("cargo can't be started: {e}"))?;
    let said = String::from_utf8_lossy(&output.stdout);
    let result = said.lines().find(|l| l.starts_with("test result: "));
    match result {
        Some(line) if output.status.success() && line.contains(" 1 passed") => Ok("passed".into()),
        Some(line) => Err(format!("{package} {name}: {line}")),
        None => {
            let said = String::from_utf8_lossy(&output.stderr);
            Err(format!("{package} {name}: {said}"))
        }
    }
}

/// The rows as cells: number, capability, upstream, this project, evidence.
pub fn table() -> Vec<Vec<String>> {
    let cells = |row: &Row| {
        let evidence: Vec<String> = row.evidence.iter().map(Evidence::name).collect();
        vec![
            row.number.to_string(),
            row.capability.to_owned(),
            row.upstream.to_owned(),
            row.tegula.to_owned(),
            evidence.join("; "),
        ]
    };
    ROWS.iter().map(cells).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_numbered_and_each_has_evidence() {
        for (i, row) in ROWS.iter().enumerate() {
            assert_eq!(usize::from(row.number), i + 1);
            assert!(!row.evidence.is_empty(), "{}", row.capability);
        }
    }

    #[test]
    fn records_that_are_named_say_what_is_quoted() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        for evidence in ROWS.iter().flat_map(|row| row.evidence) {
            if let Record(..) = evidence {
                evidence.look(&root).unwrap();
            }
        }
        assert!(
            Record("README.md", "no such words, ever")
                .look(&root)
                .is_err()
        );
        assert!(Record("no/such/file", "").look(&root).is_err());
    }
}
