//! Products of single tokens that the CPU shares with a device.

use super::*;
use tegula_engine::{
    Plan,
    plan::Placement,
    share::{DecodeShare, Share},
};
use tegula_kernels::device::stream::{DECODE_SHARE, LEAST_SHARE};

fn sources() -> impl Iterator<Item = Source> {
    [Source::Path(MOE.into())].into_iter().chain(dense())
}

fn planned(options: &LoadOptions) -> Plan {
    let gguf = options.open().unwrap();
    let config = tegula_engine::ModelConfig::from_gguf(&gguf).unwrap();
    tegula_engine::plan(&config, &gguf, &options.plan_flags())
}

type Set = fn(&mut OffloadFlags);

const PLACEMENTS: [(&str, usize, Set); 4] = [
    ("the output matrix", 1, |f| f.layers = GpuLayers::Count(1)),
    ("part", 1, |f| f.layers = GpuLayers::Count(4)),
    ("the second of two", 2, |f| {
        f.layers = GpuLayers::Count(3);
        f.main = 1;
    }),
    ("output on the CPU, an attention too", 1, |f| {
        f.layers = GpuLayers::Count(99);
        let ot = |text| f.parse_override(text).unwrap();
        f.overrides = vec![ot("^output=CPU"), ot(r"blk\.1\.attn=CPU")];
    }),
];

/// Groups of matrices that are multiplied together, of which a device has a share.
fn groups(plan: &Plan) -> usize {
    let first = |p: &&Placement| {
        let name = p.tensor.rsplit_terminator(".weight").next().unwrap_or("");
        let part = name.rsplit('.').next().unwrap_or("");
        let firsts = ["attn_q", "attn_output", "ffn_gate", "ffn_down", "output"];
        p.share.is_some() && firsts.contains(&part)
    };
    plan.placements.iter().filter(first).count()
}

#[test]
fn shared_products_give_the_logits_of_the_cpu() {
    for source in sources() {
        let from = |options: LoadOptions| LoadOptions {
            source: source.clone(),
            ..options
        };
        let want = work(&mut context(&from(options())).unwrap()).unwrap();
        for (name, n, set) in PLACEMENTS {
            for fraction in [0.15, 0.25, 0.6, 0.99] {
                let name = format!("{source:?}, {name}, {fraction}");
                let sims = sims(n, GIB);
                let mut options = from(with(&sims, |f| {
                    set(f);
                    f.decode_share = DecodeShare::Fraction(fraction);
                }));
                let mut got = Vec::new();
                for threads in [1, 3] {
                    options.threads = threads;
                    let mut context = context(&options).unwrap();
                    let shares = context.model().plan().offload.shares.unwrap();
                    assert!(shares.matrices > 0, "{name}");
                    let d = &sims[shares.device];
                    assert!(d.pinned() >= shares.bytes, "{name}");
                    got = work(&mut context).unwrap_or_else(|e| panic!("{name}: {e}"));
                    same(&name, &got, &want);
                    drop(context);
                    assert!(sims.iter().all(|d| d.used() + d.pinned() == 0), "{name}");
                }
                assert!(!got.is_empty());
            }
        }
    }
}

#[test]
fn only_single_tokens_are_shared_with_a_hop_per_group_of_products() {
    for source in sources() {
        let sims = sims(1, GIB);
        let options = LoadOptions {
            source,
            ..with(&sims, |f| {
                f.layers = GpuLayers::Count(3);
                f.decode_share = DecodeShare::Fraction(0.25);
            })
        };
        let mut context = context(&options).unwrap();
        let ids: Vec<u32> = (1..=40).collect();
        context.decode(&Batch::prompt(0, &ids)).unwrap();
        context.decode(&Batch::all_logits(0, &[3, 4])).unwrap();
        let before = sims[0].copies();
        assert_eq!((before.sent, before.collected), (0, 0));
        context.decode(&Batch::prompt(0, &[5])).unwrap();
        let after = sims[0].copies();
        let groups = groups(context.model().plan());
        assert!(groups > 0);
        assert_eq!((after.sent, after.collected), (groups, groups));
        // What is pinned is what the plan says: the rows as the file has them.
        let model = context.model();
        let tensor = |p: &Placement| model.gguf().tensor(&p.tensor).unwrap().clone();
        let shares = model.plan().placements.iter();
        let rows = shares.filter_map(|p| {
            let (share, t) = (p.share?, tensor(p));
            Some(t.bytes / t.shape[1] * share.rows as u64)
        });
        assert_eq!(after.pinned, rows.sum::<u64>());
    }
}

