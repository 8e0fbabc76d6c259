//! The requests that clients send, answered.

use std::io::BufRead as _;

use crate::support::Server;
use serde_json::{Value, json};

/// The data of a stream until its end.
fn data(stream: impl std::io::BufRead) -> Vec<Value> {
    let mut all = Vec::new();
    for line in stream.lines() {
        let line = line.unwrap();
        if let Some(data) = line.strip_prefix("data: ") {
            if data == "[DONE]" {
                return all;
            }
            all.push(serde_json::from_str(data).unwrap());
        }
    }
    panic!("the stream ended early: {all:?}");
}

#[test]
fn streams_say_what_whole_answers_say() {
    let server = Server::start(&[]);
    let mut body = json!({
        "messages": [{"role": "system", "content": "Brief."}, {"role": "user", "content": [{"type": "text", "text": "An iterator"}]}],
        "max_tokens": 24, "seed": 7, "n": 2, "logprobs": true, "top_logprobs": 3,
    });
    let whole = server.post("/v1/chat/completions", &body).json();
    assert_eq!(whole["object"], "chat.completion");
    body["stream"] = true.into();
    body["stream_options"] = json!({"include_usage": true});
    let chunks = data(server.open_stream("/v1/chat/completions", &body));
    for i in 0..2 {
        let of = |chunk: &Value| chunk["choices"].get(0).filter(|c| c["index"] == i).cloned();
        let choices: Vec<Value> = chunks.iter().filter_map(of).collect();
        assert_eq!(choices[0]["delta"]["role"], "assistant");
        let text: String = choices
            .iter()
            .filter_map(|c| c["delta"]["content"].as_str())
            .collect();
        let expected = &whole["choices"][i];
        assert_eq!(expected["message"]["content"], text);
        assert_eq!(
            choices.last().unwrap()["finish_reason"],
            expected["finish_reason"]
        );
        let tokens: Vec<Value> = choices
            .iter()
            .flat_map(|c| {
                c["logprobs"]["content"]
                    .as_array()
                    .cloned()
                    .unwrap_or_default()
            })
            .collect();
        assert_eq!(expected["logprobs"]["content"], json!(tokens));
        assert_eq!(tokens.len(), 24);
        for token in &tokens {
            assert_eq!(token["top_logprobs"].as_array().unwrap().len(), 3);
            assert!(token["logprob"].as_f64().unwrap() <= 0.0);
        }
    }
    let usage = chunks.last().unwrap();
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(usage["usage"]["completion_tokens"], 48);
    assert_eq!(
        usage["usage"]["prompt_tokens"],
        whole["usage"]["prompt_tokens"]
    );
    assert!(
        chunks
            .iter()
            .all(|c| c["id"] == chunks[0]["id"] && c["object"] == "chat.completion.chunk")
    );
    // The second choice has another seed.
    assert_ne!(
        whole["choices"][0]["message"],
        whole["choices"][1]["message"]
    );
}

#[test]
fn tools_are_called_in_their_shape() {
    let server = Server::start(&[]);
    let weather = json!({"type": "function", "function": {
        "name": "get_weather", "description": "The weather somewhere",
        "parameters": {"type": "object", "additionalProperties": false, "required": ["city", "unit"], "properties": {
            "city": {"type": "string", "maxLength": 12}, "unit": {"enum": ["C", "F"]}}}}});
    let nothing = json!({"type": "function", "function": {"name": "do-nothing"}});
    let mut body = json!({
        "messages": [{"role": "user", "content": "Weather in Oslo?"}], "seed": 3, "max_tokens": 400,
        "tools": [weather, nothing], "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
        "parallel_tool_calls": false,
    });
    let whole = server.post("/v1/chat/completions", &body).json();
    let choice = &whole["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls", "{whole}");
    assert_eq!(choice["message"]["content"], Value::Null);
    let call = &choice["message"]["tool_calls"][0];
    assert_eq!(call["function"]["name"], "get_weather");
    let arguments: Value =
        serde_json::from_str(call["function"]["arguments"].as_str().unwrap()).unwrap();
    assert!(arguments["city"].is_string() && arguments["unit"].is_string());
    // The conversation goes on with the result.
    body["messages"].as_array_mut().unwrap().extend([
        choice["message"].clone(),
        json!({"role": "tool", "tool_call_id": call["id"], "content": "12 degrees"}),
    ]);
    body["tool_choice"] = "none".into();
    body["max_tokens"] = 10.into();
    let next = server.post("/v1/chat/completions", &body);
    assert_eq!(next.status, 200, "{}", next.text());
    assert!(next.json()["choices"][0]["message"]["tool_calls"].is_null());
    // Streamed: the call as a delta.
    body["messages"] = json!([{"role": "user", "content": "Weather in Oslo?"}]);
    body["tool_choice"] = "required".into();
    body["max_tokens"] = 400.into();
    body["stream"] = true.into();
    let chunks = data(server.open_stream("/v1/chat/completions", &body));
    let deltas: Vec<&Value> = chunks.iter().map(|c| &c["choices"][0]["delta"]).collect();
    let call = deltas.iter().find_map(|d| d["tool_calls"].get(0)).unwrap();
    assert_eq!(call["index"], 0);
    let name = call["function"]["name"].as_str().unwrap();
    assert!(["get_weather", "do-nothing"].contains(&name));
    assert_eq!(
        chunks.last().unwrap()["choices"][0]["finish_reason"],
        "tool_calls"
    );
}

