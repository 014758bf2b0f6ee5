// Drawing with SVG: elements, scales, axes, labels that do not overlap, the tooltip. Text is set as text and never parsed.
"use strict";

const SVG = "http://www.w3.org/2000/svg";

function el(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

function svg(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

function fill(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

// Colours: `ramp(t)` for t from 0 to 1 goes from light yellow through blue-green to dark blue; ordered in lightness, so that it
// is read without colour vision. `inkOn` is the colour of text on it.
const STOPS = [[255, 241, 168], [168, 219, 148], [82, 178, 160], [38, 122, 158], [37, 66, 130], [38, 20, 76]];
const DIVERGING = [[33, 90, 160], [140, 184, 222], [244, 244, 244], [240, 165, 120], [168, 48, 18]];

function between(stops, t) {
  const at = Math.max(0, Math.min(1, t)) * (stops.length - 1);
  const i = Math.min(Math.floor(at), stops.length - 2);
  return stops[i].map((x, k) => Math.round(x + (stops[i + 1][k] - x) * (at - i)));
}

const css = (rgb) => `rgb(${rgb.join(",")})`;
const ramp = (t) => between(STOPS, t);

function luminance(rgb) {
  const [r, g, b] = rgb.map((x) => (x / 255 <= 0.03928 ? x / 255 / 12.92 : ((x / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

const inkOn = (rgb) => (luminance(rgb) > 0.18 ? "#000000" : "#ffffff");

// A scale maps numbers to pixels; `ticks` are [value, text].
function linear(low, high, from, to) {
  if (!(high > low)) [low, high] = [low - (Math.abs(low) || 1) * 0.05, high + (Math.abs(high) || 1) * 0.05];
  const at = (x) => from + ((x - low) / (high - low)) * (to - from);
  const ticks = (n) => {
    const raw = (high - low) / Math.max(n, 1);
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((k) => k * power).find((k) => k >= raw * 0.999);
    const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
    const list = [];
    for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) {
      list.push([k * step, (k * step || 0).toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits })]);
    }
    return list;
  };
  return { at, ticks, low, high };
}

const RAISED = "⁰¹²³⁴⁵⁶⁷⁸⁹";
const raised = (n) => (n < 0 ? "⁻" : "") + [...String(Math.abs(n))].map((d) => RAISED[d]).join("");

function logarithmic(low, high, from, to) {
  if (!(high > low * 1.0001)) [low, high] = [low / 2, high * 2];
  const [a, b] = [Math.log10(low), Math.log10(high)];
  const at = (x) => from + ((Math.log10(Math.max(x, 1e-30)) - a) / (b - a)) * (to - from);
  const ticks = (n) => {
    const first = Math.ceil(a - 1e-9), last = Math.floor(b + 1e-9);
    const every = Math.max(1, Math.ceil((last - first + 1) / Math.max(n, 1)));
    const list = [];
    if (b - a < 2) {
      for (let k = first - 1; k <= last; k++) {
        for (const m of b - a < 0.7 ? [1, 1.5, 2, 3, 4, 5, 6, 8] : [1, 2, 5]) {
          const value = m * 10 ** k;
          if (value >= low * 0.999 && value <= high * 1.001) list.push([value, plain(value)]);
        }
      }
      return list;
    }
    for (let k = first; k <= last; k += every) list.push([10 ** k, `10${raised(k)}`]);
    return list;
  };
  return { at, ticks, low, high };
}

function plain(value) {
  if (value === 0) return "0";
  if (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e7) {
    const [mantissa, power] = value.toExponential(2).split("e");
    return `${Number(mantissa)}·10${raised(Number(power))}`;
  }
  return value >= 1000 ? Math.round(value).toLocaleString("en-US") : String(Number(value.toPrecision(3)));
}

const overlaps = (a, b) => a.x < b.x + b.width && b.x < a.x + a.width && a.y < b.y + b.height && b.y < a.y + a.height;

// Writes each label [anchors, text, class] next to one of its anchors [x, y], where it meets no other text and the fewest of
// `marks` [x, y]; a label for which there is no place is left out: the tooltip has it.
function placeLabels(root, frame, labels, marks) {
  const taken = [...root.querySelectorAll("text")].map((text) => text.getBBox());
  const sides = [[1, -1], [-1, -1], [1, 1], [-1, 1], [0, -1], [0, 1], [1, 0], [-1, 0]];
  for (const [anchors, text, kind] of labels) {
    const node = svg("text", { class: "label", style: `fill: var(--${kind})` }, text);
    root.append(node);
    const { width, height } = node.getBBox();
    let best = null;
    for (const [x, y] of anchors) {
      for (const away of [6, 16, 28, 42]) {
        for (const [dx, dy] of sides) {
          const box = { x: x + dx * away - (dx < 0 ? width : dx ? 0 : width / 2), y: y + dy * away - (dy < 0 ? height : dy ? 0 : height / 2), width, height };
          const inside = box.x >= frame.left + 2 && box.x + width <= frame.right - 2 && box.y >= frame.top + 2 && box.y + height <= frame.bottom - 2;
          if (!inside || taken.some((other) => overlaps(box, other))) continue;
          const covered = marks.filter(([px, py]) => px > box.x - 5 && px < box.x + width + 5 && py > box.y - 5 && py < box.y + height + 5).length;
          const cost = covered + away / 40;
          if (best === null || cost < best.cost) best = { ...box, cost };
        }
      }
    }
    if (best === null) {
      node.remove();
      continue;
    }
    node.setAttribute("x", best.x);
    node.setAttribute("y", best.y + height * 0.8);
    taken.push(best);
  }
}

// Axes in `figure`: returns {root, x, y, frame}; `make` gets [from, to] in pixels and returns a scale.
function axes(figure, { title, about, height = 300, left = 58, right = 14, makeX, makeY, xLabel, yLabel, name }) {
  const width = Math.max(figure.clientWidth, 260);
  figure.replaceChildren(el("figcaption", {}, title, " ", el("small", {}, about || "")));
  const frame = { left, right: width - right, top: 10, bottom: height - 44 };
  const root = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": name || title });
  figure.append(root);
  const x = makeX(frame.left, frame.right), y = makeY(frame.bottom, frame.top);
  root.append(svg("rect", { class: "frame", x: frame.left, y: frame.top, width: frame.right - frame.left, height: frame.bottom - frame.top }));
  let end = -1e9;
  for (const [value, text] of x.ticks(Math.max(2, Math.floor((frame.right - frame.left) / 75)))) {
    const at = x.at(value);
    root.append(svg("line", { class: "grid", x1: at, x2: at, y1: frame.top, y2: frame.bottom }));
    const label = svg("text", { class: "axis", x: at, y: frame.bottom + 16, "text-anchor": "middle" }, text);
    root.append(label);
    const box = label.getBBox();
    if (box.x < end + 6 || box.x + box.width > width) label.remove();
    else end = box.x + box.width;
  }
  let floor = 1e9;
  for (const [value, text] of y.ticks(Math.max(2, Math.floor((frame.bottom - frame.top) / 40)))) {
    const at = y.at(value);
    root.append(svg("line", { class: "grid", x1: frame.left, x2: frame.right, y1: at, y2: at }));
    if (at > floor - 14) continue;
    root.append(svg("text", { class: "axis", x: frame.left - 7, y: at + 4, "text-anchor": "end" }, text));
    floor = at;
  }
  const middle = (frame.top + frame.bottom) / 2;
  root.append(
    svg("text", { class: "axis", x: (frame.left + frame.right) / 2, y: height - 8, "text-anchor": "middle" }, xLabel),
    svg("text", { class: "axis", transform: `translate(13 ${middle}) rotate(-90)`, "text-anchor": "middle" }, yLabel),
  );
  return { root, x, y, frame };
}

// Many dots in one element: thousands stay fluid.
function dots(root, x, y, points, color, size = 5) {
  const path = points.map(([a, b]) => `M${x.at(a).toFixed(1)} ${y.at(b).toFixed(1)}h0`).join("");
  root.append(svg("path", { d: path, stroke: color, "stroke-width": size, "stroke-linecap": "round", fill: "none", "stroke-opacity": 0.75, "pointer-events": "none" }));
}

function polyline(root, points, attributes) {
  if (points.length < 2) return;
  const path = points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");
  root.append(svg("path", { d: path, fill: "none", "pointer-events": "none", ...attributes }));
}

const tip = document.getElementById("tip");

// Shows `title` and (label, text) pairs next to the mouse or to an element.
function showTip(event, title, facts) {
  tip.replaceChildren(el("b", {}, title), el("dl", {}, ...facts.flatMap(([label, text]) => [el("dt", {}, label), el("dd", {}, text)])));
  tip.hidden = false;
  const box = event.target.getBoundingClientRect();
  const [x, y] = event.clientX === undefined ? [box.right, box.bottom] : [event.clientX, event.clientY];
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, x + 16 + width > innerWidth ? x - width - 12 : x + 16)}px`;
  tip.style.top = `${Math.max(4, y + 14 + height > innerHeight ? y - height - 10 : y + 14)}px`;
}

const hideTip = () => { tip.hidden = true; };

// Rows of cells, each a text or a node; `numeric` are the columns set right.
function fillTable(table, header, rows, numeric = []) {
  const cell = (tag, value, i) => el(tag, { class: numeric.includes(i) ? "n" : i === 0 ? "what" : null, scope: tag === "th" ? "col" : null }, value);
  table.replaceChildren(
    el("thead", {}, el("tr", {}, ...header.map((text, i) => cell("th", text, i)))),
    el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map((value, i) => cell("td", value, i))))),
  );
}
