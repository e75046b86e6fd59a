// The tour: one capsule at its mean pose, each of its numbers moved up and down in turn.
import {
  allCapsules, announcer, button, bytes, change, choice, DATASETS, follow, h, picture, radios, slider, still, strip,
} from "./parts.js";

const SECONDS = 2.5; // for one number
export const SWING = 0.25; // as far as the strip reaches

export function render({ model, el }) {
  const view = makeParts(model), player = makePlayer(model, view);
  view.play = player.button;
  el.append(arrange(view));
  const unfollow = follow(model, {
    manifest: () => showManifest(view, model),
    state: () => showState(view, model),
    shown: () => showPictures(view, model),
  });
  return () => (player.stop(), unfollow());
}

/** Which number moves at a time of the tour (the whole part), and by how much (a swing up, down and back). */
export function stop(time, dim) {
  const dimension = Math.min(Math.floor(time), dim - 1);
  return { dimension, offset: SWING * Math.sin(2 * Math.PI * (time - dimension)) };
}

function makeParts(model) {
  const dim = model.get("manifest").dim, go = (dimension) => change(model, { time: Number(dimension) + 0.25 });
  const time = { label: "Time", min: 0, max: dim, step: 0.05, shown: (value) => `number ${stop(value, dim).dimension}` };
  return {
    dataset: choice({ label: "Data set", change: (value) => change(model, { dataset: value }) }),
    capsule: choice({ label: "Capsule", change: (j) => change(model, { capsule: Number(j) }) }),
    time: slider({ ...time, change: (value) => change(model, { time: value }) }),
    peaks: radios({ legend: "The mean pose with one number raised by 0.25", kind: "capsnb-peaks", change: go }),
    large: picture(""),
    strip: strip(11),
    caption: h("p", { class: "capsnb-caption" }),
    status: announcer(),
  };
}

/** Play and pause; where less motion is wanted, each press goes one number further instead. */
function makePlayer(model, view) {
  let frame = 0, last = 0;
  const dim = () => model.get("manifest").dim;
  const stopPlaying = () => (cancelAnimationFrame(frame), (frame = 0), (play.textContent = "Play"));
  const step = (now) => {
    const time = model.get("state").time + Math.min(now - last, 100) / (1000 * SECONDS);
    [last, frame] = [now, requestAnimationFrame(step)];
    change(model, { time: time % dim() });
  };
  const start = () => ([last, frame, play.textContent] = [performance.now(), requestAnimationFrame(step), "Pause"]);
  const next = () => change(model, { time: (Math.floor(model.get("state").time) + 1.25) % dim() });
  const play = button(still() ? "Next" : "Play", () => (still() ? next() : frame ? stopPlaying() : start()));
  view.time.input.addEventListener("input", () => frame && stopPlaying());
  return { button: play, stop: () => cancelAnimationFrame(frame) };
}

function arrange(view) {
  view.dataset.fill(DATASETS);
  return h("div", { class: "capsnb-widget" },
    h("div", { class: "capsnb-bar" }, view.dataset, view.capsule),
    h("div", { class: "capsnb-split" },
      h("figure", { class: "capsnb-stage" }, view.large),
      h("div", { class: "capsnb-stage" }, h("div", { class: "capsnb-play" }, view.time, view.play), view.peaks, view.caption)),
    view.strip, view.status);
}

function showManifest(view, model) {
  view.peakPictures = Array.from({ length: model.get("manifest").dim }, () => picture("", { alt: false }));
  view.peaks.fill(view.peakPictures.map((each, k) => [k, peak(each, k)]));
  view.capsule.fill(allCapsules(model.get("manifest")));
  showState(view, model);
}

const peak = (image, k) => h("span", {}, image, h("span", { class: "capsnb-hidden" }, "number "), String(k));

function showState(view, model) {
  const state = model.get("state"), { dimension, offset } = stop(state.time, model.get("manifest").dim);
  for (const name of ["dataset", "capsule", "time"]) view[name].set(state[name]);
  view.peaks.set(dimension);
  const nearest = 5 + Math.round(20 * offset);
  view.strip.pictures.forEach((each, n) => each.classList.toggle("capsnb-marked", n === nearest));
  const sign = offset < 0 ? "−" : "+";
  const moved = `${sign}${Math.abs(offset).toFixed(2)}`;
  view.caption.textContent = `Number ${dimension} of capsule ${state.capsule}'s mean pose ${moved}, and its whole way from −0.25 to 0.25:`;
  view.status.say(`Number ${dimension} of the pose of capsule ${state.capsule}`);
}

function showPictures(view, model) {
  const shown = model.get("shown"), state = model.get("state");
  view.large.draw(bytes(shown.picture));
  view.strip.draw(bytes(shown.strip));
  if (shown.peaks) view.peakPictures.forEach((each, k) => each.draw(bytes(shown.peaks).subarray(784 * k)));
  view.large.setAttribute("aria-label", `The image of capsule ${state.capsule} on its tour`);
  view.strip.say("Eleven images of the same capsule while this number moves from −0.25 to 0.25");
}
