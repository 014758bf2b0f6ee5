// The page of a run: reads the data from the element "content" and fills the sections.
"use strict";

const data = JSON.parse(document.getElementById("content").textContent);
const by = (id) => document.getElementById(id);
const q = data.quality, points = data.points, MB = data.float_bytes >= 4e6;
const SPLITS = { search: "front, search split", confirm: "front, confirm split", trained: "trained, confirm split" };
const confirmed = points.some((p) => p.scores.confirm), trained = points.some((p) => p.scores.trained);
const shown = { search: true, confirm: confirmed, trained, tried: true, uniform: points.some((p) => p.uniform) };
let across = "size_bytes";
let chosen = data.picked;

const scaleOf = (column) => (column === "size_bytes" ? (MB ? 1e-6 : 1e-3) : 1);
const labelOf = (column) => (column === "size_bytes" ? `size of all tensors (${MB ? "MB" : "kB"})` : column === "average_bits" ? "average bits per weight" : column.replaceAll("_", " "));
const costOf = (p, column) => (column === "size_bytes" ? p.bytes : column === "average_bits" ? p.bits : p.costs[column]) * scaleOf(column);
const nameOf = (p) => [p.picked ? "picked point" : p.uniform ? `uniform ${p.uniform}` : "point of the front", ...p.notes].join("; ");

function range(values, margin = 0.04) {
  const kept = values.filter((v) => v !== null && Number.isFinite(v));
  const [low, high] = [Math.min(...kept), Math.max(...kept)];
  return [low - margin * (high - low || Math.abs(low) || 1), high + margin * (high - low || Math.abs(high) || 1)];
}

function logRange(values) {
  const kept = values.filter((v) => v > 0 && Number.isFinite(v)).map((v) => Math.max(v, 1e-10));
  if (!kept.length) return [1e-6, 1];
  const [low, high] = [Math.min(...kept), Math.max(...kept)];
  const margin = (high / low) ** 0.05 * 1.05;
  return [low / margin, high * margin];
}

// Cut a quality axis so that points at chance level do not flatten the others; the `ends` of intervals of the others fit in.
function qualityRange(values, intervals) {
  const kept = values.filter((v) => v !== null && Number.isFinite(v)).map((v) => q.sign * v).sort((a, b) => a - b);
  const best = kept[kept.length - 1], middle = kept[Math.floor(kept.length / 2)], point = 0.01 * Math.abs(best);
  const worst = Math.max(kept[0], middle - 4 * Math.max(best - middle, point) - 4 * point);
  const inside = intervals.filter(([v]) => q.sign * v >= worst).flatMap(([, low, high]) => [q.sign * low, q.sign * high]);
  const bottom = Math.min(worst, ...inside), top = Math.max(best, ...inside);
  const ends = [bottom - 0.05 * (top - bottom) - 0.05 * point, top + 0.07 * (top - bottom) + 0.05 * point].map((v) => q.sign * v);
  return ends.sort((a, b) => a - b);
}

// The ends of an interval of a difference, added to the float model's share, may be beyond 0 and 1.
const bounded = (v) => (q.scale === 100 ? Math.max(0, Math.min(1, v)) : v);
const spread = (n) => Array.from({ length: n }, (_, i) => (i + 0.5) / n);
const visible = () => points.filter((p) => (p.uniform && shown.uniform) || p.front || p.picked);
const splitsShown = () => ["search", "confirm", "trained"].filter((split) => shown[split]);

// Whether the qualities of the two splits are so far apart that one axis would flatten both.
function splitsDiffer() {
  if (!shown.search || !shown.confirm) return false;
  const [a, b] = ["search", "confirm"].map((split) => qualityRange(visible().flatMap((p) => (p.scores[split] ? [p.scores[split].quality] : [])), []));
  return Math.max(a[1], b[1]) - Math.min(a[0], b[0]) > 2.5 * Math.max(a[1] - a[0], b[1] - b[0]);
}

