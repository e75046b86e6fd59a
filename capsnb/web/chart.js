// A small chart: one line for each capsule over the rounds of routing, two of them told apart.
import { h } from "./parts.js";

const WIDTH = 320, HEIGHT = 150, LEFT = 34, RIGHT = 28, TOP = 10, BOTTOM = 26;

function s(tag, attributes, text = "") {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.textContent = text;
  return element;
}

/** A figure whose `draw` takes value(round, j), the capsule chosen, the one left on, and the current round. */
export function chart({ title, rounds }) {
  const svg = s("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": title });
  const figure = h("figure", { class: "capsnb-chart" }, h("figcaption", {}, title), svg);
  return Object.assign(figure, { draw: (data) => svg.replaceChildren(...drawn({ ...data, last: rounds })) });
}

function drawn({ value, count, chosen, left, rounds, last, top }) {
  const lines = Array.from({ length: count }, (_, j) => Array.from({ length: last }, (_, r) => value(r, j)));
  const high = top ?? Math.ceil(Math.max(...lines.flat()) * 2) / 2;
  const x = (round) => LEFT + ((WIDTH - LEFT - RIGHT) * round) / (last - 1);
  const y = (v) => HEIGHT - BOTTOM - ((HEIGHT - TOP - BOTTOM) * v) / high;
  const path = (line) => "M" + line.map((v, r) => `${x(r).toFixed(1)} ${y(v).toFixed(1)}`).join("L");
  const kind = (j) => (j === chosen ? "chosen" : j === left ? "left-on" : "other");
  const order = [...lines.keys()].sort((a, b) => rank(kind(a)) - rank(kind(b)));
  const named = [...new Set([left, chosen])];
  return [
    ...[0, high / 2, high].flatMap((v) => [
      s("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: y(v), y2: y(v), class: "grid" }),
      s("text", { x: LEFT - 6, y: y(v) + 4, "text-anchor": "end" }, String(+v.toFixed(2))),
    ]),
    ...lines[0].map((_, r) => s("text", { x: x(r), y: HEIGHT - 8, "text-anchor": "middle" }, r + 1)),
    s("line", { x1: x(rounds - 1), x2: x(rounds - 1), y1: TOP, y2: HEIGHT - BOTTOM, class: "now" }),
    ...order.map((j) => s("path", { d: path(lines[j]), class: kind(j) })),
    ...named.map((j) => s("circle", { cx: x(rounds - 1), cy: y(lines[j][rounds - 1]), r: 4, class: kind(j) })),
    ...named.map((j) => s("text", { x: WIDTH - RIGHT + 6, y: y(lines[j][last - 1]) + 4, class: kind(j) }, j)),
  ];
}

const rank = (kind) => ["other", "left-on", "chosen"].indexOf(kind);
