//! Calls of tools in the forms of real templates, with a model that would never call by itself;
//! and answers taken apart, however they arrive.

mod common;

use common::{collect, model, scheduler, service, submit};
use serde_json::{Value, json};
use tegula_gguf::ChatTemplate;
use tegula_server::{
    answer::{AnswerReader, Part},
    tools::{Call, Form, Reasoning, Tools},
};

const QWEN3: &str = include_str!("../../gguf/tests/data/chat/qwen3.jinja");
const LLAMA3: &str = include_str!("../../gguf/tests/data/chat/llama3.jinja");
const CHATML: &str = include_str!("../../gguf/tests/data/chat/chatml.jinja");

fn tools() -> Value {
    json!([
        {"type": "function", "function": {"name": "get_weather", "description": "Weather", "parameters": {
            "type": "object", "required": ["city", "days"], "additionalProperties": false,
            "properties": {"city": {"type": "string", "maxLength": 12}, "days": {"type": "integer", "minimum": 1, "maximum": 9}}}}},
        {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "additionalProperties": false}}},
    ])
}

#[test]
fn forms_are_told_by_the_template() {
    let form = |source: &str| Form::of(&source.parse::<ChatTemplate>().unwrap());
    assert_eq!(form(QWEN3), Form::Hermes);
    assert_eq!(form(LLAMA3), Form::Llama3);
    assert_eq!(form(CHATML), Form::Ours);
    assert_eq!(Form::of(&ChatTemplate::chatml()), Form::Ours);
}

#[test]
fn calls_are_valid_in_every_form() {
    let model = model();
    let scheduler = scheduler(&model, 4, 100, 2048);
    let validator = jsonschema::validator_for(&tools()[0]["function"]["parameters"]).unwrap();
    for template in [Some(QWEN3), Some(LLAMA3), None] {
        let service = service(&model, 2048, template);
        let ask = |mut body: Value| {
            body["tools"] = tools();
            body["max_tokens"] = 300.into();
            let prepared = service.chat(body.to_string().as_bytes()).unwrap();
            collect(submit(&service, &scheduler, prepared).unwrap()).unwrap()
        };
        let user = json!([{"role": "user", "content": "Weather in Oslo?"}]);
        for seed in 0..4 {
            let (_, body) = ask(json!({
                "messages": user, "seed": seed, "parallel_tool_calls": false,
                "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
            }));
            let choice = &body["choices"][0];
            assert_eq!(choice["finish_reason"], "tool_calls", "{body}");
            let calls = choice["message"]["tool_calls"].as_array().unwrap();
            assert_eq!(calls.len(), 1);
            assert_eq!(calls[0]["function"]["name"], "get_weather");
            let arguments = calls[0]["function"]["arguments"].as_str().unwrap();
            let arguments: Value = serde_json::from_str(arguments).unwrap();
            assert!(validator.is_valid(&arguments), "{arguments}");

            let (chunks, _) = ask(json!({
                "messages": user, "seed": seed, "tool_choice": "required", "stream": true, "temperature": 1.5,
            }));
            let deltas = chunks
                .iter()
                .map(|c| &c["choices"][0]["delta"]["tool_calls"][0]);
            let names: Vec<_> = deltas
                .filter_map(|c| c["function"]["name"].as_str())
                .collect();
            assert!(!names.is_empty());
            assert!(
                names
                    .iter()
                    .all(|name| ["get_weather", "now"].contains(name))
            );
        }
        // With the choice its own this model just writes; and a conversation with calls goes on.
        let talk = json!([
            {"role": "user", "content": "Weather in Oslo?"},
            {"role": "assistant", "content": null, "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": "{\"city\": \"Oslo\", \"days\": 1}"}}]},
            {"role": "tool", "tool_call_id": "1", "content": "12 degrees"},
        ]);
        let (_, body) = ask(json!({"messages": talk, "seed": 1}));
        assert!(
            body["choices"][0]["message"]["content"].is_string(),
            "{body}"
        );
        // A format beside tools.
        let (_, body) = ask(json!({
            "messages": user, "seed": 1, "temperature": 0,
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "array", "maxItems": 2, "items": {"type": "boolean"}}}},
        }));
        let message = &body["choices"][0]["message"];
        match &message["tool_calls"] {
            Value::Null => {
                let text = message["content"].as_str().unwrap();
                let text = text.split("</think>").last().unwrap();
                assert!(serde_json::from_str::<Vec<bool>>(text).is_ok(), "{text}");
            }
            calls => assert!(!calls.as_array().unwrap().is_empty()),
        }
    }
}

