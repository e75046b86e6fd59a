// Draw a digit: a drawing area, what the model sees of it, which capsules speak for it, and what they send back.
import { fit, read, write } from "./ink.js";
import { greatest } from "./poses.js";
import {
  announcer, button, bytes, capsuleName, change, choice, DATASETS, digitOf, digits, floats, follow, h, picture,
} from "./parts.js";

const SIDE = 280; // of the drawing area, in pixels
const PEN = 22;
const STEP = 14; // of the pen moved by keys
const ARROWS = { ArrowLeft: [-STEP, 0], ArrowRight: [STEP, 0], ArrowUp: [0, -STEP], ArrowDown: [0, STEP] };
const LABEL =
  "Drawing area. Arrow keys move the pen, the space bar puts it down or lifts it, Delete clears the drawing.";

export function render({ model, el }) {
  const view = makeParts(model);
  el.append(arrange(view));
  return follow(model, {
    manifest: () => showManifest(view, model),
    faces: () => showFaces(view, model),
    state: () => showState(view, model),
    shown: () => showAnswer(view, model),
  });
}

function makeParts(model) {
  const view = {
    dataset: choice({ label: "Data set", change: (dataset) => change(model, { dataset }) }),
    digits: digits({ legend: "Or take a real test image", change: (image) => take(view, model, image) }),
    area: h("canvas", { class: "capsnb-area", width: SIDE, height: SIDE, tabindex: 0, role: "application", "aria-label": LABEL }),
    pen: h("span", { class: "capsnb-pen", "aria-hidden": "true" }),
    clear: button("Clear", () => clear(view, model)),
    seen: picture("What the model sees of the drawing"),
    rebuilt: picture("What the capsule that fires sends back"),
    cards: h("ul", { class: "capsnb-cards", "aria-label": "How well each capsule explains the drawing" }),
    caption: h("p", { class: "capsnb-caption" }),
    status: announcer(),
    ink: null, // what stands in the drawing area
    example: false, // whether it is a test image, which the first stroke replaces
  };
  listen(view, (from, to) => drawLine(view, model, from, to), () => clear(view, model));
  return view;
}

function arrange(view) {
  view.dataset.fill(DATASETS);
  const figure = (image, text) => h("figure", {}, image, h("figcaption", {}, text));
  return h("div", { class: "capsnb-widget" },
    h("div", { class: "capsnb-bar" }, view.dataset, view.clear),
    h("div", { class: "capsnb-split" },
      h("div", { class: "capsnb-stage" }, h("div", { class: "capsnb-layers" }, view.area, view.pen),
        h("div", { class: "capsnb-pair capsnb-equal" }, figure(view.seen, "what the model sees"), figure(view.rebuilt, "what it sends back"))),
      h("div", { class: "capsnb-stage" }, view.cards, view.caption)),
    view.digits, view.status);
}

/** Strokes by mouse, finger or pen, and by keys. */
function listen({ area, pen }, line, clear) {
  const key = { x: SIDE / 2, y: SIDE / 2, down: false };
  const point = (event) => [(event.offsetX * SIDE) / area.clientWidth, (event.offsetY * SIDE) / area.clientHeight];
  let from = null;
  area.addEventListener("pointerdown", (event) => {
    area.setPointerCapture(event.pointerId);
    from = point(event);
    line(from, from);
  });
  area.addEventListener("pointermove", (event) => {
    if (from) line(from, (from = point(event)));
  });
  for (const end of ["pointerup", "pointercancel"]) area.addEventListener(end, () => (from = null));
  area.addEventListener("keydown", (event) => {
    const way = ARROWS[event.key], before = [key.x, key.y];
    if (!way && ![" ", "Delete", "Backspace"].includes(event.key)) return;
    event.preventDefault();
    if (way) [key.x, key.y] = before.map((at, n) => Math.min(SIDE, Math.max(0, at + way[n])));
    else if (event.key === " ") key.down = !key.down;
    else clear();
    if (key.down && (way || event.key === " ")) line(before, [key.x, key.y]);
    pen.style.translate = `${(100 * key.x) / SIDE}cqw ${(100 * key.y) / SIDE}cqw`;
    pen.classList.toggle("capsnb-down", key.down);
  });
}