function frontChart(figure, column, isLoss, splits) {
  const list = visible(), scale = isLoss ? 1 : q.scale;
  const value = (p, split, key) => (p.scores[split] && p.scores[split][key] !== null ? p.scores[split][key] * (isLoss ? 1 : scale) : null);
  const key = isLoss ? "loss" : "quality";
  const tried = shown.tried && splits.includes("search") ? data.tried[column].map((c, i) => [c * scaleOf(column), data.tried[key][i] * scale]) : [];
  const values = list.flatMap((p) => splits.map((split) => value(p, split, key))).filter((v) => v !== null);
  const floats = isLoss ? [] : Object.entries(data.baselines).filter(([split]) => splits.includes(split)).map(([split, b]) => [split, b.quality * scale]);
  const intervals = list.flatMap((p) => (splits.includes("confirm") && p.scores.confirm ? [["quality", "low", "high"].map((end) => bounded(p.scores.confirm[end]) * scale)] : []));
  const [low, high] = isLoss ? logRange(values) : qualityRange([...values, ...floats.map(([, v]) => v)], intervals);
  const budgets = Object.entries(data.budgets[column] || {}).map(([name, at]) => [name, at * scaleOf(column)]);
  const costs = range([...list.map((p) => costOf(p, column)), ...budgets.map(([, at]) => at)]);
  const { root, x, y, frame } = axes(figure, {
    title: isLoss ? "Loss" : q.label, about: isLoss ? "lower left is better" : (splits.includes("confirm") ? "bars: 95 % intervals" : `${splits[0] || ""} split`) + (q.sign < 0 ? "; lower is better" : ""),
    height: 340, makeX: (a, b) => linear(...costs, a, b), makeY: (a, b) => (isLoss ? logarithmic(low, high, a, b) : linear(low, high, a, b)),
    xLabel: labelOf(column), yLabel: isLoss ? data.loss : q.label,
  });
  const inside = ([a, b]) => a >= costs[0] && a <= costs[1] && b >= low && b <= high;
  dots(root, x, y, tried.filter(inside), "var(--tried)", 4);
  const labels = [], marks = [];
  for (const [name, at] of budgets) {
    root.append(svg("line", { x1: x.at(at), x2: x.at(at), y1: frame.top, y2: frame.bottom, stroke: "var(--ink)", "stroke-dasharray": "2 3" }));
    labels.push([[0.1, 0.5, 0.8].map((share) => [x.at(at), frame.top + share * (frame.bottom - frame.top)]), name, "ink"]);
  }
  for (const [split, v] of floats) {
    root.append(svg("line", { x1: frame.left, x2: frame.right, y1: y.at(v), y2: y.at(v), stroke: `var(--${split})`, "stroke-dasharray": "7 4" }));
    labels.push([spread(12).map((share) => [frame.left + share * (frame.right - frame.left), y.at(v)]), `float, ${split}`, split]);
  }
  for (const split of splits) {
    const measured = list.filter((p) => value(p, split, key) !== null);
    const place = (p) => [x.at(costOf(p, column)), y.at(value(p, split, key))];
    const line = measured.filter((p) => p.front && inside([costOf(p, column), value(p, split, key)])).map(place);
    const joined = isLoss && data.objectives.length === 1 && split !== "trained";
    if (joined) polyline(root, line, { stroke: `var(--${split})`, "stroke-width": 1.4, "stroke-opacity": 0.7 });
    if (!isLoss && split !== "search") drawIntervals(root, measured, split, place, y, scale, frame);
    for (const p of measured) {
      const [a, b] = place(p);
      if (!inside([costOf(p, column), value(p, split, key)])) continue;
      root.append(marker(p, split, a, b));
      marks.push([a, b]);
      if (p.uniform && split === (splits.includes("confirm") && p.scores.confirm ? "confirm" : "search")) labels.push([[[a, b]], p.uniform, "uniform"]);
    }
    if (line.length) labels.push([spread(12).map((share) => line[Math.floor(share * (line.length - 1))]), SPLITS[split], split]);
  }
  placeLabels(root, frame, labels, marks);
}

