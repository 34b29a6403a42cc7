"use strict";
// Draws the timelines of one shape from the JSON beside it. No network, no state but what is on the page.
const report = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const LEFT = 92, RIGHT = 14, LANE = 24, BAR = 19, HEAD = 34, GAP = 16, TOP = 26;
let shape, view, chosen = null, drag = null;
let shift = new Map();  // per kind of timeline, what counts as its time 0: the start of the block that is looked at

function node(name, attributes = {}, text = "") {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text) made.textContent = text;
  return made;
}
function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}
const us = (x) => (x === null || x === undefined ? "" : `${x >= 100 ? x.toFixed(0) : x.toFixed(1)} us`);
const bytes = (n) => (n >= 1 << 20 ? `${(n / (1 << 20)).toFixed(1)} MiB` : n >= 1024 ? `${(n / 1024).toFixed(1)} KiB` : `${n} B`);
const inBlock = (k) => !byId("block").value || k.blocks.includes(byId("block").value);

// --- what a kernel is, in words ---
function facts(k) {
  const found = [["module", k.classes || k.module], ["call", k.call], ["source", k.source],
    ["stream", `${k.stream}, launched ${k.position + 1}. of ${shape.kernels.length}`],
    ["duration", `${us(k.us)} alone (${shape.basis})`]];
  if (k.host_us !== null) found.push(["on the CPU", us(k.host_us)]);
  for (const line of shape.timelines) {
    const span = line.spans.find((s) => s[0] === k.index);
    if (span) found.push([line.kind, `${us(span[2])} to ${us(span[3])}, ${us(span[3] - span[2])} on stream ${span[1]}` +
      (line.ambiguous.includes(k.index) ? ", may be that of a kernel that looks the same" : "")]);
  }
  const launch = k.launches[0];
  if (launch) found.push(
    ["grid, block", `${launch.grid} blocks of ${launch.block} threads` + (k.launches.length > 1 ? `, and ${k.launches.length - 1} more launches` : "")],
    ["demands", `${launch.registers} registers per thread, ${bytes(launch.shared_memory)} shared memory per block`],
    ["occupancy", `${Math.round(100 * launch.occupancy)} %, ${launch.blocks_per_sm} blocks per SM, limited by ${launch.limited_by}`],
    ["share of the GPU", `${(100 * launch.share).toFixed(1)} %, ${launch.waves.toFixed(2)} waves`]);
  found.push(["bound by", k.memory_bound ? "memory" : "computing"], ["moves", bytes(k.nbytes)]);
  if (k.flops) found.push(["computes", `${(k.flops / 1e6).toFixed(2)} MFLOP`]);
  const waits = shape.waits.filter((w) => w.kernel === k.index);
  if (waits.length) found.push(["waits for", waits.map((w) => `${w.awaited} ${shape.kernels[w.awaited].label} (${w.why})`).join("; ")]);
  if (k.critical) found.push(["critical path", "yes"]);
  return found.filter(([, value]) => value !== "");
}
function card(k) {
  const whole = element("div"), list = element("dl");
  whole.append(element("b", k.critical ? "crit" : "", `${k.index} ${k.label}`));
  for (const [name, value] of facts(k)) list.append(element("dt", "", name), element("dd", "", value));
  whole.append(list);
  return whole;
}

