// The page: which charts, of which runs, over which axis.

const FEW = 24;
const state = {
  shown: data.runs.map(() => true), axis: "steps", from: 0, log: false,
  mixture: "probability", domain: "valid", filter: "", all: false,
};
const runColor = (run) => `var(--run-${run.group % 8})`;

// Runs of one group share a hue; its second, third … run is told apart by its dashes.
const DASHES = [null, "6 3", "2 3", "8 3 2 3"];
const runDash = (run) => {
  const peers = data.runs.filter((other) => other.group === run.group);
  return DASHES[peers.indexOf(run) % DASHES.length];
};
const runs = () => data.runs.filter((_, i) => state.shown[i]);
const lineOf = (run, x, y, more = {}) => ({ name: run.name, color: runColor(run), dash: runDash(run), x: x[state.axis], y, ...more });

function axisOptions() {
  const steps = state.axis === "steps";
  const end = Math.max(0, ...runs().map((run) => run[state.axis][run.steps.length - 1]));
  return {
    xName: steps ? "step" : "tokens", xFormat: count, xTip: steps ? plain : count,
    from: state.from ? state.from * end : undefined,
  };
}

// Charts that stand side by side: those with nothing to show go first, for the others to be
// measured in the room that is left.
function charts(list) {
  const axis = axisOptions();
  for (const [id, series, options] of list) {
    byId(id).closest("figure").hidden = Boolean(options.optional) && !visible(series, -Infinity).length;
  }
  for (const [id, series, options] of list) {
    if (!byId(id).closest("figure").hidden) lineChart(byId(id), series, { height: 250, ...axis, ...options });
    else byId(id).replaceChildren();
  }
}

function drawLoss() {
  charts([
    ["chart-valid", runs().map((run) => lineOf(run, run.valid, run.valid.mean, { points: true, width: 2 })),
      { title: "Mean held-out loss", yFormat: loss, log: state.log }],
    ["chart-difference", runs().flatMap((run) => difference(run, (other) => other.valid.mean)),
      { title: "Difference of the mean held-out loss", yFormat: loss, tipFormat: signed, marks: [ZERO], optional: true }],
    ["chart-train", runs().map((run) => lineOf(run, run, run.loss, run.width > 1 ? { low: run.low, high: run.high } : { width: 1.25 })),
      { title: "Training loss", yFormat: loss, log: state.log }],
  ]);
}

const ZERO = { y: 0, name: "baseline", dash: "4 3" };

// The run's held-out loss minus that of the run it is compared with, at equal tokens.
function difference(run, pick) {
  const other = data.runs[data.against[data.runs.indexOf(run)]];
  const own = pick(run), base = other && pick(other);
  if (!other || !own || !base) return [];
  const y = own.map((value, i) => {
    const level = between(other.valid.tokens, base, run.valid.tokens[i]);
    return known(value) && known(level) ? value - level : null;
  });
  return [lineOf(run, run.valid, y, { points: true, width: 2 })];
}

// The value at x of the line through the points, null outside.
function between(xs, ys, x) {
  if (!xs.length || x < xs[0] || x > xs[xs.length - 1] * 1.0001) return null;
  let i = nearest(xs, x);
  if (xs[i] === x || xs.length === 1) return ys[i];
  if (xs[i] > x) i -= 1;
  if (i >= xs.length - 1) return ys[i];
  const part = (x - xs[i]) / (xs[i + 1] - xs[i]);
  return known(ys[i]) && known(ys[i + 1]) ? ys[i] + part * (ys[i + 1] - ys[i]) : null;
}

function drawPace() {
  const of = (name) => runs().map((run) => lineOf(run, run.metrics, run.metrics[name], { width: 1.5 }));
  byId("machine").hidden = !data.runs.some((run) => run.metrics.tokens_per_second || run.metrics.learning_rate);
  charts([
    ["chart-rate", of("tokens_per_second"), { title: "Tokens per second", yFormat: count, zero: true, optional: true }],
    ["chart-lr", of("learning_rate"), { title: "Learning rate", yFormat: precise, zero: true, optional: true }],
  ]);
}

