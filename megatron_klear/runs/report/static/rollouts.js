/* The reader of rollouts: choose a run, a step and a sample; the response's tokens are shaded by what the policy made of them. */

class Reader {
  constructor(runs) {
    this.runs = runs.map((run, index) => ({ ...run, index })).filter((run) => run.rollouts.length);
    this.state = { run: 0, step: 0, sample: 0, verdict: "", shade: "logprobs" };
    this.tools = element("div", { class: "tools" });
    this.list = element("ol", { class: "samples" });
    this.detail = element("div", { class: "sample" });
    this.node = element("div", { class: "card reader", id: "reader" }, this.tools, this.list, this.detail);
    this.node.tabIndex = 0;
    this.node.addEventListener("keydown", (event) => this.key(event));
    this.state.step = this.run.rollouts.length - 1;
    this.state.shade = this.samples().some((sample) => sample.ratio) ? "ratio" : "logprobs";
    this.buildTools();
    this.update();
  }

  get run() { return this.runs[this.state.run]; }
  get step() { return this.run.rollouts[this.state.step]; }

  samples() {
    return this.step.samples.filter((sample) => !this.state.verdict || sample.verdict === this.state.verdict);
  }

  buildTools() {
    const options = this.runs.map((run, index) => element("option", { value: index }, run.name));
    this.runChoice = element("select", { "aria-label": "run", onchange: (event) => this.set({ run: Number(event.target.value), step: 0, sample: 0 }) }, ...options);
    this.slider = element("input", { type: "range", min: 0, "aria-label": "step", oninput: (event) => this.set({ step: Number(event.target.value), sample: 0 }) });
    this.stepName = element("b");
    const move = (by, sign) => element("button", { type: "button", "aria-label": by < 0 ? "earlier step" : "later step", onclick: () => this.move("step", by) }, sign);
    const names = [...new Set(this.runs.flatMap((run) => run.rollouts.flatMap((step) => step.samples.map((sample) => sample.verdict))))];
    this.verdicts = element("select", { "aria-label": "verdict", onchange: (event) => this.set({ verdict: event.target.value, sample: 0 }) },
      element("option", { value: "" }, "every verdict"), ...names.map((name) => element("option", { value: name }, name || "no verdict")));
    this.shades = ["ratio", "logprobs", "advantage", "none"].map((name) => element("button", { type: "button", "data-shade": name, onclick: () => this.set({ shade: name }) },
      { ratio: "ratio", logprobs: "log-prob", advantage: "advantage", none: "plain" }[name]));
    this.scale = element("span", { class: "scale" });
    this.tools.append(
      ...(this.runs.length > 1 ? [this.runChoice] : []),
      element("div", { class: "group" }, move(-1, "‹"), this.slider, move(1, "›"), this.stepName),
      this.verdicts,
      element("div", { class: "group" }, element("span", { class: "soft" }, "shade by"), ...this.shades), this.scale);
  }

  set(change) {
    Object.assign(this.state, change);
    this.update();
  }

  move(what, by) {
    const count = what === "step" ? this.run.rollouts.length : this.samples().length;
    const next = Math.min(count - 1, Math.max(0, this.state[what] + by));
    this.set(what === "step" ? { step: next, sample: 0 } : { sample: next });
  }

  key(event) {
    if (event.target.matches("select, input")) return;
    const [what, by] = { ArrowDown: ["sample", 1], ArrowUp: ["sample", -1], ArrowRight: ["step", 1], ArrowLeft: ["step", -1] }[event.key] ?? [];
    if (!what) return;
    event.preventDefault();
    this.move(what, by);
  }

  /* Go to the step nearest to one that was picked in a chart. */
  open(runIndex, step) {
    const run = Math.max(0, this.runs.findIndex((one) => one.index === runIndex));
    const distances = this.runs[run].rollouts.map((one) => Math.abs(one.step - step));
    this.set({ run, step: distances.indexOf(Math.min(...distances)), sample: 0 });
    this.node.scrollIntoView({ behavior: "smooth", block: "start" });
  }

  update() {
    const samples = this.samples();
    const sample = samples[Math.min(this.state.sample, samples.length - 1)];
    this.slider.max = this.run.rollouts.length - 1;
    this.slider.value = this.state.step;
    this.runChoice.value = this.state.run;
    this.stepName.textContent = `step ${this.step.step}`;
    this.list.replaceChildren(...samples.map((one, index) => element("li", {}, this.entry(one, index, one === sample))),
      element("li", { class: "missing" }, `${samples.length} of ${this.step.total} samples of this step`));
    const tokens = Boolean(sample?.tokens);
    const has = { ratio: tokens && Boolean(sample.ratio), logprobs: tokens && Boolean(sample.logprobs), advantage: tokens && sample.advantage !== null, none: true };
    const shade = has[this.state.shade] ? this.state.shade : "none";
    for (const button of this.shades) {
      button.disabled = !has[button.dataset.shade];
      button.setAttribute("aria-pressed", button.dataset.shade === shade);
    }
    this.drawScale(shade);
    this.detail.replaceChildren(...(sample ? this.describe(sample, shade) : [element("p", { class: "soft" }, "No sample of this verdict at this step.")]));
    this.detail.scrollTop = 0;
  }

