"use strict";
// What a page of hdovd does besides being read: theme, sorting of tables, values under the pointer, filters. Without it the page is whole.

const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const SVG = "http://www.w3.org/2000/svg";

// --- theme: the system's, until the button is used ---
for (const button of all("[data-theme-button]")) {
  button.hidden = false;
  button.addEventListener("click", () => {
    const set = document.documentElement.dataset.theme;
    const dark = set ? set === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    document.documentElement.dataset.theme = dark ? "light" : "dark";
  });
}

// --- tables: a button in every sortable head ---
function sortBy(table, column, descending) {
  const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
  const numbers = table.tHead.rows[0].cells[column].classList.contains("number");
  const rows = [...table.tBodies[0].rows];
  rows.sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    if (numbers) {
      const [p, q] = [parseFloat(x), parseFloat(y)];
      if (isNaN(p) || isNaN(q)) return isNaN(p) - isNaN(q); // without a value: last, either way
      return descending ? q - p : p - q;
    }
    return (descending ? -1 : 1) * x.localeCompare(y);
  });
  table.tBodies[0].append(...rows);
}
for (const table of all("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    button.title = "sort";
    head.append(button);
    button.addEventListener("click", () => {
      const descending = head.getAttribute("aria-sort") ? head.getAttribute("aria-sort") === "ascending" : head.classList.contains("number");
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      sortBy(table, column, descending);
    });
  });
}

// --- charts: values under the pointer, or under a place that the arrow keys move ---
const tip = document.createElement("div");
tip.className = "tip";
tip.hidden = true;
tip.setAttribute("role", "status");
document.body.append(tip);
function showTip(text, x, y) {
  tip.textContent = text;
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = Math.max(4, Math.min(x + 14, innerWidth - box.width - 4)) + "px";
  tip.style.top = (y + 16 + box.height > innerHeight ? y - box.height - 10 : y + 16) + "px";
}
function mark(svg, name, attributes) {
  let shape = svg.querySelector("[data-mark]");
  if (!shape) {
    shape = document.createElementNS(SVG, name);
    shape.dataset.mark = "";
    svg.append(shape);
  }
  for (const [key, value] of Object.entries(attributes)) shape.setAttribute(key, value);
}
function inSvg(svg, event) {
  const box = svg.getBoundingClientRect();
  return [(event.clientX - box.left) * svg.viewBox.baseVal.width / box.width, (event.clientY - box.top) * svg.viewBox.baseVal.height / box.height];
}
function onScreen(svg, x, y) {
  const box = svg.getBoundingClientRect();
  return [box.left + x * box.width / svg.viewBox.baseVal.width, box.top + y * box.height / svg.viewBox.baseVal.height];
}
const says = value => value === null ? "no value" : String(+value.toPrecision(4));

function readChart(svg) {
  const data = JSON.parse(svg.dataset.chart);
  const [left, right, top, bottom] = data.frame, [low, high] = data.range;
  const places = [...new Set(data.lines.flatMap(line => line.x))].sort((a, b) => a - b);
  return {
    count: [places.length],
    nearest: x => {
      const wanted = low + (x - left) / (right - left) * (high - low);
      let best = 0;
      places.forEach((place, i) => { if (Math.abs(place - wanted) < Math.abs(places[best] - wanted)) best = i; });
      return [best];
    },
    show: ([i]) => {
      const x = left + (places[i] - low) / (high - low) * (right - left);
      mark(svg, "line", { class: "hair", x1: x, x2: x, y1: top, y2: bottom });
      const lines = data.lines.filter(line => line.x.includes(places[i])).map(line => `${line.name}: ${says(line.y[line.x.indexOf(places[i])])}`);
      return [`${data.x} ${says(places[i])}\n${lines.join("\n")}`, x, top];
    },
  };
}
function readMatrix(svg) {
  const data = JSON.parse(svg.dataset.matrix), [left, top] = data.origin, cell = data.cell;
  return {
    count: [data.columns.length, data.rows.length],
    nearest: (x, y) => [Math.floor((x - left) / cell), Math.floor((y - top) / cell)],
    show: ([j, i]) => {
      mark(svg, "rect", { class: "here", x: left + j * cell, y: top + i * cell, width: cell, height: cell });
      return [`${data.row}${data.rows[i]}\n${data.column}${data.columns[j]}\n${says(data.values[i][j])}`, left + (j + 1) * cell, top + (i + 1) * cell];
    },
  };
}
for (const svg of all("svg[data-chart], svg[data-matrix]")) {
  let reader = null, place = null; // read when it is first wanted: a page may hold many
  const show = (wanted, event) => {
    place = wanted.map((v, axis) => Math.max(0, Math.min(v, reader.count[axis] - 1)));
    const [text, x, y] = reader.show(place);
    showTip(text, ...(event ? [event.clientX, event.clientY] : onScreen(svg, x, y)));
  };
  const ready = () => { reader ??= svg.dataset.chart ? readChart(svg) : readMatrix(svg); };
  const leave = () => { place = null; tip.hidden = true; svg.querySelector("[data-mark]")?.remove(); };
  svg.addEventListener("pointermove", event => { ready(); show(reader.nearest(...inSvg(svg, event)), event); });
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("blur", leave);
  svg.addEventListener("keydown", event => {
    const step = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] }[event.key];
    if (event.key === "Escape") leave();
    if (!step) return;
    ready();
    if (reader.count.length === 1 && step[1]) return; // up and down scroll the page, where they have no other use
    event.preventDefault();
    show(place ? place.map((v, axis) => v + step[axis]) : reader.count.map(() => 0));
  });
}

// --- charts of which one of several is shown ---
for (const select of all("select[data-shows]")) {
  const show = () => all(`[data-group="${select.dataset.shows}"]`).forEach(part => { part.hidden = part.dataset.part !== select.value; });
  select.addEventListener("change", show);
  show();
}

// --- the gallery: by class, by what happened, by score ---
for (const gallery of all("[data-gallery]")) {
  const [byClass, byEvent, score, count] = ["class", "event", "score", "count"].map(name => gallery.querySelector(`[data-filter="${name}"]`));
  const apply = () => {
    let shown = 0;
    const cards = all(".card", gallery);
    for (const card of cards) {
      const fits = (!byClass.value || JSON.parse(card.dataset.classes).includes(byClass.value)) && (!byEvent.value || JSON.parse(card.dataset.events).includes(byEvent.value));
      card.hidden = !fits;
      shown += fits;
    }
    for (const box of all("g[data-score]", gallery)) box.toggleAttribute("hidden", +box.dataset.score < +score.value);
    gallery.querySelector("[data-score-now]").textContent = (+score.value).toFixed(2);
    count.textContent = `${shown} of ${cards.length} images`;
  };
  gallery.querySelector(".controls").hidden = false;
  for (const control of [byClass, byEvent]) control.addEventListener("change", apply);
  score.addEventListener("input", apply);
  apply();
}

// --- dialogs: a button opens one; Escape, its own button and a click beside it close it ---
for (const button of all("[data-opens]")) {
  const dialog = document.getElementById(button.dataset.opens);
  button.addEventListener("click", () => dialog.showModal());
  dialog.addEventListener("click", event => { if (event.target === dialog) dialog.close(); });
}