#[test]
fn the_plan_says_what_is_shared_and_places_nothing_by_it() {
    let amx = Amx::emulate().expect("any x86-64 Linux");
    for source in sources() {
        for (name, n, set) in PLACEMENTS {
            let plan = |share, amx| {
                planned(&LoadOptions {
                    source: source.clone(),
                    amx,
                    ..with(&sims(n, GIB), |f| {
                        set(f);
                        f.decode_share = share;
                    })
                })
            };
            let with = plan(DecodeShare::Fraction(0.3), None);
            let without = plan(DecodeShare::Fraction(0.0), None);
            assert_eq!(with.devices, without.devices);
            assert!(without.offload.shares.is_none());
            let (mut count, mut bytes) = (0, 0);
            for (a, b) in with.placements.iter().zip(&without.placements) {
                assert_eq!((a.device, a.buffer, a.bytes), (b.device, b.buffer, b.bytes));
                assert_eq!(b.share, None);
                let Some(Share {
                    rows, bytes: part, ..
                }) = a.share
                else {
                    continue;
                };
                assert_eq!(a.device, At::Cpu, "{}", a.tensor);
                assert!(!a.tensor.contains("_exps") && !a.tensor.contains("_inp"));
                // The CPU keeps whole strips, and no less than its part.
                let n = a.shape[1] as usize;
                assert!(
                    (n - rows).is_multiple_of(16) && rows * 10 <= n * 3,
                    "{}",
                    a.tensor
                );
                assert!(rows > 0 && rows + 16 > n * 3 / 10, "{}: {rows}", a.tensor);
                (count, bytes) = (count + 1, bytes + part);
            }
            let shares = with.offload.shares.unwrap();
            assert_eq!((shares.matrices, shares.bytes), (count, bytes), "{name}");
            assert_eq!(with.pinned(), bytes);
            let said = format!("SIM{} multiplies 0.3 of the rows of {count}", shares.device);
            let summary = &with.offload.summary;
            assert!(summary.contains(&said), "{summary}");
            // With AMX as without.
            let tiles = plan(DecodeShare::Fraction(0.3), Some(amx));
            assert_eq!(tiles.offload.shares, with.offload.shares);
            // By itself what is worth it: nothing of matrices as small as a layer's here.
            let all = plan(DecodeShare::Fraction(DECODE_SHARE), None).placements;
            let auto = plan(DecodeShare::Auto, None).placements;
            for (all, auto) in all.iter().zip(&auto) {
                let worth = all.share.filter(|s| s.bytes >= LEAST_SHARE);
                assert_eq!(auto.share, worth, "{}", all.tensor);
                assert!(worth.is_none() || !all.tensor.contains("blk."));
            }
        }
    }
    // Nothing without a device that holds weights.
    let none = planned(&with(&sims(1, GIB), |f| {
        f.layers = GpuLayers::Count(0);
        f.decode_share = DecodeShare::Fraction(0.3);
    }));
    assert!(none.offload.shares.is_none());
    // By itself nothing where weights are to stay on the CPU.
    let stay = planned(&with(&sims(1, GIB), |f| {
        PLACEMENTS[3].2(f);
        f.op_offload = false;
    }));
    assert!(stay.offload.shares.is_none() && !none.offload.summary.contains("single"));
}

