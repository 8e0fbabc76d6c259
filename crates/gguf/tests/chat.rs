//! Chat templates against prompts that Jinja2 rendered (`data/chat/golden.py`), and templates
//! that mean harm.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::Deserialize;
use tegula_gguf::chat::{ChatTemplate, Message, RenderOptions, TemplateError, Value};
use tegula_gguf::{Gguf, Metadata};

/// The time that `golden.py` has `strftime_now` show.
const NOW: i64 = 1_721_995_200;

#[derive(Deserialize)]
struct Golden {
    conversations: BTreeMap<String, Vec<Message>>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    template: String,
    conversation: String,
    options: Options,
    prompt: Option<String>,
    refused: Option<String>,
    #[serde(default)]
    fails: bool,
}

#[derive(Deserialize)]
struct Options {
    add_generation_prompt: bool,
    tools: Option<Value>,
    enable_thinking: Option<bool>,
}

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/data")
        .join(name)
}

fn read(name: &str) -> String {
    std::fs::read_to_string(data(name)).expect(name)
}

fn template(source: &str) -> ChatTemplate {
    let template: ChatTemplate = source.parse().expect("a template");
    template.with_tokens(Some("<s>".into()), Some("</s>".into()))
}

fn render(source: &str) -> Result<String, TemplateError> {
    let options = RenderOptions {
        now: Some(NOW),
        ..RenderOptions::default()
    };
    template(source).render(&[Message::new("user", "Hi!")], &options)
}

#[test]
fn prompts_equal_those_of_jinja2() {
    let golden: Golden = serde_json::from_str(&read("chat/cases.json")).expect("cases");
    assert!(golden.cases.len() >= 60);
    for case in golden.cases {
        let Case {
            template: name,
            conversation,
            options,
            ..
        } = &case;
        let result = template(&read(&format!("chat/{name}.jinja"))).render(
            &golden.conversations[conversation],
            &RenderOptions {
                add_generation_prompt: options.add_generation_prompt,
                tools: options.tools.clone(),
                enable_thinking: options.enable_thinking,
                now: Some(NOW),
                ..RenderOptions::default()
            },
        );
        let context = format!("{name} on {conversation}");
        match result {
            Ok(prompt) => assert_eq!(Some(prompt), case.prompt, "{context}"),
            Err(TemplateError::Refused(message)) => {
                assert_eq!(Some(message), case.refused, "{context}");
            }
            Err(e) => assert!(case.fails, "{context}: {e}"),
        }
    }
}

#[test]
fn templates_see_what_the_caller_gives() {
    assert_eq!(
        render("{{ bos_token }}|{{ eos_token }}|{{ tools is none }}").expect("prompt"),
        "<s>|</s>|True"
    );
    assert_eq!(
        render("{{ strftime_now('%Y-%m-%d') }}").expect("prompt"),
        "2024-07-26"
    );
    let mut options = RenderOptions {
        documents: Some(vec!["d"].into()),
        ..RenderOptions::default()
    };
    options.extra.insert("flavour".into(), "sweet".into());
    let prompt = template("{{ documents[0] }} {{ flavour }} {{ enable_thinking is defined }}")
        .render(&[], &options);
    assert_eq!(prompt.expect("prompt"), "d sweet False");
}

#[test]
fn a_file_without_a_template_falls_back_to_chatml_or_says_so() {
    let gguf = Gguf::open(data("ferrous-vocab.gguf")).expect("vocabulary file");
    let template = ChatTemplate::from_gguf(&gguf).expect("template");
    assert!(template.is_fallback());
    let messages = [Message::new("system", "S"), Message::new("user", "U")];
    let options = RenderOptions {
        add_generation_prompt: true,
        ..RenderOptions::default()
    };
    assert_eq!(
        template.render(&messages, &options).expect("prompt"),
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
    );

    let mut md = Metadata::new("m.gguf");
    md.set("tokenizer.ggml.tokens", vec!["a".to_owned()]);
    let error = ChatTemplate::from_metadata(&md)
        .expect_err("no template")
        .to_string();
    assert!(
        error.starts_with("m.gguf: ") && error.contains("tokenizer.chat_template"),
        "{error}"
    );
}

#[test]
fn templates_come_from_the_metadata_with_their_tokens() {
    let mut md = Metadata::new("m.gguf");
    md.set(
        "tokenizer.ggml.tokens",
        vec!["<a>".to_owned(), "<b>".to_owned()],
    );
    md.set("tokenizer.ggml.bos_token_id", 1u32);
    md.set("tokenizer.ggml.eos_token_id", 77u32);
    md.set(
        "tokenizer.chat_template",
        "{{ bos_token }}plain{{ eos_token }}",
    );
    md.set(
        "tokenizer.chat_template.tool_use",
        "{{ bos_token }}{{ tools|length }}",
    );
    let template = ChatTemplate::from_metadata(&md).expect("template");
    assert!(!template.is_fallback());
    assert_eq!(
        template
            .render(&[], &RenderOptions::default())
            .expect("prompt"),
        "<b>plain"
    );
    let tools = RenderOptions {
        tools: Some(vec![1, 2].into()),
        ..RenderOptions::default()
    };
    assert_eq!(template.render(&[], &tools).expect("prompt"), "<b>2");

    md.set("tokenizer.chat_template", "a\n{% if %}");
    let error = ChatTemplate::from_metadata(&md)
        .expect_err("syntax")
        .to_string();
    assert!(
        error.starts_with("m.gguf: chat template: line 2: "),
        "{error}"
    );
}