function drawRivers() {
  const host = byId("rivers");
  host.replaceChildren();
  const options = axisOptions();
  // All frames before any chart: a chart measures its frame.
  const frames = runs().filter((run) => run[state.mixture]).map((run) => {
    const figure = element("figure", {}, host);
    const caption = element("figcaption", {}, figure);
    caption.append(element("i", { class: "key", style: `--c:${runColor(run)}` }), run.name);
    element("span", { text: MIXTURES[state.mixture] }, caption);
    return [run, element("div", { class: "chart" }, figure)];
  });
  for (const [run, frame] of frames) {
    // Drawn shares are averaged over the same stretches as in the small charts.
    const drawn = state.mixture === "share";
    const x = drawn ? coarse(run, run.steps).x : run[state.axis];
    const found = options.from === undefined ? 0 : x.findIndex((v) => v >= options.from);
    const start = found < 0 ? x.length - 1 : found;
    const shares = run[state.mixture].map((list) => (drawn ? coarse(run, list).y : list)?.slice(start));
    river(frame, x.slice(start), bands(shares, data.domains, dark()),
      { height: data.domains.length > 14 ? 320 : 260, title: `Mixture of ${run.name}`, ...options });
  }
}

const MIXTURES = { probability: "sampling probability", share: "share of the samples drawn", weighed: "share in the training loss", controller: "what a controller that does not draw would have drawn" };
const compared = data.against.some((other) => other !== null);
const DOMAINS = { ...(compared ? { difference: "difference to baseline" } : {}), valid: "held-out", train: "training", epochs: "epochs" };

// What a small chart of one domain shows, by kind: its curves, lines to compare with, and format.
const KINDS = {
  valid: {
    title: "Held-out loss", format: loss, head: (run) => run.valid.loss,
    series: (run, k) => [lineOf(run, run.valid, run.valid.loss[k], { points: true })],
  },
  difference: {
    title: "Difference of the held-out loss", format: loss, tip: signed, head: () => [],
    series: (run, k) => difference(run, (other) => other.valid.loss[k]),
    marks: () => [ZERO],
  },
  train: {
    title: "Training loss", format: loss, head: (run) => run.train,
    series: (run, k) => [lineOf(run, run, run.train[k], { width: 1.25 })],
  },
  epochs: {
    title: "Epochs", format: precise, zero: true, head: (run) => run.epochs,
    series: (run, k) => [lineOf(run, run, run.epochs[k])],
  },
  share: {
    title: "Probability and share", format: percent, zero: true, head: (run) => run.probability,
    series: (run, k) => [
      { ...coarse(run, run.share[k]), name: `${run.name}, drawn`, color: runColor(run), width: 1.25, faint: 0.45 },
      lineOf(run, run, run.probability[k], { name: `${run.name}, asked` }),
      lineOf(run, run, run.weighed?.[k], { name: `${run.name}, in the loss`, width: 1.25, dash: "5 3" }),
      lineOf(run, run, run.controller?.[k], { name: `${run.name}, shadow`, width: 1, dash: "1 3" }),
    ],
    marks: (run, k) => [
      { y: run.uniform, name: "uniform", dash: "1 4" },
      ...(run.natural && known(run.natural[k]) ? [{ y: run.natural[k], name: "natural", dash: "7 4" }] : []),
    ],
  },
};

// Shares are counts of a few samples: averaged until what is left is more than chance.
function coarse(run, list) {
  const x = run[state.axis];
  const size = Math.ceil(x.length / 60);
  if (!list || size < 2) return { x, y: list ?? null };
  const result = { x: [], y: [] };
  for (let i = 0; i < x.length; i += size) {
    const part = list.slice(i, i + size).filter(known);
    result.x.push(x[Math.min(i + size, x.length) - 1]);
    result.y.push(part.length ? part.reduce((a, b) => a + b, 0) / part.length : null);
  }
  return result;
}

// One small chart for each domain that matches the filter, in `id`-grid.
function drawGrid(id, kind) {
  const grid = byId(`${id}-grid`);
  grid.replaceChildren();
  const { title, format, tip: tipFormat, zero, head, series, marks } = KINDS[kind];
  const options = { small: true, height: 138, ...axisOptions(), yFormat: format, tipFormat, zero, log: state.log && !zero };
  const matching = data.domains.map((name, k) => [name, k]).filter(([name]) => name.toLowerCase().includes(state.filter));
  const taken = state.all ? matching : matching.slice(0, FEW);
  const [first, ...others] = runs();
  // All frames before any chart: a chart measures its frame, and one layout does for all.
  const hosts = taken.map(([name]) => {
    const figure = element("figure", {}, grid);
    const caption = element("figcaption", {}, figure);
    element("b", { text: name, title: name }, caption);
    return [element("span", {}, caption), element("div", { class: "chart" }, figure)];
  });
  const lines = taken.map(([, k]) => runs().flatMap((run) => series(run, k)));
  // Differences are drawn to one scale, or a trifle would look like a triumph.
  if (kind === "difference") options.span = lines.flat().flatMap((line) => visible([line], options.from ?? -Infinity)[0]?.y ?? []).filter(known);
  taken.forEach(([name, k], i) => {
    lineChart(hosts[i][1], lines[i], { ...options, marks: first && marks ? marks(first, k) : [], title: `${title} of ${name}` });
    const ends = ((first && head(first)[k]) ?? []).filter(known);
    if (ends.length && !others.length) hosts[i][0].textContent = `${format(ends[0])} → ${format(ends[ends.length - 1])}`;
  });
  gridMore(byId(`${id}-more`), matching.length, taken.length);
}