function drawIntervals(root, measured, split, place, y, scale, frame) {
  const every = Math.ceil(measured.length / 30);
  measured.forEach((p, i) => {
    const { low, high } = p.scores[split];
    if ((i % every && !p.picked && !p.uniform) || low === null || high === null) return;
    const clip = (v) => Math.max(frame.top, Math.min(frame.bottom, y.at(bounded(v) * scale)));
    const [at] = place(p);
    root.append(svg("line", { x1: at, x2: at, y1: clip(low), y2: clip(high), stroke: `var(--${split})`, "stroke-opacity": 0.55, "pointer-events": "none" }));
  });
}

// A point that can be hovered over, focused and clicked.
function marker(p, split, x, y) {
  const i = points.indexOf(p);
  const shape = p.uniform && !p.front ? `M${x - 5} ${y - 5}h10v10h-10z` : split === "search" ? `M${x - 4.5} ${y}a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0z`
    : split === "confirm" ? `M${x} ${y - 6}l6 6l-6 6l-6 -6z` : `M${x} ${y - 7}l2 5h5l-4 3l2 5l-5 -3l-5 3l2 -5l-4 -3h5z`;
  const color = p.uniform && !p.front ? "uniform" : split;
  const show = (event) => showTip(event, nameOf(p), p.facts);
  return svg("path", {
    class: "mark", d: shape, style: `fill: var(--${color})`, role: "button", tabindex: i === chosen ? 0 : -1, "data-point": i, "data-split": split,
    "aria-label": `${nameOf(p)}, ${split} split: ${p.facts.map((fact) => fact.join(" ")).join("; ")}`,
    onmousemove: show, onfocus: show, onmouseleave: hideTip, onblur: hideTip, onclick: () => choose(i, true), onkeydown: (event) => keys(event, i),
  });
}

// Arrow keys move along the points of one chart and split; Enter selects.
function keys(event, i) {
  if (event.key === "Enter" || event.key === " ") {
    event.preventDefault();
    choose(i, true);
  }
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  if (!step) return;
  event.preventDefault();
  const own = event.target, alike = [...own.ownerSVGElement.querySelectorAll(`[data-split="${own.dataset.split}"]`)];
  const next = alike[alike.indexOf(own) + step];
  if (next) {
    own.setAttribute("tabindex", -1);
    next.setAttribute("tabindex", 0);
    next.focus();
  }
}

function drawFront() {
  const splits = splitsShown(), apart = splitsDiffer();
  by("c-search").hidden = !apart;
  frontChart(by("c-loss"), across, true, splits);
  frontChart(by("c-quality"), across, false, apart ? splits.filter((split) => split !== "search") : splits);
  if (apart) frontChart(by("c-search"), across, false, ["search"]);
  ring();
}

function ring() {
  document.querySelectorAll(".ring").forEach((node) => node.remove());
  document.querySelectorAll(`.mark[data-point="${chosen}"]`).forEach((node) => {
    const box = node.getBBox();
    node.ownerSVGElement.append(svg("circle", { class: "ring", cx: box.x + box.width / 2, cy: box.y + box.height / 2, r: 10 }));
  });
}

function controls() {
  const box = (key, text) => el("label", {}, el("input", { type: "checkbox", checked: shown[key], onchange: (event) => { shown[key] = event.target.checked; drawFront(); } }), el("i", { style: `background: var(--${key})` }), text);
  const columns = [...new Set(["size_bytes", ...data.objectives, "average_bits"])];
  const choice = el("select", { "aria-label": "Horizontal axis", onchange: (event) => { across = event.target.value; drawFront(); } }, ...columns.map((c) => el("option", { value: c }, labelOf(c))));
  by("controls").append(
    box("search", "search split"), confirmed ? box("confirm", "confirm split") : "", trained ? box("trained", "trained") : "",
    box("tried", `${data.tried.total.toLocaleString("en-US")} allocations tried`), shown.uniform ? box("uniform", "uniform allocations") : "", el("label", {}, "across:", choice),
  );
}

