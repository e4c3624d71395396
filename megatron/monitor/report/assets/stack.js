// The mixture as a river: shares of the domains stacked over steps or tokens.

// More bands than this are hair lines: then the largest are shown and the rest is one band.
const MOST_BANDS = 24;
const KEPT_BANDS = 15;
const LINE = 12.5;

// A hue for each domain, neighbours far apart, the same in every chart of the page.
function domainColor(index, dark) {
  const hue = (255 + index * 137.508) % 360;
  const light = (dark ? [0.66, 0.57, 0.74] : [0.74, 0.64, 0.82])[index % 3];
  return `oklch(${light} ${dark ? 0.1 : 0.095} ${hue.toFixed(0)})`;
}

// Bands for the largest domains and one for all others: {name, color, y}.
function bands(shares, names, dark) {
  const totals = shares.map((list) => (list ? list.reduce((a, b) => a + (b ?? 0), 0) : -1));
  const order = names.map((_, k) => k).filter((k) => totals[k] >= 0);
  const kept = new Set([...order].sort((a, b) => totals[b] - totals[a]).slice(0, order.length > MOST_BANDS ? KEPT_BANDS : MOST_BANDS));
  const result = order.filter((k) => kept.has(k)).map((k) => ({ name: names[k], color: domainColor(k, dark), y: shares[k] }));
  const rest = order.filter((k) => !kept.has(k));
  if (rest.length) {
    const sum = shares[rest[0]].map((_, i) => rest.reduce((a, k) => a + (shares[k][i] ?? 0), 0));
    result.push({ name: `${rest.length} others`, color: "var(--faint)", y: sum });
  }
  return result;
}

function river(host, x, list, options) {
  host.replaceChildren();
  const width = Math.max(240, host.clientWidth || 500), height = options.height;
  const frame = { left: 38, right: 118, top: 8, bottom: 22 };
  // Each share holds over its bin: the first bin begins where the axis does.
  const single = x.length === 1;
  const x0 = single ? x[0] - 0.5 : x[0], x1 = single ? x[0] + 0.5 : x[x.length - 1];
  const px = scale(x0, x1, frame.left, width - frame.right);
  const py = scale(0, 1, height - frame.bottom, frame.top);
  const points = single ? [x0, x1] : x;
  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": options.title }, host);
  const low = new Array(points.length).fill(0);
  const labels = [];
  for (const b of list) {
    let up = "", down = "";
    for (let i = 0; i < points.length; i++) {
      const at = px(points[i]).toFixed(1), share = b.y[single ? 0 : i] ?? 0;
      down = `L${at},${py(low[i]).toFixed(1)}` + down;
      low[i] = Math.min(1, low[i] + share);
      up += `${i ? "L" : "M"}${at},${py(low[i]).toFixed(1)}`;
    }
    shape("path", { d: up + down + "Z", class: "area", fill: b.color, stroke: "var(--card)", "stroke-width": 0.75 }, svg);
    const last = b.y[b.y.length - 1] ?? 0;
    labels.push({ name: b.name, y: py(low[points.length - 1] - last / 2), share: last });
  }
  for (const value of [0, 0.25, 0.5, 0.75, 1]) {
    shape("text", { x: frame.left - 6, y: py(value) + 3.5, "text-anchor": "end", text: 100 * value + "%" }, svg);
  }
  const room = Math.max(2, Math.floor((width - frame.left - frame.right) / 95));
  for (const value of ticks(x0, x1, room)) {
    shape("text", { x: px(value), y: height - 6, "text-anchor": "middle", text: options.xFormat(value) }, svg);
  }
  riverLabels(svg, labels, width - frame.right + 7, frame.top, height - frame.bottom);
  riverHover(svg, x, list, { px, x0, x1, frame, width, height, options });
}

// Names at the right edge, pushed apart; the thinnest go without when there is no room.
function riverLabels(svg, labels, left, top, bottom) {
  const most = Math.floor((bottom - top + 8) / LINE);
  const shown = [...labels].sort((a, b) => b.share - a.share).slice(0, most).sort((a, b) => b.y - a.y);
  let limit = bottom + 5;
  for (const label of shown) { label.at = Math.min(label.y + 4, limit); limit = label.at - LINE; }
  let floor = top + 6;
  for (const label of [...shown].reverse()) { label.at = Math.max(label.at, floor); floor = label.at + LINE; }
  for (const label of shown) {
    const name = label.name.length > 17 ? label.name.slice(0, 16) + "…" : label.name;
    shape("text", { class: "name", x: left, y: label.at, text: name }, svg);
  }
}

function riverHover(svg, x, list, { px, x0, x1, frame, width, height, options }) {
  const line = shape("line", { class: "cursor", y1: frame.top, y2: height - frame.bottom, visibility: "hidden" }, svg);
  shape("rect", { x: frame.left, y: 0, width: width - frame.left - frame.right, height, fill: "transparent" }, svg);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const at = x0 + ((((event.clientX - box.left) / box.width) * width - frame.left) / (width - frame.left - frame.right)) * (x1 - x0);
    const i = nearest(x, at);
    line.setAttribute("x1", px(x[i]));
    line.setAttribute("x2", px(x[i]));
    line.setAttribute("visibility", "visible");
    const rows = [...list].reverse().map((b) => [b.color, b.name, percent(b.y[i] ?? 0)]);
    tip.show(event, `${options.xName} ${options.xTip(x[i])}`, rows);
  });
  svg.addEventListener("pointerleave", () => { line.setAttribute("visibility", "hidden"); tip.hide(); });
}
