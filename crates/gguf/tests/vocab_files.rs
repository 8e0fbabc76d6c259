//! Real vocabularies and long texts beside the checkout (`../shared`, or `TEGULA_SHARED`):
//! every line of every `vocab/*.inp` must give the ids of `*.out`, and the project's models
//! must give the ids of `models/golden.json`. Ignored where the directory isn't there.

use std::path::{Path, PathBuf};
use std::time::Instant;

use libtest_mimic::{Arguments, Failed, Trial};
use serde_json::Value;
use tegula_gguf::Gguf;
use tegula_gguf::tokenizer::{Decoder, EncodeOptions, Tokenizer, VocabKind};

const TEXT: EncodeOptions = EncodeOptions {
    add_special: false,
    parse_special: false,
};

fn main() {
    let shared = std::env::var_os("TEGULA_SHARED")
        .map(PathBuf::from)
        .unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared"));
    let absent = !shared.is_dir();
    let mut trials = Vec::new();
    for vocab in ["llama-bpe", "llama-spm", "qwen2"] {
        let path = shared.join(format!("vocab/ggml-vocab-{vocab}.gguf"));
        let p = path.clone();
        trials.push(Trial::test(format!("vocab::{vocab}::ids"), move || ids(&p)));
        let p = path.clone();
        trials.push(Trial::test(
            format!("vocab::{vocab}::round_trip"),
            move || round_trip(&p),
        ));
        trials.push(Trial::test(
            format!("vocab::{vocab}::one_long_word"),
            move || long_word(&path),
        ));
    }
    for model in ["ferrous-7m", "ferrous-moe-21m"] {
        let dir = shared.join("models");
        trials.push(Trial::test(format!("golden::{model}"), move || {
            golden(&dir, model)
        }));
    }
    for (file, tokens, hash) in [
        ("heldout.txt", 60266, 0xf9df0090b85971fe),
        ("calib.txt", 128436, 0x93a27326a7d716a6),
    ] {
        let dir = shared.join("models");
        trials.push(Trial::test(format!("text::{file}"), move || {
            text(&dir, file, tokens, hash)
        }));
    }
    let trials = trials
        .into_iter()
        .map(|t| t.with_ignored_flag(absent))
        .collect();
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}

fn tokenizer(path: &Path) -> Result<Tokenizer, Failed> {
    Ok(Tokenizer::from_gguf(&Gguf::open(path)?)?)
}

fn beside(path: &Path, extension: &str) -> Result<String, Failed> {
    Ok(std::fs::read_to_string(format!(
        "{}{extension}",
        path.display()
    ))?)
}

fn inputs(path: &Path) -> Result<Vec<String>, Failed> {
    const SEPARATOR: &str = "\n__ggml_vocab_test__\n";
    let inputs = beside(path, ".inp")?;
    let inputs = inputs.strip_suffix(SEPARATOR).unwrap_or(&inputs);
    Ok(inputs.split(SEPARATOR).map(str::to_owned).collect())
}

fn check(ok: bool, what: impl FnOnce() -> String) -> Result<(), Failed> {
    if ok { Ok(()) } else { Err(what().into()) }
}

fn ids(path: &Path) -> Result<(), Failed> {
    let tokenizer = tokenizer(path)?;
    let inputs = inputs(path)?;
    let expected = beside(path, ".out")?;
    let expected: Vec<&str> = expected.lines().collect();
    check(inputs.len() == expected.len() && inputs.len() > 40, || {
        format!("{} inputs, {} outputs", inputs.len(), expected.len())
    })?;
    for (text, expected) in inputs.iter().zip(expected) {
        let expected: Vec<u32> = expected
            .split_whitespace()
            .map(str::parse)
            .collect::<Result<_, _>>()?;
        let ids = tokenizer.encode(text, TEXT);
        check(ids == expected, || {
            format!("{text:?}: {ids:?} instead of {expected:?}")
        })?;
    }
    Ok(())
}

