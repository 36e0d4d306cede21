const { steps, slots, prompt, decoded } = data;
const SPEEDS = [1, 2, 4, 8, 15, 30, 60];

let kinds, confidences, counts, hiddenCounts, stoppedCounts, decodedAt, spans, texts, timer = null, written = null;
let step = 0, chosen = null;

async function unpacked(text) {
  const bytes = Uint8Array.from(atob(text), (char) => char.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

const kindOf = (at, slot) => kinds[at * slots + slot];
const isComputed = (at, slot) => kindOf(at, slot) >= STOPPED;
const isFull = (at) => counts[at] > 0 && counts[at] + hiddenCounts[at] === slots && !stoppedCounts[at];

function countIn(at, wanted) {
  let count = 0;
  for (let slot = 0; slot < slots; slot++) count += wanted.includes(kindOf(at, slot));
  return count;
}

async function start() {
  if (typeof DecompressionStream === "undefined") throw new Error("this page needs a browser of 2023 or later");
  kinds = new Uint8Array(await unpacked(data.kinds));
  // A bfloat16 is the upper half of a float32.
  const halves = new Uint16Array(await unpacked(data.confidences));
  confidences = new Float32Array(Uint32Array.from(halves, (half) => half << 16).buffer);
  counts = Array.from({ length: steps }, (_, at) => countIn(at, [STOPPED, COMPUTED, FULL]));
  hiddenCounts = Array.from({ length: steps }, (_, at) => countIn(at, [HIDDEN]));
  stoppedCounts = Array.from({ length: steps }, (_, at) => countIn(at, [STOPPED]));
  decodedAt = Array.from({ length: steps }, () => []);
  for (let slot = prompt; slot < slots; slot++) if (decoded[slot] >= 0) decodedAt[decoded[slot]].push(slot);
  document.querySelector("main").hidden = false;
  buildSettings();
  buildText();
  buildControls();
  fromAddress();
}

function buildText() {
  const special = new Set(data.special), blocks = new Set(data.blocks.slice(1)), box = $("text");
  texts = data.texts.map(shown);
  spans = texts.map((text, slot) => {
    const span = document.createElement("span");
    span.dataset.slot = slot;
    span.dataset.is = (special.has(slot) ? " special" : "") + (slot === prompt && prompt ? " edge" : "") +
      (blocks.has(slot) ? " edge block" : "");
    span.style.minWidth = `${[...text].length}ch`;
    box.append(span);
    for (const _ of data.texts[slot].matchAll("\n")) box.append(document.createElement("br"));
    return span;
  });
}

const isMask = (slot) => decoded[slot] > step;

function drawText() {
  spans.forEach((span, slot) => {
    const mask = isMask(slot);
    const kind = slot < prompt ? "prompt" : mask ? "mask" : decoded[slot] === step ? "new" : "old";
    const mark = isComputed(step, slot) ? " computed" : kindOf(step, slot) === HIDDEN ? " hidden" : "";
    const look = `slot ${kind}${mark}${slot === chosen ? " chosen" : ""}${span.dataset.is}`;
    if (span.className !== look) span.className = look;
    const text = mask ? "░" : texts[slot];
    if (span.textContent !== text) span.textContent = text;
    const depth = mask ? depthOf(step, slot).toFixed(2) : "0";
    if (span.dataset.p !== depth) span.style.setProperty("--p", (span.dataset.p = depth));
  });
  $("text").classList.toggle("full", isFull(step));
}

// From 0 to 1; of an entropy, one over the number of tokens that are as likely as each other.
const depthOf = (at, slot) => Math.exp(confidences[at * slots + slot]) || 0;

function confidenceText(at, slot) {
  const value = confidences[at * slots + slot];
  if (Number.isNaN(value)) return "";
  if (data.rule === "entropy") return `entropy ${(-value).toPrecision(2)} nat`;
  const name = data.rule === "margin" ? "margin" : "probability", share = Math.exp(value);
  // Near 1 the digits that matter are those of the rest.
  const digits = Math.min(8, Math.max(0, 1 - Math.floor(Math.log10(100 * Math.min(share, -Math.expm1(value)) || 1e-8))));
  return `${name} ${(100 * share).toFixed(digits)} %`;
}

function describe(slot) {
  const parts = [`slot ${slot}`];
  if (isMask(slot)) parts.push("mask", confidenceText(step, slot) || "not ranked in this step");
  else {
    parts.push(`“${texts[slot]}” (id ${data.ids[slot]})`);
    if (slot < prompt) parts.push("prompt");
    else if (decoded[slot] < 0) parts.push("beyond the end");
    else parts.push(`decoded at step ${decoded[slot] + 1} with ${confidenceText(decoded[slot], slot) || "no rank"}`);
  }
  let last = step;
  while (last >= 0 && !isComputed(last, slot)) last--;
  const unseen = kindOf(step, slot) === HIDDEN;
  if (unseen) parts.push("not seen at this step");
  if (!unseen || last >= 0) {
    const reused = unseen ? "last computed at step" : "reused from step";
    const now = kindOf(step, slot) === STOPPED ? "stopped early at this step" : "computed at this step";
    parts.push(last === step ? now : last < 0 ? "never computed yet" : `${reused} ${last + 1}`);
  }
  return parts.join(", ");
}

function drawFacts() {
  const count = counts[step], done = counts.slice(0, step + 1), now = decodedAt[step].length;
  const passes = done.filter(Boolean).length, left = decoded.filter((at) => at > step).length;
  const kind = isFull(step) ? ["full", "full"] : count ? ["cached", "cached"] : ["none", "nothing to compute"];
  const badge = document.createElement("span");
  [badge.className, badge.textContent] = kind;
  $("pass").replaceChildren(badge);
  $("computed").textContent = `${count} of ${slots} (${percent(count / slots)})`;
  $("reused").textContent = `${slots - count - hiddenCounts[step]}`;
  $("stopped").textContent = `${stoppedCounts[step]}`;
  $("hidden").textContent = `${hiddenCounts[step]}`;
  $("decoded").textContent = `${now}`;
  $("left").textContent = `${left} of ${slots - prompt}`;
  $("share").textContent = percent(data.work.slice(0, step + 1).reduce((a, b) => a + b, 0) / (slots * Math.max(passes, 1)));
  $("number").textContent = `${step + 1} of ${steps}`;
  $("step").value = step + 1;
  const said = `Step ${step + 1} of ${steps}: ${kind[1]}, ${count} of ${slots} slots computed, ${now} decoded, ${left} masks left`;
  $("step").setAttribute("aria-valuetext", said);
  if (!timer) $("status").textContent = said;
}

function choose(slot) {
  chosen = slot === null || Number.isNaN(slot) ? null : Math.min(Math.max(slot, 0), slots - 1);
  $("slot").value = chosen ?? "";
  go(step);
}

function go(to) {
  step = Math.min(Math.max(to, 0), steps - 1);
  drawText();
  drawFacts();
  drawMap();
  reveal($("text"), spans[decodedAt[step][0]]);
  $("detail").textContent = chosen === null ? "Point at a slot, or give its number." : describe(chosen);
  // Browsers limit how often the address may change.
  clearTimeout(written);
  const place = `#step=${step + 1}${chosen === null ? "" : `&slot=${chosen}`}`;
  written = setTimeout(() => history.replaceState(null, "", place), 300);
}

function fromAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  if (given.has("slot")) choose(parseInt(given.get("slot"), 10));
  go((parseInt(given.get("step"), 10) || 1) - 1);
}

function play(on) {
  clearInterval(timer);
  timer = null;
  if (on) {
    if (step === steps - 1) go(0);
    timer = setInterval(() => (step < steps - 1 ? go(step + 1) : play(false)), 1000 / $("speed").value);
  }
  $("play").textContent = on ? "⏸ Pause" : "▶ Play";
  $("play").setAttribute("aria-label", on ? "Pause" : "Play");
  drawFacts();
}

function buildSettings() {
  const size = `${prompt} + ${slots - prompt} slots, steps: ${steps}`;
  const passes = counts.filter(Boolean).length, full = counts.filter((_, at) => isFull(at)).length;
  $("canvas-size").textContent = `${size}, passes: ${passes}, full: ${full}`;
  for (const part of document.querySelectorAll(".of-hidden")) part.hidden = !hiddenCounts.some(Boolean);
  for (const part of document.querySelectorAll(".of-stopped")) part.hidden = !stoppedCounts.some(Boolean);
  $("prompt-legend").hidden = prompt === 0;
  $("block-legend").hidden = data.blocks.length < 2 || data.blocks.length > 100;
  for (const [name, value] of Object.entries(data.settings)) {
    const row = $("settings").insertRow(), head = document.createElement("th");
    head.scope = "row";
    head.textContent = name;
    row.append(head);
    row.insertCell().textContent = value;
  }
}

function buildControls() {
  $("step").max = steps;
  $("slot").max = slots - 1;
  // As a start, the whole run in about a quarter of a minute.
  const usual = SPEEDS.findLast((speed) => speed <= Math.max(steps / 15, 2));
  for (const speed of SPEEDS) $("speed").add(new Option(`${speed} steps/s`, speed, false, speed === usual));
  const ways = { first: () => 0, back: () => step - 1, forth: () => step + 1, last: () => steps - 1 };
  for (const [id, to] of Object.entries(ways)) $(id).addEventListener("click", () => go(to()));
  $("step").addEventListener("input", () => go($("step").value - 1));
  $("play").addEventListener("click", () => play(!timer));
  $("speed").addEventListener("change", () => timer && play(true));
  $("slot").addEventListener("input", () => choose(parseInt($("slot").value, 10)));
  $("text").addEventListener("click", (event) => {
    const slot = event.target.dataset.slot;
    if (slot !== undefined) choose(Number(slot) === chosen ? null : Number(slot));
  });
  $("text").addEventListener("mouseover", (event) => {
    const slot = event.target.dataset.slot;
    if (slot !== undefined) event.target.title = $("detail").textContent = describe(Number(slot));
  });
  $("text").addEventListener("mouseleave", () => chosen !== null && choose(chosen));
  const point = (event) => event.buttons && go(under(event).at);
  $("map").addEventListener("pointerdown", point);
  $("map").addEventListener("pointermove", point);
  document.addEventListener("keydown", onKey);
  window.addEventListener("hashchange", fromAddress);
  window.addEventListener("resize", redrawMap);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawMap);
}

function onKey(event) {
  const at = event.target.tagName, moves = { PageUp: -10, PageDown: 10, ArrowLeft: -1, ArrowRight: 1, Home: -steps, End: steps };
  if (event.altKey || event.ctrlKey || event.metaKey || ["SELECT", "SUMMARY"].includes(at) || event.target.id === "slot") return;
  if (event.key === " " && at !== "BUTTON") play(!timer);
  else if (event.key in moves) go(step + moves[event.key]);
  else return;
  event.preventDefault();
}

start().catch((error) => {
  $("fault").hidden = false;
  $("fault").textContent = `This trace cannot be shown: ${error.message}`;
  throw error;
});