  entry(sample, index, isCurrent) {
    const line = element("div", { class: "line" }, verdictMark(sample.verdict),
      element("span", {}, sample.reward === null ? "" : `reward ${compact(sample.reward)}`), element("span", {}, `${sample.numTokens} tok`));
    const start = element("div", { class: "start" }, sample.prompt.replace(/<\|[^|]*\|>(system|user|assistant)?/g, " ").trim().slice(-160) || sample.promptId);
    return element("button", { type: "button", "aria-current": isCurrent, onclick: () => this.set({ sample: index }) }, line, start);
  }

  describe(sample, shade) {
    const fact = (name, value) => (value === null || value === "" ? null : element("span", {}, `${name} `, element("b", {}, typeof value === "number" ? compact(value) : value)));
    const facts = element("div", { class: "facts" }, verdictMark(sample.verdict), fact("reward", sample.reward), fact("advantage", sample.advantage),
      fact("tokens", sample.numTokens), fact("ended by", sample.finish), fact("wanted", sample.wanted), fact("source", sample.source), fact("prompt", sample.promptId), fact("weights", sample.version));
    const why = sample.note ? element("div", { class: "why" }, sample.note) : null;
    if (why) why.style.setProperty("--colour", `var(--${knownVerdict(sample.verdict)})`);
    return [facts, why, element("h4", {}, "Prompt"), element("div", { class: "prompt" }, sample.prompt || "(not kept)"),
      element("h4", {}, "Response"), this.response(sample, shade)].filter(Boolean);
  }

  response(sample, shade) {
    const box = element("div", { class: "response" });
    if (!sample.tokens || (shade === "none" && sample.response !== undefined && sample.cutAt === null)) {
      box.textContent = sample.response ?? (sample.tokens ?? []).join("");
      return box;
    }
    sample.tokens.forEach((token, at) => {
      if (at === sample.cutAt) box.append(element("span", { class: "gap" }, `${sample.numTokens - sample.tokens.length} tokens left out`));
      const span = element("span", { "data-at": at }, token);
      const colour = shadeOf(sample, at, shade);
      if (colour) span.style.background = colour;
      box.append(span);
    });
    box.addEventListener("mousemove", (event) => this.tokenTip(event, sample));
    box.addEventListener("mouseleave", leave);
    return box;
  }

  tokenTip(event, sample) {
    const at = event.target.dataset?.at;
    if (at === undefined) return leave();
    const row = (name, value) => element("tr", {}, element("td", {}, name), element("td", {}, value));
    const rows = [row("token", JSON.stringify(sample.tokens[at]))];
    const logprob = sample.logprobs?.[at], ratio = sample.ratio?.[at];
    if (logprob != null) rows.push(row("log-prob", logprob.toFixed(3)), row("probability", shown(Math.exp(logprob), "percent")));
    if (ratio != null) rows.push(row("ratio", compact(ratio)));
    showTooltip(event, element("table", {}, ...rows));
  }

  drawScale(shade) {
    const bar = (gradient, from, to) => {
      const strip = element("i");
      strip.style.background = `linear-gradient(90deg, ${gradient})`;
      return [from, strip, to];
    };
    const content = {
      ratio: () => bar("rgba(var(--low), .75), transparent, rgba(var(--high), .75)", "ratio ≤ ½", "≥ 2"),
      logprobs: () => bar("transparent, rgba(var(--low), .75)", "certain", "unlikely (≤ 1 %)"),
      advantage: () => bar("rgba(var(--low), .4), transparent, rgba(var(--up), .4)", "pushed down", "pushed up"),
      none: () => [],
    }[shade]();
    this.scale.replaceChildren(...content);
  }
}

const knownVerdict = (verdict) => (["right", "wrong", "malformed", "timeout", "error"].includes(verdict) ? verdict : "error");

function verdictMark(verdict) {
  const mark = element("span", { class: "verdict" }, verdict || "not graded");
  mark.style.background = `var(--${knownVerdict(verdict)})`;
  return mark;
}

function shadeOf(sample, at, shade) {
  if (shade === "ratio") {
    const ratio = sample.ratio[at];
    if (ratio === null) return null;
    const strength = Math.max(-1, Math.min(1, Math.log2(Math.max(ratio, 1e-9))));
    return Math.abs(strength) < 0.02 ? null : `rgba(var(--${strength < 0 ? "low" : "high"}), ${(Math.abs(strength) * 0.75).toFixed(2)})`;
  }
  if (shade === "logprobs") {
    const logprob = sample.logprobs[at];
    if (logprob === null) return null;
    const strength = Math.min(1, -logprob / Math.log(100));
    return strength < 0.03 ? null : `rgba(var(--low), ${(strength * 0.75).toFixed(2)})`;
  }
  if (shade === "advantage" && sample.advantage) {
    const strength = Math.min(0.4, 0.12 + Math.abs(sample.advantage) * 0.14);
    return `rgba(var(--${sample.advantage > 0 ? "up" : "low"}), ${strength.toFixed(2)})`;
  }
  return null;
}
