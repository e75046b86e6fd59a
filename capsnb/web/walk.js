// The walk: a straight line from the capsule code of one real image to that of another.
import { greatest, lengths } from "./poses.js";
import { announcer, bytes, change, choice, DATASETS, digitOf, digits, follow, h, picture, slider, strip } from "./parts.js";

export function render({ model, el }) {
  const view = makeParts(model);
  el.append(arrange(view));
  return follow(model, {
    manifest: () => showManifest(view, model),
    state: () => showState(view, model),
    shown: () => showPictures(view, model),
  });
}

const percent = (share) => `${Math.round(100 * share)}%`;

function makeParts(model) {
  const way = { label: "Way", min: 0, max: 1, step: 0.01, shown: percent };
  return {
    dataset: choice({ label: "Data set", change: (value) => change(model, { dataset: value, from: null }) }),
    from: digits({ legend: "From", change: (from) => change(model, { from }) }),
    to: digits({ legend: "To", change: (to) => change(model, { to }) }),
    way: slider({ ...way, change: (share) => change(model, { share }) }),
    ends: [picture(""), picture("")],
    large: picture(""),
    strip: strip(11),
    caption: h("p", { class: "capsnb-caption" }),
    status: announcer(),
  };
}

function arrange(view) {
  view.dataset.fill(DATASETS);
  const [from, to] = view.ends.map((image, n) => h("figure", {}, image, h("figcaption", {}, n ? "to" : "from")));
  return h("div", { class: "capsnb-widget" },
    h("div", { class: "capsnb-bar" }, view.dataset),
    h("div", { class: "capsnb-trio" }, from, h("figure", {}, view.large, h("figcaption", {}, "on the way")), to),
    view.way, view.strip, view.caption,
    h("div", { class: "capsnb-columns" }, view.from, view.to), view.status);
}

function showManifest(view, model) {
  const manifest = model.get("manifest"), { from } = model.get("state");
  view.from.show(manifest);
  view.to.show(manifest);
  if (from === null) change(model, pair(manifest));
  else showState(view, model);
}

/** Two images for which one capsule fires, of two classes if there are such: the walk stays within it. */
function pair({ digits: all, dim }) {
  const on = new Map(all.map((digit) => [digit, greatest(lengths(digit.code, dim))]));
  const pairs = all.flatMap((from, n) => all.slice(n + 1).map((to) => ({ from, to })));
  const together = pairs.filter(({ from, to }) => on.get(from) === on.get(to));
  const { from, to } = together.find(({ from, to }) => from.label !== to.label) ?? together[0] ?? pairs[0];
  return { from: from.number, to: to.number };
}

function showState(view, model) {
  const state = model.get("state"), manifest = model.get("manifest");
  for (const name of ["dataset", "from", "to"]) view[name].set(state[name]);
  view.way.set(state.share);
  view.strip.pictures.forEach((each, n) => each.classList.toggle("capsnb-marked", n === Math.round(10 * state.share)));
  ["from", "to"].forEach((name, n) => {
    const digit = digitOf(manifest, state[name]);
    if (!digit) return;
    view.ends[n].draw(digit.image);
    view.ends[n].setAttribute("aria-label", `${manifest.classes[digit.label]}, test image ${digit.number}`);
  });
}

function showPictures(view, model) {
  const shown = model.get("shown"), state = model.get("state"), text = describe(state, model.get("manifest"));
  view.large.draw(bytes(shown.picture));
  view.strip.draw(bytes(shown.strip));
  view.large.setAttribute("aria-label", `The image at ${percent(state.share)} of the way`);
  view.strip.say("Eleven images on the way, from the first code to the last");
  view.caption.textContent = text;
  view.status.say(text);
}

/** Which capsules are on, and how long they are here. */
function describe({ from, to, share }, manifest) {
  const ends = [from, to].map((number) => digitOf(manifest, number));
  if (!ends.every(Boolean)) return "";
  const code = ends[0].code.map((value, n) => (1 - share) * value + share * ends[1].code[n]);
  const long = lengths(code, manifest.dim), won = ends.map((end) => greatest(lengths(end.code, manifest.dim)));
  const said = [...new Set(won)].map((j) => `capsule ${j} has length ${long[j].toFixed(2)}`);
  return `${percent(share)} of the way: ${said.join(", ")}.`;
}
