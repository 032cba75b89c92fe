// What the playground computes: files, the network with its adapters, drawn digits.

// --- Files in the safetensors format (notebook 4): length, JSON header, numbers --------------

const TYPES = {
  F64: Float64Array,
  F32: Float32Array,
  F16: Uint16Array,
  BF16: Uint16Array,
  I16: Int16Array,
  I8: Int8Array,
  U8: Uint8Array,
};

/** Read a file: {metadata, tensors: {name: {shape, data}}}. An Error says what is wrong with it. */
export function readSafetensors(buffer) {
  const foreign = new Error("this is no safetensors file, or it is cut off");
  if (buffer.byteLength < 8) throw foreign;
  const start = 8 + Number(new DataView(buffer).getBigUint64(0, true));
  if (start > buffer.byteLength) throw foreign;
  let header;
  try {
    header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, start - 8)));
  } catch {
    throw foreign;
  }
  if (header === null || typeof header !== "object" || Array.isArray(header)) throw foreign;
  const { __metadata__: metadata = {}, ...entries } = header,
    tensors = {};
  let last = 0;
  for (const [name, entry] of Object.entries(entries)) {
    const { dtype, shape, data_offsets: [begin, end] = [] } = entry ?? {};
    if (![begin, end, ...(shape ?? [NaN])].every((n) => Number.isInteger(n) && n >= 0))
      throw new Error(`the entry of ${name} is damaged`);
    const Type = TYPES[dtype];
    if (!Type) throw new Error(`${name} is of type ${dtype}, which this page does not read`);
    const count = shape.reduce((product, size) => product * size, 1);
    if (end - begin !== count * Type.BYTES_PER_ELEMENT || start + end > buffer.byteLength)
      throw new Error(`${name} is cut off`);
    const raw = new Type(buffer.slice(start + begin, start + end));
    const data =
      dtype === "F16"
        ? Float32Array.from(raw, fromHalf)
        : dtype === "BF16"
          ? new Float32Array(Uint32Array.from(raw, (bits) => bits << 16).buffer)
          : raw;
    tensors[name] = { shape, data };
    last = Math.max(last, end);
  }
  if (start + last !== buffer.byteLength)
    throw new Error("the file is longer than its header says");
  return { metadata, tensors };
}

/** The number that 16 bits stand for: sign, 5 bits of exponent, 10 of fraction. */
function fromHalf(bits) {
  const sign = bits >> 15 ? -1 : 1,
    exponent = (bits >> 10) & 31,
    fraction = bits & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 25) * (1024 + fraction) : 2 ** -24 * fraction);
}

/** The tensors whose names begin with "group/", named without it. */
export function group(tensors, name) {
  const inside = Object.entries(tensors).filter(([key]) => key.startsWith(`${name}/`));
  return Object.fromEntries(inside.map(([key, tensor]) => [key.slice(name.length + 1), tensor]));
}

// --- The network and its adapters ------------------------------------------------------------

/**
 * The base as a list of layers {name, rows, columns, weight, scale, sums, bias}. The whole numbers
 * of a weight are turned: those of one column, which meet the same input, lie side by side.
 */
export function readBase(tensors) {
  return ["fc1", "fc2", "fc3"].map((name) => {
    const { shape, data } = tensors[`${name}.weight`];
    const [rows, columns] = shape;
    const weight = new Int8Array(data.length);
    const sums = new Float64Array(rows); // of each row
    for (let i = 0, at = 0; i < rows; i++)
      for (let j = 0; j < columns; j++, at++) {
        weight[j * rows + i] = data[at];
        sums[i] += data[at];
      }
    const scale = tensors[`${name}.weight_scale`].data;
    return { name, rows, columns, weight, scale, sums, bias: tensors[`${name}.bias`].data };
  });
}

// Settings that change what an adapter computes without changing the names of its tensors, and the
// ways to begin that leave W₀ as it is. `load_adapter` has the same lists; a test compares them.
const NOT_PLAIN = [
  "use_rslora",
  "use_dora",
  "use_qalora",
  "fan_in_fan_out",
  "rank_pattern",
  "alpha_pattern",
  "alora_invocation_tokens",
  "layer_replication",
];
const PLAIN_STARTS = [true, false, "gaussian", "orthogonal", "eva"];

