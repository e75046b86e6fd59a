// What every widget is built from: elements, pictures, controls, and the words for a screen reader.

const SIDE = 28;

/** An element: attributes by name, `on…` for listeners, children as nodes or text. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

let count = 0;
const newId = () => `capsnb-${++count}`;

/** Bytes of what a model shows, whether a kernel sent a DataView or the page made an array. */
export const bytes = (view) => view && new Uint8Array(view.buffer, view.byteOffset ?? 0, view.byteLength);

/** The float32 numbers in those bytes (copied, so that any offset will do). */
export const floats = (view) => view && new Float32Array(bytes(view).slice().buffer);

/** A picture of 28 x 28 grey pixels, drawn by `draw(bytes)`. */
export function picture(label, { alt = true } = {}) {
  const role = alt ? { role: "img", "aria-label": label } : { "aria-hidden": "true" };
  const canvas = h("canvas", { class: "capsnb-picture", width: SIDE, height: SIDE, ...role });
  return Object.assign(canvas, { draw: (grey) => grey && paint(canvas, SIDE, (n) => [grey[n], grey[n], grey[n]]) });
}

/** Fill a canvas of `side` x `side` pixels with the colour of each: [r, g, b], opaque, or [r, g, b, alpha]. */
export function paint(canvas, side, colour) {
  const context = canvas.getContext("2d"), image = context.createImageData(side, side);
  image.data.fill(255);
  for (let n = 0; n < side * side; n++) image.data.set(colour(n), 4 * n);
  context.putImageData(image, 0, 0);
}

/** Several pictures in a row that share one description; `draw` takes their bytes one after the other. */
export function strip(length, { mark = -1 } = {}) {
  const pictures = Array.from({ length }, () => picture("", { alt: false }));
  if (mark >= 0) pictures[mark].classList.add("capsnb-marked");
  const row = h("div", { class: "capsnb-strip", role: "img" }, ...pictures);
  const draw = (all) => all && pictures.forEach((each, n) => each.draw(all.subarray(n * SIDE ** 2)));
  return Object.assign(row, { draw, pictures, say: (text) => row.setAttribute("aria-label", text) });
}

/** A labelled slider; the browser gives it arrows, page, home and end. `set(value)` moves it without an event. */
export function slider({ label, name, min, max, step, shown = (value) => value.toFixed(2).replace("-", "−"), change, kind = "" }) {
  const id = newId(), output = h("output", { for: id, class: "capsnb-value" });
  const input = h("input", { type: "range", id, min, max, step, oninput: () => (mirror(), change(Number(input.value))) });
  const place = (value) => `${(100 * (value - min)) / (max - min)}%`;
  input.style.setProperty("--zero", place(0));
  const mirror = () => {
    const value = Number(input.value);
    input.style.setProperty("--at", place(value));
    output.textContent = shown(value);
    input.setAttribute("aria-valuetext", shown(value));
  };
  const caption = h("label", { for: id }, name ? h("span", { class: "capsnb-hidden" }, `${name} `) : null, label);
  const row = h("div", { class: `capsnb-slider ${kind}` }, caption, input, output);
  return Object.assign(row, { input, set: (value) => ((input.value = value), mirror()) });
}

/** A labelled drop-down list; `fill([[value, text], ...])` and `set(value)`. */
export function choice({ label, change }) {
  const id = newId(), select = h("select", { id, onchange: () => change(select.value) });
  const fill = (options) => select.replaceChildren(...options.map(([value, text]) => h("option", { value }, text)));
  const row = h("div", { class: "capsnb-choice" }, h("label", { for: id }, label), select);
  return Object.assign(row, { select, fill, set: (value) => (select.value = value) });
}

/** A group of options of which one is on: [[value, content], ...], the content a text or an element. */
export function radios({ legend, change, kind = "capsnb-segments", hint = null }) {
  const name = newId(), box = h("div", { class: kind });
  const inputs = () => [...box.querySelectorAll("input")];
  const fill = (options) => box.replaceChildren(...options.map(([value, content]) => option(value, content)));
  const option = (value, content) =>
    h("label", {}, h("input", { type: "radio", name, value, onchange: () => change(value) }), h("span", {}, content));
  const set = (value) => inputs().forEach((input) => (input.checked = input.value === String(value)));
  return Object.assign(h("fieldset", { class: "capsnb-radios" }, h("legend", {}, legend), hint, box), { box, fill, set });
}

/** The real test images of the manifest, to choose from. */
export function digits({ legend, change }) {
  const group = radios({ legend, change: (value) => change(Number(value)), kind: "capsnb-digits" });
  const show = (manifest) => group.fill(manifest.digits.map((digit) => [digit.number, thumbnail(digit, manifest)]));
  return Object.assign(group, { show });
}

function thumbnail(digit, manifest) {
  const image = picture(`${manifest.classes[digit.label]}, test image ${digit.number}`);
  image.draw(digit.image);
  return image;
}

export const button = (text, click) => h("button", { type: "button", onclick: click }, text);

/** Words for a screen reader, said when nothing has changed for a moment. */
export function announcer() {
  const region = h("p", { class: "capsnb-hidden", role: "status" });
  let timer;
  const say = (text) => (clearTimeout(timer), (timer = setTimeout(() => (region.textContent = text), 500)));
  return Object.assign(region, { say });
}

/** What the manifest says of the system whose model it describes. */
export const systemOf = ({ system, systems }) => systems[system];

/** The name of a capsule: its number, and the commonest class among the test images that it wins. */
export const capsuleName = (manifest, j) => {
  const kind = manifest.kinds[j];
  return `${j} (${kind < 0 ? "wins no image" : `${systemOf(manifest).wins} ${manifest.classes[kind]}`})`;
};

export const allCapsules = (manifest) =>
  Array.from({ length: manifest.capsules }, (_, j) => [j, capsuleName(manifest, j)]);

/** Whether the reader asked the system for less motion. */
export const still = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

export const DATASETS = [["mnist", "MNIST digits"], ["fashion-mnist", "Fashion-MNIST"]];

export const EXPERTS = "expert-capsules"; // the system of all widgets that do not let the reader choose

/** The name of the model that a state names: that of its files. */
export const modelName = ({ system = EXPERTS, dataset }) => (system === EXPERTS ? dataset : `${system}-${dataset}`);

export const ROUNDS = 10; // of routing that are computed; the reader chooses one

/** Change some fields of a model's state, here and behind it. */
export function change(model, fields) {
  model.set("state", { ...model.get("state"), ...fields });
  model.save_changes();
}

/** The test image of that number, if it is among those that the widgets know. */
export const digitOf = (manifest, number) => manifest.digits.find((digit) => digit.number === number);

/** Call `draw` now and whenever one of the model's values changes; the returned function ends that. */
export function follow(model, listeners) {
  const pairs = Object.entries(listeners).map(([name, draw]) => [`change:${name}`, draw]);
  for (const [event, draw] of pairs) model.on(event, draw);
  for (const [, draw] of pairs) draw();
  return () => pairs.forEach(([event, draw]) => model.off(event, draw));
}
