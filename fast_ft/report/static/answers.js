"use strict";
// Answers: a list of prompts to sort and filter, and one prompt's answers side by side.

const KEYS = "Keyboard: j or ↓ for the next prompt, k or ↑ for the one before, / to filter.";

class Answers {
  constructor(root, content) {
    this.root = root;
    this.content = content;
    const { columns } = content;
    this.tuned = columns.findIndex((column) => column.kind === "tuned");
    // Gain: over the base model, or, of several runs, of the last over the first.
    const last = columns.findLastIndex((column) => column.kind === "tuned");
    this.after = last;
    this.before = last > this.tuned ? this.tuned : columns.findIndex((column) => column.kind === "base");
    this.now = 0;
    this.build();
    this.update();
    addEventListener("beforeprint", () => this.print());
    addEventListener("afterprint", () => this.paper.replaceChildren());
  }

  score(prompt) { return prompt.cells[this.after]?.score ?? null; }

  gain(prompt) {
    const before = this.before < 0 ? null : prompt.cells[this.before]?.score;
    return before == null || this.score(prompt) == null ? null : this.score(prompt) - before;
  }

  build() {
    const { columns } = this.content;
    const scored = this.content.prompts.some((prompt) => this.score(prompt) != null);
    const gained = this.content.prompts.some((prompt) => this.gain(prompt) != null);
    const orders = [["file", "in the file's order"], ...(scored ? [["low", "lowest score first"], ["high", "highest score first"]] : []),
      ...(gained ? [["gain", "greatest gain first"], ["loss", "greatest loss first"]] : []), ["long", "longest answer first"]];
    this.sort = el("select", { id: "answer-sort", change: () => this.update() }, ...orders.map(([value, text]) => el("option", { value }, text)));
    this.filter = el("input", { id: "answer-filter", type: "search", autocomplete: "off", placeholder: "text in prompt or answer", input: () => this.update() });
    this.tally = el("span", { class: "soft", role: "status" });
    this.list = el("ol", { class: "prompt-list", "aria-label": "Prompts" });
    this.view = el("div", { class: "answer-view" });
    this.paper = el("div", { class: "paper" });
    this.root.append(
      el("div", { class: "controls" }, el("label", {}, "Sort", this.sort), el("label", {}, "Filter", this.filter), this.tally),
      el("p", { class: "hint" }, gained ? `${KEYS} Scores in the list: ${columns[this.before].name} → ${columns[this.after].name}.` : KEYS),
      el("div", { class: "answers" }, this.list, this.view), this.paper);
    this.root.addEventListener("keydown", (event) => this.key(event, false));
    addEventListener("keydown", (event) => this.key(event, true));
  }

