// What keeps pman's pages up to date. It only reads: nothing here posts, deletes or submits a job.
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
    pause = Math.max(3000, 10 * (performance.now() - began)); // a backend that is slow is asked less often
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

if (byId("text")) search(byId("text"));
live();
