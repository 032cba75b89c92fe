// The language playground: words coloured by what the adapters change, and what they write.
import { $, element, storedBytes } from "./dom.js";
import {
  dice,
  draw,
  forwardLlama,
  merged,
  newCache,
  readFactors,
  readLlama,
  tokenBits,
} from "./llama.js";
import { chance, group, readSafetensors, softmax } from "./network.js";
import { makeTokenizer } from "./tokenizer.js";

const MOST = 128; // tokens: so many does the model look back on
const LENGTH = 60; // of what it writes
const STARTS = {
  Genesis: "And God said unto Noah, Behold, I will bring a flood of waters upon the earth.",
  Emma: "Emma was very much pleased with the party, and thought Mr. Elton an agreeable man.",
  Stage: "ROSALIND. Nay, but who is it? Good sir, I prithee, tell me who is he?",
  Mixed: "In the morning Emma went unto her father, and thou shalt hear what he said.",
};
const MIXES = {
  "Bible at 1": [1, 0],
  "Shakespeare at 1": [0, 1],
  "half and half": [0.5, 0.5],
  "too much Bible": [1.5, 0],
  "Bible, backwards": [-1, 0],
};
const signed = (number) => `${number < 0 ? "−" : "+"}${Math.abs(number).toFixed(2)}`;
const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);

const { metadata, tensors } = readSafetensors(storedBytes());
const shape = JSON.parse(metadata.shape);
const base = readLlama(group(tensors, "base"), shape);
const tokenizer = makeTokenizer(JSON.parse(metadata.vocab), JSON.parse(metadata.merges));
const knobs = Object.entries(JSON.parse(metadata.adapters)).map(([name, config]) => {
  const adapter = readFactors(tensors, name, config);
  return { name, adapter, strength: 0 };
});

let adapted = base; // with the adapters as the knobs stand
let seed = 1;
let tokens = [];
let gains = []; // bits saved by the adapters, for each token but the first
let boxes = []; // [first, end] of the tokens that are shown as one: a letter may take several
let chosen = -1; // the box that is told of; none at first

// --- The words -------------------------------------------------------------------------------

let asked = false;
function update() {
  if (!asked) requestAnimationFrame(show);
  asked = true;
}

let known = { text: null }; // what the base says of the text at hand: it stays while knobs turn
function show() {
  asked = false;
  tellAge();
  showPressed("starts", $("text").value);
  showPressed(
    "mixes",
    knobs.map(({ strength }) => strength),
  );
  const text = $("text").value;
  if (text !== known.text) {
    const all = tokenizer.encode(text);
    let end = Math.min(all.length, MOST);
    while (end < all.length && tokenizer.isInside(all[end])) end--; // no half letter
    tokens = all.slice(0, end);
    $("most").hidden = end === all.length;
    const starts = [...tokens.keys()].filter((i) => !tokenizer.isInside(tokens[i]));
    boxes = starts.map((first, i) => [first, starts[i + 1] ?? end]);
    const logits = tokens.length ? forwardLlama(base, tokens) : [];
    known = {
      text,
      logits,
      bits: tokens.length ? tokenBits(logits, tokens, shape.vocabulary) : [],
    };
    chosen = Math.min(chosen, boxes.length - 1);
  }
  adapted = knobs.some(({ strength }) => strength)
    ? merged(
        base,
        knobs.map(({ adapter, strength }) => [adapter, strength]),
      )
    : base;
  if (!tokens.length) {
    gains = [];
    $("tokens").textContent = "Type something above.";
    $("sum").textContent = "";
    $("likeliest").replaceChildren();
    return;
  }
  const logits = adapted === base ? known.logits : forwardLlama(adapted, tokens);
  const bits = tokenBits(logits, tokens, shape.vocabulary);
  gains = known.bits.map((before, i) => before - bits[i]);
  showTokens();
  const saved = sum(gains);
  const cost = `The model alone needs ${sum(known.bits).toFixed(0)} bits for these words`;
  $("sum").textContent = !gains.length
    ? "The first token costs nothing: type more."
    : adapted === base
      ? `${cost}. Turn an adapter up.`
      : `${cost}; with the adapters it needs ${Math.abs(saved).toFixed(0)} ${saved < 0 ? "more" : "fewer"}.`;
  showLikeliest(logits);
}

function showTokens() {
  const spans = boxes.map(([first, end], i) => {
    const gain = sum(ofBox(i, gains));
    const look = Math.abs(gain) < 0.1 ? "" : gain > 0 ? "gain" : "loss harder";
    const span = element("span", { class: look }, tokenizer.decode(tokens.slice(first, end)));
    span.style.setProperty("--much", Math.min(1, Math.abs(gain) / 4).toFixed(2));
    span.addEventListener("click", () => choose(i));
    return span;
  });
  $("tokens").replaceChildren(...spans);
  choose(chosen);
}

/** What a box's tokens have of these numbers: nothing stands before the first token. */
function ofBox(i, numbers) {
  const [first, end] = boxes[i];
  return numbers.slice(Math.max(0, first - 1), end - 1);
}

