"use strict";
// Training curves: one small chart for each quantity, over the steps of all stages; several runs over each other.

const CURVES = [ // what: the quantity; says: one run's numbers
  { key: "loss", title: "Loss", wide: true, smooth: true, what: "Nats per trained token", says: (s) => `${brief(s.first)} at first, ${brief(s.last)} at last` },
  { key: "validation_loss", title: "Validation loss", points: true, what: "Nats per trained token, of rows that are not trained on", says: (s) => `${brief(s.low)} at least, ${brief(s.last)} at last` },
  { key: "grad_norm", title: "Gradient norm", smooth: true, what: "Before clipping", says: (s) => `${brief(s.median)} in the median step, ${brief(s.high)} at most` },
  { key: "learning_rate", title: "Learning rate", what: "", says: (s) => `${brief(s.high)} at most, ${brief(s.last)} at last` },
  { key: "tokens_per_s", title: "Speed", smooth: true, what: "Tokens a second, padding left out", says: (s) => `${brief(s.median)} in the median step` },
  { key: "gib", title: "GPU memory", cap: true, what: "GiB reserved", says: (s) => `${brief(s.high)} at most` },
];

/** How many steps a smoothed value is the mean of. */
const smoothWidth = (steps) => Math.max(10, Math.round(steps / 20));

/** The mean of the last `width` values that are numbers; weights: how much each counts. */
function smoothed(values, width, weights) {
  return values.map((_, end) => {
    let sum = 0, total = 0;
    for (let i = Math.max(0, end - width + 1); i <= end; i++) {
      const weight = weights?.[i] ?? 1;
      if (values[i] != null) { sum += weight * values[i]; total += weight; }
    }
    return total ? sum / total : null;
  });
}

class Curves {
  constructor(root, runs) {
    this.root = el("div", { class: "curves" });
    this.hint = el("p", { class: "hint" });
    this.charts = [];
    root.append(this.root, this.hint);
    this.fill(runs);
    redraw(this.root, () => this.draw());
  }

  /** Show other runs, or more of the same. */
  set(runs) {
    for (const chart of this.charts) chart.plot?.destroy();
    this.fill(runs);
    this.draw();
  }

  fill(runs) {
    this.runs = runs.filter((run) => run.step.length);
    this.charts = [];
    this.root.replaceChildren();
    const last = Math.max(...this.runs.map((run) => run.step.at(-1)));
    this.steps = Array.from({ length: last }, (_, i) => i + 1);
    this.width = smoothWidth(last);
    this.weights = this.columns("supervised_tokens");
    const shown = CURVES.map((spec) => [spec, this.columns(spec.key)])
      .filter(([spec, columns]) => columns.some((values) => values.some((v) => v != null && (spec.key !== "gib" || v > 0))));
    for (const [spec, columns] of shown) this.figure(spec, columns);
    this.root.classList.toggle("four", shown.length === 5); // below the loss, in two columns
    const skipped = this.runs.map((run) => run.skipped.filter(Boolean).length);
    const words = this.runs.map((run, i) => (skipped[i] ? `${run.name}: ${count(skipped[i], "step")} skipped by fp16's loss scale.` : ""));
    this.hint.textContent = words.filter(Boolean).join(" ");
  }

  /** One array for each run, by step; null where a run has no value. */
  columns(key) {
    return this.runs.map((run) => {
      const values = Array(this.steps.length).fill(null);
      run.step.forEach((step, i) => { values[step - 1] = run[key]?.[i] ?? null; });
      return values;
    });
  }

  smooth(spec, columns) {
    return columns.map((values, i) => smoothed(values, this.width, spec.key === "loss" ? this.weights[i] : null));
  }

  figure(spec, columns) {
    const holder = el("div"), key = el("ul", { class: "key" }), reading = el("p", { class: "reading soft", "aria-hidden": "true" });
    const means = spec.smooth ? this.smooth(spec, columns) : columns;
    const says = columns.map((values, i) => {
      const there = values.filter((v) => v != null), line = means[i].filter((v) => v != null);
      const sorted = [...there].sort((a, b) => a - b);
      return there.length ? spec.says({ first: line[Math.min(this.width, line.length) - 1], last: line.at(-1), median: sorted[sorted.length >> 1], high: sorted.at(-1), low: sorted[0] }) : "";
    });
    const several = this.runs.length > 1, smoothing = spec.smooth && (several || spec.key === "loss") ? `mean of ${this.width} steps` : "";
    const words = [[spec.what, smoothing].filter(Boolean).join(", "), several ? "" : says[0]].filter(Boolean).join(": ");
    const caption = words && el("small", {}, `${words[0].toUpperCase()}${words.slice(1)}.`);
    this.root.append(el("figure", { class: spec.wide ? "wide" : null }, el("figcaption", {}, spec.title, caption || null), holder, key, reading));
    this.charts.push({ spec, columns, means, says, holder, key, reading, plot: null });
  }

