// What the playground shows: drawing, knobs, bars, the curve. What computes is in network.js.
import { $, element, storedBytes, svg } from "./dom.js";
import {
  arrivals,
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

const percent = (p) => (p > 0.995 ? ">99 %" : p < 0.005 ? "<1 %" : `${Math.round(100 * p)} %`);
const signed = (number) => number.toFixed(2).replace("-", "−");

// --- What is stored in the page, and what the reader changes ---------------------------------

const LOW = -1,
  HIGH = 2; // of a knob
const file = readSafetensors(storedBytes());
const base = readBase(group(file.tensors, "base"));
const { images, labels, pixel_order } = group(file.tensors, "digits");
const orders = arrivals(pixel_order.data);
const examples = JSON.parse(file.metadata.examples);

const knobs = []; // {name, adapter, strength, input, output, row}
let image = null; // 784 numbers from 0 to 1
let strokes = []; // what the image was drawn from, if it was drawn
let arrival = "upright"; // how it reaches the network
let turned = null; // the knob that was turned last

// --- One answer per frame --------------------------------------------------------------------

let asked = false;
function update() {
  if (!asked) requestAnimationFrame(show);
  asked = true;
}

let alone = {}; // what the network says without adapters of the image at hand
function show() {
  asked = false;
  $("hint").hidden = Boolean(image) || Boolean(pen.shown);
  drawPaper();
  drawSeen();
  if (!image) {
    for (const id of ["says-base", "says-lora"]) $(id).textContent = "–";
    rows.forEach((row) => row.set(0, 0, false));
    $("curve").replaceChildren();
    $("curve-says").textContent = "";
    return sweep(null);
  }
  if (alone.image !== image || alone.arrival !== arrival) {
    const x = standardise(image, orders[arrival]);
    alone = { image, arrival, x, answer: softmax(forward(base, x, [])) };
  }
  const mix = knobs.map((knob) => [knob.adapter, knob.strength]),
    start = performance.now();
  const answer = softmax(forward(base, alone.x, mix)),
    top = largest(answer);
  const took = performance.now() - start;
  $("says-base").textContent = largest(alone.answer);
  $("says-lora").textContent = top;
  rows.forEach((row, digit) => row.set(answer[digit], alone.answer[digit], digit === top));
  $("footer").textContent =
    `The network: RichBoyNet of notebook 3, ${FACTS}. This answer took ` +
    `${took.toFixed(0)} ms in your browser. Nothing you draw or open leaves this page.`;
  moveLine();
  sweep(alone.x);
}
const numbers = base.reduce((sum, { weight, bias }) => sum + weight.length + bias.length, 0);
const FACTS = `784 → 1000 → 2000 → 10, ${numbers.toLocaleString("en")} numbers, its weights as int8`;

// --- 1. Draw a digit -------------------------------------------------------------------------

const paper = $("paper"),
  ink = paper.getContext("2d");
const pen = { x: 0.5, y: 0.3, down: false, shown: false }; // moved by the keyboard

function drawPaper() {
  const size = paper.width;
  ink.clearRect(0, 0, size, size);
  if (image && !strokes.length) ink.drawImage(asCanvas(image), 0, 0, size, size);
  ink.strokeStyle = "#fff";
  ink.lineWidth = size / 12;
  ink.lineCap = ink.lineJoin = "round";
  for (const [first, ...rest] of strokes) {
    ink.beginPath();
    ink.moveTo(first[0] * size, first[1] * size);
    for (const [x, y] of rest.length ? rest : [first]) ink.lineTo(x * size, y * size);
    ink.stroke();
  }
  if (!pen.shown) return;
  ink.beginPath();
  ink.arc(pen.x * size, pen.y * size, size / 30, 0, 7);
  ink.fillStyle = ink.strokeStyle = "#ee6fae";
  ink.lineWidth = 5;
  if (pen.down) ink.fill();
  else ink.stroke();
}

function asCanvas(pixels) {
  const canvas = element("canvas", { width: 28, height: 28 }),
    data = new ImageData(28, 28);
  pixels.forEach((value, i) => data.data.set([255, 255, 255, 255 * value], 4 * i));
  canvas.getContext("2d").putImageData(data, 0, 0);
  return canvas;
}

function drawSeen() {
  const seen = $("seen").getContext("2d");
  seen.clearRect(0, 0, 28, 28);
  if (image) seen.drawImage(asCanvas(Float32Array.from(orders[arrival], (i) => image[i])), 0, 0);
}

/** Say what is drawn; `label` is the digit that it is, where that is known. */
function describe(text, label) {
  $("what").textContent = text;
  $("label").textContent = label === undefined ? "" : `: a ${label}`;
}

function addPoint(point, begins) {
  if (!strokes.length || begins) strokes.push([]);
  strokes.at(-1).push(point);
  image = rasterise(strokes);
  describe("Your drawing");
  update();
}

function clear() {
  strokes = [];
  image = null;
  pen.down = false;
  describe("");
  update();
}

const place = (event) => {
  const box = paper.getBoundingClientRect();
  return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
};
paper.addEventListener("pointerdown", (event) => {
  if (event.button) return;
  paper.setPointerCapture(event.pointerId);
  pen.shown = pen.down = false;
  addPoint(place(event), true);
});
paper.addEventListener("pointermove", (event) => {
  if (!paper.hasPointerCapture(event.pointerId) || !strokes.length) return;
  const events = event.getCoalescedEvents?.() ?? [];
  for (const one of events.length ? events : [event]) addPoint(place(one), false);
});
$("clear").addEventListener("click", clear);

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
paper.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (/^[0-9]$/.test(event.key)) takeDigit(Number(event.key));
  else if (event.key === "Delete" || event.key === "Backspace") clear();
  else if (event.key === " ") {
    pen.down = !pen.down;
    if (pen.down) addPoint([pen.x, pen.y], true);
  } else if (event.key in ARROWS) {
    const [dx, dy] = ARROWS[event.key],
      inside = (at) => Math.min(0.95, Math.max(0.05, at));
    pen.x = inside(pen.x + dx / 20);
    pen.y = inside(pen.y + dy / 20);
    if (pen.down) addPoint([pen.x, pen.y], false);
  } else return;
  pen.shown = true;
  event.preventDefault();
  update();
});
paper.addEventListener("blur", () => {
  pen.shown = false;
  update();
});

