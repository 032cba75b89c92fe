// What the playground shows: answers, knobs, bars. What computes is in network.js.
import { drawCurve, HIGH, LOW, moveLine, STEPS, signed } from "./curve.js";
import { $, element, storedBytes } from "./dom.js";
import {
  arrivals,
  chance,
  forward,
  group,
  largest,
  rasterise,
  readAdapter,
  readBase,
  readSafetensors,
  softmax,
  standardise,
} from "./network.js";
import { asCanvas, drawingArea } from "./paper.js";

// --- What the page begins with, what comes later, and what the reader changes ----------------

// The first digit, and its answers at each strength of one knob: they stand before the network.
const opening = JSON.parse($("opening").textContent);
let net = null; // {base, images, labels, examples}, once all has arrived
let orders = arrivals([]);

const knobs = []; // {name, adapter, strength, input, value, row}
let image = null; // 784 numbers from 0 to 1
let isNew = false; // strokes were added that `image` has not yet
let label = null; // the digit that it is, where that is known
let arrival = "upright"; // how it reaches the network
let turned = null; // the knob that was turned last
let tried = null; // the example that was set up, or the opening, until the digit changes

const paper = drawingArea($("paper"), { drawn, cleared: clear, digit: takeDigit });

/** Parts of the stored numbers have arrived; the last one brings the network. */
globalThis.arrived = (share) => {
  $("progress").value = share;
  if (share < 1) return;
  const file = readSafetensors(storedBytes());
  const { images, labels, pixel_order } = group(file.tensors, "digits");
  const base = readBase(group(file.tensors, "base"));
  net = { base, images, labels, examples: JSON.parse(file.metadata.examples) };
  orders = arrivals(pixel_order.data);
  for (const [name, config] of Object.entries(JSON.parse(file.metadata.adapters))) {
    const adapter = readAdapter(group(file.tensors, name), config, base);
    const knob = knobs.find((knob) => knob.name === name) ?? addKnob(name);
    knob.adapter = adapter;
  }
  $("loading").hidden = true;
  if (knobs.some(({ name }) => name === "european"))
    $("more-kinds").textContent = ", European handwriting";
  for (const control of document.querySelectorAll(":disabled")) control.disabled = false;
  offerExamples();
  const size = base.reduce((sum, { rows, columns }) => sum + rows * (columns + 1), 0);
  $("footer").textContent =
    "The network: RichBoyNet of notebook 3, 784 → 1000 → 2000 → 10, " +
    `${size.toLocaleString("en")} numbers, its weights as int8. Nothing you draw or open leaves ` +
    "this page.";
  if (!image && !paper.strokes().length && !opening) takeDigit(2);
  update();
};

// --- The answers -----------------------------------------------------------------------------

let asked = false;
function update() {
  if (!asked) requestAnimationFrame(show); // once a frame, however much has changed
  asked = true;
}

/** The probabilities alone and with the adapters; null while the network is on its way. */
function answers() {
  if (net) {
    const x = standardise(image, orders[arrival]);
    const mix = knobs.map((knob) => [knob.adapter, knob.strength]);
    const alone = softmax(forward(net.base, x, []));
    return { x, alone, mixed: mix.some(([, s]) => s) ? softmax(forward(net.base, x, mix)) : alone };
  }
  if (tried !== opening || !isOnlyKnob(opening?.knob)) return null;
  const at = (strength) => opening.answers[Math.round((strength - LOW) * 20)];
  return { x: "opening", alone: at(0), mixed: at(knobs.find(isOfOpening).strength) };
}
const isOfOpening = (knob) => knob.name === opening?.knob;
const isOnlyKnob = (name) => knobs.every((knob) => knob.name === name || !knob.strength);

function show() {
  asked = false;
  if (isNew) image = rasterise(paper.strokes());
  isNew = false;
  const given = image && Float32Array.from(orders[arrival], (i) => image[i]);
  paper.paint(given); // strokes stay as they were drawn
  const seen = $("seen").getContext("2d");
  seen.clearRect(0, 0, 28, 28);
  if (given) seen.drawImage(asCanvas(given), 0, 0);
  $("hint").hidden = Boolean(image);
  const answer = image && answers();
  $("says-base").textContent = answer ? largest(answer.alone) : image ? "…" : "–";
  $("says-lora").textContent = answer ? largest(answer.mixed) : image ? "…" : "–";
  rows.forEach((row, digit) => {
    row.set(answer?.mixed[digit], answer?.alone[digit], answer && digit === largest(answer.mixed));
  });
  tellStory(answer);
  announce(answer);
  sweep(answer?.x);
}

