//! Models on simulated devices: wherever the parts lie, the logits are the CPU's, bit for
//! bit, since the devices compute with the CPU's kernels.

mod results;
mod shares;

use std::{path::Path, sync::Arc};
use tegula_engine::{
    Batch, BatchToken, Context, ContextOptions, Error, GenerateOptions, Generation, LoadOptions,
    Model, OffloadFlags, Outputs, SamplerOptions, Source, Top, generate,
    offload::{Device as At, GpuLayers, Split},
    plan::{Buffer, Encoding},
};
use tegula_kernels::{
    Amx, Tier,
    device::{Device, DeviceError, largest_of, sim::SimDevice, stream::Rates},
    kv::KvType,
};

const MOE: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../tegula/assets/ferrous-moe-21m-Q4_0.gguf"
);
const GIB: u64 = 1 << 30;

fn options() -> LoadOptions {
    LoadOptions {
        threads: 2,
        ..LoadOptions::new(Source::Path(MOE.into()))
    }
}

fn sims(n: usize, budget: u64) -> Vec<Arc<SimDevice>> {
    let one = |i| {
        Arc::new(SimDevice::new(
            &format!("SIM{i}"),
            budget,
            Tier::detect_max(),
        ))
    };
    (0..n).map(one).collect()
}

fn with(sims: &[Arc<SimDevice>], set: impl FnOnce(&mut OffloadFlags)) -> LoadOptions {
    let devices = sims
        .iter()
        .map(|d| Arc::clone(d) as Arc<dyn Device>)
        .collect();
    let mut options = options().with_devices(devices).unwrap();
    options.offload.margin = 0;
    options.offload.context = 256;
    options.offload.ubatch = 32;
    set(&mut options.offload);
    options
}

fn context(options: &LoadOptions) -> Result<Context, Error> {
    let model = Arc::new(Model::load(options, &mut |_| {})?);
    let small = ContextOptions {
        context: 256,
        ubatch: 32,
        sequences: 2,
        ..ContextOptions::default()
    };
    Context::new(model, &small)
}

/// Prompts, single tokens, several sequences and a shared prefix.
fn work(context: &mut Context) -> Result<Vec<f32>, Error> {
    let mut logits = Vec::new();
    let mut run = |context: &mut Context, batch: &Batch| -> Result<(), Error> {
        let out = context.decode(batch)?;
        (0..out.len()).for_each(|i| logits.extend_from_slice(out.logits(i)));
        (0..out.len()).for_each(|i| logits.extend_from_slice(out.hidden(i)));
        Ok(())
    };
    let ids: Vec<u32> = (1..=70).collect();
    run(context, &Batch::prompt(0, &ids))?;
    context.copy(0, 1, 66)?;
    let token = |id, sequence, logits| BatchToken {
        id,
        sequence,
        logits,
    };
    let tokens = vec![token(5, 0, true), token(9, 1, false), token(11, 1, true)];
    run(context, &Batch { tokens })?;
    run(context, &Batch::prompt(0, &[77]))?;
    run(context, &Batch::all_logits(1, &[3, 4]))?;
    Ok(logits)
}

/// A dense model, where it is there.
fn dense() -> Option<Source> {
    let shared = std::env::var("TEGULA_SHARED").map_or_else(
        |_| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared"),
        Into::into,
    );
    let path = shared.join("models/ferrous-7m-Q4_K_M.gguf");
    if !path.is_file() {
        eprintln!("skipped: {} is absent", path.display());
        return None;
    }
    Some(Source::Path(path))
}

fn cpu() -> Vec<f32> {
    work(&mut context(&options()).unwrap()).unwrap()
}

fn same(name: &str, got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len(), "{name}");
    let first = got
        .iter()
        .zip(want)
        .position(|(a, b)| a.to_bits() != b.to_bits());
    if let Some(i) = first {
        panic!(
            "{name}: value {i} of {} is {} and not {}",
            got.len(),
            got[i],
            want[i]
        );
    }
}

