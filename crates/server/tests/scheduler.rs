//! Many tasks at once get what each would get alone, and nobody is forgotten.

mod common;

use std::{sync::Arc, time::Duration};

use common::{client, collect, model, model_on, scheduler, service, submit};
use serde_json::{Value, json};
use tegula_engine::{Batch, Context, ContextOptions, GenerateOptions, SamplerOptions, generate};
use tegula_gguf::tokenizer::EncodeOptions;
use tegula_kernels::{Tier, device::sim::SimDevice};
use tegula_server::{
    Pooling, Prepared, Scheduler, Service,
    scheduler::{Event, Failure, Generate, Reason, Refused, SlotState, Task, Work},
};

const CONTEXT: usize = 512;

const WORDS: &str = "An iterator adaptor that yields the elements of the underlying iterator until \
    the predicate returns false. After that, no more elements are taken, and the rest of the \
    iterator is left as it was. The vector grows as needed, and its capacity is never reduced.";

fn completion(service: &Service, body: &Value) -> Prepared {
    service.completion(body.to_string().as_bytes()).unwrap()
}

fn text(body: &Value) -> &str {
    body["choices"][0]["text"].as_str().unwrap()
}

/// What the engine alone makes of it.
fn alone(model: &Arc<tegula_engine::Model>, prompt: &str, seed: u64, limit: usize) -> String {
    let options = ContextOptions {
        context: CONTEXT,
        batch: 256,
        ubatch: 128,
        ..ContextOptions::default()
    };
    let mut ctx = Context::new(Arc::clone(model), &options).unwrap();
    let ids = model.tokenizer().encode(prompt, EncodeOptions::default());
    let options = GenerateOptions {
        limit: Some(limit),
        sampler: SamplerOptions {
            seed,
            ..SamplerOptions::default()
        },
        ..GenerateOptions::default()
    };
    let never = false.into();
    generate(&mut ctx, 0, &ids, &options, &never, &mut |_| {})
        .unwrap()
        .text
}

/// Prompts of all lengths, with common beginnings and without, run in fewer slots than there
/// are prompts, with kept prefixes: each text is the one that the prompt gets alone.
#[test]
fn company_changes_no_answer() {
    let model = model();
    let service = service(&model, CONTEXT, None);
    let scheduler = scheduler(&model, 3, 100, CONTEXT);
    let prompts: Vec<String> = (0..20)
        .map(|i| match i % 4 {
            0 => WORDS[..20 + 7 * i].to_owned(),
            1 => format!("{i} {}", &WORDS[..200]),
            2 => format!("{WORDS}{WORDS} {i}"),
            _ => "The".to_owned(),
        })
        .collect();
    for round in 0..2 {
        let answers: Vec<_> = prompts
            .iter()
            .enumerate()
            .map(|(i, prompt)| {
                let body = json!({"prompt": prompt, "max_tokens": 20, "seed": i});
                submit(&service, &scheduler, completion(&service, &body)).unwrap()
            })
            .collect();
        for (i, answer) in answers.into_iter().enumerate() {
            let (_, body) = collect(answer).unwrap();
            assert_eq!(
                text(&body),
                alone(&model, &prompts[i], i as u64, 20),
                "{round} {i}"
            );
        }
    }
    let s = scheduler.snapshot();
    assert_eq!((s.totals.finished, s.totals.failed, s.waiting), (40, 0, 0));
    assert!(s.totals.cached_tokens > 1000, "{}", s.totals.cached_tokens);
    assert!(s.totals.step_tokens > s.totals.steps, "tokens ran together");
}

