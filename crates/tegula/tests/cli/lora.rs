//! LoRA adapters from end to end: run, held against the reference, explained, refused.

use crate::{fails, json, path, shape, small_model, stdout, tegula, text};
use serde_json::Value;
use std::path::{Path, PathBuf};
use tegula_gguf::{GgmlType, Gguf, Metadata, writer::GgufWriter};

/// An adapter of rank 4 and alpha 8 for some matrices of a model.
fn adapter(model: &Path, name: &str, takes: impl Fn(&str) -> bool) -> PathBuf {
    let gguf = Gguf::open(model).unwrap();
    let mut metadata = Metadata::default();
    let arch = gguf.metadata().get("general.architecture").unwrap();
    metadata.set("general.architecture", arch.clone());
    metadata.set("general.type", "adapter");
    metadata.set("adapter.type", "lora");
    metadata.set("adapter.lora.alpha", 8.0f32);
    let mut writer = GgufWriter::new(metadata);
    let mut data = Vec::new();
    let mut state = 9u32;
    for t in gguf.tensors().iter().filter(|t| takes(&t.name)) {
        let (k, n) = (t.shape[0], t.shape[1]);
        for (which, shape) in [("a", [k, 4]), ("b", [4, n])] {
            let shape = [&shape, &t.shape[2..]].concat();
            let len = shape.iter().product::<u64>();
            let scale = (3.0 / shape[0] as f32).sqrt() / 2.0;
            let value = |_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                scale * ((state >> 8) as f32 / (1 << 23) as f32 - 1.0)
            };
            let values: Vec<f32> = (0..len).map(value).collect();
            let name = format!("{}.lora_{which}", t.name);
            writer.add_tensor(&name, GgmlType::F32, &shape).unwrap();
            data.push(values.iter().flat_map(|v| v.to_le_bytes()).collect());
        }
    }
    let slices: Vec<&[u8]> = data.iter().map(Vec::as_slice).collect();
    let file = model.with_file_name(name);
    std::fs::write(&file, writer.to_bytes(&slices).unwrap()).unwrap();
    file
}

fn of_layers(name: &str) -> bool {
    name.starts_with("blk.") && !name.contains("norm")
}

fn logits(model: &Path, more: &[&str]) -> Vec<f64> {
    let args = ["logits", path(model), "-p", "abc abc", "--json"];
    let report = json(&[&args, more].concat());
    let logits = report["logits"].as_array().unwrap();
    logits.iter().map(|l| l.as_f64().unwrap()).collect()
}

/// Distance over the length of `b`.
fn apart(a: &[f64], b: &[f64]) -> f64 {
    let squares = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>();
    let differences = squares(&mut a.iter().zip(b).map(|(a, b)| a - b));
    (differences / squares(&mut b.iter().copied())).sqrt()
}

#[test]
fn adapters_change_what_models_say_as_the_reference_has_it() {
    for arch in ["qwen3", "qwen3moe"] {
        let (_dir, model) = small_model(arch, "F32");
        let file = adapter(&model, "lora.gguf", of_layers);
        let [plain, zero, half] = [
            vec![],
            vec!["--lora-scaled".to_owned(), format!("{}:0", path(&file))],
            vec!["--lora-scaled".to_owned(), format!("{}:0.5", path(&file))],
        ]
        .map(|args| logits(&model, &args.iter().map(String::as_str).collect::<Vec<_>>()));
        assert_eq!(zero, plain);
        let with = ["--lora", path(&file)];
        let whole = logits(&model, &with);
        assert!(apart(&plain, &whole) > 0.1 && apart(&half, &whole) > 0.05);
        let reference = logits(&model, &[&with[..], &["--reference"]].concat());
        let apart = apart(&whole, &reference);
        assert!(apart < 1e-3, "{arch}: {apart}");
        // Twice the same is twice as much.
        let scaled = format!("{0}:0.5,{0}:0.5", path(&file));
        let twice = logits(&model, &["--lora-scaled", &scaled]);
        assert!(self::apart(&twice, &whole) < 1e-3);
    }
}

#[test]
fn what_is_loaded_is_told() {
    let (_dir, model) = small_model("qwen3moe", "Q4_0");
    let file = adapter(&model, "lora.gguf", of_layers);
    let scaled = format!("{}:0.5", path(&file));
    let run = [
        "run",
        path(&model),
        "-p",
        "x",
        "-n",
        "1",
        "--no-warmup",
        "--lora-scaled",
        &scaled,
    ];
    let said = text(&tegula(&run).stderr);
    let told = "lora.gguf: 16 matrices of rank 4, alpha 8, scale 0.5";
    assert!(said.contains(told), "{said}");
    let explained = stdout(&["explain", path(&model), "--lora-scaled", &scaled]);
    assert!(explained.contains(told), "{explained}");
    let line = |name: &str| explained.lines().find(|l| l.starts_with(name)).unwrap();
    assert!(line("blk.0.attn_q.weight").ends_with("; + lora 0 of rank 4 x 1"));
    assert!(!line("token_embd.weight").contains("lora"));
    let report = json(&["explain", path(&model), "--lora", path(&file), "--json"]);
    assert_eq!(report["adapters"][0]["matrices"], 16);
    assert!(report["buffers"]["cpu/lora"].as_u64().unwrap() > 0);
    let of = |name: &str| {
        let tensors = report["tensors"].as_array().unwrap();
        tensors.iter().find(|t| t["tensor"] == name).unwrap()["lora"].clone()
    };
    assert_eq!(of("blk.0.ffn_up_exps.weight")[0]["scale"], 2.0);
    assert_eq!(of("output_norm.weight"), Value::Null);
    // Without adapters nothing speaks of them.
    let without = json(&["explain", path(&model), "--json"]);
    assert!(!shape(&without).to_string().contains("lora"));
    let inspected = stdout(&["inspect", path(&file)]);
    assert!(inspected.contains("LoRA adapter: 16 matrices of rank 4, alpha 8\n"));
}

#[test]
fn what_is_no_adapter_is_refused() {
    let (dir, model) = small_model("qwen3", "Q4_0");
    let file = adapter(&model, "lora.gguf", of_layers);
    let embeddings = adapter(&model, "embeddings.gguf", |name| {
        name == "token_embd.weight"
    });
    let missing = dir.path().join("missing.gguf");
    let (_other_dir, other) = small_model("llama", "Q4_0");
    let said = |model: &Path, lora: &Path| {
        let args = ["run", path(model), "-p", "x", "--lora", path(lora)];
        let said = fails(3, &args);
        // The reference and the plan refuse it alike.
        assert_eq!(fails(3, &[&args[..], &["--reference"]].concat()), said);
        let explained = fails(3, &["explain", path(model), "--lora", path(lora)]);
        assert_eq!(explained, said);
        said.replace(path(lora.parent().unwrap()), "DIR")
    };
    let all = [
        said(&model, &model),
        said(&other, &file),
        said(&model, &embeddings),
        said(&model, &missing),
    ];
    insta::assert_snapshot!(all.concat());
    for scaled in ["lora.gguf", "lora.gguf:much"] {
        let args = ["run", "-p", "x", "--lora-scaled", scaled];
        assert!(fails(2, &args).contains("such as adapter.gguf:0.5"));
    }
    let peers = ["bench", "--lora", "x.gguf", "--peer", "llama-bench=/x"];
    assert!(fails(2, &peers).contains("--lora is not for peers"));
}
