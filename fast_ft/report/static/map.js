"use strict";
// The data map. uPlot gives axes, zoom and cursor; the points are drawn here, all of them into one image, since 52,002
// separate shapes would be too slow to move. Rows of a group (a stage, say) lie on top, each group with its own shape.

const SHAPES = ["circle", "square", "triangle", "diamond", "circle", "square"];
const NO_GROUP = 255;
const REACH = 14; // pixels from the pointer to a point that still counts as hit

/** Draw the mark that goes with a colour's number around (x, y). */
function mark(ctx, number, x, y, r) {
  ctx.beginPath();
  const shape = number < 0 ? "diamond" : SHAPES[number % SHAPES.length];
  if (shape === "circle") ctx.arc(x, y, r, 0, 7);
  else if (shape === "square") ctx.rect(x - r * 0.9, y - r * 0.9, r * 1.8, r * 1.8);
  else if (shape === "triangle") { ctx.moveTo(x, y - r * 1.2); ctx.lineTo(x + r * 1.1, y + r * 0.8); ctx.lineTo(x - r * 1.1, y + r * 0.8); }
  else { ctx.moveTo(x, y - r * 1.25); ctx.lineTo(x + r * 1.25, y); ctx.lineTo(x, y + r * 1.25); ctx.lineTo(x - r * 1.25, y); }
  ctx.closePath();
}

/** A number in [-0.5, 0.5) that belongs to row i and does not change: points of one value are spread by it. */
function spread(i, salt) {
  let h = Math.imul(i + 1, 0x9e3779b1) ^ Math.imul(salt, 0x85ebca6b);
  h = Math.imul(h ^ (h >>> 15), 0x2c1b3c6d);
  return ((h ^ (h >>> 13)) >>> 0) / 4294967296 - 0.5;
}

class DataMap {
  /** root: an empty element. openRow(i): called on click or Enter. */
  constructor(root, rows, openRow) {
    this.rows = rows;
    this.openRow = openRow;
    this.passes = null; // Uint8Array: rows that do not pass are drawn fainter
    this.setGroups(rows.groupOf, rows.facts.groups);
    const names = Object.keys(rows.columns);
    this.x = names.includes("conversation_words") ? "conversation_words" : names[0];
    this.y = names.includes("score") ? "score" : names.find((name) => name !== this.x) ?? this.x;
    this.build(root, names);
    this.place();
    redraw(this.plotRoot, () => this.makePlot());
  }

  build(root, names) {
    const menu = (text, axis) => {
      const select = el("select", { id: "map-" + axis, change: () => { this[axis] = select.value; this.place(); this.makePlot(); } },
        ...names.map((name) => el("option", { value: name, selected: name === this[axis] }, label(name))));
      return el("label", {}, text, select);
    };
    this.log = el("input", { type: "checkbox", id: "map-log", checked: true, change: () => { this.place(); this.makePlot(); } });
    const reset = el("button", { type: "button", id: "map-reset", click: () => this.makePlot() }, "Show all");
    this.plotRoot = el("div", { class: "plot" });
    this.key = el("ul", { class: "key", "aria-label": "Key" });
    this.caption = el("p", { class: "hint" });
    this.tip = el("div", { class: "tip", role: "tooltip", hidden: true });
    root.append(
      el("div", { class: "controls" }, menu("Across", "x"), menu("Up", "y"), el("label", {}, this.log, "logarithmic lengths"), reset),
      el("p", { class: "hint", id: "map-help" },
        "Point at a row to see it, click to open it, drag to zoom. Keyboard: arrows go through the coloured rows, Enter opens one."),
      this.plotRoot, this.key, this.caption);
  }

  /** groups: {name, colour} by the numbers in groupOf. */
  setGroups(groupOf, groups) {
    this.groupOf = groupOf;
    this.groupNames = groups.map((group) => group.name);
    this.colours = groups.map((group) => group.colour);
    this.members = [];
    for (let i = 0; i < groupOf.length; i++) if (groupOf[i] !== NO_GROUP) this.members.push(i);
  }

