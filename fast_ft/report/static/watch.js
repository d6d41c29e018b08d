"use strict";
// The live page of `watch RUN_DIR`: asks every two seconds what is new, and shows the state that it knows.

const EVERY = 2000; // milliseconds between two questions

class Watch {
  constructor(root, state) {
    this.figures = el("dl", { class: "figures" });
    this.says = el("p", { class: "lead", role: "status" });
    root.append(this.says, this.figures);
    this.show(state);
    this.later();
  }

  later() { setTimeout(() => this.question(), EVERY); }

  async question() {
    try { this.show(await ask({ steps: this.steps })); } catch {
      this.says.textContent = "watch has ended: this is the last state that it told.";
      return;
    }
    this.later();
  }

  show({ figures, says, steps, curves, problem }) {
    const said = problem ?? says;
    if (this.says.textContent !== said) this.says.textContent = said;
    if (problem) return;
    this.steps = steps;
    this.figures.replaceChildren(...figures.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
    if (!curves?.step.length) return;
    if (this.curves) this.curves.set([curves]);
    else fastFt.curves = this.curves = new Curves($("#curves"), [curves]);
  }
}
