"use strict";
// Numbers, elements and scales: small helpers that know nothing of the report.

const SVG = "http://www.w3.org/2000/svg";

function element(name, attributes = {}, parent = null) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "text") node.textContent = value;
    else node.setAttribute(key, value);
  }
  if (parent) parent.append(node);
  return node;
}

function shape(name, attributes = {}, parent = null) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "text") node.textContent = value;
    else node.setAttribute(key, value);
  }
  if (parent) parent.append(node);
  return node;
}

function count(value) {
  const units = [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]];
  for (const [size, unit] of units) {
    if (Math.abs(value) >= size) return trim((value / size).toPrecision(3)) + unit;
  }
  return trim(value.toPrecision(3));
}

function trim(text) {
  return text.includes(".") && !text.includes("e") ? text.replace(/\.?0+$/, "") : text;
}

const loss = (value) => value.toFixed(Math.abs(value) < 0.1 ? 4 : 3);
const percent = (value) => {
  const part = 100 * value;
  return part.toFixed(Math.abs(part) < 1 ? 2 : 1) + "%";
};
const signed = (value) => (value > 0 ? "+" : "") + value.toFixed(4).replace("-", "−");
const plain = (value) => Math.round(value).toLocaleString("en");
const precise = (value) => trim(value.toPrecision(3));

// Labels of an axis: as many digits as its ticks need, all alike.
function tickLabels(values, format) {
  if (format !== loss && format !== percent) return values.map(format);
  const unit = format === percent ? 100 : 1;
  const step = Math.min(...values.slice(1).map((v, i) => Math.abs(v - values[i])), Infinity) * unit;
  const digits = Number.isFinite(step) ? Math.min(5, Math.max(0, -Math.floor(Math.log10(step) + 1e-9) + (isWhole(step) ? 0 : 1))) : 2;
  return values.map((v) => (unit * v).toFixed(digits).replace("-", "−") + (unit === 100 ? "%" : ""));
}

// Whether the step is one digit (0.2, 5), not two (0.25).
function isWhole(step) {
  const lead = step / 10 ** Math.floor(Math.log10(step) + 1e-9);
  return Math.abs(lead - Math.round(lead)) < 1e-6;
}

const known = (value) => value !== null && value !== undefined && Number.isFinite(value);

// Round numbers between low and high, about `wanted` of them.
function ticks(low, high, wanted) {
  const rough = (high - low) / Math.max(1, wanted);
  if (!(rough > 0)) return [low];
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
  const result = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) {
    result.push(Number((i * step).toPrecision(12)));
  }
  return result;
}

// On a logarithmic axis: 1-2-5 steps while few, round numbers of a linear axis within a decade.
function logTicks(low, high, wanted) {
  if (high / low < 8) return ticks(low, high, wanted).filter((v) => v > 0);
  const result = [];
  for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++) {
    for (const m of high / low > 1000 ? [1] : [1, 2, 5]) {
      const value = m * 10 ** e;
      if (value >= low * 0.999 && value <= high * 1.001) result.push(value);
    }
  }
  return result;
}

function scale(low, high, from, to, log) {
  const f = log ? Math.log : (v) => v;
  const a = f(low), span = f(high) - a || 1;
  return (value) => from + ((f(value) - a) / span) * (to - from);
}

// Index of the entry of the rising list nearest to `value`.
function nearest(list, value) {
  let low = 0, high = list.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (list[middle] < value) low = middle; else high = middle;
  }
  return high >= 0 && Math.abs(list[high] - value) < Math.abs(list[low] - value) ? high : low;
}

const tip = {
  node: null,
  show(event, title, rows) {
    this.node ??= element("div", { id: "tip" }, document.body);
    this.node.replaceChildren(element("b", { text: title }));
    for (const [color, name, value] of rows) {
      const line = element("div", {}, this.node);
      const label = element("span", {}, line);
      if (color) element("i", { class: "key", style: `--c:${color}` }, label);
      label.append(name);
      element("span", { text: value }, line);
    }
    this.node.hidden = false;
    const box = this.node.getBoundingClientRect();
    const right = event.clientX + 16 + box.width > innerWidth;
    this.node.style.left = Math.max(4, right ? event.clientX - box.width - 16 : event.clientX + 16) + "px";
    this.node.style.top = Math.max(4, Math.min(event.clientY + 12, innerHeight - box.height - 8)) + "px";
  },
  hide() { if (this.node) this.node.hidden = true; },
};
