// The memory calculator: what a reader sets, what the formulas make of it, and which card has room.
import { $, element } from "./dom.js";
import {
  ATTENTION,
  anatomy,
  bill,
  FORMATS,
  KEPT,
  largestBatch,
  OPTIMIZERS,
  PARTS,
  RECIPES,
  total,
  usable,
} from "./memory_model.js";

// Shapes as the models' configurations have them: width of the model, heads of a size of their
// own, groups of heads that share keys and values, width of the MLP.
const LLAMA = { kind: "Llama", head: 128 };
const MODELS = {
  "SmolLM2 135M": {
    ...{ ...LLAMA, layers: 30, width: 576, heads: 9, head: 64, groups: 3, mlp: 1536 },
    ...{ vocabulary: 49152, tied: true },
  },
  "Llama 3.2 1B": {
    ...{ ...LLAMA, layers: 16, width: 2048, heads: 32, head: 64, groups: 8, mlp: 8192 },
    ...{ vocabulary: 128256, tied: true },
  },
  "Qwen 3 4B": {
    ...{ ...LLAMA, layers: 36, width: 2560, heads: 32, groups: 8, mlp: 9728 },
    ...{ vocabulary: 151936, tied: true, normed: true },
  },
  "Mistral 7B (v0.3)": {
    ...{ ...LLAMA, layers: 32, width: 4096, heads: 32, groups: 8, mlp: 14336 },
    ...{ vocabulary: 32768 },
  },
  "Qwen 2.5 7B": {
    ...{ ...LLAMA, layers: 28, width: 3584, heads: 28, groups: 4, mlp: 18944 },
    ...{ vocabulary: 152064, biased: true },
  },
  "Llama 3.1 8B": {
    ...{ ...LLAMA, layers: 32, width: 4096, heads: 32, groups: 8, mlp: 14336 },
    ...{ vocabulary: 128256 },
  },
  "Llama 3.1 70B": {
    ...{ ...LLAMA, layers: 80, width: 8192, heads: 64, groups: 8, mlp: 28672 },
    ...{ vocabulary: 128256 },
  },
  "Llama 2 7B": {
    ...{ ...LLAMA, layers: 32, width: 4096, heads: 32, groups: 32, mlp: 11008 },
    ...{ vocabulary: 32000 },
  },
  "GPT-2 medium": {
    ...{ kind: "GPT", layers: 24, width: 1024, heads: 16, head: 64, groups: 16, mlp: 4096 },
    ...{ vocabulary: 50257, positions: 1024, tied: true },
  },
  "GPT-3": {
    ...{ kind: "GPT", layers: 96, width: 12288, heads: 96, head: 128, groups: 96, mlp: 49152 },
    ...{ vocabulary: 50257, positions: 2048, tied: true },
  },
  "The small Llama of notebook 7": {
    ...{ ...LLAMA, layers: 3, width: 128, heads: 4, head: 32, groups: 4, mlp: 256 },
    ...{ vocabulary: 1024, tied: true },
  },
  "RichBoyNet (notebook 3)": { kind: "RichBoyNet" },
};
const START = "Llama 3.1 8B";
const OWN = "Your own numbers";
const SHAPE = {
  layers: "Blocks",
  width: "Width (hidden size)",
  heads: "Heads",
  head: "Size of a head",
  groups: "Key and value heads",
  mlp: "Width of the MLP",
  vocabulary: "Vocabulary",
};
const TARGETS = {
  "all linear layers": [...ATTENTION, "gate", "up", "down"],
  attention: ATTENTION,
  "query and value": ["query", "value"],
  "the MLP": ["gate", "up", "down"],
};
const DENSE = { "all three layers": ["fc1", "fc2", "fc3"], "the last layer, fc3": ["fc3"] };
const ADAPTERS = { "32 bits (as PEFT makes them)": 4, "as the model": 2 };
// What to try where LoRA does not fit, as it stands in notebook 6: the first that helps is told.
const REMEDIES = {
  checkpointing: { kept: KEPT[0] },
  "frozen weights in 4 bits (QLoRA)": { format: Object.keys(FORMATS)[1] },
};
const CARDS = [8, 12, 16, 24, 32, 40, 48, 80];

