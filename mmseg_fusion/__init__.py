"""mmseg_fusion: multi-level feature fusion for MMSegmentation 1.x.

Importing the package works around quirks of the installed third-party versions
(:mod:`mmseg_fusion.compat`), and registers all classes in MMSegmentation's registries. A config
needs one line::

    custom_imports = dict(imports=['mmseg_fusion'], allow_failed_imports=False)
"""

from __future__ import annotations

import sys

from . import compat
from .version import __version__

#: Why the package cannot be used; ``python -m mmseg_fusion`` then says what to install.
import_error: Exception | None = None

try:
    compat.apply()
    # After the quirks: what these import needs them.
    from . import analysis, datasets, engine, models
    from .fusions import equalize
except Exception as error:
    # Python sets argv[0] to '-m' while it looks for the module that it is to run.
    if sys.argv[:1] != ['-m']:
        raise
    import_error = error

__all__ = [
    '__version__',
    'analysis',
    'compat',
    'datasets',
    'engine',
    'equalize',
    'import_error',
    'models',
]