// The selected point: its numbers, size, commands and layers.
function choose(i, byHand) {
  chosen = i;
  const p = points[i];
  if (byHand) history.replaceState(null, "", `#point=${p.id}`);
  by("h-point").textContent = `Selected: ${nameOf(p)}`;
  by("facts").replaceChildren(...[["id", p.id], ...p.facts].flatMap(([label, text]) => [el("dt", {}, label), el("dd", {}, text)]));
  by("commands").replaceChildren(...data.command.map((c) => command(c.purpose, c.id ? c.before + p.id + c.after : c.before)));
  document.querySelectorAll("#t-recommended tbody tr").forEach((row) => row.classList.toggle("chosen", Number(row.dataset.point) === i));
  waterfall(i);
  pointMap(i);
  ring();
}

function command(purpose, text) {
  const button = el("button", { type: "button", "aria-label": `Copy the command: ${purpose}` }, "Copy");
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(button.previousSibling);
      button.textContent = "Press Ctrl+C";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1800);
  });
  return el("div", { class: "command" }, el("span", {}, purpose), el("code", { tabindex: 0 }, text), button);
}

const codes = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";
const choicesOf = (i) => (data.allocations[i] === null ? null : [...data.allocations[i]].map((c) => codes.indexOf(c)));
const bytesText = (n) => (n >= 1e9 ? `${(n / 1e9).toPrecision(3)} GB` : n >= 1e6 ? `${(n / 1e6).toPrecision(3)} MB` : n >= 1e3 ? `${(n / 1e3).toPrecision(3)} kB` : `${Math.round(n)} bytes`);

// Codes, scales and float tensors, each bar beginning where the one before ends.
function waterfall(i) {
  const figure = by("c-size"), choice = choicesOf(i);
  const rows = choice === null ? [] : Object.entries(data.parts).map(([name, table]) => [name, choice.reduce((sum, s, g) => sum + table[g][s], 0)]).filter(([, n]) => n > 0);
  if (data.other_bytes > 0) rows.push(["tensors that stay float", data.other_bytes]);
  const total = points[i].bytes;
  if (choice === null) rows.unshift(["quantized layers", total - data.other_bytes]);
  const width = Math.max(figure.clientWidth, 260), left = 158, right = 128, high = 26;
  const root = svg("svg", { width, height: (rows.length + 1) * high + 4, role: "img", "aria-label": rows.map(([name, n]) => `${name}: ${Math.round(n)} bytes`).join(", ") });
  const at = (n) => (n / total) * (width - left - right);
  let before = 0;
  [...rows, ["total", total]].forEach(([name, n], r) => {
    const start = name === "total" ? 0 : before, share = (100 * n) / total;
    const y = r * high + 2, x = left + at(start);
    root.append(
      svg("text", { class: "axis", x: left - 8, y: y + 16, "text-anchor": "end" }, name),
      svg("rect", { x, y: y + 3, width: Math.max(at(n), 1), height: high - 8, rx: 2, style: `fill: var(--${name === "total" ? "uniform" : name.includes("float") ? "float" : "search"})` }),
      svg("text", { x: x + Math.max(at(n), 1) + 6, y: y + 16 }, `${bytesText(n)}${name === "total" ? "" : `, ${share < 0.1 ? "<0.1" : share.toFixed(1)} %`}`),
    );
    before = start + n;
  });
  figure.replaceChildren(el("figcaption", {}, "Size ", el("small", {}, `of ${bytesText(data.float_bytes)} in float32`)), root);
}

