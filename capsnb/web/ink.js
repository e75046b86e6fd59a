// A drawing as a short text: 28 x 28 pixels of 16 greys, two in a byte, base64url. It fits into an address.

const SIDE = 28;

/** The text of grey pixels in [0, 1]; "" for an empty drawing. */
export function write(pixels) {
  const levels = Array.from(pixels, (value) => Math.round(15 * value));
  if (!levels.some(Boolean)) return "";
  const pairs = Array.from({ length: (SIDE * SIDE) / 2 }, (_, n) => 16 * levels[2 * n] + levels[2 * n + 1]);
  return btoa(String.fromCharCode(...pairs)).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

/** The pixels of that text. */
export function read(text) {
  const pairs = Uint8Array.from(atob(text.replaceAll("-", "+").replaceAll("_", "/")), (letter) => letter.charCodeAt(0));
  const pixels = new Float32Array(SIDE * SIDE);
  pairs.forEach((pair, n) => pixels.set([pair >> 4, pair & 15].map((level) => level / 15), 2 * n));
  return pixels;
}

/**
 * What the model is to see of a drawing: scaled and placed as its training images are. MNIST's digits fill 20 pixels
 * and have their centre of mass in the middle of pixel 14; the clothes of Fashion-MNIST fill the frame.
 */
export function fit(canvas, dataset) {
  const box = inkBox(canvas);
  if (!box) return new Float32Array(SIDE * SIDE);
  const scale = (dataset === "mnist" ? 20 : SIDE) / Math.max(box.width, box.height);
  const middle = dataset === "mnist" ? centreOfMass(box) : { x: box.width / 2, y: box.height / 2 };
  const place = dataset === "mnist" ? SIDE / 2 + 0.5 : SIDE / 2;
  return shrink(canvas, box, scale, place - scale * middle.x, place - scale * middle.y);
}

function inkBox(canvas) {
  const { width, height } = canvas, { data } = canvas.getContext("2d").getImageData(0, 0, width, height);
  const inked = [];
  for (let n = 0; n < width * height; n++) if (data[4 * n] > 40) inked.push([n % width, Math.floor(n / width), data[4 * n]]);
  if (!inked.length) return null;
  const range = (k) => inked.reduce(([low, high], point) => [Math.min(low, point[k]), Math.max(high, point[k])], [1e9, 0]);
  const [[left, right], [top, bottom]] = [range(0), range(1)];
  return { left, top, width: right - left + 1, height: bottom - top + 1, inked };
}

function centreOfMass({ inked, left, top }) {
  const mass = inked.reduce((sum, [, , grey]) => sum + grey, 0);
  const mean = (k, origin) => inked.reduce((sum, point) => sum + (point[k] - origin + 0.5) * point[2], 0) / mass;
  return { x: mean(0, left), y: mean(1, top) };
}

/** Scale the box to its place by halves, so that thin lines are averaged and not skipped. */
function shrink(canvas, box, scale, x, y) {
  const small = new OffscreenCanvas(SIDE, SIDE), context = small.getContext("2d");
  const quality = { imageSmoothingEnabled: true, imageSmoothingQuality: "high" };
  let [source, { left, top, width, height }] = [canvas, box];
  for (; scale < 0.5; scale *= 2) {
    const half = new OffscreenCanvas(Math.ceil(width / 2), Math.ceil(height / 2));
    Object.assign(half.getContext("2d"), quality).drawImage(source, left, top, width, height, 0, 0, width / 2, height / 2);
    [source, left, top, width, height] = [half, 0, 0, width / 2, height / 2];
  }
  Object.assign(context, quality).drawImage(source, left, top, width, height, x, y, scale * width, scale * height);
  const { data } = context.getImageData(0, 0, SIDE, SIDE);
  return Float32Array.from({ length: SIDE * SIDE }, (_, n) => data[4 * n] / 255 * (data[4 * n + 3] / 255));
}
