//! Fuzzing with a stable compiler, without coverage:
//!
//! ```text
//! cargo run --release -p tegula-gguf --example fuzz -- read --seconds 600 --seed 1
//! ```
//!
//! The targets are `read`, `sparse`, `template` and `tokenizer`. It mutates the committed corpus
//! (`--corpus DIR` for another). The libFuzzer targets in `crates/gguf/fuzz` find more per input;
//! this one runs anywhere.

use std::{error::Error, path::PathBuf, process::ExitCode};

use tegula_gguf::fuzz::{
    driver::{self, Random, Target},
    fuzz_read, fuzz_sparse, fuzz_template, fuzz_tokenizer,
};

/// Numbers at which lengths, counts and ids go wrong.
const NUMBERS: [u64; 16] = [
    0,
    1,
    2,
    4,
    8,
    9,
    31,
    33,
    39,
    0xff,
    0xffff,
    0x7fff_ffff,
    0xffff_ffff,
    1 << 40,
    i64::MAX as u64,
    u64::MAX,
];

/// A change to a binary file or to text.
fn mutate(data: &mut Vec<u8>, corpus: &[Vec<u8>], r: &mut Random) {
    let at = r.below(data.len());
    match r.below(9) {
        0 => data[at] = r.next_u64() as u8,
        1 | 2 => {
            let width = [1, 2, 4, 8][r.below(4)];
            let number = NUMBERS[r.below(NUMBERS.len())].to_le_bytes();
            let end = data.len().min(at + width);
            data[at..end].copy_from_slice(&number[..end - at]);
        }
        3 => {
            // Small changes to what is there: off-by-some lengths and offsets.
            if let Some(word) = data.get_mut(at..at + 4) {
                let old = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
                let new = old.wrapping_add(r.below(65) as u32).wrapping_sub(32);
                word.copy_from_slice(&new.to_le_bytes());
            }
        }
        _ => driver::mutate(data, corpus, r),
    }
}

fn main() -> Result<ExitCode, Box<dyn Error>> {
    let mut options = std::env::args().skip(1);
    let name = options
        .next()
        .ok_or("the target is missing: read, sparse, template or tokenizer")?;
    let run: fn(&[u8]) = match name.as_str() {
        "read" => fuzz_read,
        "sparse" => fuzz_sparse,
        "template" => fuzz_template,
        "tokenizer" => fuzz_tokenizer,
        _ => return Err(format!("unknown target {name}").into()),
    };
    let corpus = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/corpus")
        .join(&name);
    let target = Target {
        name,
        run,
        mutate,
        corpus,
    };
    let report = driver::run(target, options)?;
    println!("{report}");
    Ok(report.exit_code())
}