const taken = {}; // how often a test digit was taken, for each label
function takeDigit(label) {
  const all = [...labels.data.keys()].filter((i) => labels.data[i] === label);
  taken[label] = (taken[label] ?? -1) + 1;
  takeImage(all[taken[label] % all.length]);
}
function takeImage(index) {
  clear();
  image = Float32Array.from(images.data.subarray(784 * index, 784 * (index + 1)), (v) => v / 255);
  describe(`A test digit: a ${labels.data[index]}. Or draw your own.`, labels.data[index]);
}
for (let label = 0; label < 10; label++) {
  const button = element(
    "button",
    { type: "button", "aria-label": `test digit ${label}` },
    `${label}`,
  );
  button.addEventListener("click", () => takeDigit(label));
  $("digits").append(button);
}

for (const name of Object.keys(orders)) {
  const input = element("input", { type: "radio", name: "arrive", value: name });
  input.addEventListener("change", () => arrive(name));
  $("arrive").append(element("label", {}, input, element("span", {}, name)));
}
function arrive(name) {
  arrival = name;
  document.querySelector(`input[value="${name}"]`).checked = true;
  update();
}

// --- 2. Turn the knobs -----------------------------------------------------------------------

function addKnob(name, adapter) {
  const id = `knob-${knobs.length}`;
  const input = element("input", { type: "range", id, min: LOW, max: HIGH, step: 0.05 });
  const output = element("output", { for: id });
  const row = element("div", { class: "knob" }, element("label", { for: id }, name), input, output);
  const knob = { name, adapter, input, output, row };
  input.addEventListener("input", () => turn(knob, Number(input.value)));
  knobs.push(knob);
  $("knobs").append(row);
  turn(knob, 0);
  return knob;
}

