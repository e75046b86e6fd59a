// Poses as plain arrays of numbers: what capsnb/explorer.py and capsnb/sampling.py say of them, for the browser.

export const OFFSETS = Array.from({ length: 11 }, (_, n) => (n - 5) / 20); // how far Sabour 2017 moves one number
const LONGEST = 1 - 1e-6; // a squashed capsule is shorter than 1

export const length = (pose) => Math.hypot(...pose);

export const dot = (a, b) => a.reduce((sum, value, k) => sum + value * b[k], 0);

export const scale = (pose, factor) => Array.from(pose, (value) => value * factor);

/** The numbers of capsule j in a list of all capsules' numbers. */
export const poseOf = (capsules, j, dim) => Array.from(capsules.slice(j * dim, (j + 1) * dim));

/** The lengths of all capsules. */
export const lengths = (capsules, dim) =>
  Array.from({ length: capsules.length / dim }, (_, j) => length(poseOf(capsules, j, dim)));

/** The number of the greatest value: the longest capsule, or the one that explains most. */
export const greatest = (values) => values.reduce((best, value, j) => (value > values[best] ? j : best), 0);

/** Where one capsule is on and all others are zero. */
export function alone(pose, j, capsules) {
  const layer = new Float32Array(capsules * pose.length);
  layer.set(pose, j * pose.length);
  return layer;
}

/** The pose that is decoded: turned if the domain is restricted, shortened to a length below 1. */
export function allowed(pose, domain, mean) {
  const turned = domain === "restricted" && dot(pose, mean) < 0 ? scale(pose, -1) : Array.from(pose);
  const long = length(turned);
  return long > LONGEST ? scale(turned, LONGEST / long) : turned;
}

/** A standard Gaussian, squashed (eq. 4); in the restricted domain turned towards the mean pose. */
export function randomPose(mean, domain, random = Math.random) {
  const z = mean.map(() => Math.sqrt(-2 * Math.log(1 - random())) * Math.cos(2 * Math.PI * random()));
  const n = length(z);
  return allowed(scale(z, n / (1 + n * n)), domain, mean);
}

/** The pose with one number replaced. */
export const replaced = (pose, k, value) => pose.map((old, n) => (n === k ? value : old));
