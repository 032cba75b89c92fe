// The drawing area: strokes by mouse, finger, pen or keyboard.

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

/**
 * Make a canvas a drawing area. It calls `drawn` after each change of its strokes, `cleared` when
 * the reader wants an empty paper, and `digit` when a key asks for a test digit.
 */
export function drawingArea(canvas, { drawn, cleared, digit }) {
  const ink = canvas.getContext("2d");
  const pen = { x: 0.5, y: 0.3, down: false, shown: false }; // moved by the keyboard
  const held = new Set(); // arrow keys: two at once slant the line
  let strokes = []; // lists of points [x, y], from 0 to 1

  function add(point, begins) {
    if (!strokes.length || begins) strokes.push([]);
    strokes.at(-1).push(point);
    drawn();
  }

  function clear() {
    strokes = [];
    pen.down = false;
  }

  /** Paint the strokes or, if there are none, an image. */
  function paint(image) {
    const size = canvas.width;
    ink.clearRect(0, 0, size, size);
    if (image && !strokes.length) ink.drawImage(asCanvas(image), 0, 0, size, size);
    ink.strokeStyle = "#fff";
    ink.lineWidth = size / 12;
    ink.lineCap = "round";
    ink.lineJoin = "round";
    for (const [first, ...rest] of strokes) {
      ink.beginPath();
      ink.moveTo(first[0] * size, first[1] * size);
      for (const [x, y] of rest.length ? rest : [first]) ink.lineTo(x * size, y * size);
      ink.stroke();
    }
    if (!pen.shown) return;
    ink.beginPath();
    ink.arc(pen.x * size, pen.y * size, size / 30, 0, 7);
    ink.fillStyle = "#ee6fae";
    ink.strokeStyle = "#ee6fae";
    ink.lineWidth = 5;
    if (pen.down) ink.fill();
    else ink.stroke();
  }

  const place = (event) => {
    const box = canvas.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  };
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    canvas.setPointerCapture(event.pointerId);
    pen.shown = false;
    pen.down = false;
    add(place(event), true);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!canvas.hasPointerCapture(event.pointerId) || !strokes.length) return;
    const events = event.getCoalescedEvents?.() ?? [];
    for (const one of events.length ? events : [event]) add(place(one), false);
  });

  canvas.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (/^[0-9]$/.test(event.key)) digit(Number(event.key));
    else if (event.key === "Delete" || event.key === "Backspace") cleared();
    else if (event.key === " ") {
      pen.down = !pen.down;
      if (pen.down) add([pen.x, pen.y], true);
    } else if (event.key in ARROWS) {
      held.add(event.key);
      const inside = (at) => Math.min(0.95, Math.max(0.05, at));
      for (const key of held) {
        pen.x = inside(pen.x + ARROWS[key][0] / 20);
        pen.y = inside(pen.y + ARROWS[key][1] / 20);
      }
      if (pen.down) add([pen.x, pen.y], false);
    } else return;
    pen.shown = true;
    event.preventDefault();
    drawn();
  });
  canvas.addEventListener("keyup", (event) => held.delete(event.key));
  canvas.addEventListener("blur", () => {
    held.clear();
    pen.shown = false;
    drawn();
  });
  return { clear, paint, strokes: () => strokes };
}

/** Pixels from 0 to 1, 28 × 28, as a canvas of its own. */
export function asCanvas(pixels) {
  const canvas = document.createElement("canvas");
  canvas.width = 28;
  canvas.height = 28;
  const data = new ImageData(28, 28);
  pixels.forEach((value, i) => {
    data.data.set([255, 255, 255, 255 * value], 4 * i);
  });
  canvas.getContext("2d").putImageData(data, 0, 0);
  return canvas;
}
