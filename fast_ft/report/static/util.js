"use strict";
// Shared by all parts. Data becomes text nodes, never markup: no file here names a way to make markup of text.

const $ = (selector, root = document) => root.querySelector(selector);

/** Make an element. attributes: functions become listeners, all else attributes; children: nodes or text. */
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child != null));
  return node;
}

/** Unpack one of the page's data blocks: base64 of gzip. Returns its bytes. */
async function unpack(name) {
  const binary = atob($("#block-" + name).textContent);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

async function unpackJSON(name) {
  return JSON.parse(new TextDecoder().decode(await unpack(name)));
}

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const NAMES = { rouge_l: "ROUGE-L", chrf: "chrF", grad_norm: "norm", tokens_per_s: "tokens/s", gib: "GiB" };
const label = (name) => NAMES[name] ?? name.replaceAll("_", " ");
const count = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;

/** A number as short as it may be: 1,234, 0.37, 4.5, 1.5e-4. */
function short(value) {
  if (value == null || Number.isNaN(value)) return "–";
  if (typeof value === "boolean") return value ? "yes" : "no";
  const size = Math.abs(value);
  if (size !== 0 && size < 0.001) return value.toExponential(1).replace(/\.0e/, "e");
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(4)));
}

/** A number for a sentence: two or three digits. */
function brief(value) {
  if (value == null || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && size < 0.001) return value.toExponential(1).replace(/\.0e/, "e");
  return Number(value.toPrecision(size < 1 ? 2 : 3)).toLocaleString("en", { maximumFractionDigits: 6 });
}

/** The colour of a stage or a run by its number; below 0: of none. */
const paint = (number) => css(number < 0 ? "--ink" : "--g" + (number % 6));

/** Say something to a screen reader. */
function announce(text) { $("#live").textContent = text; }

/** How wide a chart in `node` may be: on paper no wider than a page. */
const widthFor = (node) => (document.documentElement.classList.contains("printing") ? Math.min(node.clientWidth, 640) : node.clientWidth);

/** Call `draw` now and whenever the width of `node` or the colour scheme changes. */
function redraw(node, draw) {
  let width = 0;
  new ResizeObserver(() => {
    if (node.clientWidth !== width && node.clientWidth > 0) { width = node.clientWidth; draw(); }
  }).observe(node);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  addEventListener("beforeprint", () => { document.documentElement.classList.add("printing"); draw(); }); // dark on light
  addEventListener("afterprint", () => { document.documentElement.classList.remove("printing"); draw(); });
}

/** The page's rows: columns of numbers at hand, texts unpacked block by block, the last few kept. */
class Rows {
  constructor(facts, columns, groups) {
    this.facts = facts;
    this.length = facts.rows;
    this.columns = {};
    facts.columns.forEach(({ name }, i) => { this.columns[name] = columns.subarray(i * facts.rows, (i + 1) * facts.rows); });
    this.kinds = Object.fromEntries(facts.columns.map(({ name, kind }) => [name, kind]));
    this.groupOf = groups; // 255: none
    this.kept = new Map();
  }

  static async load(facts) {
    const [columns, groups] = await Promise.all([unpack("columns"), unpack("groups")]);
    return new Rows(facts, new Float64Array(columns.buffer), groups);
  }

  /** {id, prompt, response} of row i. */
  async text(i) {
    const number = Math.floor(i / this.facts.block_rows);
    if (!this.kept.has(number)) {
      if (this.kept.size > 40) this.kept.delete(this.kept.keys().next().value);
      this.kept.set(number, unpackJSON("text-" + number));
    }
    const [id, prompt, response] = (await this.kept.get(number))[i % this.facts.block_rows];
    return { id, prompt, response };
  }

  /** {pieces, controls, runs} of a selected row, or null. */
  async tokens(i) {
    if (!this.facts.tokens) return null;
    this.tokenised ??= unpackJSON("tokens");
    return (await this.tokenised)[i] ?? null;
  }

  /** A metric's value as text. */
  show(name, i) {
    const value = this.columns[name][i];
    return name === "ends_cleanly" && !Number.isNaN(value) ? (value ? "yes" : "no") : short(value);
  }
}
