"""Sphinx configuration: ``make docs`` builds the site into ``build/docs``, with warnings as errors."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from pathlib import Path

from sphinx.util.inspect import TypeAliasForwardRef, stringify_signature
from sphinx.util.inspect import signature as signature_of

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("MUJOCO_GL", "disabled")  # reference pages import environments, and draw nothing

project = "pwm_torchrl"
author = "pwm_torchrl contributors"
project_copyright = author
release = version = importlib.metadata.version("pwm-torchrl")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_templates"]
templates_path = ["_templates"]

html_theme = "furo"
html_title = f"pwm_torchrl {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist", "fieldlist"]
myst_heading_anchors = 3
suppress_warnings = ["myst.strikethrough"]
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

autosummary_generate = True
# Signatures have the types by their last names; the docstrings add shapes and units, in the form that TorchRL uses.
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_type_aliases = {"NestedKey": "NestedKey"}  # not the union that it stands for
autodoc_preserve_defaults = True
TypeAliasForwardRef.__repr__ = lambda self: self.name  # type: ignore[method-assign]  # what is shown inside of list[...]
python_use_unqualified_type_names = True
maximum_signature_line_length = 120  # with full names of types; a longer one has a line for each argument
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
nitpicky = False


def mended(app, what, name, obj, options, signature, returned):  # type: ignore[no-untyped-def]
    """Signatures that Sphinx does not find, as metaclasses of losses and environments take anything, or cannot read."""
    if what != "class" or signature is None:
        return None
    if signature.startswith("(*args"):
        found = signature_of(obj.__init__, bound_method=True, type_aliases=app.config.autodoc_type_aliases)
        signature = stringify_signature(found, show_return_annotation=False, unqualified_typehints=True)
    return signature.replace("<factory>", "..."), returned  # of dataclasses; not Python, so it would stay one long line


def setup(app):  # type: ignore[no-untyped-def]
    app.connect("autodoc-process-signature", mended)
