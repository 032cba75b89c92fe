// A photograph as the sum of the first terms of its SVD. tools/pages.py computes the terms.
import { $, element, storedBytes, svg } from "./dom.js";
import { readSafetensors } from "./network.js";

const stored = readSafetensors(storedBytes()).tensors;
const {
  photo: {
    shape: [ROWS, COLUMNS],
    data: photo,
  },
  fine,
  coarse,
  scales,
} = stored;
const FULL = Math.min(ROWS, COLUMNS),
  sigma = stored.sigma.data,
  LONG = ROWS + COLUMNS;
const squares = (numbers) => numbers.reduce((sum, value) => sum + value * value, 0);
const total = squares(sigma),
  ofPhoto = squares(photo);

/** Term k of the sum: a column and a row, each with its own scale. */
function term(k) {
  const few = fine.shape[0],
    [numbers, at] = k < few ? [fine.data, k] : [coarse.data, k - few];
  const both = numbers.subarray(at * LONG, (at + 1) * LONG);
  return {
    column: both.subarray(0, ROWS),
    row: both.subarray(ROWS),
    scale: scales.data[2 * k] * scales.data[2 * k + 1],
  };
}

/** The sum of the first terms. It goes from the last rank to the next one term by term. */
const sum = new Float64Array(ROWS * COLUMNS);
let rank = 0;
function sumTo(wanted) {
  for (; rank < wanted; rank++) add(rank, 1);
  while (rank > wanted) add(--rank, -1);
  return sum;
}
function add(k, sign) {
  const { column, row, scale } = term(k);
  for (let i = 0, at = 0; i < ROWS; i++) {
    const factor = sign * scale * column[i];
    for (let j = 0; j < COLUMNS; j++, at++) sum[at] += factor * row[j];
  }
}

/** ‖W − W_r‖ / ‖W‖ of the picture, and as Eckart and Young predict it from the singular values. */
function errors(r) {
  let apart = 0;
  for (let at = 0; at < sum.length; at++) apart += (sum[at] - photo[at]) ** 2;
  return [Math.sqrt(apart / ofPhoto), Math.sqrt(squares(sigma.subarray(r)) / total)];
}

// --- The page --------------------------------------------------------------------------------

// Each rank up to 32, then about three per cent more at each step.
const RANKS = [1];
while (RANKS.at(-1) < FULL)
  RANKS.push(Math.min(FULL, Math.max(RANKS.at(-1) + 1, Math.round(RANKS.at(-1) * 1.03))));
const TRY = [1, 5, 20, 50, FULL];
for (const wanted of TRY) if (!RANKS.includes(wanted)) RANKS.push(wanted);
RANKS.sort((a, b) => a - b);

const whole = (number) => number.toLocaleString("en");
const percent = (part) => `${(100 * part).toFixed(1)} %`;
const pen = $("picture").getContext("2d"),
  pixels = new ImageData(COLUMNS, ROWS);
pixels.data.fill(255);

function show() {
  const r = RANKS[$("rank").value],
    numbers = r * LONG,
    size = ROWS * COLUMNS;
  sumTo(r).forEach((grey, at) => pixels.data.fill(grey, 4 * at, 4 * at + 3));
  pen.putImageData(pixels, 0, 0);
  $("shown").textContent = r;
  $("rank").setAttribute("aria-valuetext", `rank ${r}`);
  $("rank").style.setProperty("--value", $("rank").value / (RANKS.length - 1));
  $("picture").setAttribute("aria-label", `The photograph at rank ${r}`);
  const [measured, predicted] = errors(r);
  const rows = [
    ["numbers stored", whole(numbers), whole(size)],
    ["share", percent(numbers / size), "100.0 %"],
    ["error of the picture", percent(measured), "0.0 %"],
    ["Eckart–Young", percent(predicted), "0.0 %"],
  ];
  $("table").replaceChildren(
    ...rows.map(([name, ...cells]) =>
      element(
        "tr",
        {},
        element("th", { scope: "row" }, name),
        ...cells.map((cell) => element("td", {}, cell)),
      ),
    ),
  );
  const pays =
    numbers < size
      ? `${(size / numbers).toFixed(1)} times fewer than the photograph has`
      : "more than the photograph has: beyond rank 276 factors do not pay";
  const many = r === 1 ? "" : "s";
  $("says").textContent =
    `${r} column${many} of ${ROWS} and ${r} row${many} of ${COLUMNS}: r(m + n) = ${whole(numbers)} ` +
    `numbers, ${pays}. They keep ${percent(1 - predicted ** 2)} of the sum of squares.`;
  drawCurve(r, measured);
}

function drawCurve(r, measured) {
  const right = Math.max(260, $("curve").clientWidth) - 12,
    left = 46,
    top = 10,
    bottom = 170;
  $("curve").setAttribute("viewBox", `0 0 ${right + 12} 216`);
  const x = (k) => left + ((right - left) * Math.log(k)) / Math.log(FULL),
    most = 0.5;
  const y = (error) => bottom - ((bottom - top) * error) / most,
    nodes = [];
  const node = (...parts) => nodes.push(svg(...parts));
  for (const error of [0, 0.25, 0.5]) {
    node("line", { x1: left, x2: right, y1: y(error), y2: y(error) });
    node("text", { x: left - 6, y: y(error) + 4, "text-anchor": "end" }, `${100 * error} %`);
  }
  for (const k of [1, 10, 100, FULL])
    node("text", { x: x(k), y: bottom + 18, "text-anchor": "middle" }, `${k}`);
  node("text", { x: (left + right) / 2, y: bottom + 38, "text-anchor": "middle" }, "rank");
  node("text", { x: right, y: top + 16, "text-anchor": "end" }, "dashed: Eckart–Young");
  node("path", {
    d: `M${curve.map((error, k) => `${x(k + 1).toFixed(1)} ${y(error).toFixed(1)}`).join("L")}`,
  });
  node("circle", { cx: x(r), cy: y(measured), r: 6 });
  $("curve").replaceChildren(...nodes);
}
let rest = total;
const curve = Array.from(sigma, (value) => {
  rest -= value * value;
  return Math.sqrt(Math.max(0, rest) / total);
});

for (const wanted of TRY) {
  const says = wanted === FULL ? `${FULL}, the full rank` : wanted;
  const button = element("button", { type: "button", "aria-label": `rank ${says}` }, says);
  button.addEventListener("click", () => {
    $("rank").value = RANKS.indexOf(wanted);
    show();
  });
  $("ranks").append(button);
}
$("rank").max = RANKS.length - 1;
$("rank").value = 0;
let asked = false; // one picture a frame
$("rank").addEventListener("input", () => {
  if (!asked)
    requestAnimationFrame(() => {
      asked = false;
      show();
    });
  asked = true;
});
new ResizeObserver(() => drawCurve(rank, errors(rank)[0])).observe($("curve"));
show();