#[test]
fn every_placement_gives_the_logits_of_the_cpu() {
    let want = cpu();
    let ot = |f: &OffloadFlags, text: &str| f.parse_override(text).unwrap();
    type Set<'a> = Box<dyn Fn(&mut OffloadFlags) + 'a>;
    let cases: Vec<(&str, usize, Set<'_>)> = vec![
        ("all on one", 1, Box::new(|_| {})),
        ("no layer", 1, Box::new(|f| f.layers = GpuLayers::Count(0))),
        (
            "the output matrix",
            1,
            Box::new(|f| f.layers = GpuLayers::Count(1)),
        ),
        ("part", 1, Box::new(|f| f.layers = GpuLayers::Count(3))),
        (
            "experts on the CPU",
            1,
            Box::new(|f| f.cpu_moe = usize::MAX),
        ),
        ("some experts on the CPU", 1, Box::new(|f| f.cpu_moe = 2)),
        ("cache on the CPU", 1, Box::new(|f| f.kv_on_cpu = true)),
        ("two", 2, Box::new(|f| f.layers = GpuLayers::Count(99))),
        ("three", 3, Box::new(|f| f.layers = GpuLayers::Count(99))),
        (
            "three, part",
            3,
            Box::new(|f| f.layers = GpuLayers::Count(4)),
        ),
        (
            "shares",
            2,
            Box::new(|f| {
                f.layers = GpuLayers::Count(99);
                f.shares = Some(vec![1.0, 3.0]);
            }),
        ),
        (
            "the second alone",
            2,
            Box::new(|f| {
                f.layers = GpuLayers::Count(99);
                f.split = Split::None;
                f.main = 1;
            }),
        ),
        (
            "experts on the other device",
            2,
            Box::new(move |f| {
                f.split = Split::None;
                f.layers = GpuLayers::Count(99);
                f.overrides = vec![ot(f, "exps=SIM1")];
            }),
        ),
        (
            "experts alone on a device",
            1,
            Box::new(move |f| {
                f.layers = GpuLayers::Count(0);
                f.overrides = vec![ot(f, "_exps=SIM0")];
            }),
        ),
        (
            "output on the CPU, one attention too",
            1,
            Box::new(move |f| {
                f.layers = GpuLayers::Count(99);
                f.overrides = vec![ot(f, "^output=CPU"), ot(f, r"blk\.1\.attn=CPU")];
            }),
        ),
    ];
    for (name, n, set) in cases {
        let sims = sims(n, GIB);
        let mut context = context(&with(&sims, set)).unwrap_or_else(|e| panic!("{name}: {e}"));
        let got = work(&mut context).unwrap_or_else(|e| panic!("{name}: {e}"));
        same(name, &got, &want);
        drop(context);
        assert!(
            sims.iter().all(|d| d.used() == 0),
            "{name}: memory is given back"
        );
    }
}

/// The largest difference of logits, of their largest; not a number where one isn't.
fn apart(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    let largest = want.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    let all = got.iter().zip(want).map(|(g, w)| (g - w).abs() / largest);
    all.fold(0.0, |m: f32, d| if m.is_nan() || d <= m { m } else { d })
}

/// Sums in another order, of which some are then rounded to codes: by 0.02 on most tiers, and more
/// where that lets a router choose another of two experts that it finds alike.
const ANOTHER_ORDER: f32 = 0.08;

#[test]
fn layers_split_over_devices_give_the_logits_of_the_cpu() {
    let want = cpu();
    let ot = |f: &OffloadFlags, text: &str| f.parse_override(text).unwrap();
    type Set<'a> = Box<dyn Fn(&mut OffloadFlags) + 'a>;
    let cases: Vec<(&str, usize, Set<'_>)> = vec![
        ("two", 2, Box::new(|_| {})),
        // Two KV heads: one of the three has none.
        ("three", 3, Box::new(|_| {})),
        (
            "three, part",
            3,
            Box::new(|f| f.layers = GpuLayers::Count(4)),
        ),
        ("shares", 2, Box::new(|f| f.shares = Some(vec![1.0, 3.0]))),
        ("the second's output", 2, Box::new(|f| f.main = 1)),
        (
            "experts on the CPU",
            2,
            Box::new(|f| f.cpu_moe = usize::MAX),
        ),
        (
            "output and an attention on the CPU",
            2,
            Box::new(move |f| f.overrides = vec![ot(f, "^output=CPU"), ot(f, r"blk\.1\.attn=CPU")]),
        ),
    ];
    for (name, n, set) in cases {
        let sims = sims(n, GIB);
        let options = with(&sims, |f| {
            f.split = Split::Tensor;
            f.layers = GpuLayers::Count(99);
            set(f);
        });
        let mut context = context(&options).unwrap_or_else(|e| panic!("{name}: {e}"));
        let got = work(&mut context).unwrap_or_else(|e| panic!("{name}: {e}"));
        let apart = apart(&got, &want);
        assert!(apart > 0.0 && apart < ANOTHER_ORDER, "{name}: {apart}");
        drop(context);
        assert!(
            sims.iter().all(|d| d.used() == 0),
            "{name}: memory is given back"
        );
    }
    // One device has whole layers.
    let sims = sims(1, GIB);
    let options = with(&sims, |f| f.split = Split::Tensor);
    same(
        "one",
        &work(&mut context(&options).unwrap()).unwrap(),
        &want,
    );
}

