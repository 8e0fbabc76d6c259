//! The body of the fuzz target, shared by libFuzzer, the stable mutation driver and the test
//! that replays the corpus. It panics when an invariant breaks and does nothing otherwise.

use std::sync::OnceLock;

use tegula_engine::SamplerOptions;
use tegula_gguf::{ChatTemplate, Metadata, Tokenizer, tokenizer::byte_char};

use crate::{
    ApiError, Defaults, Pooling, Prepared, Service, ServiceOptions,
    scheduler::{Event, Finished, Piece, Reason, Work},
};

const CONTEXT: usize = 4096;

/// A vocabulary of bytes, two control tokens, and the tags of calls.
fn tokenizer() -> Result<Tokenizer, tegula_gguf::Error> {
    let mut tokens: Vec<String> = ["<|im_end|>", "<|im_start|>"].map(str::to_owned).to_vec();
    let mut types = vec![3, 3];
    tokens.extend((0..=255).map(|byte| byte_char(byte).to_string()));
    tokens.extend(["<tool_call>", "</tool_call>", "<think>", "</think>"].map(str::to_owned));
    types.resize(258, 1);
    types.resize(262, 4);
    let mut m = Metadata::new("fuzz");
    m.set("tokenizer.ggml.model", "gpt2");
    m.set("tokenizer.ggml.pre", "default");
    m.set("tokenizer.ggml.tokens", tokens);
    m.set("tokenizer.ggml.token_type", types);
    m.set("tokenizer.ggml.merges", Vec::<String>::new());
    m.set("tokenizer.ggml.eos_token_id", 0u32);
    Tokenizer::from_metadata(&m)
}

/// Templates of every form: none that knows tools, Hermes' with reasoning, and Llama 3's.
const TEMPLATES: [&str; 3] = [
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}",
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}{% for m in messages %}\
     <|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>\
     {{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>{% endfor %}\
     {% if enable_thinking %}<think>{% endif %}",
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|start_header_id|>\
     {{ m.role }}{{ m.content }}{% endfor %}",
];

fn services() -> &'static [Service] {
    static SERVICES: OnceLock<Vec<Service>> = OnceLock::new();
    SERVICES.get_or_init(|| {
        let Ok(tokenizer) = tokenizer() else {
            return Vec::new();
        };
        let service = |source: &&str| {
            let options = ServiceOptions {
                name: "fuzz".to_owned(),
                context: CONTEXT,
                vocab: tokenizer.vocab_size(),
                embedding: 4,
                defaults: Defaults {
                    sampler: SamplerOptions::default(),
                    limit: None,
                },
                pooling: Pooling::Mean,
                timeout: None,
            };
            let template = source.parse::<ChatTemplate>().map_err(|e| e.to_string());
            Service::new(options, &tokenizer, template)
        };
        TEMPLATES.iter().map(service).collect()
    })
}

/// Takes the first byte as the route and the template, and the rest as a request's body; answers
/// it with arbitrary tokens, as far as its grammar allows them.
///
/// # Panics
/// When a request is refused without reason or with the wrong status, when its tasks can't be
/// run, or when an answer breaks its form.
pub fn fuzz_request(data: &[u8]) {
    let services = services();
    assert_eq!(services.len(), TEMPLATES.len());
    let Some((&first, body)) = data.split_first() else {
        return;
    };
    let service = &services[usize::from(first / 8) % services.len()];
    let prepared = match first % 8 {
        0 => service.completion(body),
        1 => service.embedding(body),
        2 => return drop(service.tokenize(body).map_err(check_error)),
        3 => return drop(service.detokenize(body).map_err(check_error)),
        _ => service.chat(body),
    };
    match prepared {
        Ok(prepared) => answer(prepared, data),
        Err(error) => check_error(error),
    }
}

fn check_error(error: ApiError) {
    assert_eq!(error.status, 400, "{error}");
    assert!(!error.message.is_empty() && !error.code.is_empty());
    assert!(error.body()["error"]["message"].is_string());
}

fn answer(prepared: Prepared, data: &[u8]) {
    let vocab = services()[0].options().vocab as u32;
    let Prepared {
        drafts,
        stream,
        mut answer,
    } = prepared;
    assert!(!drafts.is_empty());
    let mut noise = data.iter().copied().cycle();
    let mut chunks = 0;
    for (i, draft) in drafts.into_iter().enumerate() {
        assert!(!draft.prompt.is_empty() && draft.prompt.len() <= CONTEXT);
        assert!(draft.prompt.iter().all(|&id| id < vocab));
        let mut send = |event| {
            let sent = answer.event(i, event);
            chunks += sent.map_or(0, |chunks| chunks.len());
        };
        let Work::Generate(mut generate) = draft.work else {
            send(Event::Embedding(vec![0.5; 4]));
            continue;
        };
        let mut generated = 0;
        // A few answers tell as much as many.
        let length = if i < 2 { 48 } else { 0 };
        while generated < length {
            let from = u32::from(noise.next().unwrap_or(0)) + 2;
            let id = match &mut generate.constraint {
                None => from % vocab,
                Some(constraint) => {
                    // Where a grammar gives up, the scheduler fails the task.
                    let Ok(allowed) = constraint.allowed_with(length - generated, generated) else {
                        break;
                    };
                    assert!(!allowed.is_empty(), "a grammar without a way out");
                    let next = (0..vocab).map(|k| (from + k) % vocab);
                    let Some(id) = next.into_iter().find(|&id| allowed.contains(id)) else {
                        break;
                    };
                    if id == 0 || constraint.accept(id).is_err() || constraint.is_complete() {
                        break;
                    }
                    id
                }
            };
            generated += 1;
            let text = char::from((id % 128) as u8).to_string();
            send(Event::Text(Piece {
                text,
                tokens: Vec::new(),
            }));
        }
        send(Event::Done(Finished {
            reason: Reason::Stop,
            prompt_tokens: draft.prompt.len(),
            cached_tokens: 0,
            generated_tokens: generated,
            prompt_ms: 1.0,
            decode_ms: 1.0,
        }));
    }
    assert!(answer.is_done());
    assert_eq!(chunks > 0, stream);
    let body = answer.body();
    assert!(body["object"].is_string() && body["usage"]["total_tokens"].is_u64());
}
