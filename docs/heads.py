"""A Sphinx extension: what a page says of itself to others, and where its arrows lead."""

import re
from html import escape

from docutils import nodes
from sphinx.application import Sphinx


def meta(title: str, description: str, address: str, image: str) -> str:
    """The tags by which search engines and chats describe a page."""
    named = {"description": description, "twitter:card": "summary_large_image"}
    card = {"og:type": "website", "og:title": title, "og:description": description}
    card |= {"og:url": address, "og:image": image}
    tags = [f'<meta name="{key}" content="{escape(value)}">' for key, value in named.items()]
    tags += [f'<meta property="{key}" content="{escape(value)}">' for key, value in card.items()]
    return "\n".join(tags)


def first_sentences(doctree: nodes.document, most: int = 200) -> str:
    """The beginning of the first paragraph: whole sentences, as many as have room."""
    text = next((p.astext() for p in doctree.findall(nodes.paragraph)), "")
    text, told = " ".join(text.split()), ""
    for sentence in re.split(r"(?<=[.?!]) ", text):
        if told and len(told) + len(sentence) > most:
            break
        told = f"{told} {sentence}".strip()
    return told


def neighbours(app: Sphinx, name: str) -> tuple[str | None, str | None]:
    """The pages before and after: a main notebook leads to the next main one, never deeper."""
    pages = app.env.toctree_includes
    main = [page for page in pages["index"] if page[0].isdigit()]
    if name in main:
        at = main.index(name)
        return ([app.config.root_doc, *main][at], [*main, None][at + 1])
    above = next((page for page in main if name in pages.get(page, [])), None)
    return (above, [*main, None][main.index(above) + 1]) if above else (None, None)


def complete(app: Sphinx, name: str, template: str, context: dict, doctree) -> None:
    if doctree is None:  # the search page
        return
    site = app.config.html_baseurl
    title = nodes.Text(re.sub(r"<.*?>", "", context["title"])).astext()
    description = first_sentences(doctree)
    address = f"{site}/{name}.html"
    context["metatags"] += meta(title, description, address, f"{site}/_static/language.png")
    if name == app.config.root_doc:
        context["docstitle"] = ""  # else the title stands there twice
        return
    for key, page in zip(("prev", "next"), neighbours(app, name), strict=True):
        context[key] = page and {
            "link": app.builder.get_relative_uri(name, page),
            "title": app.builder.render_partial(app.env.titles[page])["title"],
        }


def setup(app: Sphinx) -> dict:
    app.connect("html-page-context", complete)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