#[test]
fn what_a_split_exchanges_is_what_the_plan_says() {
    for (n, cpu_moe) in [(2, 0), (3, 0), (2, usize::MAX)] {
        let sims = sims(n, GIB);
        let mut context = context(&with(&sims, |f| {
            f.split = Split::Tensor;
            f.layers = GpuLayers::Count(99);
            f.cpu_moe = cpu_moe;
        }))
        .unwrap();
        context.decode(&Batch::prompt(0, &[1, 2, 3])).unwrap();
        let bytes = |of: fn(&SimDevice) -> u64| sims.iter().map(|d| of(d)).sum::<u64>();
        let read = |_: ()| bytes(|d| d.copies().read);
        let written = |_: ()| bytes(|d| d.copies().written);
        let before = (read(()), written(()));
        context.decode(&Batch::prompt(0, &[4])).unwrap();
        let moved = (read(()) - before.0, written(()) - before.1);
        let model = Arc::clone(context.model());
        let (c, offload) = (model.config(), &model.plan().offload);
        let split = offload.tensor.as_ref().unwrap();
        // Besides: logits and hidden state; x on all, and where the token stands, for those that
        // attend: two words, a page, cosines and sines.
        let outputs = 4 * (c.vocab + c.embd);
        let places = 4 * (2 + 1 + 2 * c.head_dim / 2) * split.attending().len();
        let x = 4 * c.embd * n;
        let besides = (outputs + places + x) as u64;
        assert_eq!(
            moved.0 + moved.1,
            offload.exchanged + besides,
            "{n} {cpu_moe}"
        );
        let summary = format!("{} bytes exchanged per token", offload.exchanged);
        assert!(offload.summary.contains(&summary), "{}", offload.summary);
    }
}

#[test]
fn what_does_not_suit_a_split_is_refused() {
    let sims = sims(2, GIB);
    let check = |set: &dyn Fn(&mut OffloadFlags)| {
        let options = with(&sims, |f| {
            f.split = Split::Tensor;
            set(f);
        });
        Model::load(&options, &mut |_| {})
            .err()
            .map(|e| e.to_string())
    };
    let said = check(&|f| f.kv_on_cpu = true).unwrap();
    assert!(said.contains("-nkvo"), "{said}");
    let said = check(&|f| f.overrides = vec![f.parse_override("exps=SIM1").unwrap()]).unwrap();
    assert!(said.contains("-ot can name CPU alone"), "{said}");
    assert_eq!(check(&|_| {}), None);
}

#[test]
fn devices_hold_what_the_plan_says() {
    for set in [
        (|_: &mut OffloadFlags| {}) as fn(&mut OffloadFlags),
        |f| f.split = Split::Tensor,
        |f| {
            f.split = Split::Tensor;
            f.layers = GpuLayers::Count(4);
            f.shares = Some(vec![1.0, 3.0]);
            f.cpu_moe = 3;
        },
        |f| f.cpu_moe = 3,
        |f| f.layers = GpuLayers::Count(4),
        |f| f.kv_on_cpu = true,
    ] {
        let sims = sims(2, GIB);
        let options = with(&sims, set);
        let model = Arc::new(Model::load(&options, &mut |_| {}).unwrap());
        let plan = model.plan().clone();
        for (d, sim) in sims.iter().enumerate() {
            let here = |p: &tegula_engine::plan::Placement| match p.device {
                At::Cpu => 0,
                At::Gpu(at) => {
                    if at == d {
                        p.bytes
                    } else {
                        0
                    }
                }
                At::Split => p.parts[d],
            };
            let bytes: u64 = plan.placements.iter().map(here).sum();
            assert_eq!(plan.devices[d].weights, bytes);
            assert_eq!(sim.used(), bytes);
        }
        let small = ContextOptions {
            context: 256,
            ubatch: 32,
            ..ContextOptions::default()
        };
        let _context = Context::new(model, &small).unwrap();
        for (d, sim) in sims.iter().enumerate() {
            let planned = plan.devices[d].needed();
            assert!(sim.used() <= planned, "{} of {planned}", sim.used());
        }
    }
}

