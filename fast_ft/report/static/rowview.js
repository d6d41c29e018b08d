"use strict";
// One training row in a dialog: its metrics, and its tokens with trained and masked ones told apart.

class RowView {
  constructor(rows, map) {
    this.rows = rows;
    this.map = map;
    this.dialog = $("#row-dialog");
    this.dialog.addEventListener("keydown", (event) => {
      if (event.key === "ArrowRight") this.step(1);
      else if (event.key === "ArrowLeft") this.step(-1);
    });
    this.dialog.addEventListener("click", (event) => { if (event.target === this.dialog) this.dialog.close(); }); // the backdrop
  }

  /** Go on to the next coloured row, in the order of the map's horizontal axis. */
  step(by) {
    const along = this.map.axisX.out, order = [...this.map.members].sort((a, b) => along[a] - along[b] || a - b);
    const now = order.indexOf(this.row);
    if (order.length) this.open(order[now < 0 ? 0 : (now + by + order.length) % order.length]);
  }

  async open(i) {
    this.row = i;
    const [{ id, prompt, response }, tokens] = await Promise.all([this.rows.text(i), this.rows.tokens(i)]);
    if (this.row !== i) return;
    const group = this.map.groupOf[i];
    const button = (text, click, name) => el("button", { type: "button", click, "aria-label": name }, text);
    const facts = Object.keys(this.rows.columns).map((name) => el("div", {}, el("dt", {}, label(name)), el("dd", {}, this.rows.show(name, i))));
    if (group !== NO_GROUP) facts.unshift(el("div", {}, el("dt", {}, "taken"), el("dd", {}, this.map.groupNames[group])));
    this.dialog.replaceChildren(
      el("div", { class: "dialog-head" }, el("h2", { id: "row-title" }, `Row ${id}`),
        button("←", () => this.step(-1), "Previous coloured row"), button("→", () => this.step(1), "Next coloured row"),
        button("✕", () => this.dialog.close(), "Close")),
      el("div", { class: "dialog-body" }, el("dl", { class: "facts" }, ...facts),
        ...(tokens ? this.tokens(tokens) : this.texts(prompt, response))));
    if (!this.dialog.open) this.dialog.showModal();
    this.dialog.scrollTop = 0;
  }

  texts(prompt, response) {
    const cut = this.rows.facts.shortened;
    return [
      el("h3", {}, "Prompt"), el("p", { class: "text" }, prompt), el("h3", {}, "Response"), el("p", { class: "text" }, response || "(empty)"),
      cut ? el("p", { class: "hint" }, `Texts of rows that were not taken are cut after ${cut} characters, to keep this file small.`) : null,
    ].filter(Boolean);
  }

  tokens({ pieces, controls, runs }) {
    const control = new Set(controls), line = el("p", { class: "tokens" });
    let at = 0, trained = false, counts = [0, 0];
    for (const length of runs) {
      counts[Number(trained)] += length;
      let masked = null; // masked tokens stand together in one span; of the trained, each shows
      for (let end = at + length; at < end; at++) {
        if (control.has(at)) {
          line.append(el("span", { class: `control ${trained ? "trained" : "masked"}` }, pieces[at]));
          masked = null;
        } else if (trained) line.append(el("span", { class: at % 2 ? "trained odd" : "trained" }, pieces[at]));
        else {
          if (!masked) line.append((masked = el("span", { class: "masked" })));
          masked.append(pieces[at]);
        }
      }
      trained = !trained;
    }
    const sample = el("span", { class: "tokens" }, el("span", { class: "masked" }, `${counts[0]} masked`), " · ", el("span", { class: "trained" }, `${counts[1]} trained`));
    return [el("h3", {}, "Tokens"), el("p", { class: "hint" }, sample, " (underlined: the loss counts them, EOS included)"), line];
  }
}

/** A table of the coloured rows: the map for those who do not see it. */
function rowTable(rows, map, openRow) {
  const body = el("div", { class: "scroll", tabindex: "0" });
  const box = el("details", { id: "row-table", toggle: () => {
    if (!box.open) return;
    const names = Object.keys(rows.columns), shown = map.members.slice(0, 500);
    const head = el("tr", {}, ...["row", "taken", ...names.map(label)].map((name) => el("th", { scope: "col" }, name)));
    const lines = shown.map((i) => {
      const open = el("button", { type: "button", click: () => openRow(i) }, `#${i + 1}`);
      rows.text(i).then(({ id }) => { open.textContent = id; });
      return el("tr", {}, el("th", { scope: "row" }, open), el("td", {}, map.groupNames[map.groupOf[i]]), ...names.map((name) => el("td", {}, rows.show(name, i))));
    });
    body.replaceChildren(el("table", {}, el("caption", {}, shown.length < map.members.length ? `The first ${shown.length} of ${map.members.length} rows, in file order` : "In file order"),
      el("thead", {}, head), el("tbody", {}, ...lines)));
  } }, el("summary", {}, "The coloured rows as a table"), body);
  return box;
}
