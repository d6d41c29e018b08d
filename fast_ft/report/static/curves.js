"use strict";
// Training curves: one small chart for each quantity, over the steps of all stages; several runs over each other.

const CURVES = [
  { key: "loss", title: "Loss", unit: "nats per trained token", smooth: true, wide: true, zero: true },
  { key: "validation_loss", title: "Validation loss", unit: "nats per trained token, of rows that are not trained on", points: true, zero: true },
  { key: "grad_norm", title: "Gradient norm", unit: "before clipping", zero: true },
  { key: "learning_rate", title: "Learning rate", unit: "", zero: true },
  { key: "tokens_per_s", title: "Speed", unit: "tokens a second, padding left out", zero: true },
  { key: "gib", title: "GPU memory", unit: "GiB reserved", zero: true, cap: true },
];

/** The mean of the last `width` values that are numbers. */
function smoothed(values, width = 10) {
  return values.map((_, end) => {
    const window = values.slice(Math.max(0, end - width + 1), end + 1).filter((v) => v != null);
    return window.length ? window.reduce((a, b) => a + b) / window.length : null;
  });
}

class Curves {
  constructor(root, runs) {
    this.runs = runs.filter((run) => run.step.length);
    this.charts = [];
    this.root = el("div", { class: "curves" });
    root.append(this.root);
    const last = Math.max(...this.runs.map((run) => run.step.at(-1)));
    this.steps = Array.from({ length: last }, (_, i) => i + 1);
    const shown = CURVES.map((spec) => [spec, this.columns(spec.key)])
      .filter(([spec, columns]) => columns.some((values) => values.some((v) => v != null && (spec.key !== "gib" || v > 0))));
    for (const [spec, columns] of shown) this.figure(spec, columns);
    if (shown.length === 5) this.root.classList.add("four"); // below the loss, in two columns
    const noMemory = !shown.some(([spec]) => spec.key === "gib");
    const skipped = this.runs.map((run) => run.skipped.filter(Boolean).length);
    const words = [noMemory ? "No GPU memory to show: the run was on a CPU." : "",
      ...this.runs.map((run, i) => (skipped[i] ? `${run.name}: ${count(skipped[i], "step")} skipped by fp16's loss scale.` : ""))];
    if (words.some(Boolean)) root.append(el("p", { class: "hint" }, words.filter(Boolean).join(" ")));
    redraw(this.root, () => this.draw());
  }

  /** One array for each run, by step; null where a run has no value. */
  columns(key) {
    return this.runs.map((run) => {
      const values = Array(this.steps.length).fill(null);
      run.step.forEach((step, i) => { values[step - 1] = run[key][i]; });
      return values;
    });
  }

  figure(spec, columns) {
    const holder = el("div");
    const words = columns.map((values, i) => {
      const there = values.filter((v) => v != null);
      if (!there.length) return "";
      return `${this.runs.length > 1 ? this.runs[i].name + ": " : ""}${short(there[0])} at first, ${short(there.at(-1))} at last, between ${short(Math.min(...there))} and ${short(Math.max(...there))}`;
    }).filter(Boolean).join("; ");
    this.root.append(el("figure", { class: spec.wide ? "wide" : null }, el("figcaption", {}, spec.title, el("small", {}, [spec.unit, words].filter(Boolean).join(". ") + ".")), holder));
    this.charts.push({ spec, columns, holder, plot: null });
  }

  draw() {
    for (const chart of this.charts) {
      chart.plot?.destroy();
      const { spec, columns, holder } = chart, several = this.runs.length > 1;
      const series = [{ label: "step" }], data = [this.steps];
      columns.forEach((values, i) => {
        const colour = css("--g" + (i % 6)), name = several ? this.runs[i].name : label(spec.key);
        const dash = several && i ? [8, 3 + 2 * i] : undefined; // runs differ by more than colour
        const value = (u, v) => short(v);
        if (spec.smooth) {
          if (!several) { series.push({ label: "each step", stroke: colour, alpha: 0.45, width: 1, value, points: { show: false } }); data.push(values); }
          series.push({ label: several ? `${name}, mean of 10` : "mean of 10", stroke: colour, width: 2.5, dash, value, points: { show: false } });
          data.push(smoothed(values));
        } else { series.push({ label: name, stroke: colour, width: 1.6, dash, value, points: { show: Boolean(spec.points) }, spanGaps: Boolean(spec.points) }); data.push(values); }
      });
      const caps = spec.cap ? this.runs.map((run) => run.cap).filter((cap) => cap != null) : [];
      const axis = { stroke: css("--soft"), grid: { stroke: css("--line"), width: 1 }, ticks: { stroke: css("--line") }, font: "12px system-ui, sans-serif" };
      chart.plot = new uPlot({
        width: widthFor(holder), height: spec.wide ? 300 : 210, padding: [22, 10, 0, 0],
        cursor: { sync: { key: "steps" }, drag: { x: true, y: false } },
        scales: { x: { time: false, range: (u, low, high) => [low - 0.5, high + 0.5] }, y: { range: (u, low, high) => [spec.zero ? Math.min(0, low ?? 0) : low, Math.max(high ?? 1, ...caps) * 1.08 || 1] } },
        axes: [{ ...axis, size: 32, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000] }, { ...axis, size: 58, values: (u, ticks) => ticks.map(short) }],
        series, hooks: { draw: [(u) => this.borders(u), (u) => caps.forEach((cap) => this.cap(u, cap))] },
      }, data, holder);
    }
  }

  /** A dashed line where a stage begins, with its name; of several runs only where they agree. */
  borders(u) {
    const stages = this.runs[0].stages;
    if (this.runs.some((run) => JSON.stringify(run.stages) !== JSON.stringify(stages)) || stages.length < 2) return;
    const { ctx, bbox: { left, top, width, height } } = u, ratio = devicePixelRatio;
    ctx.save();
    ctx.strokeStyle = css("--edge"); ctx.fillStyle = css("--soft"); ctx.lineWidth = ratio; ctx.font = `${12 * ratio}px system-ui, sans-serif`;
    for (const { name, step } of stages) {
      const x = u.valToPos(step - 0.5, "x", true);
      if (x < left - 1 || x > left + width) continue;
      ctx.setLineDash([4 * ratio, 4 * ratio]);
      if (step > 1) { ctx.beginPath(); ctx.moveTo(x, top); ctx.lineTo(x, top + height); ctx.stroke(); }
      ctx.fillText(name, x + 4 * ratio, top - 6 * ratio);
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