  /** Work out where each row lies: axis units, NaN where a metric is missing. */
  place() {
    const along = (name, salt) => {
      const values = this.rows.columns[name], kind = this.rows.kinds[name], log = kind === "count" && this.log.checked;
      const out = new Float64Array(values.length);
      let gap = 0, levels = null;
      if (kind === "level") {
        levels = [...new Set(values)].filter((v) => !Number.isNaN(v)).sort((a, b) => a - b);
        gap = Math.min(...levels.slice(1).map((v, i) => v - levels[i]), Infinity);
        if (!Number.isFinite(gap)) gap = 1;
        gap *= 0.76;
      } else if (kind === "count") gap = 0.8;
      for (let i = 0; i < out.length; i++) {
        const value = values[i] + gap * spread(i, salt);
        out[i] = log ? Math.log10(Math.max(0, value) + 1) : value;
      }
      let low = Infinity, high = -Infinity;
      for (const v of out) { if (v < low) low = v; if (v > high) high = v; }
      if (!Number.isFinite(low)) { low = 0; high = 1; }
      const room = (high - low || 1) * 0.03;
      return { out, log, levels: name === "ends_cleanly" || (levels && levels.length <= 12) ? levels : null, range: [low - room, high + room], name, text: label(name) + (kind === "level" ? " (equal values spread)" : "") };
    };
    this.axisX = along(this.x, 1);
    this.axisY = along(this.y, 2);
  }

  axis(side, own) {
    const ink = css("--soft");
    const back = (v) => (own.log ? 10 ** v - 1 : v);
    const splits = own.log
      ? (u, _, low, high) => {
          const ticks = [];
          for (let ten = 1; ten <= 1e7; ten *= 10) for (const step of [1, 2, 5]) ticks.push(ten * step);
          const inside = [0, ...ticks].map((t) => [t, Math.log10(t + 1)]).filter(([, at]) => at >= low && at <= high);
          const few = inside.length > 9 ? inside.filter(([t]) => /^10*$/.test(String(t)) || /^50*$/.test(String(t))) : inside;
          return (few.length > 1 ? few : inside).map(([, at]) => at);
        }
      : own.levels ? (u, _, low, high) => own.levels.filter((v) => v >= low && v <= high) : undefined;
    return {
      side, scale: side === 2 ? "x" : "y", stroke: ink, grid: { stroke: css("--line"), width: 1 }, ticks: { stroke: css("--line") },
      font: "12px system-ui, sans-serif", labelFont: "600 13px system-ui, sans-serif", label: own.text, labelSize: 24,
      size: side === 2 ? 38 : 46, space: side === 2 ? 46 : 26, ...(splits ? { splits } : {}),
      values: (u, ticks) => ticks.map((v) => (own.name === "ends_cleanly" ? (v ? "yes" : "no") : short(own.log ? Math.round(back(v)) : v))),
    };
  }

  makePlot() {
    this.plot?.destroy();
    this.ring?.remove();
    const { axisX, axisY } = this;
    const width = widthFor(this.plotRoot), height = Math.round(Math.max(320, Math.min(540, width * 0.62)));
    const free = (u, low, high) => [low, high]; // what is asked for, without rounding it up to neat ends
    this.plot = new uPlot({
      width, height, legend: { show: false }, padding: [10, 12, 0, 0],
      cursor: { drag: { x: true, y: true, uni: 12, dist: 6 }, points: { show: false } },
      scales: { x: { time: false, range: free }, y: { range: free } },
      axes: [this.axis(2, axisX), this.axis(3, axisY)],
      series: [{}, { stroke: "transparent", points: { show: false }, paths: () => null }],
      hooks: { draw: [(u) => this.drawPoints(u)], ready: [(u) => this.listen(u)] },
    }, [axisX.range, axisY.range], this.plotRoot);
    this.drawKey();
  }

