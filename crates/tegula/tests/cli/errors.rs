//! Bad input: a clear error with the right exit code, nothing half-written, never a panic.

use crate::{fails, json, path, small_model, tegula, tegula_with_input, text};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};
use tegula_gguf::{Gguf, writer::GgufWriter};

fn run(model: &Path) -> [&str; 7] {
    ["run", path(model), "-p", "x", "-n", "1", "--no-warmup"]
}

/// A copy of `model` with some bytes changed.
fn changed(model: &Path, change: impl FnOnce(&mut Vec<u8>)) -> PathBuf {
    let mut bytes = fs::read(model).unwrap();
    change(&mut bytes);
    let path = model.with_extension("changed.gguf");
    fs::write(&path, bytes).unwrap();
    path
}

/// A copy of `model` with a metadata value replaced.
fn with_metadata(model: &Path, key: &str, value: &str) -> PathBuf {
    let gguf = Gguf::open(model).unwrap();
    let mut writer = GgufWriter::like(&gguf).unwrap();
    writer.metadata_mut().set(key, value);
    let data: Vec<_> = gguf.tensors().iter().map(|t| gguf.data(t)).collect();
    let path = model.with_extension("metadata.gguf");
    fs::write(&path, writer.to_bytes(&data).unwrap()).unwrap();
    path
}

#[test]
fn usage() {
    fails(2, &["run", "--no-such-flag"]);
    fails(2, &["run", "-p", "x", "-n", "many"]);
    fails(2, &["run", "-p", "x", "-t", "0"]);
    fails(2, &["tokenize"]);
    fails(2, &["perplexity"]);
    assert!(fails(2, &["run"]).contains("no prompt"));
    assert!(fails(2, &["run", "-p", "x", "-fa", "off"]).contains("always flash attention"));
    assert!(fails(2, &["run", "-p", "x", "-ctk", "q4_0"]).contains("f16, bf16 or q8_0"));
    assert!(fails(2, &["run", "-p", "x", "--temp", "nan"]).contains("--temp"));
    assert!(fails(2, &["run", "-p", "x", "-t", "1", "-tb", "2"]).contains("-tb"));
    assert!(fails(2, &["run", "-p", "x", "--logit-bias", "5"]).contains("15+1.5"));
    assert!(fails(2, &["bench", "-p", "0", "-n", "0"]).contains("no test"));
    assert!(fails(2, &["bench", "-p", "4-1"]).contains("`4-1` is no number or range"));
    assert!(fails(2, &["bench", "-t", "0"]).contains("from 1 to 1024"));
    assert!(fails(2, &["bench", "--amx=emulate"]).contains("no speed worth measuring"));
    // What `--amx off,on` leaves behind where there is AMX.
    assert!(fails(2, &["inspect", "off,on"]).contains("write --amx=off,on"));
    let bench = ["bench", "-p", "1", "-n", "0", "-t", "1", "no-model.gguf"];
    assert!(fails(3, &bench).contains("no-model.gguf: cannot open"));
    assert!(fails(2, &["bench", "--peer", "vllm=/x"]).contains("`vllm=/x` is no peer"));
    assert!(fails(2, &["run", "-p", "x", "--packed-cache"]).contains("embedded model"));
    fails(
        2,
        &["run", "m.gguf", "-p", "x", "--packed-cache", "--no-repack"],
    );
    let twice = ["run", "-p", "x", "--reference", "--save-state", "s"];
    assert!(fails(2, &twice).contains("--reference"));
    assert_eq!(tegula(&["no-such-command"]).status.code(), Some(2));
}

#[test]
fn files_that_are_not_there_or_no_models() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("missing.gguf");
    assert!(fails(3, &run(&missing)).contains("No such file"));
    assert!(fails(3, &run(dir.path())).contains("directory"));
    let prompt = ["run", "-f", path(&missing)];
    assert!(fails(3, &prompt).contains("missing.gguf: cannot read"));
    let text = dir.path().join("text.gguf");
    fs::write(&text, "this is not a model").unwrap();
    assert!(fails(3, &run(&text)).contains("not a GGUF file"));
    fs::write(&text, "").unwrap();
    fails(3, &run(&text));
}

