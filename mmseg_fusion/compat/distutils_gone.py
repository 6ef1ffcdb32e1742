"""``distutils``, which Python 3.12 has no more.

mmengine 0.10.7 imports it when a Runner lists its environment. setuptools brings a copy, through a
``.pth`` file that an interpreter may not read (``python -S``, a folder on PYTHONPATH): ends with an
mmengine that does without.
"""

from __future__ import annotations

import importlib.util
import warnings

from .quirk import Quirk


def distutils_removed() -> Quirk | None:
    """``distutils`` out of setuptools, where neither Python nor its ``.pth`` file gives it."""
    if importlib.util.find_spec('distutils') is not None:
        return None
    from mmengine.utils.dl_utils import collect_env  # the function

    if 'distutils' not in collect_env.__code__.co_names:
        return None
    try:
        import setuptools  # noqa: F401  (importing it is what brings distutils)
    except ImportError:
        warnings.warn(
            'mmengine needs distutils to train and to test, which Python has no more: '
            "pip install 'setuptools<81'",
            stacklevel=2,
        )
        return None
    return Quirk(
        'distutils_removed',
        'setuptools is imported, which brings the distutils that mmengine asks for',
        'mmengine that does without distutils',
    )