  /** Where all rows lie on the canvas, in its own pixels. */
  project(u) {
    const { left, top, width, height } = u.bbox, n = this.rows.length;
    const { min: x0, max: x1 } = u.scales.x, { min: y0, max: y1 } = u.scales.y;
    const px = (this.px ??= new Float32Array(n)), py = (this.py ??= new Float32Array(n));
    const kx = width / (x1 - x0), ky = height / (y1 - y0), xs = this.axisX.out, ys = this.axisY.out;
    for (let i = 0; i < n; i++) {
      px[i] = left + (xs[i] - x0) * kx;
      py[i] = top + height - (ys[i] - y0) * ky;
    }
    this.cells = null; // the index of the pointer's search is stale
  }

  drawPoints(u) {
    this.project(u);
    const { ctx, bbox: { left, top, width, height } } = u, { px, py, passes, groupOf } = this;
    const w = Math.round(width), h = Math.round(height), dot = Math.round((px.length > 5000 ? 2 : 4) * devicePixelRatio);
    // Rows are counted per pixel and shaded by the count, so that a crowd looks darker than a few.
    const faint = new Uint16Array(w * h), full = new Uint16Array(w * h);
    for (let i = 0; i < px.length; i++) {
      if (groupOf[i] !== NO_GROUP) continue;
      const x = (px[i] - left - dot / 2) | 0, y = (py[i] - top - dot / 2) | 0;
      if (!(px[i] >= left && py[i] >= top) || x + dot > w || y + dot > h) continue;
      const layer = passes && !passes[i] ? faint : full;
      for (let dy = 0; dy < dot; dy++) for (let dx = 0; dx < dot; dx++) layer[(y + dy) * w + x + dx]++;
    }
    const image = ctx.createImageData(w, h), data = image.data;
    const single = px.length > 5000 ? 0.4 : 0.8; // how dark one row is
    const shade = Uint8ClampedArray.from({ length: 256 }, (_, n) => 255 * (1 - (1 - single) ** n));
    const strong = css(passes ? "--pass" : "--point").split(",").map(Number), weak = css("--faint").split(",").map(Number);
    for (let p = 0; p < full.length; p++) {
      const n = full[p] || faint[p];
      if (!n) continue;
      const [r, g, b] = full[p] ? strong : weak;
      data[4 * p] = r; data[4 * p + 1] = g; data[4 * p + 2] = b;
      data[4 * p + 3] = shade[Math.min(n, 255)];
    }
    const scratch = new OffscreenCanvas(w, h); // putImageData would wipe the grid below; drawImage blends
    scratch.getContext("2d").putImageData(image, 0, 0);
    ctx.drawImage(scratch, Math.round(left), Math.round(top));

    ctx.save();
    ctx.beginPath(); ctx.rect(left, top, width, height); ctx.clip();
    const colours = this.colours.map(paint), r = (this.members.length > 400 ? 3.4 : 4.6) * devicePixelRatio;
    ctx.strokeStyle = css("--card"); ctx.lineWidth = devicePixelRatio;
    for (const i of this.members) {
      if (Number.isNaN(px[i]) || Number.isNaN(py[i])) continue;
      ctx.fillStyle = colours[groupOf[i]];
      mark(ctx, this.colours[groupOf[i]], px[i], py[i], r);
      ctx.fill(); ctx.stroke();
    }
    ctx.restore();
  }

