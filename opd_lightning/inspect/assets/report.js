"use strict";
// Draws the report from the JSON in this page. No library, no network.
const DATA = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "text", "rect", "image", "g", "title"].includes(tag);
  const node = svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value);
  }
  node.append(...children.filter((c) => c !== null && c !== undefined));
  return node;
}

const show = (x) => {
  if (x === null || x === undefined || Number.isNaN(x)) return "–";
  const size = Math.abs(x);
  if (x === 0) return "0";
  if (size >= 1e5 || size < 1e-3) return x.toExponential(1).replace("e+", "e");
  return String(+x.toPrecision(size >= 1000 ? 5 : 3));
};
const known = (x) => x !== null && x !== undefined;
const mean = (xs) => xs.reduce((a, b) => a + b, 0) / xs.length;
const clamp = (x, low, high) => Math.min(high, Math.max(low, x));

// ---- theme ---------------------------------------------------------------------------------------------------------
{
  const names = ["system", "light", "dark"], button = $("theme");
  let at = 0;
  try { at = Math.max(0, names.indexOf(localStorage.getItem("opd-theme"))); } catch { /* no storage for files */ }
  const apply = () => {
    const name = names[at];
    if (name === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = name;
    button.textContent = `theme: ${name}`;
    button.setAttribute("aria-label", `Colour theme: ${name === "system" ? "as the system" : name}. Press to change.`);
  };
  button.addEventListener("click", () => {
    at = (at + 1) % names.length;
    try { localStorage.setItem("opd-theme", names[at]); } catch { /* the same */ }
    apply();
  });
  apply();
}

// ---- tooltip -------------------------------------------------------------------------------------------------------
const tip = $("tip");
function say(rows, x, y) {
  tip.replaceChildren(...rows);
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = `${clamp(x + 14, 4, innerWidth - box.width - 4)}px`;
  tip.style.top = `${y + 16 + box.height > innerHeight ? y - box.height - 10 : y + 16}px`;
}
const hush = () => { tip.hidden = true; };
document.addEventListener("keydown", (e) => { if (e.key === "Escape") hush(); });
addEventListener("scroll", hush, { passive: true });

// ---- axes ----------------------------------------------------------------------------------------------------------
const W = 420, H = 236, LEFT = 46, RIGHT = 8, TOP = 8, BOTTOM = 26;

function ticks(low, high, count, log) {
  if (log) {
    const out = [], from = Math.floor(low), to = Math.ceil(high), step = Math.ceil((to - from) / 5);
    for (let e = from; e <= to; e += step)
      for (const m of to - from < 2 ? [1, 2, 5] : [1])
        if (e + Math.log10(m) >= low - 1e-9 && e + Math.log10(m) <= high + 1e-9) out.push(e + Math.log10(m));
    return out;
  }
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw * 0.999);
  const out = [];
  for (let t = Math.ceil(low / step - 1e-9) * step; t <= high + step * 1e-6; t += step) out.push(+t.toPrecision(12));
  return out;
}

function frame(svg, x, y, xs, ys, names, log) {
  for (const t of ys) {
    svg.append(make("line", { class: "grid", x1: LEFT, x2: W - RIGHT, y1: y(t), y2: y(t) }));
    svg.append(make("text", { x: LEFT - 6, y: y(t) + 4, "text-anchor": "end" }, show(log ? 10 ** t : t)));
  }
  for (const t of xs) svg.append(make("text", { x: x(t), y: H - BOTTOM + 15, "text-anchor": "middle" }, show(t)));
  svg.append(make("line", { class: "axis", x1: LEFT, x2: W - RIGHT, y1: H - BOTTOM, y2: H - BOTTOM }));
  svg.append(make("text", { x: W - RIGHT, y: H - 1, "text-anchor": "end" }, names));
}

// ---- curves --------------------------------------------------------------------------------------------------------
const hidden = new Set(); // groups that are switched off
let smoothing = 0, logarithmic = false;
const DASHES = ["", "6 3", "2 3", "8 3 2 3"];
const several = DATA.groups.length > 1;

function smooth(values) {
  if (!smoothing) return values;
  let state = 0, weight = 0; // without the bias of the start
  return values.map((v) => {
    if (!known(v)) return v;
    state = smoothing * state + (1 - smoothing) * v;
    weight = smoothing * weight + 1 - smoothing;
    return state / weight;
  });
}

