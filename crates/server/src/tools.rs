//! Tools: how a model writes calls, the grammar that keeps it to that, and how prompts show
//! tools to models whose templates know none.
//!
//! | form | written by | a call |
//! |---|---|---|
//! | Hermes | Qwen 2.5 and 3, Hermes | `<tool_call>` `{"name": …, "arguments": …}` `</tool_call>` |
//! | Llama 3 | Llama 3.1 and later | `{"name": …, "parameters": …}`, and nothing else |
//! | none | everything else | as Hermes, explained in the system message |

use std::fmt::Write as _;

use serde_json::{Map, Value, json};
use tegula_gguf::{ChatTemplate, chat::Message};
use tegula_grammar::{Grammar, GrammarError, json_rule, regex_rule};

use crate::error::ApiError;

/// How calls are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    Hermes,
    Llama3,
    /// The template shows no tools: we do, and calls are written as Hermes'.
    Ours,
}

impl Form {
    /// The form that a template's models were trained on, told by what it writes itself.
    pub fn of(template: &ChatTemplate) -> Form {
        let source = template.source();
        if !source.contains("tools") {
            Form::Ours
        } else if source.contains("<tool_call>") || source.contains("</tools>") {
            Form::Hermes
        } else if source.contains("<|start_header_id|>") || source.contains("<|python_tag|>") {
            Form::Llama3
        } else {
            Form::Ours
        }
    }
}

/// A function that the model may call.
#[derive(Clone, Debug, PartialEq)]
pub struct Tool {
    pub name: String,
    /// As the request has it: `{"type": "function", "function": {…}}`.
    pub json: Value,
    /// The schema of its arguments.
    parameters: Value,
}

/// Whether the model calls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Choice {
    /// As it sees fit.
    Auto,
    /// At least one.
    Required,
}

/// The tools of a request.
#[derive(Clone, Debug, PartialEq)]
pub struct Tools {
    pub tools: Vec<Tool>,
    pub choice: Choice,
    /// Several calls in one answer.
    pub parallel: bool,
}

/// More tools than this are refused.
const MAX_TOOLS: usize = 256;

impl Tools {
    /// The tools of a request; `None` where there are none or they are not to be used.
    ///
    /// # Errors
    /// Tools that aren't functions, names that can't be, a choice that isn't there.
    pub fn parse(
        tools: Option<&Value>,
        choice: Option<&Value>,
        parallel: bool,
    ) -> Result<Option<Tools>, ApiError> {
        let list = match tools {
            None | Some(Value::Null) => &Vec::new(),
            Some(Value::Array(list)) => list,
            Some(_) => return Err(ApiError::field("tools", "tools: expected an array")),
        };
        if list.len() > MAX_TOOLS {
            let message = format!("tools: {} of them, and at most {MAX_TOOLS}", list.len());
            return Err(ApiError::field("tools", message));
        }
        let mut tools = list
            .iter()
            .enumerate()
            .map(|(i, tool)| parse_tool(tool, i))
            .collect::<Result<Vec<_>, _>>()?;
        let wrong = |message: &str| Err(ApiError::field("tool_choice", message));
        let choice = match choice {
            None | Some(Value::Null) => Choice::Auto,
            Some(Value::String(s)) => match s.as_str() {
                "none" => return Ok(None),
                "auto" => Choice::Auto,
                "required" => Choice::Required,
                _ => return wrong("tool_choice: expected none, auto, required, or a function"),
            },
            Some(named) => {
                let Some(name) = named["function"]["name"].as_str() else {
                    return wrong(
                        "tool_choice: expected {\"type\": \"function\", \"function\": {\"name\": …}}",
                    );
                };
                tools.retain(|tool| tool.name == name);
                if tools.is_empty() {
                    let message = format!("tool_choice: no tool is called {name:?}");
                    return Err(ApiError::field("tool_choice", message));
                }
                Choice::Required
            }
        };
        match (tools.is_empty(), &choice) {
            (true, Choice::Required) => wrong("tool_choice: there are no tools to call"),
            (true, Choice::Auto) => Ok(None),
            _ => Ok(Some(Tools {
                tools,
                choice,
                parallel,
            })),
        }
    }

