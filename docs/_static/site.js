// A search that leads to words in a fold opens it; printing opens all.
function unfold(folds) {
  folds.forEach((fold) => (fold.open = true));
}
addEventListener("load", () => {
  const { pathname, searchParams } = new URL(document.referrer || location.href);
  const words = pathname.endsWith("search.html") && searchParams.get("q");
  const folds = [...document.querySelectorAll("article details")];
  if (words) unfold(folds.filter((fold) => fold.textContent.toLowerCase().includes(words.toLowerCase())));
});
addEventListener("beforeprint", () => unfold([...document.querySelectorAll("article details")]));
