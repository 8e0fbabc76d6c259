// The page of `tegula serve`: a conversation, and what runs where. No library, no build.
"use strict";

const $ = (id) => document.getElementById(id);

/** An element with a class, text and children. */
function element(tag, { cls, text, ...rest } = {}, ...children) {
  const e = document.createElement(tag);
  if (cls) e.className = cls;
  if (text !== undefined) e.textContent = text;
  Object.assign(e, rest);
  e.append(...children);
  return e;
}

// ---- Settings -----------------------------------------------------------------------------

const NUMBERS = ["temperature", "top_k", "top_p", "min_p", "repeat_penalty", "max_tokens", "seed"];
const STORE = "tegula-settings";
let defaults = {};

function load(store, key) {
  try { return JSON.parse(store.getItem(key)) ?? {}; } catch { return {}; }
}

function fillSettings() {
  const saved = load(localStorage, STORE);
  for (const name of NUMBERS) $(name).value = saved[name] ?? defaults[name] ?? "";
  $("system").value = saved.system ?? "";
  $("key").value = load(sessionStorage, STORE).key ?? "";
}

function saveSettings() {
  const saved = { system: $("system").value };
  for (const name of NUMBERS) {
    // What is as the server has it follows the server.
    const value = $(name).value;
    if (value !== "" && Number(value) !== defaults[name]) saved[name] = Number(value);
  }
  try {
    localStorage.setItem(STORE, JSON.stringify(saved));
    sessionStorage.setItem(STORE, JSON.stringify({ key: $("key").value }));
  } catch { /* A browser that keeps nothing still chats. */ }
}

/** The fields of a request that the settings decide. */
function sampling() {
  const fields = {};
  for (const name of NUMBERS) {
    const input = $(name);
    if (input.value !== "" && input.validity.valid) fields[name] = Number(input.value);
  }
  return fields;
}

function headers() {
  const key = $("key").value;
  return key ? { Authorization: `Bearer ${key}` } : {};
}

// ---- The server ---------------------------------------------------------------------------

/** What went wrong, in the server's words where it has any. */
async function errorOf(response) {
  let message = `${response.status} ${response.statusText}`;
  try { message = (await response.json()).error.message; } catch { /* Not ours. */ }
  const after = response.headers.get("Retry-After");
  return new Error(after ? `${message}; try again in ${after} s` : message);
}

async function get(path) {
  const response = await fetch(path, { headers: headers() });
  if (!response.ok) throw await errorOf(response);
  return response;
}

