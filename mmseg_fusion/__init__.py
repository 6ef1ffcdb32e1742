"""mmseg_fusion: multi-level feature fusion for MMSegmentation 1.x.

Importing the package meets the quirks of the installed third-party versions
(:mod:`mmseg_fusion.compat`) and registers everything into MMSegmentation's registries, so a
config needs one line::

    custom_imports = dict(imports=['mmseg_fusion'], allow_failed_imports=False)
"""

from . import compat
from .version import __version__

compat.apply()

from . import analysis, datasets, engine, models  # noqa: E402  (after the quirks)

__all__ = ['__version__', 'analysis', 'compat', 'datasets', 'engine', 'models']
