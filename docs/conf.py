"""How Sphinx builds the site (`make docs`): nothing is fetched, and no page asks another host for a font or script."""

import sys
from pathlib import Path

from encdiff import __version__

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

project = "encdiff"
author = copyright = "encdiff contributors"
release = __version__
extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "myst_parser",
    "sphinx_copybutton",
    "sphinx_design",
    "commands",
    "docstrings",
    "runs",
]
exclude_patterns = ["results/*/run*"]  # what the benchmarks wrote: files, not pages
highlight_language = "text"  # of indented blocks: formulas
smartquotes_action = "D"  # dashes; quotes are those of strings

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3  # links to `page.md#a-heading` work here as they do in the repository
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

default_role = "literal"  # docstrings mark code by single backticks
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
autodoc_preserve_defaults = True
autosummary_generate = False
napoleon_numpy_docstring = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 90
add_module_names = False
toc_object_entries_show_parents = "hide"
# Without inventories of other projects only our own names can be resolved, and of these not type variables such as T.
nitpick_ignore_regex = [(r"py:.*", r"(?!encdiff\b).*|.*\.[A-Z]")]

html_theme = "furo"
html_title = f"encdiff {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
