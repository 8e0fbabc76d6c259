//! The embedded model behind a scheduler and a service.
#![allow(dead_code)] // Each test binary uses a part.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, Sender, channel},
    },
    time::Duration,
};

use serde_json::Value;
use tegula_engine::{Context, ContextOptions, LoadOptions, Model, SamplerOptions, Source};
use tegula_gguf::ChatTemplate;
use tegula_kernels::device::sim::SimDevice;
use tegula_server::{
    ApiError, Defaults, Pooling, Prepared, Scheduler, SchedulerOptions, Service, ServiceOptions,
    scheduler::{Event, Sink},
};

const MODEL: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../tegula/assets/ferrous-moe-21m-Q4_0.gguf"
);

fn options() -> LoadOptions {
    LoadOptions {
        threads: 2,
        ..LoadOptions::new(Source::Path(MODEL.into()))
    }
}

pub fn model() -> Arc<Model> {
    Arc::new(Model::load(&options(), &mut |_| {}).unwrap())
}

/// The model on a simulated device.
pub fn model_on(device: &Arc<SimDevice>) -> Arc<Model> {
    let options = options().with_devices(vec![Arc::clone(device) as _]);
    Arc::new(Model::load(&options.unwrap(), &mut |_| {}).unwrap())
}

pub fn scheduler(model: &Arc<Model>, slots: usize, queue: usize, context: usize) -> Scheduler {
    let options = SchedulerOptions {
        slots,
        queue,
        chunk: 0,
    };
    let context = ContextOptions {
        context,
        batch: 256,
        ubatch: 128,
        ..ContextOptions::default()
    };
    let context = Context::new(Arc::clone(model), &options.context(context)).unwrap();
    Scheduler::start(context, options).unwrap()
}

pub fn service(model: &Model, context: usize, template: Option<&str>) -> Service {
    let c = model.config();
    let tokenizer = model.tokenizer();
    let template = match template {
        None => ChatTemplate::from_gguf(model.gguf()).unwrap(),
        Some(source) => {
            let template: ChatTemplate = source.parse().unwrap();
            let text = |id: Option<u32>| Some(tokenizer.token_text(id?)?.to_owned());
            template.with_tokens(text(tokenizer.bos()), text(tokenizer.eos()))
        }
    };
    let options = ServiceOptions {
        name: "ferrous".to_owned(),
        context,
        vocab: c.vocab,
        embedding: c.embd,
        defaults: Defaults {
            sampler: SamplerOptions::default(),
            limit: None,
        },
        pooling: Pooling::Mean,
        timeout: None,
    };
    Service::new(options, tokenizer, Ok(template))
}

/// Delivers to a channel, and can be made deaf.
pub struct TestSink {
    task: usize,
    to: Sender<(usize, Event)>,
    open: Arc<AtomicBool>,
}

impl Sink for TestSink {
    fn send(&mut self, event: Event) -> bool {
        self.is_open() && self.to.send((self.task, event)).is_ok()
    }

    fn is_open(&self) -> bool {
        self.open.load(Ordering::Relaxed)
    }
}

/// Where events arrive, and the client that can go away.
pub struct Client {
    pub events: Receiver<(usize, Event)>,
    pub open: Arc<AtomicBool>,
}

impl Client {
    pub fn leave(&self) {
        self.open.store(false, Ordering::Relaxed);
    }

    pub fn next(&self) -> (usize, Event) {
        let wait = Duration::from_secs(60);
        self.events.recv_timeout(wait).expect("an event")
    }
}

pub fn client() -> (impl FnMut(usize) -> Box<dyn Sink>, Client) {
    let (to, events) = channel();
    let open = Arc::new(AtomicBool::new(true));
    let client = Client {
        events,
        open: Arc::clone(&open),
    };
    let sink = move |task| {
        Box::new(TestSink {
            task,
            to: to.clone(),
            open: Arc::clone(&open),
        }) as Box<dyn Sink>
    };
    (sink, client)
}

/// Submits a request and returns who listens.
pub fn submit(
    service: &Service,
    scheduler: &Scheduler,
    prepared: Prepared,
) -> Result<(tegula_server::Answer, Client), ApiError> {
    let (sink, client) = client();
    service.submit(scheduler, 0, prepared.drafts, sink)?;
    Ok((prepared.answer, client))
}

/// Waits for the answer: its chunks, and the whole.
pub fn collect(
    (mut answer, client): (tegula_server::Answer, Client),
) -> Result<(Vec<Value>, Value), ApiError> {
    let mut chunks = Vec::new();
    while !answer.is_done() {
        let (task, event) = client.next();
        chunks.extend(answer.event(task, event)?);
    }
    Ok((chunks, answer.body()))
}
