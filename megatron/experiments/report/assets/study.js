// The page of a study: which charts, of which of its runs.

const FEW = 24;
const state = { axis: "steps", from: 0, log: false, who: "all", curves: "loss", by: "mean", objective: "average", filter: "", all: false };
const share = (value) => trim((100 * value).toFixed(1)) + "%";
const matches = (name) => name.toLowerCase().includes(state.filter);

function axisOptions(family) {
  const steps = state.axis === "steps";
  const end = Math.max(0, ...family.curves.map((run) => run[state.axis][run.steps.length - 1]));
  return { xName: steps ? "step" : "tokens", xFormat: count, xTip: steps ? plain : count, from: state.from ? state.from * end : undefined };
}

function frameIn(grid, name, note = "") {
  const figure = element("figure", {}, grid);
  const caption = element("figcaption", {}, figure);
  element("b", { text: name, title: name }, caption);
  if (note) element("span", { text: note }, caption);
  return element("div", { class: "chart" }, figure);
}

// What the mouse shows of an entry: its losses, then its largest weights.
function entryRows(family, entry, color) {
  const rows = [[color, "mean loss", known(entry.mean) ? entry.mean.toFixed(4) : "–"]];
  family.measured.slice(0, 8).forEach((name, k) => { if (known(entry.losses[k])) rows.push([null, `loss ${name}`, entry.losses[k].toFixed(4)]); });
  const heavy = family.domains.map((name, k) => [name, entry.weights[k] ?? 0]).sort((a, b) => b[1] - a[1]).slice(0, 8);
  for (const [name, weight] of heavy) rows.push([null, `weight ${name}`, percent(weight)]);
  return rows;
}

// Loss against weights: a plane for two domains, a triangle for three, a plane each for more.
function drawMap(section, family, extra = []) {
  const grid = section.querySelector(".map"), hint = section.querySelector(".map-hint");
  grid.replaceChildren();
  hint.replaceChildren();
  const K = family.domains.length;
  if (K === 2) drawPlane(grid, family, extra);
  else if (K === 3) drawTriangles(grid, hint, family, extra);
  else drawPlanes(section, grid, family, extra);
}

const marksOfLaw = (family) => data.law && data.law.domains.join("\n") === family.domains.join("\n") ? data.law : null;

function drawPlane(grid, family, extra) {
  const colors = entryColors(family), law = marksOfLaw(family);
  const views = [["mean of domains", (e) => e.mean, law?.curve_mean], ...family.measured.map((name, k) => [name, (e) => e.losses[k], law?.curve?.[law.measured.indexOf(name)]])];
  const hosts = views.map(([name]) => frameIn(grid, name, `loss by weight of ${family.domains[0]}`));
  views.forEach(([name, of, predicted], k) => {
    const points = family.entries.map((e, i) => ({ name: e.name, x: e.weights[0], y: of(e), color: colors[i], rows: entryRows(family, e, colors[i]) }));
    for (const e of extra) points.push({ ...e, x: e.weights[0], y: e.mean });
    const lines = predicted ? [{ x: law.line, y: predicted, color: "var(--faint)" }] : [];
    scatterChart(hosts[k], points, lines, { title: `Loss of ${name} by weight`, height: 230, xName: "", xFormat: share, yFormat: loss, xRange: [0, 1], small: true });
  });
}

function drawTriangles(grid, hint, family, extra) {
  hint.append("Every point is a mixture: the nearer to a corner, the more of that domain. Colours go from the best to the worst of each triangle.");
  const law = marksOfLaw(family);
  if (law) hint.append(" The ring is the best mixture by the law.");
  const views = [["mean of domains", (e) => e.mean], ...family.measured.slice(0, FEW).map((name, k) => [name, (e) => e.losses[k]])];
  const frames = views.map(([name]) => frameIn(grid, name));
  views.forEach(([name, of], k) => {
    const values = family.entries.map(of), color = ramp(values);
    const points = family.entries.map((e, i) => ({ name: e.name, w: e.weights, color: color(values[i]), size: 5, rows: entryRows(family, e, color(values[i])) })).reverse();
    if (law) points.push({ name: "best by the law", w: law.mixture, color: "var(--ink)", size: 8, hollow: true, rows: law.domains.map((n, i) => [null, n, percent(law.mixture[i] ?? 0)]) });
    for (const e of extra) points.push({ ...e, w: e.weights });
    ternaryChart(frames[k], points, family.domains, { title: `Loss of ${name} by mixture` });
    const legend = element("span", {}, frames[k].parentNode.querySelector("figcaption"));
    rampLegend(legend, values, "");
  });
}

