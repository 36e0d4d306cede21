// What is known of a running generation, in the form that map.js draws: it grows with every draft.

let steps = 0, slots = 0, prompt = 0, decoded = [], kinds = new Uint8Array(0);
// Slots of the steps that were told of, and those of them that were computed.
let told = 0, computed = 0;
// The slot after the last one of the text, once that is known.
let end = Infinity;
let texts = [], spans = [], step = 0, chosen = null, follows = true, drawn = null;

function clearCanvas() {
  steps = slots = prompt = step = told = computed = 0;
  [decoded, texts, spans, kinds, base, follows] = [[], [], [], new Uint8Array(0), null, true];
  end = Infinity;
  $("text").replaceChildren();
  $("map").hidden = true;
  markBlocks(0);
  $("number").textContent = "";
  $("step").disabled = true;
}

// What is not in the legend keeps its place there.
function markBlocks(count) {
  $("block-legend").style.visibility = count > 1 && count <= 100 ? "visible" : "hidden";
}

function beginCanvas(draft, text, blockLength) {
  [prompt, slots] = [draft.prompt, draft.prompt + draft.slots];
  decoded = new Array(slots).fill(-1);
  texts = new Array(slots).fill("");
  data.blocks = [];
  if (data.counts_blocks && blockLength) for (let at = prompt; at < slots; at += blockLength) data.blocks.push(at);
  markBlocks(data.blocks.length);
  const head = document.createElement("span"), blocks = new Set(data.blocks.slice(1));
  [head.className, head.textContent] = ["slot prompt", text];
  $("text").append(head);
  for (let slot = prompt; slot < slots; slot++) {
    const span = document.createElement("span");
    span.dataset.slot = slot;
    span.dataset.is = slot === prompt && prompt ? " edge" : blocks.has(slot) ? " edge block" : "";
    spans.push(span);
  }
  $("text").append(...spans);
  $("map").hidden = false;
}

function takeDraft(draft) {
  if (draft.step > steps) {
    // Steps that were not told of, as the reader was too slow, stay HIDDEN.
    const more = new Uint8Array(draft.step * slots);
    more.set(kinds);
    more.fill(REUSED, (draft.step - 1) * slots);
    [kinds, steps, base] = [more, draft.step, null];
    told += slots;
    for (const [first, end] of draft.computed) computed += end - first;
  }
  const row = (draft.step - 1) * slots, full = draft.computed.length === 1 && draft.computed[0][1] - draft.computed[0][0] === slots;
  for (const [first, end] of draft.computed) kinds.fill(full ? FULL : COMPUTED, row + first, row + end);
  if (draft.stats) end = prompt + draft.stats.new_tokens;
  for (const [slot, at, text] of draft.filled) {
    // What is beyond the end is filled up, and was decoded by no step.
    if (prompt + slot >= end) continue;
    decoded[prompt + slot] = at - 1;
    texts[prompt + slot] = shown(text);
    for (const _ of text.matchAll("\n")) spans[slot].after(document.createElement("br"));
  }
  if (follows) step = steps - 1;
  drawSoon();
}

// A frame is drawn once, however many drafts came since the last one.
function drawSoon() {
  drawn ??= requestAnimationFrame(() => {
    drawn = null;
    drawCanvas();
  });
}

function drawCanvas() {
  if (!steps) return;
  spans.forEach((span, number) => {
    const slot = prompt + number, beyond = slot >= end && step === steps - 1;
    const mask = !beyond && (decoded[slot] < 0 || decoded[slot] > step);
    const mark = kinds[step * slots + slot] >= COMPUTED ? " computed" : "";
    const kind = beyond ? "hidden" : mask ? "mask" : decoded[slot] === step ? "new" : "old";
    const look = `slot ${kind}${mark}${span.dataset.is}`;
    if (span.className !== look) span.className = look;
    const text = beyond ? "·" : mask ? "░" : texts[slot];
    if (span.textContent !== text) span.textContent = text;
  });
  const row = kinds.subarray(step * slots, (step + 1) * slots);
  $("text").classList.toggle("full", row.every((kind) => kind === FULL));
  [$("step").max, $("step").value, $("step").disabled] = [steps, step + 1, steps < 2];
  $("number").textContent = `${step + 1} of ${steps}`;
  if (follows) reveal($("text"), spans.find((span) => span.classList.contains("mask")));
  drawMap();
}

function lookAt(at) {
  step = Math.min(Math.max(at, 0), steps - 1);
  follows = step === steps - 1;
  drawSoon();
}

function buildCanvas() {
  $("step").addEventListener("input", () => lookAt($("step").value - 1));
  const point = (event) => steps && event.buttons && lookAt(under(event).at);
  $("map").addEventListener("pointerdown", point);
  $("map").addEventListener("pointermove", point);
  $("text").addEventListener("mouseover", (event) => {
    const slot = Number(event.target.dataset.slot);
    if (slot >= prompt) event.target.title = `slot ${slot}${decoded[slot] < 0 ? "" : `, filled at step ${decoded[slot] + 1}`}`;
  });
  const redraw = () => steps && redrawMap();
  window.addEventListener("resize", redraw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
}
