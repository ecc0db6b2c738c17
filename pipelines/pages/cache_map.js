"use strict";
// The map: its points on a canvas, found by pointer, keys and words; a legend that hides groups. Its data are the element "data".

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const canvas = byId("plot"), pen = canvas.getContext("2d"), STEPS = 10000, NOTHING = -1, LEAST_LABELLED = 0.01;
const count = data.x.length, total = data.rows;
const order = Array.from({length: count}, (_, k) => k);
for (let k = count - 1, s = 7; k > 0; k--) {  // a fixed shuffle: no group lies on top of all others
  s = (s * 1103515245 + 12345) % 2147483648;
  const other = s % (k + 1);
  [order[k], order[other]] = [order[other], order[k]];
}
let colouring, hidden = new Set(), chosen = NOTHING, words = "", middles = [];
let zoom = 1, left = 0, top_ = 0;  // the part of the map that is shown: left, top and 1 / zoom, in parts of the whole

const probe = document.createElement("span"); // a variable that is light-dark() has a colour only where it is used as one
probe.hidden = true;
document.body.append(probe);
function style(name) { probe.style.color = `var(${name})`; return getComputedStyle(probe).color; }
const groupOf = (k) => colouring.of[k];
const matches = (name) => name.toLowerCase().includes(words);
const system = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => { const set = document.documentElement.dataset.theme; return set ? set === "dark" : system.matches; };
const colourOf = (group) => group < 0 ? style("--ungrouped") : data.palettes[isDark() ? 1 : 0][group];
const isShown = (k) => !hidden.has(groupOf(k));
const isFound = (k) => !words || (groupOf(k) >= 0 && matches(colouring.names[groupOf(k)]));

function place(k) {
  const size = canvas.clientWidth, high = canvas.clientHeight, side = Math.min(size, high), pad = 14;
  const inner = side - 2 * pad;
  return [(size - side) / 2 + pad + (data.x[k] / STEPS - left) * zoom * inner, (high - side) / 2 + pad + (data.y[k] / STEPS - top_) * zoom * inner];
}

function outline(x, y, base, radius) {
  pen.beginPath();
  if (base) pen.arc(x, y, radius, 0, 2 * Math.PI);
  else { pen.moveTo(x, y - 1.35 * radius); pen.lineTo(x + 1.25 * radius, y + 0.95 * radius); pen.lineTo(x - 1.25 * radius, y + 0.95 * radius); pen.closePath(); }
}

function draw() {
  const ratio = window.devicePixelRatio || 1, wide = canvas.clientWidth, high = canvas.clientHeight;
  if (canvas.width !== Math.round(wide * ratio) || canvas.height !== Math.round(high * ratio)) {
    canvas.width = Math.round(wide * ratio); canvas.height = Math.round(high * ratio);
  }
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, wide, high);
  const paper = style("--ground"), colours = [NOTHING, ...colouring.names.keys()].map(colourOf), radius = Math.max(2, Math.min(7, wide / 260)) * Math.min(2, Math.sqrt(zoom));
  pen.strokeStyle = paper; pen.lineWidth = 0.6;
  for (const pass of [false, true]) for (const k of order) {
    if (!isShown(k) || isFound(k) !== pass) continue;
    const [x, y] = place(k);
    if (x < -9 || y < -9 || x > wide + 9 || y > high + 9) continue;
    pen.globalAlpha = pass ? 1 : 0.12;
    pen.fillStyle = colours[groupOf(k) + 1];
    outline(x, y, data.base[k], radius);
    pen.fill(); pen.stroke();
  }
  pen.globalAlpha = 1;
  names(wide, high);
  if (chosen !== NOTHING && isShown(chosen)) {
    const [x, y] = place(chosen);
    pen.strokeStyle = style("--text"); pen.lineWidth = 2.5;
    pen.beginPath(); pen.arc(x, y, radius + 5, 0, 2 * Math.PI); pen.stroke();
  }
}

function names(wide, high) {  // of large groups, at the point of each that lies in its middle
  pen.font = `${wide < 500 ? 11 : 14}px system-ui, sans-serif`; pen.textAlign = "center"; pen.textBaseline = "middle"; pen.lineJoin = "round";
  pen.lineWidth = 4; pen.strokeStyle = style("--ground"); pen.fillStyle = style("--text");
  middles.forEach((k, group) => {
    if (k === NOTHING || hidden.has(group) || (words && !matches(colouring.names[group]))) return;
    const [x, y] = place(k);
    if (x < 0 || y < 0 || x > wide || y > high) return;
    pen.strokeText(colouring.names[group], x, y); pen.fillText(colouring.names[group], x, y);
  });
}

