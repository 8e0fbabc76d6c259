//! LoRA adapters: what they add is what merging them into the weights gives, however weights are
//! held and multiplied; and what is no adapter for a model is refused by name.

mod models;

use models::{EMBEDDED, Parts, apart, beside_a_device, context, logits, near};
use std::path::{Path, PathBuf};
use tegula_engine::{
    Batch, Error, LoadOptions, LoraFile, Model, Source,
    offload::Device as At,
    plan::{Encoding, Placement},
};
use tegula_gguf::{GgmlType, Gguf};
use tegula_kernels::{Amx, Tier};
use tempfile::TempDir;

/// Differences of logits by the largest of them, between f32 sums in different orders: keys and
/// values that are cached as f16 then round to neighbours now and then.
const EXACT: f32 = 1e-3;

fn f32s(_: &str) -> GgmlType {
    GgmlType::F32
}

fn all(_: &str) -> bool {
    true
}

fn file(path: &Path, scale: f32) -> LoraFile {
    LoraFile {
        path: path.to_owned(),
        scale,
    }
}

fn options(model: &Path, lora: &[LoraFile]) -> LoadOptions {
    LoadOptions {
        threads: 2,
        lora: lora.to_vec(),
        ..LoadOptions::new(Source::Path(model.into()))
    }
}

fn same(what: &str, got: &[f32], want: &[f32]) {
    let bits = |v: &[f32]| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    assert!(bits(got) == bits(want), "{what}");
}

/// A model, an adapter of all its matrices, and the logits of the model that the two make.
struct Case {
    dir: TempDir,
    parts: Parts,
    model: PathBuf,
    adapter: Parts,
    lora: LoraFile,
    merged: Vec<f32>,
}

impl Case {
    /// `rank`, alpha and scale of the adapter.
    fn new(experts: bool, rank: usize, alpha: f32, scale: f32) -> Case {
        Case::of(Parts::model(experts), rank, alpha, scale)
    }

