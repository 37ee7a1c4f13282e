// ---- colours -------------------------------------------------------------------------------------------------------
const LOW_HIGH = [[13, 8, 66], [92, 18, 110], [170, 45, 90], [229, 92, 48], [252, 174, 60], [252, 250, 164]];
function heat(share) {
  const place = clamp(share, 0, 1) * (LOW_HIGH.length - 1), i = Math.min(LOW_HIGH.length - 2, Math.floor(place)), f = place - i;
  return LOW_HIGH[i].map((c, j) => Math.round(c + f * (LOW_HIGH[i + 1][j] - c)));
}
const css = ([r, g, b]) => `rgb(${r} ${g} ${b})`;
const percentile = (xs, share) => [...xs].sort((a, b) => a - b)[Math.min(xs.length - 1, Math.floor(share * xs.length))];

// ---- heat maps -----------------------------------------------------------------------------------------------------
function mapOf(group, name) {
  const found = group.runs.map((r) => DATA.runs[r].positions).filter((p) => p && p[name]);
  if (!found.length) return null;
  const same = found.filter((p) => p.width === found[0].width && p.steps.join() === found[0].steps.join());
  const cells = found[0][name].map((row, s) => row.map((_, b) => {
    const values = same.map((p) => p[name][s][b]).filter(known);
    return values.length ? mean(values) : null;
  }));
  let bins = 1; // without the empty end
  for (const row of cells) row.forEach((v, b) => { if (known(v)) bins = Math.max(bins, b + 1); });
  return { cells: cells.map((row) => row.slice(0, bins)), bins, steps: found[0].steps, width: found[0].width, seeds: same.length };
}

function drawMap(figure, map, low, high, title, unit) {
  const canvas = make("canvas", { width: map.steps.length, height: map.bins });
  const pen = canvas.getContext("2d");
  map.cells.forEach((row, s) => row.forEach((value, b) => {
    if (!known(value)) return;
    pen.fillStyle = css(heat((value - low) / (high - low || 1)));
    pen.fillRect(s, b, 1, 1);
  }));
  const svg = make("svg", { viewBox: `0 0 ${W} ${H}`, tabindex: 0, role: "img" });
  const wide = (W - LEFT - RIGHT) / map.steps.length, tall = (H - BOTTOM - TOP) / map.bins;
  const image = make("image", { x: LEFT, y: TOP, width: W - LEFT - RIGHT, height: H - BOTTOM - TOP, href: canvas.toDataURL(),
    preserveAspectRatio: "none" });
  image.style.imageRendering = "pixelated";
  svg.append(image);
  const every = Math.max(1, Math.ceil(map.bins / 6));
  for (let b = 0; b < map.bins; b += every)
    svg.append(make("text", { x: LEFT - 6, y: TOP + (b + 0.5) * tall + 4, "text-anchor": "end" }, String(b * map.width)));
  const first = map.steps[0], last = map.steps.at(-1);
  for (const t of ticks(first, Math.max(last, first + 1), 5)) {
    const s = map.steps.findIndex((step) => step >= t);
    if (s >= 0) svg.append(make("text", { x: LEFT + (s + 0.5) * wide, y: H - BOTTOM + 15, "text-anchor": "middle" }, show(t)));
  }
  svg.append(make("text", { x: W - RIGHT, y: H - 1, "text-anchor": "end" }, "step"));
  const cell = make("rect", { class: "cell", width: Math.max(wide, 3), height: tall, visibility: "hidden" });
  svg.append(cell);
  const ends = [0, map.cells.length - 1].map((s) => mean(map.cells[s].filter(known)));
  svg.setAttribute("aria-label", `${title}, by step and position. Mean over positions: ${show(ends[0])} at step ${first}, ${show(ends[1])} at step ${last}.`);
  let at = [map.steps.length - 1, 0];
  const point = (px, py) => {
    const [s, b] = at, value = map.cells[s][b];
    cell.setAttribute("x", LEFT + s * wide);
    cell.setAttribute("y", TOP + b * tall);
    cell.setAttribute("visibility", "visible");
    const box = svg.getBoundingClientRect();
    say([make("b", {}, `step ${map.steps[s]}, tokens ${b * map.width} to ${(b + 1) * map.width - 1}`), make("div", {}, `${title}: ${show(value)} ${unit}`)],
      px ?? box.left + ((LEFT + s * wide) / W) * box.width, py ?? box.top + ((TOP + b * tall) / H) * box.height);
  };
  svg.addEventListener("pointermove", (e) => {
    const box = svg.getBoundingClientRect();
    const s = Math.floor((((e.clientX - box.left) / box.width) * W - LEFT) / wide), b = Math.floor((((e.clientY - box.top) / box.height) * H - TOP) / tall);
    at = [clamp(s, 0, map.steps.length - 1), clamp(b, 0, map.bins - 1)];
    point(e.clientX, e.clientY);
  });
  const leave = () => { cell.setAttribute("visibility", "hidden"); hush(); };
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("blur", leave);
  svg.addEventListener("keydown", (e) => {
    const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[e.key];
    if (!move) return;
    e.preventDefault();
    at = [clamp(at[0] + move[0], 0, map.steps.length - 1), clamp(at[1] + move[1], 0, map.bins - 1)];
    point();
  });
  figure.append(svg);
}