/// The parts, neighbours of a kind joined.
fn join(parts: Vec<Part>) -> Vec<Part> {
    let mut out: Vec<Part> = Vec::new();
    for part in parts {
        match (out.last_mut(), part) {
            (Some(Part::Content(a)), Part::Content(b)) => a.push_str(&b),
            (Some(Part::Reasoning(a)), Part::Reasoning(b)) => a.push_str(&b),
            (_, part) => out.push(part),
        }
    }
    out
}

#[test]
fn answers_are_taken_apart_however_they_arrive() {
    let content = |s: &str| Part::Content(s.to_owned());
    let reasoning = |s: &str| Part::Reasoning(s.to_owned());
    let call = |name: &str, arguments: &str| {
        Part::Call(Call {
            name: name.to_owned(),
            arguments: arguments.to_owned(),
        })
    };
    let weather = "{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Köln\"}}";
    let called = call("get_weather", "{\"city\":\"Köln\"}");
    let tagged = format!("<tool_call>\n{weather}\n</tool_call>");
    let llama = "{\"name\": \"now\", \"parameters\": {}}";
    use Form::{Hermes, Llama3};
    use Reasoning::{May, No, Open};
    let cases: Vec<(Reasoning, Option<Form>, String, Vec<Part>)> = vec![
        (
            No,
            None,
            "a <think> b <tool_call>".into(),
            vec![content("a <think> b <tool_call>")],
        ),
        (
            May,
            None,
            "<think>\nhm\n</think>\n\nyes".into(),
            vec![reasoning("\nhm\n"), content("yes")],
        ),
        (May, None, "  <thin".into(), vec![content("  <thin")]),
        (May, None, "no <think>".into(), vec![content("no <think>")]),
        (
            Open,
            None,
            "hm</think>yes".into(),
            vec![reasoning("hm"), content("yes")],
        ),
        (Open, None, "hm</thi".into(), vec![reasoning("hm</thi")]),
        (No, Some(Hermes), tagged.clone(), vec![called.clone()]),
        (
            No,
            Some(Hermes),
            format!("Let me see.\n\n{tagged}\n{tagged}\n"),
            vec![content("Let me see."), called.clone(), called.clone()],
        ),
        (
            May,
            Some(Hermes),
            format!("<think>x</think>\n{tagged}"),
            vec![reasoning("x"), called.clone()],
        ),
        (
            No,
            Some(Hermes),
            format!("<tool_call>{weather}"),
            vec![called.clone()],
        ),
        (
            No,
            Some(Hermes),
            "<tool_call>{\"name\": \"other\"}</tool_call>".into(),
            vec![content("<tool_call>{\"name\": \"other\"}</tool_call>")],
        ),
        (
            No,
            Some(Hermes),
            "1 < 2 <tool".into(),
            vec![content("1 < 2 <tool")],
        ),
        (
            No,
            Some(Llama3),
            format!(" {llama}"),
            vec![call("now", "{}")],
        ),
        (
            No,
            Some(Llama3),
            "{\"name\": 1} and more".into(),
            vec![content("{\"name\": 1} and more")],
        ),
        (
            No,
            Some(Llama3),
            format!("See: {llama}"),
            vec![content(&format!("See: {llama}"))],
        ),
    ];
    let tools = Tools::parse(Some(&tools()), None, true).unwrap().unwrap();
    for (reasoning, form, text, expected) in cases {
        let chars: Vec<char> = text.chars().collect();
        for step in 1..=chars.len() {
            let with = form.map(|form| (form, tools.clone()));
            let mut reader = AnswerReader::new(reasoning, with);
            let mut parts = Vec::new();
            for piece in chars.chunks(step) {
                parts.extend(reader.push(&piece.iter().collect::<String>()));
            }
            parts.extend(reader.finish());
            assert_eq!(join(parts), expected, "{text:?} in steps of {step}");
        }
    }
}
