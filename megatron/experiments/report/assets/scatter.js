// Points: in a plane, or in the triangle of three weights.

// points: {name, x, y, color, size?, rows: [[color, name, value]]}; lines: {x, y, color, dash?}
// options: {title, height, xName, xFormat, yFormat, xRange?, diagonal?, small?}
function scatterChart(host, points, lines, options) {
  host.replaceChildren();
  const seen = points.filter((p) => known(p.x) && known(p.y));
  if (!seen.length) {
    element("div", { class: "none", text: "nothing recorded" }, host);
    return;
  }
  const width = Math.max(160, host.clientWidth || 300), height = options.height;
  const ys = [...seen.map((p) => p.y), ...lines.flatMap((l) => l.y.filter(known))];
  const xs = options.xRange ?? seen.map((p) => p.x);
  let range = yRange([{ y: ys }], [], {});
  let x0 = Math.min(...xs), x1 = Math.max(...xs);
  if (options.diagonal) {
    const both = yRange([{ y: [...ys, ...xs] }], [], {});
    range = both; x0 = both.low; x1 = both.high;
  } else if (x0 === x1) { x0 -= 0.5; x1 += 0.5; }
  const yTicks = ticks(range.low, range.high, options.small ? 4 : 5);
  const yLabels = tickLabels(yTicks, options.yFormat);
  const digits = Math.max(3, ...yLabels.map((label) => label.length));
  const frame = { left: 10 + 6.2 * digits, right: 10, top: 10, bottom: 22 };
  const x = scale(x0, x1, frame.left + 4, width - frame.right - 4);
  const y = scale(range.low, range.high, height - frame.bottom, frame.top);
  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": options.title }, host);
  axes(svg, { x, y, x0, x1, yTicks, yLabels, frame, width, height, options });
  if (options.diagonal) shape("line", { x1: x(x0), y1: y(x0), x2: x(x1), y2: y(x1), stroke: "var(--faint)", "stroke-dasharray": "4 3" }, svg);
  for (const line of lines) curve(svg, { ...line, width: line.width ?? 1.5 }, x, y);
  const placed = seen.map((p) => dot(svg, p, x(p.x), y(p.y)));
  nearestDot(svg, placed, width, height);
}

function dot(svg, point, cx, cy) {
  const node = shape("circle", { class: "dot", cx: cx.toFixed(1), cy: cy.toFixed(1), r: point.size ?? 3.6, fill: point.hollow ? "none" : point.color, stroke: point.hollow ? point.color : "var(--card)", "stroke-width": point.hollow ? 2 : 0.8 }, svg);
  return { ...point, cx, cy, node };
}

// The mouse names the point next to it.
function nearestDot(svg, placed, width, height) {
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const px = ((event.clientX - box.left) / box.width) * width, py = ((event.clientY - box.top) / box.height) * height;
    let best = null, least = Infinity;
    for (const p of placed) {
      const far = Math.hypot(p.cx - px, p.cy - py);
      if (far < least) { least = far; best = p; }
    }
    for (const p of placed) p.node.setAttribute("r", p === best ? (p.size ?? 3.6) + 2 : p.size ?? 3.6);
    if (best) tip.show(event, best.name, best.rows);
  });
  svg.addEventListener("pointerleave", () => {
    for (const p of placed) p.node.setAttribute("r", p.size ?? 3.6);
    tip.hide();
  });
}

// points: {name, w: [a, b, c], color, size?, hollow?, rows}; names: of the corners.
function ternaryChart(host, points, names, options) {
  host.replaceChildren();
  const seen = points.filter((p) => p.w.every(known));
  if (!seen.length) {
    element("div", { class: "none", text: "nothing recorded" }, host);
    return;
  }
  const width = Math.max(200, host.clientWidth || 300);
  const side = Math.min(width - 36, 380), tall = (side * Math.sqrt(3)) / 2;
  const height = tall + 46, left = (width - side) / 2, base = 24 + tall;
  // The first domain at the top, the second at the left, the third at the right.
  const at = ([a, b, c]) => {
    const sum = a + b + c || 1;
    return [left + (side * (c + a / 2)) / sum, base - (tall * a) / sum];
  };
  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": options.title }, host);
  for (const part of [0.25, 0.5, 0.75]) {
    for (const [from, to] of [[[part, 1 - part, 0], [part, 0, 1 - part]], [[1 - part, part, 0], [0, part, 1 - part]], [[1 - part, 0, part], [0, 1 - part, part]]]) {
      const [x1, y1] = at(from), [x2, y2] = at(to);
      shape("line", { class: "gridline", x1, y1, x2, y2 }, svg);
    }
  }
  const corners = [[1, 0, 0], [0, 1, 0], [0, 0, 1]].map(at);
  shape("path", { d: `M${corners.map((p) => p.map((v) => v.toFixed(1)).join(",")).join("L")}Z`, fill: "none", stroke: "var(--faint)" }, svg);
  const cut = (name) => (name.length > 20 ? name.slice(0, 19) + "…" : name);
  shape("text", { class: "corner", x: corners[0][0], y: corners[0][1] - 9, "text-anchor": "middle", text: cut(names[0]) }, svg);
  shape("text", { class: "corner", x: Math.max(2, corners[1][0] - 12), y: base + 17, "text-anchor": "start", text: cut(names[1]) }, svg);
  shape("text", { class: "corner", x: Math.min(width - 2, corners[2][0] + 12), y: base + 17, "text-anchor": "end", text: cut(names[2]) }, svg);
  const placed = seen.map((p) => dot(svg, p, ...at(p.w)));
  nearestDot(svg, placed, width, height);
}