function scaleBar(low, high, colors, unit) {
  const bar = make("i", {});
  bar.style.background = `linear-gradient(to right, ${colors})`;
  return make("span", { class: "scale" }, show(low), bar, `${show(high)} ${unit}`);
}

if ($("maps-panels"))
  for (const [name, title, unit, shared] of DATA.maps) {
    const drawn = DATA.groups.map((group) => [group, mapOf(group, name), shared ? mapOf(group, shared) : null]).filter(([, map]) => map);
    if (!drawn.length) continue;
    const values = drawn.flatMap(([, a, b]) => [a, b].filter(Boolean).flatMap((m) => m.cells.flat().filter(known)));
    let low = unit ? 0 : Math.min(...values), high = unit ? percentile(values, 0.98) : Math.max(...values);
    if (!(high > low)) { low -= 0.01; high += 0.01; }
    for (const [group, map] of drawn) {
      const figure = make("figure", {}, make("h3", {}, several ? `${title}: ${group.name}` : title), make("div", { class: "keys" }));
      figure.querySelector(".keys").append(scaleBar(low, high, LOW_HIGH.map(css).join(", "), unit),
        map.seeds > 1 ? `mean of ${map.seeds} seeds` : "");
      drawMap(figure, map, low, high, title, unit);
      $("maps-panels").append(figure);
    }
  }

// ---- tokens --------------------------------------------------------------------------------------------------------
const KINDS = {
  advantage: ["advantage", "of the drawn token, nats: red is pushed down, blue is pulled up", true],
  signal: ["log q − log p", "teacher minus student on the drawn token, nats: red is what the teacher likes less, blue more", true],
  reverse_kl: ["reverse KL", "KL(student ‖ teacher) at this place, nats", false],
  student_entropy: ["student entropy", "nats", false],
  teacher_entropy: ["teacher entropy", "nats", false],
  loss: ["loss", "what the token adds before the reduction", true],
};
const valueOf = (record, kind) => {
  if (kind !== "signal") return record[kind];
  return record.teacher_logprob && record.teacher_logprob.map((q, i) => (known(q) && known(record.logprob[i]) ? q - record.logprob[i] : null));
};
const visible = (text) => text.replaceAll("\n", "⏎\n").replaceAll("\t", "⇥\t");
const quoted = (text) => text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "␣") || "(empty)";

