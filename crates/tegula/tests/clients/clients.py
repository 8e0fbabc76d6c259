"""The openai client for Python against `tegula serve`: chat, streams, tools, schemas, embeddings."""

import json
import sys

import openai

client = openai.OpenAI(base_url=sys.argv[1], api_key=sys.argv[2], max_retries=0)
MODEL = client.models.list().data[0].id
USER = [{"role": "user", "content": "What is an iterator?"}]

# Chat.
chat = client.chat.completions.create(
    model=MODEL, messages=USER, max_tokens=16, seed=1, n=2, logprobs=True, top_logprobs=2
)
assert len(chat.choices) == 2 and chat.usage.completion_tokens <= 32
assert chat.choices[0].logprobs.content[0].top_logprobs[1].logprob <= 0
text = chat.choices[0].message.content
assert text

# The same as a stream, with usage.
pieces, usage = [], None
for chunk in client.chat.completions.create(
    model=MODEL,
    messages=USER,
    max_tokens=16,
    seed=1,
    stream=True,
    stream_options={"include_usage": True},
):
    usage = chunk.usage or usage
    pieces += [c.delta.content or "" for c in chunk.choices]
assert "".join(pieces) == text, (pieces, text)
assert usage.prompt_tokens == chat.usage.prompt_tokens

# Tools, and the conversation that goes on with the result.
tools = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "maxLength": 20}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
]
messages = [{"role": "user", "content": "Weather in Oslo?"}]
called = client.chat.completions.create(
    model=MODEL,
    messages=messages,
    tools=tools,
    tool_choice="required",
    parallel_tool_calls=False,
    max_tokens=200,
    seed=2,
)
assert called.choices[0].finish_reason == "tool_calls"
call = called.choices[0].message.tool_calls[0]
assert call.function.name == "get_weather"
assert isinstance(json.loads(call.function.arguments)["city"], str)
messages += [
    called.choices[0].message,
    {"role": "tool", "tool_call_id": call.id, "content": "12 degrees"},
]
after = client.chat.completions.create(
    model=MODEL, messages=messages, tools=tools, tool_choice="none", max_tokens=5
)
assert after.choices[0].message.tool_calls is None
names = []
for chunk in client.chat.completions.create(
    model=MODEL,
    messages=messages[:1],
    tools=tools,
    tool_choice={"type": "function", "function": {"name": "get_weather"}},
    max_tokens=200,
    stream=True,
):
    for choice in chunk.choices:
        names += [c.function.name for c in choice.delta.tool_calls or []]
assert "get_weather" in names

# A schema, by the client's own helper for it.
from pydantic import BaseModel, Field  # noqa: E402  (the client brings it)


class Book(BaseModel):
    title: str = Field(max_length=20)
    pages: int
    tags: list[str] = Field(max_length=2)


parsed = client.chat.completions.parse(
    model=MODEL, messages=USER, response_format=Book, max_tokens=300, seed=3
)
assert isinstance(parsed.choices[0].message.parsed, Book)
plain = client.chat.completions.create(
    model=MODEL,
    messages=USER,
    response_format={"type": "json_object"},
    max_tokens=300,
    seed=4,
)
assert isinstance(json.loads(plain.choices[0].message.content), dict)

# Completions and embeddings; the client asks for base64 by itself.
done = client.completions.create(model=MODEL, prompt=["The vector", "A"], max_tokens=4, logprobs=1)
assert [c.index for c in done.choices] == [0, 1] and done.choices[0].logprobs.tokens
vectors = client.embeddings.create(model=MODEL, input=["an iterator", "a vector"])
assert len(vectors.data) == 2 and abs(sum(x * x for x in vectors.data[0].embedding) - 1) < 1e-4

# Errors are the client's own.
for wrong, kind in [
    (lambda: client.chat.completions.create(model=MODEL, messages=[]), openai.BadRequestError),
    (lambda: client.models.retrieve("none"), openai.NotFoundError),
    (
        lambda: client.with_options(api_key="wrong").models.list(),
        openai.AuthenticationError,
    ),
]:
    try:
        wrong()
    except kind as error:
        assert error.body["message"]
    else:
        raise AssertionError(f"no {kind}")
print("ok", openai.__version__)