/// Bytes of the tensors whose names contain one of `parts`.
fn file_bytes(context: &Context, parts: &[&str]) -> u64 {
    let tensors = context.model().gguf().tensors().iter();
    let named = |name: &str| parts.iter().any(|p| name.contains(p));
    tensors.filter(|t| named(&t.name)).map(|t| t.bytes).sum()
}

#[test]
fn weights_that_stream_give_the_logits_of_the_cpu() {
    let want = cpu();
    let ot = |f: &OffloadFlags, text: &str| f.parse_override(text).unwrap();
    type Set<'a> = Box<dyn Fn(&mut OffloadFlags) + 'a>;
    // Which weights stream besides experts.
    let cases: Vec<(&str, usize, bool, Set<'_>)> = vec![
        (
            "experts of routers on the device",
            1,
            false,
            Box::new(|f| f.cpu_moe = usize::MAX),
        ),
        (
            "all layers",
            1,
            true,
            Box::new(|f| f.layers = GpuLayers::Count(1)),
        ),
        (
            "some layers",
            2,
            true,
            Box::new(|f| f.layers = GpuLayers::Count(4)),
        ),
        (
            "routers on the other device",
            2,
            false,
            Box::new(move |f| {
                f.split = Split::None;
                f.main = 1;
                f.overrides = vec![ot(f, "ffn_gate_inp=SIM0"), ot(f, "_exps=CPU")];
            }),
        ),
    ];
    for (name, n, attention, set) in cases {
        let sims = sims(n, GIB);
        let options = with(&sims, |f| {
            f.op_offload_min_batch = Some(6);
            set(f);
        });
        let mut context = context(&options).unwrap_or_else(|e| panic!("{name}: {e}"));
        let plan = context.model().plan().clone();
        for (d, sim) in sims.iter().enumerate() {
            let planned = plan.devices[d].needed();
            assert!(sim.used() <= planned, "{} of {planned}", sim.used());
        }
        let got = work(&mut context).unwrap_or_else(|e| panic!("{name}: {e}"));
        same(name, &got, &want);
        // A prompt of 70 tokens in parts of 32, 32 and 6. Behind the last layer's attention no
        // token is left, or one.
        let [projections, dense, experts] = plan.offload.streams.layers();
        assert_eq!(dense, 0);
        assert_eq!(attention, projections > 0, "{name}");
        assert!(experts > 0);
        let all = context.model().config().layers;
        let but_last = |layers: usize| layers - usize::from(layers == all);
        let matrices = 3 * but_last(experts) + 3 * projections + but_last(projections);
        let streams: usize = sims.iter().map(|d| d.copies().streams).sum();
        assert_eq!(streams, 3 * matrices, "{name}");
        drop(context);
        assert!(
            sims.iter().all(|d| d.used() == 0),
            "{name}: memory is given back"
        );
    }
}

#[test]
fn only_experts_that_tokens_use_are_brought() {
    let sims = sims(1, GIB);
    let mut context = context(&with(&sims, |f| {
        f.cpu_moe = usize::MAX;
        f.op_offload_min_batch = Some(2);
    }))
    .unwrap();
    let all = file_bytes(&context, &["_exps"]);
    let streamed = |context: &mut Context, ids: &[u32]| {
        let before = sims[0].copies().streamed;
        context.decode(&Batch::all_logits(0, ids)).unwrap();
        sims[0].copies().streamed - before
    };
    // 4 of 16 experts a token.
    let few = streamed(&mut context, &[1, 2]);
    assert!(few >= all / 4 && few <= all / 2, "{few} of {all}");
    assert_eq!(streamed(&mut context, &[3]), 0);
    let ids: Vec<u32> = (1..=30).map(|i| 17 * i).collect();
    let many = streamed(&mut context, &ids);
    assert!(many > few && many <= all, "{many} of {all}");
}

/// Rates by which the embedded model's experts are shared by the CPU and a device.
const ALIKE: Rates = Rates {
    upload: 12e9,
    device: 1e12,
    hop: 0.0,
    memory: 10e9,
    copy: 1e12,
    decoding: 20.0,
    sharing: 1.0,
};

