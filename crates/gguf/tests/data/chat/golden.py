"""Renders the templates beside this file with Jinja2, set up as `transformers` does, and
writes `cases.json`: what `tests/chat.rs` holds the Rust renderer against.

Needs jinja2 3.1. The templates are in the form of the models' own and use the features that
those use; their wording is ours.
"""

import datetime
import json
import pathlib

import jinja2.sandbox

HERE = pathlib.Path(__file__).parent
NOW = 1_721_995_200


class Refused(Exception):
    pass


def refuse(message):
    raise Refused(message)


def render(name, arguments):
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    env.filters["tojson"] = lambda x, **kw: json.dumps(x, **{"ensure_ascii": False, **kw})
    env.globals["raise_exception"] = refuse
    env.globals["strftime_now"] = lambda f: datetime.datetime.fromtimestamp(
        NOW, datetime.timezone.utc
    ).strftime(f)
    source = (HERE / f"{name}.jinja").read_text()
    source = source.replace("generation -%}", "if true -%}").replace("endif true", "endif")
    return env.from_string(source).render(
        **{"tools": None, "documents": None, "bos_token": "<s>", "eos_token": "</s>", **arguments}
    )


def message(role, content, **extra):
    return {"role": role, "content": content, **extra}


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells the weather <now> & \"here\"",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "zeit", "description": "Grüße 🦀", "parameters": {}}},
]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln", "days": 2}}}
CONVERSATIONS = {
    "one": [message("user", "Hi!")],
    "system": [message("system", "Be kind."), message("user", "  What's 1 < 2 & 'x'?\n")],
    "turns": [
        message("user", "a"),
        message("assistant", "<think>\nhm\n</think>\n\nb\n"),
        message("user", "Что? 你好"),
        message("assistant", "<think>\nyes\n</think>\n\nd"),
    ],
    "tools": [
        message("system", "S"),
        message("user", "Weather?"),
        message("assistant", None, tool_calls=[CALL], reasoning_content="call it"),
        message("tool", "rain"),
        message("tool", "sun"),
    ],
    "wrong": [message("user", "a"), message("user", "b"), message("narrator", "c")],
}

cases = []
for template in ["chatml", "llama3", "mistral", "qwen3"]:
    for conversation, messages in CONVERSATIONS.items():
        for options in [
            {"add_generation_prompt": True},
            {"add_generation_prompt": False, "tools": TOOLS},
            {"add_generation_prompt": True, "enable_thinking": False},
        ]:
            case = {"template": template, "conversation": conversation, "options": options}
            try:
                case["prompt"] = render(template, {"messages": messages, **options})
            except Refused as e:
                case["refused"] = str(e)
            except TypeError:
                case["fails"] = True
            cases.append(case)
text = json.dumps({"conversations": CONVERSATIONS, "cases": cases}, ensure_ascii=False, indent=1)
(HERE / "cases.json").write_text(text + "\n")
