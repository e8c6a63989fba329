/* Charts as SVG: lines of one metric (a colour a run), stacks of the parts of a whole; hovering shows values everywhere. */

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

function shape(tag, attributes = {}, text = null) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== null) made.textContent = text;
  return made;
}

function compact(value) {
  const size = Math.abs(value);
  if (size >= 1e9) return `${trimmed(value / 1e9)}G`;
  if (size >= 1e6) return `${trimmed(value / 1e6)}M`;
  if (size >= 1e4) return `${trimmed(value / 1e3)}k`;
  if (size >= 100) return value.toFixed(size >= 1000 || Number.isInteger(value) ? 0 : 1);
  if (size === 0) return "0";
  return size < 1e-3 ? value.toExponential(2).replace(/\.?0+e/, "e") : String(Number(value.toPrecision(4)));
}

const trimmed = (value) => String(Number(value.toPrecision(3)));

function shown(value, format) {
  if (value === null || value === undefined) return "–";
  if (format === "percent") return `${Number((value * 100).toFixed(Math.abs(value) < 0.01 ? 3 : 1))} %`;
  if (format === "seconds") return value < 1 ? `${trimmed(value * 1000)} ms` : `${trimmed(value)} s`;
  return compact(value);
}

function niceTicks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * ([1, 2, 2.5, 5, 10].find((factor) => factor * power >= rough * 0.999) ?? 10);
  const ticks = [];
  for (let tick = Math.ceil(low / step - 1e-9) * step; tick <= high + step * 1e-9; tick += step) ticks.push(Number(tick.toPrecision(12)));
  return ticks;
}

function logTicks(low, high) {
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
    for (const factor of high / low > 40 ? [1] : [1, 2, 5]) {
      const tick = factor * 10 ** power;
      if (tick >= low * 0.999 && tick <= high * 1.001) ticks.push(tick);
    }
  }
  return ticks.length > 6 ? ticks.filter((_, at) => at % Math.ceil(ticks.length / 6) === 0) : ticks;
}

/* Debiased exponential moving average, so that the first points are not pulled to zero. */
function smoothed(values, amount) {
  let mean = 0, weight = 0;
  return values.map((value) => {
    if (value === null) return null;
    mean = mean * amount + value * (1 - amount);
    weight = weight * amount + (1 - amount);
    return mean / weight;
  });
}

function nearest(xs, x) {
  let low = 0, high = xs.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] < x) low = middle; else high = middle;
  }
  return x - xs[low] <= xs[high] - x ? low : high;
}

const view = { hidden: new Set(), smoothing: 0, charts: [], steps: [0, 1], step: null, onPick: null };
const runColour = (run) => `var(--run-${run % 8})`;
const partColour = (chart, part, index) => (chart.verdicts ? `var(--${part.name})` : `var(--part-${index % 8})`);

class Chart {
  constructor(data) {
    this.data = data;
    this.log = false;
    this.plot = element("div", { class: "plot" });
    const toggle = element("button", { class: "log", type: "button", "aria-pressed": "false", title: "logarithmic axis", onclick: () => {
      this.log = !this.log;
      toggle.setAttribute("aria-pressed", this.log);
      this.draw();
    } }, "log");
    const head = element("div", { class: "head" },
      element("div", {}, element("h3", {}, data.title), element("p", {}, data.about)), data.kind === "lines" ? toggle : null);
    this.figure = element("figure", { class: "card", id: `chart-${data.id}` }, head, this.plot, this.parts());
    view.charts.push(this);
  }

  parts() {
    if (this.data.kind !== "stack") return null;
    return element("div", { class: "parts" }, ...this.data.series.map((part, index) => {
      const dot = element("i", { class: "dot" });
      dot.style.background = partColour(this.data, part, index);
      return element("span", {}, dot, part.name);
    }));
  }

  visible() {
    return this.data.series.filter((series) => !view.hidden.has(series.run));
  }

  draw() {
    this.figure.hidden = !this.visible().length;
    if (this.figure.hidden) return;
    this.width = Math.max(220, this.plot.clientWidth);
    this.height = this.plot.clientHeight || 200;
    this.svg = shape("svg", { viewBox: `0 0 ${this.width} ${this.height}`, role: "img" });
    this.svg.append(shape("title", {}, this.data.title));
    this.prepare();
    this.axes();
    if (this.data.kind === "stack") this.drawStack(); else this.drawLines();
    this.cross = shape("line", { class: "cross", y1: this.top, y2: this.bottom, visibility: "hidden" });
    this.svg.append(this.cross);
    this.svg.addEventListener("mousemove", (event) => this.hover(event));
    this.svg.addEventListener("mouseleave", leave);
    this.svg.addEventListener("click", () => view.onPick && this.step !== undefined && view.onPick(this.data.series[0].run, this.step));
    this.plot.replaceChildren(this.svg);
    this.mark(view.step);
  }

