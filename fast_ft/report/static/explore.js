"use strict";
// Sliders for select.where, rank_by and take, and the rows that are taken. The recipe's own rows are those that
// data/selection.py took. For other settings a page that comes from `data --explore` asks the program; a page in a file
// works them out by `choose`, which knows no duplicates and no random draws, and then the page says so.

/** Read a recipe's condition: {low, high, lowOpen, highOpen}; open ends exclude their value. True is 1, false 0. */
function readCondition(condition) {
  const free = { low: -Infinity, high: Infinity, lowOpen: false, highOpen: false };
  const text = String(condition).trim(), number = "[-+]?\\d+(?:\\.\\d+)?(?:[eE][-+]?\\d+)?";
  if (text === "true" || text === "false") { const v = Number(text === "true"); return { ...free, low: v, high: v }; }
  let match = text.match(new RegExp(`^(${number})\\s*\\.\\.\\s*(${number})$`));
  if (match) return { ...free, low: Number(match[1]), high: Number(match[2]) };
  match = text.match(new RegExp(`^(>=|<=|==|>|<)?\\s*(${number})$`));
  if (!match) return free;
  const value = Number(match[2]), sign = match[1] ?? "==";
  return { low: sign[0] === "<" ? -Infinity : value, high: sign[0] === ">" ? Infinity : value, lowOpen: sign === ">", highOpen: sign === "<" };
}

/** The condition as the recipe writes it, or null where nothing is asked. */
function writeCondition(name, { low, high, lowOpen, highOpen }) {
  const below = high === Infinity, above = low === -Infinity;
  if (below && above) return null;
  if (name === "ends_cleanly") return low === high ? String(low === 1) : null;
  if (below) return `${lowOpen ? ">" : ">="} ${low}`;
  if (above) return `${highOpen ? "<" : "<="} ${high}`;
  return low === high ? `== ${low}` : `${low}..${high}`;
}

/** Which rows pass `where`: 1 or 0 for each; a missing value never passes, nor an empty response, nor a rejected row. */
function passing(rows, where, rejected) {
  const passes = new Uint8Array(rows.length).fill(1), words = rows.columns.response_words;
  for (const i of rejected) passes[i] = 0;
  for (let i = 0; i < passes.length; i++) if (words[i] === 0) passes[i] = 0;
  for (const [name, { low, high, lowOpen, highOpen }] of Object.entries(where)) {
    if (low === -Infinity && high === Infinity) continue;
    const values = rows.columns[name];
    for (let i = 0; i < passes.length; i++) {
      const v = values[i];
      if (!(lowOpen ? v > low : v >= low) || !(highOpen ? v < high : v <= high)) passes[i] = 0;
    }
  }
  return passes;
}

/** Rows in rank order: one metric, or a weighted sum of z-scores over the rows left. Ties and gaps keep file order. */
function ranked(rows, left, weights) {
  const used = Object.entries(weights).filter(([, weight]) => weight !== 0);
  if (!used.length) return left;
  const total = new Float64Array(left.length);
  for (const [name, weight] of used) {
    const values = rows.columns[name];
    let sum = 0, n = 0, low = Infinity, high = -Infinity;
    for (const i of left) { const v = values[i]; if (Number.isNaN(v)) continue; sum += v; n++; if (v < low) low = v; if (v > high) high = v; }
    const mean = sum / n;
    let squares = 0;
    for (const i of left) { const v = values[i]; if (!Number.isNaN(v)) squares += (v - mean) ** 2; }
    const deviation = Math.sqrt(squares / n);
    for (let k = 0; k < left.length; k++) {
      const v = values[left[k]];
      const part = low === high ? (Number.isNaN(v) ? NaN : 0) : used.length > 1 ? (v - mean) / deviation : v;
      total[k] += weight * part;
    }
  }
  const order = Array.from(left.keys());
  order.sort((a, b) => {
    const x = total[a], y = total[b];
    return Number.isNaN(x) || Number.isNaN(y) ? Number.isNaN(x) - Number.isNaN(y) || a - b : y - x || a - b;
  });
  return order.map((k) => left[k]);
}

/** {passes, taken}: taken are positions in rank order. method: top, middle or stratified, as in the recipe. */
function choose(rows, { where, rank_by, take, method, rejected = [] }) {
  const passes = passing(rows, where, rejected), left = [];
  for (let i = 0; i < passes.length; i++) if (passes[i]) left.push(i);
  const order = ranked(rows, left, rank_by), n = order.length, wanted = Math.min(take ?? n, n);
  let places = Array.from(order.keys());
  if (method === "middle") places.sort((a, b) => Math.abs(2 * a - (n - 1)) - Math.abs(2 * b - (n - 1)) || a - b);
  else if (method === "stratified" && wanted < n) {
    places = Array.from({ length: wanted }, (_, s) => {
      const begin = Math.floor(s * n / wanted), end = Math.floor((s + 1) * n / wanted) - 1, centre = (begin + end) / 2;
      return Math.floor(centre); // of two equally central ones the first
    });
  }
  const taken = places.slice(0, wanted).sort((a, b) => a - b).map((place) => order[place]);
  return { passes, taken, left: n };
}

