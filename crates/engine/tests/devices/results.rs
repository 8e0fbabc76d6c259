//! Recordings, and what of the logits comes back.

use super::*;

#[test]
fn a_recording_that_fails_is_issued_again_and_said_once() {
    let want = cpu();
    let sims = sims(1, GIB);
    sims[0].fail_recordings();
    let mut context = context(&with(&sims, |_| {})).unwrap();
    let token = |id| Batch::prompt(0, &[id]);
    let mut fresh = self::context(&options()).unwrap();
    for id in 1..5 {
        let (a, b) = (context.decode(&token(id)), fresh.decode(&token(id)));
        assert!(a.unwrap() == b.unwrap(), "{id}");
    }
    let notes = context.model().device_notes();
    assert_eq!(notes.len(), 1, "{notes:?}");
    assert!(context.model().device_notes().is_empty());
    context.truncate(0, 0).unwrap();
    same("behind it", &work(&mut context).unwrap(), &want);
}

#[test]
fn recordings_that_fail_in_a_hybrid_are_issued_again() {
    let want = cpu();
    for (name, set) in [
        (
            "part",
            (|f: &mut OffloadFlags| f.layers = GpuLayers::Count(4)) as fn(&mut OffloadFlags),
        ),
        ("experts on the CPU", |f| f.cpu_moe = usize::MAX),
        ("some experts on the CPU", |f| f.cpu_moe = 2),
    ] {
        let sims = sims(1, GIB);
        sims[0].fail_recordings();
        let mut context = context(&with(&sims, set)).unwrap();
        let mut fresh = self::context(&options()).unwrap();
        for id in 1..5 {
            let token = Batch::prompt(0, &[id]);
            let (a, b) = (context.decode(&token), fresh.decode(&token));
            assert!(a.unwrap() == b.unwrap(), "{name}, {id}");
        }
        let notes = context.model().device_notes();
        assert_eq!(notes.len(), 1, "{name}: {notes:?}");
        context.truncate(0, 0).unwrap();
        same(name, &work(&mut context).unwrap(), &want);
    }
}

#[test]
fn the_likeliest_token_is_the_logits_largest_and_comes_alone() {
    let ids: Vec<u32> = (1..=70).collect();
    for (name, set) in [
        ("cpu", None),
        ("all", Some((|_| {}) as fn(&mut OffloadFlags))),
        (
            "output on the CPU",
            Some(|f| {
                f.overrides = vec![f.parse_override("^output=CPU").unwrap()];
            }),
        ),
        ("experts on the CPU", Some(|f| f.cpu_moe = usize::MAX)),
    ] {
        let sims = sims(1, GIB);
        let options = set.map_or_else(options, |set| with(&sims, set));
        let mut context = context(&options).unwrap();
        let logits = context.decode(&Batch::all_logits(0, &ids)).unwrap();
        context.truncate(0, 0).unwrap();
        let best = context.decode_best(&Batch::all_logits(0, &ids)).unwrap();
        assert_eq!((best.len(), logits.best(0)), (70, None), "{name}");
        for i in 0..70 {
            let row = logits.logits(i);
            let largest = row.iter().copied().fold(f32::MIN, f32::max);
            let first = row.iter().position(|v| *v == largest).unwrap() as u32;
            assert_eq!(best.best(i), Some(first), "{name}, {i}");
        }
        // Recorded, too.
        for id in 1..5 {
            let before = sims[0].copies();
            let one = context.decode_best(&Batch::prompt(0, &[id])).unwrap();
            assert!(one.best(0).is_some());
            let read = sims[0].copies().read - before.read;
            if name == "all" {
                assert_eq!(read, 4);
            }
        }
    }
}

