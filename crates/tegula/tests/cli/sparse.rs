//! Sparse models from end to end: pruned, packed, unpacked, run, inspected, refused.

use crate::{fails, json, path, small_model, stdout, tegula, text};
use std::fs;

const SHAPE: &str = "qwen3";

fn tokens(model: &str) -> serde_json::Value {
    let run = json(&[
        "run", model, "-p", "abc abc", "-n", "12", "--temp", "0", "--json",
    ]);
    run["tokens"].clone()
}

#[test]
fn a_model_is_pruned_packed_and_runs_as_its_dense_twin() {
    let (dir, model) = small_model(SHAPE, "BF16");
    let file = |name: &str| path(&dir.path().join(name)).to_owned();
    let [pruned, dense, s8, q8] =
        ["pruned", "dense", "s8", "q8"].map(|n| file(&format!("{n}.gguf")));
    let report = json(&[
        "prune",
        path(&model),
        &pruned,
        "--sparsity",
        "0.6",
        "--json",
    ]);
    assert_eq!(report["tensors"], 14);
    assert_eq!(report["packed"], 14);
    let sparsity = report["sparsity"].as_f64().unwrap();
    assert!((0.59..0.62).contains(&sparsity), "{sparsity}");

    let inspected = json(&["inspect", &pruned, "--json"]);
    assert_eq!(inspected["types"]["S-BF16"]["tensors"], 14);
    let tensors = inspected["tensors"].as_array().unwrap();
    let q = tensors
        .iter()
        .find(|t| t["name"] == "blk.0.attn_q.weight")
        .unwrap();
    assert_eq!(q["shape"], serde_json::json!([256, 256]));
    let density = q["density"].as_f64().unwrap();
    assert!((0.38..0.42).contains(&density), "{density}");
    assert!(stdout(&["inspect", &pruned]).contains("% zeros"));
    assert!(stdout(&["explain", &pruned]).contains("sparse: strips without their zeros"));

    stdout(&["quantize", &pruned, &dense, "BF16"]);
    assert_eq!(
        json(&["inspect", &dense, "--json"])["types"]["S-BF16"],
        serde_json::Value::Null
    );
    assert_eq!(tokens(&pruned), tokens(&dense));

    let written = json(&["quantize", &pruned, &s8, "S8", "--json"]);
    assert_eq!(written["types"]["S8"], 14);
    stdout(&["quantize", &dense, &q8, "Q8_0"]);
    assert_eq!(tokens(&s8), tokens(&q8));
    // Nothing temporary is left.
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 5);
}

#[test]
fn wanda_measures_a_text_and_its_norms_prune_again() {
    let (dir, model) = small_model(SHAPE, "BF16");
    let file = |name: &str| path(&dir.path().join(name)).to_owned();
    let [out, again, norms, text] = ["out", "again", "norms", "text"].map(file);
    fs::write(&text, "abc abd ".repeat(60)).unwrap();
    let prune = |out: &str, from: &[&str]| {
        let wanda = ["--sparsity", "0.5", "--method", "wanda", "--json"];
        json(&[&["prune", path(&model), out][..], &wanda, from].concat())
    };
    let measured = ["--calib", &text, "-c", "32", "--save-imatrix", &norms];
    let report = prune(&out, &measured);
    assert_eq!(report["method"], "wanda");
    assert_eq!(report["packed"], 14);
    prune(&again, &["--imatrix", &norms]);
    assert!(fs::read(&out).unwrap() == fs::read(&again).unwrap());
    // Magnitudes alone choose others.
    stdout(&["prune", path(&model), &again, "--sparsity", "0.5"]);
    assert!(fs::read(&out).unwrap() != fs::read(&again).unwrap());
    // Model, text, norms and two results.
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 5);
}

#[test]
fn patterns_are_shown() {
    let (dir, model) = small_model(SHAPE, "BF16");
    let out = path(&dir.path().join("nm.gguf")).to_owned();
    json(&["prune", path(&model), &out, "--nm", "2:4", "--json"]);
    assert!(stdout(&["inspect", &out]).contains("50.0 % zeros, 2:4"));
}