const LISTED = 100; // taken rows in the list, before a button shows more

class Explorer {
  constructor(root, rows, view, { select, taken, limit, quotas, rejected }, live) {
    Object.assign(this, { rows, map: view.map, view, select, limit, quotas, rejected, live, own: taken, shown: LISTED, asked: 0 });
    this.build(root);
    this.reset();
  }

  reset() {
    const names = Object.keys(this.rows.columns);
    this.where = Object.fromEntries(names.map((name) => [name, readCondition(this.select.where[name] ?? "")]));
    this.rank_by = Object.fromEntries(names.map((name) => [name, this.select.rank_by[name] ?? 0]));
    this.take = this.select.take;
    this.start = this.setting();
    this.fill();
    this.update();
  }

  /** The select section as it is now, as a recipe would have it. Keys that the page shows no slider for stay. */
  section() {
    const shown = (name) => name in this.rows.columns, kept = (record) => Object.fromEntries(Object.entries(record).filter(([name]) => !shown(name)));
    const where = Object.entries(this.where).map(([name, condition]) => [name, writeCondition(name, condition)]).filter(([, text]) => text != null);
    const ranks = Object.entries(this.rank_by).filter(([, weight]) => weight);
    return {
      ...this.select, where: { ...kept(this.select.where), ...Object.fromEntries(where) },
      rank_by: { ...kept(this.select.rank_by), ...Object.fromEntries(ranks) }, take: this.take,
    };
  }

  setting() { return JSON.stringify([this.where, this.rank_by, this.take], (_, v) => (Number.isFinite(v) || typeof v !== "number" ? v : String(v))); }

  /** Slider positions are places among a metric's values, so that each step moves about as many rows. */
  stops(name) {
    const sorted = Float64Array.from(this.rows.columns[name]).filter((v) => !Number.isNaN(v)).sort();
    const distinct = [...new Set(sorted)];
    if (distinct.length <= 250) return distinct;
    const steps = new Set(Array.from({ length: 201 }, (_, q) => Number(sorted[Math.round((q * (sorted.length - 1)) / 200)].toPrecision(3))));
    return [...steps].sort((a, b) => a - b);
  }

  build(root) {
    this.fields = {};
    const cards = Object.keys(this.rows.columns).map((name) => (name === "ends_cleanly" ? this.truth(name) : this.range(name)));
    this.takeField = el("input", { type: "number", min: "1", id: "take", value: this.take ?? "", input: () => { this.take = this.takeField.value ? Math.max(1, Math.floor(Number(this.takeField.value))) : null; this.later(); } });
    this.says = el("strong", { role: "status", id: "outcome" });
    this.differs = el("p", { class: "soft" });
    this.by = el("p", { class: "soft", id: "exactness" });
    this.yaml = el("pre", { id: "yaml", tabindex: "0", "aria-label": "The recipe's select section" });
    const copy = el("button", { type: "button", click: async () => {
      try { await navigator.clipboard.writeText(this.yaml.textContent); announce("Copied"); copy.textContent = "Copied"; } catch { getSelection().selectAllChildren(this.yaml); }
      setTimeout(() => { copy.textContent = "Copy"; }, 1500);
    } }, "Copy");
    $("#take-view").append(el("div", { class: "outcome" },
      el("div", {}, el("p", {}, el("label", {}, "take ", this.takeField), " ", this.says), this.differs, this.by),
      el("div", {}, this.yaml, el("div", { class: "controls" }, copy, el("button", { type: "button", click: () => this.reset() }, "Back to the recipe")))));
    root.append(el("p", { class: "hint" }, "Move a limit or a weight: the map and the list show which rows would be taken."), el("div", { class: "chooser" }, ...cards));
    this.list = el("ol", { class: "chosen", "aria-label": "Rows taken, best rank first" });
    this.more = el("button", { type: "button", hidden: true, click: () => { this.shown += 400; this.show(); } }, "Show more");
    $("#chosen-view").append(this.list, this.more);
  }

