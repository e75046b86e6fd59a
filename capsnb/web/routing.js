// Routing, watched: round after round, which part of a digit speaks to which of the 20 capsules, and how well they agree.
import { greatest } from "./poses.js";
import {
  announcer, button, bytes, capsuleName, change, choice, DATASETS, digitOf, digits, floats, follow, h, paint, picture, radios,
  ROUNDS, slider, still,
} from "./parts.js";
import { chart } from "./chart.js";

const SIDE = 6; // positions in each direction
const SECONDS = 0.8; // for a round while it plays
const OVER = [["upper", "each part shares itself out (sum over j)"], ["lower", "each capsule shares itself out (sum over i)"]];

export function render({ model, el }) {
  const view = makeParts(model), player = makePlayer(model, view);
  view.play = player.button;
  el.append(arrange(view));
  const unfollow = follow(model, {
    manifest: () => showManifest(view, model),
    faces: () => showFaces(view, model),
    state: () => showState(view, model),
    shown: () => showState(view, model),
  });
  return () => (player.stop(), unfollow());
}

function makeParts(model) {
  const rounds = { label: "Rounds", min: 1, max: ROUNDS, step: 1, shown: String };
  return {
    dataset: choice({ label: "Data set", change: (dataset) => change(model, { dataset, image: null }) }),
    over: radios({ legend: "Couplings", change: (over) => change(model, { over }) }),
    digits: digits({ legend: "Route another test image", change: (image) => change(model, { image }) }),
    capsules: radios({ legend: "The 20 capsules", kind: "capsnb-cards", change: (j) => change(model, { capsule: Number(j) }) }),
    rounds: slider({ ...rounds, change: (value) => change(model, { rounds: value }) }),
    image: picture(""),
    overlay: h("canvas", { width: SIDE, height: SIDE, class: "capsnb-overlay", "aria-hidden": "true" }),
    coupling: chart({ title: "mean coupling, 1 = uniform", rounds: ROUNDS }),
    agreement: chart({ title: "agreement of the votes", rounds: ROUNDS }),
    caption: h("p", { class: "capsnb-caption" }),
    status: announcer(),
  };
}

/** Play the rounds once; where less motion is wanted, the slider alone moves them. */
function makePlayer(model, view) {
  let timer = 0;
  const stop = () => (clearInterval(timer), (timer = 0), (play.textContent = "Play the rounds"));
  const step = () => {
    const { rounds } = model.get("state");
    if (rounds < ROUNDS) change(model, { rounds: rounds + 1 });
    else stop();
  };
  const start = () => {
    change(model, { rounds: 1 });
    [timer, play.textContent] = [setInterval(step, 1000 * SECONDS), "Pause"];
  };
  const play = button("Play the rounds", () => (timer ? stop() : start()));
  play.hidden = still();
  view.rounds.input.addEventListener("input", () => timer && stop());
  return { button: play, stop: () => clearInterval(timer) };
}

function arrange(view) {
  view.dataset.fill(DATASETS);
  view.over.fill(OVER);
  const image = h("figure", { class: "capsnb-stage capsnb-beside" }, h("div", { class: "capsnb-layers" }, view.image, view.overlay), view.caption);
  const key = h("p", { class: "capsnb-key" }, "less ", h("span", { class: "capsnb-scale" }), " more coupling than uniform");
  return h("div", { class: "capsnb-widget" },
    h("div", { class: "capsnb-bar" }, view.dataset, view.over),
    h("div", { class: "capsnb-play" }, view.rounds, view.play),
    h("div", { class: "capsnb-split" }, image, h("div", {}, view.capsules, key)),
    h("div", { class: "capsnb-columns" }, view.coupling, view.agreement),
    view.digits, view.status);
}

function showManifest(view, model) {
  const manifest = model.get("manifest"), { image } = model.get("state");
  view.cards = Array.from({ length: manifest.capsules }, (_, j) => card(manifest, j));
  view.capsules.fill(view.cards.map((each, j) => [j, each.box]));
  view.digits.show(manifest);
  showFaces(view, model);
  if (image === null) change(model, { image: manifest.digits[0].number });
  else showState(view, model);
}

