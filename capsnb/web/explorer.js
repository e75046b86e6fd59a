// The explorer: one capsule alone, a slider for each number of its pose, the picture, and a strip along one number. Of
// a system without capsules the manifest tells of one, which may be of any length.
import { allowed, dot, greatest, length, lengths, poseOf, randomPose, ranges, replaced } from "./poses.js";
import {
  allCapsules, announcer, button, bytes, change, choice, DATASETS, digitOf, digits, follow, h, modelName, picture, radios,
  slider, strip, systemOf,
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
  return {
    system: choice({ label: "System", change: (value) => change(model, turned(model, value)) }),
    dataset: choice({ label: "Data set", change: (value) => change(model, { dataset: value, image: null, start: "waiting" }) }),
    capsule: choice({ label: "Capsule", change: (j) => begin({ start: "mean", capsule: Number(j) }) }),
    domain: radios({ legend: "Domain", change: (value) => change(model, { domain: value }) }),
    dimension: choice({ label: "number", change: (k) => change(model, { dimension: Number(k) }) }),
    digits: digits({ legend: "Begin with a real test image", change: (image) => beginImage(model, image) }),
    buttons: [
      button("Random pose", () => begin({ start: "random" })),
      button("Mean pose", () => begin({ start: "mean" })),
      button("Reset", () => change(model, began)),
    ],
    sliders: [],
    pose: h("div", { class: "capsnb-sliders", role: "group", "aria-label": "The pose" }),
    large: picture(""),
    largeText: h("figcaption"),
    beside: picture(""), // the real image where the pose began, else the mean pose
    besideText: h("figcaption"),
    reach: h("span"),
    strip: strip(11, { mark: 5 }),
    meter: h("div", { class: "capsnb-meter" }, h("span")),
    caption: h("p", { class: "capsnb-caption" }),
    status: announcer(),
  };
}

function arrange(view) {
  view.domain.fill([["complete", "complete"], ["restricted", "restricted"]]);
  const pictures = h("div", { class: "capsnb-pair" },
    h("figure", {}, view.large, view.largeText), h("figure", {}, view.beside, view.besideText));
  return h("div", { class: "capsnb-widget" },
    h("div", { class: "capsnb-bar" }, view.system, view.dataset, view.capsule, view.domain),
    h("div", { class: "capsnb-split" },
      h("div", { class: "capsnb-stage" }, pictures, view.meter, view.caption),
      h("div", {}, view.pose, h("div", { class: "capsnb-buttons" }, ...view.buttons))),
    h("div", { class: "capsnb-along" }, "The same pose with", view.dimension, view.reach), view.strip, view.digits, view.status);
}

/** The state for another system: the same data set and real image, where it has them. */
function turned(model, system) {
  const { dataset, image } = model.get("state"), { datasets } = model.get("manifest").systems[system];
  const same = datasets.includes(dataset);
  return { system, dataset: same ? dataset : datasets[0], image: same ? image : null, start: "waiting" };
}

/** Begin with the pose of a real test image, in the capsule that it turns on. */
function beginImage(model, image) {
  const manifest = model.get("manifest");
  const capsule = greatest(lengths(digitOf(manifest, image).code, manifest.dim));
  beginPose(model, { start: "real", image, capsule });
}

function beginPose(model, fields) {
  const manifest = model.get("manifest"), next = { ...model.get("state"), image: null, ...fields };
  const { poses, dim } = manifest, digit = digitOf(manifest, next.image);
  if (!poses.bounded) next.domain = "complete";
  next.dimension = Math.min(next.dimension, dim - 1); // of the model before there may have been more
  const pose = {
    real: () => poseOf(digit.code, next.capsule, dim),
    random: () => randomPose(next.domain, poses, next.capsule),
    mean: () => [...poses.mean[next.capsule]],
  };
  next.pose = pose[next.start]();
  change(model, next);
}

