// Lines over steps or tokens, with bands, points and reference lines.

// series: {name, color, x, y, low?, high?, width?, dash?, points?, faint?}
// options: {height, title, xName, xFormat, yFormat, zero?, log?, marks?: [{y, name, dash}], span?, from?, to?, small?,
//   single?: the mouse names the nearest line alone, for charts of many lines}
function lineChart(host, series, options) {
  host.replaceChildren();
  const seen = visible(series, options.from ?? -Infinity);
  if (!seen.length) {
    element("div", { class: "none", text: "nothing recorded" }, host);
    return false;
  }
  const width = Math.max(160, host.clientWidth || 300), height = options.height;
  const marks = options.marks ?? [];
  const range = yRange(seen, marks, options);
  const yTicks = (range.log ? logTicks : ticks)(range.low, range.high, options.small ? 3 : 5);
  const yLabels = tickLabels(yTicks, options.yFormat);
  const digits = Math.max(3, ...yLabels.map((label) => label.length));
  const frame = { left: 10 + 6.2 * digits, right: options.small ? 6 : 10, top: 8, bottom: 22 };
  const xs = seen.flatMap((s) => [s.x[0], s.x[s.x.length - 1]]);
  let x0 = Math.min(...xs), x1 = Math.max(...xs);
  if (x0 === x1) { x0 -= 0.5; x1 += 0.5; }
  const x = scale(x0, x1, frame.left, width - frame.right);
  const y = scale(range.low, range.high, height - frame.bottom, frame.top, range.log);
  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": options.title }, host);
  axes(svg, { x, y, x0, x1, yTicks, yLabels, frame, width, height, options });
  for (const mark of marks) {
    const at = y(mark.y);
    shape("line", { x1: frame.left, x2: width - frame.right, y1: at, y2: at, stroke: "var(--faint)", "stroke-dasharray": mark.dash }, svg);
  }
  for (const s of seen) band(svg, s, x, y);
  for (const s of seen) curve(svg, s, x, y);
  hover(svg, seen, { x, y, x0, x1, frame, width, height, options });
  return true;
}

// The part of each series from `from` on, where there is anything to see.
function visible(series, from) {
  const result = [];
  for (const s of series) {
    if (!s.x?.length || !s.y || !s.y.some(known)) continue;
    let start = 0;
    while (start < s.x.length - 2 && s.x[start] < from) start++;
    const cut = (list) => list && (start ? list.slice(start) : list);
    const part = { ...s, x: cut(s.x), y: cut(s.y), low: cut(s.low), high: cut(s.high) };
    if (part.y.some(known)) result.push(part);
  }
  return result;
}

function yRange(series, marks, options) {
  let low = Infinity, high = -Infinity;
  for (const s of series) {
    for (const list of [s.y, s.low, s.high]) {
      for (const value of list ?? []) {
        if (!known(value)) continue;
        if (value < low) low = value;
        if (value > high) high = value;
      }
    }
  }
  for (const value of options.span ?? []) { low = Math.min(low, value); high = Math.max(high, value); }
  for (const mark of marks) { low = Math.min(low, mark.y); high = Math.max(high, mark.y); }
  const log = Boolean(options.log) && low > 0;
  if (options.zero && !log) { low = Math.min(0, low); return { low, high: high > low ? high + (high - low) * 0.06 : low + 1, log }; }
  if (high === low) { const pad = Math.abs(high) * 0.05 || 1; return { low: low - pad, high: high + pad, log: false }; }
  if (log) { const pad = (high / low) ** 0.05; return { low: low / pad, high: high * pad, log }; }
  const pad = (high - low) * 0.05;
  return { low: low - pad, high: high + pad, log };
}

function axes(svg, { x, y, x0, x1, yTicks, yLabels, frame, width, height, options }) {
  yTicks.forEach((value, i) => {
    const at = y(value);
    shape("line", { class: "gridline", x1: frame.left, x2: width - frame.right, y1: at, y2: at }, svg);
    shape("text", { x: frame.left - 6, y: at + 3.5, "text-anchor": "end", text: yLabels[i] }, svg);
  });
  const base = height - frame.bottom;
  shape("line", { class: "axis", x1: frame.left, x2: width - frame.right, y1: base, y2: base, "stroke-opacity": 0.6 }, svg);
  const room = Math.max(2, Math.floor((width - frame.left) / (options.small ? 80 : 95)));
  const list = ticks(x0, x1, room);
  for (const value of list) {
    const at = x(value);
    const last = at > width - frame.right - 18;
    const text = options.xFormat(value) + (value === list[list.length - 1] && !options.small ? " " + options.xName : "");
    shape("text", { x: last ? width - frame.right : at, y: height - 6, "text-anchor": last || text.includes(" ") && at > width - 60 ? "end" : "middle", text }, svg);
  }
}

