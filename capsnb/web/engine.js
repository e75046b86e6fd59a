// The capsule model in the reader's browser: decode, encode and route one image, from the files that
// `python -m capsnb web` writes; of other systems, the decoder. Arrays are Float32Arrays in the order of torch's tensors (capsnb/model.py).

import { explanation, forward, routeVotes, sendBack, squash } from "./capsules.js";
import { addToChannels, imageDecoder, imageEncoder, POSITIONS } from "./convolution.js";
import { layeredDecoder } from "./layers.js";
import { addTimes, dot, RememberedMap } from "./linear.js";
import * as plain from "./plain.js";
import * as simd from "./simd.js";
import { request, WeightFile } from "./weights.js";

export const backend = simd.isSupported ? "wasm-simd" : "plain";
const { newProduct } = simd.isSupported ? simd : plain;

/**
 * The model `name` from the weight files in `base`; `onProgress({loaded, total})` counts bytes.
 * With `first`, a list of capsules, it is there as soon as these can be decoded; `model.whole` is the promise of all.
 * `manifest` is the content of <name>.json, where it is known already.
 * Throws an Error whose message is a sentence for readers, as `model.whole` may.
 */
export async function loadModel(base, name, { onProgress, first, manifest } = {}) {
  const folder = String(base).replace(/\/?$/, "/");
  manifest ??= await (await request(`${folder}${name}.json`, name)).json();
  const file = await WeightFile.open(folder, manifest, "decoder");
  if (manifest.layers) return layered(manifest, file, onProgress);
  const needed = first && ["origin", ...first.map((j) => `U.${j}`)].map((tensor) => file.endOf(tensor));
  await file.until(needed && Math.max(...needed), onProgress);
  const model = new Model(manifest, folder, file);
  model.whole = file.until();
  model.whole.catch(() => {}); // whoever waits for it will hear
  return model;
}

/** Another system: its layers need the whole file, whichever capsule they decode. */
async function layered(manifest, file, onProgress) {
  await file.until(undefined, onProgress);
  const decode = layeredDecoder(manifest.layers, (name) => file.read(name), newProduct);
  return { manifest, decode, has: () => true, whole: Promise.resolve() };
}

class Model {
  #matrices = new Map(); // those of U and W that were needed

  constructor(manifest, folder, file) {
    Object.assign(this, { manifest, folder, file });
    this.decoder = imageDecoder((name) => file.read(name), manifest.slope, newProduct);
    this.origin = file.read("origin");
    this.emptyMaps = addToChannels(this.decoder.maps(this.origin), file.read("biases2"));
    this.alone = new RememberedMap(newProduct(1, 1 + manifest.dim, this.emptyMaps.length), this.emptyMaps);
  }

  /** The image [28 · 28] of capsules [J · d]. Capsules of length 0 take no part; none at all is the empty image. */
  decode(capsules) {
    const { dim } = this.manifest, poses = [];
    for (let start = 0; start < capsules.length; start += dim) poses.push(capsules.subarray(start, start + dim));
    const on = poses.flatMap((pose, j) => (pose.some((value) => value !== 0) ? [j] : []));
    return this.decoder.image(on.length === 1 ? this.mapsOfOne(poses, on[0]) : this.mapsOfMany(poses, on));
  }

  /** Whether capsule j has arrived. */
  has(j) {
    return this.file.loaded >= this.file.endOf(`U.${j}`);
  }

  /** Fetches what `lower`, `encode` and `route` need; once is enough. */
  async loadEncoder({ onProgress } = {}) {
    if (this.imageFeatures) return;
    const file = await WeightFile.open(this.folder, this.manifest, "encoder");
    await file.until(undefined, onProgress);
    const read = (name) => (name.startsWith("filters") ? this.file : file).read(name);
    this.imageFeatures = imageEncoder(read, this.manifest.slope, newProduct);
    this.encoderFile = file;
  }

