//! Quantising whole files: which types are chosen, what is written, and what is refused. The
//! same against real files is in `quantize_models.rs`.

mod common;

use std::{fs, ops::ControlFlow, path::Path};

use tegula_gguf::{
    Bytes, Error, GgmlType, Gguf, Metadata, blocks,
    quantize::{
        FileType, Progress, QuantizeOptions, choose, parse_tensor_type, quantize, read_importance,
    },
    writer::GgufWriter,
};

/// The architecture and size of a model, which is what the rules look at.
struct Shape {
    arch: &'static str,
    layers: u32,
    heads: u32,
    kv_heads: u32,
    experts: u32,
    tied: bool,
    width: u64,
}

const DENSE: Shape = Shape {
    arch: "llama",
    layers: 32,
    heads: 32,
    kv_heads: 8,
    experts: 0,
    tied: false,
    width: 256,
};

/// A model's metadata and tensors, without data.
fn outline(s: &Shape) -> GgufWriter {
    let mut m = Metadata::default();
    m.set("general.architecture", s.arch);
    let key = |k: &str| format!("{}.{k}", s.arch);
    m.set(&key("block_count"), s.layers);
    m.set(&key("attention.head_count"), s.heads);
    m.set(&key("attention.head_count_kv"), s.kv_heads);
    if s.experts > 0 {
        m.set(&key("expert_count"), s.experts);
    }
    let mut w = GgufWriter::new(m);
    let n = s.width;
    let mut add = |name: &str, shape: &[u64]| w.add_tensor(name, GgmlType::F32, shape).unwrap();
    add("token_embd.weight", &[n, 8]);
    add("output_norm.weight", &[n]);
    if !s.tied {
        add("output.weight", &[n, 8]);
    }
    for i in 0..s.layers {
        let mut blk = |name: &str, shape: &[u64]| add(&format!("blk.{i}.{name}.weight"), shape);
        blk("attn_norm", &[n]);
        for name in ["attn_q", "attn_k", "attn_v", "attn_output"] {
            blk(name, &[n, 2]);
        }
        if s.experts > 0 {
            blk("ffn_gate_inp", &[n, s.experts.into()]);
            for name in ["ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"] {
                blk(name, &[n, 2, s.experts.into()]);
            }
        } else {
            for name in ["ffn_gate", "ffn_up", "ffn_down"] {
                blk(name, &[n, 2]);
            }
        }
    }
    w
}

/// The types of a role with the layers that have each.
type Layers = Vec<(GgmlType, Vec<String>)>;

/// The choices, one line per role: `ffn_down: Q6_K 0-3,6 Q4_K 4-5`.
fn chosen(s: &Shape, options: &QuantizeOptions) -> String {
    let w = outline(s);
    let choices = choose(w.metadata(), w.tensors(), options).unwrap();
    let mut roles: Vec<(String, Layers)> = Vec::new();
    for (t, c) in w.tensors().iter().zip(choices) {
        let (role, layer) = match t.name.strip_prefix("blk.").and_then(|r| r.split_once('.')) {
            Some((layer, role)) => (role, layer),
            None => (t.name.as_str(), ""),
        };
        let role = role.trim_end_matches(".weight").to_owned();
        if c.ty == GgmlType::F32 && (role.ends_with("_norm") || role == "ffn_gate_inp") {
            continue;
        }
        let at = roles.iter().position(|r| r.0 == role).unwrap_or_else(|| {
            roles.push((role.clone(), Vec::new()));
            roles.len() - 1
        });
        let types = &mut roles[at].1;
        match types.iter_mut().find(|(ty, _)| *ty == c.ty) {
            Some((_, layers)) => layers.push(layer.to_owned()),
            None => types.push((c.ty, vec![layer.to_owned()])),
        }
    }
    let line = |(role, types): &(String, Layers)| {
        let types: Vec<String> = match &types[..] {
            [(ty, _)] => vec![ty.to_string()],
            _ => types
                .iter()
                .map(|(ty, layers)| format!("{ty} {}", layers.join(",")))
                .collect(),
        };
        format!("  {role}: {}", types.join("; "))
    };
    roles.iter().map(line).collect::<Vec<_>>().join("\n")
}

#[test]
fn every_mix_of_a_dense_model() {
    let all = FileType::ALL
        .iter()
        .map(|&f| format!("{f}\n{}", chosen(&DENSE, &QuantizeOptions::new(f))));
    insta::assert_snapshot!(all.collect::<Vec<_>>().join("\n"));
}

