// The memory calculator: what a reader sets, and what the formulas make of it.
import { $, element } from "./dom.js";
import { ATTENTION, anatomy, bill, FORMATS, KEPT, OPTIMIZERS, RECIPES } from "./memory_model.js";

const MODELS = {
  "RichBoyNet (notebook 3)": { kind: "RichBoyNet" },
  "The small Llama of notebook 7": {
    kind: "Llama",
    layers: 3,
    width: 128,
    heads: 4,
    keys: 128,
    mlp: 256,
    vocabulary: 1024,
    tied: true,
  },
  "GPT-2 medium": {
    kind: "GPT",
    layers: 24,
    width: 1024,
    heads: 16,
    keys: 1024,
    mlp: 4096,
    vocabulary: 50257,
    positions: 1024,
  },
  "Llama 2, 7 billion": {
    kind: "Llama",
    layers: 32,
    width: 4096,
    heads: 32,
    keys: 4096,
    mlp: 11008,
    vocabulary: 32000,
  },
  "Llama 2, 70 billion": {
    kind: "Llama",
    layers: 80,
    width: 8192,
    heads: 64,
    keys: 1024,
    mlp: 28672,
    vocabulary: 32000,
  },
  "GPT-3": {
    kind: "GPT",
    layers: 96,
    width: 12288,
    heads: 96,
    keys: 12288,
    mlp: 49152,
    vocabulary: 50257,
    positions: 2048,
  },
};
const SHAPE = {
  // what a reader may change of a Transformer
  layers: "blocks",
  width: "width",
  heads: "heads",
  keys: "width of keys",
  mlp: "width of the MLP",
  vocabulary: "vocabulary",
};
const TARGETS = {
  "query and value": ["query", "value"],
  attention: ATTENTION,
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
  const label = element(
    "label",
    { for: id, class: "field" },
    element("span", {}, text, ...more),
    control,
  );
  control.addEventListener("input", () => {
    if (id in SHAPE) $("model").value = OWN;
    show();
  });
  return label;
}
function choice(id, text, options) {
  const control = element("select");
  options.forEach((option) => control.add(new Option(option)));
  return field(id, text, control);
}
const count = (id, text, value) =>
  field(
    id,
    text,
    element("input", { type: "number", min: 1, max: 1e7, step: 1, required: "", value }),
  );

$("fields").append(
  choice("model", "Model", [...Object.keys(MODELS), OWN]),
  element(
    "fieldset",
    { class: "numbers", id: "shape" },
    element("legend", {}, "Its shape"),
    ...Object.entries(SHAPE).map(([id, text]) => count(id, text, 1)),
  ),
  choice("targets", "LoRA on", Object.keys(TARGETS)),
  field(
    "rank",
    "Rank",
    element("input", { type: "range", min: 0, max: 8, step: 1, value: 3 }),
    element("output", { for: "rank", id: "rank-says" }),
  ),
  choice("recipe", "Training in", Object.keys(RECIPES)),
  choice("format", "Frozen weights in", Object.keys(FORMATS)),
  choice("optimizer", "Optimizer", Object.keys(OPTIMIZERS)),
  element(
    "div",
    { class: "numbers" },
    count("batch", "Batch", 64),
    count("tokens", "Tokens in each", 512),
  ),
  choice("kept", "Activations kept", KEPT),
);
for (const part of PARTS) $("key").append(element("span", {}, element("i", { class: part }), part));

/** Fill in what belongs to a model: its shape, and where LoRA can sit. */
let model = null;
function choose(name) {
  const preset = MODELS[name],
    dense = preset.kind === "RichBoyNet",
    targets = dense ? DENSE : TARGETS;
  model = preset;
  for (const id in SHAPE) $(id).value = preset[id] ?? 1;
  for (const id of ["shape", "kept", "tokens"])
    (id === "shape" ? $(id) : $(id).parentNode).hidden = dense;
  $("targets").replaceChildren(...Object.keys(targets).map((target) => new Option(target)));
  $("batch").value = dense ? 64 : 1;
}
$("model").addEventListener("change", () => {
  if ($("model").value !== OWN) choose($("model").value);
  else if (model.kind === "RichBoyNet") {
    choose("Llama 2, 7 billion");
    $("model").value = OWN;
  }
  show();
});