const bitsRange = [Math.min(...data.schemes.map((s) => s.bits)), Math.max(...data.schemes.map((s) => s.bits), 1)];
// Few bits are light; by their logarithm, since 2 and 3 bits differ more than 15 and 16.
const colorOfBits = (bits) => ramp(bitsRange[0] === bitsRange[1] ? 0.5 : Math.log(bits / bitsRange[0]) / Math.log(bitsRange[1] / bitsRange[0]));
const unique = data.schemes.length === new Set(data.schemes.map((s) => s.bits)).size;
const sensitivityText = (group, scheme) => { const v = data.sensitivity.values[group][scheme]; return v === null ? "not measured" : plain(v); };

function layerFacts(layer, scheme) {
  const [, group, kind, shape, numel] = data.layers[layer];
  const facts = [["kind", kind], ["weight", `${shape} = ${numel.toLocaleString("en-US")}`]];
  if (data.groups[group][0] !== data.layers[layer][0]) facts.push(["group", data.groups[group][0]]);
  if (scheme === null) return facts;
  facts.push(["scheme", data.schemes[scheme].name], ["bits per weight, with scales", (data.storage[group][scheme] / Math.max(data.groups[group][1], 1)).toFixed(3)]);
  facts.push([`sensitivity, ${data.sensitivity.label}`, sensitivityText(group, scheme)]);
  return facts;
}

function pointMap(i) {
  const choice = choicesOf(i), host = by("map");
  if (choice === null) {
    host.replaceChildren(el("p", { class: "note" }, "The page holds the allocations of a part of this long front; front.csv has this one."));
    fillTable(by("t-layers"), ["layer"], []);
    return;
  }
  const scheme = (layer) => choice[data.layers[layer][1]];
  const used = [...new Set(choice)].sort((a, b) => data.schemes[a].bits - data.schemes[b].bits);
  const count = (s) => data.layers.filter((_, layer) => scheme(layer) === s).length;
  const legend = el("div", { class: "legend" }, ...used.map((s) => el("span", {}, el("i", { style: `background: ${css(colorOfBits(data.schemes[s].bits))}` }), `${data.schemes[s].name}: ${data.schemes[s].about} (${count(s)} layers)`)));
  const map = el("div");
  host.replaceChildren(legend, map);
  drawMap(map, data, (layer) => {
    const s = data.schemes[scheme(layer)];
    return { color: colorOfBits(s.bits), text: unique ? String(s.bits) : s.name, title: data.layers[layer][0], facts: layerFacts(layer, scheme(layer)) };
  });
  const fillLayers = () => fillTable(by("t-layers"), ["layer", "kind", "weight", "scheme", "bits with scales", "sensitivity"], data.layers.map(([name, group, kind, shape], layer) =>
    [name, kind, shape, data.schemes[scheme(layer)].name, (data.storage[group][scheme(layer)] / Math.max(data.groups[group][1], 1)).toFixed(3), sensitivityText(group, scheme(layer))]), [4, 5]);
  const details = by("t-layers").closest("details");
  details.ontoggle = () => { if (details.open) fillLayers(); };
  if (details.open) fillLayers();
}