/** An adapter that fits the base: {rank, alpha, layers: {name: {A, B}}}. An Error says why not. */
export function readAdapter(tensors, config, base) {
  const { peft_type: type, r: rank, lora_alpha: alpha } = config ?? {};
  if (type !== "LORA") throw new Error("adapter_config.json does not describe a LoRA adapter");
  if (!Number.isInteger(rank) || rank < 1 || typeof alpha !== "number" || !(alpha > 0))
    throw new Error(`its rank is ${rank} and its α ${alpha}: both must be positive`);
  const isSet = (value) => value && (typeof value !== "object" || Object.keys(value).length);
  const extras = NOT_PLAIN.filter((name) => isSet(config[name]));
  if (!PLAIN_STARTS.includes(config.init_lora_weights ?? true)) extras.push("init_lora_weights");
  if (extras.length) throw new Error(`it uses ${extras.join(", ")}: not plain LoRA`);
  const layers = {};
  for (const [name, { shape, data }] of Object.entries(tensors)) {
    const [, target, factor] = name.match(/^base_model\.model\.(.+)\.lora_([AB])\.weight$/) ?? [];
    const layer = base.find((layer) => layer.name === target);
    if (!layer) throw new Error(`this network has no place for ${name}`);
    const expected = factor === "A" ? [rank, layer.columns] : [layer.rows, rank];
    if (String(shape) !== String(expected))
      throw new Error(
        `${target}.lora_${factor} is ${shape.join(" × ")}, not ${expected.join(" × ")}`,
      );
    if (!data.every(Number.isFinite)) throw new Error(`${name} holds NaN or infinity`);
    layers[target] ??= {};
    layers[target][factor] = data;
  }
  for (const [name, { A, B }] of Object.entries(layers))
    if (!A || !B) throw new Error(`it lacks one of the two factors of ${name}`);
  if (!Object.keys(layers).length) throw new Error("there is no adapter in it");
  return { rank, alpha, layers };
}

/**
 * The 10 logits for an image x of 784 numbers, with adapters: a list of [adapter, strength].
 * Each layer computes h = W₀x + b + Σ strength·(α/r)·B·(A·x); between layers there is ReLU.
 */
export function forward(base, x, mix) {
  base.forEach((layer, depth) => {
    const h = linear(layer, x);
    for (const [{ rank, alpha, layers }, strength] of mix) {
      if (!strength || !layers[layer.name]) continue;
      const { A, B } = layers[layer.name];
      for (let k = 0; k < rank; k++) {
        const inner = strength * (alpha / rank) * dot(A, k * layer.columns, x, layer.columns);
        for (let i = 0; i < layer.rows; i++) h[i] += B[i * rank + k] * inner;
      }
    }
    x = depth < base.length - 1 ? h.map((value) => Math.max(value, 0)) : h;
  });
  return x;
}

/**
 * W₀x + b. Most inputs are equal: blank pixels in the first layer, zeros after a ReLU. They count
 * by the sums of the rows; column by column, the others add what they have more.
 */
function linear({ rows, columns, weight, scale, sums, bias }, x) {
  const ground = least(x);
  const h = sums.map((sum) => ground * sum);
  for (let j = 0; j < columns; j++) {
    const more = x[j] - ground;
    if (more) for (let i = 0, at = j * rows; i < rows; i++, at++) h[i] += more * weight[at];
  }
  return h.map((sum, i) => scale[i] * sum + bias[i]);
}

/** The dot product of a row, which starts somewhere in a matrix, and x. Four sums are faster. */
function dot(matrix, start, x, length) {
  let a = 0,
    b = 0,
    c = 0,
    d = 0,
    j = 0;
  for (; j + 3 < length; j += 4) {
    a += matrix[start + j] * x[j];
    b += matrix[start + j + 1] * x[j + 1];
    c += matrix[start + j + 2] * x[j + 2];
    d += matrix[start + j + 3] * x[j + 3];
  }
  for (; j < length; j++) a += matrix[start + j] * x[j];
  return a + b + c + d;
}

