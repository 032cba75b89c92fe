// What a training step keeps in memory: the formulas of notebook 6, and the page that shows them.
"use strict";

// --- The formulas ----------------------------------------------------------------------------

// Bytes of a trained number: as stored, its gradient, each number that the optimizer remembers of
// it, and its copy in float32.
const RECIPES = {
  "float32": { stored: 4, gradient: 4, remembered: 4, copy: 0 },
  "mixed precision": { stored: 2, gradient: 2, remembered: 4, copy: 4 },
  "16 bits throughout": { stored: 2, gradient: 2, remembered: 2, copy: 0 },
};
// What it remembers of each, and bytes for each tensor: Adam counts its steps.
const OPTIMIZERS = {
  "Adam": { numbers: 2, tensor: 4 },
  "SGD with momentum": { numbers: 1, tensor: 0 },
  "SGD": { numbers: 0, tensor: 0 },
};
// Bytes of a frozen matrix (notebook 8): 64 numbers of 4 bits take 32 bytes and share a scale,
// which takes 4 bytes, or 1 if the scales are rounded in blocks of 256. Null: as in training.
const FORMATS = {
  "as in training": null,
  "4.5 bits (4, and scales)": (size) => Math.ceil(size / 64) * 36,
  "4.127 bits (scales rounded, too)": (size) =>
    Math.ceil(size / 64) * 33 + 4 * Math.ceil(Math.ceil(size / 64) / 256) + 4,
  "4 bits (bare, for every number)": (size) => size / 2,
};
const ATTENTION = ["query", "key", "value", "output"];
const KEPT = ["one tensor a block (checkpointing)", "all, with fused attention", "all, with stored attention"];

/** The linear layers of one block [name, inputs, outputs], and the numbers and tensors around them. */
function anatomy(model) {
  if (model.kind === "RichBoyNet") {
    const linear = [["fc1", 784, 1000], ["fc2", 1000, 2000], ["fc3", 2000, 10]];
    return { linear, blocks: 1, inBlock: 3010, tensorsInBlock: 3, outside: 0, tensorsOutside: 0 };
  }
  const { kind, layers: blocks, width: w, keys, mlp, vocabulary, positions = 0, tied } = model;
  const linear = [["query", w, w], ["key", w, keys], ["value", w, keys], ["output", w, w]];
  if (kind === "Llama") { // three matrices in the MLP, no biases, norms of one vector
    linear.push(["gate", w, mlp], ["up", w, mlp], ["down", mlp, w]);
    const outside = (tied ? 1 : 2) * vocabulary * w + w;
    return { linear, blocks, inBlock: 2 * w, tensorsInBlock: 2, outside, tensorsOutside: tied ? 2 : 3 };
  }
  linear.push(["up", w, mlp], ["down", mlp, w]); // a GPT: a bias for each layer, norms of two
  const biases = linear.reduce((sum, [, , outputs]) => sum + outputs, 0);
  const outside = (vocabulary + positions) * w + 2 * w;
  return { linear, blocks, inBlock: biases + 4 * w, tensorsInBlock: 10, outside, tensorsOutside: 4 };
}