#[test]
fn experts_are_shared_by_cpu_and_device_and_the_same_in_every_run() {
    let want = cpu();
    let run = |threads| {
        let sims = sims(1, GIB);
        let mut options = with(&sims, |f| {
            f.cpu_moe = usize::MAX;
            f.rates = ALIKE;
        });
        options.threads = threads;
        options.offload.ubatch = 128;
        let model = Arc::new(Model::load(&options, &mut |_| {}).unwrap());
        let large = ContextOptions {
            context: 256,
            ubatch: 128,
            sequences: 2,
            ..ContextOptions::default()
        };
        let mut context = Context::new(model, &large).unwrap();
        let plan = context.model().plan();
        let stacks = plan
            .placements
            .iter()
            .filter(|p| p.tensor.contains("_exps"));
        assert!(stacks.clone().count() > 0);
        for p in stacks {
            let stream = p.streams.unwrap();
            assert!(stream.shared && stream.from == 64, "{stream:?}");
        }
        let all = file_bytes(&context, &["_exps"]);
        let got = work(&mut context).unwrap();
        (got, sims[0].copies(), all)
    };
    let (got, copies, all) = run(2);
    let apart = apart(&got, &want);
    assert!(apart < ANOTHER_ORDER, "{apart}");
    // The prompt streams some of the experts, of all layers but the last, which has one token.
    let streamed = copies.streamed;
    assert!(
        streamed > all / 8 && streamed < 5 * all / 6,
        "{streamed} of {all}"
    );
    assert_eq!(copies.streams, 15);
    same("again", &run(2).0, &got);
}

#[test]
fn streaming_leaves_what_is_on_devices_alone_and_fits_beside_it() {
    let plan = |mib: u64, op_offload, amx, set: fn(&mut OffloadFlags)| {
        let options = LoadOptions {
            amx,
            ..with(&sims(1, mib << 20), |f| {
                set(f);
                f.op_offload = op_offload;
            })
        };
        let gguf = options.open().unwrap();
        let config = tegula_engine::ModelConfig::from_gguf(&gguf).unwrap();
        tegula_engine::plan(&config, &gguf, &options.plan_flags())
    };
    let amx = Amx::emulate().expect("any x86-64 Linux");
    let (mut room, mut none) = (0, 0);
    // A piece's landing place takes 32 MiB.
    for mib in [8, 11, 14, 40, 46, 64] {
        for set in [
            (|_: &mut OffloadFlags| {}) as fn(&mut OffloadFlags),
            |f| f.cpu_moe = usize::MAX,
            |f| f.layers = GpuLayers::Count(3),
        ] {
            let (with, without) = (plan(mib, true, None, set), plan(mib, false, None, set));
            for (a, b) in with.placements.iter().zip(&without.placements) {
                assert_eq!((a.device, a.buffer, a.bytes), (b.device, b.buffer, b.bytes));
                assert!(b.streams.is_none());
            }
            let (a, b) = (&with.devices[0], &without.devices[0]);
            assert_eq!(a.placed(), b.placed());
            assert_eq!(b.streaming, 0);
            if b.placed() <= b.budget {
                assert!(a.needed() <= a.budget, "{mib} MiB");
            }
            assert_eq!(plan(mib, true, Some(amx), set).devices, with.devices);
            match a.streaming {
                0 => none += 1,
                _ => room += 1,
            }
        }
    }
    assert!(room > 0 && none > 0, "{room} {none}");
}

#[test]
fn the_plan_says_what_streams_and_from_when() {
    let plan = |set: fn(&mut OffloadFlags)| {
        let options = with(&sims(1, GIB), set);
        let gguf = options.open().unwrap();
        let config = tegula_engine::ModelConfig::from_gguf(&gguf).unwrap();
        tegula_engine::plan(&config, &gguf, &options.plan_flags())
    };
    let set = |f: &mut OffloadFlags| {
        f.layers = GpuLayers::Count(4);
        f.op_offload_min_batch = Some(100);
    };
    let told = plan(set);
    for p in &told.placements {
        let product = ["_exps", "attn_q.", "attn_k.", "attn_v.", "attn_output"];
        let may = p.device == At::Cpu && product.iter().any(|part| p.tensor.contains(part));
        let want = may.then_some((At::Gpu(0), 100, false));
        let told = p.streams.map(|s| (s.device, s.from, s.shared));
        assert_eq!(told, want, "{}", p.tensor);
    }
    let summary = &told.offload.summary;
    assert!(
        summary.ends_with("stream to SIM0 in batches of at least 100 tokens"),
        "{summary}"
    );
    // Such small matrices are not worth it for the batches that these tests run.
    let small = plan(|f| f.layers = GpuLayers::Count(4));
    let large = |p: &tegula_engine::plan::Placement| p.streams.is_none_or(|s| s.from >= 64);
    assert!(small.placements.iter().all(large));
}