  drawKey() {
    const swatch = (draw) => {
      const canvas = el("canvas", { width: 16, height: 16, "aria-hidden": "true" });
      draw(canvas.getContext("2d"));
      return canvas;
    };
    const counts = this.groupNames.map(() => 0);
    for (const i of this.members) counts[this.groupOf[i]]++;
    this.key.replaceChildren(
      ...this.groupNames.map((name, g) => el("li", {}, swatch((ctx) => { ctx.fillStyle = paint(this.colours[g]); mark(ctx, this.colours[g], 8, 8, 5); ctx.fill(); }),
        `${name}: ${count(counts[g], "row")}`)),
      ...this.others().map(([colour, text]) => el("li", {}, swatch((ctx) => { ctx.fillStyle = `rgb(${css(colour)})`; ctx.fillRect(4, 4, 8, 8); }), text)));
    let absent = 0;
    for (let i = 0; i < this.rows.length; i++) if (Number.isNaN(this.axisX.out[i] + this.axisY.out[i])) absent++;
    const spreadOut = [this.x, this.y].filter((name) => this.rows.kinds[name] === "level").map(label);
    this.caption.textContent = [
      spreadOut.length ? `Rows of equal ${spreadOut.join(" and ")} are spread out around their value, so that they do not cover one another: their place within a band means nothing.` : "",
      absent ? `${count(absent, "row")} without these metrics not shown.` : "",
    ].join(" ").trim();
  }

  /** Key entries for the rows of no group. */
  others() {
    const others = this.rows.length - this.members.length;
    if (!this.passes) return [["--point", `not taken: ${count(others, "row")}`]];
    const pass = this.passes.reduce((n, p) => n + p, 0) - this.members.length;
    return [["--pass", `pass, but are not taken: ${count(pass, "row")}`], ["--faint", `do not pass: ${count(others - pass, "row")}`]];
  }

  /** The row nearest to a place on the canvas within reach, or -1. Coloured rows win over others nearby. */
  nearest(x, y) {
    const size = 16, { px, py } = this, { width } = this.plot.ctx.canvas, across = Math.ceil(width / size);
    if (!this.cells) { // rows by cell, in linked lists: made once a drawing
      const next = new Int32Array(px.length), first = new Int32Array(across * Math.ceil(this.plot.ctx.canvas.height / size)).fill(-1);
      const { left, top, width: w, height: h } = this.plot.bbox;
      for (let i = 0; i < px.length; i++) {
        if (!(px[i] >= left && px[i] <= left + w && py[i] >= top && py[i] <= top + h)) continue;
        const cell = Math.floor(py[i] / size) * across + Math.floor(px[i] / size);
        next[i] = first[cell]; first[cell] = i;
      }
      this.cells = { first, next };
    }
    const { first, next } = this.cells, reach = REACH * devicePixelRatio;
    let best = -1, least = reach * reach;
    for (let cy = Math.floor((y - reach) / size); cy <= Math.floor((y + reach) / size); cy++)
      for (let cx = Math.max(0, Math.floor((x - reach) / size)); cx <= Math.min(across - 1, Math.floor((x + reach) / size)); cx++)
        for (let i = first[cy * across + cx] ?? -1; i >= 0; i = next[i]) {
          let d = (px[i] - x) ** 2 + (py[i] - y) ** 2;
          if (d > reach * reach) continue;
          if (this.groupOf[i] !== NO_GROUP) d /= 9;
          if (d < least) { least = d; best = i; }
        }
    return best;
  }

  listen(u) {
    const { over } = u;
    this.ring = el("canvas", { class: "ring", "aria-hidden": "true" });
    over.append(this.ring, this.tip);
    this.tip.hidden = true;
    this.shown = -1;
    over.setAttribute("tabindex", "0");
    over.setAttribute("role", "application");
    over.setAttribute("aria-label", `Data map: ${label(this.x)} across, ${label(this.y)} up, ${count(this.rows.length, "row")}`);
    over.setAttribute("aria-describedby", "map-help");
    const at = (event) => {
      const box = over.getBoundingClientRect();
      return this.nearest((event.clientX - box.left) * devicePixelRatio + u.bbox.left, (event.clientY - box.top) * devicePixelRatio + u.bbox.top);
    };
    let down = null;
    over.addEventListener("pointerdown", (event) => { down = [event.clientX, event.clientY]; });
    over.addEventListener("pointermove", (event) => { if (!event.buttons) this.point(at(event)); });
    over.addEventListener("pointerleave", () => this.point(-1));
    over.addEventListener("click", (event) => {
      if (!down || Math.hypot(event.clientX - down[0], event.clientY - down[1]) > 5) return; // that was a drag
      const i = at(event);
      if (i >= 0) this.openRow(i);
    });
    over.addEventListener("keydown", (event) => this.key_(event));
    over.addEventListener("blur", () => this.point(-1));
  }