const whole = (number) => number.toLocaleString("en", { maximumFractionDigits: 0 });
/** Three digits and a decimal unit, as in notebook 6. */
function unit(bytes) {
  const units = ["B", "kB", "MB", "GB", "TB", "PB"];
  let at = 0;
  for (; bytes >= 999.5 && at < units.length - 1; at++) bytes /= 1000;
  return `${at && bytes < 99.95 ? bytes.toPrecision(3) : bytes.toFixed(0)} ${units[at]}`;
}

// --- What can be set -------------------------------------------------------------------------

function field(id, text, control, ...more) {
  control.id = id;
  control.addEventListener("input", () => changed(id));
  return element("label", { for: id, class: "field" }, element("span", {}, text, ...more), control);
}
function choice(id, text, options) {
  const control = element("select");
  for (const option of options) control.add(new Option(option, option.replace(" GB", "")));
  return field(id, text, control);
}
function count(id, text, value) {
  const look = { type: "number", min: 1, max: 1e7, step: 1, required: "", value };
  return field(id, text, element("input", look));
}
const rank = element("input", { type: "range", min: 0, max: 10, step: 1, value: 3 });
const rankSays = element("output", { for: "rank", id: "rank-says" });
const tied = field("tied", "Embeddings tied to the head", element("input", { type: "checkbox" }));
tied.className = "check";

$("fields").append(
  choice("model", "Model", [...Object.keys(MODELS), OWN]),
  choice(
    "card",
    "Card",
    CARDS.map((size) => `${size} GB`),
  ),
  element(
    "div",
    { class: "numbers" },
    count("batch", "Batch", 1),
    count("tokens", "Tokens in each", 2048),
  ),
  choice("targets", "LoRA on", Object.keys(TARGETS)),
  field("rank", "Rank", rank, rankSays),
  choice("format", "Frozen weights in", Object.keys(FORMATS)),
  choice("recipe", "Training in", Object.keys(RECIPES)),
  choice("adapters", "Adapters in", Object.keys(ADAPTERS)),
  choice("optimizer", "Optimizer", Object.keys(OPTIMIZERS)),
  choice("kept", "Activations kept", KEPT),
  element(
    "details",
    { id: "shape" },
    element("summary", {}, "The model’s shape"),
    element(
      "div",
      { class: "numbers" },
      ...Object.entries(SHAPE).map(([id, text]) => count(id, text, 1)),
    ),
    tied,
  ),
);
const IDS = [...document.querySelectorAll("#fields [id]")]
  .filter((control) => control.matches("select, input"))
  .map(({ id }) => id);

let model = null; // of which the shape starts
/** Fill in what belongs to a model: its shape, and where LoRA can sit. */
function choose(name) {
  const isDense = MODELS[name].kind === "RichBoyNet";
  model = MODELS[name];
  for (const id in SHAPE) $(id).value = model[id] ?? 1;
  $("tied").checked = Boolean(model.tied);
  $("shape").hidden = isDense;
  for (const id of ["kept", "tokens", "adapters"]) $(id).parentNode.hidden = isDense;
  const before = $("targets").value;
  const targets = Object.keys(isDense ? DENSE : TARGETS);
  $("targets").replaceChildren(...targets.map((target) => new Option(target)));
  if (targets.includes(before)) $("targets").value = before;
}

function changed(id) {
  if (id in SHAPE || id === "tied") $("model").value = OWN;
  if (id === "model" && $("model").value !== OWN) choose($("model").value);
  if (id === "model" && $("model").value === OWN) {
    if (model.kind === "RichBoyNet") choose(START);
    $("model").value = OWN;
    $("shape").open = true;
  }
  show();
  const settings = IDS.filter((id) => $("model").value === OWN || !(id in SHAPE || id === "tied"));
  const value = (id) => (id === "tied" ? Number($(id).checked) : $(id).value);
  history.replaceState(null, "", `#${new URLSearchParams(settings.map((id) => [id, value(id)]))}`);
}