#[test]
fn experts_of_split_layers_stream_to_the_first_device() {
    let want = cpu();
    let sims = sims(2, GIB);
    let mut context = context(&with(&sims, |f| {
        f.split = Split::Tensor;
        f.layers = GpuLayers::Count(99);
        f.cpu_moe = usize::MAX;
        f.op_offload_min_batch = Some(6);
    }))
    .unwrap();
    let got = work(&mut context).unwrap();
    let apart = apart(&got, &want);
    assert!(apart < ANOTHER_ORDER, "{apart}");
    let streams = [0, 1].map(|d: usize| sims[d].copies().streams);
    assert!(streams[0] > 0 && streams[1] == 0, "{streams:?}");
}

#[test]
fn a_device_that_is_lost_while_weights_stream_leaves_the_context_as_it_was() {
    let sims = sims(1, GIB);
    let options = with(&sims, |f| {
        f.layers = GpuLayers::Count(4);
        f.op_offload_min_batch = Some(6);
    });
    let mut context = context(&options).unwrap();
    let ids: Vec<u32> = (1..=20).collect();
    let mut failures = 0;
    for operations in (0..60).step_by(7) {
        sims[0].fail_after(operations);
        let result = context.decode(&Batch::prompt(0, &ids));
        sims[0].repair();
        match result {
            Err(Error::Device(DeviceError::Failed { .. })) => failures += 1,
            other => assert!(other.is_ok()),
        }
        context.truncate(0, 0).unwrap();
    }
    assert!(failures > 5);
    let after = context.decode(&Batch::prompt(0, &ids)).unwrap();
    let mut fresh = self::context(&options).unwrap();
    assert!(fresh.decode(&Batch::prompt(0, &ids)).unwrap() == after);
}

#[test]
fn a_hybrid_hops_once_each_way_per_layer() {
    let sims = sims(1, GIB);
    let mut context = context(&with(&sims, |f| f.cpu_moe = usize::MAX)).unwrap();
    let layers = context.model().config().layers;
    context.decode(&Batch::prompt(0, &[1, 2, 3])).unwrap();
    let before = sims[0].copies();
    context.decode(&Batch::prompt(0, &[4])).unwrap();
    let after = sims[0].copies();
    // One wait for both of what goes down, and one for the results.
    assert_eq!(after.waits - before.waits, layers + 1);
    // Experts' input and the router's logits; at the end logits and hidden state.
    assert_eq!(after.reads - before.reads, 2 * layers + 2);
    // The experts' sum; at the beginning x and four arrays of places.
    assert_eq!(after.writes - before.writes, layers + 5);
}

#[test]
fn amx_changes_nothing_on_devices_and_nothing_of_it_is_left_by_full_offload() {
    let amx = Amx::emulate().expect("any x86-64 Linux");
    let plan = |set: fn(&mut OffloadFlags), amx| {
        let options = LoadOptions {
            amx,
            ..with(&sims(1, GIB), set)
        };
        let gguf = options.open().unwrap();
        let config = tegula_engine::ModelConfig::from_gguf(&gguf).unwrap();
        tegula_engine::plan(&config, &gguf, &options.plan_flags())
    };
    for set in [
        (|_: &mut OffloadFlags| {}) as fn(&mut OffloadFlags),
        |f| f.cpu_moe = usize::MAX,
        |f| f.layers = GpuLayers::Count(3),
    ] {
        let (without, with) = (plan(set, None), plan(set, Some(amx)));
        let all = without.placements.iter().zip(&with.placements);
        for (a, b) in all {
            let place = |p: &tegula_engine::plan::Placement| (p.device, p.buffer, p.bytes);
            assert_eq!(place(a), place(b), "{}", a.tensor);
            if a.device != At::Cpu {
                assert_eq!(a.kernel, b.kernel);
                assert!(a.buffer == Buffer::Device && a.encoding != Encoding::Strip16);
            }
        }
        assert_eq!(without.devices, with.devices);
    }
    let full = plan(|_| {}, Some(amx));
    assert_eq!(full.bytes_in(Buffer::Packed), 0);
    assert!(full.placements.iter().all(|p| !p.kernel.contains("amx")));
    if Tier::detect_max() > Tier::Scalar {
        let hybrid = plan(|f| f.cpu_moe = usize::MAX, Some(amx));
        let experts = hybrid
            .placements
            .iter()
            .filter(|p| p.tensor.contains("_exps"));
        assert!(experts.into_iter().all(|p| p.kernel.contains("amx")));
    }
}