#[test]
fn the_largest_logits_are_those_of_all_and_come_alone() {
    let ids: Vec<u32> = (1..=40).collect();
    let top = Top {
        k: 7,
        // One that no vocabulary has.
        ids: vec![3, 99, 500, u32::MAX],
    };
    for (name, here, set) in [
        ("all", true, (|_| {}) as fn(&mut OffloadFlags)),
        ("part", true, |f| f.layers = GpuLayers::Count(3)),
        ("output on the CPU", false, |f| {
            f.overrides = vec![f.parse_override("^output=CPU").unwrap()];
        }),
    ] {
        let sims = sims(1, GIB);
        let mut context = context(&with(&sims, set)).unwrap();
        let mut step = Batch::prompt(0, &ids);
        step.tokens
            .iter_mut()
            .skip(33)
            .for_each(|t| t.logits = true);
        let all = context.decode(&step).unwrap();
        for round in 0..4 {
            context.truncate(0, 0).unwrap();
            let some = context.decode_top(&step, &top).unwrap();
            assert_eq!(some.len(), all.len());
            for i in 0..all.len() {
                let logits = all.logits(i);
                let Some(found) = some.top(i) else {
                    assert!(!here && some.logits(i) == logits, "{name}");
                    continue;
                };
                let mut want = largest_of(logits, 7);
                want.extend([3, 99, 500].map(|id| (id, logits[id as usize])));
                want.sort_by_key(|v| v.0);
                want.dedup_by_key(|v| v.0);
                assert_eq!(found, want, "{name}, {i}, {round}");
                assert!(here && some.hidden(i) == all.hidden(i));
            }
        }
        let before = sims[0].copies().read;
        context.decode_top(&Batch::prompt(0, &[1]), &top).unwrap();
        let read = (sims[0].copies().read - before) as usize;
        let c = context.model().config();
        // Seven numbers and values, three more values, and the hidden state.
        assert_eq!(read == 4 * (7 + 7 + 3 + c.embd), here, "{name}: {read}");
        // More rows than it is done for.
        context.truncate(0, 0).unwrap();
        let many = context.decode_top(&Batch::all_logits(0, &ids), &top);
        assert!(many.unwrap().top(0).is_none());
    }
}

#[test]
fn a_seed_is_the_same_text_wherever_logits_are_chosen_from() {
    let generated = |context: &mut Context, sampler: &SamplerOptions| {
        let options = GenerateOptions {
            limit: Some(24),
            sampler: sampler.clone(),
            ignore_eog: true,
            ..GenerateOptions::default()
        };
        let ids: Vec<u32> = (1..=20).collect();
        context.truncate(0, 0).unwrap();
        let (never, mut nowhere) = (false.into(), |_: &str| {});
        generate(context, 0, &ids, &options, &never, &mut nowhere)
            .unwrap()
            .tokens
    };
    let sims = sims(1, GIB);
    let mut there = context(&with(&sims, |_| {})).unwrap();
    let mut here = context(&options()).unwrap();
    for (samples_some, sampler) in [
        (true, SamplerOptions::default()),
        (
            true,
            SamplerOptions {
                repeat_penalty: 1.3,
                logit_bias: vec![(40, 4.0), (300, f32::NEG_INFINITY)],
                seed: 3,
                ..SamplerOptions::default()
            },
        ),
        (
            false,
            SamplerOptions {
                top_k: 0,
                ..SamplerOptions::default()
            },
        ),
    ] {
        let before = sims[0].copies().read;
        let tokens = generated(&mut there, &sampler);
        let read = (sims[0].copies().read - before) as usize;
        assert_eq!(tokens, generated(&mut here, &sampler));
        let all = 24 * 4 * there.model().config().vocab;
        assert_eq!(read < all / 2, samples_some, "{read} bytes");
    }
}

#[test]
fn the_first_override_that_matches_counts_before_all_else() {
    let options = with(&sims(2, GIB), |f| {
        f.layers = GpuLayers::Count(99);
        f.cpu_moe = 2;
        let ot = |text: &str| f.parse_override(text).unwrap();
        f.overrides = vec![
            ot(r"blk\.0\.ffn_up_exps=SIM1"),
            ot(r"blk\.[01]\.ffn_.*_exps=SIM0"),
            ot("exps=CPU"),
            ot(r"blk\.3\.ffn_gate_exps=SIM1"),
        ];
    });
    let gguf = options.open().unwrap();
    let config = tegula_engine::ModelConfig::from_gguf(&gguf).unwrap();
    let plan = tegula_engine::plan(&config, &gguf, &options.plan_flags());
    let at = |tensor: &str| plan.get(tensor).unwrap().device;
    // A unit goes as a whole where the first rule sends one of its tensors.
    for part in ["gate", "up", "down"] {
        let of = |layer: usize| at(&format!("blk.{layer}.ffn_{part}_exps.weight"));
        assert_eq!((of(0), of(1)), (At::Gpu(1), At::Gpu(0)));
        assert_eq!((of(2), of(3)), (At::Cpu, At::Cpu));
    }
    assert_ne!(at("blk.3.attn_q.weight"), At::Cpu);
}