  /** The lines of a chart: {name, said, values, stroke, width, dash, faint}. */
  lines({ spec, columns, means, says }) {
    const several = this.runs.length > 1, lines = [];
    columns.forEach((values, i) => {
      const stroke = paint(i), points = spec.points, dash = several && i ? [8, 3 + 2 * i] : undefined; // runs differ by more than colour
      if (spec.smooth && !several) lines.push({ name: "each step", values, stroke, width: 1, faint: true });
      const name = several ? this.runs[i].name : spec.smooth ? `mean of ${this.width} steps` : label(spec.key);
      lines.push({ name, said: several ? says[i] : "", values: spec.smooth ? means[i] : values, stroke, width: spec.smooth ? 2.5 : 1.8, dash, points });
    });
    return lines;
  }

  draw() {
    for (const chart of this.charts) {
      chart.plot?.destroy();
      const { spec, holder } = chart, lines = this.lines(chart), skip = { show: false };
      const series = lines.map(({ name, stroke, width, dash, faint, points }) => ({ label: name, stroke, width, dash, alpha: faint ? 0.35 : 1, points: points ? { show: true } : skip, spanGaps: Boolean(points) }));
      const caps = spec.cap ? this.runs.map((run) => run.cap).filter((cap) => cap != null) : [];
      const axis = { stroke: css("--soft"), grid: { stroke: css("--line"), width: 1 }, ticks: { stroke: css("--line") }, font: "12px system-ui, sans-serif" };
      chart.plot = new uPlot({
        width: widthFor(holder), height: spec.wide ? 300 : 210, padding: [22, 10, 0, 0], legend: skip,
        cursor: { sync: { key: "steps" }, drag: { x: true, y: false } },
        scales: { x: { time: false, range: (u, low, high) => [low - 0.5, high + 0.5] }, y: { range: (u, low, high) => [Math.min(0, low ?? 0), Math.max(high ?? 1, ...caps) * 1.08 || 1] } },
        axes: [{ ...axis, size: 32, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000] }, { ...axis, size: 58, values: (u, ticks) => ticks.map(short) }],
        series: [{ label: "step" }, ...series], hooks: { draw: [(u) => this.borders(u), (u) => caps.forEach((cap) => this.cap(u, cap))], setCursor: [(u) => this.read(chart, lines, u.cursor.idx)] },
      }, [this.steps, ...lines.map((line) => line.values)], holder);
      chart.key.replaceChildren(...(lines.length > 1 ? lines.map((line) => el("li", {}, this.swatch(line), line.said ? `${line.name}: ${line.said}` : line.name)) : []));
    }
  }

  /** A piece of the line as it is drawn. */
  swatch({ stroke, width, dash, faint }) {
    const canvas = el("canvas", { width: 28, height: 12, "aria-hidden": "true" }), ctx = canvas.getContext("2d");
    Object.assign(ctx, { strokeStyle: stroke, lineWidth: width, globalAlpha: faint ? 0.5 : 1 });
    ctx.setLineDash(dash ?? []);
    ctx.beginPath(); ctx.moveTo(0, 6); ctx.lineTo(28, 6); ctx.stroke();
    return canvas;
  }

  /** What the chart shows at the pointer, in words below it. */
  read(chart, lines, i) {
    chart.reading.textContent = i == null ? "" : `Step ${this.steps[i]}: ${lines.map(({ name, values }) => `${lines.length > 1 ? name + " " : ""}${brief(values[i])}`).join(", ")}`;
  }

  /** A dashed line where a stage begins, with its name where there is room; of several runs only where they agree. */
  borders(u) {
    const stages = this.runs[0].stages;
    if (this.runs.some((run) => JSON.stringify(run.stages) !== JSON.stringify(stages)) || stages.length < 2) return;
    const { ctx, bbox: { left, top, width, height } } = u, ratio = devicePixelRatio;
    let free = -Infinity;
    ctx.save();
    ctx.strokeStyle = css("--edge"); ctx.fillStyle = css("--soft"); ctx.lineWidth = ratio; ctx.font = `${12 * ratio}px system-ui, sans-serif`; ctx.textAlign = "left";
    for (const { name, step } of stages) {
      const x = u.valToPos(step - 0.5, "x", true);
      if (x < left - 1 || x > left + width) continue;
      ctx.setLineDash([4 * ratio, 4 * ratio]);
      if (step > 1) { ctx.beginPath(); ctx.moveTo(x, top); ctx.lineTo(x, top + height); ctx.stroke(); }
      if (x < free) continue;
      ctx.fillText(name, x + 4 * ratio, top - 6 * ratio);
      free = x + ctx.measureText(name).width + 10 * ratio;
    }
    ctx.restore();
  }

  cap(u, cap) {
    const { ctx, bbox: { left, width } } = u, y = u.valToPos(cap, "y", true), ratio = devicePixelRatio;
    ctx.save();
    ctx.strokeStyle = css("--bad"); ctx.fillStyle = css("--bad"); ctx.lineWidth = 1.5 * ratio; ctx.font = `${12 * ratio}px system-ui, sans-serif`;
    ctx.beginPath(); ctx.moveTo(left, y); ctx.lineTo(left + width, y); ctx.stroke();
    ctx.textAlign = "right";
    ctx.fillText(`cap ${short(cap)} GiB`, left + width - 4 * ratio, y + 14 * ratio);
    ctx.restore();
  }
}