#[test]
fn mixes_of_other_models() {
    let mixtral = Shape {
        experts: 8,
        layers: 8,
        ..DENSE
    };
    let tied_moe = Shape {
        arch: "qwen3moe",
        experts: 16,
        layers: 8,
        kv_heads: 32,
        tied: true,
        ..DENSE
    };
    let seventy = Shape {
        arch: "qwen2",
        layers: 80,
        ..DENSE
    };
    let narrow = Shape {
        width: 96,
        layers: 2,
        ..DENSE
    };
    let odd = Shape {
        width: 40,
        layers: 1,
        ..DENSE
    };
    let mut out = Vec::new();
    for (name, shape, types) in [
        (
            "8 experts",
            &mixtral,
            &[FileType::Q4_K_M, FileType::Q2_K, FileType::MXFP4_MOE][..],
        ),
        (
            "tied, 16 experts",
            &tied_moe,
            &[FileType::Q4_K_M, FileType::MXFP4_MOE, FileType::IQ4_XS],
        ),
        ("70B", &seventy, &[FileType::Q4_K_S, FileType::Q3_K_S]),
        (
            "rows of 96",
            &narrow,
            &[
                FileType::Q4_K_M,
                FileType::Q2_K,
                FileType::IQ4_XS,
                FileType::Q8_0,
            ],
        ),
        ("rows of 40", &odd, &[FileType::Q5_K_M, FileType::Q4_0]),
    ] {
        for &f in types {
            out.push(format!(
                "{name}, {f}\n{}",
                chosen(shape, &QuantizeOptions::new(f))
            ));
        }
    }
    insta::assert_snapshot!(out.join("\n"));
}

#[test]
fn overrides_win() {
    let small = Shape { layers: 3, ..DENSE };
    let base = QuantizeOptions::new(FileType::Q4_K_M);
    let overrides = ["ffn_(UP|gate)=Q5_0", "blk.1.attn=q8_0"];
    let cases = [
        (
            "pure",
            QuantizeOptions {
                pure: true,
                ..base.clone()
            },
        ),
        (
            "output",
            QuantizeOptions {
                output_tensor_type: Some(GgmlType::BF16),
                ..base.clone()
            },
        ),
        (
            "embedding",
            QuantizeOptions {
                token_embedding_type: Some(GgmlType::F16),
                ..base.clone()
            },
        ),
        (
            "leave output",
            QuantizeOptions {
                leave_output_tensor: true,
                ..base.clone()
            },
        ),
        (
            "names",
            QuantizeOptions {
                tensor_types: overrides.map(|s| parse_tensor_type(s).unwrap()).to_vec(),
                ..base.clone()
            },
        ),
        (
            "importance",
            QuantizeOptions {
                importance: Some(Default::default()),
                ..QuantizeOptions::new(FileType::Q4_0)
            },
        ),
    ];
    let out = cases.map(|(name, options)| format!("{name}\n{}", chosen(&small, &options)));
    insta::assert_snapshot!(out.join("\n"));
    for bad in ["ffn", "=Q4_0", "a=Q9", "(=Q4_0"] {
        assert!(
            matches!(parse_tensor_type(bad), Err(Error::Unsupported(_))),
            "{bad}"
        );
    }
}

#[test]
fn file_types_are_found_by_name_and_number() {
    assert_eq!("q4_k_m".parse(), Ok(FileType::Q4_K_M));
    assert_eq!("Q5_K".parse(), Ok(FileType::Q5_K_M));
    assert_eq!("18".parse(), Ok(FileType::Q6_K));
    assert_eq!("mxfp4_moe".parse(), Ok(FileType::MXFP4_MOE));
    let e = "Q4_9".parse::<FileType>().unwrap_err().to_string();
    assert!(
        e.contains("`Q4_9`") && e.contains("Q4_K_M") && !e.contains("IQ2"),
        "{e}"
    );
    for &f in FileType::ALL {
        assert_eq!(FileType::from_id(f.id()), Some(f));
        assert_eq!(f.name().parse(), Ok(f));
    }
}

/// A smooth but irregular number for a weight.
fn weight(i: usize) -> f32 {
    ((i as f32 * 0.37).sin() + (i as f32 * 0.011).cos()) * 0.05
}

/// A model of F32 weights.
fn source(s: &Shape) -> Gguf {
    let w = outline(s);
    let data: Vec<Vec<u8>> = w
        .tensors()
        .iter()
        .map(|t| {
            (0..t.elements() as usize)
                .flat_map(|i| weight(i).to_le_bytes())
                .collect()
        })
        .collect();
    let bytes = w
        .to_bytes(&data.iter().map(Vec::as_slice).collect::<Vec<_>>())
        .unwrap();
    Gguf::from_bytes(Bytes::from_vec(bytes), "source.gguf").unwrap()
}