#[test]
fn what_cant_be_is_refused() {
    let (dir, model) = small_model(SHAPE, "BF16");
    let file = |name: &str| path(&dir.path().join(name)).to_owned();
    let (model, out, text) = (path(&model), file("out.gguf"), file("text.txt"));
    fs::write(&text, "short").unwrap();
    let prune = |more: &[&str]| {
        let mut args = vec!["prune", model, &out];
        args.extend(more);
        args.into_iter().map(str::to_owned).collect::<Vec<_>>()
    };
    assert!(fails(2, &prune(&["--sparsity", "1.5"])).contains("out of range"));
    fails(2, &prune(&["--nm", "4:2"]));
    let wanda = ["--sparsity", "0.5", "--method", "wanda"];
    assert!(fails(2, &prune(&wanda)).contains("--calib"));
    let too_short = fails(3, &prune(&[&wanda[..], &["--calib", &text]].concat()));
    assert!(too_short.contains("1024 are needed"), "{too_short}");
    // What meets the embedding are no inputs of a layer.
    fs::write(&text, "abc ".repeat(40)).unwrap();
    let calibrated = ["--calib", &text, "-c", "16", "--tensors", "token_embd"];
    let unmeasured = fails(3, &prune(&[&wanda[..], &calibrated].concat()));
    assert!(
        unmeasured.contains("no norms of its inputs"),
        "{unmeasured}"
    );
    let nothing = fails(2, &prune(&["--sparsity", "0.5", "--tensors", "ssm"]));
    assert!(nothing.contains("`ssm`"), "{nothing}");
    // Model and text.
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);

    stdout(&prune(&["--sparsity", "0.5"]));
    let good = fs::read(&out).unwrap();
    let damaged = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = good.clone();
        change(&mut bytes);
        let path = file("damaged.gguf");
        fs::write(&path, bytes).unwrap();
        fails(3, &["run", &path, "-p", "a", "-n", "1"])
    };
    let find = |what: &[u8]| good.windows(what.len()).position(|w| w == what).unwrap();
    let key = "tegula.sparse.version";
    let newer = damaged(&|b| b[find(key.as_bytes()) + key.len() + 4] = 9);
    assert!(
        newer.contains("sparse format version 9 is newer"),
        "{newer}"
    );
    // A header of 64 bytes, 17 places of strips and filling, then the first bitmap.
    let bits = damaged(&|b| b[find(b"TGSPARSE") + 192..][..64].fill(0xff));
    assert!(bits.contains("strip 0: "), "{bits}");
    assert!(damaged(&|b| b.truncate(b.len() - 4000)).contains("truncated"));
}

#[test]
fn a_sparse_cache_runs_shrinks_and_is_refused_where_it_cannot_be() {
    let prompt = "abc abc abd ".repeat(40);
    let run = |more: &[&str]| {
        let base = ["run", "-p", &prompt, "-n", "8", "--temp", "0", "--json"];
        json(&[&base[..], more].concat())["tokens"].clone()
    };
    let dense = run(&[]);
    assert_eq!(run(&["--sparse-kv", "0"]), dense);
    let sparse = run(&["--sparse-kv", "K=0.3,V=0.5"]);
    assert_eq!(
        run(&["--sparse-kv", "V=0.5,K=0.3", "-t", "1", "-ub", "7"]),
        sparse
    );

    let said = tegula(&["run", "-p", "a", "-n", "1", "-v", "--sparse-kv", "0.5"]);
    let said = text(&said.stderr);
    assert!(said.contains("pruned by K=0.5,V=0.5 (dense: "), "{said}");

    let dir = tempfile::tempdir().unwrap();
    let long = dir.path().join("text");
    fs::write(&long, "A vector owns its buffer. ".repeat(200)).unwrap();
    let rate = |more: &[&str]| {
        let base = ["perplexity", "-f", path(&long), "-c", "256", "--json"];
        json(&[&base[..], more].concat())["ppl"].as_f64().unwrap()
    };
    assert_eq!(rate(&["--sparse-kv", "0"]), rate(&[]));
    assert!(rate(&["--sparse-kv", "0.97"]) > rate(&[]));

    let table = stdout(&[
        "bench",
        "-p",
        "8",
        "-n",
        "0",
        "-r",
        "1",
        "-t",
        "1",
        "--sparse-kv",
        "off",
        "--sparse-kv",
        "K=0.3,V=0.5",
    ]);
    assert!(
        table.contains("f16-30%") && table.contains("f16-50%"),
        "{table}"
    );

    for wrong in ["1", "-0.1", "K=0.3,K=0.4", "Q=0.3", "K", ""] {
        let flag = format!("--sparse-kv={wrong}");
        let error = fails(2, &["run", "-p", "x", &flag]);
        assert!(error.contains("from 0 to below 1"), "{wrong}: {error}");
    }
    let error = fails(2, &["run", "-p", "x", "--sparse-kv", "0.5", "-ctk", "q8_0"]);
    assert!(error.contains("q8_0") && error.contains("f16"), "{error}");
    fails(2, &["serve", "--sparse-kv", "0.5"]);
}

#[test]
fn zeros_are_packed_away_at_load_and_explained() {
    let (dir, model) = small_model(SHAPE, "BF16");
    let pruned = dir.path().join("pruned.gguf");
    let pruned = path(&pruned);
    stdout(&[
        "prune",
        path(&model),
        pruned,
        "--sparsity",
        "0.6",
        "--dense",
    ]);
    let packed = stdout(&["explain", pruned]);
    let kept = stdout(&["explain", pruned, "--no-sparse-pack"]);
    assert!(!kept.contains("are zero"), "{kept}");
    // Where the CPU multiplies them so.
    if packed.contains("sparse16") {
        assert!(packed.contains("60 % of the weights are zero"), "{packed}");
        let rest = stdout(&["explain", pruned, "--isa", "avx2"]);
        assert!(!rest.contains("sparse16"), "{rest}");
    }
    let run = |more: &[&str]| {
        let base = [
            "run", pruned, "-p", "abc", "-n", "12", "--temp", "0", "--json",
        ];
        json(&[&base[..], more].concat())["tokens"].clone()
    };
    assert_eq!(run(&[]), run(&["--no-sparse-pack"]));
}