/// Tokens one by one, several sequences in turn, with and without results: what was recorded of
/// one shape must not serve another.
#[test]
fn replayed_layers_give_the_logits_of_the_cpu() {
    let steps = |context: &mut Context| -> Vec<f32> {
        let mut all = Vec::new();
        let mut run = |context: &mut Context, tokens: &[(u32, usize, bool)]| {
            let token = |&(id, sequence, logits): &(u32, usize, bool)| BatchToken {
                id,
                sequence,
                logits,
            };
            let tokens = tokens.iter().map(token).collect();
            let out = context.decode(&Batch { tokens }).unwrap();
            (0..out.len()).for_each(|i| all.extend_from_slice(out.logits(i)));
            (0..out.len()).for_each(|i| all.extend_from_slice(out.hidden(i)));
        };
        for i in 0..9 {
            run(context, &[(i + 1, 0, true)]);
            run(context, &[(i + 50, 1, i % 3 > 0)]);
            run(context, &[(i + 90, 0, false), (i + 7, 1, true)]);
            run(
                context,
                &[(i + 30, 0, true), (i + 31, 0, true), (i + 32, 1, true)],
            );
            if i % 4 == 3 {
                context.truncate(0, 5).unwrap();
            }
        }
        all
    };
    let want = steps(&mut context(&options()).unwrap());
    let ot = |f: &OffloadFlags, text: &str| f.parse_override(text).unwrap();
    type Set<'a> = Box<dyn Fn(&mut OffloadFlags) + 'a>;
    let cases: Vec<(&str, usize, bool, Set<'_>)> = vec![
        ("all", 1, true, Box::new(|_| {})),
        (
            "the last layers",
            1,
            true,
            Box::new(|f| f.layers = GpuLayers::Count(4)),
        ),
        (
            "the first layers",
            1,
            true,
            Box::new(move |f| {
                f.layers = GpuLayers::Count(99);
                f.overrides = vec![ot(f, r"blk\.[345]\.=CPU"), ot(f, "^output=CPU")];
            }),
        ),
        (
            "all layers, not the output",
            1,
            true,
            Box::new(move |f| f.overrides = vec![ot(f, "^output=CPU")]),
        ),
        (
            "experts on the CPU",
            1,
            true,
            Box::new(|f| f.cpu_moe = usize::MAX),
        ),
        (
            "some experts on the CPU",
            1,
            true,
            Box::new(|f| f.cpu_moe = 3),
        ),
        (
            "two",
            2,
            true,
            Box::new(|f| f.layers = GpuLayers::Count(99)),
        ),
        (
            "experts on the other",
            2,
            true,
            Box::new(move |f| {
                f.split = Split::None;
                f.layers = GpuLayers::Count(99);
                f.overrides = vec![ot(f, "exps=SIM1")];
            }),
        ),
        (
            "the cache on the CPU",
            1,
            false,
            Box::new(|f| f.kv_on_cpu = true),
        ),
    ];
    for (name, n, replays, set) in cases {
        let sims = sims(n, GIB);
        let mut context = context(&with(&sims, set)).unwrap();
        same(name, &steps(&mut context), &want);
        let replayed: usize = sims.iter().map(|d| d.replays()).sum();
        assert_eq!(replayed > 9, replays, "{name}: {replayed}");
        // Again, where all has been recorded.
        context.truncate(0, 0).unwrap();
        context.truncate(1, 0).unwrap();
        same(name, &steps(&mut context), &want);
        assert!(context.model().device_notes().is_empty(), "{name}");
    }
}
