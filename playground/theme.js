// Light or dark: as the site around the page, or as the system.

function setTheme() {
  let theme = null;
  try {
    theme = localStorage.getItem("theme");
  } catch {
    /* a frame in a notebook has no storage */
  }
  const dark = theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = dark ? "dark" : "light";
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", setTheme);
setTheme();
