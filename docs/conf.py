"""The configuration of the site, which `make docs` builds with Sphinx: Furo's theme, pages in Markdown (MyST)."""

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
release = version = blt_kernels.__version__
html_title = f"blt_kernels {release}"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "extensions.figures",
    "extensions.mathml",
    "extensions.measured",
    "extensions.results",
]
myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist", "dollarmath", "substitution"]
myst_heading_anchors = 3
html_math_renderer = "mathml"
html_theme = "furo"
html_static_path = ["static"]
exclude_patterns = ["figures", "extensions"]
nitpicky = True
nitpick_ignore_regex = [("py:.*", ".*")]
default_role = "code"
autodoc_typehints = "none"
napoleon_numpy_docstring = True
napoleon_google_docstring = False