fn entries(dir: &Path) -> usize {
    fs::read_dir(dir).unwrap().count()
}

#[test]
fn every_writable_type_is_written_and_close() {
    let model = source(&Shape {
        layers: 2,
        experts: 4,
        ..DENSE
    });
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("out.gguf");
    let mut written = 0;
    for &f in FileType::ALL {
        let mut last = 0;
        let mut seen = 0;
        let result = quantize(
            &model,
            &path,
            &QuantizeOptions::new(f),
            &mut |p: Progress| {
                assert!(p.done_bytes >= last && p.done_bytes <= p.total_bytes);
                last = p.done_bytes;
                seen = p.index + 1;
                ControlFlow::Continue(())
            },
        );
        if !f.can_write() {
            let e = result.unwrap_err().to_string();
            assert!(
                e.contains("can only be read") && e.contains("Q4_K_M"),
                "{e}"
            );
            continue;
        }
        let result = result.unwrap();
        assert_eq!(seen, model.tensors().len());
        assert_eq!(last, result.source_bytes);
        let out = Gguf::open(&path).unwrap();
        assert_eq!(out.file_bytes(), result.file_bytes);
        assert_eq!(
            out.metadata().require_u32("general.file_type").unwrap(),
            f.id()
        );
        assert_eq!(
            out.metadata()
                .require_u32("general.quantization_version")
                .unwrap(),
            2
        );
        assert_eq!(out.metadata().require_u32("llama.block_count").unwrap(), 2);
        assert_eq!(
            out.tensors().iter().map(|t| t.bytes).sum::<u64>(),
            result.target_bytes
        );
        for (t, c) in out.tensors().iter().zip(&result.choices) {
            assert_eq!(t.ty, c.ty);
            assert_eq!(t.shape, model.tensor(&t.name).unwrap().shape);
            let mut got = vec![0.0; t.elements() as usize];
            blocks::dequantize(t.ty, out.data(t), &mut got).unwrap();
            let (mut error, mut power) = (0.0, 0.0);
            for (i, g) in got.iter().enumerate() {
                error += f64::from(g - weight(i)).powi(2);
                power += f64::from(weight(i)).powi(2);
            }
            // The coarsest type has two bits.
            let limit = if t.ty.is_quantized() { 0.35 } else { 0.005 };
            assert!(
                (error / power).sqrt() < limit,
                "{f} {} {}",
                t.name,
                (error / power).sqrt()
            );
        }
        written += 1;
    }
    assert_eq!(written, 22);
    assert_eq!(entries(dir.path()), 1);
}

#[test]
fn rows_are_quantised_one_by_one_at_any_thread_count() {
    let model = source(&Shape {
        layers: 1,
        width: 512,
        ..DENSE
    });
    let dir = tempfile::tempdir().unwrap();
    let mut files = Vec::new();
    for threads in [1, 3] {
        let path = dir.path().join(format!("{threads}.gguf"));
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        let options = QuantizeOptions::new(FileType::Q5_K_S);
        pool.install(|| quantize(&model, &path, &options, &mut |_| ControlFlow::Continue(())))
            .unwrap();
        files.push(fs::read(&path).unwrap());
    }
    assert!(files[0] == files[1]);
    let out = Gguf::open(dir.path().join("1.gguf")).unwrap();
    let t = out.tensor("blk.0.attn_q.weight").unwrap();
    let row: Vec<f32> = (512..1024).map(weight).collect();
    let mut want = vec![0; t.row_bytes() as usize];
    blocks::quantize(t.ty, &row, None, &mut want).unwrap();
    assert_eq!(out.data(t)[want.len()..2 * want.len()], want);
}

#[test]
fn importance_is_taken_per_expert() {
    let model = source(&Shape {
        layers: 1,
        experts: 3,
        ..DENSE
    });
    let name = "blk.0.ffn_up_exps.weight";
    let factors: Vec<f32> = (0..3 * 256)
        .map(|i| 1.0 + (i % 97) as f32 * (i / 256) as f32)
        .collect();
    let mut options = QuantizeOptions::new(FileType::Q4_K_M);
    options.importance = Some([(name.to_owned(), factors.clone())].into());
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("out.gguf");
    quantize(&model, &path, &options, &mut |_| ControlFlow::Continue(())).unwrap();
    let out = Gguf::open(&path).unwrap();
    let t = out.tensor(name).unwrap();
    for row in 0..6 {
        let weights: Vec<f32> = (row * 256..(row + 1) * 256).map(weight).collect();
        let expert = &factors[row / 2 * 256..][..256];
        let mut want = vec![0; t.row_bytes() as usize];
        blocks::quantize(t.ty, &weights, Some(expert), &mut want).unwrap();
        assert_eq!(
            out.data(t)[row * want.len()..][..want.len()],
            want,
            "row {row}"
        );
    }
    options.importance = Some([(name.to_owned(), vec![1.0; 256])].into());
    let e = quantize(&model, &path, &options, &mut |_| ControlFlow::Continue(())).unwrap_err();
    assert!(
        e.to_string().contains("256 importance factors, 768 needed"),
        "{e}"
    );
}