  /** Letters work wherever the page is being read, but not while something is typed; arrows only inside this part. */
  key(event, anywhere) {
    if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey || $("dialog[open]")) return;
    if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) {
      if (event.key === "Escape" && event.target === this.filter) { this.filter.value = ""; this.update(); }
      return;
    }
    const step = { j: 1, k: -1, ...(anywhere ? {} : { ArrowDown: 1, ArrowUp: -1 }) }[event.key];
    if (step) this.go(this.now + step, true);
    else if (event.key === "/") this.filter.focus();
    else if (!anywhere && event.key === "Home") this.go(0, true);
    else if (!anywhere && event.key === "End") this.go(this.shown.length - 1, true);
    else return;
    event.preventDefault();
  }

  update() {
    const wanted = this.filter.value.toLowerCase();
    const has = (prompt) => [prompt.id, ...prompt.turns.map((turn) => turn[1]), ...prompt.cells.map((cell) => cell?.text ?? "")].some((text) => text.toLowerCase().includes(wanted));
    const by = (value, down) => (a, b) => { // what has no score comes last
      const [x, y] = [value(a), value(b)];
      return x == null || y == null ? (x == null) - (y == null) : down ? y - x : x - y;
    };
    const orders = {
      low: by((p) => this.score(p), false), high: by((p) => this.score(p), true),
      gain: by((p) => this.gain(p), true), loss: by((p) => this.gain(p), false), long: by((p) => p.cells[this.after]?.text.length ?? null, true),
    };
    this.shown = this.content.prompts.filter((prompt) => !wanted || has(prompt));
    if (orders[this.sort.value]) this.shown.sort(orders[this.sort.value]); // a stable sort: ties keep the file's order
    this.tally.textContent = this.shown.length === this.content.prompts.length ? count(this.shown.length, "prompt") : `${this.shown.length} of ${count(this.content.prompts.length, "prompt")}`;
    this.list.replaceChildren(...this.shown.map((prompt, i) => el("li", {}, el("button", { type: "button", tabindex: "-1", click: () => this.go(i, true) },
      el("span", { class: "line" }, prompt.title), this.change(prompt)))));
    this.go(0, false);
  }

  change(prompt) {
    const after = this.score(prompt), gain = this.gain(prompt), node = el("span", { class: "change" });
    if (after == null) return node;
    if (gain == null) node.append(this.say(after));
    else {
      const sign = gain > 0 ? ["up", "▲ better"] : gain < 0 ? ["down", "▼ worse"] : ["same", "= same"];
      const [arrow, word] = sign[1].split(" ");
      node.append(`${this.say(prompt.cells[this.before].score)} → ${this.say(after)} `, el("span", { class: sign[0], "aria-hidden": "true" }, arrow), el("span", { class: "unseen" }, word));
    }
    return node;
  }

  /** A score as text; the reference judge's is right or wrong. */
  say(score) {
    if (this.content.kind === "reference" && (score === 0 || score === 1)) return score ? "✓" : "✗";
    return short(score);
  }

  go(i, focus) {
    const buttons = this.list.querySelectorAll("button");
    this.now = Math.max(0, Math.min(i, this.shown.length - 1));
    buttons.forEach((button, n) => { button.setAttribute("aria-current", String(n === this.now)); button.tabIndex = n === this.now ? 0 : -1; });
    const prompt = this.shown[this.now];
    if (!prompt) return this.view.replaceChildren(el("p", { class: "empty" }, "No prompt holds that text."));
    if (focus) buttons[this.now].focus({ preventScroll: true });
    const li = buttons[this.now].parentElement; // scroll the list, not the page
    if (li.offsetTop < this.list.scrollTop || li.offsetTop + li.offsetHeight > this.list.scrollTop + this.list.clientHeight)
      this.list.scrollTop = li.offsetTop - this.list.clientHeight / 2;
    const step = (by, text, name) => el("button", { type: "button", "aria-label": name, disabled: !this.shown[this.now + by], click: () => this.go(this.now + by, false) }, text);
    this.view.replaceChildren(
      el("div", { class: "answer-head" }, el("h3", {}, prompt.id), step(-1, "←", "Previous prompt"), step(1, "→", "Next prompt")),
      ...this.card(prompt, "h4"));
  }

  card(prompt, heading) {
    const turns = prompt.turns.map(([role, text]) => el("p", { class: "text" }, prompt.turns.length > 1 ? `${role}: ${text}` : text));
    return [el("blockquote", { class: "prompt-text" }, ...turns),
      el("div", { class: "columns scroll", tabindex: "0" }, ...this.content.columns.map((column, i) => this.answer(column, prompt.cells[i], heading)))];
  }

  answer(column, cell, heading) {
    const box = el("article", { class: `answer ${column.kind}${column.colour == null ? "" : ` g${column.colour % 6}`}` });
    const title = el(heading, column.colour == null ? {} : { class: `run g${column.colour % 6}` }, column.name);
    box.append(title);
    if (!cell) {
      box.append(el("p", { class: "empty" }, column.kind === "base" ? "Not asked of the base model." : "There is none."));
      return box;
    }
    if (cell.score != null) {
      const said = this.say(cell.score);
      title.append(el("span", { class: "score" }, said === "✓" ? "✓ exact" : said === "✗" ? "✗ not exact" : said));
    }
    box.append(cell.text ? el("p", { class: "text" }, cell.text) : el("p", { class: "empty" }, "(empty)"));
    if (cell.ended != null)
      box.append(el("p", { class: cell.ended ? "ends" : "ends cut" }, `${cell.ended ? "Ended by itself (EOS)" : "Cut off at the token limit"}, ${count(cell.tokens, "token")}`));
    const more = Object.entries(cell.more ?? {}).filter(([name]) => name !== "exact_match");
    if (more.length) box.append(el("dl", { class: "facts" }, ...more.map(([name, value]) => el("div", {}, el("dt", {}, label(name)), el("dd", {}, short(value))))));
    for (const [name, text] of [["The judge", cell.words], ["The judge, order swapped", cell.swapped], ["No score", cell.problem]])
      if (text) box.append(el("div", { class: "words" }, el("strong", {}, name + ": "), el("span", { class: "text" }, text)));
    return box;
  }

  /** On paper there is nothing to click: all prompts that pass the filter are laid out. */
  print() {
    this.paper.replaceChildren(...this.shown.map((prompt) => el("article", {}, el("h3", {}, prompt.id), ...this.card(prompt, "h4"))));
  }
}