// --- the chart ---
function scale() {
  const width = byId("chart").clientWidth || 1000;
  return { width, x: (t) => LEFT + (t - view[0]) / (view[1] - view[0]) * (width - LEFT - RIGHT),
    t: (x) => view[0] + (x - LEFT) / (width - LEFT - RIGHT) * (view[1] - view[0]) };
}
function ticks(from, to) {
  const rough = (to - from) / 10, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
  const found = [];
  for (let t = Math.ceil(from / step) * step; t <= to; t += step) found.push(Number(t.toPrecision(10)));
  return found;
}
function fitted(label, room) {
  const most = Math.floor((room - 8) / 6.3);
  if (most < 3) return "";
  return label.length <= most ? label : `${label.slice(0, most - 1)}…`;
}
function draw() {
  const { width, x } = scale();
  const svg = node("svg", { role: "img", "aria-label": "Timelines of the kernels" });
  const marker = node("marker", { id: "tipmark", viewBox: "0 0 6 6", refX: 6, refY: 3, markerWidth: 6, markerHeight: 6, orient: "auto" });
  marker.append(node("path", { d: "M0,0 L6,3 L0,6 Z" }));
  const clip = node("clipPath", { id: "inside" }), defs = node("defs");
  const window_ = node("rect", { x: LEFT, y: 0, width: Math.max(1, width - LEFT - RIGHT) });
  clip.append(window_); defs.append(marker, clip); svg.append(defs);
  let y = TOP;
  const grid = node("g"), bars = node("g", { "clip-path": "url(#inside)" });
  svg.append(grid, bars);
  for (const line of shape.timelines) {
    const streams = [...new Set(line.spans.map((s) => s[1]))].sort((a, b) => a - b);
    svg.append(node("text", { x: 10, y: y + 20, class: "title" }, `${line.title}: ${us(line.makespan)}`));
    svg.append(node("text", { x: width - RIGHT, y: y + 20, class: "dim", "text-anchor": "end" },
      fitted(line.note, width - 330 - 8 * line.title.length)));
    y += HEAD;
    const top = new Map(streams.map((s, i) => [s, y + i * LANE]));
    for (const [stream, at] of top) {
      grid.append(node("rect", { x: LEFT, y: at, width: width - LEFT - RIGHT, height: LANE - 3, class: "lane", rx: 3 }));
      svg.append(node("text", { x: 10, y: at + 15, class: "dim" }, `stream ${stream}`));
    }
    const place = new Map();
    const zero = shift.get(line.kind) ?? 0;
    for (const [kernel, stream, begun, ended] of line.spans) {
      const start = begun - zero, end = ended - zero;
      place.set(kernel, [x(start), x(end), top.get(stream) + BAR / 2 + 1]);
      if (end < view[0] || start > view[1]) continue;
      bars.append(...bar(line, shape.kernels[kernel], x(start), x(end), top.get(stream) + 1));
    }
    if (line.kind !== "sequential") for (const wait of shape.waits) {
      const involved = chosen !== null && (wait.kernel === chosen || wait.awaited === chosen);
      if (!place.has(wait.kernel) || !place.has(wait.awaited) || !(involved || byId("arrows").checked)) continue;
      const [, ax, ay] = place.get(wait.awaited), [bx, , by] = place.get(wait.kernel), middle = Math.max(14, (bx - ax) / 2);
      bars.append(node("path", { d: `M${ax},${ay} C${ax + middle},${ay} ${bx - middle},${by} ${bx},${by}`, class: "wait", "marker-end": "url(#tipmark)" }));
    }
    y += streams.length * LANE + GAP;
  }
  for (const t of ticks(...view)) {
    grid.append(node("line", { x1: x(t), x2: x(t), y1: TOP - 6, y2: y - GAP, class: "tick" }));
    svg.append(node("text", { x: x(t), y: 14, class: "dim", "text-anchor": "middle" }, `${shift.size && t >= 0 ? "+" : ""}${t} us`));
  }
  window_.setAttribute("height", y);
  svg.setAttribute("height", y); svg.setAttribute("viewBox", `0 0 ${width} ${y}`);
  svg.dataset.from = view[0]; svg.dataset.to = view[1];
  byId("chart").replaceChildren(svg);
  byId("detail").hidden = chosen === null;
  if (chosen !== null) byId("detail").replaceChildren(card(shape.kernels[chosen]));
}
function bar(line, k, from, to, y) {
  const kind = k.critical ? "critical" : k.kind === "extern" ? "extern" : "triton";
  const unsure = line.ambiguous.includes(k.index) ? " unsure" : "";
  const faded = !inBlock(k) ? " faded" : "", picked = chosen === k.index ? " chosen" : "";
  const width = Math.max(1.2, to - from);
  const made = node("rect", { x: from, y, width, height: BAR, rx: 2, tabindex: 0, "data-k": k.index, "data-timeline": line.kind,
    class: `kernel ${kind}${unsure}${faded}${picked}`, "aria-label": `${k.label}, ${us(k.us)}` });
  const left = Math.max(from, LEFT), text = fitted(k.short, Math.min(to, scale().width - RIGHT) - left);
  return text && !faded ? [made, node("text", { x: left + 4, y: y + 13.5, class: "in" }, text)] : [made];
}