/** Set what the address says; what it says wrongly stays as it is. */
function readAddress() {
  const wanted = new URLSearchParams(location.hash.slice(1));
  const name = wanted.get("model");
  choose(name in MODELS ? name : START);
  for (const [id, value] of wanted) {
    if (!IDS.includes(id)) continue;
    if (id === "tied") $(id).checked = value === "1";
    else if (!$(id).options || [...$(id).options].some((o) => o.value === value))
      $(id).value = value;
  }
  if (name !== OWN) $("model").value = name in MODELS ? name : START;
  $("shape").open = name === OWN;
  show();
}

// --- What follows ----------------------------------------------------------------------------

function show() {
  const isDense = model.kind === "RichBoyNet";
  const inputs = [...document.querySelectorAll("input:invalid")];
  const wrong = inputs.find((input) => !input.closest("[hidden]"));
  const text = wrong?.labels[0].textContent;
  $("message").textContent = wrong
    ? `“${text}” must be a whole number from 1 to 10,000,000. Below stands the last bill.`
    : "";
  if (wrong) return;
  const numbers = Object.fromEntries(Object.keys(SHAPE).map((id) => [id, Number($(id).value)]));
  const shape = isDense ? model : { ...model, ...numbers, tied: $("tied").checked };
  const remark =
    isDense || shape.heads % shape.groups === 0 ? "" : "Heads do not share keys evenly.";
  $("message").textContent = remark;
  const targets = (isDense ? DENSE : TARGETS)[$("targets").value];
  const settings = { targets, batch: Number($("batch").value), tokens: Number($("tokens").value) };
  const adapted = anatomy(shape).linear.filter(([name]) => targets.includes(name));
  const narrow = Math.min(...adapted.flatMap(([, ...size]) => size));
  rank.max = Math.min(10, Math.floor(Math.log2(narrow))); // no rank above a matrix's
  settings.rank = 2 ** rank.value;
  rankSays.textContent = settings.rank;
  rank.setAttribute("aria-valuetext", `rank ${settings.rank}`);
  rank.style.setProperty("--value", rank.value / Math.max(1, rank.max));
  for (const id of ["recipe", "format", "optimizer", "kept"]) settings[id] = $(id).value;
  settings.adapters = isDense ? 2 : ADAPTERS[$("adapters").value];
  draw(shape, settings, Number($("card").value));
}

function draw(shape, settings, card) {
  const { total: numbers, trained, full, lora } = bill(shape, settings);
  const room = usable(card);
  const roomSays = `${(room / 1e9).toFixed(1)} of ${card} GB`;
  const way = settings.format === "as in training" ? "LoRA" : "QLoRA";
  const fits = (parts) => total(parts) <= room;
  const smallest = (parts) => CARDS.find((size) => total(parts) <= usable(size));
  const need = (parts) =>
    smallest(parts) ? `needs a card of ${smallest(parts)} GB` : "fits on none of these cards";
  const remedy = Object.entries(REMEDIES).flatMap(([name, change]) => {
    const { lora: less } = bill(shape, { ...settings, ...change });
    return fits(less) ? [` With ${name} it takes ${unit(total(less))} and fits.`] : [];
  });
  const most = largestBatch(shape, settings, "lora", room);
  const batch = most
    ? `The largest batch that fits is ${whole(most)}.`
    : "Not even a batch of 1 does.";
  const verdict = $("verdict");
  verdict.className = fits(lora) ? "fits" : "bad";
  verdict.replaceChildren(
    element("b", {}, fits(lora) ? `Yes, ${way} fits.` : `No, ${way} does not fit.`),
    ` It takes ${unit(total(lora))}; usable: ${roomSays}. ${batch}`,
    fits(lora) ? "" : ` As it stands it ${need(lora)}.${remedy[0] ?? ""}`,
  );
  $("room").textContent = `usable: ${roomSays}`;
  const each = (full.weights + full.gradients + full.optimizer) / numbers;
  $("in-full").textContent =
    `Full fine-tuning takes ${unit(total(full))}, ${each.toFixed(0)} bytes of it for each weight: it ${need(full)}.`;
  drawBars({ "Full fine-tuning": full, [`${way}, r = ${settings.rank}`]: lora }, card);
  $("way").textContent = way;
  drawTable(full, lora);
  const share = (100 * trained) / numbers;
  const digits = share < 0.1 ? 4 : 2;
  $("says").replaceChildren(
    `LoRA trains ${whole(trained)} numbers, the model has ${whole(numbers)}: `,
    element("b", {}, `${share.toFixed(digits)} %`),
    ". The memory of a step shrinks by a factor of ",
    element("b", {}, (total(full) / total(lora)).toFixed(2)),
    ".",
  );
  $("note").textContent = notes(settings, lora).join(" ");
}