// Sensitivities: schemes by layers where the names fit, else on the map of the network, a scheme at a time.
function sensitivities() {
  const host = by("s-map"), values = data.sensitivity.values;
  const positive = values.flat().filter((v) => v !== null && v > 0);
  if (!positive.length) {
    host.replaceChildren(el("p", { class: "note" }, "No sensitivity is positive."));
    return;
  }
  const [low, high] = [Math.min(...positive), Math.max(...positive)].map(Math.log10);
  const paint = (v) => (v > 0 ? ramp(high > low ? (Math.log10(v) - low) / (high - low) : 0.5) : null);
  const about = `${data.sensitivity.label} of each layer quantized alone, from ${plain(10 ** low)} (light) to ${plain(10 ** high)} (dark)`;
  const schemes = data.schemes.map((s) => s.name);
  if (data.groups.length * 14 <= Math.max(host.clientWidth, 260) - 60) {
    const figure = el("figure");
    host.replaceChildren(figure);
    drawMatrix(figure, {
      title: "Sensitivity", about, rowNames: schemes, columnNames: data.groups.map(([name]) => name), values: schemes.map((_, s) => values.map((row) => row[s])), paint,
      tipOf: (s, g) => [data.groups[g][0], [["scheme", schemes[s]], [data.sensitivity.label, sensitivityText(g, s)]]],
    });
    return;
  }
  const map = el("div");
  const draw = (s) => drawMap(map, data, (layer) => {
    const v = values[data.layers[layer][1]][s];
    return { color: v === null ? null : paint(v), text: "", title: data.layers[layer][0], facts: [...layerFacts(layer, null), [`${data.sensitivity.label} at ${schemes[s]}`, v === null ? "not measured" : plain(v)]] };
  });
  const select = el("select", { onchange: (event) => draw(Number(event.target.value)) }, ...schemes.map((name, s) => el("option", { value: s }, name)));
  host.replaceChildren(el("p", { class: "note" }, `${about}.`), el("div", { class: "controls" }, el("label", {}, "scheme:", select)), map);
  draw(0);
}

function searchCharts() {
  const { predicted, measured, tau } = data.predicted;
  const pairs = predicted.map((p, i) => [p, measured[i]]).filter(([p, m]) => p > 0 && m > 0);
  if (pairs.length > 2) {
    const ends = logRange(pairs.flat());
    const { root, x, y, frame } = axes(by("c-predicted"), {
      title: "Predicted and measured loss", about: tau === null ? "" : `Kendall's τ ${tau.toFixed(2)}`, makeX: (a, b) => logarithmic(...ends, a, b), makeY: (a, b) => logarithmic(...ends, a, b),
      xLabel: "predicted from the sensitivities", yLabel: "measured, search split",
    });
    root.append(svg("line", { x1: frame.left, y1: frame.bottom, x2: frame.right, y2: frame.top, stroke: "var(--soft)", "stroke-dasharray": "4 4" }));
    dots(root, x, y, pairs, "var(--search)", 4.5);
  } else by("c-predicted").remove();
  const growth = data.hypervolume;
  for (const [id, key, label] of [["c-evaluations", "evaluations", "evaluations"], ["c-seconds", "seconds", "seconds of evaluation"]]) {
    if (!growth || growth.volumes.length < 2) {
      by(id).remove();
      continue;
    }
    const { root, x, y } = axes(by(id), {
      title: "Hypervolume", about: "search split", makeX: (a, b) => linear(0, Math.max(...growth[key]), a, b), makeY: (a, b) => linear(...range(growth.volumes), a, b),
      xLabel: label, yLabel: "bits × decades of loss",
    });
    polyline(root, growth[key].map((v, i) => [x.at(v), y.at(growth.volumes[i])]), { stroke: "var(--search)", "stroke-width": 2 });
  }
  if (!by("c-predicted") && !by("c-evaluations")) by("search").remove();
}

function interactions() {
  const known = data.interactions;
  if (!known) return;
  by("interactions").hidden = false;
  const most = Math.max(...known.values.flat().map((v) => Math.abs(v || 0)));
  const part = known.names.length < known.total ? `the ${known.names.length} of ${known.total} groups with the strongest; ` : "";
  drawMatrix(by("c-interactions"), {
    title: "Correlation of the layers' errors at the picked point", about: `${part}red: errors add up; blue: they cancel; largest ${most.toFixed(2)}`, rowNames: known.names, columnNames: known.names,
    values: known.values, paint: (v) => between(DIVERGING, 0.5 + (0.5 * v) / most), tipOf: (r, c) => [`${known.names[r]} and ${known.names[c]}`, [["correlation", String(known.values[r][c])]]],
  });
}