  /** A metric's card: least, most, weight. */
  range(name) {
    const stops = this.stops(name), top = stops.length - 1, parts = {};
    const line = (end, text) => {
      const slider = el("input", { type: "range", min: 0, max: top, step: 1, "aria-label": `${text} ${label(name)}`, input: () => {
        const v = stops[Number(slider.value)], free = end === "low" ? slider.value === "0" : Number(slider.value) === top;
        this.where[name][end] = free ? (end === "low" ? -Infinity : Infinity) : v;
        this.where[name][end + "Open"] = false;
        box.value = free ? "" : v;
        this.later();
      } });
      const box = el("input", { type: "number", step: "any", "aria-label": `${text} ${label(name)}, as a number`, placeholder: "any", input: () => {
        this.where[name][end] = box.value === "" ? (end === "low" ? -Infinity : Infinity) : Number(box.value);
        this.where[name][end + "Open"] = false;
        set(true);
        this.later();
      } });
      const set = (kept) => {
        const v = this.where[name][end];
        let at = stops.findIndex((stop) => stop >= v);
        if (at < 0) at = top;
        slider.value = v === -Infinity ? 0 : v === Infinity ? top : at;
        if (!kept) box.value = Number.isFinite(v) ? v : "";
        slider.setAttribute("aria-valuetext", Number.isFinite(v) ? short(v) : "any");
      };
      parts[end] = set;
      return [el("span", {}, text), slider, box];
    };
    const card = el("fieldset", { class: "metric" }, el("legend", {}, label(name)),
      el("div", { class: "pair" }, ...line("low", "at least"), ...line("high", "at most"), ...this.weight(name, parts)));
    this.fields[name] = parts;
    return card;
  }

  weight(name, parts) {
    const slider = el("input", { type: "range", min: -3, max: 3, step: 0.1, "aria-label": `weight of ${label(name)}`, input: () => change(Number(slider.value), true) });
    const box = el("input", { type: "number", step: 0.1, "aria-label": `weight of ${label(name)}, as a number`, input: () => change(Number(box.value), false) });
    const change = (v, fromSlider) => { this.rank_by[name] = v; if (fromSlider) box.value = v; else slider.value = v; this.later(); };
    parts.weight = () => { slider.value = box.value = this.rank_by[name]; };
    return [el("span", {}, "weight"), slider, box];
  }

  truth(name) {
    const parts = {}, select = el("select", { "aria-label": label(name), change: () => {
      const v = { any: null, true: 1, false: 0 }[select.value];
      this.where[name] = { low: v ?? -Infinity, high: v ?? Infinity, lowOpen: false, highOpen: false };
      this.later();
    } }, el("option", { value: "any" }, "any"), el("option", { value: "true" }, "true"), el("option", { value: "false" }, "false"));
    parts.low = () => { const { low, high } = this.where[name]; select.value = low === high ? String(low === 1) : "any"; };
    this.fields[name] = parts;
    return el("fieldset", { class: "metric" }, el("legend", {}, label(name)), el("div", { class: "pair" }, el("span", {}, "only"), select, el("span")
      , ...this.weight(name, parts)));
  }

  fill() {
    for (const parts of Object.values(this.fields)) for (const set of Object.values(parts)) set();
    this.takeField.value = this.take ?? "";
  }

  /** At most one update a frame, however fast a slider moves. */
  later() {
    this.waiting ??= requestAnimationFrame(() => { this.waiting = null; this.update(); });
  }

  update() {
    const own = this.setting() === this.start;
    const found = choose(this.rows, { where: this.where, rank_by: this.rank_by, take: this.take, method: this.select.method, rejected: this.rejected });
    const whole = Object.keys({ ...this.select.where, ...this.select.rank_by }).every((name) => name in this.rows.columns);
    const exact = whole && !this.quotas && this.select.deduplicate === "none" && this.select.method !== "random" && !this.kinds() && !this.cells();
    this.passes = found.passes;
    this.yaml.textContent = this.text();
    if (own) this.settle(this.own, "These are the rows that a run of this recipe takes.");
    else if (exact) this.settle(found.taken, "These are the rows that a run with these settings takes.");
    else if (this.live) { this.settle(found.taken, "Asking the program …"); this.question(); } else this.settle(found.taken, this.warning(whole));
    if (own || exact) this.asked++; // an answer that is still on its way is no longer wanted
  }

  /** Whether the recipe limits the rows of a kind, which `select` alone finds in their texts. */
  kinds() { const { verb, opening, topic } = this.select.diversify; return Boolean(verb || opening || topic); }

  /** Whether the recipe takes rows from cells of metrics. */
  cells() { return this.select.method === "stratified" && Object.keys(this.select.strata).length > 0; }

  /** What a page in a file cannot know of other settings. */
  warning(whole) {
    const unknown = [
      this.select.deduplicate === "none" ? "" : `leaves out ${this.select.deduplicate === "near" ? "near-duplicates" : "duplicates"} and fills up with the next rows`,
      this.select.method === "random" ? "draws at random" : "", this.cells() ? "takes as many rows of each of its strata" : "",
      this.kinds() ? "takes no more rows of a verb, an opening or a topic than the recipe allows" : "", whole ? "" : "uses metrics that this page does not hold",
      this.quotas ? "takes no more rows of a file than the recipe allows" : "",
    ].filter(Boolean).join(", ");
    return `About these rows: a run also ${unknown}, which this file cannot. \`data RECIPE --explore\` without --output shows the exact rows.`;
  }

