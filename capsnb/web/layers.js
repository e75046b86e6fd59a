// A decoder that the manifest describes as a list of layers (capsnb/web_layers.py): those of the systems beside expert
// capsules. Each layer takes an array of numbers and gives a new one.
import { addToChannels, imageDecoder, leakyRelu } from "./convolution.js";

/** The function from capsules [J · d] to the image [28 · 28]. `read(name)` gives a tensor. */
export function layeredDecoder(layers, read, newProduct) {
  const steps = layers.map((layer) => LAYERS[layer.kind](layer, read, newProduct));
  return (capsules) => steps.reduce((values, step) => step(values), capsules);
}

const LAYERS = {
  /** The bias and the weights [inputs, outputs], row by row, times 1 and the inputs. */
  dense({ name, inputs, outputs }, read, newProduct) {
    const { matrix, input, output, multiply } = newProduct(1, 1 + inputs, outputs);
    input.set(read(name.replace("dense", "bias")));
    input.set(read(name), outputs);
    matrix[0] = 1;
    return (values) => {
      matrix.set(values, 1);
      multiply();
      return output.slice();
    };
  },
  relu: ({ slope }) => (values) => leakyRelu(values, slope),
  sigmoid: () => (values) => values.map((value) => 1 / (1 + Math.exp(-value))),
  /** The way back through stage 1. */
  filters({ slope }, read, newProduct) {
    const { maps, image } = imageDecoder(read, slope, newProduct), bias = read("biases2");
    return (features) => image(addToChannels(maps(features), bias));
  },
};
