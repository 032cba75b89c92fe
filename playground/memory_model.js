// What a training step holds in memory, in bytes. Notebook 6 derives it; data/measured_bytes.json
// holds what real steps took, and a test compares.
//
//   weights      as stored; a frozen model may be stored in four bits (notebook 9)
//   gradients    of what is trained
//   optimizer    what it remembers of each trained number
//   activations  what the backward pass needs of the forward pass
//   peak         what comes on top at the worst moment: logits and loss; with checkpointing a block
//                that is computed again; or the gradient of the embeddings
//
// The sum counts gradients from the start, as they stand while steps are accumulated.

// Bytes of a trained number: as stored, its gradient, each number that the optimizer remembers of
// it, and its copy in float32.
export const RECIPES = {
  "16 bits, with copies in 32 (mixed)": { stored: 2, gradient: 2, remembered: 4, copy: 4 },
  "16 bits": { stored: 2, gradient: 2, remembered: 2, copy: 0 },
  "32 bits": { stored: 4, gradient: 4, remembered: 4, copy: 0 },
};
const IN_32 = RECIPES["32 bits"];

// How many numbers it remembers of each, and bytes for each tensor: Adam counts its steps. With 8
// bits each has one byte, and 256 share a scale of four.
export const OPTIMIZERS = {
  Adam: { numbers: 2, tensor: 4 },
  "Adam, 8 bits": { numbers: 2, tensor: 4, each: 1 + 4 / 256 },
  "SGD with momentum": { numbers: 1, tensor: 0 },
  SGD: { numbers: 0, tensor: 0 },
};

// Bytes of a frozen matrix: 64 numbers of 4 bits take 32 bytes and share a scale, which takes 4
// bytes, or 1 if the scales are rounded in blocks of 256. Null: as in training.
export const FORMATS = {
  "as in training": null,
  "4 bits (QLoRA: NF4, scales rounded)": (size) =>
    Math.ceil(size / 64) * 33 + 4 * Math.ceil(Math.ceil(size / 64) / 256) + 4,
  "4.5 bits (NF4, scales as they are)": (size) => Math.ceil(size / 64) * 36,
  "4 bits, bare, for every number": (size) => size / 2,
};
export const ATTENTION = ["query", "key", "value", "output"];
export const KEPT = [
  "one tensor a block (checkpointing)",
  "all, with fused attention",
  "all, with stored attention",
];

// As in notebooks 6 and 9: a GB is 10^9 bytes, and a tenth of the card is kept free, for what an
// allocator leaves unused and a GPU's driver takes.
export const usable = (card) => 0.9 * card * 1e9;

const sum = (values) => values.reduce((total, value) => total + value, 0);

/**
 * The linear layers of one block, [name, inputs, outputs], and the numbers and tensors around
 * them. A Llama has three matrices in the MLP, no biases (but `biased` ones of query, key and
 * value), norms of one vector; a GPT has a bias for each layer, norms of two.
 */
export function anatomy(model) {
  if (model.kind === "RichBoyNet") {
    const linear = Object.entries({ fc1: [784, 1000], fc2: [1000, 2000], fc3: [2000, 10] });
    const layers = linear.map(([name, size]) => [name, ...size]);
    const sizes = { inBlock: 3010, tensorsInBlock: 3, outside: 0, tensorsOutside: 0 };
    return { linear: layers, blocks: 1, ...sizes };
  }
  const { kind, layers: blocks, width: w, mlp, vocabulary, positions = 0, tied } = model;
  const { queries: q, keys: k } = widths(model);
  const linear = [
    ["query", w, q],
    ["key", w, k],
    ["value", w, k],
    ["output", q, w],
  ];
  if (kind === "Llama") {
    linear.push(["gate", w, mlp], ["up", w, mlp], ["down", mlp, w]);
    const inBlock = 2 * w + (model.biased ? q + 2 * k : 0) + (model.normed ? 2 * model.head : 0);
    const tensorsInBlock = 2 + (model.biased ? 3 : 0) + (model.normed ? 2 : 0);
    const outside = (tied ? 1 : 2) * vocabulary * w + w;
    return { linear, blocks, inBlock, tensorsInBlock, outside, tensorsOutside: tied ? 2 : 3 };
  }
  linear.push(["up", w, mlp], ["down", mlp, w]);
  const inBlock = sum(linear.map(([, , outputs]) => outputs)) + 4 * w;
  const outside = (vocabulary + positions) * w + 2 * w;
  return { linear, blocks, inBlock, tensorsInBlock: 10, outside, tensorsOutside: 4 };
}

/** How wide the queries of all heads are together, and the keys, which heads may share. */
function widths({ width, heads, head = width / heads, groups = heads }) {
  return { queries: heads * head, keys: groups * head };
}

/**
 * The bytes that autograd keeps of one block for each token, if these layers learn. `bytes` are
 * those of a number; norms compute in 32 bits. Factors in 32 bits over a model in 16 need their
 * inputs in 32, too, a copy for each layer.
 */
