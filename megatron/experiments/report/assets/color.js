// Colours of runs: by name while they are few, by how well they did when they are many.

const FEW_ENTRIES = 8;

// 0 is the best: the strongest colour of a scale whose lightness rises or falls all along.
function rampColor(part) {
  const t = Math.min(1, Math.max(0, part));
  const light = dark() ? 0.86 - 0.44 * t : 0.44 + 0.4 * t;
  return `oklch(${light.toFixed(3)} ${(0.17 - 0.05 * t).toFixed(3)} ${(265 - 185 * t).toFixed(0)})`;
}

// Function from a value to a colour; half of the scale goes to the better half of the values.
function ramp(values) {
  const sorted = values.filter(known).sort((a, b) => a - b);
  if (!sorted.length) return () => "var(--faint)";
  const low = sorted[0], high = sorted[sorted.length - 1], middle = sorted[sorted.length >> 1];
  return (value) => {
    if (!known(value)) return "var(--faint)";
    if (high === low) return rampColor(0);
    if (value <= middle) return rampColor(middle > low ? (0.5 * (value - low)) / (middle - low) : 0);
    return rampColor(0.5 + (0.5 * (value - middle)) / (high - middle));
  };
}

function rampLegend(host, values, name) {
  const list = values.filter(known);
  if (!list.length) return;
  const stops = [0, 0.25, 0.5, 0.75, 1].map(rampColor).join(",");
  host.append(`${name ? name + ": " : ""}${loss(Math.min(...list))}`);
  element("span", { class: "ramp", style: `background:linear-gradient(90deg,${stops})` }, host);
  host.append(loss(Math.max(...list)));
}

function entryColors(family) {
  if (family.entries.length <= FEW_ENTRIES) return family.entries.map((_, k) => `var(--run-${k})`);
  const color = ramp(family.entries.map((entry) => entry.mean));
  return family.entries.map((entry) => color(entry.mean));
}
