"""``distutils``, which Python 3.12 removed.

mmengine 0.10.7 imports it when a Runner lists its environment. setuptools has a copy, which it
installs through a ``.pth`` file. Some interpreters do not read that file (``python -S``, a folder
on PYTHONPATH): ends with an mmengine that does not need it.
"""

from __future__ import annotations

import importlib.util
import warnings

from .quirk import Quirk


def distutils_removed() -> Quirk | None:
    """Takes ``distutils`` from setuptools if neither Python nor the ``.pth`` file provides it."""
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
