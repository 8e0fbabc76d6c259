//! `synth`, and every type that it writes run by the engine and by the reference.

use crate::{fails, json, path, stdout};
use serde_json::Value;
use std::{fs, path::Path};
use tegula_gguf::{GgmlType, blocks, quantize::FileType};

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
    assert_eq!(
        fs::read_dir(dir.path()).unwrap().count(),
        0,
        "something was left"
    );
}
