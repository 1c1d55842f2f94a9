"""Sphinx configuration: ``make docs`` builds the site into ``build/docs``, with warnings as errors."""

from __future__ import annotations

import importlib.metadata
import inspect
import os
import sys
from pathlib import Path

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
autodoc_typehints = "none"  # the docstrings give types, shapes and units, in the form that TorchRL uses
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
nitpicky = False


def shorten(app, what, name, obj, options, signature, returned):  # type: ignore[no-untyped-def]
    """Signatures without their annotations, which repeat the docstrings and fill three lines."""
    if what not in ("class", "function", "method") or signature is None:
        return None
    try:
        found = inspect.signature(obj)
    except (TypeError, ValueError):
        return None
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in found.parameters.values() if p.name != "self"]
    return str(found.replace(parameters=plain, return_annotation=inspect.Signature.empty)), None


def setup(app):  # type: ignore[no-untyped-def]
    app.connect("autodoc-process-signature", shorten)