/// The budget must end these quickly, whatever they do; none may take the process down.
#[test]
fn hostile_templates_end_in_an_error() {
    let doubling = "{% set ns = namespace(x='xxxxxxxx') %}{% for i in range(100) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}";
    let nesting = "{% set ns = namespace(x=[]) %}{% for i in range(90000) %}{% for j in range(90000) %}{% set ns.x = [ns.x] %}{% endfor %}{% endfor %}";
    let printed = "{% set ns = namespace(x=[]) %}{% for j in range(50000) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}";
    let dumped = "{% set ns = namespace(x=[]) %}{% for j in range(50000) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x|tojson }}";
    for (name, source) in [
        (
            "endless loops",
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        ),
        (
            "endless output",
            "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
        ),
        ("a huge string", "{{ 'x' * 99999999999 }}"),
        ("a large string", "{{ 'x' * 99000000 }}"),
        ("doubling", doubling),
        ("deep nesting", nesting),
        (
            "endless recursion",
            "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
        ),
        ("wide padding", "{{ 'x'|center(999999999) }}"),
        ("wide format", "{{ '%999999999d'|format(1) }}"),
        ("wide indent", "{{ ('\\n' * 100000)|indent(99999) }}"),
        (
            "wide json",
            "{{ messages|tojson(indent=99999999) }}{{ 1 // 0 }}",
        ),
    ] {
        let start = Instant::now();
        assert!(render(source).is_err(), "{name}");
        assert!(
            start.elapsed().as_secs() < 20,
            "{name} took {:?}",
            start.elapsed()
        );
    }
    // These may succeed as well as fail.
    for source in [printed, dumped] {
        let _ = render(source);
    }
    assert!(matches!(
        render("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"),
        Err(TemplateError::Budget)
    ));
}

/// As deep as a template's size allows: parsing, running and dropping must not overflow.
#[test]
fn deep_templates_do_not_overflow_the_stack() {
    let fill = |unit: &str| unit.repeat(130_000 / unit.len());
    for (before, unit, after) in [
        ("{{ ", "(", "1"),
        ("{{ ", "[", "1"),
        ("{{ ", "not ", "1 }}"),
        ("{{ ", "-", "1 }}"),
        ("{{ 1", "+1", " }}"),
        ("{{ 1", "~1", " }}"),
        ("{{ 'a'", "|e", " }}"),
        ("{{ a", ".b", " }}"),
        ("{{ a", "[0]", " }}"),
        ("{{ a", "()", " }}"),
        ("{{ 1", " if 1 else 1", " }}"),
        ("{{ 1", " and 1", " }}"),
        ("{{ 1", " is odd", " }}"),
        ("", "{% if 1 %}", ""),
        ("", "{% for i in [1] %}", ""),
        ("", "{% macro m() %}", ""),
        ("", "{{ 1 }}", ""),
    ] {
        let start = Instant::now();
        let _ = render_any(&format!("{before}{}{after}", fill(unit)));
        assert!(
            start.elapsed().as_secs() < 20,
            "{unit:?} took {:?}",
            start.elapsed()
        );
    }
    let closed = "{% if 1 %}".repeat(10_000) + &"{% endif %}".repeat(10_000);
    let _ = render_any(&closed);
    let error = " "
        .repeat(300_000)
        .parse::<ChatTemplate>()
        .expect_err("too long");
    assert!(matches!(error, TemplateError::Syntax(_)), "{error}");
}

fn render_any(source: &str) -> Result<String, TemplateError> {
    source
        .parse::<ChatTemplate>()?
        .render(&[], &RenderOptions::default())
}

#[test]
fn a_long_conversation_is_within_the_budget() {
    let turn = "word ".repeat(2000);
    let messages: Vec<Message> = (0..400)
        .map(|i| Message::new(if i % 2 == 0 { "user" } else { "assistant" }, turn.as_str()))
        .collect();
    for name in ["chatml", "llama3", "mistral", "qwen3"] {
        let prompt = template(&read(&format!("chat/{name}.jinja"))).render(
            &messages,
            &RenderOptions {
                now: Some(NOW),
                ..RenderOptions::default()
            },
        );
        assert!(prompt.expect(name).len() > 400 * (turn.len() - 1), "{name}");
    }
}