function drawPlanes(section, grid, family, extra) {
  const colors = entryColors(family);
  const switcher = section.querySelector(".by");
  if (switcher && !switcher.childElementCount) choice(switcher, [["mean", "mean loss"], ["own", "own loss"]], "by", () => drawMap(section, family));
  const list = family.domains.map((name, k) => [name, k]).filter(([name]) => matches(name));
  const taken = state.all ? list : list.slice(0, FEW);
  const hosts = taken.map(([name]) => frameIn(grid, name, "loss by weight"));
  const own = state.by === "own";
  taken.forEach(([name, k], i) => {
    const m = family.measured.indexOf(name);
    const points = family.entries.map((e, j) => ({ name: e.name, x: e.weights[k], y: own ? e.losses[m] : e.mean, color: colors[j], rows: entryRows(family, e, colors[j]) }));
    for (const e of extra) points.push({ ...e, x: e.weights[k], y: e.mean });
    scatterChart(hosts[i], points, [], { title: `Loss by weight of ${name}`, height: 190, xName: "", xFormat: share, yFormat: loss, small: true });
  });
  showMore(section.querySelector(".map-more"), list.length, taken.length);
}

function showMore(host, matching, taken) {
  host.replaceChildren();
  if (taken >= matching) return;
  host.append(`${taken} of ${matching} domains. `);
  element("button", { type: "button", text: `show all ${matching}` }, host).onclick = () => { state.all = true; draw(); };
}

// Entries whose curves are shown.
function chosen(family) {
  return state.who === "best" ? family.entries.slice(0, FEW_ENTRIES).map((_, k) => k) : family.entries.map((_, k) => k);
}

// The entry that curves are compared with: the baseline of a comparison, else the best.
function baseIndex(family) {
  const baseline = data.tasks[0]?.baseline;
  return Math.max(0, family.entries.findIndex((entry) => entry.name === baseline));
}

// Its run of the same seed, or its first.
function partner(family, run) {
  const base = family.curves.filter((other) => other.entry === baseIndex(family));
  return base.find((other) => other.seed === run.seed) ?? base[0];
}

// Values less the other run's at the same steps.
function difference(run, other, pick) {
  const own = pick(run), base = other ? pick(other) : [];
  const at = new Map((other?.steps ?? []).map((step, i) => [step, base[i]]));
  return own.map((value, i) => (known(value) && known(at.get(run.steps[i])) ? value - at.get(run.steps[i]) : null));
}

function drawCurves(section, family) {
  const colors = data.tasks.length ? family.entries.map((e) => methodColor(e.name)) : entryColors(family), shown = new Set(chosen(family));
  // The best are drawn last, over the others.
  const runs = family.curves.filter((run) => shown.has(run.entry)).sort((a, b) => b.entry - a.entry);
  const several = new Set(runs.map((run) => run.seed)).size > 1;
  const line = (run, y) => ({ name: family.entries[run.entry].name + (several ? `, seed ${run.seed}` : ""), color: colors[run.entry], x: run[state.axis], y, points: run.steps.length < 15 && runs.length <= 24, width: runs.length > 24 ? 1.2 : 1.75, faint: runs.length > 24 ? 0.85 : undefined });
  const apart = state.curves === "difference";
  const options = { ...axisOptions(family), yFormat: loss, tipFormat: apart ? signed : (v) => v.toFixed(4), log: state.log && !apart, single: true, marks: apart ? [{ y: 0, name: "equal", dash: "4 3" }] : [] };
  const of = (run, pick) => (apart ? difference(run, partner(family, run), pick) : pick(run));
  choice(section.querySelector(".curve-what"), [["loss", "loss"], ["difference", `difference to ${family.entries[baseIndex(family)]?.name ?? "the best"}`]], "curves", draw);
  const list = family.measured.map((name, k) => [name, k]).filter(([name]) => matches(name));
  const taken = state.all ? list : list.slice(0, FEW);
  const grid = section.querySelector(".curves");
  grid.replaceChildren();
  const hosts = taken.map(([name]) => frameIn(grid, name));
  lineChart(section.querySelector(".curve-mean"), runs.map((run) => line(run, of(run, (r) => r.mean))), { ...options, height: 280, title: "Mean held-out loss by step" });
  taken.forEach(([name, k], i) => lineChart(hosts[i], runs.map((run) => line(run, of(run, (r) => r.loss[k]))), { ...options, small: true, height: 170, title: `Held-out loss of ${name} by step` }));
  curveKeys(section.querySelector(".curve-keys"), family, colors);
  showMore(section.querySelector(".curves-more"), list.length, taken.length);
}

function curveKeys(host, family, colors) {
  host.replaceChildren();
  if (data.tasks.length || family.entries.length <= FEW_ENTRIES) colorKeys(host, family.entries.map((entry, k) => [entry.name, colors[k]]));
  else rampLegend(element("span", {}, host), family.entries.map((entry) => entry.mean), "mean loss at the end");
}