#[test]
fn damaged_models() {
    let (_dir, model) = small_model("qwen3", "Q4_0");
    let cut = |len: usize| changed(&model, |b| b.truncate(len));
    let len = fs::metadata(&model).unwrap().len() as usize;
    for at in [3, 7, 20, 200, 5000, len / 2, len - 1] {
        let said = fails(3, &run(&cut(at)));
        assert!(
            said.contains("truncated") || said.contains("not a GGUF"),
            "{said}"
        );
    }
    let endian = changed(&model, |b| b[4..8].reverse());
    assert!(fails(3, &run(&endian)).contains("big-endian"));
    let version = changed(&model, |b| b[4] = 9);
    assert!(fails(3, &run(&version)).contains("version 9"));
    let absurd = changed(&model, |b| b[8..16].fill(0x7f));
    fails(3, &run(&absurd));
    // Everything that a flipped bit can hit in the header, by a sample.
    let header = Gguf::open(&model).unwrap().files()[0].data_offset as usize;
    for i in 0..40 {
        let bit = i * header * 8 / 40 + i;
        let flipped = changed(&model, |b| b[bit / 8] ^= 1 << (bit % 8));
        let out = tegula(&run(&flipped));
        let said = text(&out.stderr);
        assert!(
            matches!(out.status.code(), Some(0 | 3)),
            "bit {bit}: {said}"
        );
        assert!(!said.contains("panicked"), "bit {bit}: {said}");
    }
}

#[test]
fn models_of_another_kind() {
    let (_dir, model) = small_model("llama", "Q4_0");
    let other = with_metadata(&model, "general.architecture", "mamba");
    let said = fails(3, &run(&other));
    assert!(
        said.contains("`mamba`") && said.contains("llama, qwen2, qwen3"),
        "{said}"
    );
    let name = b"blk.0.attn_q.weight";
    let unknown = changed(&model, |b| {
        let at = b.windows(name.len()).position(|w| w == name).unwrap();
        // Behind the name: dimensions (u32), two lengths (u64), the type.
        b[at + name.len() + 20] = 31;
    });
    let said = fails(3, &run(&unknown));
    assert!(
        said.contains("type id 31") && said.contains("supported: F32"),
        "{said}"
    );
    let template = with_metadata(&model, "tokenizer.chat_template", "{% if %}");
    assert!(fails(3, &["chat", path(&template)]).contains("template"));
    assert!(fails(3, &["chat", path(&model)]).contains("--chat-template"));
}

#[test]
fn prompts_that_do_not_do() {
    let dir = tempfile::tempdir().unwrap();
    let bad = dir.path().join("bad.txt");
    fs::write(&bad, b"abc\xff").unwrap();
    for command in ["run", "logits", "tokenize", "perplexity"] {
        let said = fails(3, &[command, "-f", path(&bad)]);
        assert!(said.contains("not UTF-8 text: invalid at byte 3"), "{said}");
    }
    let long = ["run", "-p", "far more than four tokens", "-c", "4"];
    let said = fails(3, &long);
    assert!(
        said.contains("context is full") && said.contains("-c"),
        "{said}"
    );
    assert!(fails(3, &["run", "-p", ""]).contains("prompt is empty"));
    let bias = ["run", "-p", "x", "--logit-bias", "4096+1"];
    assert!(fails(3, &bias).contains("token 4096 is outside the vocabulary of 4096"));
    fails(3, &[&bias[..], &["--reference"]].concat());
    let short = tegula_with_input(&["perplexity", "-f", "-"], b"too short");
    assert_eq!(short.status.code(), Some(3), "{}", text(&short.stderr));
    let said = tegula_with_input(&["chat"], b"\xff\n");
    assert_eq!(said.status.code(), Some(3), "{}", text(&said.stderr));
}

#[test]
fn what_the_machine_lacks() {
    let doctor = json(&["doctor", "--json"]);
    for tier in doctor["tiers"].as_array().unwrap() {
        let name = tier["name"].as_str().unwrap();
        let run = ["run", "-p", "x", "-n", "1", "--isa", name];
        if tier["available"].as_bool().unwrap() {
            assert_eq!(tegula(&run).status.code(), Some(0));
        } else {
            let reason = tier["reason"].as_str().unwrap();
            assert!(fails(4, &run).contains(reason), "{name}");
            assert!(
                fails(4, &["bench", "--isa", name]).contains(reason),
                "{name}"
            );
        }
    }
    if let Some(reason) = doctor["amx"]["reason"].as_str() {
        for command in ["run", "bench", "explain"] {
            let args = [&[command, "--amx"][..], &["-p", "9"]].concat();
            let args = if command == "explain" {
                &args[..2]
            } else {
                &args[..]
            };
            assert!(fails(4, args).contains(reason), "{command}");
        }
    }
    let memory = fails(4, &["run", "-p", "x", "-c", "100000000000"]);
    assert!(memory.contains("smaller -c"), "{memory}");
    let unknown = fails(2, &["run", "-p", "x", "--isa", "sse9"]);
    assert!(unknown.contains("scalar, avx2, avx512"), "{unknown}");
}

