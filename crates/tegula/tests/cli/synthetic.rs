//! `synth`, and every type that it writes run by the engine and by the reference.

use crate::{fails, json, path, stdout};
use serde_json::Value;
use std::{fs, ops::ControlFlow, path::Path};
use tegula_gguf::{GgmlType, Gguf, blocks, quantize::FileType, sparse::densify};

fn logits(model: &Path, more: &[&str]) -> Vec<f64> {
    let common = [
        "logits",
        path(model),
        "-p",
        "the cat sat on it and",
        "--json",
    ];
    let out = json(&[&common, more].concat());
    let logits = out["logits"].as_array().unwrap().iter();
    // Not a number would be null.
    logits
        .map(|l| l.as_f64().expect("a finite logit"))
        .collect()
}

/// `|a - b| / |b|`.
fn distance(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let difference: f64 = a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum();
    (difference / b.iter().map(|b| b * b).sum::<f64>()).sqrt()
}

fn engine_agrees_with_reference(model: &Path, what: &str) {
    let engine = logits(model, &["-t", "2"]);
    let off = distance(&engine, &logits(model, &["--reference"]));
    // Activations are rounded to 8 bits; weights of one bit magnify that.
    assert!(off < 0.08, "{what}: {off}");
    assert!(engine.iter().any(|l| l.abs() > 0.1), "{what}: all but zero");
}

#[test]
fn every_tensor_type_runs() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model.gguf");
    for &ty in GgmlType::ALL.iter().filter(|&&t| blocks::can_dequantize(t)) {
        let size = ["--layers", "1", "--vocab", "320"];
        let args = ["synth", "llama", ty.name(), path(&model), "--pure"];
        stdout(&[&args[..], &size].concat());
        let types = json(&["inspect", path(&model), "--json"])["types"].clone();
        let other = types
            .as_object()
            .unwrap()
            .keys()
            .find(|t| *t != ty.name() && *t != "F32");
        assert_eq!(other, None, "{ty}");
        assert!(
            types[ty.name()]["tensors"].as_u64() >= Some(8),
            "{ty}: {types}"
        );
        engine_agrees_with_reference(&model, ty.name());
    }
}

#[test]
fn every_file_type_is_mixed_as_the_quantiser_mixes_it() {
    let dir = tempfile::tempdir().unwrap();
    let (plain, model) = (dir.path().join("plain.gguf"), dir.path().join("model.gguf"));
    let quantized = dir.path().join("quantized.gguf");
    stdout(&["synth", "qwen3", "BF16", path(&plain)]);
    let types = |file: &Path| {
        let out = json(&["inspect", path(file), "--json"]);
        (out["types"].clone(), out["file_type"].clone())
    };
    for file in FileType::ALL {
        stdout(&["synth", "qwen3", file.name(), path(&model)]);
        if file.can_write() {
            stdout(&["quantize", path(&plain), path(&quantized), file.name()]);
            assert_eq!(types(&model), types(&quantized), "{file}");
        }
        assert_eq!(types(&model).1, file.name());
    }
}

#[test]
fn every_architecture_runs() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model.gguf");
    for shape in ["llama", "qwen2", "qwen3", "qwen3moe"] {
        stdout(&["synth", shape, "Q8_0", path(&model)]);
        engine_agrees_with_reference(&model, shape);
    }
    let experts = ["--experts", "4", "--experts-used", "2", "--ff", "256"];
    stdout(&[&["synth", "llama", "Q8_0", path(&model)][..], &experts].concat());
    engine_agrees_with_reference(&model, "llama with experts");
}