/** What a screen reader says, once the reader pauses. */
let announcing = 0;
function announce(answer) {
  clearTimeout(announcing);
  if (!answer) return;
  const [alone, mixed] = [largest(answer.alone), largest(answer.mixed)];
  const says = `The network says ${alone}, with the adapters ${mixed}.`;
  announcing = setTimeout(() => {
    if ($("heard").textContent !== says) $("heard").textContent = says;
  }, 400);
}

/** One sentence beside the digit: what to try, and what came of it. */
function tellStory(answer) {
  if (tried !== opening || !opening || !answer) return;
  const [alone, mixed] = [largest(answer.alone), largest(answer.mixed)];
  const isRight = mixed === opening.digit;
  knobs.find(isOfOpening).row.classList.toggle("turn-this", !isRight);
  const name = element("b", {}, opening.knob);
  const lies = `This ${opening.digit} lies on its side, and the network says ${alone}. `;
  $("story").replaceChildren(
    ...(isRight
      ? [lies, "With ", name, ` it says ${mixed}. Now draw your own, lying or upright.`]
      : [lies, "Turn this up: ", name, "."]),
  );
}

// --- The digit -------------------------------------------------------------------------------

/** The strokes have changed, or the pen was moved. */
function drawn() {
  if (paper.strokes().length) {
    isNew = true;
    if (label !== null || tried) {
      newDigit("");
      arrive("upright"); // as it is drawn, until the reader turns it
    }
    $("what").textContent = "Your drawing.";
  }
  update();
}

/** Another digit: what was said about the one before is over. */
function newDigit(text, digit = null) {
  label = digit;
  tried = null;
  $("what").textContent = text;
  if (digit === null) hintAtOwn();
  else $("story").textContent = `A test digit: a ${digit}. Or draw your own.`;
  for (const { row } of knobs) row.classList.remove("turn-this");
  for (const button of $("tries").children) button.setAttribute("aria-pressed", "false");
}

/** What to draw, where the reader draws. A page of other adapters may lack the knob. */
function hintAtOwn() {
  const isThere = knobs.some(({ name }) => name === "rotated");
  const hint = isThere ? $("own").cloneNode(true).childNodes : ["Draw a digit, then turn a knob."];
  $("story").replaceChildren(...hint);
}

function empty() {
  paper.clear();
  image = null;
  isNew = false;
  newDigit("");
  update();
}
function clear() {
  empty();
  arrive("upright");
}
$("clear").addEventListener("click", clear);

const taken = {}; // how often a test digit was taken, for each label
function takeDigit(digit) {
  if (!net) return;
  const all = [...net.labels.data.keys()].filter((i) => net.labels.data[i] === digit);
  taken[digit] = (taken[digit] ?? -1) + 1;
  takeImage(all[taken[digit] % all.length]);
}
function takeImage(index) {
  empty();
  const pixels = net.images.data.subarray(784 * index, 784 * (index + 1));
  image = Float32Array.from(pixels, (value) => value / 255);
  newDigit(`A test digit: a ${net.labels.data[index]}.`, net.labels.data[index]);
}
for (let digit = 0; digit < 10; digit++) {
  const look = { type: "button", "aria-label": `test digit ${digit}`, disabled: "" };
  const button = element("button", look, `${digit}`);
  button.addEventListener("click", () => takeDigit(digit));
  $("digits").append(button);
}

for (const name of ["upright", "rotated", "mirrored", "scrambled"]) {
  const input = element("input", { type: "radio", name: "arrive", value: name, disabled: "" });
  input.addEventListener("change", () => {
    if (opening && tried === opening) newDigit(`A test digit: a ${label}.`, label);
    arrive(name);
  });
  $("arrive").append(element("label", {}, input, element("span", {}, name)));
}
function arrive(name) {
  arrival = name;
  document.querySelector(`input[value="${name}"]`).checked = true;
  const isUpright = name === "upright";
  $("given").textContent = isUpright ? "as the network gets it" : `given ${name}`;
  $("given").classList.toggle("changed", !isUpright);
  update();
}

// --- The knobs -------------------------------------------------------------------------------

let added = 0;
function addKnob(name, adapter = null) {
  const id = `knob-${added++}`;
  const input = element("input", { type: "range", id, min: LOW, max: HIGH, step: 0.05 });
  const value = element("span", { class: "value", "aria-hidden": "true" });
  const row = element("div", { class: "knob" }, element("label", { for: id }, name), input, value);
  const knob = { name, adapter, input, value, row };
  input.addEventListener("input", () => turn(knob, Number(input.value)));
  knobs.push(knob);
  $("knobs").append(row);
  turn(knob, 0);
  return knob;
}