function showManifest(view, model) {
  const manifest = model.get("manifest"), { start, image } = model.get("state"), { systems, poses } = manifest;
  view.system.fill(Object.entries(systems).map(([name, { title }]) => [name, title]));
  view.dataset.fill(DATASETS.filter(([name]) => systemOf(manifest).datasets.includes(name)));
  view.capsule.fill(allCapsules(manifest));
  view.capsule.hidden = manifest.capsules === 1;
  view.domain.hidden = view.meter.hidden = !poses.bounded;
  view.digits.show(manifest);
  showSliders(view, model);
  view.largeText.textContent = `the ${manifest.capsules === 1 ? "decoder" : "capsule"}'s image`;
  view.reach.textContent = `moved from −${poses.reach} to ${poses.reach}; the frame marks the pose itself:`;
  if (start === "waiting") beginImage(model, (digitOf(manifest, image) ?? manifest.digits[0]).number);
  else showState(view, model);
}

/** A slider for each number of a pose of the model. */
function showSliders(view, model) {
  const move = (k) => (value) => change(model, { pose: replaced(model.get("state").pose, k, value), dimension: k });
  const number = { name: "number", step: 0.01, kind: "capsnb-signed" };
  const make = ([min, max], k) => slider({ ...number, min, max, label: String(k), change: move(k) });
  view.sliders = ranges(model.get("manifest")).map(make);
  view.pose.replaceChildren(...view.sliders);
  view.dimension.fill(view.sliders.map((_, k) => [k, k]));
}

function showState(view, model) {
  const state = model.get("state"), manifest = model.get("manifest");
  for (const name of ["system", "dataset", "capsule", "domain", "dimension"]) view[name].set(state[name]);
  view.digits.set(state.image);
  view.sliders.forEach((each, k) => {
    each.set(state.pose[k]);
    each.classList.toggle("capsnb-chosen", k === state.dimension);
  });
  showBeside(view, state, manifest, bytes(model.get("faces")));
}

/** What makes the picture, in words. */
const maker = (manifest, capsule) => (manifest.capsules === 1 ? `the ${systemOf(manifest).title}` : `capsule ${capsule}`);

function showBeside(view, { capsule, image }, manifest, faces) {
  const digit = digitOf(manifest, image);
  const label = digit ? `Test image ${image}, where this pose began` : `The image of the mean pose of ${maker(manifest, capsule)}`;
  view.beside.draw(digit ? digit.image : faces?.subarray(784 * capsule));
  view.beside.setAttribute("aria-label", label);
  view.besideText.textContent = digit ? "real image" : "its mean pose";
}

function showPictures(view, model) {
  const shown = model.get("shown"), state = model.get("state"), manifest = model.get("manifest");
  if (modelName(state) !== manifest.name) return; // the model that was just chosen is on its way
  const { capsule } = state, of = maker(manifest, capsule);
  view.large.draw(bytes(shown.picture));
  view.strip.draw(bytes(shown.strip));
  view.large.setAttribute("aria-label", `The image that ${of} makes of this pose`);
  view.strip.say(`Eleven images of ${of} while number ${state.dimension} of its pose moves`);
  const words = describe(state, manifest);
  view.caption.replaceChildren(...words.map((line) => h("span", {}, `${line} `)));
  view.meter.style.setProperty("--share", length(allowed(state.pose, state.domain, manifest.poses, capsule)));
  view.status.say(words.join(" "));
}

function describe({ capsule, pose, domain, image }, manifest) {
  const { poses, dim } = manifest, shown = length(allowed(pose, domain, poses, capsule)).toFixed(2), lines = [];
  if (poses.bounded) lines.push(`Capsule ${capsule} alone, length ${shown}${explained(systemOf(manifest).length)}.`);
  else lines.push(`The pose lies ${shown} from 0; random poses lie about ${Math.sqrt(dim).toFixed(0)} from it.`);
  if (image !== null) lines.push(`The pose began at test image ${image}.`);
  if (domain === "restricted" && dot(pose, poses.mean[capsule]) < 0) lines.push("It points away from the mean pose and is shown turned round.");
  if (poses.bounded && length(pose) > 1.005) lines.push(`The sliders ask for length ${length(pose).toFixed(2)}; the pose is shown shortened.`);
  return lines;
}

const explained = (meaning) => (meaning ? `: ${meaning}` : "");
