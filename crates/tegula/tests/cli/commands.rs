//! What the commands do and print when all is well.

use crate::{json, path, program, shape, small_model, stdout, tegula, tegula_with_input, text};
use std::{
    fs,
    io::Read as _,
    os::unix::fs::PermissionsExt as _,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

const PROMPT: [&str; 6] = ["run", "-p", "An iterator adaptor that", "--temp", "0", "-n"];

fn greedy(n: &str, more: &[&str]) -> serde_json::Value {
    json(&[&PROMPT[..], &[n, "--json"], more].concat())
}

#[test]
fn run_continues_a_text() {
    let out = tegula(&[&PROMPT[..], &["24"]].concat());
    assert!(out.status.success());
    let json = greedy("24", &[]);
    assert_eq!(
        text(&out.stdout).trim_end(),
        json["text"].as_str().unwrap().trim_end()
    );
    let statistics = text(&out.stderr);
    for word in ["model ", "load ", "prompt ", "decode ", "t/s", "threads"] {
        assert!(statistics.contains(word), "{statistics}");
    }
    // Of the scalar tier, which is the same everywhere.
    insta::assert_json_snapshot!(greedy("24", &["--isa", "scalar"]), {
        ".threads" => "[number]",
        ".timings.load_ms" => "[time]",
        ".timings.prompt_ms" => "[time]",
        ".timings.prompt_tps" => "[rate]",
        ".timings.decode_ms" => "[time]",
        ".timings.decode_tps" => "[rate]",
    });
}

#[test]
fn run_is_the_same_however_it_is_run() {
    let want = greedy("16", &[]);
    for more in [
        &["-t", "1"][..],
        &["-t", "2"],
        &["-t", "3"],
        &["-t", "8"],
        &["-b", "3", "-ub", "2"],
        &["--no-repack"],
        &["--no-warmup"],
        &["--stop", "never comes up"],
        &["--repeat-last-n", "0", "--seed", "7"],
    ] {
        let got = greedy("16", more);
        assert_eq!(got["tokens"], want["tokens"], "{more:?}");
        assert_eq!(got["text"], want["text"], "{more:?}");
    }
    let (_dir, model) = small_model("qwen3moe", "Q5_K_M");
    let random = |more: &[&str]| {
        let args = [
            "run",
            path(&model),
            "-p",
            "the",
            "-n",
            "12",
            "--seed",
            "3",
            "--json",
        ];
        json(&[&args, more].concat())["tokens"].clone()
    };
    let want = random(&["-t", "1"]);
    assert_eq!(random(&["-t", "2"]), want);
    assert_eq!(random(&["-t", "5", "--no-mmap"]), want);
}

#[test]
fn the_reference_says_the_same() {
    // Later tokens are close calls, which rounded activations may decide otherwise.
    let engine = greedy("6", &[]);
    let reference = greedy("6", &["--reference"]);
    assert_eq!(reference["isa"], "reference");
    assert_eq!(reference["tokens"], engine["tokens"]);
    assert_eq!(reference["text"], engine["text"]);
    assert_eq!(shape(&reference), shape(&engine));
}

#[test]
fn sampling_flags_have_effect() {
    let first = greedy("1", &[])["tokens"][0].as_u64().unwrap();
    let forbidden = greedy("1", &["--logit-bias", &format!("{first}-inf")]);
    assert_ne!(forbidden["tokens"][0].as_u64(), Some(first));
    let forced = greedy("3", &["--logit-bias", "7+1000"]);
    assert_eq!(forced["tokens"], serde_json::json!([7, 7, 7]));
    let penalised = ["--logit-bias", "7+1000", "--presence-penalty", "2000"];
    assert_ne!(greedy("2", &penalised)["tokens"][1], 7);
    let hot = |seed: &str| {
        let args = [
            "run", "-p", "A", "-n", "8", "--temp", "1.5", "--seed", seed, "--json",
        ];
        json(&args)["tokens"].clone()
    };
    assert_eq!(hot("1"), hot("1"));
    assert_ne!(hot("1"), hot("2"));
}

#[test]
fn run_ends_where_it_should() {
    let whole = greedy("16", &[]);
    let text = whole["text"].as_str().unwrap();
    let stop = &text[10..14];
    let stopped = greedy("16", &["--stop", stop]);
    assert_eq!(stopped["stop_reason"], "stop_string");
    assert_eq!(
        stopped["text"].as_str().unwrap(),
        &text[..text.find(stop).unwrap()]
    );
    let full = greedy("-1", &["-c", "12", "--ignore-eos"]);
    assert_eq!(full["stop_reason"], "context_full");
    let none = greedy("0", &[]);
    assert_eq!(
        (&none["text"], &none["stop_reason"]),
        (&"".into(), &"limit".into())
    );
    assert_eq!(none["timings"]["decode_ms"].to_string(), "0.0");
    // The end-of-text token of the embedded model, made certain.
    let end = greedy("5", &["--logit-bias", "0+1000"]);
    assert_eq!(end["stop_reason"], "end_of_generation");
    let on = greedy("5", &["--logit-bias", "0+1000", "--ignore-eos"]);
    assert_eq!(on["tokens"], serde_json::json!([0, 0, 0, 0, 0]));
}

#[test]
fn prompts_come_from_flags_files_and_standard_input() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("prompt.txt");
    fs::write(&file, "a\\nb\n").unwrap();
    let tokens = |args: &[&str]| {
        let common = ["run", "-n", "0", "--json", "--no-warmup"];
        json(&[&common, args].concat())["prompt_tokens"].clone()
    };
    assert_eq!(tokens(&["-p", "a\\nb"]), tokens(&["-p", "a\nb"]));
    assert_ne!(
        tokens(&["-p", "a\\nb", "--no-escape"]),
        tokens(&["-p", "a\nb"])
    );
    assert_eq!(
        tokens(&["-f", path(&file)]),
        tokens(&["-p", "a\\nb", "--no-escape"])
    );
    let args = ["run", "-f", "-", "-n", "0", "--json"];
    let piped = tegula_with_input(&args, b"a\nb");
    let piped: serde_json::Value = serde_json::from_slice(&piped.stdout).unwrap();
    assert_eq!(piped["prompt_tokens"], tokens(&["-p", "a\nb"]));
    assert_eq!(tokens(&["-p", "-fa"]), tokens(&["--prompt=-fa"]));
}

