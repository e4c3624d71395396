// Estimates with intervals, a row each; and amounts by kind, stacked.

const ROW = 24;

function nameRoom(rows, width) {
  const longest = Math.max(...rows.map((row) => row.name.length));
  return Math.min(width * 0.36, 14 + 6.3 * Math.min(longest, 30));
}

function rowName(svg, text, x, y) {
  const name = text.length > 30 ? text.slice(0, 29) + "…" : text;
  shape("text", { class: "name", x, y, "text-anchor": "end", text: name }, svg);
}

// rows: {name, value, low, high, inner?: [low, high], color?, rows?}
// options: {title, format, zero?: value of the upright line, tickFormat?}
function forestChart(host, rows, options) {
  host.replaceChildren();
  const ends = rows.flatMap((r) => [r.value, r.low, r.high, ...(r.inner ?? [])]).filter(known);
  if (!ends.length) {
    element("div", { class: "none", text: "nothing recorded" }, host);
    return;
  }
  if (known(options.zero)) ends.push(options.zero);
  const width = Math.max(240, host.clientWidth || 400), height = rows.length * ROW + 34;
  const left = nameRoom(rows, width);
  let low = Math.min(...ends), high = Math.max(...ends);
  const pad = (high - low) * 0.05 || Math.abs(high) * 0.1 || 1;
  low -= pad; high += pad;
  const x = scale(low, high, left + 8, width - 14);
  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": options.title }, host);
  const base = rows.length * ROW + 8;
  const list = ticks(low, high, Math.max(2, Math.floor((width - left) / 64)));
  const labels = tickLabels(list, options.tickFormat ?? options.format);
  list.forEach((value, i) => {
    shape("line", { class: "gridline", x1: x(value), x2: x(value), y1: 4, y2: base }, svg);
    shape("text", { x: x(value), y: base + 16, "text-anchor": "middle", text: labels[i] }, svg);
  });
  if (known(options.zero)) shape("line", { class: "axis", x1: x(options.zero), x2: x(options.zero), y1: 4, y2: base }, svg);
  rows.forEach((row, k) => {
    const y = 8 + ROW * (k + 0.5), color = row.color ?? "var(--focus)";
    rowName(svg, row.name, left, y + 4);
    const bar = (a, b, stroke) => shape("line", { x1: x(a), x2: x(b), y1: y, y2: y, stroke: color, "stroke-width": stroke, "stroke-linecap": "round" }, svg);
    if (known(row.low) && known(row.high)) bar(row.low, row.high, 1.6);
    if (row.inner && row.inner.every(known)) bar(row.inner[0], row.inner[1], 4);
    if (known(row.value)) shape("circle", { class: "dot", cx: x(row.value), cy: y, r: 4.2, fill: color, stroke: "var(--card)" }, svg);
    else shape("text", { x: left + 12, y: y + 4, text: "not known" }, svg);
    rowHover(svg, k, width, row, row.rows ?? [[color, "estimate", known(row.value) ? options.format(row.value) : "–"], ...(known(row.low) ? [[null, "interval", `${options.format(row.low)} to ${options.format(row.high)}`]] : [])]);
  });
}

// rows: {name, parts: [{name, value, color}]}; options: {title, format}
function stackChart(host, rows, options) {
  host.replaceChildren();
  const sum = (row) => row.parts.reduce((all, part) => all + (part.value ?? 0), 0);
  const most = Math.max(0, ...rows.map(sum));
  if (!(most > 0)) {
    element("div", { class: "none", text: "nothing recorded" }, host);
    return;
  }
  const width = Math.max(240, host.clientWidth || 400), height = rows.length * ROW + 34;
  const left = nameRoom(rows, width), base = rows.length * ROW + 8;
  const x = scale(0, most * 1.02, left + 8, width - 14);
  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": options.title }, host);
  for (const value of ticks(0, most, Math.max(2, Math.floor((width - left) / 64)))) {
    shape("line", { class: "gridline", x1: x(value), x2: x(value), y1: 4, y2: base }, svg);
    shape("text", { x: x(value), y: base + 16, "text-anchor": "middle", text: options.format(value) }, svg);
  }
  rows.forEach((row, k) => {
    const y = 8 + ROW * k;
    rowName(svg, row.name, left, y + ROW / 2 + 4);
    let from = 0;
    for (const part of row.parts) {
      if (!(part.value > 0)) continue;
      shape("rect", { x: x(from), y: y + 4, width: Math.max(0.5, x(from + part.value) - x(from)), height: ROW - 8, fill: part.color, stroke: "var(--card)", "stroke-width": 0.5 }, svg);
      from += part.value;
    }
    const rows_ = row.parts.filter((part) => part.value > 0).map((part) => [part.color, part.name, options.format(part.value)]);
    rowHover(svg, k, width, row, [...rows_, [null, "all", options.format(sum(row))]]);
  });
}

function rowHover(svg, k, width, row, lines) {
  const area = shape("rect", { x: 0, y: 8 + ROW * k, width, height: ROW, fill: "transparent" }, svg);
  area.addEventListener("pointermove", (event) => tip.show(event, row.name, lines));
  area.addEventListener("pointerleave", () => tip.hide());
}

function colorKeys(host, list) {
  host.replaceChildren();
  for (const [name, color] of list) {
    const item = element("span", {}, host);
    element("i", { style: `--c:${color}` }, item);
    item.append(name);
  }
}