#[test]
fn sparse_models_have_the_zeros_asked_for_and_run_as_their_dense_twins() {
    let dir = tempfile::tempdir().unwrap();
    let [model, dense] = ["model.gguf", "dense.gguf"].map(|name| dir.path().join(name));
    let tokens = |model: &Path, threads: &str| {
        let run = [
            "run",
            path(model),
            "-p",
            "the cat",
            "-n",
            "8",
            "--temp",
            "0",
        ];
        json(&[&run[..], &["-t", threads, "--json"]].concat())["tokens"].clone()
    };
    let cases = [
        ("llama", "S-BF16", ["--sparsity", "0.5"], 0.5),
        ("qwen3", "S8", ["--sparsity", "0.7"], 0.3),
        ("qwen3moe", "S8", ["--nm", "2:4"], 0.5),
        ("qwen3moe", "S4", ["--sparsity", "0.25"], 0.75),
    ];
    for (shape, ty, zeros, want) in cases {
        stdout(&[&["synth", shape, ty, path(&model)][..], &zeros].concat());
        let inspected = json(&["inspect", path(&model), "--json"]);
        assert_eq!(inspected["types"][ty]["tensors"], 14, "{ty}");
        let tensors = inspected["tensors"].as_array().unwrap().iter();
        for t in tensors.filter(|t| t["type"] == ty) {
            let density = t["density"].as_f64().unwrap();
            assert!((density - want).abs() < 0.01, "{ty}: {t}");
        }
        if zeros[0] == "--nm" {
            assert!(stdout(&["inspect", path(&model)]).contains("50.0 % zeros, 2:4"));
        }
        engine_agrees_with_reference(&model, ty);
        // The same numbers as dense blocks, by the format's plain definition.
        let sparse = Gguf::open(&model).unwrap();
        densify(&sparse, &dense, &mut |_| ControlFlow::Continue(())).unwrap();
        let ran = tokens(&model, "1");
        assert_eq!(ran.as_array().unwrap().len(), 8);
        assert_eq!(tokens(&model, "2"), ran, "{ty}");
        assert_eq!(tokens(&dense, "2"), ran, "{ty}");
    }
}

#[test]
fn shapes_are_what_the_flags_say() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model.gguf");
    let args = [
        "synth",
        "qwen3",
        "Q4_0",
        path(&model),
        "--layers",
        "3",
        "--embd",
        "512",
        "--heads",
        "8",
        "--kv-heads",
        "4",
        "--head-dim",
        "32",
        "--ff",
        "640",
        "--vocab",
        "1000",
        "--context",
        "777",
        "--tied",
        "false",
        "--json",
    ];
    let report = json(&args);
    insta::assert_json_snapshot!(report, {".file" => "[path]", ".seconds" => "[time]"});
    let out = json(&["explain", path(&model), "--json"]);
    insta::assert_json_snapshot!(out["model"]);
    let output = out["tensors"].as_array().unwrap().iter();
    assert!(output.map(|t| &t["tensor"]).any(|t| t == "output.weight"));
    let size = fs::metadata(&model).unwrap().len();
    assert_eq!(report["bytes"], Value::from(size));
}

#[test]
fn what_can_not_be_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model.gguf");
    let synth = |more: &[&str]| fails(2, &[&["synth"], more].concat());
    let out = path(&model);
    assert!(synth(&["qwen9", "Q4_0", out]).contains("known: qwen3-0.6b"));
    assert!(synth(&["qwen3", "Q9", out]).contains("unknown type `Q9`"));
    assert!(synth(&["qwen3", "Q4_0", out, "--vocab", "100"]).contains("257"));
    assert!(synth(&["qwen3", "Q4_0", out, "--heads", "3"]).contains("share"));
    assert!(synth(&["qwen3", "Q4_0", out, "--experts", "4"]).contains("no experts"));
    // 96 is no multiple of 256.
    let pure = ["synth", "llama", "Q4_K", out, "--pure", "--embd", "96"];
    assert!(fails(3, &pure).contains("token_embd.weight"));
    assert!(fails(3, &["synth", "qwen3", "Q4_0", "/dev/full"]).contains("No space left"));
    let sparse = |more: &[&str]| synth(&[&["qwen3", "S8", out], more].concat());
    assert!(sparse(&[]).contains("--sparsity X or --nm N:M"));
    for share in ["1", "-0.1", "NaN"] {
        let said = sparse(&[&format!("--sparsity={share}")]);
        assert!(
            said.contains(&format!("sparsity {share} is out of range")),
            "{said}"
        );
    }
    assert!(sparse(&["--nm", "4:2"]).contains("4:2"));
    assert!(sparse(&["--nm", "2:4", "--sparsity", "0.5"]).contains("cannot be used with"));
    for zeros in [["--sparsity", "0.5"], ["--nm", "2:4"]] {
        let said = synth(&[&["qwen3", "Q8_0", out][..], &zeros].concat());
        assert!(said.contains("Q8_0 is dense"), "{said}");
    }
    // 80 is no multiple of 32.
    let rows = [
        "synth", "llama", "S-BF16", out, "--nm", "2:32", "--embd", "80",
    ];
    assert!(fails(3, &rows).contains("attn_q.weight"));
    assert_eq!(
        fs::read_dir(dir.path()).unwrap().count(),
        0,
        "something was left"
    );
}
