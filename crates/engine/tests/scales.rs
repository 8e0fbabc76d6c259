//! Factors of whole matrices (`NAME.scale`): products are those of the weights times the factor, and
//! what no device multiplies stays on the CPU.

#[path = "lora/models.rs"]
#[allow(dead_code)]
mod models;

use models::{Parts, Tensor, apart, beside_a_device, logits, near};
use std::path::Path;
use tegula_engine::{LoadOptions, Model, Source, offload::Device as At};
use tegula_gguf::{GgmlType, blocks};
use tegula_kernels::{Amx, Tier};

/// The largest weight that NVFP4 holds.
const MOST: f32 = 448.0 * 6.0;

fn options(model: &Path) -> LoadOptions {
    LoadOptions {
        threads: 2,
        ..LoadOptions::new(Source::Path(model.into()))
    }
}

/// Matrices whose rows are whole blocks get the type, the others stay f32.
fn typed(parts: &Parts, ty: GgmlType) -> impl Fn(&str) -> GgmlType + use<> {
    let fits = |(name, t): (&String, &Tensor)| {
        let whole = t.shape[0] % ty.block_len() as u64 == 0;
        (name.contains(".attn_") || name.contains(".ffn_") || name == "output.weight")
            .then(|| (name.clone(), if whole { ty } else { GgmlType::F32 }))
    };
    let types: std::collections::BTreeMap<_, _> = parts.tensors.iter().filter_map(fits).collect();
    move |name| types.get(name).copied().unwrap_or(GgmlType::F32)
}

/// A model whose matrices have factors, each expert its own, and the weights that this makes when
/// they are of that type.
fn scaled(experts: bool, ty: GgmlType) -> (Parts, Parts) {
    let mut file = Parts::model(experts).with_all_experts();
    let of = typed(&file, ty);
    let mut whole = file.clone();
    let names: Vec<String> = file.tensors.keys().cloned().collect();
    for (i, name) in names.into_iter().enumerate() {
        let t = &file.tensors[&name];
        if t.shape.len() == 1 || name == "token_embd.weight" {
            continue;
        }
        let count = t.shape.get(2).map_or(1, |n| *n as usize);
        let each = t.values.len() / count;
        let mut factors = Vec::new();
        for (e, values) in t.values.chunks(each).enumerate() {
            let peak = values.iter().fold(0f32, |m, v| m.max(v.abs()));
            // So large that most scales of blocks are normal numbers, and no two alike.
            factors.push(peak / MOST * (1.5 + (i + e) as f32 / 8.0));
        }
        let divided: Vec<f32> = t
            .values
            .chunks(each)
            .zip(&factors)
            .flat_map(|(values, f)| values.iter().map(move |v| v / f))
            .collect();
        let ty = of(&name);
        let mut bytes = vec![0; ty.bytes_for(divided.len() as u64).unwrap() as usize];
        blocks::quantize(ty, &divided, None, &mut bytes).unwrap();
        let mut read = vec![0.0; divided.len()];
        blocks::dequantize(ty, &bytes, &mut read).unwrap();
        let product = read.chunks(each).zip(&factors);
        let product = product.flat_map(|(values, f)| values.iter().map(move |v| v * f));
        whole.tensors.get_mut(&name).unwrap().values = product.collect();
        file.tensors.get_mut(&name).unwrap().values = divided;
        let base = name.strip_suffix(".weight").unwrap();
        let shape = vec![count as u64];
        let mut put = |end: &str, values: Vec<f32>| {
            let shape = shape.clone();
            file.tensors
                .insert(format!("{base}.{end}"), Tensor { shape, values });
        };
        put("input_scale", vec![7.0; count]);
        put("scale", factors);
    }
    (file, whole)
}

#[test]
fn products_are_multiplied_by_them() {
    let amx = Amx::emulate().expect("any x86-64 Linux");
    let dir = tempfile::tempdir().unwrap();
    for experts in [false, true] {
        for (ty, within) in [(GgmlType::F32, 1e-3), (GgmlType::NVFP4, 0.06)] {
            let (file, whole) = scaled(experts, ty);
            let model = file.write(&dir.path().join("scaled.gguf"), typed(&file, ty));
            let whole = whole.write(&dir.path().join("whole.gguf"), |_| GgmlType::F32);
            let want = logits(&options(&whole), 64);
            for tier in Tier::ALL.into_iter().filter(|t| t.available()) {
                for (repack, ubatch) in [(true, 64), (true, 1), (false, 64)] {
                    let options = LoadOptions {
                        repack,
                        tier,
                        ..options(&model)
                    };
                    let got = logits(&options, ubatch);
                    let what = format!("{ty}, experts {experts}, {tier}, {repack}, {ubatch}");
                    near(&what, &got, &want, within);
                }
            }
            let options = LoadOptions {
                amx: Some(amx),
                ..options(&model)
            };
            // Attention on tiles rounds to bf16, whatever the weights.
            near("tiles", &logits(&options, 64), &want, within.max(0.02));

            let mut without = file.clone();
            without.tensors.retain(|name, _| !name.ends_with(".scale"));
            let without = without.write(&dir.path().join("without.gguf"), typed(&file, ty));
            let without = logits(&self::options(&without), 64);
            assert!(apart(&without, &want) > 0.3, "they matter");
        }
    }
}

#[test]
fn devices_leave_them_to_the_cpu() {
    let dir = tempfile::tempdir().unwrap();
    let (mut file, _) = scaled(false, GgmlType::NVFP4);
    file.tensors
        .retain(|name, _| !name.starts_with("blk.1.") || !name.ends_with("scale"));
    let model = file.write(&dir.path().join("m.gguf"), typed(&file, GgmlType::NVFP4));
    let want = logits(&options(&model), 64);
    let options = beside_a_device(options(&model));
    near("devices", &logits(&options, 64), &want, 0.02);
    let loaded = Model::load(&options, &mut |_| {}).unwrap();
    for p in &loaded.plan().placements {
        if p.tensor.starts_with("blk.") {
            let here = p.tensor.starts_with("blk.0.");
            assert_eq!(p.device == At::Cpu, here, "{}: {}", p.tensor, p.device);
            assert!(!here || p.streams.is_none() && p.share.is_none());
        }
    }
    let told = &loaded.plan().offload.summary;
    let says = "matrices with a .scale are multiplied on the CPU: 3 parts of layers";
    assert!(told.contains(says), "{told}");
}

#[test]
fn a_wrong_number_of_them_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (mut file, _) = scaled(true, GgmlType::F32);
    let scale = file.tensors.get_mut("blk.1.ffn_up_exps.scale").unwrap();
    scale.shape = vec![3];
    scale.values.truncate(3);
    let model = file.write(&dir.path().join("m.gguf"), |_| GgmlType::F32);
    let error = Model::load(&options(&model), &mut |_| {}).unwrap_err();
    let says = "tensor `blk.1.ffn_up_exps.scale` has shape [3] where [4] was expected";
    assert!(error.to_string().contains(says), "{error}");
}