function turn(knob, strength) {
  const { input, value, row } = knob;
  const text = strength ? signed(strength) : "off";
  turned = knob;
  knob.strength = strength;
  input.value = strength;
  input.style.setProperty("--value", (strength - LOW) / (HIGH - LOW));
  input.setAttribute("aria-valuetext", text);
  value.textContent = text;
  row.classList.toggle("off", !strength);
  update();
}

/** Turn all knobs: to the given strengths by name, the others off. The last one stays "turned". */
function turnAll(strengths, last) {
  for (const knob of knobs) turn(knob, strengths[knob.name] ?? 0);
  turned = knobs.find(({ name }) => name === last) ?? turned;
}
$("off").addEventListener("click", () => turnAll({}, turned?.name));

function remove(knob) {
  knobs.splice(knobs.indexOf(knob), 1);
  knob.row.remove();
  if (turned === knob) turned = knobs[0];
  tell(`“${knob.name}” is gone.`);
  turned.input.focus();
  update();
}

/** Take an adapter's files: the weights and, unless the weights say it too or α is guessed, the settings. */
async function take(files) {
  try {
    if (!net) throw new Error("the network is still on its way");
    const [weights, ...more] = files.filter(({ name }) => name.endsWith(".safetensors"));
    if (!weights || more.length) throw new Error("one file named ….safetensors is needed");
    if (weights.size > 1e8) throw new Error("the file is larger than the network");
    const { metadata, tensors } = readSafetensors(await weights.arrayBuffer());
    const inside = metadata["adapter_config.json"];
    const beside = await files.find(({ name }) => name.endsWith(".json"))?.text();
    const bare = !beside && !inside;
    const [config, saved] = bare
      ? Array(2).fill(assumed(tensors))
      : [beside ?? inside, inside ?? beside].map(settings);
    if (config.r !== saved.r || config.lora_alpha !== saved.lora_alpha)
      throw new Error("adapter_config.json is not the one saved with these numbers");
    const adapter = readAdapter(tensors, config, net.base);
    const own = knobs.map(({ name }) => name).filter((name) => name.startsWith("yours"));
    let name = "yours";
    for (let i = 2; own.includes(name); i++) name = `yours ${i}`;
    const knob = addKnob(name, adapter);
    turn(knob, 1);
    if (bare) askForAlpha(knob);
    const look = { type: "button", class: "remove", "aria-label": `Remove ${name}` };
    const button = element("button", look, "✕");
    button.addEventListener("click", () => remove(knob));
    knob.row.append(button);
    const facts = `rank ${adapter.rank}, α = ${adapter.alpha}, on ${Object.keys(adapter.layers).join(", ")}.`;
    const guess = bare
      ? " PEFT’s file does not say its α. It is assumed to be the rank: put the right one" +
        " beside the knob, or drop adapter_config.json, too."
      : "";
    tell(`“${name}” is a knob now, at 1: ${facts}${guess}`);
  } catch (error) {
    tell(`Not taken, nothing has changed: ${error.message}.`, true);
  }
}
/** The settings of PEFT's weights without adapter_config.json: the rank shows, α = r is a guess. */
function assumed(tensors) {
  const rank = Object.entries(tensors).find(([name]) => name.includes("lora_A"))?.[1].shape[0];
  if (!rank) throw new Error("there is no adapter in it");
  return { peft_type: "LORA", r: rank, lora_alpha: rank };
}
/** A field for the α that a file does not say. A wrong α only stretches the knob's scale. */
function askForAlpha({ name, adapter, row }) {
  const input = element("input", { type: "number", min: 0.01, step: "any", value: adapter.alpha });
  input.addEventListener("input", () => {
    if (!(Number(input.value) > 0)) return;
    adapter.alpha = Number(input.value);
    swept = "";
    update();
  });
  row.append(element("label", { class: "alpha" }, `α of ${name}`, input));
}
function settings(text) {
  try {
    return text && JSON.parse(text);
  } catch {
    throw new Error("adapter_config.json is damaged");
  }
}
function tell(text, bad = false) {
  $("message").textContent = text;
  $("message").classList.toggle("bad", bad);
}
$("file").addEventListener("change", async (event) => {
  await take([...event.target.files]);
  event.target.value = ""; // so that the same file can be chosen again
});
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dropping");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dropping");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  take([...event.dataTransfer.files]);
});

// --- How sure is it? -------------------------------------------------------------------------