  /** The squashed lower capsules x_i [I · e] of an image. */
  lower(image) {
    const { lowerDim, inputScale } = this.manifest, features = this.imageFeatures(image);
    const channels = features.length / POSITIONS;
    const z = features.map((_, k) => {
      const from = (k % channels) * POSITIONS + Math.floor(k / channels);
      return inputScale * (features[from] - this.origin[from]);
    });
    return squash(z, lowerDim);
  }

  /** {capsules [J · d], explanation [J]} of an image: only the capsule that explains it best is on. */
  encode(image) {
    const { capsules: count, dim, lowerDim } = this.manifest, x = this.lower(image);
    const explained = Float32Array.from({ length: count }, (_, j) => explanation(x, this.matrix("W", j), lowerDim));
    const winner = explained.indexOf(Math.max(...explained)), capsules = new Float32Array(count * dim);
    capsules.set(squash(forward(x, this.matrix("W", winner)), dim), winner * dim);
    return { capsules, explanation: explained };
  }

  /** Every round of routing lower capsules [I · e]: {coupling [I · J], z [J · d], agreement [J]}. */
  route(x, rounds, { over = "upper" } = {}) {
    const { capsules, dim, lower, lowerDim } = this.manifest;
    const votes = new Float32Array(lower * capsules * dim);
    for (let j = 0; j < capsules; j++)
      this.matrix("W", j).forEach((row, n) => {
        for (let i = 0, k = 0; i < lower; i++)
          for (const end = k + lowerDim; k < end; k++) votes[(i * capsules + j) * dim + n] += row[k] * x[k];
      });
    return routeVotes(votes, lower, capsules, dim, rounds, over);
  }

  /** A pose of capsule j [d]: a standard Gaussian, squashed; "restricted" turns it towards the mean training pose. */
  samplePose(rng, domain, j) {
    const mean = this.manifest.poses.mean[j], noise = Float32Array.from(mean, () => gaussian(rng));
    const away = domain === "restricted" && dot(noise, mean) < 0;
    return squash(away ? noise.map((value) => -value) : noise, noise.length);
  }

  /** With one capsule on, whose couplings are all 1, the maps are linear in its pose. */
  mapsOfOne(poses, j) {
    const maps = (pose) => this.decoder.maps(this.features(sendBack(pose, this.matrix("U", j))));
    if (j !== this.lastAlone) this.alone.begin(maps);
    this.lastAlone = j;
    return this.alone.at(poses[j]);
  }

  mapsOfMany(poses, on) {
    if (on.length === 0) return this.emptyMaps;
    const { lower, lowerDim, rounds } = this.manifest, votes = new Float32Array(on.length * lower * lowerDim);
    on.forEach((j, k) => votes.set(sendBack(poses[j], this.matrix("U", j)), k * lower * lowerDim));
    const { z } = routeVotes(votes, on.length, lower, lowerDim, rounds, "lower").at(-1);
    return addTimes(this.decoder.maps(this.features(z)), this.emptyMaps, 1);
  }

  /** Lower capsules before the squash [I · e] as features [channels, 6 · 6], less the origin. */
  features(z) {
    const channels = z.length / POSITIONS;
    return z.map((_, k) => z[(k % POSITIONS) * channels + Math.floor(k / POSITIONS)] / this.manifest.inputScale);
  }

  /** Matrix j of U or W: d rows of [I · e]. */
  matrix(name, j) {
    const key = `${name}.${j}`, file = name === "W" ? this.encoderFile : this.file;
    if (!this.#matrices.has(key)) this.#matrices.set(key, inRows(file.read(key), this.manifest.dim));
    return this.#matrices.get(key);
  }
}

function inRows(values, count) {
  const size = values.length / count;
  return Array.from({ length: count }, (_, row) => values.subarray(row * size, (row + 1) * size));
}

function gaussian(rng) {
  return Math.sqrt(-2 * Math.log(1 - rng())) * Math.cos(2 * Math.PI * rng());
}