#[test]
fn gpus_that_are_not_there() {
    // As on a machine without any, whatever this one has.
    let without = |args: &[&str], split: &str| {
        let output = Command::new(env!("CARGO_BIN_EXE_tegula"))
            .args(args)
            .env("CUDA_VISIBLE_DEVICES", "")
            .env("TEGULA_CUDA_SPLIT", split)
            .output()
            .unwrap();
        let said = text(&output.stderr).to_owned();
        assert!(
            output.stdout.is_empty() && !said.contains("panicked"),
            "{said}"
        );
        (output.status.code(), said)
    };
    for (code, wrong, what) in [
        (4, &["-ngl", "1"][..], "there is none"),
        (4, &["-ngl", "all"], "there is none"),
        (4, &["-dev", "CUDA7"], "-dev CUDA7: there is no GPU"),
        (2, &["-ot", "exps=CUDA7"], "no device `CUDA7`"),
        (2, &["-ot", "exps"], "expected REGEX=DEVICE"),
        (2, &["-ot", "(=CPU"], "-ot (=CPU"),
        (2, &["-ts", "1,2"], "-ts has 2 shares for 0 devices"),
        (2, &["-mg", "3"], "-mg 3"),
    ] {
        let args = [&["run", "-p", "x", "-n", "1"], wrong].concat();
        let (ended, said) = without(&args, "1");
        assert!(
            ended == Some(code) && said.contains(what),
            "{wrong:?}: {ended:?} {said}"
        );
    }
    for split in ["0", "17", "two"] {
        let (ended, said) = without(&["run", "-p", "x", "-n", "1"], split);
        assert!(
            ended == Some(2) && said.contains("from 1 to 16"),
            "{split}: {said}"
        );
    }
}

#[test]
fn what_is_no_measurement_is_not_recorded() {
    let dir = tempfile::tempdir().unwrap();
    let args = ["bench", "-p", "1", "-n", "0", "--record", path(dir.path())];
    // Tests run a development build.
    if cfg!(debug_assertions) {
        assert!(fails(4, &args).contains("development build"));
        let analysis = ["bench", "--analysis", "--record", path(dir.path())];
        assert!(fails(4, &analysis).contains("development build"));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}

#[test]
fn states_that_are_none() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let args = ["run", "-p", "x", "-n", "1", "--load-state", path(&state)];
    assert!(fails(3, &args).contains("cannot read"));
    fs::write(&state, "nothing of the kind").unwrap();
    assert!(fails(3, &args).contains("not a usable saved state"));
    let nowhere = dir.path().join("no/such/directory");
    let out = tegula(&["run", "-p", "x", "-n", "1", "--save-state", path(&nowhere)]);
    assert_eq!(out.status.code(), Some(3));
}

#[test]
fn quantising_what_can_not_be() {
    let (dir, model) = small_model("llama", "F32");
    let out = dir.path().join("out.gguf");
    let quantize =
        |input: &Path, ty: &str| ["quantize", path(input), path(&out), ty].map(str::to_owned);
    assert!(fails(2, &quantize(&model, "IQ1_S")).contains("can only be read"));
    assert!(fails(2, &quantize(&model, "Q9")).contains("possible: F32"));
    assert!(fails(2, &["quantize", path(&model), path(&model), "Q4_0"]).contains("both"));
    let full = ["quantize", path(&model), "/dev/full", "Q4_0"];
    assert!(fails(3, &full).contains("No space left"));
    let nowhere = dir.path().join("no/such/directory/out.gguf");
    fails(3, &["quantize", path(&model), path(&nowhere), "Q4_0"]);
    // Infinity in the last tensor: found when nearly everything is written.
    let data = Gguf::open(&model).unwrap();
    let last = data.tensors().last().unwrap();
    let at = last.offset as usize;
    let infinite = changed(&model, |b| {
        b[at..at + 4].copy_from_slice(&f32::INFINITY.to_le_bytes());
    });
    let said = fails(3, &quantize(&infinite, "Q4_0"));
    assert!(said.contains(&last.name), "{said}");
    assert_eq!(
        fs::read_dir(dir.path()).unwrap().count(),
        2,
        "something was left"
    );
    let once = dir.path().join("once.gguf");
    crate::stdout(&["quantize", path(&model), path(&once), "Q8_0"]);
    assert!(fails(3, &quantize(&once, "Q4_0")).contains("--allow-requantize"));
}
