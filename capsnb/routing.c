// Routing by agreement with no votes stored: section 2.2 as plain loops, for LANES images at once.
//
// A vote W_ij x_i is cast, used and forgotten, anew in every round: arithmetic is cheaper than memory. The images of a
// block lie side by side in one vector, so every line reads as the formula for one image. native.py compiles this file
// for one pair of sizes, D and E of W [I, J, D, E], so that the compiler unrolls the inner loops.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16
typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int integers __attribute__((vector_size(4 * LANES), aligned(4)));

static inline lanes root(lanes x) {
  lanes result;
  for (int n = 0; n < LANES; n++) result[n] = sqrtf(x[n]);
  return result;
}

static inline lanes inverse(lanes x) {  // 1/x, but at most 1e12
  lanes result;
  for (int n = 0; n < LANES; n++) result[n] = 1 / (x[n] > 1e-12f ? x[n] : 1e-12f);
  return result;
}

// e^x for |x| < 80: 2^k times the series of e^f, with an integer k and |f| at most log(2)/2.
static inline lanes exponential(lanes x) {
  const float magic = 12582912;  // 1.5 * 2^23: adding it rounds to an integer, which its low bits hold
  lanes shifted = x * 1.442695041f + magic, k = shifted - magic;
  lanes f = x - k * 0.693359375f + k * 2.12194440e-4f;  // log(2) in two parts
  lanes series = 1 + f * (1 + f * (1 / 2.f + f * (1 / 6.f + f * (1 / 24.f + f * (1 / 120.f + f * (1 / 720.f))))));
  return series * (lanes)(((integers)shifted << 23) + (127 << 23));
}

// The vote W_ij x_i; returns its square, and adds to *dot its product with the direction of capsule j.
static inline lanes cast(const float *w, const lanes *from, const lanes *direction, lanes *vote, lanes *dot) {
  lanes square = {0};
  for (int d = 0; d < D; d++) {
    lanes value = {0};
    for (int e = 0; e < E; e++) value += w[d * E + e] * from[e];
    vote[d] = value;
    square += value * value;
    *dot += value * direction[d];
  }
  return square;
}

// A capsule's direction from its sum of votes, which is scaled first; returns its length.
static inline lanes turn(lanes *capsule, lanes scale, lanes *direction) {
  lanes square = {0};
  for (int d = 0; d < D; d++) capsule[d] *= scale, square += capsule[d] * capsule[d];
  lanes length = root(square), one_over = inverse(length);
  for (int d = 0; d < D; d++) direction[d] = capsule[d] * one_over;
  return length;
}

// All rounds for one block of images. Of lanes: x [I, E], on [I] (1: takes part, 0: does not), and the results
// coupling [I, J], z [J, D], agreement [J]; scratch [J, 2 D + 4]. W [I, J, D, E] is of numbers. The couplings sum to 1
// over j if over_upper, else over i; each round adds sharpness times the cosine of vote and capsule to a logit.
static void route_block(const lanes *x, const lanes *on, const float *W, lanes *coupling, lanes *z, lanes *agreement,
                        lanes *scratch, long I, long J, int rounds, int over_upper, float sharpness) {
  const lanes one = (lanes){0} + 1;
  lanes *votes = scratch, *direction = votes + J * D;
  lanes *length = direction + J * D, *weight = length + J;  // of the votes of one lower capsule
  lanes *total = weight + J, *lengths = total + J;          // sums over i: of the weights; of weight times length
  memset(direction, 0, J * D * sizeof(lanes));
  memset(coupling, 0, I * J * sizeof(lanes));  // holds the logits until the last round
  for (int round = 1; round <= rounds; round++) {
    memset(z, 0, J * D * sizeof(lanes));
    memset(total, 0, 2 * J * sizeof(lanes));
    for (long i = 0; i < I; i++) {
      lanes *logits = coupling + i * J, sum = {0};
      for (long j = 0; j < J; j++) {
        lanes dot = {0};
        length[j] = root(cast(W + (i * J + j) * D * E, x + i * E, direction + j * D, votes + j * D, &dot));
        logits[j] += sharpness * dot * inverse(length[j]);  // 0 in the first round, which knows no direction yet
        weight[j] = on[i] * exponential(logits[j]);
        sum += weight[j];
      }
      lanes share = over_upper ? inverse(sum) : one;
      for (long j = 0; j < J; j++) {
        lanes c = weight[j] * share;
        for (int d = 0; d < D; d++) z[j * D + d] += c * votes[j * D + d];
        total[j] += c;
        lengths[j] += c * length[j];
        if (round == rounds) logits[j] = c;
      }
    }
    for (long j = 0; j < J; j++) {
      lanes scale = over_upper ? one : inverse(total[j]);
      agreement[j] = turn(z + j * D, scale, direction + j * D) * inverse(scale * lengths[j]);
      total[j] = scale;
    }
  }
  for (long n = 0; n < I * J && !over_upper; n++) coupling[n] *= total[n % J];
}

// Images side by side, and apart again: numbers [images, count] as lanes [count], the rest of which is 0.
static void gather(const float *from, long images, long count, lanes *to) {
  memset(to, 0, count * sizeof(lanes));
  for (long n = 0; n < images; n++)
    for (long k = 0; k < count; k++) to[k][n] = from[n * count + k];
}

static void scatter(const lanes *from, long images, long count, float *to) {
  for (long n = 0; n < images; n++)
    for (long k = 0; k < count; k++) to[n * count + k] = from[k][n];
}

// Routing for B images: x [B, I, E], on [B, I], W [I, J, D, E]; the results are coupling [B, I, J], z [B, J, D] and
// agreement [B, J]. Returns 0, or 1 if there was no memory.
int route(const float *x, const float *on, const float *W, float *coupling, float *z, float *agreement, long B, long I,
          long J, int rounds, int over_upper, float sharpness) {
  int failed = 0;
#pragma omp parallel reduction(| : failed)
  {
    lanes *inputs = malloc((I * (E + 1 + J) + J * (3 * D + 5)) * sizeof(lanes)), *parts = inputs + I * E;
    lanes *c = parts + I, *capsules = c + I * J, *agree = capsules + J * D, *scratch = agree + J;
    failed = !inputs;
#pragma omp for schedule(dynamic)
    for (long b = 0; b < B; b += LANES) {
      if (failed) continue;
      long images = B - b < LANES ? B - b : LANES;
      gather(x + b * I * E, images, I * E, inputs);
      gather(on + b * I, images, I, parts);
      route_block(inputs, parts, W, c, capsules, agree, scratch, I, J, rounds, over_upper, sharpness);
      scatter(c, images, I * J, coupling + b * I * J);
      scatter(capsules, images, J * D, z + b * J * D);
      scatter(agree, images, J, agreement + b * J);
    }
    free(inputs);
  }
  return failed;
}
