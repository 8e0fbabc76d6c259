//! Replays the fuzzer's committed corpus: the seeds, and whatever once crashed.

use std::{fs, path::Path};

use serde_json::{Value, json};
use tegula_server::fuzz::fuzz_request;

fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let user = json!([{"role": "system", "content": "S"}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]);
    let tools = json!([{"type": "function", "function": {"name": "f", "parameters": {
        "type": "object", "properties": {"x": {"type": "integer"}, "y": {"enum": ["a", "b"]}}, "required": ["x"]}}}]);
    let talk = json!([
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": null, "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"x\": 1}"}}]},
        {"role": "tool", "tool_call_id": "1", "content": "12"},
    ]);
    let schema = json!({"type": "object", "properties": {"a": {"type": "array", "items": {"anyOf": [{"type": "number"}, {"$ref": "#/$defs/s"}]}, "maxItems": 3}},
        "required": ["a"], "additionalProperties": false, "$defs": {"s": {"type": "string", "pattern": "^[a-z]{1,4}$"}}});
    let sampling = json!({"temperature": 0.5, "top_p": 0.9, "n": 2, "seed": 1, "logit_bias": {"9": 1}, "logprobs": true, "top_logprobs": 2,
        "stop": ["x", "yz"], "stream": true, "stream_options": {"include_usage": true}, "max_tokens": 9, "messages": user});
    let bytes = |first: u8, body: Value| {
        let mut bytes = vec![first];
        bytes.extend(body.to_string().bytes());
        bytes
    };
    vec![
        ("chat", bytes(4, sampling)),
        (
            "chat-tools-ours",
            bytes(
                4,
                json!({"messages": talk, "tools": tools, "tool_choice": "required"}),
            ),
        ),
        (
            "chat-tools-hermes",
            bytes(12, json!({"messages": talk, "tools": tools})),
        ),
        (
            "chat-tools-llama",
            bytes(
                20,
                json!({"messages": talk, "tools": tools, "stream": true}),
            ),
        ),
        (
            "chat-tools-named",
            bytes(
                20,
                json!({"messages": user, "tools": tools, "tool_choice": {"type": "function", "function": {"name": "f"}}}),
            ),
        ),
        (
            "chat-schema",
            bytes(
                12,
                json!({"messages": user, "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}}),
            ),
        ),
        (
            "chat-schema-tools",
            bytes(
                12,
                json!({"messages": user, "tools": tools, "response_format": {"type": "json_object"}}),
            ),
        ),
        (
            "chat-thinking",
            bytes(
                12,
                json!({"messages": user, "chat_template_kwargs": {"enable_thinking": true}, "json_schema": {"type": "integer"}}),
            ),
        ),
        (
            "completion",
            bytes(
                0,
                json!({"prompt": ["a", [5, 6]], "echo": true, "best_of": 1, "regex": "[a-f]{2,8}"}),
            ),
        ),
        (
            "completion-gbnf",
            bytes(
                0,
                json!({"prompt": "a", "logprobs": 2, "grammar": "root ::= (a \",\")* a # list\na ::= [0-9]+ | \"(\" root \")\""}),
            ),
        ),
        (
            "completion-lark",
            bytes(
                0,
                json!({"prompt": "a", "grammar": "start: s\ns: \"a\" s | B\nB: /[x-z]+/"}),
            ),
        ),
        (
            "embedding",
            bytes(1, json!({"input": ["a", "b"], "encoding_format": "base64"})),
        ),
        (
            "tokenize",
            bytes(
                2,
                json!({"content": "Grüße <|im_end|>", "with_pieces": true}),
            ),
        ),
        ("detokenize", bytes(3, json!({"tokens": [0, 5, 260]}))),
    ]
}

#[test]
fn request() {
    let seeds = seeds();
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/request");
    // `TEGULA_BLESS=1 cargo test -p tegula-server` writes the seeds anew.
    if std::env::var_os("TEGULA_BLESS").is_some() {
        fs::create_dir_all(&corpus).unwrap();
        for (name, bytes) in &seeds {
            fs::write(corpus.join(name), bytes).unwrap();
        }
    }
    for (name, bytes) in &seeds {
        let found = fs::read(corpus.join(name)).unwrap_or_default();
        assert!(found == *bytes, "{name} is out of date");
    }
    let mut files = 0;
    for entry in fs::read_dir(corpus).unwrap() {
        fuzz_request(&fs::read(entry.unwrap().path()).unwrap());
        files += 1;
    }
    assert!(files >= seeds.len());
}
