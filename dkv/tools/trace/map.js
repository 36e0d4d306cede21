// The heat map of the page: drawn once per size and colour scheme, and marked anew at every step.

const MARGIN = { left: 52, right: 6, top: 20, bottom: 20 };
let base = null, area = null;

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

// One pixel per cell.
function cells() {
  const sheet = new OffscreenCanvas(slots, steps), pen = sheet.getContext("2d");
  // #rrggbb as the bytes of a pixel.
  const colours = ["hidden", "reused", "stopped", "computed", "full"].map((name) => {
    const [r, g, b] = colour(name).match(/[0-9a-f]{2}/gi).map((part) => parseInt(part, 16));
    return new Uint32Array(Uint8Array.of(r, g, b, 255).buffer)[0];
  });
  const pixels = Uint32Array.from(kinds, (kind) => colours[kind]);
  pen.putImageData(new ImageData(new Uint8ClampedArray(pixels.buffer), slots, steps), 0, 0);
  return sheet;
}

// Cells smaller than a pixel are averaged, larger ones keep sharp edges: each direction by itself.
function stretch(sheet, pen, x, y, width, height) {
  const small = new OffscreenCanvas(Math.min(sheet.width, width), Math.min(sheet.height, height));
  const shrink = small.getContext("2d");
  shrink.imageSmoothingQuality = "high";
  shrink.drawImage(sheet, 0, 0, small.width, small.height);
  pen.imageSmoothingEnabled = false;
  pen.drawImage(small, x, y, width, height);
}

function drawBase(width, height) {
  base = new OffscreenCanvas(width, height);
  const pen = base.getContext("2d");
  const { scale, x, y, wide, high } = area;
  stretch(cells(), pen, x, y, Math.round(wide * slots), Math.round(high * steps));
  // Below the decoded slots: a line is wider than a slot of a long canvas.
  if (prompt) line(pen, prompt, 2 * scale, []);
  if (data.blocks.length <= 100) for (const block of data.blocks.slice(1)) line(pen, block, scale, [4 * scale, 3 * scale]);
  pen.fillStyle = colour("decoded");
  const w = Math.max(wide, 2 * scale), h = Math.max(high, 2 * scale);
  for (let slot = prompt; slot < slots; slot++) {
    if (decoded[slot] < 0) continue;
    const left = Math.round(x + (slot + 0.5) * wide - w / 2), top = Math.round(y + (decoded[slot] + 0.5) * high - h / 2);
    pen.fillRect(left, top, Math.round(left + w) - left, Math.round(top + h) - top);
  }
  drawLabels(pen);
}

function line(pen, slot, width, dash) {
  const { x, y, wide, high } = area, at = Math.round(x + slot * wide);
  for (const [style, extra, pattern] of [["ground", 2, []], ["line", 0, dash]]) {
    pen.strokeStyle = colour(style);
    pen.lineWidth = width + extra;
    pen.setLineDash(pattern);
    pen.beginPath();
    pen.moveTo(at, y);
    pen.lineTo(at, y + high * steps);
    pen.stroke();
  }
  pen.setLineDash([]);
}

function drawLabels(pen) {
  const { scale, x, y, wide, high } = area, right = x + wide * slots, below = y + high * steps + 15 * scale;
  const share = prompt / slots;
  const [text, side] = share < 0.06 ? ["answer", "left"] : share > 0.94 ? ["prompt", "right"] : ["prompt | answer", "center"];
  pen.fillStyle = colour("faint");
  pen.font = `${12 * scale}px system-ui, sans-serif`;
  for (const [said, align, at, height] of [
    [text, side, x + wide * prompt, y - 6 * scale], ["slot 0", "left", x, below], [`${slots - 1}`, "right", right, below],
    ["step", "right", x - 12 * scale, y - 6 * scale],
  ]) {
    pen.textAlign = align;
    pen.fillText(said, at, height);
  }
}

function layOut() {
  const canvas = $("map"), scale = window.devicePixelRatio || 1;
  const css = { width: canvas.clientWidth, height: MARGIN.top + MARGIN.bottom + Math.min(14 * steps, 320) };
  canvas.style.height = `${css.height}px`;
  canvas.width = Math.round(css.width * scale);
  canvas.height = Math.round(css.height * scale);
  const left = MARGIN.left * scale, top = MARGIN.top * scale;
  area = {
    scale, x: left, y: top,
    wide: (canvas.width - left - MARGIN.right * scale) / slots,
    high: (canvas.height - top - MARGIN.bottom * scale) / steps,
  };
  canvas.setAttribute("aria-label", `Heat map of ${steps} steps and ${slots} slots: not seen, reused, computed, full pass, decoded`);
  drawBase(canvas.width, canvas.height);
}

function drawMap() {
  if (!base) layOut();
  const canvas = $("map"), pen = canvas.getContext("2d"), { scale, x, y, wide, high } = area;
  pen.clearRect(0, 0, canvas.width, canvas.height);
  pen.drawImage(base, 0, 0);
  const top = y + step * high, width = wide * slots, tall = Math.max(high + scale, 4 * scale);
  for (const [style, thick] of [["ground", 4.5], ["line", 1.5]]) {
    pen.strokeStyle = colour(style);
    pen.lineWidth = thick * scale;
    pen.strokeRect(x - scale, top + high / 2 - tall / 2, width + 2 * scale, tall);
  }
  pen.fillStyle = colour("ink");
  pen.font = `600 ${12 * scale}px system-ui, sans-serif`;
  pen.textAlign = "right";
  pen.fillText(`${step + 1} ▸`, x - 4 * scale, Math.min(Math.max(top + high / 2 + 4 * scale, y + 10 * scale), canvas.height));
  if (chosen !== null) {
    pen.strokeStyle = colour("accent");
    pen.strokeRect(x + chosen * wide, y - scale, Math.max(wide, 2 * scale), high * steps + 2 * scale);
  }
}

// The step and slot under a pointer.
function under(event) {
  const box = $("map").getBoundingClientRect(), { scale, x, y, wide, high } = area;
  const at = Math.floor(((event.clientY - box.top) * scale - y) / high);
  const slot = Math.floor(((event.clientX - box.left) * scale - x) / wide);
  return { at, slot: slot >= 0 && slot < slots ? slot : null };
}

function redrawMap() {
  base = null;
  // There may be no room at the moment.
  if ($("map").clientWidth > MARGIN.left + MARGIN.right) drawMap();
}