/** The bytes that autograd keeps for the backward pass, if these layers learn. */
function activations(model, { targets, rank, batch, tokens, kept }, bytes, all) {
  const { linear, blocks } = anatomy(model);
  const factors = all ? 0 : rank * targets.length; // A·x, for each row
  const learns = (...names) => all || names.some((name) => targets.includes(name));
  if (model.kind === "RichBoyNet") { // inputs from the first layer on that learns; then the loss
    const first = linear.findIndex(([name]) => learns(name));
    const inputs = linear.slice(first).reduce((sum, [, size]) => sum + size, 0);
    return batch * (bytes * (inputs + factors) + 4 * 10 + 8) + 4;
  }
  const { kind, width: w, heads, keys, mlp } = model;
  if (kept === KEPT[0]) return bytes * batch * blocks * tokens * w;
  const fused = kept === KEPT[1], llama = kind === "Llama";
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
function bill(model, settings) {
  const { linear, blocks, inBlock, tensorsInBlock, outside, tensorsOutside } = anatomy(model);
  const { rank, targets } = settings, format = FORMATS[settings.format];
  const recipe = RECIPES[settings.recipe], optimizer = OPTIMIZERS[settings.optimizer];
  const sum = (values) => values.reduce((total, value) => total + value, 0);
  const sizes = linear.map(([, inputs, outputs]) => inputs * outputs);
  const adapted = linear.filter(([name]) => targets.includes(name));
  const others = blocks * inBlock + outside; // all that is in no linear layer's matrix
  const total = blocks * sum(sizes) + others;
  const trained = blocks * rank * sum(adapted.map(([, inputs, outputs]) => inputs + outputs));
  const bare = settings.format.includes("bare");
  const frozen = !format ? recipe.stored * total : bare ? format(total)
    : blocks * sum(sizes.map(format)) + recipe.stored * others;
  const learning = (numbers, tensors) => ({
    gradients: recipe.gradient * numbers,
    optimizer: (recipe.copy + recipe.remembered * optimizer.numbers) * numbers + optimizer.tensor * tensors,
  });
  const tensors = blocks * (linear.length + tensorsInBlock) + tensorsOutside;
  const full = { weights: recipe.stored * total, ...learning(total, tensors) };
  const lora = { weights: frozen + recipe.stored * trained, ...learning(trained, 2 * blocks * adapted.length) };
  full.activations = activations(model, settings, recipe.stored, true);
  lora.activations = activations(model, settings, recipe.stored, false);
  return { total, trained, full, lora };
}

// --- The page --------------------------------------------------------------------------------

const MODELS = {
  "RichBoyNet (notebook 3)": { kind: "RichBoyNet" },
  "The small Llama of notebook 7": { kind: "Llama", layers: 3, width: 128, heads: 4, keys: 128, mlp: 256, vocabulary: 1024, tied: true },
  "GPT-2 medium": { kind: "GPT", layers: 24, width: 1024, heads: 16, keys: 1024, mlp: 4096, vocabulary: 50257, positions: 1024 },
  "Llama 2, 7 billion": { kind: "Llama", layers: 32, width: 4096, heads: 32, keys: 4096, mlp: 11008, vocabulary: 32000 },
  "Llama 2, 70 billion": { kind: "Llama", layers: 80, width: 8192, heads: 64, keys: 1024, mlp: 28672, vocabulary: 32000 },
  "GPT-3": { kind: "GPT", layers: 96, width: 12288, heads: 96, keys: 12288, mlp: 49152, vocabulary: 50257, positions: 2048 },
};
const SHAPE = { // what a reader may change of a Transformer
  layers: "blocks", width: "width", heads: "heads", keys: "width of keys",
  mlp: "width of the MLP", vocabulary: "vocabulary",
};
const TARGETS = {
  "query and value": ["query", "value"],
  "attention": ATTENTION,
  "the MLP": ["gate", "up", "down"],
  "all linear layers": [...ATTENTION, "gate", "up", "down"],
};
const DENSE = { "all three layers": ["fc1", "fc2", "fc3"], "the last layer, fc3": ["fc3"] };
const PARTS = ["weights", "gradients", "optimizer", "activations"];
const OWN = "Your own numbers";

const whole = (number) => number.toLocaleString("en", { maximumFractionDigits: 0 });
/** Three digits and a decimal unit, as in notebook 6. */
function unit(bytes) {
  const units = ["B", "kB", "MB", "GB", "TB", "PB"];
  let at = 0;
  for (; bytes >= 999.5 && at < units.length - 1; at++) bytes /= 1000;
  return `${at && bytes < 99.95 ? bytes.toPrecision(3) : bytes.toFixed(0)} ${units[at]}`;
}

function field(id, text, control, ...more) {
  control.id = id;
  const label = element("label", { for: id, class: "field" }, element("span", {}, text, ...more), control);
  control.addEventListener("input", () => { if (id in SHAPE) $("model").value = OWN; show(); });
  return label;
}
function choice(id, text, options) {
  const control = element("select");
  options.forEach((option) => control.add(new Option(option)));
  return field(id, text, control);
}
const count = (id, text, value) =>
  field(id, text, element("input", { type: "number", min: 1, max: 1e7, step: 1, required: "", value }));

$("fields").append(
  choice("model", "Model", [...Object.keys(MODELS), OWN]),
  element("fieldset", { class: "numbers", id: "shape" }, element("legend", {}, "Its shape"),
    ...Object.entries(SHAPE).map(([id, text]) => count(id, text, 1))),
  choice("targets", "LoRA on", Object.keys(TARGETS)),
  field("rank", "Rank", element("input", { type: "range", min: 0, max: 8, step: 1, value: 3 }), element("output", { for: "rank", id: "rank-says" })),
  choice("recipe", "Training in", Object.keys(RECIPES)),
  choice("format", "Frozen weights in", Object.keys(FORMATS)),
  choice("optimizer", "Optimizer", Object.keys(OPTIMIZERS)),
  element("div", { class: "numbers" }, count("batch", "Batch", 64), count("tokens", "Tokens in each", 512)),
  choice("kept", "Activations kept", KEPT),
);
for (const part of PARTS) $("key").append(element("span", {}, element("i", { class: part }), part));

/** Fill in what belongs to a model: its shape, and where LoRA can sit. */
let model = null;
function choose(name) {
  const preset = MODELS[name], dense = preset.kind === "RichBoyNet", targets = dense ? DENSE : TARGETS;
  model = preset;
  for (const id in SHAPE) $(id).value = preset[id] ?? 1;
  for (const id of ["shape", "kept", "tokens"]) (id === "shape" ? $(id) : $(id).parentNode).hidden = dense;
  $("targets").replaceChildren(...Object.keys(targets).map((target) => new Option(target)));
  $("batch").value = dense ? 64 : 1;
}
$("model").addEventListener("change", () => {
  if ($("model").value !== OWN) choose($("model").value);
  else if (model.kind === "RichBoyNet") { choose("Llama 2, 7 billion"); $("model").value = OWN; }
  show();
});

function show() {
  const dense = model.kind === "RichBoyNet";
  const wrong = [...document.querySelectorAll("input:invalid")].filter((input) => input.offsetParent);
  $("message").textContent = wrong.length
    ? `“${wrong[0].labels[0].textContent}” must be a whole number from 1 to 10,000,000. Below stands the last bill.` : "";
  if (wrong.length) return;
  const own = dense ? model : { ...model, ...Object.fromEntries(Object.keys(SHAPE).map((id) => [id, Number($(id).value)])) };
  const targets = (dense ? DENSE : TARGETS)[$("targets").value];
  const settings = { targets, batch: Number($("batch").value), tokens: Number($("tokens").value) };
  const sizes = anatomy(own).linear.filter(([name]) => targets.includes(name)).flatMap(([, ...size]) => size);
  $("rank").max = Math.min(8, Math.floor(Math.log2(Math.min(...sizes)))); // no rank above a matrix's
  settings.rank = 2 ** $("rank").value;
  $("rank-says").textContent = settings.rank;
  $("rank").setAttribute("aria-valuetext", `rank ${settings.rank}`);
  $("rank").style.setProperty("--value", $("rank").value / Math.max(1, $("rank").max));
  for (const id of ["recipe", "format", "optimizer", "kept"]) settings[id] = $(id).value;
  draw(bill(own, settings), settings, dense);
}

function draw({ total, trained, full, lora }, settings, dense) {
  const sum = (parts) => PARTS.reduce((bytes, part) => bytes + parts[part], 0);
  const bills = { "full fine-tuning": full, [`LoRA, r = ${settings.rank}`]: lora };
  const most = Math.max(sum(full), sum(lora));
  $("bars").replaceChildren(...Object.entries(bills).flatMap(([name, parts]) => {
    const says = PARTS.map((part) => `${part} ${unit(parts[part])}`).join(", ");
    const bar = element("div", { class: "bar", role: "img", "aria-label": `${name}: ${says}` });
    for (const part of PARTS) {
      const piece = element("i", { class: part, title: `${part}: ${unit(parts[part])}` });
      piece.style.width = `${100 * parts[part] / most}%`;
      bar.append(piece);
    }
    return [element("div", { class: "name" }, element("span", {}, name), element("span", {}, unit(sum(parts)))), bar];
  }));
  const row = (name, ...cells) =>
    element("tr", name === "sum" ? { class: "sum" } : {}, element("th", { scope: "row" }, name), ...cells.map((bytes) => element("td", {}, unit(bytes))));
  $("table").replaceChildren(...PARTS.map((part) => row(part, full[part], lora[part])), row("sum", sum(full), sum(lora)));
  const share = 100 * trained / total, times = sum(full) / sum(lora);
  const digits = share < 0.1 ? 4 : 2;
  const need = (parts) => {
    const card = [24, 48, 80].find((size) => sum(parts) <= size * 1e9);
    return card ? `fits into ${card} GB` : "takes more than 80 GB";
  };
  $("says").replaceChildren(
    `LoRA trains ${whole(trained)} numbers, the model has ${whole(total)}: `,
    element("b", {}, `${share.toFixed(digits)} %`),
    ". The memory of a step shrinks by a factor of ", element("b", {}, times.toFixed(2)),
    ". ", dense ? "" : `Of graphics cards with 24, 48 or 80 GB: full fine-tuning ${need(full)}, LoRA ${need(lora)}.`);
  const notes = ["Sums of tensors: what is temporary, and what an allocator rounds up, comes on top."];
  if (settings.format !== "as in training")
    notes.push("Full fine-tuning cannot train weights of 4 bits; its bill stays as it is."
      + (settings.format.includes("bare") ? "" : " Embeddings, norms and biases stay as in training."));
  notes.push(dense ? "LoRA is counted as a branch." : "Activations are those of the blocks; the loss comes on top."
    + (settings.kept === KEPT[0] ? " With checkpointing the rest is computed again." : ""));
  $("note").textContent = notes.join(" ");
}

choose(Object.keys(MODELS)[0]);
show();
