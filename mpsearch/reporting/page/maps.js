// Maps of the network's layers: a grid of blocks and projections, or of stages, in strips that fit the width.
"use strict";

const CELL = 24;

// Draws the sections into `host`. `look(i)` of a layer is {color: [r, g, b] or null, text, title, facts}.
function drawMap(host, data, look) {
  const width = Math.max(host.clientWidth, 260);
  const drawn = data.sections.map((section) => (section.rows.length === 1 && section.rows[0] === "" ? chips(section, data, look, width) : strips(section, data, look, width)));
  host.replaceChildren(el("div", { class: "sections" }, ...drawn));
}

// A section without a name has one only among others.
function section(title, root, data) {
  return el("figure", {}, title || data.sections.length > 1 ? el("figcaption", {}, title || "other layers") : "", root);
}

// One rectangle with the text of a layer, or of several that share a cell.
function layerCell(root, members, look, x, y, width, height) {
  const looks = members.map(look);
  const first = looks[0], alike = looks.every((each) => each.text === first.text);
  const color = first.color, text = alike ? first.text : "…";
  const rect = svg("rect", { class: "cell", x, y, width: width - 2, height: height - 2, rx: 2, fill: color ? css(color) : "var(--panel)", "data-layer": members[0] });
  const show = (event) => showTip(event, members.length > 1 ? `${first.title} and ${members.length - 1} more` : first.title, first.facts);
  rect.addEventListener("mousemove", show);
  rect.addEventListener("mouseleave", hideTip);
  root.append(rect);
  if (text) {
    const label = svg("text", { x: x + (width - 2) / 2, y: y + height / 2 + 3, "text-anchor": "middle", "pointer-events": "none", style: color ? `fill: ${inkOn(color)}` : null }, text);
    root.append(label);
  }
}

const measure = (() => {
  const context = document.createElement("canvas").getContext("2d");
  return (text) => {
    context.font = `12px ${getComputedStyle(document.body).fontFamily}`;
    return context.measureText(text).width * 1.02 + 1;
  };
})();

// A name that is too long loses its middle.
function shortened(text, width) {
  if (measure(text) <= width) return text;
  for (let n = text.length - 1; n > 2; n--) {
    const cut = `${text.slice(0, Math.ceil(n / 2))}…${text.slice(text.length - Math.floor(n / 2))}`;
    if (measure(cut) <= width) return cut;
  }
  return "…";
}

function strips(part, data, look, width) {
  const rows = part.rows.map((row) => row || "weight");
  const cell = Math.max(CELL, ...part.cells.map(([, , i]) => measure(look(i).text || "") + 7));
  const labels = Math.min(Math.max(...rows.map(measure)) + 8, Math.max(90, width * 0.35));
  const each = Math.max(1, Math.floor((width - labels) / cell));
  const n = Math.ceil(part.columns.length / each), height = (rows.length + 1) * CELL;
  const members = new Map();
  for (const [row, column, i] of part.cells) {
    const key = `${row} ${column}`;
    members.set(key, [...(members.get(key) || []), i]);
  }
  const total = labels + Math.min(each, part.columns.length) * cell;
  const root = svg("svg", { width: total, height: n * (height + 8), role: "img", "aria-label": `Layers of ${part.title}: ${rows.length} rows, ${part.columns.length} blocks` });
  const widest = Math.max(...part.columns.map(measure)) + 4, every = Math.ceil(widest / cell);
  for (let strip = 0; strip < n; strip++) {
    const top = strip * (height + 8);
    rows.forEach((row, r) => root.append(svg("text", { class: "axis", x: labels - 6, y: top + (r + 1) * CELL + 15, "text-anchor": "end" }, shortened(row, labels - 8))));
    part.columns.slice(strip * each, (strip + 1) * each).forEach((column, c) => {
      if (c % every === 0) root.append(svg("text", { class: "axis", x: labels + (c + 0.5) * cell - 1, y: top + 16, "text-anchor": "middle" }, column));
    });
  }
  for (const [key, group] of members) {
    const [row, column] = key.split(" ").map(Number);
    const strip = Math.floor(column / each);
    layerCell(root, group, look, labels + (column % each) * cell, strip * (height + 8) + (row + 1) * CELL, cell, CELL);
  }
  return section(part.title, root, data);
}

// Layers without a place in a grid: a box each, with its name, in rows.
function chips(part, data, look, width) {
  const box = Math.max(CELL + 4, ...part.cells.map(([, , i]) => measure(look(i).text || "") + 9));
  const widest = Math.min(Math.max(...part.columns.map(measure)) + 14, 210);
  const each = Math.max(1, Math.min(part.cells.length, Math.floor(width / (box + widest))));
  const rows = Math.ceil(part.cells.length / each);
  const root = svg("svg", { width: each * (box + widest), height: rows * (CELL + 2), role: "img", "aria-label": `${part.cells.length} layers ${part.title}` });
  for (const [, column, i] of part.cells) {
    const x = Math.floor(column / rows) * (box + widest), y = (column % rows) * (CELL + 2);
    layerCell(root, [i], look, x, y, box, CELL);
    root.append(svg("text", { class: "axis", x: x + box + 4, y: y + 15 }, shortened(part.columns[column], widest - 12)));
  }
  return section(part.title, root, data);
}

// A matrix of `values[row][column]` with names; `paint(value)` is a colour. Names that would collide are thinned.
function drawMatrix(figure, { title, about, rowNames, columnNames, values, paint, tipOf, text }) {
  const width = Math.max(figure.clientWidth, 260);
  const labels = Math.min(Math.max(...rowNames.map(measure)) + 10, 190);
  const cell = Math.max(4, Math.min(40, (width - labels) / columnNames.length));
  const high = Math.max(18, Math.min(CELL, cell));
  const names = cell >= 14 ? Math.min(Math.max(...columnNames.map(measure)) + 10, 150) : 0;
  const height = rowNames.length * high + names + 8;
  const root = svg("svg", { width: labels + cell * columnNames.length, height, role: "img", "aria-label": title });
  values.forEach((row, r) => {
    row.forEach((value, c) => {
      const color = value === null ? null : paint(value);
      const rect = svg("rect", { class: "cell", x: labels + c * cell, y: r * high, width: Math.max(cell - 1, 1), height: high - 1, fill: color ? css(color) : "var(--panel)" });
      rect.addEventListener("mousemove", (event) => showTip(event, ...tipOf(r, c)));
      rect.addEventListener("mouseleave", hideTip);
      root.append(rect);
      const said = text && value !== null ? text(value) : "";
      if (said && measure(said) < cell - 3) {
        root.append(svg("text", { x: labels + (c + 0.5) * cell, y: (r + 0.5) * high + 4, "text-anchor": "middle", "pointer-events": "none", style: `fill: ${inkOn(color)}` }, said));
      }
    });
    root.append(svg("text", { class: "axis", x: labels - 6, y: (r + 0.5) * high + 4, "text-anchor": "end" }, shortened(rowNames[r], labels - 10)));
  });
  if (names) {
    columnNames.forEach((name, c) => {
      const x = labels + (c + 0.5) * cell + 4, y = rowNames.length * high + 6;
      root.append(svg("text", { class: "axis", transform: `translate(${x} ${y}) rotate(-90)`, "text-anchor": "end" }, shortened(name, names - 8)));
    });
  }
  figure.replaceChildren(el("figcaption", {}, title, " ", el("small", {}, about || "")), root);
}