    fn of(parts: Parts, rank: usize, alpha: f32, scale: f32) -> Case {
        let dir = tempfile::tempdir().unwrap();
        let adapter = parts.adapter(rank, alpha, 11, all);
        let at = |name: &str| dir.path().join(name);
        let model = parts.write(&at("model.gguf"), f32s);
        let lora = file(&adapter.write(&at("lora.gguf"), f32s), scale);
        let mut sum = parts.clone();
        sum.merge(&adapter, f64::from(scale));
        let merged = sum.write(&at("merged.gguf"), f32s);
        let merged = logits(&options(&merged, &[]), 64);
        Case {
            dir,
            parts,
            model,
            adapter,
            lora,
            merged,
        }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn options(&self) -> LoadOptions {
        options(&self.model, std::slice::from_ref(&self.lora))
    }

    /// At every tier, packed or not, tokens together or one by one.
    fn check(&self) {
        let without = logits(&options(&self.model, &[]), 64);
        let changed = apart(&without, &self.merged);
        assert!(changed > 0.1, "the adapter matters: {changed}");
        for tier in Tier::ALL.into_iter().filter(|t| t.available()) {
            for (repack, ubatch) in [(true, 64), (true, 1), (false, 64), (false, 1)] {
                let options = LoadOptions {
                    repack,
                    tier,
                    ..self.options()
                };
                let got = logits(&options, ubatch);
                let what = format!("{tier}, packed {repack}, {ubatch} tokens");
                near(&what, &got, &self.merged, EXACT);
            }
        }
    }
}

#[test]
fn an_adapter_is_what_merging_it_gives() {
    Case::new(false, 8, 16.0, 0.5).check();
}

#[test]
fn adapters_of_experts_and_routers_are_too() {
    Case::new(true, 8, 16.0, 0.5).check();
}

#[test]
fn any_rank_and_no_alpha() {
    for (experts, rank, alpha, scale) in [
        (false, 1, 1.0, -1.0),
        (false, 5, 0.0, 1.0),
        (true, 33, 0.0, 0.7),
        (true, 1, 3.0, 0.3),
    ] {
        let case = Case::new(experts, rank, alpha, scale);
        for ubatch in [64, 1] {
            let got = logits(&case.options(), ubatch);
            near(&format!("rank {rank}"), &got, &case.merged, EXACT);
        }
    }
}

#[test]
fn several_adapters_add_up() {
    for experts in [false, true] {
        let case = Case::new(experts, 8, 8.0, 0.5);
        // Of some matrices alone, and of another rank: of gate and not of up, of k and not of q.
        let some = |name: &str| {
            let parts = ["attn_k.", "ffn_gate.", "ffn_gate_exps.", "output."];
            parts.iter().any(|part| name.contains(part))
        };
        let second = case.parts.adapter(3, 6.0, 12, some);
        let path = second.write(&case.at("second.gguf"), f32s);
        let mut sum = case.parts.clone();
        sum.merge(&case.adapter, 0.5);
        sum.merge(&second, -0.25);
        let merged = sum.write(&case.at("both.gguf"), f32s);
        let merged = logits(&options(&merged, &[]), 64);
        let both = options(&case.model, &[case.lora.clone(), file(&path, -0.25)]);
        let apart = apart(&merged, &case.merged);
        assert!(apart > 0.05, "the second adapter matters: {apart}");
        for ubatch in [64, 1] {
            near("two adapters", &logits(&both, ubatch), &merged, EXACT);
        }
        let model = Model::load(&both, &mut |_| {}).unwrap();
        let told: Vec<_> = model.adapters().iter().map(|a| a.describe()).collect();
        let (matrices, some) = (case.adapter.tensors.len() / 2, second.tensors.len() / 2);
        assert_eq!(
            told,
            [
                format!("{matrices} matrices of rank 8, alpha 8, scale 0.5"),
                format!("{some} matrices of rank 3, alpha 6, scale -0.25"),
            ]
        );
        let place = model.plan().get("blk.1.attn_k.weight").unwrap();
        let scales: Vec<_> = place.lora.iter().map(|l| (l.adapter, l.scale)).collect();
        assert_eq!(scales, [(0, 0.5), (1, -0.5)]);
    }
}

#[test]
fn scale_zero_is_no_adapter_bit_for_bit() {
    for experts in [false, true] {
        let case = Case::new(experts, 8, 16.0, 0.0);
        let without = options(&case.model, &[]);
        same(
            "scale 0",
            &logits(&case.options(), 64),
            &logits(&without, 64),
        );
        let plan = |options: &LoadOptions| {
            let model = Model::load(options, &mut |_| {}).unwrap();
            serde_json::to_string(model.plan()).unwrap()
        };
        assert_eq!(plan(&case.options()), plan(&without));
    }
}

#[test]
fn adapters_of_every_type() {
    // Rounded activations of 8 or 16 bits, as of weights of these types.
    for (ty, within) in [
        (GgmlType::F16, EXACT),
        (GgmlType::BF16, 0.01),
        (GgmlType::Q8_0, 0.03),
        (GgmlType::Q4_0, 0.03),
    ] {
        for experts in [false, true] {
            let parts = Parts::model(experts).with_all_experts();
            let adapter = parts.adapter(32, 32.0, 21, all);
            let dir = tempfile::tempdir().unwrap();
            let at = |name: &str| dir.path().join(name);
            let model = parts.write(&at("model.gguf"), f32s);
            let lora = file(&adapter.write(&at("lora.gguf"), |_| ty), 0.5);
            let mut sum = parts.clone();
            sum.merge(&adapter.rounded(|_| ty), 0.5);
            let merged = sum.write(&at("merged.gguf"), f32s);
            let merged = logits(&options(&merged, &[]), 64);
            for ubatch in [64, 1] {
                let got = logits(&options(&model, std::slice::from_ref(&lora)), ubatch);
                near(&format!("{ty}, {ubatch} tokens"), &got, &merged, within);
            }
        }
    }
}

#[test]
fn weights_of_every_encoding_and_tiles_take_them() {
    let amx = Amx::emulate().expect("any x86-64 Linux");
    for experts in [false, true] {
        let case = Case::of(Parts::model(experts).with_all_experts(), 8, 16.0, 0.5);
        for (ty, within) in [(GgmlType::BF16, 0.02), (GgmlType::Q8_0, 0.05)] {
            let typed = |name: &str| match name.contains("ffn_gate_inp") {
                true => GgmlType::F32,
                false => ty,
            };
            let model = case.parts.write(&case.at("typed.gguf"), typed);
            let mut sum = case.parts.clone().rounded(typed);
            sum.merge(&case.adapter, 0.5);
            let merged = sum.write(&case.at("merged.gguf"), f32s);
            let merged = logits(&options(&merged, &[]), 64);
            let lora = std::slice::from_ref(&case.lora);
            // Adapters of types that tiles multiply as well, and of those that they don't.
            let wide = case.parts.adapter(32, 64.0, 5, all);
            let halves = file(&wide.write(&case.at("wide.gguf"), |_| GgmlType::BF16), 0.5);
            let run = |amx, tier, repack, lora: &[LoraFile], ubatch| {
                let options = LoadOptions {
                    amx,
                    tier,
                    repack,
                    ..options(&model, lora)
                };
                logits(&options, ubatch)
            };
            let best = Tier::detect_max();
            let packed = run(None, best, true, lora, 64);
            near(&format!("{ty}"), &packed, &merged, within);
            same("not packed", &run(None, best, false, lora, 64), &packed);
            same("one by one", &run(None, best, true, lora, 1), &packed);
            let both = [case.lora.clone(), halves];
            let wanted = run(None, best, true, &both, 64);
            for tier in Tier::ALL.into_iter().filter(|t| t.available()) {
                if tier == Tier::Scalar {
                    continue;
                }
                let tiles = |lora, ubatch| run(Some(amx), tier, true, lora, ubatch);
                for ubatch in [64, 13, 1] {
                    let what = format!("{ty} on tiles, {tier}, {ubatch} tokens");
                    near(&what, &tiles(lora, ubatch), &merged, within);
                    near(&what, &tiles(&both, ubatch), &wanted, within);
                }
            }
        }
    }
}

#[test]
fn matrices_without_their_zeros_take_them() {
    let mut parts = Parts::model(false);
    for t in parts.tensors.values_mut().filter(|t| t.shape.len() > 1) {
        for (i, v) in t.values.iter_mut().enumerate() {
            *v = if i * 7 % 10 < 6 { 0.0 } else { *v };
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let model = parts.write(&at("model.gguf"), |_| GgmlType::BF16);
    let adapter = parts.adapter(8, 8.0, 2, all);
    let lora = file(&adapter.write(&at("lora.gguf"), f32s), 1.0);
    let run = |sparse_pack| {
        let options = LoadOptions {
            sparse_pack,
            ..options(&model, std::slice::from_ref(&lora))
        };
        let model = Model::load(&options, &mut |_| {}).unwrap();
        let packed = |p: &&Placement| p.encoding == Encoding::Sparse16;
        let packed = model.plan().placements.iter().filter(packed).count();
        assert!(packed == 0 || sparse_pack);
        logits(&options, 64)
    };
    same("sparse strips", &run(true), &run(false));
}

#[test]
fn logits_depend_on_neither_threads_nor_micro_batches() {
    let dir = tempfile::tempdir().unwrap();
    let model = Gguf::open(EMBEDDED).unwrap();
    let mut parts = Parts::model(true);
    parts.tensors.clear();
    for t in model.tensors() {
        let tensor = models::Tensor {
            shape: t.shape.clone(),
            values: Vec::new(),
        };
        parts.tensors.insert(t.name.clone(), tensor);
    }
    let adapter = parts.adapter(16, 16.0, 4, all);
    let lora = file(
        &adapter.write(&dir.path().join("lora.gguf"), |_| GgmlType::F16),
        0.3,
    );
    let run = |threads, repack, lora: &[LoraFile], ubatch| {
        let options = LoadOptions {
            threads,
            repack,
            ..options(Path::new(EMBEDDED), lora)
        };
        logits(&options, ubatch)
    };
    let lora = std::slice::from_ref(&lora);
    let want = run(1, true, lora, 64);
    assert!(apart(&run(1, true, &[], 64), &want) > 0.1);
    for (threads, repack, ubatch) in [(3, true, 64), (2, false, 64), (2, true, 7), (2, true, 1)] {
        let what = format!("{threads} threads, packed {repack}, {ubatch} tokens");
        same(&what, &run(threads, repack, lora, ubatch), &want);
    }
}

#[test]
fn beside_a_device_adapted_parts_stay_on_the_cpu() {
    for experts in [false, true] {
        let case = Case::new(experts, 8, 8.0, 0.5);
        let part = if experts { "ffn_up_exps" } else { "ffn_up" };
        let some = |name: &str| name.contains(part) || name.contains("blk.1.attn_v");
        let adapter = case.parts.adapter(8, 8.0, 6, some);
        let lora = file(&adapter.write(&case.at("some.gguf"), f32s), 1.0);
        let lora = std::slice::from_ref(&lora);
        let want = logits(&options(&case.model, lora), 64);
        let options = beside_a_device(options(&case.model, lora));
        let model = Model::load(&options, &mut |_| {}).unwrap();
        for p in &model.plan().placements {
            let here = p.tensor.contains(part)
                || p.tensor.starts_with("blk.1.attn_")
                || !experts && p.tensor.contains("ffn_")
                || experts && p.tensor.contains("_exps")
                || p.tensor == "token_embd.weight" && p.device == At::Cpu;
            assert_eq!(p.device == At::Cpu, here, "{}: {}", p.tensor, p.device);
            assert!(p.lora.is_empty() || p.streams.is_none() && p.share.is_none());
        }
        let told = &model.plan().offload.summary;
        assert!(
            told.contains("LoRA adapters are computed on the CPU: 3 parts"),
            "{told}"
        );
        for ubatch in [64, 1] {
            near("beside a device", &logits(&options, ubatch), &want, EXACT);
        }
    }
}

#[test]
fn a_state_belongs_to_its_adapters() {
    let case = Case::new(false, 8, 8.0, 0.5);
    let path = case.at("state");
    let mut with = context(&case.options(), 64);
    with.decode(&Batch::prompt(0, &[5, 6, 7])).unwrap();
    with.save_state(0, &path).unwrap();
    context(&case.options(), 64).load_state(0, &path).unwrap();
    let other = file(&case.lora.path, 0.25);
    for lora in [&[][..], &[other]] {
        let mut context = context(&options(&case.model, lora), 64);
        let refused = context.load_state(0, &path).unwrap_err().to_string();
        assert!(refused.contains("other LoRA adapters"), "{refused}");
    }
}

#[test]
fn what_is_no_adapter_for_the_model_is_refused_by_name() {
    let case = Case::new(false, 8, 8.0, 1.0);
    let refused = |change: &dyn Fn(&mut Parts)| {
        let mut bad = case.adapter.clone();
        change(&mut bad);
        let path = bad.write(&case.at("bad.gguf"), f32s);
        let options = options(&case.model, &[file(&path, 1.0)]);
        let error = Model::load(&options, &mut |_| {}).unwrap_err();
        assert!(matches!(error, Error::Lora { .. }), "{error}");
        let text = error.to_string();
        let (at, what) = text.split_once("bad.gguf: ").expect("the file's name");
        assert!(!at.is_empty());
        what.to_owned()
    };
    let set = |key: &'static str, value: &'static str| {
        move |p: &mut Parts| drop(p.metadata.set(key, value))
    };
    let rename = |from: &'static str, to: &'static str| {
        move |p: &mut Parts| {
            for which in ["lora_a", "lora_b"] {
                let t = p.tensors.remove(&format!("{from}.{which}")).unwrap();
                p.tensors.insert(format!("{to}.{which}"), t);
            }
        }
    };
    let q = "blk.0.attn_q.weight";
    let shape = |which: &'static str, shape: [u64; 2]| {
        move |p: &mut Parts| {
            let t = p.tensors.get_mut(&format!("{q}.{which}")).unwrap();
            t.values = vec![0.0; shape.iter().product::<u64>() as usize];
            t.shape = shape.to_vec();
        }
    };
    let told = [
        refused(&|p| drop(p.metadata.remove("general.type"))),
        refused(&set("adapter.type", "control_vector")),
        refused(&|p| {
            let tokens = vec![1u32, 2];
            p.metadata.set("adapter.alora.invocation_tokens", tokens);
        }),
        refused(&set("general.architecture", "qwen3")),
        refused(&|p| {
            p.metadata.set("adapter.lora.alpha", f32::NAN);
        }),
        refused(&|p| drop(p.tensors.remove(&format!("{q}.lora_b")))),
        refused(&|p| drop(p.tensors.remove(&format!("{q}.lora_a")))),
        refused(&shape("lora_a", [32, 8])),
        refused(&shape("lora_b", [8, 64])),
        refused(&shape("lora_b", [4, 128])),
        refused(&rename(q, "blk.7.attn_q.weight")),
        refused(&rename(q, "token_embd.weight")),
        refused(&rename(q, "blk.0.attn_norm.weight")),
        refused(&|p| {
            let t = p.tensors.remove(&format!("{q}.lora_a")).unwrap();
            p.tensors.remove(&format!("{q}.lora_b"));
            p.tensors.insert("output_norm.weight".to_owned(), t);
        }),
        refused(&|p| p.tensors.clear()),
    ];
    insta::assert_snapshot!("refused", told.join("\n"));
    let nan = options(&case.model, &[file(&case.lora.path, f32::NAN)]);
    let error = Model::load(&nan, &mut |_| {}).unwrap_err().to_string();
    assert!(
        error.ends_with("scale NaN is no number to multiply by"),
        "{error}"
    );
    // A rank of 0 is refused where files are read, behind name and number of dimensions.
    let mut bytes = std::fs::read(&case.lora.path).unwrap();
    let name = format!("{q}.lora_a");
    let at = bytes.windows(name.len()).position(|w| w == name.as_bytes());
    let rank = at.unwrap() + name.len() + 4 + 8;
    assert_eq!(bytes[rank..rank + 8], 8u64.to_le_bytes());
    bytes[rank] = 0;
    let empty = case.at("empty.gguf");
    std::fs::write(&empty, bytes).unwrap();
    let empty = options(&case.model, &[file(&empty, 1.0)]);
    let error = Model::load(&empty, &mut |_| {}).unwrap_err().to_string();
    assert!(
        error.contains(&name) && error.contains("dimension 1 is zero"),
        "{error}"
    );
    let missing = options(&case.model, &[file(&case.at("missing.gguf"), 1.0)]);
    let error = Model::load(&missing, &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("missing.gguf: cannot open"), "{error}");
}
