// Capsules and routing by agreement: capsnb/capsules.py, routing.py and sparsity.py for one image.
// Votes are [L, U, dim]: what each of L lower capsules predicts of each of U upper ones.
import { addTimes, dot } from "./linear.js";

/** Maps the length n of every capsule of `dim` numbers to n²/(1 + n²), direction kept.  Eq. 4. */
export function squash(z, dim) {
  return eachCapsule(z, dim, (length) => length / (1 + length * length));
}

/** Every capsule made one long; zero stays zero. */
function directions(z, dim) {
  return eachCapsule(z, dim, (length) => 1 / Math.max(length, 1e-12));
}

function eachCapsule(z, dim, scale) {
  const size = lengths(z, dim).map(scale);
  return z.map((value, k) => value * size[Math.floor(k / dim)]);
}

export function lengths(z, dim) {
  const result = new Float32Array(z.length / dim);
  for (let k = 0; k < result.length; k++) {
    let sum = 0;
    for (let n = 0; n < dim; n++) sum += z[k * dim + n] ** 2;
    result[k] = Math.sqrt(sum);
  }
  return result;
}

/**
 * Routing by agreement, one {coupling [L · U], z [U · dim], agreement [U]} after every round.  Section 2.2, eq. 3.
 * `over` is "upper" (the couplings of one lower capsule sum to 1) or "lower" (those of one upper capsule).
 */
export function routeVotes(votes, lower, upper, dim, rounds, over) {
  const voteLengths = lengths(votes, dim), logits = new Float32Array(lower * upper), states = [];
  for (let done = 0; done < rounds; done++) {
    const coupling = logits.slice();
    if (over === "upper") for (let i = 0; i < lower; i++) softmax(coupling, i * upper, 1, upper);
    else for (let j = 0; j < upper; j++) softmax(coupling, j, upper, lower);
    const z = weightedSum(coupling, votes, upper, dim);
    states.push({ coupling, z, agreement: agreement(coupling, z, voteLengths, dim) });
    if (done < rounds - 1) addCosines(logits, votes, voteLengths, directions(z, dim), dim);
  }
  return states;
}

/** Softmax, in place, of `count` numbers that begin at `start`, `step` apart. */
function softmax(values, start, step, count) {
  const end = start + step * count;
  let largest = -Infinity, sum = 0;
  for (let k = start; k < end; k += step) largest = Math.max(largest, values[k]);
  for (let k = start; k < end; k += step) sum += values[k] = Math.exp(values[k] - largest);
  for (let k = start; k < end; k += step) values[k] /= sum;
}

/** z_j: the votes for each upper capsule, times the couplings, added up. */
function weightedSum(coupling, votes, upper, dim) {
  const z = new Float32Array(upper * dim);
  for (let k = 0, pair = 0; k < votes.length; pair++) {
    const weight = coupling[pair], end = k + dim;
    for (let to = (pair % upper) * dim; k < end; to++, k++) z[to] += weight * votes[k];
  }
  return z;
}

/** The length of each z_j over the coupling-weighted sum of the vote lengths: 1 when all votes point one way. */
function agreement(coupling, z, voteLengths, dim) {
  const length = lengths(z, dim), total = new Float32Array(length.length);
  coupling.forEach((weight, pair) => { total[pair % total.length] += weight * voteLengths[pair]; });
  return length.map((value, j) => value / Math.max(total[j], 1e-12));
}

/** Adds to every logit the cosine between the vote and the upper capsule's direction. */
function addCosines(logits, votes, voteLengths, direction, dim) {
  const upper = direction.length / dim;
  for (let pair = 0; pair < logits.length; pair++) {
    let product = 0;
    for (let n = 0; n < dim; n++) product += votes[pair * dim + n] * direction[(pair % upper) * dim + n];
    logits[pair] += product / Math.max(voteLengths[pair], 1e-12);
  }
}

/** z_j [d] of all lower capsules, each coupled with weight 1, through a matrix of d rows. */
export function forward(x, matrix) {
  return Float32Array.from(matrix, (row) => dot(row, x));
}

/** What an upper capsule sends to all lower ones through its matrix. */
export function sendBack(pose, matrix) {
  const result = new Float32Array(matrix[0].length);
  matrix.forEach((row, n) => addTimes(result, row, pose[n]));
  return result;
}

/** The cosine between x and what one upper capsule alone sends back: `explanation` in capsnb/sparsity.py. */
export function explanation(x, matrix, lowerDim) {
  const capsule = squash(forward(x, matrix), matrix.length);
  return cosine(squash(sendBack(capsule, matrix), lowerDim), x);
}

function cosine(a, b) {
  return dot(a, b) / Math.max(Math.sqrt(dot(a, a) * dot(b, b)), 1e-8);
}
