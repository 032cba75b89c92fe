"""Settings of Sphinx for the site. tools/pages.py prepares what it reads; nothing is executed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for folds.py and heads.py

# Where the code lives and where the site is published. After a fork: CONTRIBUTING.md.
REPOSITORY = "https://github.com/OWNER/lora-notebooks"
SITE = "https://OWNER.github.io/lora-notebooks"

project = html_title = "LoRA from the ground up"
copyright = author = ""

extensions = ["myst_nb", "sphinx_copybutton", "sphinx.ext.mathjax", "folds", "heads"]
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
mathjax_path = "mathjax/tex-chtml.js"  # in _static: nothing comes from another host
nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "myst"  # outputs, too, hold tables
copybutton_selector = "div.cell_input div.highlight pre"

html_theme = "sphinx_book_theme"
html_baseurl = SITE
templates_path = ["_templates"]
html_static_path = ["_static"]
html_css_files = ["site.css", "icons.css"]
html_js_files = ["site.js"]
html_extra_path = ["extra"]  # copied as it is: playground.html and its like
html_favicon = "_static/favicon.svg"
html_use_index = html_copy_source = html_show_sourcelink = False
html_show_copyright = html_show_sphinx = False
html_context = {"default_mode": "auto"}
html_sidebars = {
    "**": [
        "navbar-logo.html",
        "search-button-field.html",
        "playground-link.html",
        "sbt-sidebar-nav.html",
    ]
}
html_theme_options = {
    "logo": {"text": project},  # on the first page, too, where heads.py drops docstitle
    "repository_url": REPOSITORY,
    "repository_branch": "main",
    "path_to_docs": "notebooks",
    "use_repository_button": True,
    "use_download_button": False,  # it would hand out the copies with the site's marks
    "use_fullscreen_button": False,
    "launch_buttons": {"colab_url": "https://colab.research.google.com"},
    "home_page_in_toc": True,
    "show_toc_level": 1,
    "show_navbar_depth": 2,  # the deeper notebooks stand under their main notebook
    "navbar_persistent": [],  # else a second search field stands above the page
    "article_footer_items": [],
    "content_footer_items": [],
    "footer_content_items": [],
    "extra_footer": "",
}
