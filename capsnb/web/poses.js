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

/**
 * The pose of capsule j that is decoded: turned if the domain is restricted; capsules are shortened to a length below 1.
 * `known` is what the manifest knows of poses.
 */
export function allowed(pose, domain, known, j) {
  const turned = domain === "restricted" && dot(pose, known.mean[j]) < 0 ? scale(pose, -1) : Array.from(pose);
  const long = length(turned);
  return known.bounded && long > LONGEST ? scale(turned, LONGEST / long) : turned;
}

/** A standard Gaussian, for capsules squashed (eq. 4); in the restricted domain turned towards the mean pose. */
export function randomPose(domain, known, j, random = Math.random) {
  const z = known.mean[j].map(() => Math.sqrt(-2 * Math.log(1 - random())) * Math.cos(2 * Math.PI * random()));
  const n = length(z);
  return allowed(known.bounded ? scale(z, n / (1 + n * n)) : z, domain, known, j);
}

/** How far the strip moves a number at each of its pictures. */
export const offsets = ({ reach }) => OFFSETS.map((offset) => (offset / OFFSETS.at(-1)) * reach);

/**
 * Where the slider of each number begins and ends: where the numbers of squashed poses do, or, for a pose of any
 * length, three deviations from the mean and as far as the real images lie.
 */
export function ranges({ poses: { mean, spread, bounded }, digits, dim }) {
  if (bounded) return Array(dim).fill([-1, 1]);
  return mean[0].map((middle, k) => {
    const ends = [middle - 3 * spread[0][k], middle + 3 * spread[0][k], ...digits.map(({ code }) => code[k])];
    return [Math.floor(10 * Math.min(...ends)) / 10, Math.ceil(10 * Math.max(...ends)) / 10];
  });
}

/** The pose with one number replaced. */
export const replaced = (pose, k, value) => pose.map((old, n) => (n === k ? value : old));
