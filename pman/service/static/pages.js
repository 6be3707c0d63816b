// What keeps pman's pages up to date. Nothing here submits or deletes a job; the playground posts what is to be rendered.
"use strict";

const byId = (id) => document.getElementById(id);
const sleep = (ms) => new Promise((done) => setTimeout(done, ms));
// A page's address without the user and password that it may have been opened with: fetch() refuses those.
const address = (link) => new URL(link, location.origin + location.pathname);

async function shown() {
  while (document.hidden) await new Promise((done) => document.addEventListener("visibilitychange", done, { once: true }));
}

// Makes `old` equal to `fresh` and leaves alone what is equal already, so that selection, focus and place stay.
function morph(old, fresh) {
  if (old.isEqualNode(fresh)) return;
  if (old.nodeType !== Node.ELEMENT_NODE) { old.data = fresh.data; return; }
  for (const { name, value } of fresh.attributes) old.setAttribute(name, value);
  for (const { name } of [...old.attributes]) if (!fresh.hasAttribute(name) && name !== "open") old.removeAttribute(name);
  const named = new Map([...old.children].filter((child) => child.id).map((child) => [child.id, child]));
  const like = (node, other) => other && !other.id && node.nodeName === other.nodeName;
  let place = old.firstChild;
  for (const node of [...fresh.childNodes]) {
    const same = node.id ? named.get(node.id) : like(node, place) ? place : null;
    if (same && same === place) place = place.nextSibling;
    else old.insertBefore(same || node, place);
    if (same) morph(same, node);
  }
  while (place) { const next = place.nextSibling; place.remove(); place = next; }
}

// The page as it is now, taken over part by part: all that has the attribute data-live.
let turns = 0;
async function refresh() {
  const turn = ++turns, seen = byId("offline").dataset;
  let problem = "", fresh = null;
  try {
    const answer = await fetch(address(location.search));
    fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
    if (!answer.ok) problem = (fresh.querySelector("main") || fresh.body).textContent.trim().replace(/\s+/g, " ");
  } catch {
    problem = "pman does not answer.";
  }
  if (turn !== turns) return;
  if (byId("problem")) { if (!problem) location.reload(); return; }
  for (const part of document.querySelectorAll("[data-live]")) {
    const now = problem ? null : fresh.getElementById(part.id);
    part.classList.toggle("stale", !now);
    if (now) morph(part, now);
  }
  if (!problem) seen.at = new Date().toLocaleTimeString();
  byId("offline").hidden = !problem;
  byId("offline").textContent = problem && problem + " This page shows what was known at " + seen.at + ".";
}

async function live() {
  byId("offline").dataset.at = new Date().toLocaleTimeString();
  for (let pause = 3000; document.querySelector("[data-live]") && !document.querySelector("[data-final]");) {
    await sleep(pause);
    await shown();
    const began = performance.now();
    await refresh();
    pause = Math.min(Math.max(3000, 10 * (performance.now() - began)), 60000); // a slow backend is asked less often
  }
}

function search(field) {
  let timer;
  field.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(() => {
      const asked = [...new FormData(field.form)].filter(([, value]) => value);
      history.replaceState(null, "", "?" + new URLSearchParams(asked));
      refresh();
    }, 200);
  });
}