/** The data of a stream of server-sent events, one by one. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    pending += value;
    for (;;) {
      const end = pending.indexOf("\n\n");
      if (end < 0) break;
      const event = pending.slice(0, end);
      pending = pending.slice(end + 2);
      if (event.startsWith("data: ")) yield event.slice(6);
    }
  }
}

let connected = false;

async function connect() {
  try {
    const props = await (await get("props")).json();
    $("model").textContent = props.model_alias;
    document.title = `${props.model_alias} · Tegula`;
    defaults = { ...props.default_generation_settings.params };
    for (const name of ["temperature", "top_p", "min_p", "repeat_penalty"]) {
      defaults[name] = Number(defaults[name].toFixed(4));
    }
    connected = true;
    fillSettings();
    say(`${props.total_slots} slots of ${props.default_generation_settings.n_ctx} tokens`);
  } catch (error) {
    connected = false;
    say(error instanceof TypeError ? "the server does not answer" : error.message, true);
  }
}

function say(text, bad = false) {
  $("state").textContent = text;
  $("state").classList.toggle("bad", bad);
}

// ---- Text ---------------------------------------------------------------------------------

/** Paragraphs, code blocks and code of an answer; as nodes, so nothing in it is ever HTML. */
function render(text) {
  const out = document.createDocumentFragment();
  for (const [i, part] of text.split(/^```/m).entries()) {
    if (i % 2 === 1) {
      const code = part.replace(/^[^\n]*\n?/, "").replace(/\n$/, "");
      out.append(element("pre", { tabIndex: 0 }, element("code", { text: code })));
      continue;
    }
    for (const paragraph of part.split(/\n{2,}/)) {
      if (!paragraph.trim()) continue;
      const p = element("p");
      let at = 0;
      const text = paragraph.replace(/^\n+|\n+$/g, "");
      for (const match of text.matchAll(/(?<!`)(`{1,2})([^`\n]+)\1(?!`)/g)) {
        p.append(text.slice(at, match.index), element("code", { text: match[2].trim() }));
        at = match.index + match[0].length;
      }
      p.append(text.slice(at));
      out.append(p);
    }
  }
  return out;
}

// ---- The conversation ---------------------------------------------------------------------

/** Messages as the server takes them, and the element of each. */
let messages = [];
let running = null;

function addMessage(role, content) {
  $("empty")?.remove();
  const e = element("article", { cls: `message ${role}` });
  e.setAttribute("aria-label", role === "user" ? "You" : "Answer");
  if (role === "user") e.textContent = content;
  $("log").append(e);
  sizes.observe(e);
  messages.push({ role, content, element: e });
  scroll(true);
  return messages.at(-1);
}

/** Whether the end is to be kept in sight: until the reader goes back. */
let following = true;
/** The sizes of the conversation and of its window when the end was last brought into sight. */
let seen = "";

function logSize() {
  const log = $("log");
  return `${log.clientWidth} ${log.clientHeight} ${log.scrollHeight}`;
}

function scroll(always = false) {
  following ||= always;
  if (following) $("log").scrollTop = $("log").scrollHeight;
  seen = logSize();
}

/** Keeps the end in sight when the window or a message becomes narrower or higher, and once
 *  more when that is drawn: browsers move what is in a window that changes, too. */
const sizes = new ResizeObserver(() => {
  scroll();
  requestAnimationFrame(() => scroll());
});

function setRunning(controller) {
  running = controller;
  $("send").hidden = controller !== null;
  $("stop").hidden = controller === null;
  for (const e of document.querySelectorAll(".note button")) e.disabled = controller !== null;
}

async function answer() {
  const system = $("system").value.trim();
  const history = messages.map(({ role, content }) => ({ role, content }));
  const body = {
    ...sampling(),
    messages: system ? [{ role: "system", content: system }, ...history] : history,
    stream: true,
    stream_options: { include_usage: true },
  };
  document.querySelectorAll(".note").forEach((note) => note.remove());
  const message = addMessage("assistant", "");
  const controller = new AbortController();
  setRunning(controller);
  const view = { text: "", thinking: "", begin: 0, tokens: 0, timings: null, end: null };
  message.element.classList.add("waiting");
  $("speed").textContent = "";
  let drawn = false;
  const draw = () => {
    drawn = false;
    if (view.over) return;
    drawAnswer(message, view);
    scroll();
  };
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json", ...headers() },
      body: JSON.stringify(body),
      signal: controller.signal,
    });
    if (!response.ok) throw await errorOf(response);
    for await (const data of events(response)) {
      if (data === "[DONE]") break;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      take(view, chunk);
      if (!drawn) {
        drawn = true;
        requestAnimationFrame(draw);
      }
    }
  } catch (error) {
    if (error.name === "AbortError") view.end = "stopped";
    else view.error = error instanceof TypeError ? "The server does not answer." : error.message;
  }
  view.over = true;
  message.content = view.text;
  message.element.classList.remove("waiting");
  drawAnswer(message, view);
  finish(message, view);
  setRunning(null);
  scroll();
  $("input").focus();
}

function take(view, chunk) {
  const choice = chunk.choices?.[0];
  const delta = choice?.delta ?? {};
  if (delta.content || delta.reasoning_content) {
    view.begin ||= performance.now();
    view.tokens += 1;
    view.text += delta.content ?? "";
    view.thinking += delta.reasoning_content ?? "";
    const seconds = (performance.now() - view.begin) / 1000;
    if (view.tokens > 1 && seconds > 0) {
      $("speed").textContent = `${((view.tokens - 1) / seconds).toFixed(1)} tokens/s`;
    }
  }
  if (choice?.finish_reason) view.end = choice.finish_reason;
  if (chunk.timings) view.timings = chunk.timings;
}

function drawAnswer(message, view) {
  const parts = [];
  if (view.thinking) {
    const open = message.element.querySelector(".thinking")?.open ?? !view.text;
    parts.push(element("details", { cls: "thinking", open: open && !(view.text && !view.closed) },
      element("summary", { text: "Thinking" }), element("div", { text: view.thinking.trim() })));
    view.closed ||= Boolean(view.text);
  }
  parts.push(render(view.text));
  message.element.replaceChildren(...parts);
}

function finish(message, view) {
  if (view.error) {
    message.element.append(element("div", { cls: "error", text: view.error, role: "alert" }));
    // What failed is no part of the conversation.
    if (!view.text) messages.pop();
  }
  const words = [];
  const t = view.timings;
  if (t) {
    words.push(`${t.predicted_n} tokens, ${t.predicted_per_second.toFixed(1)}/s`);
    words.push(`prompt ${t.prompt_n + t.cache_n} tokens` + (t.cache_n ? `, ${t.cache_n} cached` : ""));
    $("speed").textContent = `${t.predicted_per_second.toFixed(1)} tokens/s`;
  }
  if (view.end === "length") words.push("cut off: the limit was reached");
  if (view.end === "stopped") words.push("stopped");
  const again = element("button", { type: "button", cls: "quiet", text: "Regenerate", onclick: regenerate });
  message.element.append(element("div", { cls: "note" }, again, words.join(" · ")));
}

function regenerate() {
  if (running) return;
  if (messages.at(-1)?.role === "assistant") messages.pop();
  $("log").lastElementChild.remove();
  answer();
}

function send() {
  const text = $("input").value.trim();
  if (!text || running) return;
  if (messages.at(-1)?.role === "user") {
    // The last one was not answered: this one takes its place.
    $("log").lastElementChild?.remove();
    messages.pop().element.remove();
  }
  $("input").value = "";
  grow();
  addMessage("user", text);
  answer();
}

function grow() {
  const input = $("input");
  input.style.height = "auto";
  input.style.height = `${Math.min(input.scrollHeight + 2, 192)}px`;
}

function clearChat() {
  running?.abort();
  messages = [];
  const empty = element("div", { id: "empty" }, element("p", { text: "Ask something." }));
  $("log").replaceChildren(empty);
  $("speed").textContent = "";
  $("input").focus();
}

// ---- What runs where ----------------------------------------------------------------------

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

function size(bytes) {
  let unit = 0;
  while (bytes >= 1024 && unit < 4) { bytes /= 1024; unit += 1; }
  return `${unit ? bytes.toFixed(1) : bytes} ${UNITS[unit]}`;
}

/** Rows that differ only in their layer are one. */
function group(tensors) {
  const groups = new Map();
  for (const t of tensors) {
    const name = t.tensor.replace(/\.\d+\./, ".*.");
    const place = `${t.device}/${t.buffer}`.toLowerCase();
    const key = [name, t.type, place, t.kernel, t.reason].join("\n");
    const row = groups.get(key) ?? { name, type: t.type, place, kernel: t.kernel, reason: t.reason, count: 0, bytes: 0 };
    row.count += 1;
    row.bytes += t.bytes;
    groups.set(key, row);
  }
  return [...groups.values()];
}

async function showTensors() {
  const report = await (await get("explain")).json();
  const buffers = Object.entries(report.buffers).map(([place, bytes]) => `${place} ${size(bytes)}`);
  $("machine").textContent = `${report.isa}, ${report.threads} threads; weights: ${buffers.join(", ")}`;
  const rows = group(report.tensors).map((r) => element("tr", {},
    element("td", { cls: "m", text: r.name }),
    element("td", { cls: "n", text: r.count }),
    element("td", { text: r.type }),
    element("td", { cls: "n", text: size(r.bytes) }),
    element("td", { text: r.place }),
    element("td", { cls: "m", text: r.kernel }),
    element("td", { text: r.reason })));
  $("tensors").tBodies[0].replaceChildren(...rows);
}

function parseMetrics(text) {
  const values = {};
  for (const line of text.split("\n")) {
    const match = /^tegula_([a-z_]+) (\S+)$/.exec(line);
    if (match) values[match[1]] = Number(match[2]);
  }
  return values;
}

let before = null;

async function showNow() {
  const m = parseMetrics(await (await get("metrics")).text());
  const at = performance.now();
  const rate = (name) => {
    if (!before) return "–";
    return ((m[name] - before.m[name]) / ((at - before.at) / 1000)).toFixed(1);
  };
  const used = m.kv_pages - m.kv_pages_free;
  const facts = [
    ["Generated tokens/s", rate("generated_tokens_total")],
    ["Prompt tokens/s", rate("prompt_tokens_total")],
    ["Slots busy", `${m.slots_prompt + m.slots_generating + m.slots_embedding} of ${m.slots}`],
    ["Waiting", m.requests_waiting],
    ["KV cache", `${Math.round((100 * used) / m.kv_pages)} %`],
    ["Answers so far", m.tasks_finished_total],
  ];
  before = { m, at };
  $("now").replaceChildren(...facts.map(([name, value]) =>
    element("div", {}, element("dt", { text: name }), element("dd", { text: value }))));
  const slots = await (await get("slots")).json();
  $("slots").tBodies[0].replaceChildren(...slots.map((s) => element("tr", {},
    element("td", { text: s.id }),
    element("td", { text: s.state }),
    element("td", { cls: "n", text: `${s.n_prompt_tokens_processed} / ${s.n_prompt_tokens}` }),
    element("td", { cls: "n", text: s.n_prompt_tokens_cache }),
    element("td", { cls: "n", text: s.n_decoded }))));
}

let timer = null;

async function tick() {
  try {
    await showNow();
    if (!connected) await connect();
  } catch (error) {
    say(error.message, true);
  }
}

function show(where) {
  $("chat").hidden = where;
  $("where").hidden = !where;
  $("show-chat").setAttribute("aria-pressed", String(!where));
  $("show-where").setAttribute("aria-pressed", String(where));
  clearInterval(timer);
  if (where) {
    before = null;
    showTensors().catch((error) => say(error.message, true));
    tick();
    timer = setInterval(tick, 2000);
  } else {
    $("input").focus();
  }
}

// ---- What is pressed ----------------------------------------------------------------------

$("form").addEventListener("submit", (event) => { event.preventDefault(); send(); });
$("input").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
$("input").addEventListener("input", grow);
document.addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
$("log").addEventListener("scroll", () => {
  const log = $("log");
  // What changes its size moves: that is not the reader going back.
  if (logSize() === seen) following = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
});
sizes.observe($("log"));
$("stop").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", clearChat);
$("show-chat").addEventListener("click", () => show(false));
$("show-where").addEventListener("click", () => show(true));
$("show-settings").addEventListener("click", () => {
  const hidden = !$("settings").hidden;
  $("settings").hidden = hidden;
  $("show-settings").setAttribute("aria-expanded", String(!hidden));
  if (!hidden) $("system").focus();
});
$("settings").addEventListener("change", (event) => {
  saveSettings();
  if (event.target === $("key")) connect();
});
$("defaults").addEventListener("click", () => {
  for (const name of NUMBERS) $(name).value = defaults[name] ?? "";
  $("system").value = "";
  saveSettings();
});
fillSettings();
connect();
