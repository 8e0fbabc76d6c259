//! A request's messages as chat templates take them.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};
use tegula_gguf::chat::{Message, Serde, Value as TemplateValue};

use crate::error::ApiError;

/// More messages than this are refused.
const MAX_MESSAGES: usize = 10_000;

/// The messages of a request: texts in parts are joined, arguments of calls become objects.
///
/// # Errors
/// No messages, roles that are no strings, parts that are no text.
pub(crate) fn messages(value: &Value) -> Result<Vec<Message>, ApiError> {
    let list = match value {
        Value::Array(list) if !list.is_empty() => list,
        Value::Null => return Err(ApiError::field("messages", "messages are missing")),
        _ => {
            let message = "messages: expected an array with at least one message";
            return Err(ApiError::field("messages", message));
        }
    };
    if list.len() > MAX_MESSAGES {
        let message = format!(
            "messages: {} of them, and at most {MAX_MESSAGES}",
            list.len()
        );
        return Err(ApiError::field("messages", message));
    }
    list.iter()
        .enumerate()
        .map(|(i, value)| message(value, &format!("messages[{i}]")))
        .collect()
}

fn message(value: &Value, param: &str) -> Result<Message, ApiError> {
    let wrong = |what: &str| ApiError::field(param, format!("{param}: {what}"));
    let Value::Object(fields) = value else {
        return Err(wrong("expected an object"));
    };
    let role = match fields.get("role").and_then(Value::as_str) {
        // OpenAI's newer name for the same.
        Some("developer") => "system",
        Some(role) => role,
        None => return Err(wrong("role is missing")),
    };
    let calls = fields.get("tool_calls").filter(|calls| !calls.is_null());
    let content = match fields.get("content") {
        None | Some(Value::Null) if role == "assistant" => None,
        None | Some(Value::Null) => return Err(wrong("content is missing")),
        Some(content) => Some(text(content, param)?),
    };
    if content.is_none() && calls.is_none() {
        return Err(wrong("neither content nor tool_calls"));
    }
    let mut extra = BTreeMap::new();
    for (key, value) in fields {
        match key.as_str() {
            "role" | "content" | "tool_calls" => {}
            _ if value.is_null() => {}
            _ => {
                extra.insert(key.clone(), TemplateValue::from(Serde(value)));
            }
        }
    }
    if let Some(calls) = calls {
        let calls = tool_calls(calls).ok_or_else(|| {
            wrong("tool_calls: expected a list of {\"function\": {\"name\", \"arguments\"}}")
        })?;
        extra.insert("tool_calls".to_owned(), TemplateValue::from(Serde(&calls)));
    }
    Ok(Message {
        role: role.to_owned(),
        content: TemplateValue::from(content.unwrap_or_default()),
        extra,
    })
}

/// A string, or a list of parts that are texts.
fn text(content: &Value, param: &str) -> Result<String, ApiError> {
    let parts = match content {
        Value::String(text) => return Ok(text.clone()),
        Value::Array(parts) => parts,
        _ => {
            let message = format!("{param}: content: expected a string or a list of parts");
            return Err(ApiError::field(param, message));
        }
    };
    let mut all = String::new();
    for part in parts {
        match (part["type"].as_str(), &part["text"]) {
            (Some("text"), Value::String(text)) => all += text,
            (Some("refusal"), _) => all += part["refusal"].as_str().unwrap_or_default(),
            (kind, _) => {
                let kind = kind.unwrap_or("unknown");
                let message = format!("{param}: this model takes text only, and a part is {kind}");
                return Err(ApiError::unsupported(param, message));
            }
        }
    }
    Ok(all)
}

/// The calls, their arguments read where they are JSON: templates write them anew.
fn tool_calls(calls: &Value) -> Option<Value> {
    let list = calls.as_array()?;
    list.iter()
        .map(|call| {
            let function = call["function"].as_object()?;
            function.get("name")?.as_str()?;
            let mut function: Map<String, Value> = function.clone();
            let arguments = match function.get("arguments") {
                Some(Value::String(text)) if text.trim().is_empty() => json!({}),
                Some(Value::String(text)) => match serde_json::from_str(text) {
                    Ok(object @ Value::Object(_)) => object,
                    _ => Value::from(text.as_str()),
                },
                Some(object @ Value::Object(_)) => object.clone(),
                None => json!({}),
                Some(_) => return None,
            };
            function.insert("arguments".to_owned(), arguments);
            let mut call = call.clone();
            call["function"] = Value::Object(function);
            Some(call)
        })
        .collect::<Option<Vec<_>>>()
        .map(Value::Array)
}