// --- looking around ---
function extent() {
  const first = Math.min(...shape.timelines.map((line) => -(shift.get(line.kind) ?? 0)), 0);
  const last = Math.max(...shape.timelines.map((line) => line.makespan - (shift.get(line.kind) ?? 0)), 1e-3);
  return [first - 0.01 * (last - first), last + 0.01 * (last - first)];
}
function show(from, to) {
  const [low, high] = extent(), least = 0.5, size = Math.min(high - low, Math.max(least, to - from));
  const start = Math.min(Math.max(low, from + (to - from - size) / 2), high - size);
  view = [start, start + size];
  draw();
}
function zoom(factor, around) {
  const middle = around ?? (view[0] + view[1]) / 2;
  show(middle - (middle - view[0]) * factor, middle + (view[1] - middle) * factor);
}
function zoomToBlock() {
  shift = new Map();
  let longest = 0;
  for (const line of byId("block").value ? shape.timelines : []) {
    const spans = line.spans.filter(([k]) => inBlock(shape.kernels[k]));
    // What lays out weights runs far ahead; the block is where its kernels with predecessors are.
    const body = spans.filter(([k]) => shape.kernels[k].depends);
    if (!spans.length) continue;
    const first = Math.min(...(body.length ? body : spans).map((s) => s[2]));
    shift.set(line.kind, first);
    longest = Math.max(longest, Math.max(...spans.map((s) => s[3])) - first);
  }
  if (longest) show(-0.04 * longest, 1.04 * longest); else show(...extent());
}
function choose(index, scroll) {
  chosen = chosen === index && !scroll ? null : index;
  const line = shape.timelines[0], span = line?.spans.find((s) => s[0] === index), zero = shift.get(line?.kind) ?? 0;
  if (scroll && span && (span[3] - zero < view[0] || span[2] - zero > view[1])) {
    const half = (view[1] - view[0]) / 2;
    show(span[2] - zero - half, span[2] - zero + half);
    return;
  }
  draw();
}
const chart = byId("chart"), tip = byId("tip");
function hover(target, x, y) {
  const index = target?.dataset?.k;
  tip.hidden = index === undefined;
  if (tip.hidden) return;
  tip.replaceChildren(card(shape.kernels[index]));
  tip.style.left = `${Math.max(8, Math.min(x + 14, innerWidth - tip.offsetWidth - 12))}px`;
  tip.style.top = `${Math.max(8, y + 18 + tip.offsetHeight > innerHeight ? y - tip.offsetHeight - 12 : y + 18)}px`;
}
chart.addEventListener("wheel", (event) => {
  event.preventDefault();
  const at = scale().t(event.clientX - chart.getBoundingClientRect().left);
  if (Math.abs(event.deltaX) > Math.abs(event.deltaY)) {
    const by = event.deltaX / chart.clientWidth * (view[1] - view[0]);
    show(view[0] + by, view[1] + by);
  } else zoom(event.deltaY > 0 ? 1.25 : 0.8, at);
}, { passive: false });
chart.addEventListener("pointerdown", (event) => { drag = { x: event.clientX, view: [...view], moved: false }; });
addEventListener("pointermove", (event) => {
  if (!drag) { hover(event.target.closest?.("svg .kernel"), event.clientX, event.clientY); return; }
  if (Math.abs(event.clientX - drag.x) > 3) drag.moved = true;
  if (drag.moved) {
    tip.hidden = true;
    const by = (drag.x - event.clientX) / chart.clientWidth * (drag.view[1] - drag.view[0]);
    show(drag.view[0] + by, drag.view[1] + by);
  }
});
addEventListener("pointerup", (event) => {
  if (drag && !drag.moved) { const k = event.target.closest?.("svg .kernel")?.dataset.k; if (k !== undefined) choose(Number(k)); }
  drag = null;
});
chart.addEventListener("focusin", (event) => { const box = event.target.getBoundingClientRect(); hover(event.target, box.left, box.bottom); });
chart.addEventListener("focusout", () => { tip.hidden = true; });
chart.addEventListener("keydown", (event) => { if (event.key === "Enter" && event.target.dataset.k) choose(Number(event.target.dataset.k)); });
addEventListener("keydown", (event) => {
  if (/INPUT|SELECT/.test(event.target.tagName)) return;
  const step = (view[1] - view[0]) / 5;
  if (event.key === "+") zoom(0.6); else if (event.key === "-") zoom(1 / 0.6); else if (event.key === "0") show(...extent());
  else if (event.key === "ArrowLeft") show(view[0] - step, view[1] - step);
  else if (event.key === "ArrowRight") show(view[0] + step, view[1] + step);
  else if (event.key === "Escape") { chosen = null; draw(); }
});
byId("in").onclick = () => zoom(0.6);
byId("out").onclick = () => zoom(1 / 0.6);
byId("all").onclick = () => { byId("block").value = ""; blockChanged(); };
byId("arrows").onchange = draw;
byId("block").onchange = blockChanged;
byId("filter").oninput = kernelTable;
function blockChanged() { zoomToBlock(); pairTable(); pathList(); kernelTable(); }

