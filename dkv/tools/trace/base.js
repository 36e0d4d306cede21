// What pages with a heat map share.

const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;

// What a slot is in a step, as numbered in record.py.
const [HIDDEN, REUSED, STOPPED, COMPUTED, FULL] = [0, 1, 2, 3, 4];

// Scroll a box so far that a part of it is seen.
function reveal(box, part) {
  if (!part || box.scrollHeight <= box.clientHeight) return;
  const top = part.offsetTop - box.offsetTop;
  if (top < box.scrollTop || top + 30 > box.scrollTop + box.clientHeight) box.scrollTop = top - box.clientHeight / 2;
}

// A token so that it can be seen.
function shown(text) {
  const named = { "\n": "↵", "\t": "⇥", "\r": "␍" };
  const hex = (char) => `\\u${char.charCodeAt(0).toString(16).padStart(4, "0")}`;
  return text === "" ? "·" : text.replace(/[\n\t\r]/g, (c) => named[c]).replace(/[\u0000-\u001f\u007f-\u009f\u2028\u2029]/g, hex);
}