function drawBars(bills, card) {
  const most = Math.max(...Object.values(bills).map(total), usable(card));
  const line = (100 * usable(card)) / most;
  $("bars").replaceChildren(
    ...Object.entries(bills).flatMap(([name, parts]) => {
      const says = PARTS.map((part) => `${nameOf(part, parts)} ${unit(parts[part])}`).join(", ");
      const bar = element("div", { class: "bar", role: "img", "aria-label": `${name}: ${says}` });
      for (const part of PARTS) {
        const title = `${nameOf(part, parts)}: ${unit(parts[part])}`;
        const piece = element("i", { class: part, title });
        piece.style.width = `${(100 * parts[part]) / most}%`;
        bar.append(piece);
      }
      const mark = element("i", { class: "card-line", title: $("room").textContent });
      mark.style.left = `calc(${line}% - 2px)`;
      bar.append(mark);
      const sides = [name, unit(total(parts))].map((text) => element("span", {}, text));
      return [element("div", { class: "name" }, ...sides), bar];
    }),
  );
}
const nameOf = (part, parts) => (part === "peak" ? `at the peak: ${parts.because ?? "–"}` : part);

function drawTable(full, lora) {
  const row = (name, ...cells) =>
    element(
      "tr",
      name === "sum" ? { class: "sum" } : {},
      element("th", { scope: "row" }, name),
      ...cells.map((bytes) => element("td", {}, unit(bytes))),
    );
  const shown = PARTS.filter((part) => full[part] || lora[part]);
  $("table").replaceChildren(
    ...shown.map((part) => row(nameOf(part, lora), full[part], lora[part])),
    row("sum", total(full), total(lora)),
  );
}

function notes(settings, lora) {
  const says = [
    "A GB is 10⁹ bytes. A tenth of the card is kept free, for the allocator and the driver: that is assumed, not measured. Most cards count in 2³⁰ bytes, so there is a little more room.",
  ];
  if (settings.format !== "as in training")
    says.push(
      "Full fine-tuning cannot train weights of 4 bits; its bill stays as it is." +
        (settings.format.includes("bare")
          ? ""
          : " Embeddings, norms and biases stay as in training."),
    );
  if (lora.because)
    says.push(
      "Logits and loss are Hugging Face’s, 12 bytes for each token and entry of the vocabulary; a loss in chunks or a fused one takes less.",
    );
  if (!lora.because) says.push("LoRA is counted as a branch.");
  return says;
}

for (const part of PARTS) {
  const name = part === "peak" ? "at the peak" : part;
  $("key").append(element("span", {}, element("i", { class: part }), name));
}
$("key").append(
  element("span", {}, element("i", { class: "room" }), element("span", { id: "room" })),
);
$("card").value = "24";
readAddress();
addEventListener("hashchange", readAddress);