function findMiddles() {
  const members = colouring.names.map(() => []);
  colouring.of.forEach((group, k) => { if (group >= 0) members[group].push(k); });
  const middle = (values) => values.sort((a, b) => a - b)[values.length >> 1];
  middles = members.map((mine) => {
    if (mine.length < LEAST_LABELLED * count) return NOTHING;
    const x = middle(mine.map((k) => data.x[k])), y = middle(mine.map((k) => data.y[k]));
    const far = (k) => Math.abs(data.x[k] - x) + Math.abs(data.y[k] - y);
    return mine.reduce((best, k) => far(k) < far(best) ? k : best);
  });
}

function say() {
  let shown = 0, found = 0;
  for (let k = 0; k < count; k++) if (isShown(k)) { shown++; if (isFound(k)) found++; }
  const number = (n) => n.toLocaleString("en");
  byId("status").textContent = `${number(shown)} of ${number(count)} boxes shown, ${count < total ? "a sample of" : "all of"} the cache's ${number(total)}` + (words ? `; ${number(found)} match` : "");
}

function show(k) {
  if (k === chosen) return;
  chosen = k;
  const list = byId("found").querySelector("dl");
  list.replaceChildren();
  const line = (term, text) => {
    const dt = document.createElement("dt"), dd = document.createElement("dd");
    dt.textContent = term; dd.textContent = text;
    list.append(dt, dd);
  };
  const crop = byId("crop"), cell = k === NOTHING || !data.cells.length ? -1 : data.cells[k];
  crop.style.display = cell >= 0 ? "block" : "none";
  if (k === NOTHING) { line("Box", "none chosen"); draw(); return; }
  line(data.base[k] ? "Class" : "Noun", data.name[k] || "none");
  line("Cosine", data.cosine[k] === null ? "–" : data.cosine[k].toFixed(3));
  line("Nearest", data.nearest[k] ? `${data.nearest[k]} ${data.nearestCosine[k].toFixed(3)}` : "–");
  line("Source", data.base[k] ? "base box" : `proposal, score ${data.score[k].toFixed(2)}`);
  line("Image", data.image[k]);
  line("Box", data.box[k].join(", "));
  if (cell >= 0) {
    const scale = 96 / data.cell;
    crop.style.backgroundImage = `url(${data.sheet})`;
    crop.style.backgroundSize = `${data.columns * 96}px auto`;
    crop.style.backgroundPosition = `${-(cell % data.columns) * data.cell * scale}px ${-Math.floor(cell / data.columns) * data.cell * scale}px`;
  }
  draw();
}

function nearestTo(x, y, most) {
  let best = NOTHING, least = most * most;
  for (let k = 0; k < count; k++) {
    if (!isShown(k) || !isFound(k)) continue;
    const [a, b] = place(k), far = (a - x) ** 2 + (b - y) ** 2;
    if (far < least) { least = far; best = k; }
  }
  return best;
}

function step(dx, dy) {  // the nearest shown point that lies in this direction, within 45 degrees of it
  if (chosen === NOTHING || !isShown(chosen)) { show(nearestTo(canvas.clientWidth / 2, canvas.clientHeight / 2, Infinity)); return; }
  const [x, y] = place(chosen);
  let best = NOTHING, least = Infinity;
  for (let k = 0; k < count; k++) {
    if (k === chosen || !isShown(k) || !isFound(k)) continue;
    const [a, b] = place(k), along = (a - x) * dx + (b - y) * dy, across = Math.abs((a - x) * dy) + Math.abs((b - y) * dx);
    if (along <= 0 || across > along) continue;
    if (along + across < least) { least = along + across; best = k; }
  }
  if (best === NOTHING) return;
  const [a, b] = place(best);
  if (a < 0 || b < 0 || a > canvas.clientWidth || b > canvas.clientHeight) { left += dx / zoom / 3; top_ += dy / zoom / 3; hold(); }
  show(best);
}