  /** Arrows go through the coloured rows in the order of an axis; Enter opens; Escape lets go. */
  key_(event) {
    const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
    if (step) {
      const along = event.key === "ArrowRight" || event.key === "ArrowLeft" ? this.axisX.out : this.axisY.out;
      const order = this.members.filter((i) => !Number.isNaN(this.px[i] + this.py[i])).sort((a, b) => along[a] - along[b] || a - b);
      if (!order.length) return;
      const now = order.indexOf(this.shown);
      this.point(order[now < 0 ? (step > 0 ? 0 : order.length - 1) : (now + step + order.length) % order.length], true);
    } else if (event.key === "Enter" && this.shown >= 0) this.openRow(this.shown);
    else if (event.key === "Escape") this.point(-1);
    else return;
    event.preventDefault();
  }

  /** Put the ring and the tip on row i, or away with -1. */
  point(i, aloud = false) {
    if (i === this.shown) return;
    this.shown = i;
    const { plot, ring, tip } = this;
    tip.hidden = ring.hidden = i < 0;
    if (i < 0) return;
    const x = (this.px[i] - plot.bbox.left) / devicePixelRatio, y = (this.py[i] - plot.bbox.top) / devicePixelRatio;
    const size = 24;
    ring.width = ring.height = size * devicePixelRatio;
    Object.assign(ring.style, { width: size + "px", height: size + "px", left: x - size / 2 + "px", top: y - size / 2 + "px" });
    const ctx = ring.getContext("2d");
    ctx.lineWidth = 2.5 * devicePixelRatio;
    ctx.strokeStyle = css("--ink");
    ctx.arc(ring.width / 2, ring.width / 2, 8 * devicePixelRatio, 0, 7);
    ctx.stroke();
    const group = this.groupOf[i] === NO_GROUP ? "" : " · " + this.groupNames[this.groupOf[i]];
    const facts = [...new Set([this.x, this.y])].map((name) => `${label(name)} ${this.rows.show(name, i)}`).join(", ");
    const title = el("b", {}, "…"), said = el("span", { class: "said" }, ""), answered = el("span", { class: "said soft" }, "");
    tip.replaceChildren(title, facts + group, said, answered);
    const right = x > plot.over.clientWidth / 2, below = y > plot.over.clientHeight / 2;
    Object.assign(tip.style, {
      left: right ? "auto" : x + 14 + "px", right: right ? plot.over.clientWidth - x + 14 + "px" : "auto",
      top: below ? "auto" : y + 10 + "px", bottom: below ? plot.over.clientHeight - y + 10 + "px" : "auto",
    });
    this.rows.text(i).then(({ id, prompt, response }) => {
      if (this.shown !== i) return;
      title.textContent = id;
      said.textContent = plainPrompt(prompt).slice(0, 300);
      answered.textContent = response.slice(0, 300);
      if (aloud) announce(`${id}, ${facts}${group}. ${plainPrompt(prompt).slice(0, 120)}`);
    });
  }
}

/** Without Alpaca's lead sentence, which is the same in every row and would fill the tip. */
function plainPrompt(prompt) {
  return prompt.replace(/^Below is an instruction that describes a task[^.]*\.\s*Write a response that appropriately completes the request\.\s*(#+\s*Instruction:\s*)?/, "");
}