  /* Settle what is drawn and the scales of both axes. */
  prepare() {
    const series = this.visible();
    const isStack = this.data.kind === "stack";
    this.lines = series.map((one) => {
      const smooths = !isStack && view.smoothing > 0 && one.name === "training" && this.data.smooth && one.x.length > 4;
      return { ...one, raw: smooths ? one.y : null, y: smooths ? smoothed(one.y, view.smoothing) : one.y };
    });
    const all = isStack ? (series[0]?.x ?? []).map((_, at) => series.reduce((sum, part) => sum + (part.y[at] ?? 0), 0))
      : this.lines.flatMap((line) => [...line.y, ...(line.raw ?? [])]).filter((value) => value !== null && (!this.log || value > 0));
    let low = all.reduce((a, b) => Math.min(a, b), Infinity), high = all.reduce((a, b) => Math.max(a, b), -Infinity);
    if (!(low <= high)) [low, high] = [this.log ? 0.1 : 0, 1];
    if (isStack) low = 0;
    if (low === 0 && high === 0) high = this.log || this.data.format !== "percent" ? 1 : 0.01;
    else if (high - low <= 1e-9 * Math.abs(high)) [low, high] = this.log ? [low / 2, high * 2] : [low - (Math.abs(low) * 0.1 || 0.5), high + (Math.abs(high) * 0.1 || 0.5)];
    else if (!this.log) {
      const isNearZero = low >= 0 && low < high * 0.35;
      const air = (high - low) * 0.06;
      low = isStack || isNearZero ? 0 : low - air;
      high = isStack && this.data.verdicts ? 1 : high + air;
    }
    [this.low, this.high] = [low, high];
    this.ticks = this.log ? logTicks(low, high) : niceTicks(low, high, 4);
    const widest = Math.max(...this.ticks.map((tick) => shown(tick, this.data.format).length), 2);
    [this.left, this.right, this.top, this.bottom] = [10 + widest * 6.4, this.width - 8, 8, this.height - 22];
  }

  x(step) {
    const [first, last] = view.steps;
    return this.left + ((step - first) / (last - first || 1)) * (this.right - this.left);
  }

  y(value) {
    const share = this.log ? Math.log(Math.max(value, this.low) / this.low) / Math.log(this.high / this.low) : (value - this.low) / (this.high - this.low);
    return this.bottom - share * (this.bottom - this.top);
  }

  axes() {
    for (const tick of this.ticks) {
      const y = this.y(tick);
      this.svg.append(shape("line", { class: "rule", x1: this.left, x2: this.right, y1: y, y2: y }));
      this.svg.append(shape("text", { x: this.left - 7, y: y + 4, "text-anchor": "end" }, shown(tick, this.data.format)));
    }
    for (const tick of niceTicks(...view.steps, 5).filter(Number.isInteger)) {
      this.svg.append(shape("text", { x: this.x(tick), y: this.bottom + 16, "text-anchor": "middle" }, compact(tick)));
    }
  }

  /* A path with gaps where values are missing. */
  path(xs, ys) {
    let command = "M";
    return xs.map((step, at) => {
      if (ys[at] === null || (this.log && ys[at] <= 0)) { command = "M"; return ""; }
      const point = `${command}${this.x(step).toFixed(1)} ${this.y(ys[at]).toFixed(1)}`;
      command = "L";
      return point;
    }).join("");
  }

  drawLines() {
    for (const line of this.lines) {
      const style = `stroke:${runColour(line.run)}`;
      if (line.raw) this.svg.append(shape("path", { class: "raw", style, d: this.path(line.x, line.raw) }));
      this.svg.append(shape("path", { class: `line ${line.name}`, style, d: this.path(line.x, line.y) }));
      if (line.name !== "validation" && line.x.length > 1) continue;
      line.x.forEach((step, at) => line.y[at] !== null && line.x.length <= 60 && this.svg.append(
        shape("circle", { cx: this.x(step), cy: this.y(line.y[at]), r: 3.2, style: `fill:var(--card);stroke-width:1.8;${style}` })));
    }
  }