if ($("viewer")) {
  const runs = DATA.runs.map((run, r) => [run, r]).filter(([run]) => run.tokens.length);
  const state = { run: 0, step: 0, row: 0, kind: "", token: 0 };
  const view = () => {
    const run = runs[state.run][0], steps = [...new Set(run.tokens.map((t) => t.step))];
    state.step = clamp(state.step, 0, steps.length - 1);
    const records = run.tokens.filter((t) => t.step === steps[state.step]);
    state.row = clamp(state.row, 0, records.length - 1);
    return { run, steps, records, record: records[state.row] };
  };
  const kinds = () => Object.keys(KINDS).filter((k) => runs[state.run][0].tokens.some((t) => valueOf(t, k)?.some(known)));
  const limit = () => { // one scale for all steps, so that colours can be compared
    const values = runs[state.run][0].tokens.flatMap((t) => (valueOf(t, state.kind) || []).filter(known).map(Math.abs));
    return percentile(values, 0.98) || Math.max(...values, 1e-9);
  };
  const color = (value, top) => {
    if (!known(value)) return "transparent";
    const share = clamp(Math.abs(value) / top, 0, 1) * 0.72;
    const tint = !KINDS[state.kind][2] ? "230 140 0" : value < 0 ? "222 60 50" : "30 120 230";
    return `rgb(${tint} / ${share.toFixed(3)})`;
  };

  function detail() {
    const { record, run } = view(), i = state.token, piece = run.pieces[record.ids[i]];
    const rows = [["log p (student)", "logprob"], ["log q (teacher)", "teacher_logprob"], ["log p when drawn", "sampler_logprob"],
      ["advantage", "advantage"], ["reverse KL", "reverse_kl"], ["student entropy", "student_entropy"],
      ["teacher entropy", "teacher_entropy"], ["loss", "loss"]].filter(([, key]) => record[key] && known(record[key][i]));
    const list = make("dl", {});
    for (const [label, key] of rows) list.append(make("dt", {}, label), make("dd", {}, show(record[key][i])));
    const tops = (who) => {
      if (!record[`${who}_top`]) return [];
      const table = make("table", { class: `tops ${who}` });
      record[`${who}_top`][i].forEach((id, j) => {
        const p = record[`${who}_top_probs`][i][j], fill = make("div", { class: "fill" });
        fill.style.width = `${100 * p}%`;
        table.append(make("tr", { class: id === record.ids[i] ? "drawn" : null }, make("td", { title: `id ${id}` }, quoted(run.pieces[id])),
          make("td", {}, fill), make("td", {}, `${show(100 * p)} %`)));
      });
      return [make("h4", {}, `${who}'s likeliest`), table];
    };
    $("detail").replaceChildren(make("h3", {}, `${quoted(piece)} `, make("small", {}, `token ${i}, id ${record.ids[i]}`)), list,
      ...tops("student"), ...tops("teacher"));
  }

  function choose(i, focus) {
    const tokens = [...$("toks").querySelectorAll(".tok")];
    state.token = clamp(i, 0, tokens.length - 1);
    tokens.forEach((t, j) => {
      t.setAttribute("tabindex", j === state.token ? 0 : -1);
      if (j === state.token) t.setAttribute("aria-current", "true"); else t.removeAttribute("aria-current");
    });
    if (focus) tokens[state.token].focus();
    detail();
  }

  function render() {
    const { run, steps, records, record } = view(), top = limit(), values = valueOf(record, state.kind) || [];
    const label = KINDS[state.kind][0];
    $("step").max = steps.length - 1;
    $("step").value = state.step;
    $("step").setAttribute("aria-valuetext", `step ${record.step}`);
    $("step-value").textContent = `step ${record.step}`;
    $("rows").replaceChildren(...records.map((r, j) => make("button", { type: "button", "aria-pressed": String(j === state.row),
      "aria-label": `rollout ${j + 1} of ${records.length}, ${r.length} tokens`, onclick: () => { state.row = j; state.token = 0; render(); } }, String(j + 1))));
    const tokens = record.ids.map((id, i) => {
      const node = make("span", { class: "tok", role: "button", "data-i": i, "aria-label": `token ${i}: ${run.pieces[id]}, ${label} ${show(values[i])}` },
        visible(run.pieces[id]));
      node.style.background = color(values[i], top);
      return node;
    });
    const cut = record.length > record.ids.length ? [make("span", { class: "given" }, ` … ${record.length - record.ids.length} more tokens`)] : [];
    $("toks").replaceChildren(make("span", { class: "given", title: "prompt" }, record.prompt), ...tokens, ...cut);
    $("teacher-prompt").hidden = !record.teacher_prompt;
    $("teacher-prompt").lastElementChild.textContent = record.teacher_prompt || "";
    const both = KINDS[state.kind][2];
    $("scale").replaceChildren(scaleBar(both ? -top : 0, top, both ? `${color(-top, top)}, transparent, ${color(top, top)}` : `transparent, ${color(top, top)}`, ""),
      make("span", { class: "note" }, KINDS[state.kind][1]));
    const writer = record.writer === "student" ? `written by the student of step ${record.policy_step}` : "not written by the student";
    $("about").textContent = `Prompt ${record.prompt_index}, rollout ${record.row}; ${record.length} tokens, ${record.ended ? "ended" : "cut by the length limit"}; ${writer}.`;
    choose(state.token, false);
  }

  $("toks").addEventListener("pointerover", (e) => { if (e.target.dataset.i) choose(+e.target.dataset.i, false); });
  $("toks").addEventListener("click", (e) => { if (e.target.dataset.i) choose(+e.target.dataset.i, true); });
  $("toks").addEventListener("keydown", (e) => {
    const move = { ArrowLeft: -1, ArrowRight: 1, Home: -1e9, End: 1e9 }[e.key];
    if (move) { e.preventDefault(); choose(state.token + move, true); }
  });
  $("step").addEventListener("input", (e) => { state.step = +e.target.value; render(); });
  const fill = () => {
    const found = kinds();
    if (!found.includes(state.kind)) state.kind = found[0];
    $("kind").replaceChildren(...found.map((k) => make("option", { value: k, selected: k === state.kind }, KINDS[k][0])));
    render();
  };
  $("kind").addEventListener("change", (e) => { state.kind = e.target.value; render(); });
  $("run").parentElement.hidden = runs.length < 2;
  $("run").append(...runs.map(([run], j) => make("option", { value: j }, run.name)));
  $("run").addEventListener("change", (e) => { state.run = +e.target.value; state.step = state.row = state.token = 0; fill(); });
  fill();
}
document.documentElement.dataset.ready = "yes";
