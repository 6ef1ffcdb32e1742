"""Sphinx configuration: ``make docs``, or ``python -m sphinx -W -b html docs docs/_build/html``."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# First: it meets the third-party quirks before autodoc imports anything.
import mmseg_fusion  # noqa: E402

project = 'mmseg-fusion'
author = 'mmseg-fusion contributors'
copyright = author
release = version = mmseg_fusion.__version__

extensions = [
    'myst_nb',  # myst_parser, and notebooks
    'sphinx.ext.autodoc',
    'sphinx.ext.autosummary',
    'sphinx.ext.mathjax',
    'sphinx.ext.napoleon',
    'sphinx.ext.viewcode',
    'sphinx_copybutton',
    'sphinx_design',
]
exclude_patterns = ['_build', '_templates']
templates_path = ['_templates']

myst_enable_extensions = ['dollarmath', 'colon_fence']
myst_heading_anchors = 3
# A notebook is shown as it was stored; a test runs it.
nb_execution_mode = 'off'

# One page per module, made when the docs are built.
autosummary_generate = True
autodoc_member_order = 'bysource'
autodoc_typehints = 'description'
autodoc_typehints_description_target = 'documented'
autodoc_class_signature = 'mixed'
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = ['Shape', 'Differs from the paper']

# A prompt is not copied.
copybutton_prompt_text = r'>>> |\.\.\. |\$ '
copybutton_prompt_is_regexp = True

html_theme = 'furo'
html_title = f'mmseg-fusion {release}'
html_static_path = ['_static']
html_css_files = ['site.css']