  /** Ask the program which rows `select` takes; only the last question's answer counts. */
  question() {
    const number = ++this.asked;
    clearTimeout(this.wait);
    this.wait = setTimeout(async () => {
      let found;
      try { found = await ask(this.section()); } catch (error) { found = { problem: `The program no longer answers (${error.message}). Run \`data --explore\` again.` }; }
      if (number !== this.asked) return;
      if (found.problem) this.settle([], found.problem);
      else this.settle(found.taken, "These are the rows that a run with these settings takes.");
    }, 120);
  }

  /** Show these rows as taken; says: how sure that is. */
  settle(taken, says) {
    this.taken = taken;
    const groups = new Uint8Array(this.rows.length).fill(NO_GROUP), own = new Set(this.own);
    for (const i of taken) groups[i] = 0;
    this.map.passes = this.passes;
    this.map.setGroups(groups, [{ name: "taken", colour: 0 }]);
    if (this.map.plot) { this.map.plot.redraw(false, false); this.map.drawKey(); }
    const same = taken.reduce((n, i) => n + own.has(i), 0), left = this.passes.reduce((n, p) => n + p, 0);
    this.says.textContent = `${count(taken.length, "row")} of ${left.toLocaleString("en")} that pass`;
    const over = this.limit && taken.length > this.limit ? ` data.max_train_rows allows ${this.limit}.` : "";
    this.differs.textContent = `${same.toLocaleString("en")} of them are among the ${own.size.toLocaleString("en")} that the recipe takes.${over}`;
    this.by.textContent = says;
    this.show();
  }

  /** List the taken rows, best rank first, with their prompts, which are unpacked one block after the other. */
  async show() {
    const taken = this.taken, shown = taken.slice(0, this.shown), names = ["score", ...Object.keys(this.rank_by).filter((name) => this.rank_by[name] && name !== "score")].filter((name) => name in this.rows.columns);
    const places = shown.map((i) => {
      const line = el("span", { class: "line" }, "…"), facts = names.map((name) => `${label(name)} ${this.rows.show(name, i)}`).join(", ");
      return { i, line, item: el("li", {}, el("button", { type: "button", click: () => this.view.open(i) }, line, el("span", { class: "change" }, facts))) };
    });
    this.list.replaceChildren(...places.map((place) => place.item));
    this.more.hidden = taken.length <= shown.length;
    for (const { i, line } of places.sort((a, b) => a.i - b.i)) { // in file order: each block is unpacked once
      const { id, prompt } = await this.rows.text(i);
      if (this.taken !== taken) return;
      line.textContent = plainPrompt(prompt).replace(/\s+/g, " ").slice(0, 200);
      line.title = id;
    }
  }

  text() {
    const { where, rank_by, reject, strata, diversify, take, method, deduplicate, near_duplicate_similarity } = this.section();
    const say = (value) => (typeof value === "string" && !/^(true|false)$/.test(value) ? `"${value}"` : String(value));
    const conditions = Object.entries(where).map(([name, value]) => `${name}: ${say(value)}`);
    const ranks = Object.entries(rank_by).map(([name, weight]) => `${name}: ${Number.isInteger(weight) ? weight + ".0" : weight}`);
    const near = deduplicate === "near" ? `\n  near_duplicate_similarity: ${near_duplicate_similarity}` : "";
    const flow = (section) => `{${Object.entries(section).map(([name, value]) => `${name}: ${Array.isArray(value) ? `[${value.join(", ")}]` : value}`).join(", ")}}`;
    const quoted = (pattern) => (/[^ -~]/.test(pattern) ? JSON.stringify(pattern) : `'${pattern.replaceAll("'", "''")}'`); // plain as in a recipe
    const lists = Object.entries(reject).filter(([, patterns]) => patterns.length);
    const more = (lists.length ? `\n  reject:${lists.map(([name, patterns]) => `\n    ${name}:${patterns.map((each) => `\n      - ${quoted(each)}`).join("")}`).join("")}` : "")
      + (this.cells() ? `\n  strata: ${flow(strata)}` : "") + (this.kinds() ? `\n  diversify: ${flow(diversify)}` : "");
    return `select:\n  where: {${conditions.join(", ")}}\n  rank_by: {${ranks.join(", ")}}\n  method: ${method}\n  take: ${take ?? "null"}\n  deduplicate: ${deduplicate}${near}${more}\n`;
  }
}
