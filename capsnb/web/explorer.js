// The explorer: one capsule alone, a slider for each number of its pose, the picture, and a strip along one number.
import { allowed, dot, greatest, length, lengths, poseOf, randomPose, replaced } from "./poses.js";
import {
  allCapsules, announcer, button, bytes, change, choice, DATASETS, digitOf, digits, follow, h, picture, radios, slider, strip,
} from "./parts.js";

export function render({ model, el }) {
  const view = makeParts(model);
  el.append(arrange(view));
  return follow(model, {
    manifest: () => showManifest(view, model),
    state: () => showState(view, model),
    faces: () => showState(view, model),
    shown: () => showPictures(view, model),
  });
}

function makeParts(model) {
  const state = () => model.get("state"), began = state();
  const begin = (fields) => beginPose(model, fields);
  const move = (k) => (value) => change(model, { pose: replaced(state().pose, k, value), dimension: k });
  const number = { name: "number", min: -1, max: 1, step: 0.01, kind: "capsnb-signed" };
  return {
    dataset: choice({ label: "Data set", change: (value) => change(model, { dataset: value, start: "waiting" }) }),
    capsule: choice({ label: "Capsule", change: (j) => begin({ start: "mean", capsule: Number(j) }) }),
    domain: radios({ legend: "Domain", change: (value) => change(model, { domain: value }) }),
    dimension: choice({ label: "number", change: (k) => change(model, { dimension: Number(k) }) }),
    digits: digits({ legend: "Begin with a real test image", change: (image) => beginImage(model, image) }),
    buttons: [
      button("Random pose", () => begin({ start: "random" })),
      button("Mean pose", () => begin({ start: "mean" })),
      button("Reset", () => change(model, began)),
    ],
    sliders: state().pose.map((_, k) => slider({ ...number, label: String(k), change: move(k) })),
    large: picture(""),
    beside: picture(""), // the real image where the pose began, else the mean pose
    besideText: h("figcaption"),
    strip: strip(11, { mark: 5 }),
    meter: h("div", { class: "capsnb-meter" }, h("span")),
    caption: h("p", { class: "capsnb-caption" }),
    status: announcer(),
  };
}

function arrange(view) {
  view.dataset.fill(DATASETS);
  view.domain.fill([["complete", "complete"], ["restricted", "restricted"]]);
  view.dimension.fill(view.sliders.map((_, k) => [k, k]));
  const pictures = h("div", { class: "capsnb-pair" },
    h("figure", {}, view.large, h("figcaption", {}, "the capsule's image")), h("figure", {}, view.beside, view.besideText));
  const sliders = h("div", { class: "capsnb-sliders", role: "group", "aria-label": "The pose" }, ...view.sliders);
  const along = ["The same pose with", view.dimension, "moved from −0.25 to 0.25; the frame marks the pose itself:"];
  return h("div", { class: "capsnb-widget" },
    h("div", { class: "capsnb-bar" }, view.dataset, view.capsule, view.domain),
    h("div", { class: "capsnb-split" },
      h("div", { class: "capsnb-stage" }, pictures, view.meter, view.caption),
      h("div", {}, sliders, h("div", { class: "capsnb-buttons" }, ...view.buttons))),
    h("div", { class: "capsnb-along" }, ...along), view.strip, view.digits, view.status);
}

/** Begin with the pose of a real test image, in the capsule that it turns on. */
function beginImage(model, image) {
  const manifest = model.get("manifest");
  const capsule = greatest(lengths(digitOf(manifest, image).code, manifest.dim));
  beginPose(model, { start: "real", image, capsule });
}

function beginPose(model, fields) {
  const manifest = model.get("manifest"), next = { ...model.get("state"), image: null, ...fields };
  const mean = manifest.poses.mean[next.capsule], digit = digitOf(manifest, next.image);
  const pose = {
    real: () => poseOf(digit.code, next.capsule, manifest.dim),
    random: () => randomPose(mean, next.domain),
    mean: () => [...mean],
  };
  next.pose = pose[next.start]();
  change(model, next);
}

function showManifest(view, model) {
  const manifest = model.get("manifest"), state = model.get("state");
  view.capsule.fill(allCapsules(manifest));
  view.digits.show(manifest);
  if (state.start === "waiting") beginImage(model, manifest.digits[0].number);
  else showState(view, model);
}

function showState(view, model) {
  const state = model.get("state");
  for (const name of ["dataset", "capsule", "domain", "dimension"]) view[name].set(state[name]);
  view.digits.set(state.image);
  view.sliders.forEach((each, k) => {
    each.set(state.pose[k]);
    each.classList.toggle("capsnb-chosen", k === state.dimension);
  });
  showBeside(view, state, digitOf(model.get("manifest"), state.image), bytes(model.get("faces")));
}

function showBeside(view, { capsule, image }, digit, faces) {
  const label = digit ? `Test image ${image}, where this pose began` : `The image of the mean pose of capsule ${capsule}`;
  view.beside.draw(digit ? digit.image : faces?.subarray(784 * capsule));
  view.beside.setAttribute("aria-label", label);
  view.besideText.textContent = digit ? "real image" : "its mean pose";
}

function showPictures(view, model) {
  const shown = model.get("shown"), state = model.get("state");
  view.large.draw(bytes(shown.picture));
  view.strip.draw(bytes(shown.strip));
  view.large.setAttribute("aria-label", `The image that capsule ${state.capsule} makes of this pose`);
  view.strip.say(`Eleven images of capsule ${state.capsule} while number ${state.dimension} of its pose moves`);
  const words = describe(state, model.get("manifest").poses.mean[state.capsule]);
  view.caption.replaceChildren(...words.map((line) => h("span", {}, `${line} `)));
  view.meter.style.setProperty("--share", shownLength(model));
  view.status.say(words.join(" "));
}

const shownLength = (model) => {
  const { pose, domain, capsule } = model.get("state");
  return length(allowed(pose, domain, model.get("manifest").poses.mean[capsule]));
};

function describe({ capsule, pose, domain, image }, mean) {
  const lines = [`Capsule ${capsule} alone, length ${length(allowed(pose, domain, mean)).toFixed(2)}: how probable it is that it fires.`];
  if (image !== null) lines.push(`The pose began at test image ${image}.`);
  if (domain === "restricted" && dot(pose, mean) < 0) lines.push("It points away from the mean pose and is shown turned round.");
  if (length(pose) > 1.005) lines.push(`The sliders ask for length ${length(pose).toFixed(2)}; the pose is shown shortened.`);
  return lines;
}