function hold() {
  left = Math.min(Math.max(left, 0), 1 - 1 / zoom); top_ = Math.min(Math.max(top_, 0), 1 - 1 / zoom);
}

function zoomBy(factor, x = 0.5, y = 0.5) {  // about a point of the canvas, in parts of its size
  const before = zoom;
  zoom = Math.min(40, Math.max(1, zoom * factor));
  left += x / before - x / zoom; top_ += y / before - y / zoom;
  canvas.style.touchAction = zoom > 1 ? "none" : "pan-y";
  hold(); draw();
}

function legend() {
  const counts = new Array(colouring.names.length).fill(0);
  for (const group of colouring.of) if (group >= 0) counts[group]++;
  const without = colouring.of.filter((group) => group < 0).length;
  const list = byId("legend");
  list.replaceChildren();
  const entry = (group, name, number) => {
    const item = document.createElement("li"), label = document.createElement("label");
    const tick = document.createElement("input"), swatch = document.createElement("span"), text = document.createElement("span"), many = document.createElement("span");
    tick.type = "checkbox"; tick.checked = !hidden.has(group); tick.dataset.group = group;
    swatch.className = "swatch"; swatch.style.background = colourOf(group); text.className = "name"; text.textContent = name;
    many.className = "count"; many.textContent = number.toLocaleString("en");
    label.append(tick, swatch, text, many); item.append(label); list.append(item);
    item.hidden = Boolean(words) && !(group >= 0 && matches(name));
  };
  colouring.names.forEach((name, group) => entry(group, name, counts[group]));
  if (without) entry(NOTHING, "(others)", without);
}

function change() { findMiddles(); legend(); say(); draw(); }

byId("legend").addEventListener("change", (event) => {
  const group = Number(event.target.dataset.group);
  if (event.target.checked) hidden.delete(group); else hidden.add(group);
  say(); draw();
});
byId("all").addEventListener("click", () => { hidden.clear(); change(); });
byId("none").addEventListener("click", () => { hidden = new Set([NOTHING, ...colouring.names.keys()]); change(); });
byId("search").addEventListener("input", (event) => { words = event.target.value.trim().toLowerCase(); change(); });
byId("by").addEventListener("change", (event) => { colouring = data.colourings[event.target.value]; hidden.clear(); change(); });
byId("in").addEventListener("click", () => zoomBy(1.6));
byId("out").addEventListener("click", () => zoomBy(1 / 1.6));
byId("whole").addEventListener("click", () => zoomBy(0));

const inCanvas = (event) => { const at = canvas.getBoundingClientRect(); return [event.clientX - at.left - canvas.clientLeft, event.clientY - at.top - canvas.clientTop]; };
let held = null;
canvas.addEventListener("pointerdown", (event) => {
  show(nearestTo(...inCanvas(event), event.pointerType === "mouse" ? 14 : 30));
  if (zoom > 1) { held = [event.clientX, event.clientY]; canvas.setPointerCapture(event.pointerId); }
});
canvas.addEventListener("pointermove", (event) => {
  if (held) {
    left -= (event.clientX - held[0]) / canvas.clientWidth / zoom; top_ -= (event.clientY - held[1]) / canvas.clientHeight / zoom;
    held = [event.clientX, event.clientY]; hold(); draw();
  } else if (event.pointerType === "mouse") {
    const near = nearestTo(...inCanvas(event), 14);
    if (near !== NOTHING) show(near);
  }
});
for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => { held = null; });
canvas.addEventListener("wheel", (event) => {
  event.preventDefault();
  const [x, y] = inCanvas(event);
  zoomBy(event.deltaY < 0 ? 1.2 : 1 / 1.2, x / canvas.clientWidth, y / canvas.clientHeight);
}, {passive: false});
canvas.addEventListener("keydown", (event) => {
  const moves = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};
  if (moves[event.key]) step(...moves[event.key]);
  else if (event.key === "+" || event.key === "=") zoomBy(1.6);
  else if (event.key === "-") zoomBy(1 / 1.6);
  else if (event.key === "Escape") show(NOTHING);
  else return;
  event.preventDefault();
});
system.addEventListener("change", change);
new MutationObserver(change).observe(document.documentElement, {attributeFilter: ["data-theme"]});
new ResizeObserver(draw).observe(canvas);
byId("by").value = data.colour;
colouring = data.colourings[data.colour];
change();
