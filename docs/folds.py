"""A Sphinx extension: what follows a "Predict." is folded until the reader asks for it."""

from docutils import nodes
from sphinx.application import Sphinx


class answer(nodes.General, nodes.Element):
    """A fold: <details> in HTML."""


def is_cell(node: nodes.Node, tag: str = "cell") -> bool:
    return isinstance(node, nodes.container) and tag in node["classes"]


def is_mark(node: nodes.Node) -> bool:
    """The comment that tools/pages.py puts before a "Predict."."""
    return isinstance(node, nodes.comment) and node.astext() == "predict"


def wrap(parent: nodes.Element, begin: int, end: int) -> None:
    """Put some of the children into a fold."""
    fold = answer("", *parent.children[begin:end])
    parent[begin:end] = [fold]


def fold(app: Sphinx, document: nodes.document) -> None:
    """Fold from the first cell after each mark up to the next mark or the end of the section."""
    for mark in [node for node in document.findall(nodes.comment) if is_mark(node)]:
        siblings = mark.parent.children
        begin = siblings.index(mark) + 1
        rest = range(begin, len(siblings))
        end = next(
            (i for i in rest if is_mark(siblings[i]) or isinstance(siblings[i], nodes.section)),
            len(siblings),
        )
        cells = [i for i in range(begin, end) if is_cell(siblings[i])]
        if cells:
            wrap(mark.parent, cells[0], end)
    for cell in [c for c in document.findall(nodes.container) if is_cell(c, "tag_answer")]:
        if not isinstance(cell.parent, answer):  # an answer without a "Predict." in its section
            index = cell.parent.index(cell)
            wrap(cell.parent, index, index + 1)


def visit(self, node: answer) -> None:
    self.body.append('<details class="answer"><summary>I have my guess: show it</summary>\n')


def depart(self, node: answer) -> None:
    self.body.append("</details>\n")


def setup(app: Sphinx) -> dict:
    app.add_node(answer, html=(visit, depart))
    app.connect("doctree-read", fold)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
