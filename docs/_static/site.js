// Folds that open when they are needed, and a search that leads to the words that were sought.
const searching = location.pathname.endsWith("search.html");
const sought = searching ? "" : take("sphinx_highlight_terms"); // before Sphinx takes it away

/** What was stored under a name, once. */
function take(name) {
  const text = localStorage.getItem(name) ?? "";
  localStorage.removeItem(name);
  return text;
}

const folds = () => [...document.querySelectorAll("article details")];
function unfold(some, open = true) {
  for (const fold of some) fold.open = open;
}

/** How the words begin that were sought. */
function stemsOf(words) {
  const stemmer = new Stemmer();
  const beginnings = words.split(/[^\p{L}\p{N}]+/u).filter(Boolean);
  return beginnings.map((word) => stemmer.stemWord(word)).filter((stem) => stem.length > 1);
}
const beginsAs = (stems) =>
  new RegExp(`(?<![\\p{L}\\p{N}])(?:${stems.join("|")})[\\p{L}\\p{N}]*`, "giu");

/** Before what a search finds: the pages to touch whose description has all these words. */
async function offerTools(words) {
  const stems = stemsOf(words);
  if (!stems.length) return;
  const html = await (await fetch("play.html")).text();
  const page = new DOMParser().parseFromString(html, "text/html");
  const isSought = (item) => stems.every((stem) => beginsAs([stem]).test(item.textContent));
  const list = document.createElement("ul");
  list.className = "tools";
  list.append(...[...page.querySelectorAll("article li")].filter(isSought));
  document.getElementById("search-results").before(list);
}

/** Mark each word of the article that begins as one of these does; return the marks. */
function mark(words) {
  const stems = stemsOf(words);
  if (!stems.length) return [];
  const wanted = beginsAs(stems);
  const walker = document.createTreeWalker(document.querySelector("article"), NodeFilter.SHOW_TEXT);
  const texts = [];
  while (walker.nextNode()) texts.push(walker.currentNode);
  for (const text of texts) {
    if (text.parentElement.closest("mjx-container, .math, script, style, summary")) continue;
    const places = [...text.data.matchAll(wanted)].reverse(); // from the end: places stay right
    for (const place of places) {
      const range = document.createRange();
      range.setStart(text, place.index);
      range.setEnd(text, place.index + place[0].length);
      range.surroundContents(document.createElement("mark"));
    }
  }
  return [...document.querySelectorAll("article mark")];
}

/** A button that opens all folds of the page, and shuts them again. */
function offerToUnfold() {
  const title = document.querySelector("article h1");
  if (!title || folds().length < 2) return;
  const button = document.createElement("button");
  const isOpen = () => folds().every((fold) => fold.open);
  const tell = () => {
    button.textContent = isOpen() ? "Shut all folds" : "Open all folds";
  };
  button.type = "button";
  button.className = "open-folds";
  button.addEventListener("click", () => {
    unfold(folds(), !isOpen());
    tell();
  });
  tell();
  title.after(button);
}

/** A figure leads to itself at its full size: on a phone its lettering is small. */
function linkFigures() {
  for (const image of document.querySelectorAll("article img")) {
    if (image.closest("a")) continue;
    const link = document.createElement("a");
    link.href = image.src;
    image.replaceWith(link);
    link.append(image);
  }
}

addEventListener("DOMContentLoaded", () => {
  if (searching) {
    offerTools(new URLSearchParams(location.search).get("q") ?? "");
    // Excerpts of the article alone: the theme's pages begin with their table of contents.
    Search.htmlToText = (html) => {
      const page = new DOMParser().parseFromString(html, "text/html");
      return page.querySelector("article")?.textContent ?? "";
    };
    return;
  }
  linkFigures();
  offerToUnfold();
  const marks = sought ? mark(sought) : [];
  unfold(folds().filter((fold) => fold.querySelector("mark")));
  if (marks.length && !location.hash)
    addEventListener("load", () => setTimeout(() => marks[0].scrollIntoView({ block: "center" })));
});
addEventListener("beforeprint", () => unfold(folds()));
// The theme scrolls the list of pages to the page at hand: only where it is out of sight.
addEventListener("load", () => {
  const list = document.getElementById("pst-primary-sidebar");
  const here = list?.querySelector(".current.active > a");
  requestAnimationFrame(() => {
    if (list && (here?.offsetTop ?? 0) < list.clientHeight) list.scrollTop = 0;
  });
});
