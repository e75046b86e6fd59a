// Sliders move a pose in few directions, and a capsule alone acts on its pose linearly.

/**
 * A linear function of poses that is slow to compute, plus an offset. It remembers what it made of orthogonal
 * directions, so that no more than `dim` are ever computed, one at most for every pose.
 * `product` adds them up: its matrix is [1, 1 + dim], its input the offset and below it what is remembered.
 */
export class RememberedMap {
  constructor(product, offset) {
    this.product = product;
    product.input.set(offset);
    this.begin(null);
  }

  /** Forgets everything: from here on the function is `compute`. */
  begin(compute) {
    this.compute = compute;
    this.directions = [];
    this.product.matrix.fill(0).fill(1, 0, 1);
  }

  /** The offset plus the function of `pose`: the same array every time. */
  at(pose) {
    const { matrix, multiply, output } = this.product, rest = Array.from(pose); // in double precision
    this.directions.forEach((direction, k) => {
      const share = dot(rest, direction);
      addTimes(rest, direction, -share);
      matrix[k + 1] = share;
    });
    const length = Math.sqrt(dot(rest, rest));
    if (length > ROUNDING) {
      this.#remember(rest.map((value) => value / length));
      matrix[this.directions.length] = length;
    }
    multiply();
    return output;
  }

  #remember(direction) {
    this.directions.push(direction);
    this.product.input.set(this.compute(direction), this.directions.length * this.product.output.length);
  }
}

const ROUNDING = 1e-6; // sliders move in steps of 0.01

export function dot(a, b) {
  let sum = 0;
  for (let k = 0; k < a.length; k++) sum += a[k] * b[k];
  return sum;
}

/** Adds `factor` times `values` to `result`. */
export function addTimes(result, values, factor) {
  for (let k = 0; k < values.length; k++) result[k] += factor * values[k];
  return result;
}