function turn(knob, strength) {
  const { input, output, row } = knob;
  const text = strength ? signed(strength) : "off";
  turned = knob;
  knob.strength = input.value = strength;
  input.style.setProperty("--value", (strength - LOW) / (HIGH - LOW));
  input.setAttribute("aria-valuetext", text);
  output.textContent = text;
  row.classList.toggle("off", !strength);
  update();
}

/** Turn all knobs: to the given strengths by name, the others off. The last one stays "turned". */
function turnAll(strengths, last) {
  for (const knob of knobs) turn(knob, strengths[knob.name] ?? 0);
  turned = knobs.find(({ name }) => name === last) ?? turned;
}
$("off").addEventListener("click", () => turnAll({}, turned?.name));

/** Take an adapter's files: the weights and, unless the weights say it too or α is guessed, the settings. */
async function take(files) {
  try {
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
    const adapter = readAdapter(tensors, config, base);
    const own = knobs.filter(({ name }) => name.startsWith("yours")).length;
    const knob = addKnob(own ? `yours ${own + 1}` : "yours", adapter);
    turn(knob, 1);
    if (bare) askForAlpha(knob);
    tell(
      `“${knob.name}” is a knob now, at 1: rank ${adapter.rank}, α = ${adapter.alpha}, ` +
        `on ${Object.keys(adapter.layers).join(", ")}.` +
        (bare
          ? " PEFT’s file does not say its α. It is assumed to be the rank: put the right one" +
            " beside the knob, or drop adapter_config.json, too."
          : ""),
    );
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

// --- 3. How sure is it? ----------------------------------------------------------------------

const rows = Array.from({ length: 10 }, (_, digit) => {
  const [lora, plain] = ["lora", "base"].map((kind) => element("i", { class: kind }));
  const [mixed, before] = [element("td"), element("td")];
  const bars = element(
    "td",
    {},
    element("div", { class: "bars", "aria-hidden": "true" }, lora, plain),
  );
  const row = element("tr", {}, element("th", { scope: "row" }, `${digit}`), bars, mixed, before);
  $("bars").append(row);
  return {
    set(p, alone, top) {
      lora.style.transform = `scaleX(${p})`;
      plain.style.transform = `scaleX(${alone})`;
      mixed.textContent = image ? percent(p) : "";
      before.textContent = image ? percent(alone) : "";
      row.classList.toggle("top", top);
    },
  };
});

// --- The whole range of one knob -------------------------------------------------------------

const STEPS = Array.from({ length: 61 }, (_, i) => LOW + i / 20);
const BOX = { left: 46, right: 400, top: 10, bottom: 200 };
const toX = (strength) => BOX.left + ((strength - LOW) / (HIGH - LOW)) * (BOX.right - BOX.left);
const toY = (p) => BOX.bottom - p * (BOX.bottom - BOX.top);

/** The answers for x at all strengths of the knob turned last; a later call ends this one. */
let sweeps = 0;
async function sweep(x) {
  const mine = ++sweeps,
    knob = turned,
    curves = [];
  const others = knobs.filter((other) => other !== knob && other.strength);
  await new Promise((resume) => setTimeout(resume, 80)); // while a knob turns, only the answer
  for (const strength of x && knob ? STEPS : []) {
    if (mine !== sweeps) return;
    const mix = [...others, { ...knob, strength }].map((k) => [k.adapter, k.strength]);
    curves.push(softmax(forward(base, x, mix)));
    if (curves.length % 2 === 0) await new Promise((resume) => setTimeout(resume));
  }
  if (curves.length && mine === sweeps) drawCurve(curves, knob, others);
}

function drawCurve(curves, knob, others) {
  BOX.right = Math.max(280, $("curve").clientWidth) - 12;
  $("curve").setAttribute("viewBox", `0 0 ${BOX.right + 12} 246`);
  const at = (strength) => largest(curves[Math.round((strength - LOW) * 20)]);
  const now = at(knob.strength),
    first = at(0),
    nodes = [];
  const label = (text, x, y, more) => nodes.push(svg("text", { x, y, ...more }, `${text}`));
  const middle = { "text-anchor": "middle" };
  for (const p of [0, 0.5, 1]) {
    nodes.push(svg("line", { x1: BOX.left, x2: BOX.right, y1: toY(p), y2: toY(p) }));
    label(`${100 * p} %`, BOX.left - 6, toY(p) + 4, { "text-anchor": "end" });
  }
  for (const s of [-1, 0, 1, 2])
    label(String(s).replace("-", "−"), toX(s), BOX.bottom + 18, middle);
  const more = others.length ? ", the other knobs as they stand" : "";
  label(`strength of “${knob.name}”${more}`, (BOX.left + BOX.right) / 2, BOX.bottom + 38, middle);
  const importance = (digit) => 2 * (digit === now) + (digit === first);
  const digits = [...curves[0].keys()].sort((a, b) => importance(a) - importance(b));
  for (const digit of digits) {
    const p = curves.map((curve) => curve[digit]),
      top = Math.max(...p);
    const kind = { class: digit === now ? "now" : digit === first ? "first" : "other" };
    const points = p.map((value, i) => `${toX(STEPS[i]).toFixed(1)} ${toY(value).toFixed(1)}`);
    nodes.push(svg("path", { ...kind, d: `M${points.join("L")}` }));
    const highest = [...p.keys()].filter((i) => p[i] > top - 0.02); // the label stands amid these
    const x = toX(STEPS[highest[Math.floor(highest.length / 2)]]);
    if (top > 0.2) label(digit, x, toY(top) + (top > 0.9 ? 16 : -5), { ...kind, ...middle });
  }
  nodes.push(svg("line", { class: "here", y1: BOX.top, y2: BOX.bottom }));
  $("curve").replaceChildren(...nodes);
  moveLine();
  const said = curves.map(largest),
    changes = [...said.keys()].filter((i) => i && said[i] !== said[i - 1]);
  const list = changes.map((i) => `, from ${signed(STEPS[i])} on ${said[i]}`).join("");
  $("curve-says").textContent = changes.length
    ? `At −1 of “${knob.name}” the answer is ${said[0]}${list}.`
    : `The answer is ${said[0]} at each strength of “${knob.name}”.`;
}

/** Move the dashed line to where the knob stands. */
function moveLine() {
  const line = document.querySelector("#curve .here");
  for (const end of ["x1", "x2"]) line?.setAttribute(end, toX(turned?.strength ?? 0));
}
new ResizeObserver(update).observe($("curve"));

// --- Things to try, and the start ------------------------------------------------------------

for (const item of document.querySelectorAll("[data-example]")) {
  const example = examples[item.dataset.example];
  item.hidden = !example; // none was found for this network
  const button = element("button", { type: "button" }, "Set up");
  const text = element("span", {}, ...item.childNodes);
  item.replaceChildren(button, text);
  button.addEventListener("click", () => {
    takeImage(example.digit);
    arrive(example.arrival);
    turnAll(example.strengths, example.knob);
    tell(text.textContent); // beside the knobs: on a phone the list is out of sight
    turned.input.focus({ preventScroll: true });
    document.querySelector(".knobs").scrollIntoView();
  });
}
for (const item of document.querySelectorAll(".try li:not([data-example])"))
  item.replaceChildren(element("span", {}, ...item.childNodes));

for (const [name, config] of Object.entries(JSON.parse(file.metadata.adapters)))
  addKnob(name, readAdapter(group(file.tensors, name), config, base));
if (knobs.some(({ name }) => name === "rotated")) turnAll({}, "rotated");
arrive("upright");
takeDigit(2);
