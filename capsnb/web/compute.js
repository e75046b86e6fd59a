// What each widget shows, computed from its state by the model in the browser; capsnb/widgets.py says the same in torch.
//
// Every function is a generator that fills `shown` and yields after each piece of work, so that the page can draw what
// is there and begin anew when the reader moves on. `encoder(state)` says whether the encoder's weights are needed, and
// `capsules(state, manifest)` which capsules' weights are: they arrive one after the other.
import { allowed, alone, greatest, lengths, OFFSETS, offsets, replaced } from "./poses.js";
import { read } from "./ink.js";
import { digitOf, ROUNDS } from "./parts.js";
import { stop, SWING } from "./tour.js";

const SIDE = 28;
const PIXELS = SIDE * SIDE;

const grey = (image) => Uint8Array.from(image, (value) => Math.round(255 * value));

export function* explorer(model, state, shown) {
  const { capsule, domain, pose } = state;
  shown.picture = grey(decodeAlone(model, capsule, pose, domain));
  yield;
  yield* stripOfPose(model, state, allowed(pose, domain, model.manifest.poses, capsule), shown);
}

explorer.capsules = ({ capsule }) => [capsule];

export function* tour(model, { capsule, time }, shown) {
  const domain = "complete", mean = model.manifest.poses.mean[capsule];
  const { dimension, offset } = stop(time, model.manifest.dim);
  const moved = replaced(mean, dimension, mean[dimension] + offset);
  shown.picture = grey(decodeAlone(model, capsule, moved, domain));
  yield;
  yield* stripOfPose(model, { capsule, domain, dimension }, mean, shown);
  const whose = [model.manifest.name, capsule].join();
  if (shown.whose !== whose) yield* peaks(model, capsule, mean, shown);
  shown.whose = whose;
}

tour.capsules = explorer.capsules;

/** The mean pose with every number raised in turn. */
function* peaks(model, capsule, mean, shown) {
  shown.peaks ??= new Uint8Array(mean.length * PIXELS);
  for (const k of mean.keys()) {
    shown.peaks.set(grey(decodeAlone(model, capsule, replaced(mean, k, mean[k] + SWING), "complete")), k * PIXELS);
    yield;
  }
}

function* stripOfPose(model, { capsule, domain, dimension }, pose, shown) {
  const image = (offset) => decodeAlone(model, capsule, replaced(pose, dimension, pose[dimension] + offset), domain);
  yield* fill(shown, offsets(model.manifest.poses).map((offset) => () => image(offset)));
}

function decodeAlone(model, capsule, pose, domain) {
  const { capsules, poses } = model.manifest;
  return model.decode(alone(allowed(pose, domain, poses, capsule), capsule, capsules));
}

/** The strip, one image at a time, going on where the last call was interrupted so that all of them keep up. */
function* fill(shown, images) {
  shown.strip ??= new Uint8Array(images.length * PIXELS);
  shown.next ??= 0;
  for (const _ of images) {
    shown.strip.set(grey(images[shown.next]()), shown.next * PIXELS);
    shown.next = (shown.next + 1) % images.length;
    yield;
  }
}

export function* walk(model, { from, to, share }, shown) {
  const ends = [from, to].map((number) => digitOf(model.manifest, number));
  if (!ends.every(Boolean)) return;
  const at = (t) => model.decode(Float32Array.from(ends[0].code, (value, n) => (1 - t) * value + t * ends[1].code[n]));
  shown.picture = grey(at(share));
  yield;
  const way = [from, to, model.manifest.name].join();
  if (shown.way !== way) yield* fill(shown, OFFSETS.map((_, n) => () => at(n / 10)));
  shown.way = way;
}

walk.capsules = ({ from, to }, manifest) =>
  manifest.digits.filter(({ number }) => [from, to].includes(number)).map(({ code }) => greatest(lengths(code, manifest.dim)));

export function* routing(model, { image, over }, shown) {
  const digit = digitOf(model.manifest, image);
  if (!digit) return;
  const pixels = Float32Array.from(digit.image, (value) => value / 255);
  const lower = model.lower(pixels), { capsules, dim } = model.manifest;
  const rounds = model.route(lower, ROUNDS, { over });
  shown.maps = concatenated(rounds.map(({ coupling }) => positionMeans(coupling, capsules, over)));
  shown.agreement = concatenated(rounds.map(({ agreement }) => agreement));
  shown.firing = concatenated(rounds.map(({ z }) => lengths(z, dim).map((n) => (n * n) / (1 + n * n))));
  shown.explanation = model.encode(pixels).explanation;
  yield;
}
routing.encoder = () => true;
routing.capsules = () => [];

/** The couplings of the lower capsules at each of the 6 x 6 positions, averaged; 1 stands for all alike. */
function positionMeans(coupling, capsules, over) {
  const lower = coupling.length / capsules, here = lower / 36, maps = new Float32Array(capsules * 36);
  const unit = (over === "upper" ? capsules : lower) / here;
  for (let i = 0; i < lower; i++) {
    for (let j = 0; j < capsules; j++) maps[j * 36 + Math.floor(i / here)] += unit * coupling[i * capsules + j];
  }
  return maps;
}

const concatenated = (lists) => Float32Array.from(lists.flatMap((list) => [...list]));

export function* draw(model, { ink }, shown) {
  if (!ink) return;
  const { capsules, explanation } = model.encode(read(ink));
  shown.firing = Float32Array.from(lengths(capsules, model.manifest.dim));
  shown.explanation = explanation;
  shown.picture = grey(model.decode(capsules));
  yield;
}
draw.encoder = ({ ink }) => ink !== "";
draw.capsules = (_, { capsules }) => [...Array(capsules).keys()];

/** The face of every capsule: the image of its mean pose. */
export function faces(model) {
  const { capsules, poses } = model.manifest, all = new Uint8Array(capsules * PIXELS);
  poses.mean.forEach((pose, j) => all.set(grey(model.decode(alone(pose, j, capsules))), j * PIXELS));
  return all;
}
