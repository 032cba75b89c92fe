"""What the tests in a real browser share: headless Chromium, and pages that must stay clean."""

import contextlib
import functools
import http.server
import shutil
import threading
from pathlib import Path

import axe_playwright_python
import pytest
from playwright.sync_api import sync_playwright

import pages

AXE = (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8")
WCAG = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: `make test-site` runs it, .ci/run does not")


@pytest.fixture(scope="session")
def browser():
    """The system's Chromium or, without one, Playwright's own."""
    found = next(filter(None, map(shutil.which, CHROMIUM)), None)
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Server(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serve(folder):
    """Serve a folder on this machine; give its address."""
    handler = functools.partial(Server, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@contextlib.contextmanager
def open_page(browser, address, **context):
    """A page that fails the test if it logs an error, lacks a file or asks another host."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | context)
    page, faults = context.new_page(), []
    page.on("console", lambda m: m.type == "error" and faults.append(f"console: {m.text}"))
    page.on("pageerror", lambda error: faults.append(f"error: {error}"))
    page.on("requestfailed", lambda r: was_left(r) or faults.append(f"failed: {r.url}"))
    page.on("response", lambda r: r.status >= 400 and faults.append(f"{r.status}: {r.url}"))
    page.on("request", lambda r: is_foreign(r.url, address) and faults.append(f"asks {r.url}"))
    yield page
    context.close()
    assert faults == []


def was_left(request):
    """The reader went on before it came."""
    return request.failure == "net::ERR_ABORTED"


def is_foreign(url, address):
    return not url.startswith((address, "data:", "blob:", "about:"))


# Of the thousands of coloured words in code, three of each colour are enough: axe-core is slow.
FEWER_WORDS = """() => {
  const seen = {};
  for (const word of document.querySelectorAll("pre span")) {
    seen[word.className] = (seen[word.className] ?? 0) + 1;
    if (seen[word.className] > 3) word.replaceWith(...word.childNodes);
  }
}"""


def violations(page):
    """What axe-core finds against WCAG, levels A and AA. It leaves the page changed."""
    page.add_style_tag(content="* { transition: none !important; animation: none !important }")
    page.evaluate(FEWER_WORDS)
    page.evaluate("document.fonts.ready.then(() => new Promise(requestAnimationFrame))")
    page.evaluate(AXE)
    found = page.evaluate("tags => axe.run({runOnly: tags, preload: false, iframes: false})", WCAG)
    return [
        f"{fault['id']}: {node['html'][:120]}"
        for fault in found["violations"]
        for node in fault["nodes"]
    ]


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The folder of a site built just now."""
    folder = tmp_path_factory.mktemp("pages") / "lora-notebooks"
    assert pages.build(folder) == 0
    return folder


@pytest.fixture(scope="session")
def address(site):
    """Where it is served: below a folder, as on GitHub Pages."""
    with serve(site.parent) as address:
        yield f"{address}{site.name}/"


@pytest.fixture(scope="session")
def tools(tmp_path_factory):
    """A folder with the pages to touch, as the site has them."""
    folder = tmp_path_factory.mktemp("tools")
    pages.write_tools(folder)
    return folder


@pytest.fixture
def open_tool(browser, tools):
    """A function that opens one of them, "memory" or "memory#batch=4", in a window of some size."""
    with contextlib.ExitStack() as stack:

        def open_tool(name, width=1280, height=900, **look):
            look["viewport"] = {"width": width, "height": height}
            page = stack.enter_context(open_page(browser, tools.as_uri(), **look))
            name, mark, settings = name.partition("#")
            page.goto(f"{tools.as_uri()}/{name}.html{mark}{settings}")
            return page

        yield open_tool