    /// What templates see.
    pub fn json(&self) -> Value {
        self.tools.iter().map(|tool| tool.json.clone()).collect()
    }

    fn has(&self, name: &str) -> bool {
        self.tools.iter().any(|tool| tool.name == name)
    }
}

fn parse_tool(tool: &Value, i: usize) -> Result<Tool, ApiError> {
    let param = format!("tools[{i}]");
    let wrong = |what: &str| Err(ApiError::field(&param, format!("{param}: {what}")));
    if tool["type"].as_str().unwrap_or("function") != "function" {
        return wrong("only tools of type function are supported");
    }
    let function = &tool["function"];
    let Some(name) = function["name"].as_str() else {
        return wrong("function.name is missing");
    };
    let fits = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    if name.is_empty() || name.len() > 64 || !name.chars().all(fits) {
        return wrong("function.name: expected 1 to 64 of a-z, A-Z, 0-9, _ and -");
    }
    let parameters = match &function["parameters"] {
        Value::Null => json!({"type": "object", "properties": {}}),
        schema @ Value::Object(_) => schema.clone(),
        _ => return wrong("function.parameters: expected a JSON schema"),
    };
    Ok(Tool {
        name: name.to_owned(),
        json: json!({"type": "function", "function": function}),
        parameters,
    })
}

/// Whether an answer may, or already does, begin with reasoning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reasoning {
    /// The model knows nothing of it.
    No,
    /// It may begin with `<think>`.
    May,
    /// The prompt ends with `<think>`.
    Open,
}

/// The grammar of an answer in Lark's syntax; `None` where anything goes.
///
/// # Errors
/// Schemas that are too large.
pub fn answer_grammar(
    form: Form,
    tools: Option<&Tools>,
    format: Option<&Grammar>,
    reasoning: Reasoning,
) -> Result<Option<String>, GrammarError> {
    let format = match format {
        None => None,
        Some(Grammar::JsonObject) => Some(json_rule(&json!({"type": "object"}))?),
        Some(Grammar::JsonSchema(schema)) => Some(json_rule(schema)?),
        Some(Grammar::Regex(expression)) => Some(regex_rule(expression)),
        // A grammar has rules of its own and stands alone.
        Some(Grammar::Grammar(_)) => return Ok(None),
    };
    // Space between parts, as much as anybody needs.
    let mut lark = String::from("SP: /[ \\n]{0,8}/\n");
    let (think, head) = match reasoning {
        Reasoning::No => ("", ""),
        Reasoning::May => (
            "think[suffix=\"</think>\"]: /<think>(?s:.*)/\n",
            "(think SP)? ",
        ),
        Reasoning::Open => ("think[suffix=\"</think>\"]: /(?s:.*)/\n", "think SP "),
    };
    let Some(tools) = tools else {
        return Ok(format.map(|format| format!("{lark}{think}start: {head}{format}\n")));
    };
    let key = match form {
        Form::Llama3 => "parameters",
        Form::Hermes | Form::Ours => "arguments",
    };
    let mut calls = Vec::new();
    for (i, tool) in tools.tools.iter().enumerate() {
        let name = &tool.name;
        // Writing to a String can't fail.
        let _ = writeln!(
            lark,
            "name{i}: /[ \\n]{{0,8}}\\{{[ \\n]{{0,8}}\"name\"[ ]?:[ ]?\"{name}\"[ ]?,[ \\n]{{0,8}}\"{key}\"[ ]?:[ ]?/"
        );
        let _ = writeln!(lark, "args{i}: {}", json_rule(&tool.parameters)?);
        calls.push(format!("name{i} args{i}"));
    }
    let _ = writeln!(lark, "CLOSE: /[ \\n]{{0,8}}\\}}/");
    let _ = writeln!(lark, "call: ({}) CLOSE", calls.join(" | "));
    match form {
        Form::Hermes | Form::Ours => {
            let more = if tools.parallel {
                "(begin call END){0,15}"
            } else {
                ""
            };
            lark += "begin: /[ \\n]{0,8}<tool_call>/\nEND: /[ \\n]{0,8}<\\/tool_call>/\n";
            match (&tools.choice, format) {
                (Choice::Required, _) => {
                    let _ = writeln!(lark, "start: {head}begin call END {more}");
                    lark += think;
                }
                (Choice::Auto, Some(format)) => {
                    let _ = writeln!(lark, "start: {head}({format} | begin call END {more})");
                    lark += think;
                }
                // Free text, reasoning included, until a call begins.
                (Choice::Auto, None) => {
                    let _ = writeln!(lark, "start: PLAIN | before call END {more}");
                    lark += "PLAIN: ~(/(?s:.*)<tool_call>(?s:.*)/)\n\
                             before[suffix=\"<tool_call>\"]: /(?s:.*)/\n";
                }
            }
        }
        Form::Llama3 => {
            let names: Vec<&str> = tools.tools.iter().map(|t| t.name.as_str()).collect();
            match (&tools.choice, format) {
                (Choice::Required, _) => lark += "start: call\n",
                (Choice::Auto, Some(format)) => {
                    let _ = writeln!(lark, "start: {format} | call");
                }
                (Choice::Auto, None) => {
                    let _ = writeln!(
                        lark,
                        "start: PLAIN | call\nPLAIN: ~(/[ \\n]*\\{{[ \\n]*\"name\"[ ]?:[ ]?\"({})\"(?s:.*)/)",
                        names.join("|")
                    );
                }
            }
        }
    }
    Ok(Some(lark))
}