const rows = Array.from({ length: 10 }, (_, digit) => {
  const [lora, plain] = ["lora", "base"].map((kind) => element("i", { class: kind }));
  const [mixed, before] = [element("td"), element("td")];
  const bars = element("div", { class: "bars", "aria-hidden": "true" }, lora, plain);
  const name = element("th", { scope: "row" }, `${digit}`);
  const row = element("tr", {}, name, element("td", {}, bars), mixed, before);
  $("bars").append(row);
  return {
    set(p, alone, isTop) {
      lora.style.transform = `scaleX(${p ?? 0})`;
      plain.style.transform = `scaleX(${alone ?? 0})`;
      mixed.textContent = p === undefined ? "" : chance(p);
      before.textContent = alone === undefined ? "" : chance(alone);
      row.classList.toggle("top", Boolean(isTop));
    },
  };
});

// --- The whole range of one knob -------------------------------------------------------------

// Some of the strengths first, the others between them after.
const ORDER = [...STEPS.keys()].sort((a, b) => (a % 6 > 0) - (b % 6 > 0));
let swept = ""; // what the curve is about: the digit, the knob, the others
let curves = [];

/** Compute the curve anew where it is about something else; say so until it is there. */
async function sweep(x) {
  const knob = turned;
  const others = knobs.filter((other) => other !== knob && other.strength);
  if (!x || !knob) {
    swept = "";
    $("curve").replaceChildren();
    $("curve-says").textContent = "";
    return;
  }
  const about = JSON.stringify([Boolean(net), knob.name, others.map((k) => [k.name, k.strength])]);
  const mine = `${about} ${x}`;
  if (mine === swept) {
    drawCurves(knob, others);
    return;
  }
  swept = mine;
  if (!net) {
    curves = opening.answers;
    drawCurves(knob, others);
    return;
  }
  $("curve").classList.add("stale");
  $("curve-says").textContent = "Computing the curve …";
  curves = STEPS.map(() => null);
  let paused = performance.now();
  await new Promise((resume) => setTimeout(resume));
  for (const [done, i] of ORDER.entries()) {
    if (mine !== swept) return;
    const mix = [...others, { ...knob, strength: STEPS[i] }].map((k) => [k.adapter, k.strength]);
    curves[i] = softmax(forward(net.base, x, mix));
    const isCoarse = done === 10; // of eleven points
    if (!isCoarse && performance.now() - paused < 12) continue;
    if (done >= 10) drawCurves(knob, others);
    await new Promise((resume) => setTimeout(resume)); // the answer goes first
    paused = performance.now();
  }
  if (mine === swept) drawCurves(knob, others);
}

function drawCurves(knob, others) {
  if (curves.filter(Boolean).length < 11) return moveLine($("curve"), knob.strength);
  const says = drawCurve($("curve"), curves, knob.name, knob.strength, others.length > 0);
  $("curve-says").textContent = says;
  $("curve").classList.remove("stale");
}
new ResizeObserver(update).observe($("curve"));

// --- Things to try, and the start ------------------------------------------------------------

function offerExamples() {
  for (const text of document.querySelectorAll("[data-example]")) {
    const name = text.dataset.example;
    const example = net.examples[name];
    if (!example) continue; // none was found for this network
    const button = element(
      "button",
      { type: "button", "aria-pressed": "false" },
      text.dataset.title,
    );
    button.dataset.try = name;
    button.addEventListener("click", () => {
      takeImage(example.digit);
      arrive(example.arrival);
      turnAll(example.strengths, example.knob);
      button.setAttribute("aria-pressed", "true");
      tried = example;
      $("story").replaceChildren(...text.cloneNode(true).childNodes);
      turned.row.classList.add("turn-this");
      turned.input.focus({ preventScroll: true });
      reveal(turned.row);
    });
    $("tries").append(button);
  }
}

/** Scroll to a knob that is out of sight, or below the card that stays on a phone. */
function reveal(row) {
  const card = document.querySelector(".stage");
  const box = row.getBoundingClientRect();
  const isAbove = box.left < card.getBoundingClientRect().right;
  const stays = isAbove && getComputedStyle(card).position === "sticky";
  const top = stays ? card.offsetHeight + 8 : 0;
  if (box.top >= top && box.bottom <= innerHeight) return;
  row.style.scrollMarginTop = `${top}px`;
  row.scrollIntoView({ block: stays ? "start" : "center" });
}

for (const name of opening?.knobs ?? []) addKnob(name);
arrive(opening ? "rotated" : "upright");
if (opening) {
  const lying = atob(opening.pixels);
  image = new Float32Array(784);
  orders.rotated.forEach((from, i) => {
    image[from] = lying.charCodeAt(i) / 255;
  });
  label = opening.digit;
  tried = opening;
  turned = knobs.find(isOfOpening);
  $("what").textContent = `A test digit: a ${label} that lies on its side.`;
  $("progress").value = 0.02;
}