/// Equal prompts at the same time: one of them is run, the others share it.
#[test]
fn a_prompt_that_is_being_run_is_waited_for() {
    let model = model();
    let service = service(&model, CONTEXT, None);
    let scheduler = scheduler(&model, 4, 100, CONTEXT);
    let prompt = WORDS.repeat(5);
    let body = json!({"prompt": prompt, "max_tokens": 4, "n": 4, "seed": 5});
    let prepared = completion(&service, &body);
    let len = prepared.drafts[0].prompt.len() as u64;
    assert!(len > 256, "{len} tokens are several turns");
    let (_, body) = collect(submit(&service, &scheduler, prepared).unwrap()).unwrap();
    assert_eq!(body["choices"].as_array().unwrap().len(), 4);
    assert_eq!(body["usage"]["prompt_tokens"], len);
    let totals = scheduler.snapshot().totals;
    assert_eq!(
        totals.prompt_tokens,
        len + 3,
        "the last token is run by each"
    );
    assert_eq!(totals.cached_tokens, 3 * (len - 1));
}

#[test]
fn owners_share_no_prefixes() {
    let model = model();
    let service = service(&model, CONTEXT, None);
    let scheduler = scheduler(&model, 1, 100, CONTEXT);
    let mut cached = Vec::new();
    for owner in [1, 2, 1] {
        let prepared = completion(&service, &json!({"prompt": WORDS, "max_tokens": 2}));
        let (sink, client) = client();
        service
            .submit(&scheduler, owner, prepared.drafts, sink)
            .unwrap();
        let (_, body) = collect((prepared.answer, client)).unwrap();
        cached.push(
            body["usage"]["prompt_tokens_details"]["cached_tokens"]
                .as_u64()
                .unwrap(),
        );
    }
    assert_eq!(cached[..2], [0, 0]);
    assert!(cached[2] > 40);
    let unwanted = json!({"prompt": WORDS, "max_tokens": 2, "cache_prompt": false});
    let prepared = completion(&service, &unwanted);
    let (_, body) = collect(submit(&service, &scheduler, prepared).unwrap()).unwrap();
    assert_eq!(body["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
}

#[test]
fn who_goes_away_frees_the_slot() {
    let model = model();
    let service = service(&model, CONTEXT, None);
    let scheduler = scheduler(&model, 1, 100, CONTEXT);
    let endless = json!({"prompt": "The", "ignore_eos": true, "stream": true});
    let (_, first) = submit(&service, &scheduler, completion(&service, &endless)).unwrap();
    let (_, second) = submit(&service, &scheduler, completion(&service, &endless)).unwrap();
    let third = json!({"prompt": "The", "max_tokens": 3});
    let third = submit(&service, &scheduler, completion(&service, &third)).unwrap();
    first.next();
    second.leave();
    first.leave();
    collect(third).unwrap();
    let totals = scheduler.snapshot().totals;
    assert_eq!((totals.cancelled, totals.finished), (2, 1));
}

#[test]
fn a_full_queue_refuses_and_draining_finishes() {
    let model = model();
    let service = service(&model, CONTEXT, None);
    let scheduler = scheduler(&model, 1, 2, CONTEXT);
    let long = json!({"prompt": "The", "max_tokens": 300, "ignore_eos": true});
    let running = submit(&service, &scheduler, completion(&service, &long)).unwrap();
    running.1.next();
    let waiting: Vec<_> = (0..2)
        .map(|_| submit(&service, &scheduler, completion(&service, &long)).unwrap())
        .collect();
    let error = submit(&service, &scheduler, completion(&service, &long))
        .err()
        .unwrap();
    assert_eq!((error.status, error.code), (429, "queue_full"));
    assert!(error.retry_after.is_some_and(|s| s >= 1));
    scheduler.drain();
    let error = submit(&service, &scheduler, completion(&service, &long))
        .err()
        .unwrap();
    assert_eq!((error.status, error.code), (503, "shutting_down"));
    for answer in waiting {
        let (_, body) = collect(answer).unwrap();
        assert_eq!(body["usage"]["completion_tokens"], 300);
    }
    assert!(scheduler.join());
    assert!(scheduler.has_ended());
}

#[test]
fn stopping_tells_everybody() {
    let model = model();
    let service = service(&model, CONTEXT, None);
    let scheduler = scheduler(&model, 1, 9, CONTEXT);
    let long = json!({"prompt": "The", "ignore_eos": true});
    let answers: Vec<_> = (0..3)
        .map(|_| submit(&service, &scheduler, completion(&service, &long)).unwrap())
        .collect();
    answers[0].1.next();
    scheduler.stop();
    for answer in answers {
        let error = collect(answer).unwrap_err();
        assert_eq!((error.status, error.code), (503, "shutting_down"));
    }
}

#[test]
fn time_runs_out_in_a_slot_and_in_the_queue() {
    let model = model();
    let mut tasks = Vec::new();
    let scheduler = scheduler(&model, 1, 9, CONTEXT);
    let now = std::time::Instant::now();
    let (mut sink, client) = client();
    for (i, ms) in [300, 50].into_iter().enumerate() {
        tasks.push(Task {
            prompt: vec![5; 10],
            work: Work::Generate(Box::new(Generate {
                limit: None,
                stop: Vec::new(),
                // The end is forbidden: the context is full before that only by chance.
                sampler: SamplerOptions::default(),
                ignore_eog: true,
                logprobs: None,
                constraint: Some(Box::new(Slow)),
            })),
            owner: 0,
            reuse: true,
            deadline: Some(now + Duration::from_millis(ms)),
            sink: sink(i),
        });
    }
    scheduler.submit(tasks).unwrap();
    let mut failed = Vec::new();
    while failed.len() < 2 {
        match client.next() {
            (task, Event::Failed(failure)) => failed.push((task, failure)),
            (_, Event::Done(done)) => panic!("{done:?}"),
            _ => {}
        }
    }
    failed.sort_unstable_by_key(|f| f.0);
    assert_eq!(failed, [(0, Failure::Deadline), (1, Failure::Deadline)]);
}

/// Allows everything, slowly.
struct Slow;

impl tegula_engine::Constraint for Slow {
    fn allowed(&mut self) -> Result<tegula_engine::TokenSet, tegula_engine::ConstraintError> {
        std::thread::sleep(Duration::from_millis(20));
        Ok((100..4000).collect())
    }

    fn accept(&mut self, _: u32) -> Result<(), tegula_engine::ConstraintError> {
        Ok(())
    }

    fn is_complete(&self) -> bool {
        false
    }
}

/// The cache holds one full sequence per slot and not a page more: kept sequences must give
/// way, and every task still gets to the end of its context.
#[test]
fn kept_sequences_give_way() {
    let model = model();
    let service = service(&model, 256, None);
    let scheduler = scheduler(&model, 2, 100, 256);
    for i in 0..6 {
        let answers: Vec<_> = (0..3)
            .map(|k| {
                let body = json!({"prompt": format!("{k} {i} {}", &WORDS[..100]), "ignore_eos": true, "seed": i});
                submit(&service, &scheduler, completion(&service, &body)).unwrap()
            })
            .collect();
        for answer in answers {
            let (_, body) = collect(answer).unwrap();
            assert_eq!(body["choices"][0]["finish_reason"], "length");
            // The last token is chosen where there is no room to run it.
            assert_eq!(body["usage"]["total_tokens"], 257);
        }
    }
    let s = scheduler.snapshot();
    assert_eq!(s.totals.failed, 0);
    assert!(s.cached_sequences > 0);
}

#[test]
fn embeddings_are_of_length_one_and_tell_texts_apart() {
    let model = model();
    let service = service(&model, CONTEXT, None);
    let scheduler = scheduler(&model, 4, 100, CONTEXT);
    let embed = |input: Value| -> Vec<Vec<f64>> {
        let body = json!({"input": input}).to_string();
        let prepared = service.embedding(body.as_bytes()).unwrap();
        let (_, body) = collect(submit(&service, &scheduler, prepared).unwrap()).unwrap();
        let data = body["data"].as_array().unwrap();
        data.iter()
            .map(|d| serde_json::from_value(d["embedding"].clone()).unwrap())
            .collect()
    };
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let long = WORDS.repeat(4);
    let vectors = embed(json!([
        "an iterator over a vector",
        "an iterator over a slice",
        "numpy linear algebra",
        long
    ]));
    for v in &vectors {
        assert_eq!(v.len(), 256);
        assert!((dot(v, v) - 1.0).abs() < 1e-5);
    }
    let (near, far) = (dot(&vectors[0], &vectors[1]), dot(&vectors[0], &vectors[2]));
    assert!(near > far, "{near} {far}");
    // The same alone, in company, and as tokens.
    let ids = model.tokenizer().encode(&long, EncodeOptions::default());
    assert_eq!(embed(json!(long))[0], vectors[3]);
    assert_eq!(embed(json!([ids]))[0], vectors[3]);
    let s = scheduler.snapshot();
    assert!(s.slots.iter().all(|slot| slot.state == SlotState::Idle));
}

/// The vectors that the engine's hidden states say, by the mean of all and by the last one.
#[test]
fn embeddings_are_pooled_as_they_should() {
    let model = model();
    let ids = model.tokenizer().encode(WORDS, EncodeOptions::default());
    let options = ContextOptions {
        context: CONTEXT,
        ..ContextOptions::default()
    };
    let mut ctx = Context::new(Arc::clone(&model), &options).unwrap();
    let outputs = ctx.decode_hidden(&Batch::all_logits(0, &ids)).unwrap();
    let unit = |v: Vec<f64>| -> Vec<f32> {
        let length = v.iter().map(|x| x * x).sum::<f64>().sqrt();
        v.iter().map(|x| (x / length) as f32).collect()
    };
    let row = |i: usize| outputs.hidden(i).iter().map(|&x| f64::from(x));
    let last = unit(row(ids.len() - 1).collect());
    let mut sum = vec![0.0; last.len()];
    for i in 0..ids.len() {
        sum.iter_mut().zip(row(i)).for_each(|(sum, x)| *sum += x);
    }
    let scheduler = scheduler(&model, 2, 9, CONTEXT);
    for (pooling, expected) in [(Pooling::Mean, unit(sum)), (Pooling::Last, last)] {
        let (mut sink, client) = client();
        let task = Task {
            prompt: ids.clone(),
            work: Work::Embed(pooling),
            owner: 0,
            reuse: false,
            deadline: None,
            sink: sink(0),
        };
        scheduler.submit(vec![task]).unwrap();
        let (_, Event::Embedding(vector)) = client.next() else {
            panic!("no vector");
        };
        for (a, b) in vector.iter().zip(&expected) {
            assert!((a - b).abs() < 1e-5, "{pooling:?}: {a} {b}");
        }
    }
}

#[test]
fn stop_strings_limits_and_chosen_tokens_end_answers() {
    let model = model();
    let service = service(&model, CONTEXT, None);
    let scheduler = scheduler(&model, 2, 100, CONTEXT);
    let run = |body: Value| {
        let prepared = completion(&service, &body);
        collect(submit(&service, &scheduler, prepared).unwrap())
            .unwrap()
            .1
    };
    let free = run(json!({"prompt": WORDS, "max_tokens": 30, "temperature": 0}));
    let whole = text(&free).to_owned();
    assert_eq!(free["choices"][0]["finish_reason"], "length");
    let stop: String = whole.chars().skip(10).take(5).collect();
    let before = whole.find(&stop).unwrap();
    let stopped = run(
        json!({"prompt": WORDS, "max_tokens": 30, "temperature": 0, "stop": [stop], "logprobs": 0}),
    );
    assert_eq!(text(&stopped), &whole[..before]);
    assert_eq!(stopped["choices"][0]["finish_reason"], "stop");
    let tokens = stopped["choices"][0]["logprobs"]["tokens"]
        .as_array()
        .unwrap();
    let joined: String = tokens.iter().map(|t| t.as_str().unwrap()).collect();
    assert!(whole.starts_with(&joined), "{joined:?}");
    // A bias decides.
    let id = model.tokenizer().encode("x", EncodeOptions::default())[0];
    let biased =
        run(json!({"prompt": WORDS, "max_tokens": 5, "logit_bias": {id.to_string(): 100}}));
    assert_eq!(text(&biased), "xxxxx");
    let echo = run(json!({"prompt": "The vector", "max_tokens": 3, "echo": true}));
    assert!(text(&echo).starts_with("The vector"));
}

#[test]
fn the_number_of_waiting_requests_is_bounded_for_each() {
    let model = model();
    let scheduler: Scheduler = scheduler(&model, 1, 1, CONTEXT);
    let (mut sink, client) = client();
    let mut task = |i| Task {
        prompt: vec![9, 10, 11],
        work: Work::Generate(Box::new(Generate {
            limit: Some(50),
            stop: Vec::new(),
            sampler: SamplerOptions::greedy(),
            ignore_eog: true,
            logprobs: None,
            constraint: None,
        })),
        owner: 0,
        reuse: true,
        deadline: None,
        sink: sink(i),
    };
    // Many tasks are one request.
    scheduler.submit((0..5).map(&mut task).collect()).unwrap();
    let second = scheduler.submit(vec![task(5)]);
    assert!(matches!(second, Err(Refused::Full { waiting: 1, .. })));
    let mut done = 0;
    while done < 5 {
        if let (_, Event::Done(finished)) = client.next() {
            assert_eq!(
                (finished.reason, finished.generated_tokens),
                (Reason::Length, 50)
            );
            done += 1;
        }
    }
    assert_eq!(scheduler.snapshot().totals.refused, 1);
}

/// A device that is lost fails the tasks that run; those that come later fail at once, and when
/// it is back they are answered. Nothing hangs.
#[test]
fn a_device_that_is_lost_fails_tasks_and_hangs_nobody() {
    let sim = Arc::new(SimDevice::new("SIM0", 1 << 30, Tier::detect_max()));
    let model = model_on(&sim);
    let service = service(&model, CONTEXT, None);
    let scheduler = scheduler(&model, 2, 10, CONTEXT);
    let run = || {
        let body = json!({"prompt": "An iterator adaptor that", "max_tokens": 100});
        let answer = submit(&service, &scheduler, completion(&service, &body));
        collect(answer.unwrap())
    };
    sim.fail_after(300);
    for _ in 0..2 {
        let error = run().unwrap_err();
        assert_eq!((error.status, error.code), (500, "internal_error"));
        let message = &error.message;
        assert!(
            message.contains("the simulated device is lost"),
            "{message}"
        );
    }
    sim.repair();
    assert!(run().is_ok());
}

#[test]
fn a_device_sends_only_the_logits_that_all_who_choose_together_need() {
    let sim = Arc::new(SimDevice::new("SIM0", 1 << 30, Tier::detect_max()));
    let (there, here) = (model_on(&sim), model());
    let run = |model: &Arc<tegula_engine::Model>, more: &Value| -> Vec<String> {
        let service = service(model, CONTEXT, None);
        let scheduler = scheduler(model, 2, 10, CONTEXT);
        let bodies = [
            json!({"prompt": "An iterator adaptor that", "max_tokens": 30, "seed": 5}),
            json!({
                "prompt": "The vector grows as", "max_tokens": 30, "seed": 6, "top_k": 9,
                "frequency_penalty": 0.8, "logit_bias": {"40": 3.5, "41": -100},
            }),
        ];
        let answers = bodies.map(|mut body| {
            let more = more.as_object().unwrap().clone();
            body.as_object_mut().unwrap().extend(more);
            submit(&service, &scheduler, completion(&service, &body)).unwrap()
        });
        let bodies = answers.map(|answer| collect(answer).unwrap());
        bodies.iter().map(|body| text(&body.1).to_owned()).collect()
    };
    let vocab = there.config().vocab;
    for (more, some) in [(json!({}), true), (json!({"logprobs": 2}), false)] {
        let before = sim.copies().read;
        let texts = run(&there, &more);
        let read = (sim.copies().read - before) as usize;
        assert_eq!(texts, run(&here, &more));
        assert_eq!(read < 30 * 4 * vocab, some, "{read} bytes");
    }
}

/// Submits prompts of these lengths that have nothing in common as one request, and returns
/// whose events came, in order, each task answering with so many tokens of one letter.
fn order(
    model: &Arc<tegula_engine::Model>,
    slots: usize,
    prompts: &[(usize, usize)],
) -> Vec<usize> {
    let letters = model.tokenizer().encode("x", EncodeOptions::default());
    let scheduler = scheduler(model, slots, 9, CONTEXT);
    let (mut sink, client) = client();
    let tasks = prompts.iter().enumerate().map(|(i, &(len, limit))| Task {
        prompt: (0..len).map(|k| (1000 + 100 * i + k % 50) as u32).collect(),
        work: Work::Generate(Box::new(Generate {
            limit: Some(limit),
            stop: Vec::new(),
            sampler: SamplerOptions {
                logit_bias: vec![(letters[0], 1e6)],
                ..SamplerOptions::greedy()
            },
            ignore_eog: true,
            logprobs: None,
            constraint: None,
        })),
        owner: 0,
        reuse: false,
        deadline: None,
        sink: sink(i),
    });
    scheduler.submit(tasks.collect()).unwrap();
    let mut done = 0;
    let mut texts = Vec::new();
    while done < prompts.len() {
        match client.next() {
            (task, Event::Text(_)) => texts.push(task),
            (_, Event::Done(_)) => done += 1,
            (_, other) => panic!("{other:?}"),
        }
    }
    texts
}

/// How many tokens of `task` came before the first of `other`.
fn before(order: &[usize], task: usize, other: usize) -> usize {
    let first = order.iter().position(|&t| t == other).unwrap();
    order[..first].iter().filter(|&&t| t == task).count()
}

/// Micro-batches have 128 tokens. Prompts that are alike begin to be answered one after the
/// other, each turn going on with all that are being answered.
#[test]
fn prompts_are_run_one_after_the_other() {
    let order = order(&model(), 8, &[(100, 40); 8]);
    for i in 1..8 {
        assert!(before(&order, i - 1, i) > 0, "{i}: {order:?}");
    }
    // The first turn is all for prompts, then they get 112 tokens, 96, 80, 64 and so on, at last
    // 32 a turn.
    let ahead: Vec<usize> = (1..8).map(|i| before(&order, 0, i)).collect();
    assert_eq!(ahead, [2, 3, 4, 6, 8, 10, 13], "{order:?}");
    assert_eq!(order.len(), 8 * 40);
}

/// A prompt of four micro-batches comes first, but doesn't keep a short one waiting.
#[test]
fn a_short_prompt_does_not_wait_for_a_long_one() {
    let order = order(&model(), 2, &[(480, 20), (10, 20)]);
    // The long one has what the short one leaves of the first turn, then a half of each, while
    // the short one is answered in every turn.
    assert_eq!(before(&order, 1, 0), 6, "{order:?}");
}

/// A model whose template can't be used completes texts, and says why it doesn't converse.
#[test]
fn without_a_template_there_is_no_chat() {
    let model = model();
    let options = service(&model, CONTEXT, None).options().clone();
    let service = Service::new(options, model.tokenizer(), Err("line 3: why".to_owned()));
    let body = json!({"messages": [{"role": "user", "content": "x"}]});
    let error = service.chat(body.to_string().as_bytes()).err().unwrap();
    assert_eq!((error.status, error.code), (400, "no_chat_template"));
    assert!(error.message.contains("line 3: why"), "{error}");
    completion(&service, &json!({"prompt": "x"}));
}
