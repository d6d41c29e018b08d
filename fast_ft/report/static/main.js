"use strict";
// Puts the parts together. `fastFt` is what the tests look at.

const fastFt = { ready: false };

(async () => {
  const began = performance.now();
  if (typeof DecompressionStream === "undefined") {
    $("#main").prepend(el("p", { class: "notice" }, "This browser is too old for the map, the curves and the answers: Chrome 80, Firefox 113 or Safari 16.4 and later show them."));
    return;
  }
  const facts = await unpackJSON("facts");
  if ($("#curves") && facts.curves?.some((run) => run.step.length)) fastFt.curves = new Curves($("#curves"), facts.curves);
  if ($("#answer-view") && facts.answers?.prompts.length) fastFt.answers = new Answers($("#answer-view"), facts.answers);
  if ($("#watch") && facts.watch) fastFt.watch = new Watch($("#watch"), facts.watch);
  const root = $("#data-map");
  if (root && facts.map) {
    const rows = await Rows.load(facts.map);
    const map = new DataMap(root, rows, (i) => view.open(i));
    const view = new RowView(rows, map);
    root.append(rowTable(rows, map, (i) => view.open(i)));
    Object.assign(fastFt, { rows, map, view });
    if (facts.explore) fastFt.explorer = new Explorer($("#explorer"), rows, view, facts.explore, facts.live);
  }
  fastFt.ready = true;
  fastFt.milliseconds = performance.now() - began;
})();
