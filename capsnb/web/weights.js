// Weight files, written by capsnb/packing.py: one tensor after another, in whole numbers with float16 scales, in float16
// or in float32. A file can be read as far as it has arrived.

/** The response to a request for a file of the model `name`. Throws an Error for readers. */
export async function request(url, name) {
  const response = await fetch(url).catch(() => null);
  if (response?.ok) return response;
  const file = url.split("/").at(-1).split("?")[0];
  throw new Error(`The weights of ${name} could not be fetched: ${file} is missing, or the connection failed.`);
}

/** One weight file: `part`, "decoder" or "encoder", of the model that the manifest describes. */
export class WeightFile {
  static async open(folder, manifest, part) {
    const facts = manifest.files[part];
    const response = await request(`${folder}${facts.file}?${facts.digest}`, manifest.name); // new weights, new address
    return new WeightFile(manifest.name, facts, response.body.getReader());
  }

  constructor(name, { bytes, tensors }, reader) {
    Object.assign(this, { name, tensors, reader, content: new Uint8Array(bytes), loaded: 0 });
  }

  /** Waits for the bytes before `end` (default: all), one caller after the other. Throws an Error for readers. */
  async until(end = this.content.length, onProgress = () => {}) {
    while (this.loaded < end) {
      const { done, value } = await this.reader.read().catch(() => ({ done: true }));
      if (done || this.loaded + value.length > this.content.length) throw this.#broken();
      this.content.set(value, this.loaded);
      this.loaded += value.length;
      onProgress({ loaded: Math.min(this.loaded, end), total: end });
    }
  }

  /** Where a tensor ends. */
  endOf(name) {
    const { offset, bytes } = this.tensors[name];
    return offset + bytes;
  }

  /** The numbers of a tensor that has arrived. */
  read(name) {
    if (this.loaded < this.endOf(name)) throw new Error(`The weights of ${this.name} have not all arrived yet.`);
    return READERS[this.tensors[name].type](this.content.buffer, this.tensors[name]);
  }

  #broken() {
    const share = `${this.loaded} of ${this.content.length} bytes`;
    return new Error(`The weights of ${this.name} arrived incomplete, ${share}. Reload the page to try again.`);
  }
}

const READERS = {
  float32: (buffer, { offset, size }) => new Float32Array(buffer, offset, size),
  float16: (buffer, { offset, size }) => new Float32Array(new Uint16Array(buffer, offset, size)).map(fromHalf),
  int8: (buffer, tensor) => scaled(new Float32Array(new Int8Array(buffer, tensor.offset, tensor.size)), buffer, tensor),
  int9: (buffer, tensor) => {
    const whole = new Float32Array(new Int8Array(buffer, tensor.offset, tensor.size));
    const low = new Uint8Array(buffer, tensor.bits, tensor.size / 8);
    for (let k = 0; k < whole.length; k++) whole[k] = 2 * whole[k] + ((low[k >> 3] >> (k & 7)) & 1);
    return scaled(whole, buffer, tensor);
  },
};

/** Whole numbers times the scales of their groups, in place. */
function scaled(whole, buffer, { size, group, scales }) {
  new Uint16Array(buffer, scales, size / group).forEach((bits, number) => {
    const scale = fromHalf(bits);
    for (let k = number * group; k < (number + 1) * group; k++) whole[k] *= scale;
  });
  return whole;
}

/** The number whose float16 has these 16 bits: few browsers have a Float16Array. */
function fromHalf(bits) {
  const exponent = (bits >> 10) & 31, fraction = (bits & 1023) / 1024;
  const size = exponent ? (1 + fraction) * 2 ** (exponent - 15) : fraction * 2 ** -14;
  return bits & 0x8000 ? -size : size;
}