/// A call of a tool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    pub name: String,
    /// JSON.
    pub arguments: String,
}

/// Reads a call: an object with a name that is known, and arguments under either key.
pub fn parse_call(text: &str, tools: &Tools) -> Option<Call> {
    let value: Value = serde_json::from_str(text.trim()).ok()?;
    let name = value["name"].as_str().filter(|name| tools.has(name))?;
    let arguments = value.get("arguments").or_else(|| value.get("parameters"));
    let arguments = match arguments {
        None | Some(Value::Null) => "{}".to_owned(),
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    };
    Some(Call {
        name: name.to_owned(),
        arguments,
    })
}

/// Shows tools, calls and results in plain messages, for templates that know none of them.
pub fn explain(messages: Vec<Message>, tools: Option<&Tools>) -> Vec<Message> {
    let mut out: Vec<Message> = messages.into_iter().map(plain_message).collect();
    let Some(tools) = tools else { return out };
    let mut text = String::from(
        "You can call functions. Each line is one of them, described as JSON:\n<tools>\n",
    );
    for tool in &tools.tools {
        text += &tool.json.to_string();
        text += "\n";
    }
    text += "</tools>\nTo call one, answer with its name and its arguments between these tags:\n\
             <tool_call>\n{\"name\": NAME, \"arguments\": {ARGUMENTS}}\n</tool_call>";
    match out.first_mut().filter(|m| m.role == "system") {
        Some(system) => {
            let before = system.content.as_str().unwrap_or_default().to_owned();
            *system = Message::new("system", format!("{before}\n\n{text}"));
        }
        None => out.insert(0, Message::new("system", text)),
    }
    out
}

fn plain_message(mut message: Message) -> Message {
    if message.role == "tool" {
        let content = message.content.as_str().unwrap_or_default();
        let text = format!("<tool_response>\n{content}\n</tool_response>");
        return Message::new("user", text);
    }
    let Some(calls) = message.extra.remove("tool_calls") else {
        return message;
    };
    let mut text = message.content.as_str().unwrap_or_default().to_owned();
    let calls = serde_json::to_value(&calls).unwrap_or_default();
    for call in calls.as_array().into_iter().flatten() {
        let function: Map<String, Value> = ["name", "arguments"]
            .into_iter()
            .map(|key| (key.to_owned(), call["function"][key].clone()))
            .collect();
        if !text.is_empty() {
            text.push('\n');
        }
        // Writing to a String can't fail.
        let _ = write!(
            text,
            "<tool_call>\n{}\n</tool_call>",
            Value::Object(function)
        );
    }
    Message::new(message.role, text)
}