function show() {
  const dense = model.kind === "RichBoyNet";
  const wrong = [...document.querySelectorAll("input:invalid")].filter(
    (input) => input.offsetParent,
  );
  $("message").textContent = wrong.length
    ? `“${wrong[0].labels[0].textContent}” must be a whole number from 1 to 10,000,000. Below stands the last bill.`
    : "";
  if (wrong.length) return;
  const own = dense
    ? model
    : {
        ...model,
        ...Object.fromEntries(Object.keys(SHAPE).map((id) => [id, Number($(id).value)])),
      };
  const targets = (dense ? DENSE : TARGETS)[$("targets").value];
  const settings = { targets, batch: Number($("batch").value), tokens: Number($("tokens").value) };
  const sizes = anatomy(own)
    .linear.filter(([name]) => targets.includes(name))
    .flatMap(([, ...size]) => size);
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
  $("bars").replaceChildren(
    ...Object.entries(bills).flatMap(([name, parts]) => {
      const says = PARTS.map((part) => `${part} ${unit(parts[part])}`).join(", ");
      const bar = element("div", { class: "bar", role: "img", "aria-label": `${name}: ${says}` });
      for (const part of PARTS) {
        const piece = element("i", { class: part, title: `${part}: ${unit(parts[part])}` });
        piece.style.width = `${(100 * parts[part]) / most}%`;
        bar.append(piece);
      }
      return [
        element(
          "div",
          { class: "name" },
          element("span", {}, name),
          element("span", {}, unit(sum(parts))),
        ),
        bar,
      ];
    }),
  );
  const row = (name, ...cells) =>
    element(
      "tr",
      name === "sum" ? { class: "sum" } : {},
      element("th", { scope: "row" }, name),
      ...cells.map((bytes) => element("td", {}, unit(bytes))),
    );
  $("table").replaceChildren(
    ...PARTS.map((part) => row(part, full[part], lora[part])),
    row("sum", sum(full), sum(lora)),
  );
  const share = (100 * trained) / total,
    times = sum(full) / sum(lora);
  const digits = share < 0.1 ? 4 : 2;
  const need = (parts) => {
    const card = [24, 48, 80].find((size) => sum(parts) <= size * 1e9);
    return card ? `fits into ${card} GB` : "takes more than 80 GB";
  };
  $("says").replaceChildren(
    `LoRA trains ${whole(trained)} numbers, the model has ${whole(total)}: `,
    element("b", {}, `${share.toFixed(digits)} %`),
    ". The memory of a step shrinks by a factor of ",
    element("b", {}, times.toFixed(2)),
    ". ",
    dense
      ? ""
      : `Of graphics cards with 24, 48 or 80 GB: full fine-tuning ${need(full)}, LoRA ${need(lora)}.`,
  );
  const notes = [
    "Sums of tensors: what is temporary, and what an allocator rounds up, comes on top.",
  ];
  if (settings.format !== "as in training")
    notes.push(
      "Full fine-tuning cannot train weights of 4 bits; its bill stays as it is." +
        (settings.format.includes("bare")
          ? ""
          : " Embeddings, norms and biases stay as in training."),
    );
  notes.push(
    dense
      ? "LoRA is counted as a branch."
      : "Activations are those of the blocks; the loss comes on top." +
          (settings.kept === KEPT[0] ? " With checkpointing the rest is computed again." : ""),
  );
  $("note").textContent = notes.join(" ");
}

choose(Object.keys(MODELS)[0]);
show();
