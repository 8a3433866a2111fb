"""The documentation site: `make docs` builds it from this folder and from the docstrings."""

from __future__ import annotations

from vaekernels import __version__

project = "vaekernels"
copyright = "the vaekernels authors"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
exclude_patterns = ["templates"]
templates_path = ["templates"]
html_theme = "furo"
html_title = f"vaekernels {version}"
html_show_copyright = False

myst_heading_anchors = 4

# Members in the order of the source, where related ones stand together. Docstrings name the types in words;
# with annotations a signature of sixteen arguments, overloaded twice, fills a screen.
autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_typehints = "none"
# Napoleon takes what stands before a colon in an attribute's docstring for its type: write it without one.
autosummary_ignore_module_all = False
python_maximum_signature_line_length = 100

# `name` in a docstring is a link where the name is documented, and code where it is not (an argument, say).
# What is a reference by its form, such as :func:`name` or a link between pages, has to lead somewhere.
default_role = "py:obj"
nitpicky = True
nitpick_ignore_regex = [("py:obj", ".*"), ("py:class", r"(torch\.|typing\.|collections\.abc\.).*")]