function drawLine(view, model, from, to) {
  const context = view.example ? wipe(view.area) : contextOf(view.area);
  view.example = false;
  Object.assign(context, { strokeStyle: "white", lineWidth: PEN, lineCap: "round", lineJoin: "round" });
  context.beginPath();
  context.moveTo(...from);
  context.lineTo(...to);
  context.stroke();
  send(view, model);
}

const contextOf = (area) => area.getContext("2d", { willReadFrequently: true });

/** Send on what the model is to see, once a frame at most. */
function send(view, model) {
  view.frame ||= requestAnimationFrame(() => {
    view.frame = 0;
    view.ink = write(fit(view.area, model.get("state").dataset));
    change(model, { ink: view.ink, image: null });
  });
}

function wipe(area) {
  const context = contextOf(area);
  context.fillStyle = "black";
  context.fillRect(0, 0, SIDE, SIDE);
  return context;
}

function clear(view, model) {
  [view.ink, view.example] = ["", false];
  wipe(view.area);
  change(model, { ink: "", image: null });
}

function take(view, model, image) {
  const { image: pixels } = digitOf(model.get("manifest"), image);
  change(model, { ink: write(pixels.map((grey) => grey / 255)), image });
}

function showManifest(view, model) {
  const manifest = model.get("manifest");
  view.bars = Array.from({ length: manifest.capsules }, (_, j) => bar(manifest, j));
  view.cards.replaceChildren(...view.bars.map(({ item }) => item));
  view.digits.show(manifest);
  showFaces(view, model);
  showState(view, model);
  showAnswer(view, model);
}

function bar(manifest, j) {
  const face = picture("", { alt: false }), said = h("span", { class: "capsnb-hidden" });
  const meter = h("span", { class: "capsnb-meter", "aria-hidden": "true" }, h("span"));
  const item = h("li", { class: "capsnb-card" }, face, meter, h("span", { "aria-hidden": "true" }, j), said);
  return { face, meter, item, say: (text) => (said.textContent = `capsule ${capsuleName(manifest, j)}: ${text}`) };
}

function showFaces(view, model) {
  const faces = bytes(model.get("faces"));
  if (faces) view.bars?.forEach(({ face }, j) => face.draw(faces.subarray(j * 784)));
}

function showState(view, model) {
  const { dataset, ink, image } = model.get("state"), pixels = read(ink);
  view.dataset.set(dataset);
  view.digits.set(image);
  const grey = pixels.map((value) => 255 * value);
  view.seen.draw(grey);
  if (ink === view.ink) return;
  [view.ink, view.example] = [ink, image !== null]; // not drawn here: from the address, or a test image
  const context = wipe(view.area);
  if (ink) context.drawImage(view.seen, 0, 0, SIDE, SIDE);
}

function showAnswer(view, model) {
  const { shown, manifest, state } = { shown: model.get("shown"), manifest: model.get("manifest"), state: model.get("state") };
  const [firing, explanation] = [floats(shown.firing), floats(shown.explanation)];
  if (!firing || !state.ink) return showNothing(view);
  const first = greatest(explanation);
  view.rebuilt.draw(bytes(shown.picture));
  view.bars.forEach(({ item, meter, say }, j) => {
    item.classList.toggle("capsnb-left-on", firing[j] > 0);
    meter.style.setProperty("--share", Math.max(0, explanation[j]));
    say(`${explanation[j].toFixed(2)}${firing[j] > 0 ? ", fires" : ""}`);
  });
  const on = firing.reduce((list, value, j) => (value > 0 ? [...list, j] : list), []);
  const fires = on.map((j) => `capsule ${capsuleName(manifest, j)} fires with probability ${firing[j].toFixed(2)}`).join(", ");
  const text = `${fires[0].toUpperCase()}${fires.slice(1)}. Its explanation of the drawing is ${explanation[first].toFixed(2)}.`;
  view.caption.textContent = text;
  view.status.say(text);
}

function showNothing(view) {
  view.rebuilt.draw(new Uint8Array(784));
  for (const { item, meter, say } of view.bars) {
    item.classList.remove("capsnb-left-on");
    meter.style.setProperty("--share", 0);
    say("nothing is drawn");
  }
  view.caption.textContent = "Draw a digit into the black square: the bars show how well each capsule explains it.";
}