#[test]
fn fit_takes_what_there_is_room_for_experts_leave_first() {
    let mut last = (usize::MAX, usize::MAX);
    let mut kinds = Vec::new();
    for mib in [64, 14, 11, 8, 5, 3, 1, 0] {
        let options = with(&sims(1, mib << 20), |_| {});
        let gguf = options.open().unwrap();
        let config = tegula_engine::ModelConfig::from_gguf(&gguf).unwrap();
        let plan = tegula_engine::plan(&config, &gguf, &options.plan_flags());
        assert!(plan.offload.check_memory().is_ok(), "{mib} MiB");
        let count = |part: &str| {
            let there = |p: &&tegula_engine::plan::Placement| p.device != At::Cpu;
            let all = plan.placements.iter().filter(there);
            all.filter(|p| p.tensor.contains(part)).count()
        };
        let now = (count("attn_q.weight"), count("up_exps"));
        assert!(
            now.0 <= last.0 && now.1 <= last.1,
            "less room, no more there"
        );
        last = now;
        kinds.push(now);
        let context = context(&options).unwrap();
        drop(context);
    }
    let layers = kinds[0].0;
    assert_eq!(kinds[0], (layers, layers), "all fits in 64 MiB");
    assert!(
        kinds.iter().any(|&(a, e)| a == layers && e < layers),
        "{kinds:?}"
    );
    assert_eq!(kinds.last(), Some(&(0, 0)));
}

#[test]
fn too_little_memory_is_an_error_that_says_how_much() {
    let error = context(&with(&sims(1, 2 << 20), |f| {
        f.layers = GpuLayers::Count(99)
    }));
    let error = error.err().expect("nothing fits in 2 MiB");
    assert!(
        matches!(&error, Error::DeviceMemory { device, needed, .. } if device == "SIM0" && *needed > 8 << 20)
    );
    assert!(error.to_string().contains("-ngl"), "{error}");
    // The plan was for a smaller context than the one that is then made.
    let sims = sims(1, 16 << 20);
    let model = Model::load(&with(&sims, |_| {}), &mut |_| {}).unwrap();
    let large = ContextOptions {
        context: 1 << 16,
        ..ContextOptions::default()
    };
    let weights = sims[0].used();
    let error = Context::new(Arc::new(model), &large).err().unwrap();
    assert!(
        matches!(error, Error::Device(DeviceError::OutOfMemory { .. })),
        "{error}"
    );
    assert!(weights > 0 && sims[0].used() == 0);
}

#[test]
fn a_device_that_is_lost_leaves_the_context_as_it_was() {
    let sims = sims(2, GIB);
    let options = with(&sims, |f| f.layers = GpuLayers::Count(99));
    let mut context = context(&options).unwrap();
    let ids: Vec<u32> = (1..=40).collect();
    context.decode(&Batch::prompt(0, &ids)).unwrap();
    for operations in [0, 3, 17, 40] {
        sims[1].fail_after(operations);
        let error = context.decode(&Batch::prompt(0, &[7])).err();
        sims[1].repair();
        match error {
            Some(error) => assert!(matches!(error, Error::Device(DeviceError::Failed { .. }))),
            None => context.truncate(0, 40).unwrap(),
        }
        assert_eq!(context.tokens(0).unwrap().len(), 40);
    }
    let after = context.decode(&Batch::prompt(0, &[7])).unwrap();
    let mut fresh = self::context(&options).unwrap();
    fresh.decode(&Batch::prompt(0, &ids)).unwrap();
    assert!(fresh.decode(&Batch::prompt(0, &[7])).unwrap() == after);
}

/// Generates a few tokens and breaks the device when the first text comes.
fn generated(context: &mut Context, break_it: &mut dyn FnMut()) -> Result<Generation, Error> {
    let options = GenerateOptions {
        limit: Some(12),
        sampler: SamplerOptions::greedy(),
        ignore_eog: true,
        ..GenerateOptions::default()
    };
    let never = false.into();
    let ids: Vec<u32> = (1..=20).collect();
    let mut text = |_: &str| break_it();
    generate(context, 0, &ids, &options, &never, &mut text)
}