/** Tell of one box in words and numbers: colour is not all. */
function choose(i) {
  if (i < 0) return;
  $("tokens").children[chosen]?.classList.remove("chosen");
  chosen = i;
  $("tokens").children[i]?.classList.add("chosen");
  const name = `“${tokenizer.decode(tokens.slice(...boxes[i])).replace(/\n/g, "↵")}”`;
  const bits = sum(ofBox(i, known.bits));
  const after = bits - sum(ofBox(i, gains));
  $("one").textContent = i
    ? `${name}: ${bits.toFixed(1)} bits alone, ${after.toFixed(1)} with the adapters.`
    : `${name} is the first: nothing stands before it.`;
}
$("tokens").addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step || !tokens.length) return;
  event.preventDefault();
  choose(Math.min(boxes.length - 1, Math.max(0, chosen + step)));
});

function showLikeliest(logits) {
  const best = (all) => {
    const p = softmax(all.subarray(all.length - shape.vocabulary));
    return [...p.keys()]
      .sort((a, b) => p[b] - p[a])
      .slice(0, 5)
      .map((token) => {
        const piece = tokenizer.decode([token]).replace(/\n/g, "↵").replace(/^ /, "␣");
        return [piece, chance(p[token])];
      });
  };
  const [alone, mixed] = [best(known.logits), best(logits)];
  const rows = alone.map((row, i) => [...row, ...mixed[i]].map((text) => element("td", {}, text)));
  $("likeliest").replaceChildren(...rows.map((cells) => element("tr", {}, ...cells)));
}

// --- What it writes --------------------------------------------------------------------------

let written = null; // the settings of what stands there

/** What the writing depends on. The dice are not told of: only a button throws others. */
function settings() {
  const turned = knobs.filter(({ strength }) => strength);
  const names = turned.map(({ name, strength }) => `${name} ${strength}`.replace("-", "−"));
  const at = `${names.join(", ") || "no adapter"}, temperature ${$("temperature").value}`;
  return { text: $("text").value, at };
}

/** Say so where the writing is that of another sentence or of other settings. */
function tellAge() {
  if (!written) return;
  const now = settings();
  const isStale = written.text !== now.text || written.at !== now.at;
  document.querySelector(".both").classList.toggle("stale", isStale);
  $("written-at").hidden = !isStale;
  $("written-at").textContent = `Written at ${written.at}; write again.`;
}

let writing = 0; // a later call ends this one
async function write() {
  const mine = ++writing;
  written = settings();
  tellAge();
  const temperature = Number($("temperature").value);
  const start = tokens.length ? tokens : tokenizer.encode("In the morning");
  const writers = [
    [base, "alone"],
    [adapted, "adapted"],
  ].map(([model, id]) => {
    const cache = newCache(model);
    const begin = start.slice(-MOST + LENGTH);
    return {
      model,
      id,
      cache,
      logits: forwardLlama(model, begin, cache),
      written: [],
      next: dice(seed),
    };
  });
  const prompt = element("b", {}, tokenizer.decode(start));
  for (let i = 0; i < LENGTH; i++) {
    for (const writer of writers) {
      const token = draw(writer.logits, shape.vocabulary, temperature, writer.next());
      writer.written.push(token);
      writer.logits = forwardLlama(writer.model, [token], writer.cache);
      $(writer.id).replaceChildren(prompt.cloneNode(true), tokenizer.decode(writer.written));
    }
    await new Promise((resume) => setTimeout(resume));
    if (mine !== writing) return;
  }
}
$("write").addEventListener("click", write);
$("again").addEventListener("click", () => {
  seed++;
  write();
});
function showTemperature() {
  const input = $("temperature");
  $("temperature-says").textContent = input.value;
  input.style.setProperty("--value", (input.value - 0.2) / 1.2);
  tellAge();
}
$("temperature").addEventListener("input", showTemperature);

// --- The knobs, and the start ----------------------------------------------------------------

for (const [i, knob] of knobs.entries()) {
  const id = `knob-${i}`;
  knob.input = element("input", { type: "range", id, min: -1, max: 1.5, step: 0.05 });
  knob.value = element("span", { class: "value", "aria-hidden": "true" });
  const label = element("label", { for: id }, knob.name);
  knob.input.addEventListener("input", () => turn(knob, Number(knob.input.value)));
  $("knobs").append(element("div", { class: "knob" }, label, knob.value, knob.input));
}
function turn(knob, strength) {
  const text = strength ? signed(strength) : "off";
  knob.strength = strength;
  knob.input.value = strength;
  knob.input.style.setProperty("--value", (strength + 1) / 2.5);
  knob.input.setAttribute("aria-valuetext", text);
  knob.value.textContent = text;
  update();
}

/** Buttons that set something. */
function offer(id, choices, set) {
  for (const [name, value] of Object.entries(choices)) {
    const button = element("button", { type: "button", value: `${value}` }, name);
    button.addEventListener("click", () => set(value));
    $(id).append(button);
  }
}
/** One is pressed while what it sets stands. */
function showPressed(id, value) {
  for (const button of $(id).children)
    button.setAttribute("aria-pressed", button.value === `${value}`);
}
offer("starts", STARTS, (text) => {
  $("text").value = text;
  update();
});
offer("mixes", MIXES, (strengths) => {
  knobs.forEach((knob, i) => {
    turn(knob, strengths[i] ?? 0);
  });
});
$("text").addEventListener("input", update);

const size = Object.values(knobs[0].adapter.factors).reduce(
  (sum, { data }) => sum + data.length,
  0,
);
$("numbers").textContent = `${size.toLocaleString("en")} numbers, the model 623,488`;
$("text").value = STARTS.Mixed;
showTemperature();
turn(knobs[1] ?? knobs[0], 0);
turn(knobs[0], 1);
show();
write();