export function softmax(logits) {
  const top = Math.max(...logits);
  const powers = Array.from(logits, (logit) => Math.exp(logit - top));
  const sum = powers.reduce((a, b) => a + b);
  return powers.map((power) => power / sum);
}

export const largest = (numbers) => numbers.indexOf(Math.max(...numbers));

// --- From strokes to an image as MNIST has them ----------------------------------------------

const PEN = 1.15; // half the width of a line, in pixels of the 28 × 28 image
const SOFT = 1.3; // over so many pixels a line fades out

/**
 * Draw strokes, lists of points [x, y] in any unit, as 784 numbers from 0 to 1. As in MNIST the
 * digit fits into 20 × 20 pixels, and its centre of mass lies in the middle of 28 × 28. The line
 * has the same width however large you draw.
 */
export function rasterise(strokes) {
  const points = strokes.flat(),
    xs = points.map(([x]) => x),
    ys = points.map(([, y]) => y);
  const [left, right, top, bottom] = [least(xs), most(xs), least(ys), most(ys)];
  const extent = Math.max(right - left, bottom - top);
  const zoom = extent > 0 ? (20 - 2 * PEN) / extent : 1;
  const scaled = moved(strokes, (left + right) / 2, (top + bottom) / 2, zoom);
  const image = paint(scaled);
  let mass = 0,
    x = 0,
    y = 0;
  image.forEach((ink, i) => {
    mass += ink;
    x += ink * (i % 28);
    y += ink * Math.floor(i / 28);
  });
  return paint(moved(scaled, x / mass, y / mass, 1));
}

const least = (numbers) => numbers.reduce((a, b) => Math.min(a, b));
const most = (numbers) => numbers.reduce((a, b) => Math.max(a, b));

/** The strokes with the point (x, y) in the middle of the image. */
function moved(strokes, x, y, zoom) {
  const put = ([a, b]) => [13.5 + zoom * (a - x), 13.5 + zoom * (b - y)];
  return strokes.map((stroke) => stroke.map(put));
}

/** The image of strokes in pixels: each pixel has the more ink, the nearer a line is. */
function paint(strokes) {
  const image = new Float32Array(784),
    reach = PEN + SOFT;
  for (const stroke of strokes)
    stroke.forEach((end, index) => {
      const begin = stroke[Math.max(index - 1, 0)]; // a point alone is a line without length
      const from = [0, 1].map((i) => Math.max(0, Math.ceil(Math.min(begin[i], end[i]) - reach)));
      const to = [0, 1].map((i) => Math.min(27, Math.max(begin[i], end[i]) + reach));
      for (let y = from[1]; y <= to[1]; y++)
        for (let x = from[0]; x <= to[0]; x++) {
          const ink = Math.min(1, 0.5 + (PEN - distance(x, y, begin, end)) / SOFT);
          image[28 * y + x] = Math.max(image[28 * y + x], ink);
        }
    });
  return image;
}

/** How far the point (x, y) is from the line between two points. */
function distance(x, y, [ax, ay], [bx, by]) {
  const dx = bx - ax,
    dy = by - ay,
    square = dx * dx + dy * dy;
  const along = square ? Math.max(0, Math.min(1, ((x - ax) * dx + (y - ay) * dy) / square)) : 0;
  return Math.hypot(x - ax - along * dx, y - ay - along * dy);
}

/** A probability as the pages show it. */
export const chance = (p) =>
  p > 0.995 ? ">99 %" : p < 0.005 ? "<1 %" : `${Math.round(100 * p)} %`;

/** How a digit may arrive: where each of the 784 pixels of the result comes from. */
export function arrivals(pixelOrder) {
  const all = Array.from({ length: 784 }, (_, i) => i);
  return {
    upright: all,
    rotated: all.map((i) => 28 * (27 - (i % 28)) + Math.floor(i / 28)), // 90° clockwise
    mirrored: all.map((i) => i + 27 - 2 * (i % 28)),
    scrambled: Array.from(pixelOrder),
  };
}

/** What the network is given: the pixels in this order, standardised as `load_mnist` does. */
export function standardise(image, order) {
  return Float32Array.from(order, (from) => (image[from] - 0.1307) / 0.3081);
}
