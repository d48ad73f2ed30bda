"""Settings of Sphinx. `make docs` builds the pages from this folder; nothing is fetched from a network.

The pages are written for a reader of the repository as well: a link to a file outside of this folder becomes a download,
and one to a folder or a page there becomes text.
"""

import re
from pathlib import Path

from jobledger import App

project = "Jobledger"
author = "the Jobledger authors"
copyright = author  # Sphinx reads this name
extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["pypi.md"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_title = "Jobledger"
html_show_sphinx = False
myst_heading_anchors = 4
#: Single backticks in docstrings name an object; a name that is not on a page is shown as code.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True

HERE = Path(__file__).parent
LINK = re.compile(r"\[(?P<text>[^\]]+)\]\((?P<path>(?:\.\./)+[^)#\s]*)(?P<anchor>#[^)\s]*)?\)")


def inside(app, docname, source):
    """Rewrite links that lead out of this folder; called for each page."""
    folder = (HERE / docname).parent

    def link(found):
        path = (folder / found["path"]).resolve()
        if path.is_relative_to(HERE):
            return found[0]
        if path.is_file() and path.suffix != ".md":
            return "{download}`" + f"{found['text'].strip('`')} <{found['path']}>" + "`"
        return found["text"]

    source[0] = LINK.sub(link, source[0])


def setup(app):
    """Called by Sphinx."""
    # Sphinx reads the overloads of this method in the source. It cannot read a signature with more defaults than the source.
    vars(App.task).pop("__signature__", None)
    app.connect("source-read", inside)
