"""Click through the site, as built just now and served from this machine."""

import base64
import json
import re
import shutil
from urllib.parse import unquote, urldefrag, urljoin

import nbformat
import pytest
from conf import REPOSITORY, SITE
from playwright.sync_api import expect

import pages
from conftest import open_page, serve, violations
from conventions import FIGURE, Notebook, figure_of

FILES = sorted(pages.NOTEBOOKS.glob("*.ipynb")) + sorted(pages.NOTEBOOKS.glob("deeper/*.ipynb"))
NOTEBOOKS = {path.relative_to(pages.NOTEBOOKS).with_suffix("").as_posix(): path for path in FILES}
MAIN = [name for name in NOTEBOOKS if "/" not in name]
DEEPER = [pytest.param(name, marks=pytest.mark.slow) for name in NOTEBOOKS if "/" in name]
PAGES = ["index", "search", "play", "claims", *MAIN, *DEEPER]
TOOLS = ["language", "playground", "rank", "memory", "404"]
WIDTHS = [("index", 1280), ("claims", 1280), ("index", 390), ("claims", 390), (MAIN[0], 390)]
WIDTHS += [pytest.param(name, 390, marks=pytest.mark.slow) for name in MAIN[1:]]
WIDTHS += [pytest.param("deeper/07_inside_a_transformer", 390, marks=pytest.mark.slow)]


@pytest.fixture
def page(browser, address):
    with open_page(browser, address) as page:
        yield page


def cells(name):
    return json.loads(NOTEBOOKS[name].read_text(encoding="utf-8"))["cells"]


def go(page, address, name):
    page.goto(f"{address}{name}.html", wait_until="load")
    if page.locator(".math").count():
        page.wait_for_function("window.MathJax?.startup?.promise")
        page.evaluate("MathJax.startup.promise.then(() => true)")


def open_folds(page):
    page.evaluate("document.querySelectorAll('article details').forEach((d) => (d.open = true))")


# What every page has


@pytest.mark.parametrize("name", PAGES)
def test_page_is_whole(page, address, name):
    go(page, address, name)
    assert page.locator("main h1:visible").count() == 1 and page.title()
    assert page.locator(".cell_output p", has_text=re.compile(r"^\|")).count() == 0  # a raw table
    for image in page.locator("img").all():
        image.evaluate("image => image.setAttribute('loading', 'eager')")
        assert image.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0
        assert image.get_attribute("alt")
    if name in NOTEBOOKS:
        outputs = [output for cell in cells(name) for output in cell.get("outputs", [])]
        figures = [output for output in outputs if "image/png" in output.get("data", {})]
        shown = page.locator(".cell_output img").evaluate_all("all => all.map(i => i.alt)")
        assert shown == [figure["metadata"]["image/png"]["alt"] for figure in figures]
        math = page.locator("span.math, div.math")
        assert page.locator(".math mjx-container").count() >= math.count()
        assert page.locator("mjx-merror, [data-mjx-error]").count() == 0
        title = re.match("# (.*)", "".join(cells(name)[0]["source"]))[1]
        assert page.inner_text("main h1").rstrip("#") == title
        colab = page.locator("a[href*='colab.research.google.com']").first.get_attribute("href")
        repository = REPOSITORY.removeprefix("https://github.com")
        assert colab.endswith(f"com/github{repository}/blob/main/notebooks/{name}.ipynb")


