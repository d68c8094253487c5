"""The configuration of the site, which `make docs` builds with Sphinx: Furo's theme, pages in Markdown (MyST).

Each public name has one entry: a function of an op on the page of its op, under the heading Reference, and everything
else on the page of its module in `docs/api`. `tests/tools/test_site.py` holds that. Every reference has to resolve.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

import blt_kernels

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
matplotlib.use("Agg")

project = "blt_kernels"
author = "the authors of blt_kernels"
project_copyright = "the authors of blt_kernels. BSD 3-Clause licence"
release = version = blt_kernels.__version__
html_title = f"blt_kernels {release}"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "extensions.commands",
    "extensions.faults",
    "extensions.figures",
    "extensions.mathml",
    "extensions.measured",
    "extensions.names",
    "extensions.printed",
    "extensions.results",
]
exclude_patterns = ["figures", "extensions", "images"]
nitpicky = True
default_role = "code"

myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist", "dollarmath", "substitution"]
myst_heading_anchors = 3
html_math_renderer = "mathml"

html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_favicon = "static/favicon.svg"
pygments_dark_style = "github-dark"
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"footer_icons": []}
toc_object_entries_show_parents = "hide"

# The types in docstrings are prose, such as "fp32 or bf16 [T, D]". `extensions.names` links the names in them.
napoleon_google_docstring = False
napoleon_use_param = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Attributes", "params_style")]
autodoc_typehints = "none"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 88