/** One capsule: the picture of its mean pose, its couplings at the 6 x 6 positions, its number. */
function card(manifest, j) {
  const face = picture("", { alt: false }), map = h("canvas", { width: SIDE, height: SIDE, "aria-hidden": "true" });
  const name = h("span", { class: "capsnb-hidden" }, `capsule ${capsuleName(manifest, j)}`);
  return { face, map, box: h("span", { class: "capsnb-card" }, map, face, h("span", { "aria-hidden": "true" }, j), name) };
}

function showFaces(view, model) {
  const faces = bytes(model.get("faces"));
  if (faces) view.cards?.forEach(({ face }, j) => face.draw(faces.subarray(j * 784)));
}

function showState(view, model) {
  const state = model.get("state"), manifest = model.get("manifest"), digit = digitOf(manifest, state.image);
  for (const name of ["dataset", "over", "rounds"]) view[name].set(state[name]);
  view.capsules.set(state.capsule);
  view.digits.set(state.image);
  if (!digit) return;
  view.image.draw(digit.image);
  const kind = manifest.classes[digit.label];
  view.image.setAttribute("aria-label", `${kind}, test image ${digit.number}, and its coupling to capsule ${state.capsule}`);
  showRouting(view, state, model.get("shown"), manifest);
}

/** What the routing of all rounds gives: a map on every card, two charts, a sentence. */
function showRouting(view, { rounds, capsule }, shown, manifest) {
  const [maps, agreement, firing, explanation] = [shown.maps, shown.agreement, shown.firing, shown.explanation].map(floats);
  if (!maps) return;
  const J = manifest.capsules, left = greatest(explanation);
  const mapOf = (round, j) => maps.subarray((round * J + j) * SIDE ** 2, (round * J + j + 1) * SIDE ** 2);
  const coupling = (round, j) => mapOf(round, j).reduce((sum, value) => sum + value, 0) / SIDE ** 2;
  view.cards.forEach(({ map, box }, j) => {
    paint(map, SIDE, (n) => diverging(mapOf(rounds - 1, j)[n]));
    box.classList.toggle("capsnb-left-on", j === left);
  });
  paint(view.overlay, SIDE, (n) => veil(mapOf(rounds - 1, capsule)[n]));
  const marks = { count: J, chosen: capsule, left, rounds };
  view.coupling.draw({ ...marks, value: coupling });
  view.agreement.draw({ ...marks, value: (round, j) => agreement[round * J + j], top: 1 });
  const now = (rounds - 1) * J + capsule, times = coupling(rounds - 1, capsule).toFixed(2);
  const text = `After ${rounds} round${rounds > 1 ? "s" : ""}, capsule ${capsule} holds ${times} times the uniform coupling; ` +
    `its votes agree to ${agreement[now].toFixed(2)}, and it fires with probability ${firing[now].toFixed(2)}.` +
    ` The trained model leaves capsule ${left} on.`;
  view.caption.textContent = text;
  view.status.say(text);
}

const LESS = [179, 88, 6], EVEN = [247, 247, 247], MORE = [84, 39, 136];
const VEIL = { less: [253, 154, 60], more: [178, 130, 255] }; // the same hues, bright enough for a black image

/** Orange for less than the uniform coupling 1, violet for more, white between (ColorBrewer's PuOr). */
function diverging(value) {
  const end = value < 1 ? LESS : MORE, share = Math.min(1, Math.abs(value - 1));
  return EVEN.map((even, n) => Math.round(even + share * (end[n] - even)));
}

/** The same over a dark image: nothing where the coupling is uniform. */
function veil(value) {
  return [...(value < 1 ? VEIL.less : VEIL.more), Math.round(170 * Math.min(1, Math.abs(value - 1)))];
}
