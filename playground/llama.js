// A Llama: embedding, blocks of attention and a gated MLP, and the head, which is the embedding.
import { group } from "./network.js";

const KINDS = {
  query: "self_attn.q_proj",
  key: "self_attn.k_proj",
  value: "self_attn.v_proj",
  output: "self_attn.o_proj",
  gate: "mlp.gate_proj",
  up: "mlp.up_proj",
  down: "mlp.down_proj",
};

/** A matrix {rows, columns, data} of whole numbers with a scale for each row. */
function readMatrix(tensors, name) {
  const { shape, data: numbers } = tensors[name];
  const [rows, columns] = shape;
  const scale = tensors[`${name}_scale`].data;
  const data = Float32Array.from(numbers, (number, i) => number * scale[Math.floor(i / columns)]);
  return { rows, columns, data };
}

/** The model {shape, embedding, layers, norm}: each layer has seven matrices and two norms. */
export function readLlama(tensors, shape) {
  const layers = Array.from({ length: shape.layers }, (_, i) => {
    const inside = `model.layers.${i}`;
    const layer = Object.fromEntries(
      Object.entries(KINDS).map(([kind, name]) => [
        kind,
        readMatrix(tensors, `${inside}.${name}.weight`),
      ]),
    );
    layer.norm1 = tensors[`${inside}.input_layernorm.weight`].data;
    layer.norm2 = tensors[`${inside}.post_attention_layernorm.weight`].data;
    return layer;
  });
  const embedding = readMatrix(tensors, "model.embed_tokens.weight");
  return { shape, embedding, layers, norm: tensors["model.norm.weight"].data };
}

/** The factors of an adapter, as the file names them, with α/r. */
export function readFactors(tensors, name, { r, lora_alpha }) {
  return { scale: lora_alpha / r, factors: group(tensors, name) };
}

/** The model with adapters merged into it, W₀ + Σ strength·(α/r)·B·A: mix is [[adapter, strength]]. */
export function merged(model, mix) {
  const layers = model.layers.map((layer, i) => {
    const copy = { ...layer };
    for (const [kind, name] of Object.entries(KINDS)) {
      const { rows, columns, data } = layer[kind];
      const sum = data.slice();
      for (const [{ scale, factors }, strength] of mix) {
        const place = `base_model.model.model.layers.${i}.${name}`;
        const A = factors[`${place}.lora_A.weight`];
        const B = factors[`${place}.lora_B.weight`];
        if (!strength || !A) continue;
        const rank = A.shape[0];
        for (let row = 0; row < rows; row++)
          for (let k = 0; k < rank; k++) {
            const factor = strength * scale * B.data[row * rank + k];
            for (let j = 0; j < columns; j++)
              sum[row * columns + j] += factor * A.data[k * columns + j];
          }
      }
      copy[kind] = { rows, columns, data: sum };
    }
    return copy;
  });
  return { ...model, layers };
}

/** Keys and values of the tokens so far, for each layer. */
export function newCache(model) {
  return { length: 0, keys: model.layers.map(() => []), values: model.layers.map(() => []) };
}

/** The logits (tokens × vocabulary) after each of some tokens, which follow those in the cache. */
export function forwardLlama(model, tokens, cache = newCache(model)) {
  const { width, epsilon } = model.shape;
  const x = new Float32Array(tokens.length * width);
  tokens.forEach((token, t) => {
    x.set(model.embedding.data.subarray(token * width, (token + 1) * width), t * width);
  });
  model.layers.forEach((layer, i) => {
    const normed = rootMeanSquare(x, layer.norm1, epsilon);
    const query = turned(times(normed, layer.query), cache.length, model.shape);
    const key = turned(times(normed, layer.key), cache.length, model.shape);
    const value = times(normed, layer.value);
    for (let t = 0; t < tokens.length; t++) {
      cache.keys[i].push(key.subarray(t * width, (t + 1) * width));
      cache.values[i].push(value.subarray(t * width, (t + 1) * width));
    }
    add(
      x,
      times(attend(query, cache.keys[i], cache.values[i], cache.length, model.shape), layer.output),
    );
    const again = rootMeanSquare(x, layer.norm2, epsilon);
    const gate = times(again, layer.gate);
    const up = times(again, layer.up);
    add(
      x,
      times(
        gate.map((g, j) => (g / (1 + Math.exp(-g))) * up[j]),
        layer.down,
      ),
    );
  });
  cache.length += tokens.length;
  return times(rootMeanSquare(x, model.norm, epsilon), model.embedding);
}