// One curve for a group of seeds: mean, and standard deviation where there are two or more.
function curve(group, key) {
  const found = group.runs.map((r) => DATA.runs[r].curves[key]).filter(Boolean);
  if (!found.length) return null;
  const at = new Map();
  for (const c of found) {
    const values = key.startsWith("eval/") ? c.values : smooth(c.values);
    c.steps.forEach((step, i) => { if (known(values[i])) at.set(step, [...(at.get(step) || []), values[i]]); });
  }
  const steps = [...at.keys()].sort((a, b) => a - b), center = steps.map((s) => mean(at.get(s)));
  const deviation = steps.map((s, i) => {
    const xs = at.get(s);
    return xs.length > 1 ? Math.sqrt(xs.reduce((a, v) => a + (v - center[i]) ** 2, 0) / (xs.length - 1)) : 0;
  });
  return { steps, mean: center, deviation, seeds: found.length };
}

function draw(figure, panel) {
  const list = [];
  DATA.groups.forEach((group, g) => {
    panel.keys.forEach(([key, label], k) => {
      const found = hidden.has(g) ? null : curve(group, key);
      if (found) {
        const color = `var(--c${(several ? g : k) % 8})`, dash = several ? DASHES[k % 4] : "";
        list.push({ ...found, label: several ? `${group.name}${panel.keys.length > 1 ? ", " + label : ""}` : label, color, dash, k, g });
      }
    });
  });
  const old = figure.querySelector("svg"), keys = figure.querySelector(".keys");
  const svg = make("svg", { viewBox: `0 0 ${W} ${H}`, tabindex: 0, role: "img" });
  const all = list.flatMap((s) => s.mean.flatMap((m, i) => [m - s.deviation[i], m + s.deviation[i]]));
  const log = logarithmic && list.length && list.every((s) => s.mean.every((m) => m > 0));
  const scale = (v) => (log ? Math.log10(Math.max(v, 1e-12)) : v);
  let low = Math.min(...(log ? list.flatMap((s) => s.mean) : all).map(scale)), high = Math.max(...all.map(scale));
  if (!(high > low)) { low -= Math.abs(low) * 0.1 || 0.5; high += Math.abs(high) * 0.1 || 0.5; }
  const gap = (high - low) * 0.05;
  if (log || low < 0 || low > 0.25 * high) low -= gap; else low = 0;
  high += gap;
  const first = Math.min(...list.map((s) => s.steps[0])), last = Math.max(...list.map((s) => s.steps.at(-1)), first + 1);
  const x = (s) => LEFT + ((s - first) / (last - first)) * (W - LEFT - RIGHT);
  const y = (v) => H - BOTTOM - ((clamp(v, low, high) - low) / (high - low)) * (H - BOTTOM - TOP);
  if (list.length) frame(svg, x, y, ticks(first, last, 5), ticks(low, high, 5, log), "step", log);
  if (panel.keys.some(([key]) => !key.startsWith("eval/")))
    for (const group of DATA.groups.filter((_, g) => !hidden.has(g)))
      for (const alarm of group.runs.flatMap((r) => DATA.runs[r].alarms))
        svg.append(make("line", { class: "alarm", x1: x(alarm.step), x2: x(alarm.step), y1: TOP, y2: H - BOTTOM },
          make("title", {}, `${alarm.alarm} at step ${alarm.step}: ${alarm.what}`)));
  for (const s of list) {
    const path = (values) => values.map(([a, b], i) => `${i ? "L" : "M"}${x(a).toFixed(1)} ${y(scale(b)).toFixed(1)}`).join("");
    if (s.seeds > 1) {
      const edge = (sign) => s.steps.map((step, i) => [step, s.mean[i] + sign * s.deviation[i]]);
      svg.append(make("path", { d: `${path(edge(1))}L${path(edge(-1).reverse()).slice(1)}Z`, fill: s.color, "fill-opacity": 0.17, class: "band" }));
    }
    svg.append(make("path", { d: path(s.steps.map((step, i) => [step, s.mean[i]])), fill: "none", stroke: s.color,
      "stroke-width": 1.6, "stroke-dasharray": s.dash, "stroke-linejoin": "round", class: "line" }));
    if (s.steps.length < 20)
      for (let i = 0; i < s.steps.length; i++)
        svg.append(make("rect", { x: x(s.steps[i]) - 2, y: y(scale(s.mean[i])) - 2, width: 4, height: 4, fill: s.color }));
  }
  svg.setAttribute("aria-label", `${panel.title}. ${list.map((s) =>
    `${s.label}: ${show(s.mean[0])} at step ${s.steps[0]}, ${show(s.mean.at(-1))} at step ${s.steps.at(-1)}`).join("; ")}`);
  const cursor = make("line", { class: "cursor", y1: TOP, y2: H - BOTTOM, visibility: "hidden" });
  svg.append(cursor);
  const steps = [...new Set(list.flatMap((s) => s.steps))].sort((a, b) => a - b);
  let at = steps.length - 1;
  const point = (step, px, py) => {
    cursor.setAttribute("visibility", "visible");
    cursor.setAttribute("x1", x(step));
    cursor.setAttribute("x2", x(step));
    const rows = list.flatMap((s) => {
      const i = s.steps.indexOf(step);
      const mark = make("i", {});
      mark.style.background = s.color;
      return i < 0 ? [] : [make("div", {}, mark, `${s.label}: ${show(s.mean[i])}${s.seeds > 1 ? " ± " + show(s.deviation[i]) : ""}`)];
    });
    say([make("b", {}, `step ${step}`), ...rows], px, py);
  };
  svg.addEventListener("pointermove", (e) => {
    if (!steps.length) return;
    const box = svg.getBoundingClientRect(), want = first + (((e.clientX - box.left) / box.width) * W - LEFT) / (W - LEFT - RIGHT) * (last - first);
    at = steps.reduce((best, s, i) => (Math.abs(s - want) < Math.abs(steps[best] - want) ? i : best), 0);
    point(steps[at], e.clientX, e.clientY);
  });
  const leave = () => { cursor.setAttribute("visibility", "hidden"); hush(); };
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("blur", leave);
  svg.addEventListener("keydown", (e) => {
    if (!["ArrowLeft", "ArrowRight"].includes(e.key) || !steps.length) return;
    e.preventDefault();
    at = clamp(at + (e.key === "ArrowLeft" ? -1 : 1), 0, steps.length - 1);
    const box = svg.getBoundingClientRect();
    point(steps[at], box.left + (x(steps[at]) / W) * box.width, box.top + box.height / 2);
  });
  const shown = several ? [...new Map(list.map((s) => [s.k, s])).values()] : list;
  keys.replaceChildren(...(panel.keys.length > 1 ? shown.map((s) => {
    const line = make("svg", { width: 22, height: 8, "aria-hidden": "true" }, make("line",
      { x1: 0, x2: 22, y1: 4, y2: 4, stroke: several ? "currentColor" : s.color, "stroke-width": 2, "stroke-dasharray": s.dash }));
    line.style.width = "22px";
    return make("span", {}, line, panel.keys[s.k][1]);
  }) : []));
  old.replaceWith(svg);
}