// --- the tables ---
function table(id, head, rows) {
  const whole = byId(id), top = element("tr");
  for (const [name, number] of head) top.append(element("th", number ? "n" : "", name));
  const body = rows.map(({ cells, kernel, className }) => {
    const row = element("tr", className);
    if (kernel !== undefined) { row.dataset.k = kernel; row.onclick = () => { choose(kernel, true); chart.scrollIntoView({ block: "nearest" }); }; }
    cells.forEach((text, i) => row.append(element("td", head[i][1] ? "n" : "", text)));
    return row;
  });
  whole.replaceChildren(top, ...body);
  if (!rows.length) { const row = element("tr"); row.append(element("td", "empty", "none")); whole.replaceChildren(row); }
}
function pairs(line) {
  const found = [], spans = [...line.spans].sort((a, b) => a[2] - b[2]);
  let active = [];
  for (const span of spans) {
    active = active.filter((s) => s[3] > span[2]);
    for (const other of active) { const both = Math.min(span[3], other[3]) - span[2]; if (both > 0) found.push([other[0], span[0], both]); }
    active.push(span);
  }
  return found.sort((a, b) => b[2] - a[2]);
}
function pairTable() {
  const lines = shape.timelines.filter((line) => line.kind !== "sequential"), shared = new Map();
  lines.forEach((line, i) => { for (const [a, b, t] of pairs(line)) {
    const key = a < b ? `${a},${b}` : `${b},${a}`;
    if (!shared.has(key)) shared.set(key, lines.map(() => 0));
    shared.get(key)[i] = t;
  } });
  const rows = [...shared].map(([key, times]) => ({ pair: key.split(",").map((k) => shape.kernels[k]), times }))
    .filter(({ pair }) => pair.every(inBlock)).sort((a, b) => Math.max(...b.times) - Math.max(...a.times)).slice(0, 200);
  table("pairs", [["kernel"], ["runs beside"], ...lines.map((line) => [`${line.kind}, us`, true])],
    rows.map(({ pair: [a, b], times }) => ({ cells: [`${a.index} ${a.label}`, `${b.index} ${b.label}`, ...times.map((t) => (t ? t.toFixed(1) : ""))], kernel: a.index })));
  byId("pairs-hint").textContent = `Pairs of kernels that run at the same time${byId("block").value ? ` in ${byId("block").value}` : ""}, longest first` +
    " (choose a part of the model above the timeline to see its pairs only).";
}
function pathList() {
  const path = shape.critical.map((k) => shape.kernels[k]);
  byId("path-hint").textContent = path.length ? `${path.length} kernels that need each other's results, ` +
    `${us(path.reduce((sum, k) => sum + k.us, 0))} in all: no schedule of these kernels is faster than that.` : "";
  byId("path").replaceChildren(...path.map((k) => {
    const item = element("li", "", `${k.index} ${k.label}, ${us(k.us)}`);
    item.onclick = () => { choose(k.index, true); chart.scrollIntoView({ block: "nearest" }); };
    if (!inBlock(k)) item.style.opacity = 0.35;
    return item;
  }));
}
function kernelTable() {
  const wanted = byId("filter").value.toLowerCase();
  const rows = [...shape.kernels].sort((a, b) => a.position - b.position)
    .filter((k) => inBlock(k) && `${k.label} ${k.classes} ${k.call} ${k.source}`.toLowerCase().includes(wanted));
  table("kernels", [["", true], ["kernel"], ["source"], ["stream", true], ["us", true], ["grid", true], ["block", true], ["registers", true],
    ["shared", true], ["blocks/SM", true], ["limited by"], ["occupancy", true], ["waves", true], ["GPU", true], ["bound by"]],
  rows.map((k) => {
    const l = k.launches[0];
    const demands = l ? [l.grid, l.block, l.registers, bytes(l.shared_memory), l.blocks_per_sm, l.limited_by, `${Math.round(100 * l.occupancy)} %`,
      l.waves.toFixed(2), `${(100 * l.share).toFixed(1)} %`] : ["", "", "", "", "", "", "", "", ""];
    return { cells: [k.index, k.label, k.place, k.stream, k.us.toFixed(1), ...demands, k.memory_bound ? "memory" : "computing"],
      kernel: k.index, className: k.critical ? "critical" : "" };
  }));
}
function start(number) {
  shape = report.shapes[number]; chosen = null;
  byId("cards").replaceChildren(...shape.cards.map(([value, name]) => {
    const made = element("div", "card"); made.append(element("b", "", value), element("span", "", name)); return made;
  }));
  byId("basis").textContent = shape.basis;
  byId("block").replaceChildren(new Option("all", ""), ...shape.blocks.map(([path, name]) => new Option(name, path)));
  table("tried", [[""], ["streams / launch order"], ["streams", true], ["waits", true], ["predicted", true], ["measured", true]],
    shape.candidates.map((c) => ({ cells: [c.chosen ? "kept" : "", c.policy, c.streams, c.waits, us(c.predicted), us(c.measured)], className: c.chosen ? "kept" : "" })));
  const name = (k) => `${k} ${shape.kernels[k].label}`;
  table("waits", [["kernel"], ["waits for"], ["because"]], shape.waits.map((w) => ({ cells: [name(w.kernel), name(w.awaited), w.why], kernel: w.kernel })));
  shift = new Map(); view = extent(); draw(); pairTable(); pathList(); kernelTable();
}
byId("about").textContent = report.about;
if (report.shapes.length > 1) {
  byId("pick").hidden = false;
  byId("shape").append(...report.shapes.map((s, i) => new Option(s.name, i)));
  byId("shape").onchange = () => start(Number(byId("shape").value));
}
if (report.shapes.length) { start(0); new ResizeObserver(() => draw()).observe(chart); } else {
  for (const section of document.querySelectorAll("main > section")) section.hidden = !section.querySelector("pre");
  byId("cards").hidden = false;
  byId("cards").append(element("p", "empty", "No graph was scheduled."));
}
