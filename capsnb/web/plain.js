// The one slow step, products of matrices, in plain JavaScript: for browsers without WebAssembly SIMD.

/**
 * output [rows, columns] = matrix [rows, inner] · input [inner, columns], all row by row; `columns` is a multiple of 4.
 * Write to `matrix` and `input`, call `multiply()`, read `output`: the same arrays every time.
 */
export function newProduct(rows, inner, columns) {
  const matrix = new Float32Array(rows * inner);
  const input = new Float32Array(inner * columns), output = new Float32Array(rows * columns);
  function multiply() {
    for (let row = 0; row < rows; row++)
      for (let column = 0; column < columns; column += 4) fourSums(row * inner, column, row * columns + column);
  }
  /** Four sums at once, so that every weight is read once for four. */
  function fourSums(start, column, to) {
    let a = 0, b = 0, c = 0, d = 0;
    for (let k = start, at = column; at < input.length; k++, at += columns) {
      const weight = matrix[k];
      a += weight * input[at];
      b += weight * input[at + 1];
      c += weight * input[at + 2];
      d += weight * input[at + 3];
    }
    output[to] = a;
    output[to + 1] = b;
    output[to + 2] = c;
    output[to + 3] = d;
  }
  return { matrix, input, output, multiply };
}