const figures = [];
function addPanels(target, panels) {
  for (const panel of panels) {
    const about = make("details", {}, make("summary", {}, "what it is"));
    for (const [key, label] of panel.keys) about.append(make("p", {}, `${label}: ${DATA.define[key] || "no definition"}`));
    const figure = make("figure", {}, make("h3", {}, panel.title), make("div", { class: "keys" }), make("svg", {}), make("figcaption", {}, about));
    target.append(figure);
    figures.push([figure, panel]);
    draw(figure, panel);
  }
}
const redraw = () => figures.forEach(([figure, panel]) => draw(figure, panel));

if ($("panels")) {
  if (several || DATA.groups.some((g) => g.runs.length > 1))
    $("legend").append(...DATA.groups.map((group, g) => {
      const key = make("span", { class: "key" }), seeds = group.runs.length;
      key.style.background = `var(--c${g % 8})`;
      return make("button", { type: "button", "aria-pressed": "true", onclick: (e) => {
        const off = !hidden.has(g);
        if (off) hidden.add(g); else hidden.delete(g);
        e.currentTarget.setAttribute("aria-pressed", String(!off));
        redraw();
      } }, several ? key : null, group.name + (seeds > 1 ? `, mean ± standard deviation of ${seeds} seeds` : ""));
    }));
  $("smoothing").addEventListener("input", (e) => {
    smoothing = +e.target.value;
    $("smoothing-value").textContent = smoothing ? smoothing.toFixed(2) : "off";
    redraw();
  });
  $("log").addEventListener("change", (e) => { logarithmic = e.target.checked; redraw(); });
  addPanels($("panels"), DATA.panels);
  $("more").addEventListener("toggle", () => { if (!$("others").childElementCount) addPanels($("others"), DATA.others); });
}