  drawStack() {
    const base = (this.lines[0]?.x ?? []).map(() => 0);
    this.lines.forEach((part, index) => {
      const under = part.x.map((step, at) => `${this.x(step).toFixed(1)} ${this.y(base[at]).toFixed(1)}`);
      part.y.forEach((value, at) => { base[at] += value ?? 0; });
      const over = part.x.map((step, at) => `${this.x(step).toFixed(1)} ${this.y(base[at]).toFixed(1)}`);
      const d = `M${over.join("L")}L${under.reverse().join("L")}Z`;
      this.svg.append(shape("path", { class: "area", d, style: `fill:${partColour(this.data, part, index)}` }));
    });
  }

  hover(event) {
    const box = this.svg.getBoundingClientRect();
    const [first, last] = view.steps;
    const at = ((event.clientX - box.left) * (this.width / box.width) - this.left) / (this.right - this.left);
    const wanted = first + Math.min(1, Math.max(0, at)) * (last - first);
    const steps = this.lines.filter((line) => line.x.length).map((line) => line.x[nearest(line.x, wanted)]);
    if (!steps.length) return;
    this.step = steps.reduce((a, b) => (Math.abs(b - wanted) < Math.abs(a - wanted) ? b : a));
    view.step = this.step;
    for (const chart of view.charts) chart.mark(this.step);
    const rows = (this.data.kind === "stack" ? [...this.lines].reverse() : this.lines).map((line) => this.row(line));
    const table = element("table", {}, ...rows.filter(Boolean));
    const hint = view.onPick ? element("div", { class: "hint" }, "click to read rollouts of this step") : null;
    showTooltip(event, element("div", { class: "soft" }, `step ${this.step}`), table, hint);
  }

  row(line) {
    const at = line.x.length ? nearest(line.x, this.step) : -1;
    const reach = (view.steps[1] - view.steps[0]) * 0.03;
    if (at < 0 || (line.x[at] !== this.step && Math.abs(line.x[at] - this.step) > reach)) return null;
    const isStack = this.data.kind === "stack";
    const dot = element("i", { class: "dot" });
    dot.style.background = isStack ? partColour(this.data, line, this.lines.indexOf(line)) : runColour(line.run);
    const run = view.runNames.length > 1 ? view.runNames[line.run] : "";
    const name = isStack ? line.name : [run, line.name === "validation" || !run ? line.name : ""].filter(Boolean).join(", ");
    return element("tr", {}, element("td", {}, dot), element("td", {}, name), element("td", {}, shown((line.raw ?? line.y)[at], this.data.format)));
  }

  mark(step) {
    if (!this.cross || this.figure.hidden) return;
    this.cross.setAttribute("visibility", step === null ? "hidden" : "visible");
    if (step !== null) for (const end of ["x1", "x2"]) this.cross.setAttribute(end, this.x(step));
  }
}

function leave() {
  document.getElementById("tooltip").hidden = true;
  view.step = null;
  for (const chart of view.charts) chart.mark(null);
}

function showTooltip(event, ...content) {
  const tooltip = document.getElementById("tooltip");
  tooltip.replaceChildren(...content.filter(Boolean));
  tooltip.hidden = false;
  const { offsetWidth: width, offsetHeight: height } = tooltip;
  tooltip.style.left = `${event.clientX + 18 + width > innerWidth ? Math.max(4, event.clientX - width - 14) : event.clientX + 18}px`;
  tooltip.style.top = `${Math.max(4, Math.min(event.clientY + 14, innerHeight - height - 8))}px`;
}

function sparkline(xs, ys, colour) {
  const points = xs.map((step, at) => [step, ys[at]]).filter(([, value]) => value !== null);
  const made = shape("svg", { viewBox: "0 0 160 30", preserveAspectRatio: "none", "aria-hidden": "true" });
  if (points.length < 2) return made;
  const values = points.map(([, value]) => value);
  const low = Math.min(...values), high = Math.max(...values), first = points[0][0], last = points.at(-1)[0];
  const place = ([step, value]) => `${(((step - first) / (last - first || 1)) * 158 + 1).toFixed(1)} ${(28 - ((value - low) / (high - low || 1)) * 26).toFixed(1)}`;
  made.append(shape("path", { d: `M${points.map(place).join("L")}`, fill: "none", "stroke-width": 1.5, "vector-effect": "non-scaling-stroke", style: `stroke:${colour}` }));
  return made;
}
