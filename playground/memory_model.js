// What a training step keeps in memory: the formulas of notebook 6.

// Bytes of a trained number: as stored, its gradient, each number that the optimizer remembers of
// it, and its copy in float32.
export const RECIPES = {
  float32: { stored: 4, gradient: 4, remembered: 4, copy: 0 },
  "mixed precision": { stored: 2, gradient: 2, remembered: 4, copy: 4 },
  "16 bits throughout": { stored: 2, gradient: 2, remembered: 2, copy: 0 },
};
// What it remembers of each, and bytes for each tensor: Adam counts its steps.
export const OPTIMIZERS = {
  Adam: { numbers: 2, tensor: 4 },
  "SGD with momentum": { numbers: 1, tensor: 0 },
  SGD: { numbers: 0, tensor: 0 },
};
// Bytes of a frozen matrix (notebook 8): 64 numbers of 4 bits take 32 bytes and share a scale,
// which takes 4 bytes, or 1 if the scales are rounded in blocks of 256. Null: as in training.
export const FORMATS = {
  "as in training": null,
  "4.5 bits (4, and scales)": (size) => Math.ceil(size / 64) * 36,
  "4.127 bits (scales rounded, too)": (size) =>
    Math.ceil(size / 64) * 33 + 4 * Math.ceil(Math.ceil(size / 64) / 256) + 4,
  "4 bits (bare, for every number)": (size) => size / 2,
};
export const ATTENTION = ["query", "key", "value", "output"];
export const KEPT = [
  "one tensor a block (checkpointing)",
  "all, with fused attention",
  "all, with stored attention",
];

/** The linear layers of one block [name, inputs, outputs], and the numbers and tensors around them. */
export function anatomy(model) {
  if (model.kind === "RichBoyNet") {
    const linear = [
      ["fc1", 784, 1000],
      ["fc2", 1000, 2000],
      ["fc3", 2000, 10],
    ];
    return { linear, blocks: 1, inBlock: 3010, tensorsInBlock: 3, outside: 0, tensorsOutside: 0 };
  }
  const { kind, layers: blocks, width: w, keys, mlp, vocabulary, positions = 0, tied } = model;
  const linear = [
    ["query", w, w],
    ["key", w, keys],
    ["value", w, keys],
    ["output", w, w],
  ];
  if (kind === "Llama") {
    // three matrices in the MLP, no biases, norms of one vector
    linear.push(["gate", w, mlp], ["up", w, mlp], ["down", mlp, w]);
    const outside = (tied ? 1 : 2) * vocabulary * w + w;
    return {
      linear,
      blocks,
      inBlock: 2 * w,
      tensorsInBlock: 2,
      outside,
      tensorsOutside: tied ? 2 : 3,
    };
  }
  linear.push(["up", w, mlp], ["down", mlp, w]); // a GPT: a bias for each layer, norms of two
  const biases = linear.reduce((sum, [, , outputs]) => sum + outputs, 0);
  const outside = (vocabulary + positions) * w + 2 * w;
  return {
    linear,
    blocks,
    inBlock: biases + 4 * w,
    tensorsInBlock: 10,
    outside,
    tensorsOutside: 4,
  };
}

/** The bytes that autograd keeps for the backward pass, if these layers learn. */
export function activations(model, { targets, rank, batch, tokens, kept }, bytes, all) {
  const { linear, blocks } = anatomy(model);
  const factors = all ? 0 : rank * targets.length; // A·x, for each row
  const learns = (...names) => all || names.some((name) => targets.includes(name));
  if (model.kind === "RichBoyNet") {
    // inputs from the first layer on that learns; then the loss
    const first = linear.findIndex(([name]) => learns(name));
    const inputs = linear.slice(first).reduce((sum, [, size]) => sum + size, 0);
    return batch * (bytes * (inputs + factors) + 4 * 10 + 8) + 4;
  }
  const { kind, width: w, heads, keys, mlp } = model;
  if (kept === KEPT[0]) return bytes * batch * blocks * tokens * w;
  const fused = kept === KEPT[1],
    llama = kind === "Llama";
  let each = 2 * w + w + 2 * keys + (llama ? 2 : 4); // inputs of norms; q, k, v; norms' own numbers
  each += fused ? heads : heads * tokens; // the attention: a sum for each head, or its matrix
  each += llama ? 3 * mlp : mlp; // what the MLP's activation needs
  if (llama && all) each += 2 * w; // Llama's norms, to learn, keep their normalised inputs
  each += factors;
  if (learns("query", "key", "value")) each += w; // the inputs of layers that learn
  if (learns("output") || fused) each += w;
  if (learns("gate", "up")) each += w;
  if (learns("down")) each += mlp;
  return bytes * batch * blocks * tokens * each;
}

/** The bills of a step, in full and with LoRA, in bytes; and what is counted on the way. */
export function bill(model, settings) {
  const { linear, blocks, inBlock, tensorsInBlock, outside, tensorsOutside } = anatomy(model);
  const { rank, targets } = settings,
    format = FORMATS[settings.format];
  const recipe = RECIPES[settings.recipe],
    optimizer = OPTIMIZERS[settings.optimizer];
  const sum = (values) => values.reduce((total, value) => total + value, 0);
  const sizes = linear.map(([, inputs, outputs]) => inputs * outputs);
  const adapted = linear.filter(([name]) => targets.includes(name));
  const others = blocks * inBlock + outside; // all that is in no linear layer's matrix
  const total = blocks * sum(sizes) + others;
  const trained = blocks * rank * sum(adapted.map(([, inputs, outputs]) => inputs + outputs));
  const bare = settings.format.includes("bare");
  const frozen = !format
    ? recipe.stored * total
    : bare
      ? format(total)
      : blocks * sum(sizes.map(format)) + recipe.stored * others;
  const learning = (numbers, tensors) => ({
    gradients: recipe.gradient * numbers,
    optimizer:
      (recipe.copy + recipe.remembered * optimizer.numbers) * numbers + optimizer.tensor * tensors,
  });
  const tensors = blocks * (linear.length + tensorsInBlock) + tensorsOutside;
  const full = { weights: recipe.stored * total, ...learning(total, tensors) };
  const lora = {
    weights: frozen + recipe.stored * trained,
    ...learning(trained, 2 * blocks * adapted.length),
  };
  full.activations = activations(model, settings, recipe.stored, true);
  lora.activations = activations(model, settings, recipe.stored, false);
  return { total, trained, full, lora };
}
