// Stage 1: two 9 x 9 filter banks and their transposes, 28 -> 20 -> 6 and back (ConvAutoencoder in capsnb/model.py).
// A convolution is a product of the filters with all patches; its transpose adds the patches up to a map again.
// Maps are [channels, side, side], patches [channels · 81, places · places], features [128, 6 · 6].

const CHANNELS = 128, TAPS = 81;
const IMAGE = 28, MAP = 20, GRID = 6; // sides
export const POSITIONS = GRID * GRID;

/**
 * The way from features to the image in two halves: `maps` [128, 20 · 20] of features, linear and slow, and `image` of
 * maps to which the bias was added. Together they are what ConvAutoencoder.decode_logits and a sigmoid do.
 * `read(name)` gives a tensor.
 */
export function imageDecoder(read, slope, newProduct) {
  const second = newProduct(CHANNELS * TAPS, CHANNELS, POSITIONS);
  const first = newProduct(TAPS, CHANNELS, MAP * MAP);
  second.matrix.set(read("filters2"));
  first.matrix.set(read("filters1"));
  const [bias] = read("output_bias");
  return {
    maps(features) {
      second.input.set(features);
      second.multiply();
      return addPatches(second.output, new Float32Array(CHANNELS * MAP * MAP), CHANNELS, MAP, GRID, 2);
    },
    image(maps) {
      first.input.set(maps);
      leakyRelu(first.input, slope);
      first.multiply();
      const image = new Float32Array(IMAGE * IMAGE).fill(bias);
      return addPatches(first.output, image, 1, IMAGE, MAP, 1).map((logit) => 1 / (1 + Math.exp(-logit)));
    },
  };
}

/** Features of images, with the empty image at `origin`: what ConvAutoencoder.encode does. */
export function imageEncoder(read, slope, newProduct) {
  const first = newProduct(CHANNELS, TAPS, MAP * MAP);
  const second = newProduct(CHANNELS, CHANNELS * TAPS, POSITIONS);
  first.matrix.set(transposed(read("filters1"), TAPS, CHANNELS));
  second.matrix.set(transposed(read("filters2"), CHANNELS * TAPS, CHANNELS));
  const [biases0, biases1] = ["biases0", "biases1"].map(read);
  return (image) => {
    takePatches(image, first.input, 1, IMAGE, MAP, 1);
    first.multiply();
    leakyRelu(addToChannels(first.output, biases0), slope);
    takePatches(first.output, second.input, CHANNELS, MAP, GRID, 2);
    second.multiply();
    return leakyRelu(addToChannels(second.output, biases1), slope);
  };
}

/** The numbers under a 9 x 9 window at every place, `stride` apart. */
function takePatches(maps, patches, channels, side, places, stride) {
  for (let row = 0, at = 0; row < channels * TAPS; row++) {
    const start = corner(row, side);
    for (let y = 0; y < places; y++)
      for (let x = 0; x < places; x++) patches[at++] = maps[start + stride * (y * side + x)];
  }
}

/** The transpose of `takePatches`: adds every patch to the maps where it was taken. */
function addPatches(patches, maps, channels, side, places, stride) {
  for (let row = 0, at = 0; row < channels * TAPS; row++) {
    const start = corner(row, side);
    for (let y = 0; y < places; y++)
      for (let x = 0; x < places; x++) maps[start + stride * (y * side + x)] += patches[at++];
  }
  return maps;
}

/** Where the first place of a row of patches (its channel and its tap) lies in the maps. */
function corner(row, side) {
  const channel = Math.floor(row / TAPS), tap = row % TAPS;
  return (channel * side + Math.floor(tap / 9)) * side + (tap % 9);
}

/** Adds one number to each channel. */
export function addToChannels(maps, values) {
  const size = maps.length / values.length;
  for (let k = 0; k < maps.length; k++) maps[k] += values[Math.floor(k / size)];
  return maps;
}

export function leakyRelu(maps, slope) {
  for (let k = 0; k < maps.length; k++) if (maps[k] < 0) maps[k] *= slope;
  return maps;
}

function transposed(matrix, rows, columns) {
  const result = new Float32Array(rows * columns);
  for (let row = 0; row < rows; row++)
    for (let column = 0; column < columns; column++) result[column * rows + row] = matrix[row * columns + column];
  return result;
}