function blockBytes(model, { targets, rank, tokens, kept, adapters }, bytes, all) {
  const { width: w, heads, mlp } = model;
  const { queries: q, keys: k } = widths(model);
  const isLlama = model.kind === "Llama";
  const isFused = kept !== KEPT[2]; // with checkpointing, too
  const learns = (...names) => all || names.some((name) => targets.includes(name));
  const { linear } = anatomy(model);
  let numbers = q + 2 * (isFused ? k : q); // shared keys are copied to all heads where not fused
  let in32 = 2 * w + (isLlama ? 2 : 4); // the inputs of the norms, and their own numbers
  if (isFused)
    in32 += heads; // a sum for each head
  else numbers += heads * tokens * (bytes === 2 ? 3 : 1); // the matrix; softmax's is in 32 bits
  numbers += isLlama ? 3 * mlp : mlp; // what the MLP's activation needs
  if (isLlama && all) numbers += 2 * w; // norms, to learn, keep their normalised inputs
  if (isFused) numbers += q; // its result
  if (!all && bytes === 2 && adapters === 4) {
    const adapted = linear.filter(([name]) => targets.includes(name));
    return bytes * numbers + 4 * (in32 + sum(adapted.map(([, inputs]) => inputs + rank)));
  }
  if (learns("query", "key", "value")) numbers += w; // the inputs of layers that learn
  if (learns("output") && !isFused) numbers += q;
  if (learns("gate", "up")) numbers += w;
  if (learns("down")) numbers += mlp;
  if (!all) numbers += rank * targets.length; // A·x
  return bytes * numbers + 4 * in32;
}

/** The activations of a step, and what comes on top at its peak: {activations, peak, because}. */
function moments(model, settings, bytes, all) {
  const { batch, tokens, kept, targets, rank } = settings;
  const { linear, blocks } = anatomy(model);
  if (model.kind === "RichBoyNet") {
    // inputs from the first layer on that learns, A·x, and the loss
    const first = linear.findIndex(([name]) => all || targets.includes(name));
    const inputs = sum(linear.slice(first).map(([, size]) => size));
    const factors = all ? 0 : rank * targets.length;
    return { activations: batch * (bytes * (inputs + factors) + 4 * 10 + 8) + 4, peak: 0 };
  }
  const rows = batch * tokens;
  const block = rows * blockBytes(model, settings, bytes, all);
  const isCheckpointed = kept === KEPT[0];
  const activations = isCheckpointed ? rows * blocks * bytes * model.width : blocks * block;
  // Each token has a score for each entry of the vocabulary. The loss needs them in 32 bits three
  // times: log-softmax, its gradient, and that of the scores.
  const loss = rows * model.vocabulary * 12;
  // A block anew, and the gradients at its two ends.
  const again = isCheckpointed ? block + rows * bytes * 2 * model.width : 0;
  // At the end the embeddings' gradient is made aside, and another one where the head shares it.
  const aside = all ? (model.tied ? 2 : 1) * model.vocabulary * model.width * bytes : 0;
  const peaks = [
    [loss, "logits and loss"],
    [again, "a block computed again"],
    [aside, "the embeddings’ gradient"],
  ];
  const [peak, because] = peaks.reduce((a, b) => (b[0] > a[0] ? b : a));
  return { activations, peak, because };
}

/** The bills of a step, in full and with LoRA, in bytes; and what is counted on the way. */
export function bill(model, settings) {
  const { linear, blocks, inBlock, tensorsInBlock, outside, tensorsOutside } = anatomy(model);
  const { rank, targets } = settings;
  const format = FORMATS[settings.format];
  const recipe = RECIPES[settings.recipe];
  const optimizer = OPTIMIZERS[settings.optimizer];
  const sizes = linear.map(([, inputs, outputs]) => inputs * outputs);
  const adapted = linear.filter(([name]) => targets.includes(name));
  const others = blocks * inBlock + outside; // all that is in no linear layer's matrix
  const total = blocks * sum(sizes) + others;
  const trained = blocks * rank * sum(adapted.map(([, inputs, outputs]) => inputs + outputs));
  let frozen = recipe.stored * total;
  if (settings.format.includes("bare")) frozen = format(total);
  else if (format) frozen = blocks * sum(sizes.map(format)) + recipe.stored * others;
  const learning = ({ gradient, remembered, copy }, numbers, tensors) => ({
    gradients: gradient * numbers,
    optimizer:
      (copy + (optimizer.each ?? remembered) * optimizer.numbers) * numbers +
      optimizer.tensor * tensors,
  });
  const tensors = blocks * (linear.length + tensorsInBlock) + tensorsOutside;
  const factors = settings.adapters === 4 ? IN_32 : recipe;
  const full = { weights: recipe.stored * total, ...learning(recipe, total, tensors) };
  const lora = {
    weights: frozen + factors.stored * trained,
    ...learning(factors, trained, 2 * blocks * adapted.length),
  };
  Object.assign(full, moments(model, settings, recipe.stored, true));
  Object.assign(lora, moments(model, settings, recipe.stored, false));
  return { total, trained, full, lora };
}

export const PARTS = ["weights", "gradients", "optimizer", "activations", "peak"];
export const total = (parts) => sum(PARTS.map((part) => parts[part]));

/** The largest batch with which a way ("full" or "lora") fits into so many bytes; 0 if none does. */
export function largestBatch(model, settings, way, bytes) {
  const fits = (batch) => total(bill(model, { ...settings, batch })[way]) <= bytes;
  if (!fits(1)) return 0;
  let [low, high] = [1, 2];
  while (fits(high) && high < 1e6) [low, high] = [high, 2 * high];
  while (high - low > 1) {
    const middle = Math.floor((low + high) / 2);
    if (fits(middle)) low = middle;
    else high = middle;
  }
  return low;
}
