/* Build the page from its data. All text of runs enters as text nodes, never as markup. */

const data = JSON.parse(document.getElementById("data").textContent);
const main = document.getElementById("main");
view.runNames = data.runs.map((run) => run.name);

function duration(seconds) {
  if (seconds < 90) return `${trimmed(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 90 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

function statTile(stat, run) {
  const series = data.charts.find((chart) => chart.id === stat.chart)?.series
    .find((one) => one.run === run && (one.name === "validation") === stat.validation);
  const sign = { higher: 1, lower: -1 }[stat.better] ?? 0;
  const gain = sign * (stat.last - stat.first);
  const best = stat.best === null ? null : element("div", { class: "then" }, `best ${shown(stat.best, stat.format)} at step ${stat.bestStep}`);
  return element("div", { class: "stat" },
    element("div", { class: "label" }, stat.title),
    element("div", { class: `value ${gain > 0 ? "better" : gain < 0 ? "worse" : ""}` }, shown(stat.last, stat.format)),
    element("div", { class: "then" }, `from ${shown(stat.first, stat.format)}`), best,
    series ? sparkline(series.x, smoothed(series.y, stat.validation ? 0 : 0.6), runColour(run)) : null);
}

function notesList(notes) {
  return notes.length ? element("ul", { class: "notes" }, ...notes.map((note) => element("li", {}, note))) : null;
}

function runCard(run, index) {
  const facts = [run.kind === "rl" ? "reinforcement learning" : "supervised fine-tuning", `${run.steps} steps`, run.seconds ? duration(run.seconds) : null,
    run.tokens ? `${compact(run.tokens)} tokens` : null, run.folder].filter(Boolean).join(" · ");
  const card = element("article", { class: "card run" }, element("h3", {}, run.name), element("p", { class: "facts" }, facts),
    run.numbers.length ? element("div", { class: "stats" }, ...run.numbers.map((stat) => statTile(stat, index))) : null, notesList(run.notes));
  card.style.setProperty("--colour", runColour(index));
  return card;
}

function section(name, ...content) {
  main.append(element("section", { id: name.toLowerCase().replaceAll(" ", "-") }, element("h2", {}, name), ...content));
}

function chartSections() {
  for (const name of new Set(data.charts.map((chart) => chart.section))) {
    const charts = data.charts.filter((chart) => chart.section === name).map((chart) => new Chart(chart).figure);
    section(name, element("div", { class: "grid" }, ...charts));
  }
  if (!data.charts.length) section("Charts", element("p", { class: "card missing" }, "There is nothing to draw yet: no step has been logged."));
}

function rolloutSection() {
  if (!data.runs.some((run) => run.kind === "rl")) return;
  if (!data.runs.some((run) => run.rollouts.length)) {
    section("Rollouts", element("p", { class: "card missing" }, "No rollouts were kept."));
    return;
  }
  const reader = new Reader(data.runs);
  section("Rollouts", element("p", { class: "soft" }, "Arrow keys move between samples and steps; hover a token for its numbers."), reader.node);
  view.onPick = (run, step) => reader.open(run, step);
}

function settingsSection() {
  const parts = [];
  if (data.differences.length) {
    const head = element("tr", {}, element("th", {}, "setting"), ...view.runNames.map((name) => element("th", {}, name)));
    const rows = data.differences.map((row) => element("tr", {}, element("td", {}, element("code", {}, row.key)), ...row.values.map((value) => element("td", {}, element("code", {}, value)))));
    parts.push(element("details", { class: "card", open: "" }, element("summary", {}, "Where the runs differ"),
      element("div", { class: "scroll" }, element("table", { class: "settings" }, head, ...rows))));
  }
  for (const run of data.runs.filter((one) => one.config)) {
    parts.push(element("details", { class: "card" }, element("summary", {}, `config.toml${data.runs.length > 1 ? ` of ${run.name}` : ""}`), element("pre", {}, run.config)));
  }
  section("Settings", ...(parts.length ? parts : [element("p", { class: "card missing" }, "The settings are not known: no config.toml.")]));
}

function redraw() {
  for (const chart of view.charts) chart.draw();
}

function legend() {
  return data.runs.length < 2 ? null : element("div", { class: "legend" }, ...data.runs.map((run, index) => {
    const dot = element("i", { class: "dot" });
    dot.style.background = runColour(index);
    const chip = element("button", { class: "chip", type: "button", title: "show or hide this run", onclick: () => {
      if (!view.hidden.delete(index)) view.hidden.add(index);
      chip.classList.toggle("off", view.hidden.has(index));
      redraw();
    } }, dot, run.name);
    return chip;
  }));
}

function themeButton() {
  const isDark = () => (document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  return element("button", { type: "button", title: "light or dark", onclick: () => { document.documentElement.dataset.theme = isDark() ? "light" : "dark"; } }, "◐");
}

function bar() {
  const links = [...main.querySelectorAll("section")].map((one) => element("a", { href: `#${one.id}` }, one.querySelector("h2").textContent));
  const smoothing = element("input", { type: "range", min: 0, max: 0.95, step: 0.05, value: view.smoothing, oninput: (event) => {
    view.smoothing = Number(event.target.value);
    redraw();
  } });
  document.getElementById("bar").append(...[element("nav", {}, ...links), legend(), element("label", {}, "smoothing", smoothing), themeButton()].filter(Boolean));
}

function build() {
  const steps = data.charts.flatMap((chart) => chart.series.flatMap((series) => [series.x[0], series.x.at(-1)]));
  view.steps = steps.length ? [Math.min(...steps), Math.max(...steps)] : [0, 1];
  view.smoothing = Math.max(0, ...data.runs.map((run) => run.steps)) > 60 ? 0.6 : 0;
  main.append(element("h1", {}, data.title), element("div", { class: "soft" }, `written ${data.written}`),
    element("div", { class: "runs" }, ...data.runs.map(runCard)), ...[notesList(data.notes)].filter(Boolean));
  chartSections();
  rolloutSection();
  settingsSection();
  bar();
  redraw();
  addEventListener("resize", redraw);
  document.documentElement.dataset.ready = "yes";
}

build();