// Mean over the seeds of an entry, where they were measured at the same steps.
function meanWeights(family, entry) {
  const runs = family.curves.filter((run) => run.entry === entry && run.weights);
  if (!runs.length) return null;
  const [first] = runs, alike = runs.filter((run) => run.steps.join() === first.steps.join());
  const mean = (k) => first.steps.map((_, i) => alike.reduce((all, run) => all + (run.weights[k][i] ?? 0), 0) / alike.length);
  return { x: first[state.axis], y: family.domains.map((_, k) => mean(k)) };
}

function drawMoving(section, family) {
  const host = section.querySelector(".moving .rivers");
  host.replaceChildren();
  const found = family.entries.map((entry, k) => [entry, meanWeights(family, k)]).filter(([, w]) => w).slice(0, FEW);
  section.querySelector(".moving").hidden = !found.length;
  const frames = found.map(([entry]) => frameIn(host, entry.name, entry.method === entry.name ? "" : entry.method));
  const { xName, xFormat, xTip } = axisOptions(family);
  found.forEach(([entry, w], i) => river(frames[i], w.x, bands(w.y, family.domains, dark()), { height: 220, title: `Weights of ${entry.name}`, xName, xFormat, xTip }));
}

function drawLaw() {
  const law = data.law;
  if (!law) return;
  const rows = law.domains.map((name, k) => ({ name, value: law.mixture[k], low: law.low[k], high: law.high[k] }));
  forestChart(byId("chart-optimum"), rows, { title: "Best mixture with intervals", format: percent, tickFormat: share, zero: 1 / law.domains.length });
  const grid = byId("law-grid");
  grid.replaceChildren();
  const list = law.measured.map((name, k) => [name, k]).filter(([name]) => matches(name));
  const hosts = list.map(([name]) => frameIn(grid, name, "measured by predicted"));
  list.forEach(([name, k], i) => {
    const points = law.runs.map((run, j) => ({ name: run, x: law.predicted[k][j], y: law.actual[k][j], color: "var(--focus)", rows: [[null, "measured", law.actual[k][j]?.toFixed(4) ?? "–"], [null, "predicted", law.predicted[k][j]?.toFixed(4) ?? "–"]] }));
    scatterChart(hosts[i], points, [], { title: `Measured and predicted loss of ${name}`, height: 210, xName: "", xFormat: precise, yFormat: loss, diagonal: true, small: true });
  });
}

const lineColor = (figure, k) => (figure.series.length <= FEW_ENTRIES ? `var(--run-${k})` : domainColor(k, dark()));

// Figures that the page's data describes one by one.
const DRAWN = {
  scatter: (host, f) => scatterChart(host, f.points.filter((p) => known(p.x) && known(p.y)).map((p) => ({ ...p, color: "var(--focus)", rows: [[null, f.axes[0], p.x.toFixed(4)], [null, f.axes[1], p.y.toFixed(4)]] })), [], { title: f.title, height: 230, xName: "", xFormat: precise, yFormat: loss, diagonal: true, small: true }),
  intervals: (host, f) => forestChart(host, f.rows, { title: f.title, format: percent, tickFormat: share, zero: f.zero }),
  lines: (host, f) => lineChart(host, f.series.map((s, k) => ({ ...s, color: lineColor(f, k), points: true })), { title: f.title, height: 230, xName: "step", xFormat: count, xTip: plain, yFormat: loss, single: true }),
};

function drawFigures() {
  for (const grid of document.querySelectorAll(".figures")) {
    grid.replaceChildren();
    const list = data.figures[grid.dataset.figures] ?? [];
    const hosts = list.map((f) => frameIn(grid, f.title, f.note));
    list.forEach((f, i) => {
      DRAWN[f.kind](hosts[i], f);
      if (f.kind === "lines") colorKeys(element("div", { class: "keys" }, hosts[i].parentNode), f.series.slice(0, FEW).map((s, k) => [s.name, lineColor(f, k)]));
    });
  }
}

function drawRounds() {
  if (!data.rounds) return;
  const { domains, weights } = data.rounds;
  const x = weights[0].map((_, i) => i);
  const series = domains.map((name, k) => ({ name, color: domains.length <= FEW_ENTRIES ? `var(--run-${k})` : domainColor(k, dark()), x, y: weights[k], points: true, width: 2 }));
  colorKeys(byId("keys-rounds"), series.slice(0, FEW).map((line) => [line.name, line.color]));
  lineChart(byId("chart-rounds"), series, { title: "Weights by round", height: 260, xName: "round", xFormat: (v) => (Number.isInteger(v) ? String(v) : ""), xTip: plain, yFormat: percent, zero: true, single: domains.length > 12 });
}

