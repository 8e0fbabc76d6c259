// The openai client for JavaScript against `tegula serve`: the same as clients.py does.
import assert from "node:assert/strict";
import { createRequire } from "node:module";

// The client is installed elsewhere: in the directory that is the fourth argument.
const [, , baseURL, apiKey, modules] = process.argv;
const require = createRequire(`${modules}/package.json`);
const { default: OpenAI } = require("openai");

const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const model = (await client.models.list()).data[0].id;
const user = [{ role: "user", content: "What is an iterator?" }];

const chat = await client.chat.completions.create({ model, messages: user, max_tokens: 16, seed: 1 });
const text = chat.choices[0].message.content;
assert.ok(text);

let streamed = "";
let usage;
const stream = await client.chat.completions.create({
  model, messages: user, max_tokens: 16, seed: 1, stream: true, stream_options: { include_usage: true },
});
for await (const chunk of stream) {
  streamed += chunk.choices[0]?.delta.content ?? "";
  usage = chunk.usage ?? usage;
}
assert.equal(streamed, text);
assert.equal(usage.total_tokens, chat.usage.total_tokens);

const tools = [{
  type: "function",
  function: {
    name: "get_weather",
    parameters: {
      type: "object", required: ["city"], additionalProperties: false,
      properties: { city: { type: "string", maxLength: 20 } },
    },
  },
}];
// The helper runs the call that the model makes, and goes on with what it returned.
const called = await client.chat.completions.create({
  model, messages: user, tools, tool_choice: "required", parallel_tool_calls: false, max_tokens: 200, seed: 2,
});
const call = called.choices[0].message.tool_calls[0];
assert.equal(called.choices[0].finish_reason, "tool_calls");
assert.equal(typeof JSON.parse(call.function.arguments).city, "string");
const after = await client.chat.completions.create({
  model, tools, tool_choice: "none", max_tokens: 5,
  messages: [...user, called.choices[0].message, { role: "tool", tool_call_id: call.id, content: "12" }],
});
assert.ok(after.choices[0].finish_reason);

const schema = {
  type: "object", required: ["title", "pages"], additionalProperties: false,
  properties: { title: { type: "string", maxLength: 20 }, pages: { type: "integer" } },
};
const parsed = await client.chat.completions.parse({
  model, messages: user, max_tokens: 300, seed: 3,
  response_format: { type: "json_schema", json_schema: { name: "book", strict: true, schema } },
});
assert.equal(typeof JSON.parse(parsed.choices[0].message.content).pages, "number");

const vectors = await client.embeddings.create({ model, input: ["an iterator", "a vector"] });
assert.equal(vectors.data.length, 2);
assert.ok(Math.abs(vectors.data[0].embedding.reduce((s, x) => s + x * x, 0) - 1) < 1e-4);

// A stream that is broken off, and the server goes on.
const endless = await client.chat.completions.create({ model, messages: user, stream: true });
for await (const chunk of endless) { assert.ok(chunk.id); break; }
endless.controller.abort();

await assert.rejects(client.chat.completions.create({ model, messages: [] }), OpenAI.BadRequestError);
await assert.rejects(new OpenAI({ baseURL, apiKey: "wrong", maxRetries: 0 }).models.list(), OpenAI.AuthenticationError);
console.log("ok");
