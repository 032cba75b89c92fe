// The curve: the ten probabilities over the whole range of one knob.
import { svg } from "./dom.js";
import { largest } from "./network.js";

export const LOW = -1;
export const HIGH = 2;
export const STEPS = Array.from({ length: 61 }, (_, i) => LOW + i / 20);
const BOX = { left: 48, right: 400, top: 10, bottom: 200 };
const toX = (strength) => BOX.left + ((strength - LOW) / (HIGH - LOW)) * (BOX.right - BOX.left);
const toY = (p) => BOX.bottom - p * (BOX.bottom - BOX.top);
export const signed = (number) => number.toFixed(2).replace("-", "−");

/**
 * Draw what is known of the curves: a list of ten probabilities, or null, for each of STEPS.
 * Return a sentence that says what they show.
 */
export function drawCurve(picture, curves, name, strength, hasOthers) {
  BOX.right = Math.max(280, picture.clientWidth) - 12;
  picture.setAttribute("viewBox", `0 0 ${BOX.right + 12} 246`);
  const known = [...STEPS.keys()].filter((i) => curves[i]);
  const nearest = (wanted) =>
    known.reduce((a, b) => (Math.abs(STEPS[b] - wanted) < Math.abs(STEPS[a] - wanted) ? b : a));
  const now = largest(curves[nearest(strength)]);
  const first = largest(curves[nearest(0)]);
  const nodes = axes(name);
  const importance = (digit) => 2 * (digit === now) + (digit === first);
  const digits = Array.from({ length: 10 }, (_, digit) => digit);
  for (const digit of digits.sort((a, b) => importance(a) - importance(b))) {
    const p = known.map((i) => curves[i][digit]);
    const top = Math.max(...p);
    const kind = { class: digit === now ? "now" : digit === first ? "first" : "other" };
    const points = p.map(
      (value, i) => `${toX(STEPS[known[i]]).toFixed(1)} ${toY(value).toFixed(1)}`,
    );
    nodes.push(svg("path", { ...kind, d: `M${points.join("L")}` }));
    const highest = known.filter((_, i) => p[i] > top - 0.02); // the label stands amid these
    const x = toX(STEPS[highest[Math.floor(highest.length / 2)]]);
    const y = toY(top) + (top > 0.9 ? 16 : -5);
    if (top > 0.2) nodes.push(svg("text", { x, y, ...kind, "text-anchor": "middle" }, `${digit}`));
  }
  nodes.push(svg("line", { class: "here", y1: BOX.top, y2: BOX.bottom }));
  picture.replaceChildren(...nodes);
  moveLine(picture, strength);
  const said = known.map((i) => largest(curves[i]));
  const changes = [...known.keys()].filter((i) => i && said[i] !== said[i - 1]);
  const list = changes.map((i) => `, from ${signed(STEPS[known[i]])} on ${said[i]}`).join("");
  const others = hasOthers ? " The other knobs stay as they are." : "";
  return changes.length
    ? `At −1 of “${name}” the answer is ${said[0]}${list}.${others}`
    : `The answer is ${said[0]} at each strength of “${name}”.${others}`;
}

function axes(name) {
  const nodes = [];
  const label = (text, x, y, anchor) =>
    nodes.push(svg("text", { x, y, "text-anchor": anchor }, `${text}`));
  for (const p of [0, 0.5, 1]) {
    nodes.push(svg("line", { x1: BOX.left, x2: BOX.right, y1: toY(p), y2: toY(p) }));
    label(`${100 * p} %`, BOX.left - 6, toY(p) + 4, "end");
  }
  for (const s of [-1, 0, 1, 2]) label(`${s}`.replace("-", "−"), toX(s), BOX.bottom + 18, "middle");
  label(`strength of “${name}”`, (BOX.left + BOX.right) / 2, BOX.bottom + 38, "middle");
  return nodes;
}

/** Move the dashed line to where the knob stands. */
export function moveLine(picture, strength) {
  const line = picture.querySelector(".here");
  for (const end of ["x1", "x2"]) line?.setAttribute(end, toX(strength));
}
