// The one slow step, products of matrices, in WebAssembly SIMD.

import { wasm } from "./kernel.js";

/** False where the browser has no WebAssembly, or none with SIMD. */
export const isSupported = typeof WebAssembly === "object" && WebAssembly.validate(wasm);

const kernel = isSupported && new WebAssembly.Module(wasm);
const PAGE = 65536; // bytes by which memory grows

/** As `newProduct` in plain.js. Each product has a memory of its own, which never grows again and so moves no array. */
export function newProduct(rows, inner, columns) {
  const { memory, multiply } = new WebAssembly.Instance(kernel).exports;
  const sizes = [rows * inner, inner * columns, rows * columns], places = [memory.buffer.byteLength];
  for (const size of sizes) places.push(places.at(-1) + 4 * size);
  memory.grow(Math.ceil((places[3] - places[0]) / PAGE));
  const [matrix, input, output] = sizes.map((size, k) => new Float32Array(memory.buffer, places[k], size));
  return { matrix, input, output, multiply: () => multiply(...places.slice(0, 3), rows, inner, columns) };
}