function add(x, more) {
  for (let i = 0; i < x.length; i++) x[i] += more[i];
}

/** x Wᵀ for rows x: row by row of W, which then serves all tokens. */
function times(x, { rows, columns, data }) {
  const count = x.length / columns;
  const y = new Float32Array(count * rows);
  for (let i = 0; i < rows; i++) {
    const at = i * columns;
    for (let t = 0; t < count; t++) {
      const from = t * columns;
      let [a, b, c, d] = [0, 0, 0, 0];
      for (let j = 0; j < columns; j += 4) {
        a += data[at + j] * x[from + j];
        b += data[at + j + 1] * x[from + j + 1];
        c += data[at + j + 2] * x[from + j + 2];
        d += data[at + j + 3] * x[from + j + 3];
      }
      y[t * rows + i] = a + b + c + d;
    }
  }
  return y;
}

function rootMeanSquare(x, gain, epsilon) {
  const width = gain.length;
  const y = new Float32Array(x.length);
  for (let from = 0; from < x.length; from += width) {
    let squares = 0;
    for (let j = 0; j < width; j++) squares += x[from + j] ** 2;
    const scale = 1 / Math.sqrt(squares / width + epsilon);
    for (let j = 0; j < width; j++) y[from + j] = x[from + j] * scale * gain[j];
  }
  return y;
}

/** Rotary positions: in each head, number j and number j + half turn by an angle. */
function turned(x, first, { width, heads, theta }) {
  const half = width / heads / 2;
  for (let t = 0; t < x.length / width; t++)
    for (let j = 0; j < half; j++) {
      const angle = (first + t) / theta ** (j / half);
      const [cos, sin] = [Math.cos(angle), Math.sin(angle)];
      for (let at = t * width + j; at < (t + 1) * width; at += 2 * half) {
        const [a, b] = [x[at], x[at + half]];
        x[at] = a * cos - b * sin;
        x[at + half] = b * cos + a * sin;
      }
    }
  return x;
}

/** Each head's mean of the values so far, weighted by softmax(q·k / √size). */
function attend(query, keys, values, first, { width, heads }) {
  const size = width / heads;
  const mixed = new Float32Array(query.length);
  for (let t = 0; t < query.length / width; t++)
    for (let from = 0; from < width; from += size) {
      const at = t * width + from;
      const scores = new Float64Array(first + t + 1);
      for (let s = 0; s < scores.length; s++) {
        for (let j = 0; j < size; j++) scores[s] += query[at + j] * keys[s][from + j];
        scores[s] /= Math.sqrt(size);
      }
      const top = scores.reduce((a, b) => Math.max(a, b));
      const powers = scores.map((score) => Math.exp(score - top));
      const sum = powers.reduce((a, b) => a + b);
      for (let s = 0; s < scores.length; s++)
        for (let j = 0; j < size; j++) mixed[at + j] += (powers[s] / sum) * values[s][from + j];
    }
  return mixed;
}

/** The bits of each token but the first: what it costs to name it after those before. */
export function tokenBits(logits, tokens, vocabulary) {
  return tokens.slice(1).map((token, t) => {
    const row = logits.subarray(t * vocabulary, (t + 1) * vocabulary);
    const top = row.reduce((a, b) => Math.max(a, b));
    const sum = row.reduce((total, logit) => total + Math.exp(logit - top), 0);
    return (Math.log(sum) + top - row[token]) / Math.LN2;
  });
}

/** A token drawn from the last row of logits, at a temperature; `random` is from 0 to 1. */
export function draw(logits, vocabulary, temperature, random) {
  const row = logits.subarray(logits.length - vocabulary);
  const top = row.reduce((a, b) => Math.max(a, b));
  const powers = Float64Array.from(row, (logit) => Math.exp((logit - top) / temperature));
  let rest = random * powers.reduce((a, b) => a + b);
  return Math.max(
    0,
    powers.findIndex((power) => {
      rest -= power;
      return rest <= 0;
    }),
  );
}

/** Numbers from 0 to 1 that a seed fixes (mulberry32). */
export function dice(seed) {
  return () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}