// Colours of methods are the same in all tasks.
const methodNames = [...new Set(data.tasks.flatMap((task) => task.methods.map((m) => m.name)))];
const methodColor = (name) => { const k = methodNames.indexOf(name); return k < 8 ? `var(--run-${k})` : domainColor(k, dark()); };
const KIND_COLORS = ["var(--faint)", "var(--run-6)", "var(--run-0)", "var(--run-3)", "var(--run-2)", "var(--run-1)", "var(--run-5)"];

function drawTask(section, task) {
  const compared = task.methods.filter((m) => m.differences[state.objective]);
  const rows = compared.map((m) => {
    const d = m.differences[state.objective], color = methodColor(m.name);
    return {
      name: m.name, value: d.mean, low: d.interval[0], high: d.interval[1], inner: d.bootstrap, color,
      rows: [[color, "difference", signed(d.mean ?? NaN)], [null, "t interval", d.interval.map((v) => signed(v ?? NaN)).join(" to ")], [null, "bootstrap", d.bootstrap.map((v) => signed(v ?? NaN)).join(" to ")], [null, "p Holm", known(d.p_holm) ? precise(d.p_holm) : "–"], [null, "wins", String(d.wins)]],
    };
  });
  forestChart(section.querySelector(".forest"), rows, { title: `Differences on ${task.name}`, format: signed, tickFormat: loss, zero: 0 });
  const paid = task.methods.filter((m) => m.charges);
  const bars = paid.map((m) => ({ name: m.name, parts: task.kinds.map((name, k) => ({ name, value: m.charges[k], color: KIND_COLORS[k] })) }));
  stackChart(section.querySelector(".charges"), bars, { title: `Charges on ${task.name}`, format: share });
  const used = task.kinds.map((name, k) => [name, KIND_COLORS[k], paid.some((m) => m.charges[k] > 0)]).filter(([, , any]) => any);
  colorKeys(section.querySelector(".charge-keys"), used);
  const names = Object.entries(task.objectives);
  if (names.length > 1) choice(section.querySelector(".objective"), names, "objective", draw);
  if (!task.sweep) return;
  const family = { domains: task.domains, measured: [], entries: task.sweep.map((e) => ({ ...e, losses: [] })), curves: [] };
  const rings = task.methods.filter((m) => known(m.means.average)).map((m) => ({
    name: m.name, weights: task.domains.map((name) => m.weights[name] ?? 0), mean: m.means.average, color: methodColor(m.name), size: 6, hollow: true,
    rows: [[methodColor(m.name), "average loss", m.means.average.toFixed(4)], ...task.domains.slice(0, 8).map((name) => [null, `weight ${name}`, percent(m.weights[name] ?? 0)])],
  }));
  drawMap(section, family, rings);
}

const sections = [...document.querySelectorAll("section.family")].map((section) => [section, data.families[section.dataset.family]]);

function draw() {
  drawLaw();
  drawRounds();
  drawFigures();
  for (const [section, family] of sections) {
    const task = data.tasks[section.dataset.family];
    if (task) drawTask(section, task);
    else drawMap(section, family);
    drawCurves(section, family);
    drawMoving(section, family);
  }
  root.dataset.charts = document.querySelectorAll(".chart svg").length;
  root.dataset.lines = document.querySelectorAll(".chart svg path.line").length;
  root.dataset.dots = document.querySelectorAll(".chart svg .dot").length;
}

function buildControls() {
  const nav = byId("controls"), bar = element("div", {}, nav);
  const left = element("div", { class: "runs" }, bar);
  const most = Math.max(0, ...data.families.map((f) => Math.max(f.measured.length, f.domains.length)));
  if (most > 8) {
    const search = element("input", { type: "search", placeholder: "filter domains", "aria-label": "filter domains" }, left);
    search.oninput = () => { state.filter = search.value.trim().toLowerCase(); draw(); };
  }
  const group = (names, key) => choice(element("span", { class: "switch" }, bar), names, key, draw);
  if (data.families.some((f) => f.curves.length)) {
    if (!data.tasks.length && data.families.some((f) => f.entries.length > FEW_ENTRIES)) group([["all", "all runs"], ["best", `best ${FEW_ENTRIES}`]], "who");
    group([["steps", "steps"], ["tokens", "tokens"]], "axis");
    group([[0, "whole run"], [0.1, "from 10%"], [0.5, "from 50%"]], "from");
    group([[false, "linear"], [true, "log loss"]], "log");
  }
  themeButton(bar, draw);
  nav.hidden = false;
}

document.querySelectorAll("table.sortable").forEach(sortable);
buildControls();
draw();
watchPage(draw);
root.dataset.ready = "yes";