#[test]
fn what_fails_leaves_nothing_behind() {
    let model = source(&Shape { layers: 1, ..DENSE });
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("out.gguf");
    let options = QuantizeOptions::new(FileType::Q4_0);

    let mut calls = 0;
    let e = quantize(&model, &path, &options, &mut |_| {
        calls += 1;
        if calls < 5 {
            ControlFlow::Continue(())
        } else {
            ControlFlow::Break(())
        }
    });
    assert!(matches!(e, Err(Error::Cancelled { path: p }) if p == path));
    assert_eq!(entries(dir.path()), 0);

    quantize(&model, &path, &options, &mut |_| ControlFlow::Continue(())).unwrap();
    let quantised = Gguf::open(&path).unwrap();
    let again = QuantizeOptions::new(FileType::Q8_0);
    let other = dir.path().join("again.gguf");
    let e = quantize(&quantised, &other, &again, &mut |_| {
        ControlFlow::Continue(())
    })
    .unwrap_err();
    assert!(
        e.to_string()
            .contains("token_embd.weight`: is Q4_0 already"),
        "{e}"
    );
    let again = QuantizeOptions {
        allow_requantize: true,
        ..again
    };
    quantize(&quantised, &other, &again, &mut |_| {
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!(entries(dir.path()), 2);

    #[cfg(target_os = "linux")]
    {
        let e = quantize(&model, "/dev/full", &options, &mut |_| {
            ControlFlow::Continue(())
        });
        assert!(matches!(e, Err(Error::Io { path, .. }) if path == Path::new("/dev/full")));
    }

    // Weights that are no numbers, in row 1 of a tensor.
    let mut w = GgufWriter::new(Metadata::default());
    w.add_tensor("a.weight", GgmlType::F32, &[32, 2]).unwrap();
    let mut data: Vec<u8> = (0..64).flat_map(|i| weight(i).to_le_bytes()).collect();
    data[40 * 4..41 * 4].copy_from_slice(&f32::NAN.to_le_bytes());
    let bad = Gguf::from_bytes(Bytes::from_vec(w.to_bytes(&[&data]).unwrap()), "bad").unwrap();
    let path = dir.path().join("bad.gguf");
    let e = quantize(&bad, &path, &options, &mut |_| ControlFlow::Continue(())).unwrap_err();
    assert!(
        e.to_string().starts_with("bad: tensor `a.weight`: row 1: "),
        "{e}"
    );
    assert_eq!(entries(dir.path()), 2);
}

#[test]
fn importance_matrices_are_read_as_means() {
    let file = |counts: &[f32], sums: &[f32]| {
        let mut w = GgufWriter::new(Metadata::new("imatrix"));
        w.add_tensor("a.weight.in_sum2", GgmlType::F32, &[3, 2])
            .unwrap();
        w.add_tensor("a.weight.counts", GgmlType::F32, &[1, counts.len() as u64])
            .unwrap();
        let bytes = |v: &[f32]| v.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>();
        let bytes = w.to_bytes(&[&bytes(sums), &bytes(counts)]).unwrap();
        read_importance(&Gguf::from_bytes(Bytes::from_vec(bytes), "imatrix").unwrap())
    };
    let sums = [2.0, 4.0, 6.0, 1.0, 2.0, 3.0];
    let read = file(&[4.0, 0.0], &sums).unwrap();
    assert_eq!(read["a.weight"], [0.5, 1.0, 1.5, 1.0, 1.0, 1.0]);
    assert_eq!(read.len(), 1);
    let e = file(&[4.0], &sums).unwrap_err().to_string();
    assert_eq!(
        e,
        "imatrix: tensor `a.weight`: 2 rows of sums have 1 counts"
    );
    let e = file(&[4.0, 1.0], &[f32::NAN; 6]).unwrap_err().to_string();
    assert_eq!(e, "imatrix: tensor `a.weight.in_sum2`: holds NaN");
    let model = source(&Shape { layers: 1, ..DENSE });
    let e = read_importance(&model).unwrap_err().to_string();
    assert_eq!(e, "source.gguf: holds no importance matrix");
}