function gridMore(host, matching, taken) {
  host.replaceChildren();
  if (!matching) host.append(`No domain matches “${state.filter}”.`);
  if (taken >= matching) return;
  host.append(`${taken} of ${matching} domains, those with most tokens. `);
  const button = element("button", { type: "button", text: `show all ${matching}` }, host);
  button.onclick = () => { state.all = true; drawGrids(); };
}

function drawGrids() {
  drawGrid("domain", state.domain);
  drawGrid("share", "share");
  const legend = byId("share-legend");
  legend.replaceChildren();
  const entry = (stroke, opacity, dash, name) => {
    const item = element("span", {}, legend);
    const svg = shape("svg", { width: 28, height: 8 }, item);
    shape("line", { x1: 0, x2: 28, y1: 4, y2: 4, stroke, "stroke-opacity": opacity, "stroke-width": 1.75, "stroke-dasharray": dash }, svg);
    item.append(name);
  };
  const [first] = runs();
  if (!first) return;
  const stretch = first.width * Math.ceil(first.steps.length / 60);
  entry(runColor(first), 1, "none", "asked: the probability that drew the step");
  entry(runColor(first), 0.4, "none", `drawn: share of the samples, ${stretch > 1 ? `mean of ${plain(stretch)} steps` : "each step"}`);
  if (runs().some((run) => run.weighed)) entry(runColor(first), 1, "5 3", "share in the training loss");
  if (runs().some((run) => run.controller)) entry(runColor(first), 1, "1 3", "controller in shadow");
  entry("var(--faint)", 1, "1 4", "uniform");
  if (first.natural) entry("var(--faint)", 1, "7 4", "natural: by tokens");
}

function draw() {
  drawLoss();
  drawGrids();
  drawRivers();
  drawPace();
  root.dataset.charts = document.querySelectorAll(".chart svg").length;
  root.dataset.lines = document.querySelectorAll(".chart svg path").length;
}

function buildControls() {
  const nav = byId("controls");
  const bar = element("div", {}, nav);
  const chips = element("div", { class: "runs" }, bar);
  data.runs.forEach((run, i) => {
    const chip = element("button", { type: "button", class: "run", "aria-pressed": true, title: "show or hide this run" }, chips);
    chip.append(swatch(run), run.name);
    chip.onclick = () => { state.shown[i] = !state.shown[i]; chip.setAttribute("aria-pressed", state.shown[i]); draw(); };
  });
  const group = (names, key) => choice(element("span", { class: "switch" }, bar), names, key, draw);
  group([["steps", "steps"], ["tokens", "tokens"]], "axis");
  group([[0, "whole run"], [0.1, "from 10%"], [0.5, "from 50%"]], "from");
  group([[false, "linear"], [true, "log loss"]], "log");
  themeButton(bar, draw);
  nav.hidden = false;
  const kinds = Object.entries({ probability: "asked", share: "drawn", weighed: "in the loss", controller: "shadow" });
  choice(byId("mixture-switch"), kinds.filter(([kind]) => data.runs.some((run) => run[kind])), "mixture", drawRivers);
  const head = byId("domain-switch");
  choice(head, Object.entries(DOMAINS), "domain", drawGrids);
  if (data.domains.length > 8) {
    const search = element("input", { type: "search", placeholder: "filter domains", "aria-label": "filter domains" });
    search.oninput = () => { state.filter = search.value.trim().toLowerCase(); drawGrids(); };
    head.after(search);
  }
}

function swatch(run) {
  const svg = shape("svg", { width: 18, height: 6, "aria-hidden": "true" });
  shape("line", { x1: 0, x2: 18, y1: 3, y2: 3, stroke: runColor(run), "stroke-width": 3, "stroke-dasharray": runDash(run) ?? "none" }, svg);
  return svg;
}

if (compared) state.domain = "difference";
else if (data.runs.every((run) => run.valid.steps.length === 0)) state.domain = "train";
for (const cell of document.querySelectorAll("th[data-run]")) {
  cell.querySelector(".key").style.setProperty("--c", runColor(data.runs[cell.dataset.run]));
}
document.querySelectorAll("table.sortable").forEach(sortable);
buildControls();
draw();
watchPage(draw);
root.dataset.ready = "yes";
