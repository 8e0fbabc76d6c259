//! Two hundred random schemas: whatever the model would rather say, every answer is JSON that
//! its schema describes.

mod common;

use common::{collect, model, scheduler, service, submit};
use serde_json::{Map, Value, json};
use tegula_gguf::fuzz::driver::Random;

fn word(r: &mut Random) -> String {
    const WORDS: [&str; 12] = [
        "name",
        "größe",
        "kind",
        "x-y",
        "a b",
        "items",
        "value",
        "\"quoted\"",
        "len",
        "名",
        "path\\to",
        "id",
    ];
    WORDS[r.below(WORDS.len())].to_owned()
}

/// Schemas whose answers are finite: a model of this size would go on for ever where it may.
fn schema(r: &mut Random, depth: usize) -> Value {
    let kinds = if depth == 0 { 9 } else { 13 };
    match r.below(kinds) {
        0 => json!({"type": "boolean"}),
        1 => json!({"type": "null"}),
        2 => {
            let low = r.below(2000) as i64 - 1000;
            json!({"type": "integer", "minimum": low, "maximum": low + r.below(5000) as i64})
        }
        3 => json!({"type": "number", "minimum": -10, "exclusiveMaximum": r.below(100)}),
        4 => json!({"type": "string", "minLength": r.below(3), "maxLength": 3 + r.below(20)}),
        5 => json!({"enum": [word(r), word(r), r.below(100), null, true]}),
        6 => json!({"const": {"k": [word(r), r.below(9)]}}),
        7 => {
            const PATTERNS: [&str; 5] = [
                "^[a-z]{2,5}$",
                "^\\d{3}-\\d{2}$",
                "^(yes|no|maybe)$",
                "^[A-Z][a-z]{0,9}( [A-Z][a-z]{0,9})?$",
                "^#[0-9a-f]{6}$",
            ];
            json!({"type": "string", "pattern": PATTERNS[r.below(PATTERNS.len())]})
        }
        8 => {
            const FORMATS: [&str; 5] = ["date", "time", "date-time", "ipv4", "uuid"];
            json!({"type": "string", "format": FORMATS[r.below(FORMATS.len())]})
        }
        9 => json!({"anyOf": [schema(r, depth - 1), schema(r, depth - 1)]}),
        10 => {
            let min = r.below(3);
            json!({"type": "array", "items": schema(r, depth - 1), "minItems": min, "maxItems": min + r.below(3)})
        }
        _ => {
            let mut properties = Map::new();
            for _ in 0..1 + r.below(5) {
                properties.insert(word(r), schema(r, depth - 1));
            }
            let mut required: Vec<String> = properties.keys().cloned().collect();
            required.retain(|_| r.below(3) > 0);
            json!({"type": "object", "properties": properties, "required": required, "additionalProperties": false})
        }
    }
}

#[test]
fn every_answer_is_valid() {
    let model = model();
    let service = service(&model, 2048, None);
    let scheduler = scheduler(&model, 8, 300, 2048);
    let mut r = Random::new(20_261_126);
    let mut answers = Vec::new();
    for i in 0..200 {
        let schema = schema(&mut r, 3);
        let temperature = [0.0, 0.8, 1.5][i % 3];
        let body = json!({
            "messages": [{"role": "user", "content": format!("Example {i}, as JSON, please.")}],
            "seed": i,
            "temperature": temperature,
            "max_tokens": 400,
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
        });
        let prepared = service.chat(body.to_string().as_bytes());
        let prepared = prepared.unwrap_or_else(|e| panic!("{i}: {e}\n{schema}"));
        answers.push((schema, submit(&service, &scheduler, prepared).unwrap()));
    }
    let mut tokens = 0;
    for (i, (schema, answer)) in answers.into_iter().enumerate() {
        let (_, body) = collect(answer).unwrap();
        let choice = &body["choices"][0];
        let text = choice["message"]["content"].as_str().unwrap();
        assert_eq!(choice["finish_reason"], "stop", "{i}: {schema}\n{text}");
        let value: Value =
            serde_json::from_str(text).unwrap_or_else(|e| panic!("{i}: {e}\n{text}"));
        let validator = jsonschema::options()
            .should_validate_formats(true)
            .build(&schema)
            .unwrap();
        let errors: Vec<String> = validator
            .iter_errors(&value)
            .map(|e| e.to_string())
            .collect();
        assert!(errors.is_empty(), "{i}: {errors:?}\n{schema}\n{text}");
        tokens += body["usage"]["completion_tokens"].as_u64().unwrap();
    }
    assert!(
        tokens > 2000,
        "the schemas were more than trivial: {tokens} tokens"
    );
}