function phases() {
  const list = data.phases.filter(([, , , seconds]) => seconds !== null);
  if (!list.length) return;
  by("time").hidden = false;
  const figure = by("c-time"), width = Math.max(figure.clientWidth, 260), left = 150, right = 150, high = 24;
  const most = Math.max(...list.map((p) => p[3]), 0.1), total = list.reduce((sum, p) => sum + p[3], 0);
  const root = svg("svg", { width, height: list.length * high + 4, role: "img", "aria-label": list.map(([what, , , s]) => `${what}: ${s} s`).join(", ") });
  list.forEach(([what, done, steps, seconds, finished, bytes], r) => {
    const memory = bytes ? `, ${plain(bytes / 1e9)} GB` : "";
    const span = Math.max((seconds / most) * (width - left - right), 1), y = r * high;
    root.append(
      svg("text", { class: "axis", x: left - 8, y: y + 16, "text-anchor": "end" }, shortened(what, left - 12)),
      svg("rect", { x: left, y: y + 4, width: span, height: high - 8, rx: 2, style: `fill: var(--${finished ? "search" : "picked"})` }),
      svg("text", { x: left + span + 6, y: y + 16 }, `${plain(seconds)} s${memory}${finished ? "" : `, ${done} of ${steps}`}`),
    );
  });
  const held = Math.max(...list.map((p) => p[5] || 0));
  figure.replaceChildren(el("figcaption", {}, `${plain(total)} s in all${held ? `; memory: at most ${plain(held / 1e9)} GB` : ""}`), root);
}

function tables() {
  const header = ["", "size", "bits", "of float32", q.label, `${q.drop} (95 %)`, ""];
  fillTable(by("t-recommended"), header, data.recommendations.map((r) => [
    r.purpose + (r.certain ? " (shown by the interval)" : ""), ...r.cells, el("button", { type: "button", onclick: () => { choose(r.point, true); by("point").scrollIntoView({ behavior: "smooth" }); } }, "Show")]), [1, 2, 3, 4, 5]);
  document.querySelectorAll("#t-recommended tbody tr").forEach((row, i) => { row.dataset.point = data.recommendations[i].point; });
  fillTable(by("t-saves"), ["", "float model", "picked point", "source"], data.savings);
  by("times").textContent = data.times;
  fillTable(by("t-data"), ["split", "samples", `${q.label} of the float model`], data.splits.rows, [2]);
  by("splits").textContent = data.splits.sentence;
  if (data.verified.rows.length) {
    by("verified").hidden = false;
    fillTable(by("t-verified"), data.verified.header, data.verified.rows);
  }
  if (data.warnings.length) {
    by("warnings").hidden = false;
    by("warnings").append(...data.warnings.map((text) => el("li", {}, text)));
  }
  if (data.running) {
    const [what, done, total] = data.phases[data.phases.length - 1];
    by("running").hidden = false;
    by("running").textContent = `The run is in progress: ${what}, ${done} of ${total}. This page is written again about every minute.`;
  }
}

function theme() {
  const themes = ["system", "light", "dark"];
  let at = 0;
  by("theme").addEventListener("click", () => {
    at = (at + 1) % 3;
    if (at) document.documentElement.dataset.theme = themes[at];
    else delete document.documentElement.dataset.theme;
    by("theme").textContent = `Theme: ${themes[at]}`;
  });
}

function draw() {
  drawFront();
  choose(chosen, false);
  sensitivities();
  searchCharts();
  interactions();
  phases();
}

const linked = points.findIndex((p) => location.hash === `#point=${p.id}`);
if (linked >= 0) chosen = linked;
theme();
controls();
tables();
draw();
let width = innerWidth, waiting = 0;
addEventListener("resize", () => {
  if (innerWidth === width) return;
  width = innerWidth;
  clearTimeout(waiting);
  waiting = setTimeout(draw, 120);
});