#[test]
fn what_breaks_in_the_middle_of_a_generation_is_an_error_and_no_more() {
    for set in [
        (|f: &mut OffloadFlags| f.layers = GpuLayers::Count(99)) as fn(&mut OffloadFlags),
        |f| f.layers = GpuLayers::Count(4),
    ] {
        let sims = sims(1, GIB);
        let mut context = context(&with(&sims, set)).unwrap();
        let whole = generated(&mut context, &mut || {}).unwrap();
        assert_eq!(whole.tokens.len(), 12);
        context.truncate(0, 0).unwrap();
        // Somebody else takes the memory that operations work in.
        let mut taken = None;
        let error = generated(&mut context, &mut || {
            let free = sims[0].info().unwrap().free;
            taken.get_or_insert_with(|| sims[0].alloc(free as usize).unwrap());
        });
        let error = error.unwrap_err();
        assert!(
            matches!(
                &error,
                Error::Device(DeviceError::OutOfMemory { free: 0, .. })
            ),
            "{error}"
        );
        let held = context.tokens(0).unwrap().len();
        assert!((20..32).contains(&held), "{held}");
        drop(taken);
        assert_eq!(
            generated(&mut context, &mut || {}).unwrap().tokens,
            whole.tokens
        );
        context.truncate(0, 0).unwrap();
        // It is lost.
        let error = generated(&mut context, &mut || sims[0].fail_after(5)).unwrap_err();
        assert!(
            matches!(&error, Error::Device(DeviceError::Failed { .. })),
            "{error}"
        );
        assert!(generated(&mut context, &mut || {}).is_err());
        sims[0].repair();
        assert_eq!(
            generated(&mut context, &mut || {}).unwrap().tokens,
            whole.tokens
        );
    }
}

#[test]
fn states_move_between_placements() {
    for split in [Split::Layer, Split::Tensor] {
        states_move(split);
    }
}

fn states_move(split: Split) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state");
    let mut on_cpu = context(&options()).unwrap();
    let mut there = context(&with(&sims(2, GIB), |f| {
        f.layers = GpuLayers::Count(4);
        f.split = split;
    }))
    .unwrap();
    let same = |a: &Outputs, b: &Outputs| match split {
        Split::Tensor => apart(a.logits(0), b.logits(0)) < ANOTHER_ORDER,
        _ => a == b,
    };
    let ids: Vec<u32> = (1..=70).collect();
    there.decode(&Batch::prompt(0, &ids)).unwrap();
    there.save_state(0, &path).unwrap();
    on_cpu.load_state(1, &path).unwrap();
    let want = on_cpu.decode(&Batch::prompt(1, &[8])).unwrap();
    assert!(same(&there.decode(&Batch::prompt(0, &[8])).unwrap(), &want));
    on_cpu.save_state(1, &path).unwrap();
    there.load_state(1, &path).unwrap();
    let want = on_cpu.decode(&Batch::prompt(1, &[9])).unwrap();
    assert!(same(&there.decode(&Batch::prompt(1, &[9])).unwrap(), &want));
}

#[test]
fn dense_models_and_other_caches() {
    let Some(source) = dense() else {
        return;
    };
    let load = |options: LoadOptions| LoadOptions {
        source: source.clone(),
        ..options
    };
    for (k_type, v_type) in [(KvType::BF16, KvType::Q8_0), (KvType::Q8_0, KvType::F16)] {
        let run = |options: LoadOptions| {
            let model = Model::load(&load(options), &mut |_| {}).unwrap();
            let small = ContextOptions {
                context: 256,
                ubatch: 32,
                sequences: 2,
                k_type,
                v_type,
                ..ContextOptions::default()
            };
            work(&mut Context::new(Arc::new(model), &small).unwrap()).unwrap()
        };
        let want = run(options());
        assert!(run(with(&sims(1, GIB), |_| {})) == want);
        assert!(run(with(&sims(2, GIB), |f| f.layers = GpuLayers::Count(4))) == want);
        let sims = sims(1, GIB);
        let streaming = with(&sims, |f| {
            f.layers = GpuLayers::Count(4);
            f.op_offload_min_batch = Some(6);
        });
        assert!(run(streaming) == want);
        assert!(sims[0].copies().streams > 0);
    }
    // Between layers that stream, x stays on the device: what is seen here is what attends here.
    let sims = sims(1, GIB);
    let streaming = with(&sims, |f| {
        f.layers = GpuLayers::Count(1);
        f.op_offload_min_batch = Some(6);
    });
    let mut context = context(&load(streaming)).unwrap();
    let model = Arc::clone(context.model());
    let c = model.config();
    let before = sims[0].copies();
    let ids: Vec<u32> = (1..=32).collect();
    context.decode(&Batch::all_logits(0, &ids)).unwrap();
    let after = sims[0].copies();
    let (x, q) = (32 * c.embd, 32 * c.heads * c.head_dim);
    let kv = 32 * c.kv_heads * c.head_dim;
    let up = 4 * (x + c.layers * (q + 2 * c.embd)) as u64;
    assert_eq!(after.written - before.written, up);
    let down = 4 * (c.layers * (q + 2 * kv) + 32 * (c.vocab + c.embd)) as u64;
    assert_eq!(after.read - before.read, down);
}