const MAX_LINES = 10000; // of a log on the page; the oldest are taken away
const SGR = /\x1b\[([\d;:]*)m/;
const OTHER_CONTROLS = /\x1b\[[0-?]*[ -/]*[@-ln-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?/g;
let ink = new Set();

// Colours as a terminal shows them, by the classes c0 to c7, and b for bold.
function dip(codes) {
  for (const code of codes.split(";").map(Number)) {
    if (code === 0) ink = new Set();
    else if (code === 1) ink.add("b");
    else if (code === 22) ink.delete("b");
    else if (code >= 30 && code <= 39 || code >= 90 && code <= 97) {
      ink = new Set([...ink].filter((name) => name === "b"));
      if (code !== 38 && code !== 39) ink.add("c" + code % 10);
      if (code === 38) return; // one of 256 colours: its number is in the codes that follow
    } else if (code === 48) return;
  }
}

// A line of a log. What a carriage return begins replaces what stands before it, as for a progress bar.
function lineOf(text) {
  const line = document.createElement("span");
  const rewritten = text.replace(OTHER_CONTROLS, "").replace(/\r+(?=\n?$)/, "");
  const parts = rewritten.slice(rewritten.lastIndexOf("\r") + 1).split(SGR);
  parts.forEach((part, index) => {
    if (index % 2) return dip(part);
    const span = document.createElement("span");
    span.className = [...ink].join(" ");
    span.textContent = part;
    if (part) line.append(ink.size ? span : part);
  });
  return line;
}

function write(log, text, cut) {
  const follows = !log.dataset.seen || log.scrollTop + log.clientHeight >= log.scrollHeight - 20;
  const lines = (text.match(/[^\n]*\n|[^\n]+/g) || []).map(lineOf);
  if (cut && log.dataset.seen) lines.unshift(lineOf("[some output is left out here]\n"));
  if (lines.length && !log.dataset.seen) { log.replaceChildren(); log.dataset.seen = "yes"; }
  log.append(...lines);
  if (cut || log.childElementCount > MAX_LINES) byId("cut").hidden = false;
  while (log.childElementCount > MAX_LINES) log.firstElementChild.remove();
  if (follows) log.scrollTop = log.scrollHeight;
}

async function tail(log) {
  const said = byId("tail");
  let since = "", follow = 0;
  while (since !== null) {
    await shown();
    try {
      const answer = await fetch(address(`${log.dataset.logs}&follow=${follow}&since=${since}`));
      const text = await answer.text();
      if (!answer.ok) throw new Error(JSON.parse(text).message);
      write(log, text, answer.headers.has("Pman-Logs-Cut"));
      since = answer.headers.get("Pman-Logs-Next");
      said.textContent = since === null ? "This is all." : "New lines appear here.";
      follow = 1;
    } catch (error) {
      said.textContent = "No new lines now: " + (error.constructor === Error ? error.message : "pman does not answer.");
      follow = 0; // where too many wait for output, looking every few seconds still works
      await sleep(3000);
    }
  }
  if (byId("job")) refresh();
}

// The text of a part of the page; of what is rendered without the names of its blocks.
function textOf(part) {
  if (part.value !== undefined) return part.value;
  const clone = part.cloneNode(true);
  for (const name of clone.querySelectorAll(".tag")) name.remove();
  return clone.textContent;
}

async function copy(button) {
  const text = textOf(byId(button.dataset.copy));
  try {
    await navigator.clipboard.writeText(text);
  } catch { // only https and this machine have a clipboard; elsewhere the browser copies what is selected
    const area = document.createElement("textarea");
    area.value = text;
    button.after(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    if (!done) return;
  }
  const name = button.dataset.name ||= button.textContent;
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = name; }, 1500);
}

function element(name, kind, ...content) {
  const made = document.createElement(name);
  made.className = kind;
  made.append(...content);
  return made;
}

function partsOf(parts) {
  return Object.entries(parts).flatMap(([name, segments]) => {
    const pre = element("pre", "", ...segments.map(([block, text]) => {
      const named = block && text.trim();
      const span = element("span", named ? "block" : "", ...(named ? [element("span", "tag", block)] : []), text);
      if (named) span.title = "block " + block;
      return span;
    }));
    return name === "spec" ? [pre] : [element("h2", "", name), pre];
  });
}

// A link keeps target and request behind its #, which browsers send to nobody.
function keep(request, target) {
  const kept = new URLSearchParams({ target: target.value, request: request.value });
  history.replaceState(null, "", "#" + kept);
  byId("link").value = address("#" + kept).href;
}

async function play() {
  const request = byId("request"), target = byId("target"), result = byId("result");
  const verdict = (kind, lines) => byId("verdict").replaceChildren(...lines.map((text) => element("div", kind, text)));
  let last = 0, timer;
  async function update() {
    const turn = ++last;
    let answer, body;
    try {
      answer = await fetch(address("render"), { method: "POST", headers: { "Content-Type": "application/json" },
        body: JSON.stringify({ request: request.value, target: target.value }) });
      body = await answer.json();
    } catch {
      answer = { ok: false };
      body = { message: "pman does not answer." };
    }
    if (turn !== last) return;
    result.classList.toggle("stale", !answer.ok);
    if (!answer.ok) {
      const said = typeof body.message === "string" ? [body.message]
        : Object.entries(body.message).map(([field, text]) => field + ": " + text);
      verdict("bad", result.childElementCount ? [...said, "Below is what was rendered before."] : said);
      return;
    }
    verdict(body.problems.length ? "bad" : "good",
      body.problems.length ? body.problems : ["The " + target.value + " parser accepts this."]);
    result.replaceChildren(...partsOf(body.parts));
    byId("reasons").textContent = body.reasons;
  }
  function take() {
    const kept = new URLSearchParams(location.hash.slice(1));
    if (kept.has("request")) request.value = kept.get("request");
    if ([...target.options].some((option) => option.value === kept.get("target"))) target.value = kept.get("target");
    byId("link").value = address("#" + new URLSearchParams({ target: target.value, request: request.value })).href;
    update();
  }
  request.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(() => { keep(request, target); update(); }, 150);
  });
  target.addEventListener("change", () => { keep(request, target); update(); });
  addEventListener("hashchange", take);
  take();
}

for (const button of document.querySelectorAll("button[data-copy]")) {
  button.hidden = false;
  button.addEventListener("click", () => copy(button));
}
if (byId("log")) {
  const log = byId("log"), wrap = byId("wrap");
  byId("end").hidden = wrap.hidden = false;
  byId("end").addEventListener("click", () => { log.scrollTop = log.scrollHeight; log.focus(); });
  wrap.addEventListener("click", () => wrap.setAttribute("aria-pressed", String(!log.classList.toggle("long"))));
  tail(log);
}
if (byId("target")) play();
if (byId("text")) search(byId("text"));
live();