#[test]
fn shares_are_fractions_or_auto() {
    let parsed = |s: &str| s.parse::<DecodeShare>();
    assert_eq!(parsed("auto"), Ok(DecodeShare::Auto));
    assert_eq!(parsed("0"), Ok(DecodeShare::Fraction(0.0)));
    assert_eq!(parsed("0.25"), Ok(DecodeShare::Fraction(DECODE_SHARE)));
    for wrong in ["1", "-0.1", "nan", "inf", "", "a quarter"] {
        assert!(parsed(wrong).is_err(), "{wrong}");
    }
}

#[test]
fn without_pinned_memory_the_cpu_multiplies_all_and_says_why() {
    let want = cpu();
    let share = |f: &mut OffloadFlags| {
        f.layers = GpuLayers::Count(3);
        f.decode_share = DecodeShare::Fraction(0.25);
    };
    let sims = sims(1, GIB);
    sims[0].limit_pinned(4096);
    let options = with(&sims, share);
    let mut none = context(&options).unwrap();
    let plan = none.model().plan().clone();
    assert!(plan.offload.shares.is_none() && plan.pinned() == 0);
    assert!(plan.placements.iter().all(|p| p.share.is_none()));
    let said = &plan.offload.summary;
    assert!(
        said.contains("no share of single tokens on a GPU: SIM0: "),
        "{said}"
    );
    assert!(
        said.ends_with("of pinned memory can't be had: 4096 bytes are left"),
        "{said}"
    );
    same("without", &work(&mut none).unwrap(), &want);
    assert_eq!(sims[0].copies().sent, 0);
    drop(none);
    // Nor is it taken from memory that the weights need.
    sims[0].limit_pinned(GIB);
    let all = planned(&options);
    let weights = all.bytes_in(Buffer::Heap) + all.bytes_in(Buffer::Packed);
    for (memory, shared) in [(all.pinned() - 1, false), (all.pinned(), true)] {
        let model = Model::load(
            &LoadOptions {
                memory: Some(weights + memory),
                ..options.clone()
            },
            &mut |_| {},
        )
        .unwrap();
        let Plan { offload, .. } = model.plan();
        assert_eq!(offload.shares.is_some(), shared);
        assert_eq!(
            offload.summary.contains("are left"),
            !shared,
            "{}",
            offload.summary
        );
    }
}

#[test]
fn a_device_that_is_lost_while_products_are_shared_leaves_the_context_as_it_was() {
    let sims = sims(1, GIB);
    let options = with(&sims, |f| {
        f.layers = GpuLayers::Count(1);
        f.decode_share = DecodeShare::Fraction(0.25);
    });
    let mut context = context(&options).unwrap();
    let ids: Vec<u32> = (1..=20).collect();
    context.decode(&Batch::prompt(0, &ids)).unwrap();
    // Between sending and waiting, too.
    for operations in 0..12 {
        sims[0].fail_after(operations);
        let error = context.decode(&Batch::prompt(0, &[7])).unwrap_err();
        sims[0].repair();
        assert!(
            matches!(error, Error::Device(DeviceError::Failed { .. })),
            "{error}"
        );
        assert_eq!(context.tokens(0).unwrap().len(), 20);
    }
    let after = context.decode(&Batch::prompt(0, &[7])).unwrap();
    let mut fresh = self::context(&options).unwrap();
    fresh.decode(&Batch::prompt(0, &ids)).unwrap();
    assert!(fresh.decode(&Batch::prompt(0, &[7])).unwrap() == after);
    // In the middle of a generation.
    context.truncate(0, 0).unwrap();
    let whole = generated(&mut context, &mut || {}).unwrap();
    context.truncate(0, 0).unwrap();
    let error = generated(&mut context, &mut || sims[0].fail_after(5)).unwrap_err();
    let said = error.to_string();
    assert!(
        said.contains("SIM0: ") && said.contains("failed: "),
        "{said}"
    );
    sims[0].repair();
    let again = generated(&mut context, &mut || {}).unwrap();
    assert_eq!(again.tokens, whole.tokens);
}
