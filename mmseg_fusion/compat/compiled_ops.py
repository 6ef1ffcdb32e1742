"""mmcv without its compiled ops, and mmengine's test whether they are installed.

mmsegmentation 1.2.2 does not import without them: ends with a full mmcv for the installed torch, or
with onedl-mmsegmentation. mmengine 0.10.7 asks ``pkgutil.find_loader``, which is gone in Python
3.14: ends with onedl-mmengine 0.10.12.
"""

from __future__ import annotations

import importlib.util
import pkgutil
import sys
import types
from importlib.machinery import ModuleSpec

from .packages import family, installed
from .quirk import Quirk


class _Uncompiled(types.ModuleType):
    """Stands for ``mmcv._ext``: every op is there, and says what is missing when it is called."""

    def __init__(self, reason: str):
        super().__init__('mmcv._ext', 'Placeholder for the compiled ops of mmcv.')
        self.__reason__ = reason
        # mmengine's mmcv_full_available() asks for the loader and then answers False; without
        # any spec it would raise.
        self.__spec__ = ModuleSpec('mmcv._ext', None)

    def __getattr__(self, name: str):
        if name.startswith('__'):
            raise AttributeError(name)

        def missing(*args, **kwargs):
            raise RuntimeError(
                f"mmcv op '{name}' is not available: {self.__reason__}. mmseg_fusion never needs "
                'it, the layer that called it does. Install the full package for your torch and '
                'CUDA (pip uninstall -y mmcv mmcv-lite; pip install -U openmim; '
                'mim install "mmcv>=2.0.1,<2.2"), or choose a layer that needs no compiled op.'
            )

        missing.__name__ = name
        return missing


def mmcv_without_ops() -> Quirk | None:
    """Lets mmseg 1.2.2 import where ``mmcv._ext`` is missing or was built for another torch.

    mmseg imports all of ``mmcv.ops``, although few of its layers call an op. A placeholder replaces
    the extension. onedl-mmsegmentation can be imported without ops and is not changed.
    """
    if family() == 'onedl':
        return None
    import torch  # noqa: F401  (the extension links against its libraries)

    try:
        import mmcv._ext  # noqa: F401

        return None
    except ModuleNotFoundError:
        problem = 'was installed without compiled ops'
    except (ImportError, OSError) as error:
        problem = f'has compiled ops that do not load here ({str(error).splitlines()[0]})'
    version = ' and '.join(f'{k} {v}' for k, v in installed(('mmcv', 'mmcv-lite')).items())
    reason = f'{version or "mmcv"} {problem}'
    sys.modules['mmcv._ext'] = _Uncompiled(reason)
    return Quirk(
        'mmcv_without_ops',
        f'{reason}: mmcv._ext is a placeholder, an op raises when it is called',
        'a full mmcv for this torch, or onedl-mmsegmentation, which imports without mmcv.ops',
    )


def find_loader_removed() -> Quirk | None:
    """``pkgutil.find_loader`` for mmengine and mmcv, since Python 3.14 removed it.

    They call it to see whether mmcv has compiled ops. ``pkgutil`` changes only for these two
    packages.
    """
    if hasattr(pkgutil, 'find_loader'):
        return None
    from mmcv.utils import ext_loader
    from mmengine.utils.dl_utils import misc

    def find_loader(name: str):
        spec = importlib.util.find_spec(name)
        return None if spec is None else spec.loader

    users = [module for module in (misc, ext_loader) if hasattr(module, 'pkgutil')]
    for module in users:
        module.pkgutil = types.SimpleNamespace(find_loader=find_loader)
    if not users:
        return None
    return Quirk(
        'find_loader_removed',
        'mmengine and mmcv look for the compiled ops through importlib, not pkgutil.find_loader',
        'onedl-mmengine 0.10.12',
    )