@pytest.mark.parametrize("name", [*PAGES, *TOOLS])
def test_links_lead_somewhere_and_the_page_can_be_shared(site, name):
    """Links within the site, their anchors, files that a page loads, and its preview."""
    text = (site / f"{name}.html").read_text(encoding="utf-8")
    for target in set(re.findall(r'\b(?:href|src)="([^"]+)"', text)):
        if re.match(r"https://|mailto:|data:", target):
            continue
        target = target.replace(f"/{SITE.split('/', 3)[3]}/", "/")  # where the site is published
        path, anchor = urldefrag(urljoin(f"/{name}.html", unquote(target)))
        file = site / (path.partition("?")[0].lstrip("/") or f"{name}.html")
        assert file.is_file(), target
        if anchor and file.suffix == ".html":
            assert f'id="{anchor}"' in file.read_text(encoding="utf-8"), target
    if name != "search":
        said = dict(re.findall(r'<meta (?:name|property)="(\S+)" content="([^"]+)">', text))
        assert 20 < len(said["description"]) < 400 and said["og:title"]
        assert said["og:url"] == f"{SITE}/{name}.html"
        assert (site / said["og:image"].removeprefix(f"{SITE}/")).is_file()


@pytest.mark.parametrize("name", ["index", *MAIN])
def test_nothing_is_cut_off(page, address, name):
    """Code wraps at each width. Outputs may scroll on the screen, never in print."""
    wide = "all => all.filter((pre) => pre.scrollWidth > pre.clientWidth + 1).length"
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 800})
        go(page, address, name)
        open_folds(page)
        assert page.locator(".cell_input pre").evaluate_all(wide) == 0
    page.set_viewport_size({"width": 700, "height": 1000})  # A4
    page.emulate_media(media="print")
    assert page.locator(".bd-article pre").evaluate_all(wide) == 0
    assert page.locator(".copybtn:visible, summary:visible, .open-folds:visible").count() == 0


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name, width", WIDTHS)
def test_fits_a_phone_and_is_accessible(page, address, name, width, theme):
    page.emulate_media(color_scheme=theme)
    page.set_viewport_size({"width": width, "height": 844})
    go(page, address, name)
    assert page.get_attribute("html", "data-theme") == theme
    open_folds(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert violations(page) == []


def test_each_claim_shows_what_a_notebook_stored(page, address, site):
    """A table of verdicts that leads to each claim; its figure, and the place where it was made."""
    text = (pages.DOCS / "claims.md").read_text(encoding="utf-8")
    claims = re.findall(r"^## (.*)\n\n\*\*(.*?)\*\*", text, flags=re.MULTILINE)
    go(page, address, "claims")
    rows = page.locator("article table tbody tr").evaluate_all(
        "all => all.map((row) => [...row.cells].map((c) => c.innerText.replace(/[“”]/g, '\"')))"
    )
    assert rows == [[*claim] for claim in claims] and len(rows) >= 12
    stored = [figure_of(Notebook(NOTEBOOKS[n]), cell) for n, cell in FIGURE.findall(text)]
    figures = page.locator("article section section img")
    shown = figures.evaluate_all("all => all.map((i) => i.alt)")
    assert shown == [figure["metadata"]["image/png"]["alt"] for figure in stored]
    # On a phone its lettering is small: a tap opens it at its full size.
    assert figures.evaluate_all("all => all.every((i) => i.closest('a')?.href === i.src)")
    images = [path.read_bytes() for path in site.glob("_images/*-*.png")]
    for figure in stored:
        assert base64.b64decode("".join(figure["data"]["image/png"])) in images
    page.locator("article table a").last.click()
    page.wait_for_function("location.hash.length > 1")
    assert 0 <= page.locator("article h2").last.bounding_box()["y"] < 900


def test_the_site_is_light(page, address, site):
    """No copies with the site's marks, no unused files, and icons without a script of 1.5 MB."""
    assert not [file for kind in ("*.ipynb", "*.map", "fontawesome*") for file in site.rglob(kind)]
    for path in site.rglob("*.html"):
        limit = {"playground": 5e6, "rank": 1.5e6, "language": 1.3e6}.get(path.stem, 1e6)
        assert path.stat().st_size < limit, path
    sizes = []
    page.on("response", lambda response: sizes.append(len(response.body())))
    go(page, address, "index")
    assert sum(sizes) < 1.2e6
    drawn = """(i) => {
      const glyph = getComputedStyle(i, "::before").content;
      return [getComputedStyle(i).maskImage, i.clientWidth, glyph];
    }"""
    for icon in page.locator("[class*='fa-']:visible").all():
        mask, width, glyph = icon.evaluate(drawn)
        assert "data:image/svg" in mask and width > 5 and glyph == "none"


# Folds


@pytest.mark.parametrize("name", [*MAIN, *DEEPER])
def test_folds(page, address, name):
    """What answers a "Predict." is folded, and nothing else is called a guess."""
    go(page, address, name)
    texts = ["".join(c["source"]) for c in cells(name) if c["cell_type"] == "markdown"]
    predicts = sum(len(re.findall(r"(?:\A|\n\n)\*\*Predict", text)) for text in texts)
    assert page.locator(".tag_answer:visible").count() == 0
    guesses = page.locator("details.answer")
    assert predicts <= guesses.count() <= predicts + page.locator("details > .tag_answer").count()
    for tag, kind in (("solution", ""), ("promises", ""), ("folded", ".above-input")):
        shown = [
            cell for cell in cells(name) if cell["id"] != "imports"
        ]  # part of the set-up there
        tagged = [cell for cell in shown if tag in cell["metadata"].get("tags", [])]
        assert page.locator(f".tag_{tag} > details{kind}").count() == len(tagged)
    assert page.locator("article details[open]").count() == 0


SETUP = "import sys\nfrom pathlib import Path"
OPENING = """# {title}

[![Open in Colab](https://colab.research.google.com/x.svg)](https://colab.research.google.com/y)

Why {title} matters: 40 numbers. At **Predict**, stop.

**Reading time** {minutes} minutes · **Run time** 9 s

Previous: [one](01_one.ipynb)

Next: [two](02_two.ipynb)"""


def write_notebook(path, title, minutes, *more):
    def code(name, source, *tags):
        cell = nbformat.v4.new_code_cell(source, metadata={"tags": list(tags)})
        cell.id = name
        cell.outputs = [nbformat.v4.new_output("stream", text=f"out of {name}\n")]
        return cell

    notebook = nbformat.v4.new_notebook()
    notebook.metadata.language_info = {"name": "python", "pygments_lexer": "ipython3"}
    opening = nbformat.v4.new_markdown_cell(OPENING.format(title=title, minutes=minutes))
    notebook.cells = [opening, code("setup", SETUP), code("imports", "import torch\n\nSEED = 0")]
    notebook.cells += [cell if isinstance(cell, dict) else code(*cell) for cell in more]
    path.parent.mkdir(exist_ok=True)
    nbformat.write(notebook, path)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The address of a site of two main notebooks and a deeper one, with each kind of fold."""
    folder, text = tmp_path_factory.mktemp("small"), nbformat.v4.new_markdown_cell
    long = "\n\n".join(f"Line {i} of many words that say nothing." for i in range(60))
    write_notebook(
        *(folder / "notebooks" / "01_one.ipynb", "One", 25),
        text("# First act\n\nA question.\n\n**Predict.** Will it merge?"),
        ("guess", "print('it merges')", "answer"),
        text(f"Now a verdict.\n\n{long}\n\n## Second\n\n{long}"),
        text("<details><summary>How sure is this?</summary>\n\nVery adapters.\n\n</details>"),
        ("plot", "# @title Figure: a curve\nplt.plot()", "folded"),
        ("hint", "# @title Solution\nx = 1", "solution"),
        ("end", "# @title What this notebook promises\ncheck('yes', True)", "promises"),
    )
    write_notebook(folder / "notebooks" / "02_two.ipynb", "Two", 20)
    write_notebook(folder / "notebooks" / "deeper" / "01_roots.ipynb", "Roots", 12)
    shutil.copytree(pages.DOCS, folder / "docs")
    (folder / "docs" / "claims.md").write_text("---\norphan: true\n---\n\n# No claims\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages, "NOTEBOOKS", folder / "notebooks")
        patch.setattr(pages, "SOURCE", folder / "source")
        patch.setattr(pages, "DOCS", folder / "docs")
        assert pages.build(folder / "lora-notebooks") == 0
    with serve(folder) as address:
        yield f"{address}lora-notebooks/"


@pytest.fixture
def little(browser, small):
    with open_page(browser, small) as page:
        yield page


def test_each_kind_of_fold_has_its_label(little, small):
    go(little, small, "01_one")
    labels = [text.strip() for text in little.locator("article summary").all_inner_texts()]
    names = ["Set-up and imports", "I have my guess: show it", "How sure is this?"]
    assert labels == [*names, "Figure: a curve", "Solution", "What this notebook promises"]
    for source in ("it merges", "Very adapters", "plt.plot", "x = 1", "out of hint", "check("):
        assert not little.get_by_text(source).first.is_visible(), source
    assert not little.get_by_text("out of end").is_visible()
    assert little.get_by_text("out of plot").is_visible()  # of a figure, the code alone is hidden
    assert little.get_by_text("At Predict, stop").is_visible()
    little.get_by_role("button", name="Open all folds").click()
    for source in ("it merges", "Very adapters", "plt.plot", "x = 1", "import torch", "out of end"):
        assert little.get_by_text(source).first.is_visible(), source
    assert "@title" not in little.content() and "Previous: " not in little.inner_text("article")
    little.get_by_role("button", name="Shut all folds").click()
    little.locator("details.answer > summary").focus()
    little.keyboard.press("Enter")
    assert little.get_by_text("it merges").is_visible()


def test_deeper_notebooks_stand_below_their_main_one(little, small):
    go(little, small, "index")
    item = little.locator("article li", has=little.locator("a[href='01_one.html']"))
    assert "One · 25 minutes" in item.inner_text()
    assert item.locator("li").inner_text() == "Deeper: Roots · 12 minutes"
    go(little, small, "01_one")
    assert little.locator("main h1:visible").count() == 1  # although its act has one, too
    nav = little.locator(".bd-docs-nav li.toctree-l1", has_text="One")
    assert nav.locator("li.toctree-l2 a").get_attribute("href") == "deeper/01_roots.html"
    ways = {"index": (None, "01_one"), "01_one": ("index", "02_two"), "02_two": ("01_one", None)}
    for name, (before, after) in (ways | {"deeper/01_roots": ("01_one", "02_two")}).items():
        go(little, small, name)
        for arrow, target in (("a.left-prev", before), ("a.right-next", after)):
            assert little.locator(arrow).count() == bool(target), (name, arrow)
            if target:
                link = little.locator(arrow).evaluate("a => a.href")
                assert link == f"{small}{target}.html", (name, arrow)


def test_a_lost_reader_finds_home(little, small):
    little.goto(f"{small}404.html")
    little.get_by_role("link", name="first page").click()
    little.wait_for_url(f"{small}index.html")


# Searching


def search(page, address, words):
    page.goto(f"{address}index.html")
    page.locator(".search-button__button:visible").first.click()
    page.locator("input[type=search]:visible").fill(words)
    assert page.locator("form.bd-search:visible").evaluate("""(form) => {
      const [icon, input] = form.querySelectorAll("i, input");
      return icon.getBoundingClientRect().right <= input.getBoundingClientRect().left + 12;
    }""")  # no letter lies under the icon
    page.keyboard.press("Enter")
    return page.locator("#search-results li")


@pytest.mark.parametrize("words, found", [("merging", "it merges"), ("adapter", "Very adapters")])
def test_a_search_leads_to_the_marked_words_in_an_open_fold(little, small, words, found):
    result = search(little, small, words).filter(has=little.get_by_role("link", name="One"))
    result.locator(".context").wait_for()
    assert "Contents" not in result.inner_text()
    result.get_by_role("link").click()
    little.wait_for_url("**/01_one.html*")
    first = little.locator("article mark").first
    first.wait_for()
    little.wait_for_function("document.querySelector('mark').getBoundingClientRect().top < 900")
    assert first.is_visible() and little.locator("article mark:visible").count() >= 1
    assert little.get_by_text(found).first.is_visible()
    assert not little.get_by_text("x = 1").is_visible()  # what was not sought stays folded
    go(little, small, "01_one")  # once: a later visit is clean
    assert little.locator("article mark").count() == 0


def test_the_tools_are_found_by_their_words_before_the_notebooks(little, small):
    for words, names in (
        ("calculator", ["memory"]),
        ("does it fit", ["memory"]),
        ("QLoRA card", ["memory"]),
        ("Shakespeare knob", ["language"]),
        ("photograph slider", ["rank"]),
        ("playground", ["language", "playground"]),
        ("digits", ["playground"]),
        ("merging", []),
    ):
        search(little, small, words).first.wait_for()
        links = little.locator("main li a")
        for place, name in enumerate(names):  # they come a moment after what the search finds
            expect(links.nth(place)).to_have_attribute("href", f"{name}.html")
        tools = [f"{small}{name}.html" for name in names]
        others = links.evaluate_all("all => all.map((a) => a.href)")[len(tools) :]
        assert not {*others} & {*tools}, words


def test_the_search_is_in_sight_on_a_direct_visit(page, address):
    page.set_viewport_size({"width": 1280, "height": 720})
    for name in MAIN:
        go(page, address, name)
        page.wait_for_timeout(50)
        box = page.locator(".search-button-field").bounding_box()
        assert 0 <= box["y"] < 300, name
        assert page.locator(".bd-docs-nav .current.active > a").first.is_visible()


# From page to page


def test_first_page_fits_one_screen(page, address):
    """On a desk: what it is, ways to begin and the picture. On a phone: the picture begins."""
    for width, height, part in ((1280, 900, 1), (390, 844, 0.5)):
        page.set_viewport_size({"width": width, "height": height})
        page.goto(f"{address}index.html")
        box = page.locator("article img").bounding_box()
        assert box["y"] + part * box["height"] <= height
        for name in ("Turn the adapters", "Draw a digit"):
            assert page.get_by_role("link", name=name, exact=True).bounding_box()["y"] < 560
    for name in NOTEBOOKS:
        assert page.locator(f"article li a.reference[href^='{name}']").is_visible()
        level = ".toctree-l2" if "/" in name else ".toctree-l1"
        assert page.locator(f".bd-docs-nav li{level} > a[href^='{name}']").count() == 1, name


def test_copy_buttons_show_on_touch(browser, address):
    with open_page(browser, address, has_touch=True, is_mobile=True) as page:
        go(page, address, MAIN[0])
        button = page.locator("div.cell_input:visible .copybtn").first
        assert button.evaluate("b => getComputedStyle(b).opacity") == "1"


def test_the_tools_follow_the_site_into_the_dark(page, address):
    page.goto(f"{address}index.html")
    page.locator(".theme-switch-button:visible").click()
    page.locator(".theme-change-button[data-mode=dark]:visible").click()
    for name in ("language", "playground", "rank", "memory"):
        page.goto(f"{address}index.html")
        page.locator(f".playground-link a[href='{name}.html']").click()
        page.wait_for_url(f"**/{name}.html")
        assert page.get_attribute("html", "data-theme") == "dark"
        page.get_by_role("link", name="LoRA from the ground up").wait_for()
        others = {"language", "playground", "rank", "memory"} - {name}
        links = page.locator(".home a").evaluate_all("all => all.map((a) => a.innerText && a.href)")
        assert {link.rpartition("/")[2] for link in links[1:]} == {f"{o}.html" for o in others}
    page.goto(f"{address}index.html")
    page.locator(".playground-link").get_by_role("link", name="Things to touch").click()
    page.wait_for_url("**/play.html")


def test_nothing_is_published_without_an_address():
    """The workflow asks that OWNER be filled in, where the site's settings have it."""
    text = (pages.ROOT / ".github" / "workflows" / "site.yml").read_text(encoding="utf-8")
    assert 'run: "! grep OWNER docs/conf.py"' in text.split("make test-site")[0]