#[test]
fn states_go_on_where_they_were() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let file = path(&state);
    let whole = greedy("12", &[]);
    let first = greedy("5", &["--save-state", file]);
    let args = [
        "run",
        "--load-state",
        file,
        "-n",
        "7",
        "--temp",
        "0",
        "--json",
    ];
    let second = json(&args);
    let joined = [
        first["text"].as_str().unwrap(),
        second["text"].as_str().unwrap(),
    ]
    .concat();
    assert_eq!(joined, whole["text"].as_str().unwrap());

    let cache = dir.path().join("cache");
    let cold = greedy("5", &["--prompt-cache", path(&cache)]);
    let warm = greedy("5", &["--prompt-cache", path(&cache)]);
    assert_eq!(cold["tokens"], warm["tokens"]);
    assert_eq!(
        warm["timings"]["prompt_n"], 1,
        "only the last token runs again"
    );
    assert!(cold["timings"]["prompt_n"].as_u64() > Some(1));
}

#[test]
fn a_reader_that_leaves_is_no_error() {
    let mut child = program(&["run", "-p", "An", "-n", "-1", "--ignore-eos"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut some = [0; 4];
    child.stdout.take().unwrap().read_exact(&mut some).unwrap();
    let out = child.wait_with_output().unwrap();
    assert_eq!(out.status.code(), Some(0));
    assert_eq!(text(&out.stderr), "");
}

#[test]
fn nobody_has_to_listen_to_the_statistics() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let out = program(&["run", "-p", "x", "-n", "1"])
        .stderr(writer)
        .output()
        .unwrap();
    assert_eq!(out.status.code(), Some(0));
}

#[test]
fn an_interrupt_still_prints_statistics() {
    let mut child = program(&["run", "-p", "An", "-n", "-1", "--ignore-eos"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut some = [0; 4];
    let mut out = child.stdout.take().unwrap();
    out.read_exact(&mut some).unwrap();
    let kill = format!("kill -INT {}", child.id());
    assert!(
        Command::new("sh")
            .args(["-c", &kill])
            .status()
            .unwrap()
            .success()
    );
    let mut rest = String::new();
    out.read_to_string(&mut rest).unwrap();
    let ended = child.wait_with_output().unwrap();
    let said = text(&ended.stderr);
    assert_eq!(ended.status.code(), Some(0), "{said}");
    assert!(
        said.contains("decode ") && said.contains("interrupted"),
        "{said}"
    );
}

#[test]
fn chat_answers_line_by_line() {
    let chat = |more: &[&str], input: &str| {
        let args = [&["chat", "--temp", "0", "-n", "8"], more].concat();
        let out = tegula_with_input(&args, input.as_bytes());
        assert!(out.status.success(), "{}", text(&out.stderr));
        text(&out.stdout)
    };
    let once = chat(&[], "Hello\n");
    let twice = chat(&[], "Hello\n/clear\n\nHello\n/exit\nHello\n");
    assert_eq!(twice, once.repeat(2), "starting over gives the same answer");
    assert_ne!(chat(&["--system", "You are a parrot."], "Hello\n"), once);
    let dir = tempfile::tempdir().unwrap();
    let template = dir.path().join("template.jinja");
    fs::write(
        &template,
        "{% for m in messages %}{{ m.content }}{% endfor %}",
    )
    .unwrap();
    let plain = chat(
        &["--chat-template", path(&template)],
        "An iterator adaptor that\n",
    );
    let run = stdout(&[&PROMPT[..], &["8"]].concat());
    assert_eq!(plain, run, "the template renders the message alone");
    fs::write(&template, "{{ bos_token }}{{ messages[0].content }}").unwrap();
    let begun = chat(
        &["--chat-template", path(&template)],
        "An iterator adaptor that\n",
    );
    assert_eq!(
        begun, run,
        "the model has no such token: nothing is rendered"
    );
    fs::write(&template, "{{ eos_token }}{{ messages[0].content }}").unwrap();
    let ended = chat(
        &["--chat-template", path(&template)],
        "An iterator adaptor that\n",
    );
    assert_ne!(ended, run);
}

#[test]
fn tokenize_prints_what_llama_tokenize_prints() {
    let words = ["tokenize", "-p", "the cat\\n"];
    insta::assert_snapshot!(stdout(&[&words[..], &["--show-count"]].concat()));
    let ids = stdout(&[&words[..], &["--ids"]].concat());
    let json = json(&[&words[..], &["--json"]].concat());
    assert_eq!(ids.trim(), json["tokens"].to_string().replace(',', ", "));
    let raw = stdout(&[&words[..], &["--ids", "--no-escape"]].concat());
    assert_ne!(raw, ids);
    let special = ["tokenize", "--ids", "-p", "<|im_start|>"];
    assert_eq!(stdout(&special), "[1]\n");
    assert_ne!(
        stdout(&[&special[..], &["--no-parse-special"]].concat()),
        "[1]\n"
    );
    let piped = tegula_with_input(&["tokenize", "--stdin", "--ids"], b"the cat\n");
    assert_eq!(text(&piped.stdout), ids);
}

/// Real tokenizers, from files without weights.
#[test]
fn vocabulary_files_tokenize() {
    let shared = std::env::var_os("TEGULA_SHARED").map_or_else(
        || concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared").into(),
        std::path::PathBuf::from,
    );
    let vocab = shared.join("vocab/ggml-vocab-llama-spm.gguf");
    if !vocab.exists() {
        eprintln!("skipped: no shared vocabularies");
        return;
    }
    let tokens = |more: &[&str]| {
        let args = ["tokenize", path(&vocab), "-p", "Hello world", "--ids"];
        stdout(&[&args, more].concat())
    };
    assert_eq!(tokens(&[]), "[1, 15043, 3186]\n");
    assert_eq!(tokens(&["--no-bos"]), "[15043, 3186]\n");
}

#[test]
fn logits_of_the_last_position() {
    let args = [
        "logits",
        "-p",
        "An iterator adaptor that",
        "--json",
        "--top",
        "2",
    ];
    let out = json(&args);
    assert_eq!(out["logits"].as_array().unwrap().len(), 4096);
    insta::assert_json_snapshot!(shape(&out));
    let best = out["top"][0]["id"].as_u64().unwrap();
    assert_eq!(greedy("1", &[])["tokens"][0].as_u64(), Some(best));
    let logit = out["logits"][best as usize].as_f64().unwrap();
    let all = out["logits"].as_array().unwrap().iter();
    assert!(all.map(|l| l.as_f64().unwrap()).all(|l| l <= logit));
    let table = stdout(&["logits", "-p", "An", "--top", "3"]);
    assert_eq!(table.lines().count(), 4, "{table}");
}

#[test]
fn perplexity_agrees_with_the_reference() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("text.txt");
    let sentence = "An iterator adaptor that yields the elements of the underlying iterator. ";
    fs::write(&file, sentence.repeat(12)).unwrap();
    let args = [
        "perplexity",
        "-f",
        path(&file),
        "-c",
        "32",
        "--chunks",
        "3",
        "--json",
    ];
    let engine = json(&args);
    let reference = json(&[&args[..], &["--reference"]].concat());
    insta::assert_json_snapshot!(shape(&engine));
    assert_eq!(
        (&engine["chunks"], &engine["scored"]),
        (&3.into(), &45.into())
    );
    assert_eq!(reference["scored"], engine["scored"]);
    let ppl = |out: &serde_json::Value| out["ppl"].as_f64().unwrap();
    let off = ppl(&engine) / ppl(&reference) - 1.0;
    assert!(off.abs() < 0.02, "{off}");
    assert!((ppl(&engine).ln() - engine["nll"].as_f64().unwrap()).abs() < 1e-9);
}

#[test]
fn inspect_lists_everything() {
    let out = json(&["inspect", "--json"]);
    assert_eq!(out["tensors"].as_array().unwrap().len(), 74);
    assert_eq!(out["metadata"]["tokenizer.ggml.tokens"]["length"], 4096);
    insta::assert_json_snapshot!(out["metadata"]);
    insta::assert_json_snapshot!(out["types"]);
    let full = json(&["inspect", "--json", "--full"]);
    let tokens = full["metadata"]["tokenizer.ggml.tokens"]
        .as_array()
        .unwrap();
    assert_eq!(tokens.len(), 4096);
    let table = stdout(&["inspect"]);
    assert!(table.contains("blk.5.ffn_up_exps.weight") && table.contains("256 x 256 x 16"));
}

#[test]
fn explain_names_place_kernel_and_reason() {
    let out = json(&["explain", "--json", "--isa", "scalar"]);
    insta::assert_json_snapshot!(shape(&out));
    let tensors = out["tensors"].as_array().unwrap();
    assert_eq!(tensors.len(), 74);
    for t in tensors {
        assert_eq!(t["device"], "cpu");
        assert!(!t["reason"].as_str().unwrap().is_empty());
        assert!(!t["kernel"].as_str().unwrap().contains("avx"), "{t}");
    }
    let table = stdout(&["explain"]);
    assert!(table.contains("blk.0.attn_q.weight"), "{table}");
}

#[test]
fn doctor_gives_a_reason_for_every_no() {
    let out = json(&["doctor", "--json"]);
    let reasons = out["tiers"].as_array().unwrap().iter().chain([&out["amx"]]);
    for tier in reasons {
        assert_ne!(
            tier["available"].as_bool().unwrap(),
            tier["reason"].is_string(),
            "{tier}"
        );
    }
    assert!(out["threads"]["default"].as_u64() >= Some(1));
    assert!(out["memory"]["total"].as_u64() > Some(1 << 20));
    let table = stdout(&["doctor"]);
    for word in [
        "scalar",
        "avx2",
        "avx512",
        "amx",
        "numa",
        "huge pages",
        "gpus",
    ] {
        assert!(table.contains(word), "{table}");
    }
}

#[test]
fn bench_prints_every_format() {
    let bench = |more: &[&str]| {
        let common = ["bench", "-p", "8", "-n", "2", "-r", "2", "-t", "1"];
        stdout(&[&common, more].concat())
    };
    let table = bench(&["-d", "0,4", "-pg", "4,2"]);
    let tests: Vec<_> = table
        .lines()
        .skip(2)
        .map(|l| l.split('|').nth(6).unwrap().trim())
        .collect();
    assert_eq!(
        tests,
        [
            "pp8",
            "tg2",
            "pp4+tg2",
            "pp8 @ d4",
            "tg2 @ d4",
            "pp4+tg2 @ d4"
        ]
    );
    let csv = bench(&["-o", "csv"]);
    let columns = |line: &str| line.split(',').count();
    assert_eq!(csv.lines().count(), 3);
    assert!(
        csv.lines()
            .all(|l| columns(l) == columns(csv.lines().next().unwrap())),
        "{csv}"
    );
    let lines = bench(&["-o", "jsonl"]);
    assert_eq!(lines.lines().count(), 2);
    for line in lines.lines() {
        serde_json::from_str::<serde_json::Value>(line).unwrap();
    }
    let out: serde_json::Value = serde_json::from_str(&bench(&["--json"])).unwrap();
    assert_eq!(out["rows"].as_array().unwrap().len(), 2);
    assert_eq!(out["rows"][0]["samples_ns"].as_array().unwrap().len(), 2);
    assert_eq!(out["state"], "complete");
    insta::assert_json_snapshot!(shape(&out["rows"]));
}

#[test]
fn bench_takes_ranges_and_tells_limits() {
    let common = [
        "bench",
        "-p",
        "1-4*2",
        "-n",
        "0",
        "-r",
        "1",
        "-t",
        "1",
        "--no-warmup",
    ];
    let out = json(&[&common[..], &["--probe", "--probe-time", "1", "--json"]].concat());
    let tests: Vec<_> = out["rows"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| row["test"].as_str().unwrap())
        .collect();
    assert_eq!(tests, ["pp1", "pp2", "pp4"]);
    assert_eq!(out["probes"][0]["threads"], 1);
    let share = out["rows"][2]["bandwidth_share"].as_f64().unwrap();
    assert!(share > 0.0, "{share}");
    let only = stdout(&["bench", "--probe=only", "-t", "1", "--probe-time", "1"]);
    assert!(
        only.contains("| memory (") && !only.contains("t/s"),
        "{only}"
    );
}

#[test]
fn bench_runs_peers_and_goes_on_when_they_fail() {
    let (dir, model) = small_model("qwen3", "Q4_0");
    let peer = |name: &str, body: &str| {
        let program = dir.path().join(name);
        fs::write(&program, format!("#!/bin/sh\n{body}\n")).unwrap();
        let executable = fs::Permissions::from_mode(0o755);
        fs::set_permissions(&program, executable).unwrap();
        format!("{name}={}:--repack 0", program.display())
    };
    // Says what it was called with, beside its figure.
    let works = peer(
        "llama-bench",
        "echo \"[{\\\"n_prompt\\\":8,\\\"n_gen\\\":0,\\\"samples_ns\\\":[1000000],\\\"build_commit\\\":\\\"$*\\\"}]\"",
    );
    let crashes = peer("llama-bench-old", "echo 'no such model' >&2; exit 3");
    let talks = peer("ik-llama-bench", "echo '| model | t/s |'");
    let plot = dir.path().join("bench.svg");
    let args = [
        "bench",
        path(&model),
        "-p",
        "8",
        "-n",
        "0",
        "-r",
        "3",
        "-t",
        "1",
        "--peer",
        &works,
        "--peer",
        &crashes,
        "--peer",
        &talks,
        "--peer-args",
        "-fa 1",
        "--plot",
        path(&plot),
    ];
    let table = stdout(&args);
    assert!(table.contains("8000.00 ± 0.00"), "{table}");
    assert!(
        table.contains("failed: ended with exit status: 3: no such model"),
        "{table}"
    );
    assert!(
        table.contains("failed: printed no llama-bench JSON"),
        "{table}"
    );
    assert!(table.contains("| of pairs |"), "{table}");
    assert!(
        fs::read_to_string(&plot)
            .unwrap()
            .contains("llama-bench pp8")
    );
    let out = json(&[&args[..], &["--json"]].concat());
    let row = &out["rows"][1];
    let called = row["version"].as_str().unwrap();
    assert!(
        called.ends_with("-r 1 -o json --repack 0 -fa 1"),
        "{called}"
    );
    assert_eq!(row["samples_ns"].as_array().unwrap().len(), 3);
    assert_eq!(out["interleaved"], true);
}

#[test]
fn bench_ends_with_what_is_done_when_interrupted() {
    let args = [
        "bench", "-p", "1", "-n", "0", "-r", "1000000", "-t", "1", "--json",
    ];
    let child = program(&args).stdout(Stdio::piped()).spawn().unwrap();
    let id = child.id().to_string();
    // Until it catches the signal it would just die.
    let catches = || {
        let status = fs::read_to_string(format!("/proc/{id}/status")).unwrap();
        let mask = status.lines().find_map(|l| l.strip_prefix("SigCgt:"));
        u64::from_str_radix(mask.unwrap().trim(), 16).unwrap() & 0b10 != 0
    };
    while !catches() {
        thread::sleep(Duration::from_millis(5));
    }
    let kill = Command::new("kill").args(["-INT", &id]).status();
    assert!(kill.unwrap().success());
    let out = child.wait_with_output().unwrap();
    assert!(out.status.success());
    let record: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(record["state"], "interrupted");
    for row in record["rows"].as_array().unwrap() {
        assert!(row["samples_ns"].as_array().unwrap().len() < 1_000_000);
    }
}

#[test]
fn quantize_writes_models_that_run() {
    let (dir, model) = small_model("qwen3moe", "BF16");
    let out = dir.path().join("out.gguf");
    let args = ["quantize", path(&model), path(&out), "Q4_K_M", "--json"];
    let report = json(&args);
    assert_eq!(report["file_type"], "Q4_K_M");
    insta::assert_json_snapshot!(shape(&report));
    let tokens = |file| {
        let args = [
            "run",
            path(file),
            "-p",
            "the",
            "-n",
            "3",
            "--temp",
            "0",
            "--json",
        ];
        json(&args)["tokens"].as_array().unwrap().len()
    };
    assert_eq!(tokens(&out), 3);
    let other = dir.path().join("other.gguf");
    let more = [
        "-t",
        "1",
        "--output-tensor-type",
        "Q8_0",
        "--token-embedding-type",
        "Q5_0",
    ];
    let args = ["quantize", path(&model), path(&other), "Q4_0", "--pure"];
    stdout(&[&args[..], &more, &["--tensor-type", "attn_v=Q6_K"]].concat());
    let tensors = json(&["inspect", path(&other), "--json"])["tensors"].clone();
    let ty = |name: &str| {
        let t = tensors
            .as_array()
            .unwrap()
            .iter()
            .find(|t| t["name"] == name);
        t.unwrap()["type"].as_str().unwrap().to_owned()
    };
    assert_eq!(ty("output.weight"), "Q8_0");
    assert_eq!(ty("token_embd.weight"), "Q5_0");
    assert_eq!(ty("blk.1.attn_v.weight"), "Q6_K");
    assert_eq!(ty("blk.1.attn_q.weight"), "Q4_0");
}

#[test]
fn emulated_amx_says_so_everywhere() {
    let (_dir, model) = small_model("qwen3", "Q4_0");
    let prompt = "the cat sat on the mat and then the dog came in";
    let args = ["--amx=emulate", "-p", prompt, "-n", "2", "--temp", "0"];
    let run = |more: &[&str]| tegula(&[&["run", path(&model)], &args[..], more].concat());
    let out = run(&["--json"]);
    // The scalar kernels, all that there is on an old CPU, can't feed it.
    if out.status.code() == Some(4) {
        assert!(text(&out.stderr).contains("scalar"));
        return;
    }
    let out: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert!(
        out["isa"].as_str().unwrap().ends_with("amx: emulated"),
        "{out}"
    );
    let said = text(&run(&["-t", "1"]).stderr);
    // Two layers of seven matrices, and the output matrix.
    let line = "amx: emulated (int8 and bf16 tiles), 1 threads, ";
    assert!(said.contains(line), "{said}");
    let table = stdout(&["explain", path(&model), "--amx=emulate"]);
    assert!(table.contains("amx: emulated from"), "{table}");
    assert!(table.contains("matrices on tiles"), "{table}");
    // Routers stay on vectors, and say why.
    let json = json(&["explain", "--amx=emulate", "--json"]);
    let tensors = json["tensors"].as_array().unwrap();
    let tiles = |name: &str| {
        let found = tensors.iter().find(|t| t["tensor"] == name).unwrap();
        found["tiles"].clone()
    };
    let router = tiles("blk.0.ffn_gate_inp.weight");
    assert_eq!(router["never"], "no tile product of this type");
    assert!(tiles("blk.0.attn_q.weight")["from"].as_u64() > Some(1));
    assert!(tiles("blk.0.attn_norm.weight").is_null());
    assert_eq!(tegula(&["bench", "--amx=emulate"]).status.code(), Some(2));
}

#[test]
fn packed_files_are_said_to_be_written_used_and_stale() {
    let (_dir, model) = small_model("qwen3", "Q4_0");
    let run = || {
        let args = ["run", path(&model), "-p", "the", "-n", "4", "--temp", "0"];
        let out = tegula(&[&args[..], &["--packed-cache", "--json"]].concat());
        assert!(out.status.success(), "{}", text(&out.stderr));
        let json: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
        (json["tokens"].clone(), text(&out.stderr))
    };
    let (want, said) = run();
    if said.contains("there is nothing to pack for this instruction set") {
        return;
    }
    let line = |rest: &str| format!("packed file {}.tegula-packed: {rest}\n", path(&model));
    assert!(said.contains(&line("written")), "{said}");
    let (tokens, said) = run();
    assert!(said.contains(&line("used")) && tokens == want, "{said}");
    let packed = model.with_file_name("model.gguf.tegula-packed");
    let mut bytes = fs::read(&packed).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&packed, bytes).unwrap();
    let (tokens, said) = run();
    let damaged = "written; the one that was there is damaged: the sum of ";
    assert!(said.contains(damaged) && tokens == want, "{said}");
    let table = stdout(&["explain", path(&model), "--packed-cache"]);
    assert!(
        table.contains("cpu/cache") && !table.contains("cpu/packed"),
        "{table}"
    );
}

#[test]
fn the_tier_comes_from_the_environment_too() {
    let args = ["run", "-p", "x", "-n", "1", "--json"];
    let out = program(&args).env("TEGULA_ISA", "scalar").output().unwrap();
    let out: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(out["isa"], "scalar");
}
