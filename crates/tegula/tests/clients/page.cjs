// The page of `tegula serve` in headless Chromium, as its user uses it, by keyboard where one
// can: a conversation with settings, stop, regenerate, errors; what runs where; both schemes.
// Arguments: the server's address, its key, the directory of playwright-core, the browser, and
// optionally a directory for screenshots.
"use strict";
const assert = require("node:assert/strict");
const path = require("node:path");

const [, , address, key, modules, executablePath, shots] = process.argv;
const { chromium } = require(path.join(modules, "node_modules", "playwright-core"));

(async () => {
  const browser = await chromium.launch({
    executablePath,
    args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
      "--disable-background-networking", "--disable-component-update", "--disable-sync"],
  });
  const context = await browser.newContext({ viewport: { width: 1100, height: 800 }, colorScheme: "light" });
  const page = await context.newPage();
  const problems = [];
  const foreign = [];
  page.on("console", (m) => { if (m.type() === "error" && !/40[0-9]|Failed to load/.test(m.text())) problems.push(m.text()); });
  page.on("pageerror", (e) => problems.push(String(e)));
  page.on("request", (r) => { if (!r.url().startsWith(address) && !r.url().startsWith("data:")) foreign.push(r.url()); });
  const shot = async (name) => { if (shots) await page.screenshot({ path: path.join(shots, `${name}.png`) }); };
  const messages = (role) => page.locator(`.message.${role}`);
  const idle = () => page.waitForFunction(() => !document.getElementById("send").hidden);

  // Without the key the page says what is missing; with it, it connects.
  await page.goto(address);
  await page.waitForFunction(() => /key/.test(document.getElementById("state").textContent));
  await shot("1-key-missing");
  await page.focus("#show-settings");
  await page.keyboard.press("Enter");
  await page.fill("#key", key);
  await page.keyboard.press("Tab");
  await page.waitForFunction(() => /slots of/.test(document.getElementById("state").textContent));
  assert.equal(await page.inputValue("#temperature"), "0.8");

  // Settings reach the server.
  await page.fill("#system", "You are a manual.");
  await page.fill("#max_tokens", "60");
  await page.fill("#seed", "5");
  await page.keyboard.press("Tab");
  await shot("2-settings");
  await page.click("#show-settings");
  const sent = page.waitForRequest((r) => r.url().endsWith("/v1/chat/completions"));
  await page.fill("#input", "What is an iterator adaptor?");
  await page.keyboard.press("Enter");
  const body = (await sent).postDataJSON();
  assert.equal(body.messages[0].role, "system");
  assert.equal(body.messages[0].content, "You are a manual.");
  assert.deepEqual([body.max_tokens, body.seed, body.stream, body.top_k], [60, 5, true, 40]);
  await idle();
  assert.equal(await messages("user").count(), 1);
  const first = await messages("assistant").innerText();
  assert.match(first, /tokens, [\d.]+\/s/);
  assert.match(await page.innerText("#speed"), /^[\d.]+ tokens\/s$/);
  await shot("3-answer");

  // The same seed gives the same answer again.
  const text = () => page.evaluate(() => [...document.querySelectorAll(".message.assistant p, .message.assistant pre")].map((e) => e.textContent).join("\n"));
  const before = await text();
  await page.getByRole("button", { name: "Regenerate" }).focus();
  await page.keyboard.press("Enter");
  await idle();
  assert.equal(await text(), before);
  assert.equal(await messages("assistant").count(), 1);

  // A long answer is stopped by the keyboard, and the conversation goes on.
  await page.evaluate(() => { document.getElementById("max_tokens").value = ""; document.getElementById("seed").value = ""; });
  await page.route("**/v1/chat/completions", (route) => {
    const data = route.request().postDataJSON();
    route.continue({ postData: JSON.stringify({ ...data, ignore_eos: true, logit_bias: { 0: -100, 2: -100 } }) });
  });
  await page.focus("#input");
  await page.keyboard.type("And a vector? <img src=x onerror=alert(1)>");
  await page.keyboard.press("Shift+Enter");
  await page.keyboard.type("Two lines.");
  await page.keyboard.press("Enter");
  await page.waitForFunction(() => [...document.querySelectorAll(".message.assistant")].at(-1).textContent.length > 30);
  await shot("4-streaming");
  await page.keyboard.press("Escape");
  await idle();
  await page.unroute("**/v1/chat/completions");
  const last = await messages("assistant").last().innerText();
  assert.match(last, /stopped|cut off/);
  assert.equal(await page.locator("#log img").count(), 0, "text is never HTML");
  assert.equal(await page.evaluate(() => document.activeElement.id), "input");

  // Code, thinking, errors: what the server might send.
  const answer = (parts) => async (route) => route.fulfill({
    status: 200, contentType: "text/event-stream",
    body: parts.map((delta) => `data: ${JSON.stringify({ choices: [{ index: 0, delta, finish_reason: null }] })}\n\n`).join("")
      + "data: [DONE]\n\n",
  });
  await page.route("**/v1/chat/completions", answer([
    { reasoning_content: "The user wants code.\nSo be it." },
    { content: "Use `map`:\n\n```rust\nlet v: Vec<_> = (0..3)\n    .map(|x| x * 2)\n    .collect();\n```\n\nIt is " },
    { content: "lazy, <b>really</b>." },
  ]));
  await page.fill("#input", "Show me code");
  await page.keyboard.press("Enter");
  await idle();
  const rich = messages("assistant").last();
  assert.equal(await rich.locator("pre code").innerText(), "let v: Vec<_> = (0..3)\n    .map(|x| x * 2)\n    .collect();");
  assert.equal(await rich.locator("details").count(), 1);
  assert.match(await rich.innerText(), /lazy, <b>really<\/b>\./);
  await shot("5-code-and-thinking");
  await page.unroute("**/v1/chat/completions");
  await page.route("**/v1/chat/completions", (route) => route.fulfill({
    status: 429, headers: { "Retry-After": "7" }, contentType: "application/json",
    body: JSON.stringify({ error: { message: "64 requests are waiting already", type: "rate_limit_error", param: null, code: "queue_full" } }),
  }));
  await page.fill("#input", "Once more");
  await page.keyboard.press("Enter");
  await page.getByText("64 requests are waiting already; try again in 7 s").waitFor();
  await idle();
  await shot("6-error");
  await page.unroute("**/v1/chat/completions");

  // What runs where, with something running.
  await page.click("#show-where");
  await page.waitForFunction(() => document.querySelectorAll("#tensors tbody tr").length > 10);
  await page.waitForFunction(() => document.querySelectorAll("#slots tbody tr").length > 0);
  assert.match(await page.innerText("#machine"), /threads; weights: /);
  assert.match(await page.innerText("#tensors"), /blk\.\*\.attn_q\.weight/);
  const busy = page.evaluate(async (key) => {
    const request = { prompt: "x", max_tokens: 1500, ignore_eos: true, logit_bias: { 0: -100 } };
    const headers = { Authorization: `Bearer ${key}`, "Content-Type": "application/json" };
    const once = () => fetch("v1/completions", { method: "POST", headers, body: JSON.stringify(request) }).then((r) => r.text());
    for (let i = 0; i < 4; i += 1) await Promise.all([once(), once(), once()]);
  }, key);
  await page.waitForFunction(() => Number(document.querySelector("#now dd").textContent) > 0);
  await shot("7-what-runs-where");
  await busy;

  // Dark, and narrow as a phone: whoever read the end goes on seeing it, whatever changes the
  // size of the conversation's window, and nothing sticks out of it.
  await page.emulateMedia({ colorScheme: "dark" });
  await shot("8-dark-where");
  await page.click("#show-chat");
  await shot("9-dark-chat");
  const below = () => page.evaluate(async () => {
    // Two frames: one that lays out, one behind what that brings about.
    for (let i = 0; i < 2; i += 1) await new Promise(requestAnimationFrame);
    const log = document.getElementById("log");
    return log.scrollHeight - log.scrollTop - log.clientHeight;
  });
  const atEnd = async (what) => {
    for (let i = 0; await below() >= 2; i += 1) assert.ok(i < 100, what);
  };
  const overflow = () => page.evaluate(() => {
    const wide = [...document.querySelectorAll("header *, #chat, #log > *, #form *, #foot *")];
    return wide.filter((e) => e.getBoundingClientRect().right > innerWidth + 1 && e.getBoundingClientRect().width > 1)
      .map((e) => e.id || e.className).concat(document.documentElement.scrollWidth > innerWidth ? ["all"] : []);
  });
  for (const [width, height] of [[390, 780], [360, 640], [1600, 1000], [700, 500], [360, 500]]) {
    await page.setViewportSize({ width, height });
    await atEnd(`the end of the conversation is seen at ${width}x${height}`);
    assert.deepEqual(await overflow(), [], `nothing sticks out at ${width}x${height}`);
    await shot(`10-${width}x${height}`);
  }
  await page.click("#show-settings");
  await atEnd("settings push the conversation up");
  await shot("11-narrow-settings");
  await page.click("#show-settings");
  await page.fill("#input", "one\ntwo\nthree\nfour");
  await atEnd("and so does a long message");
  await page.fill("#input", "");
  await below();
  // Who has gone back is left there.
  await page.evaluate(() => { document.getElementById("log").scrollTop = 0; });
  await below();
  await page.setViewportSize({ width: 800, height: 400 });
  assert.ok(await below() > 40, "the reader is not dragged to the end");
  await page.setViewportSize({ width: 1600, height: 1000 });
  await page.emulateMedia({ colorScheme: "light" });
  await page.click("#show-where");
  await page.waitForFunction(() => document.querySelectorAll("#tensors tbody tr").length > 10);
  await shot("12-wide-where");
  await page.setViewportSize({ width: 360, height: 640 });
  assert.ok(!await page.evaluate(() => document.documentElement.scrollWidth > innerWidth), "tables scroll by themselves");
  await shot("13-narrow-where");
  await page.click("#show-chat");
  await page.setViewportSize({ width: 1100, height: 800 });

  // Everything that can be used can be reached by Tab, and shows that it has the focus.
  await page.evaluate(() => document.activeElement.blur());
  const reached = new Set();
  for (let i = 0; i < 40; i += 1) {
    await page.keyboard.press("Tab");
    const id = await page.evaluate(() => document.activeElement.id || document.activeElement.textContent);
    reached.add(id);
  }
  for (const id of ["show-chat", "show-where", "show-settings", "log", "input", "send", "clear"]) {
    assert.ok(reached.has(id), `${id} is reached by Tab: ${[...reached]}`);
  }

  // A new conversation; settings outlive a reload, the key too while the tab lives.
  await page.click("#clear");
  assert.equal(await page.locator(".message").count(), 0);
  await page.reload();
  await page.waitForFunction(() => /slots of/.test(document.getElementById("state").textContent));
  assert.equal(await page.inputValue("#system"), "You are a manual.");

  assert.deepEqual(foreign, [], "the page asks nobody but its server");
  assert.deepEqual(problems, []);
  await browser.close();
  console.log("ok");
})().catch((error) => {
  console.error(error);
  process.exit(1);
});
