"""Click through the site, as built just now and served from this machine."""

import json
import re
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

import pytest

import pages
from conftest import open_page, violations
from conventions import COLAB, REPOSITORY

NOTEBOOKS = sorted(path.stem for path in pages.NOTEBOOKS.glob("*.ipynb"))
PAGES = ["index", "search", *NOTEBOOKS]
ONE, *REST = NOTEBOOKS  # axe-core takes many seconds for a page of cells
SOME_SLOW = ["index", "search", ONE, *(pytest.param(n, marks=pytest.mark.slow) for n in REST)]


@pytest.fixture
def page(browser, address):
    with open_page(browser, address) as page:
        yield page


def cells(name):
    text = (pages.NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8")
    return json.loads(text)["cells"]


def has_tag(cell, tag):
    return tag in cell["metadata"].get("tags", [])


def alt_texts(name):
    """The descriptions of a notebook's figures, in order."""
    outputs = [output for cell in cells(name) for output in cell.get("outputs", [])]
    figures = [output for output in outputs if "image/png" in output.get("data", {})]
    return [output["metadata"]["image/png"]["alt"] for output in figures]


def go(page, address, name):
    page.goto(f"{address}{name}.html", wait_until="load")
    if name in NOTEBOOKS:
        page.wait_for_function("window.MathJax?.startup?.promise")
        page.evaluate("MathJax.startup.promise.then(() => true)")


@pytest.mark.parametrize("name", PAGES)
def test_page_is_whole(page, address, name):
    go(page, address, name)
    assert page.locator("main h1:visible").count() == 1 and page.title()
    for image in page.locator("img").all():
        image.evaluate("image => image.setAttribute('loading', 'eager')")
        assert image.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0
        assert image.get_attribute("alt")
    if name in NOTEBOOKS:
        shown = page.locator(".cell_output img").evaluate_all("all => all.map(i => i.alt)")
        assert shown == alt_texts(name)
        math = page.locator("span.math, div.math")
        assert page.locator(".math mjx-container").count() >= math.count()
        assert page.locator("mjx-merror, [data-mjx-error]").count() == 0
        title = re.match("# (.*)", "".join(cells(name)[0]["source"]))[1]
        assert page.inner_text("main h1").rstrip("#") == title
        colab = page.locator("a[href*='colab.research.google.com']").first.get_attribute("href")
        assert colab == f"{COLAB}/github/{REPOSITORY}/blob/main/notebooks/{name}.ipynb"


@pytest.mark.parametrize("name", [*PAGES, "playground", "rank", "memory"])
def test_links_lead_somewhere(site, name):
    """Links within the site, their anchors, and files that a page loads."""
    text = (site / f"{name}.html").read_text(encoding="utf-8")
    for target in set(re.findall(r'\b(?:href|src)="([^"]+)"', text)):
        if re.match(r"https://|mailto:|data:", target):
            continue
        path, anchor = urldefrag(urljoin(f"{name}.html", unquote(target)))
        file = site / (path.partition("?")[0] or f"{name}.html")
        assert file.is_file(), target
        if anchor and file.suffix == ".html":
            assert f'id="{anchor}"' in file.read_text(encoding="utf-8"), target


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_folds(page, address, name):
    """What answers a "Predict." is folded, so are solutions; a click opens each of them."""
    go(page, address, name)
    text = "\n".join("".join(c["source"]) for c in cells(name) if c["cell_type"] == "markdown")
    assert page.locator("details.answer").count() >= text.count("**Predict") > 0
    assert page.locator(".tag_answer:visible").count() == 0
    solutions = page.locator(".tag_solution > details")
    assert solutions.count() == sum(has_tag(cell, "solution") for cell in cells(name)) > 0
    folds = page.locator("article details")
    assert folds.evaluate_all("all => all.every(fold => !fold.open)")
    for fold in folds.all():
        inside = fold.locator(":scope > :not(summary)").first
        assert not inside.is_visible()
        fold.locator(":scope > summary").click()
        assert inside.is_visible()
    assert page.locator(".tag_answer:visible").count() == page.locator(".tag_answer").count()


def test_a_fold_opens_by_keyboard(page, address):
    go(page, address, NOTEBOOKS[0])
    fold = page.locator("details.answer").first
    fold.locator(":scope > summary").focus()
    page.keyboard.press("Enter")
    assert fold.get_attribute("open") is not None


def test_previous_and_next_visit_all(page, address):
    page.goto(f"{address}index.html")
    for name in NOTEBOOKS:
        page.locator("a.right-next").click()
        page.wait_for_url(f"**/{name}.html")
    assert page.locator("a.right-next").count() == 0
    for name in [*NOTEBOOKS[-2::-1], "index"]:
        page.locator("a.left-prev").click()
        page.wait_for_url(f"**/{name}.html")


def test_search_finds_and_opens_the_fold(page, address):
    page.goto(f"{address}index.html")
    page.locator(".search-button__button:visible").first.click()
    page.locator("input[type=search]:visible").fill("rank-stabilised")
    page.keyboard.press("Enter")
    result = page.locator("#search-results a", has_text="learning rate").first
    result.click()
    page.wait_for_url("**/05_*.html*")
    page.get_by_text("rank-stabilised").locator("visible=true").first.wait_for()


def test_first_page_fits_one_screen(page, address):
    """On a desk: what it is, two ways to begin and the picture. On a phone: the picture begins."""
    for width, height, part in ((1280, 900, 1), (390, 844, 0.5)):
        page.set_viewport_size({"width": width, "height": height})
        page.goto(f"{address}index.html")
        box = page.locator("article img").bounding_box()
        assert box["y"] + part * box["height"] <= height
    for name in NOTEBOOKS:
        assert page.locator(f"article li a[href^='{name}']").is_visible()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", SOME_SLOW)
def test_fits_a_phone_and_is_accessible(page, address, name, theme):
    page.emulate_media(color_scheme=theme)
    page.set_viewport_size({"width": 390, "height": 844})
    go(page, address, name)
    assert page.get_attribute("html", "data-theme") == theme
    page.evaluate("document.querySelectorAll('article details').forEach((d) => (d.open = true))")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert violations(page) == []


def test_the_playground_is_a_page_and_stands_in_notebook_4(page, address):
    page.goto(f"{address}04_adapters.html")
    page.locator("iframe").scroll_into_view_if_needed()
    page.frame_locator("iframe").locator("#says-lora", has_text="2").wait_for()
    page.get_by_role("link", name="Playground").first.click()
    page.locator("#says-lora", has_text="2").wait_for()
    page.get_by_role("link", name="LoRA from the ground up").click()
    page.wait_for_url("**/index.html")


def test_the_pages_to_touch_follow_the_site_into_the_dark(page, address):
    page.goto(f"{address}index.html")
    switch, dark = ".theme-switch-button:visible", ".theme-change-button[data-mode=dark]:visible"
    for _ in range(3):  # the theme's button opens a menu; up to 0.19 it went through three states
        if page.get_attribute("html", "data-theme") != "dark":
            page.locator(switch).click()
            if page.locator(dark).count():
                page.locator(dark).click()
    links = {"playground": "Playground", "rank": "A photograph", "memory": "What LoRA saves"}
    for name, link in links.items():
        page.goto(f"{address}index.html")
        page.get_by_role("link", name=link).first.click()
        page.wait_for_url(f"**/{name}.html")
        assert page.get_attribute("html", "data-theme") == "dark"
        page.get_by_role("link", name="LoRA from the ground up").wait_for()


def test_nothing_unneeded_is_published(site):
    """The copies with the site's marks stay out, and the whole is small enough for a phone."""
    assert not list(site.rglob("*.ipynb"))
    for path in site.glob("*.html"):
        limit = {"playground": 5e6, "rank": 1.5e6}.get(path.stem, 1e6)
        assert Path(path).stat().st_size < limit, path