fn round_trip(path: &Path) -> Result<(), Failed> {
    let tokenizer = tokenizer(path)?;
    for text in inputs(path)? {
        let with_bos = EncodeOptions {
            add_special: true,
            parse_special: false,
        };
        let ids = tokenizer.encode(&text, with_bos);
        let bos = ids.first().filter(|_| tokenizer.add_bos()).copied();
        check(
            bos == tokenizer.bos().filter(|_| tokenizer.add_bos()),
            || format!("{text:?}: {ids:?}"),
        )?;
        check(tokenizer.decode(&ids) == text, || {
            format!("{text:?}: {:?}", tokenizer.decode(&ids))
        })?;
        let mut decoder = Decoder::new(&tokenizer);
        let mut streamed: String = ids.iter().map(|&id| decoder.push(id)).collect();
        streamed.push_str(&decoder.flush());
        let spm = tokenizer.kind() == VocabKind::Spm && !text.is_empty();
        let expected = if spm { format!(" {text}") } else { text };
        check(streamed == expected, || {
            format!("{expected:?}: {streamed:?}")
        })?;
    }
    Ok(())
}

/// A megabyte of one letter is one word: merging must not be quadratic.
fn long_word(path: &Path) -> Result<(), Failed> {
    let tokenizer = tokenizer(path)?;
    let word = "a".repeat(1 << 20);
    let start = Instant::now();
    let ids = tokenizer.encode(&word, TEXT);
    let seconds = start.elapsed().as_secs_f64();
    check(tokenizer.decode(&ids) == word, || {
        "another text came back".to_owned()
    })?;
    check(seconds < 10.0, || format!("took {seconds:.1} s"))
}

fn golden(dir: &Path, model: &str) -> Result<(), Failed> {
    let golden: Value = serde_json::from_str(&std::fs::read_to_string(dir.join("golden.json"))?)?;
    let tokenizer = tokenizer(&dir.join(format!("{model}-bf16.gguf")))?;
    let prompts = golden[model]["prompts"].as_array().ok_or("no prompts")?;
    check(prompts.len() >= 3, || format!("{} prompts", prompts.len()))?;
    for prompt in prompts {
        let text = prompt["prompt"].as_str().ok_or("no text")?;
        let ids: Vec<u32> = serde_json::from_value(prompt["ids"].clone())?;
        let got = tokenizer.encode(text, EncodeOptions::default());
        check(got == ids, || {
            format!("{text:?}: {got:?} instead of {ids:?}")
        })?;
        let greedy: Vec<u32> = serde_json::from_value(prompt["greedy"].clone())?;
        let continued = prompt["text"].as_str().ok_or("no continuation")?;
        let decoded = tokenizer.decode(&greedy);
        check(continued.ends_with(&decoded), || {
            format!("{decoded:?} instead of {continued:?}")
        })?;
    }
    Ok(())
}

/// `tokens` and `hash` (FNV-1a over the ids as little-endian 32-bit numbers) were made by
/// Hugging Face's `tokenizers`.
fn text(dir: &Path, file: &str, tokens: usize, hash: u64) -> Result<(), Failed> {
    let tokenizer = tokenizer(&dir.join("ferrous-7m-bf16.gguf"))?;
    let text = std::fs::read_to_string(dir.join(file))?;
    let ids = tokenizer.encode(&text, EncodeOptions::default());
    check(ids.len() == tokens, || {
        format!("{} tokens instead of {tokens}", ids.len())
    })?;
    let bytes = ids.iter().flat_map(|id| id.to_le_bytes());
    let got = bytes.fold(0xcbf29ce484222325u64, |h, b| {
        (h ^ u64::from(b)).wrapping_mul(0x100000001b3)
    });
    check(got == hash, || {
        format!("ids hash to {got:#x} instead of {hash:#x}")
    })?;
    // The calibration text has documents separated by `<|endoftext|>`.
    let mut decoder = Decoder::new(&tokenizer).show_special(true);
    let decoded: String = ids.iter().map(|&id| decoder.push(id)).collect();
    check(decoded == text, || "another text came back".to_owned())
}