#[test]
fn formats_hold_for_chats_and_completions() {
    let server = Server::start(&[]);
    let chat = |format: Value| {
        let body = json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 200, "seed": 1, "response_format": format});
        let answer = server.post("/v1/chat/completions", &body).json();
        assert_eq!(answer["choices"][0]["finish_reason"], "stop", "{answer}");
        let text = answer["choices"][0]["message"]["content"]
            .as_str()
            .unwrap()
            .to_owned();
        serde_json::from_str::<Value>(&text).unwrap()
    };
    assert!(chat(json!({"type": "json_object"})).is_object());
    let schema =
        json!({"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2});
    let pair = chat(
        json!({"type": "json_schema", "json_schema": {"name": "pair", "strict": true, "schema": schema}}),
    );
    assert!(pair[0].is_i64() && pair[1].is_i64() && pair[2].is_null());
    let complete = |field: &str, value: Value| {
        let mut body = json!({"prompt": "It is ", "max_tokens": 50, "seed": 1});
        body[field] = value;
        let answer = server.post("/v1/completions", &body).json();
        answer["choices"][0]["text"]
            .as_str()
            .unwrap_or_else(|| panic!("{answer}"))
            .to_owned()
    };
    let date = complete("regex", "20[0-9]{2}-[01][0-9]".into());
    assert_eq!((date.len(), &date[..2]), (7, "20"));
    let grammar = "root ::= (\"yes\" | \"no\") \"!\"{2}";
    assert!(["yes!!", "no!!"].contains(&complete("grammar", grammar.into()).as_str()));
    assert!(complete("json_schema", json!({"const": [1]})).starts_with('['));
}

#[test]
fn many_prompts_and_embeddings_come_back_in_order() {
    let server = Server::start(&["-np", "3"]);
    let prompts = ["The vector", "An iterator", "numpy", "A", "fn main"];
    let body = json!({"prompt": prompts, "max_tokens": 4, "echo": true, "n": 2, "temperature": 0});
    let answer = server.post("/v1/completions", &body).json();
    let choices = answer["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 10);
    for (i, choice) in choices.iter().enumerate() {
        assert_eq!(choice["index"], i);
        assert!(choice["text"].as_str().unwrap().starts_with(prompts[i / 2]));
    }
    let embed = |format: &str| {
        let body = json!({"input": prompts, "encoding_format": format});
        server.post("/v1/embeddings", &body).json()
    };
    let (floats, base64) = (embed("float"), embed("base64"));
    assert_eq!(floats["data"].as_array().unwrap().len(), 5);
    assert_eq!(floats["data"][4]["index"], 4);
    let first = floats["data"][0]["embedding"][0].as_f64().unwrap() as f32;
    let text = base64["data"][0]["embedding"].as_str().unwrap();
    assert_eq!(text.len(), (256 * 4usize).div_ceil(3) * 4);
    // Six bits a digit: the first float is in the first six digits.
    let digit = |c: u8| match c {
        b'A'..=b'Z' => c - b'A',
        b'a'..=b'z' => c - b'a' + 26,
        b'0'..=b'9' => c - b'0' + 52,
        b'+' => 62,
        _ => 63,
    };
    let bits = text
        .bytes()
        .take(6)
        .fold(0u64, |bits, c| bits << 6 | u64::from(digit(c)));
    let bytes = ((bits >> 4) as u32).to_be_bytes();
    assert_eq!(f32::from_le_bytes(bytes), first);
    let last = Server::start(&["--pooling", "last"]);
    let vector = |server: &Server| {
        let body = json!({"input": prompts[1]});
        server.post("/v1/embeddings", &body).json()["data"][0]["embedding"].clone()
    };
    assert_eq!(vector(&server), floats["data"][1]["embedding"]);
    assert_ne!(vector(&server), vector(&last), "two ways to pool");
}

/// The ends of streams that nobody has waited for.
#[test]
fn a_stream_can_be_read_line_by_line() {
    let server = Server::start(&[]);
    let body = json!({"prompt": "The", "max_tokens": 5, "stream": true, "ignore_eos": true});
    let mut stream = server.open_stream("/v1/completions", &body);
    let mut line = String::new();
    while !line.starts_with("data: ") {
        line.clear();
        assert!(stream.read_line(&mut line).unwrap() > 0);
    }
    let first: Value = serde_json::from_str(line.strip_prefix("data: ").unwrap()).unwrap();
    assert_eq!(first["object"], "text_completion");
    assert_eq!(
        data(stream).last().unwrap()["choices"][0]["finish_reason"],
        "length"
    );
}
