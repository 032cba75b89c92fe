// What the three pages share: their elements, and the numbers stored in them.

export const $ = (id) => document.getElementById(id);
function fill(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}
export const element = (name, attributes = {}, ...children) =>
  fill(document.createElement(name), attributes, children);
export const svg = (name, attributes, text = "") =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, [text]);

/** The bytes in the page: a file in the safetensors format, in one piece or in many. */
export function storedBytes() {
  const pieces = [...document.querySelectorAll(".stored")].map((piece) => piece.textContent);
  return Uint8Array.from(atob(pieces.join("")), (letter) => letter.charCodeAt(0)).buffer;
}