function band(svg, s, x, y) {
  if (!s.low || !s.high) return;
  let up = "", down = "";
  for (let i = 0; i < s.x.length; i++) {
    if (!known(s.low[i]) || !known(s.high[i])) continue;
    const at = x(s.x[i]).toFixed(1);
    up += `${up ? "L" : "M"}${at},${y(s.high[i]).toFixed(1)}`;
    down = `L${at},${y(s.low[i]).toFixed(1)}` + down;
  }
  if (up) shape("path", { d: up + down + "Z", fill: s.color, "fill-opacity": 0.14 }, svg);
}

// A break is drawn only where the series is dense; a rare domain's points are joined.
function curve(svg, s, x, y) {
  let path = "", started = false;
  const dots = [];
  for (let i = 0; i < s.x.length; i++) {
    if (!known(s.y[i])) continue;
    const a = x(s.x[i]).toFixed(1), b = y(s.y[i]).toFixed(1);
    path += `${started ? "L" : "M"}${a},${b}`;
    started = true;
    dots.push([a, b]);
  }
  const style = { fill: "none", stroke: s.color, "stroke-width": s.width ?? 1.75, "stroke-linejoin": "round", "stroke-linecap": "round" };
  if (s.dash) style["stroke-dasharray"] = s.dash;
  if (s.faint) style["stroke-opacity"] = s.faint;
  shape("path", { d: path, class: "line", ...style }, svg);
  if (dots.length === 1 || (s.points && dots.length <= 40)) {
    for (const [a, b] of dots) shape("circle", { cx: a, cy: b, r: 2.2, fill: s.color }, svg);
  }
}

function hover(svg, series, { x, y, x0, x1, frame, width, height, options }) {
  const cursor = shape("g", { visibility: "hidden" }, svg);
  const line = shape("line", { class: "cursor", y1: frame.top, y2: height - frame.bottom }, cursor);
  const dots = series.map((s) => shape("circle", { r: 3, fill: s.color, stroke: "var(--card)" }, cursor));
  const lines = svg.querySelectorAll("path.line");
  // A chart of single points answers everywhere.
  const slack = (x1 - x0) * (series.every((s) => s.x.length === 1) ? 1 : 0.02);
  shape("rect", { x: frame.left, y: 0, width: width - frame.left, height, fill: "transparent" }, svg);
  const move = (event) => {
    const box = svg.getBoundingClientRect();
    const px = ((event.clientX - box.left) / box.width) * width;
    const at = x0 + ((px - frame.left) / (width - frame.left - frame.right)) * (x1 - x0);
    const rows = [];
    let where = null;
    const py = ((event.clientY - box.top) / box.height) * height;
    const chosen = options.single ? nearestLine(series, at, (value) => Math.abs(y(value) - py)) : null;
    lines.forEach((path, k) => path.classList.toggle("chosen", k === chosen));
    series.forEach((s, k) => {
      const i = nearest(s.x, at);
      const show = (chosen === null || k === chosen) && known(s.y[i]) && at >= s.x[0] - slack && at <= s.x[s.x.length - 1] + slack;
      dots[k].setAttribute("visibility", show ? "inherit" : "hidden");
      if (!show) return;
      if (where === null || Math.abs(s.x[i] - at) < Math.abs(where - at)) where = s.x[i];
      dots[k].setAttribute("cx", x(s.x[i]));
      dots[k].setAttribute("cy", y(s.y[i]));
      const between = s.low && known(s.low[i]) && s.low[i] !== s.high[i] ? ` (${options.yFormat(s.low[i])} to ${options.yFormat(s.high[i])})` : "";
      rows.push([s.color, s.name, (options.tipFormat ?? options.yFormat)(s.y[i]) + between]);
    });
    if (where === null) { leave(); return; }
    line.setAttribute("x1", x(where));
    line.setAttribute("x2", x(where));
    cursor.setAttribute("visibility", "visible");
    for (const mark of options.marks ?? []) rows.push([null, mark.name, options.yFormat(mark.y)]);
    tip.show(event, `${options.xName} ${options.xTip(where)}`, rows);
  };
  const leave = () => {
    cursor.setAttribute("visibility", "hidden");
    lines.forEach((path) => path.classList.remove("chosen"));
    tip.hide();
  };
  svg.addEventListener("pointermove", move);
  svg.addEventListener("pointerleave", leave);
}

// Index of the series that passes nearest to the pointer, by a distance of its value.
function nearestLine(series, at, distance) {
  let best = null, least = Infinity;
  series.forEach((s, k) => {
    const value = s.y[nearest(s.x, at)];
    if (known(value) && distance(value) < least) { least = distance(value); best = k; }
  });
  return best;
}
