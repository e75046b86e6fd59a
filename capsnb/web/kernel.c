// The one slow step, in WebAssembly SIMD: output = matrix · input, all row by row; columns a multiple of 4.
// Nine sums of four columns each fit into the sixteen registers of common processors with what they multiply.

#include <wasm_simd128.h>

enum { ROWS = 2, VECTORS = 3 };

// `rows` by `vectors` sums at once: both are constants where this is inlined, so the sums live in registers.
static inline __attribute__((always_inline)) void tile(const float *matrix, const float *input, float *output,
                                                       int rows, int vectors, int inner, int columns) {
  v128_t sums[ROWS][VECTORS];
  for (int row = 0; row < rows; row++)
    for (int v = 0; v < vectors; v++) sums[row][v] = wasm_f32x4_const_splat(0);
  for (int k = 0; k < inner; k++, input += columns) {
    for (int row = 0; row < rows; row++) {
      v128_t weight = wasm_v128_load32_splat(matrix + row * inner + k);
      for (int v = 0; v < vectors; v++)
        sums[row][v] = wasm_f32x4_add(sums[row][v], wasm_f32x4_mul(weight, wasm_v128_load(input + 4 * v)));
    }
  }
  for (int row = 0; row < rows; row++)
    for (int v = 0; v < vectors; v++) wasm_v128_store(output + row * columns + 4 * v, sums[row][v]);
}

// `rows` rows of the output, three vectors at a time, then one at a time.
static inline __attribute__((always_inline)) void band(const float *matrix, const float *input, float *output,
                                                       int rows, int inner, int columns) {
  int column = 0;
  for (; column + 4 * VECTORS <= columns; column += 4 * VECTORS)
    tile(matrix, input + column, output + column, rows, VECTORS, inner, columns);
  for (; column < columns; column += 4) tile(matrix, input + column, output + column, rows, 1, inner, columns);
}

__attribute__((export_name("multiply"))) void multiply(const float *matrix, const float *input, float *output, int rows,
                                                       int inner, int columns) {
  int row = 0;
  for (; row + ROWS <= rows; row += ROWS)
    band(matrix + row * inner, input, output + row * columns, ROWS, inner, columns);
  for (; row < rows; row++) band(matrix + row * inner, input, output + row * columns, 1, inner, columns);
}
