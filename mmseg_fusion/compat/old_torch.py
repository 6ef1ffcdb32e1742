"""The reader of checkpoints below torch 2.6.

In these versions torch's restricted reader does not know the objects in a training checkpoint of
mmengine, and passes some archives to unrestricted readers. Ends with torch 2.6.
"""

from __future__ import annotations

import functools
import pickle
import tarfile
import types
import zipfile
from collections import OrderedDict
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from .training_types import of_training


def before_torch_2_6() -> bool:
    """Whether the restricted reader of the installed torch is not safe."""
    import torch
    from packaging.version import Version

    return Version(torch.__version__).release < (2, 6)


def refuse_archives(file: Any) -> None:
    """Refuses the formats that torch before 2.6 reads without any restriction."""
    where = file.tell() if hasattr(file, 'tell') else None
    kind = None
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            if any(Path(name).name == 'constants.pkl' for name in archive.namelist()):
                kind = 'TorchScript'
    elif where is None and Path(file).is_file() and tarfile.is_tarfile(file):
        kind = 'tar'
    if where is not None:
        file.seek(where)
        if kind is None and not zipfile.is_zipfile(file):
            file.seek(where)
            try:
                tarfile.open(fileobj=file, mode='r:').close()
                kind = 'tar'
            except tarfile.TarError:
                pass
        file.seek(where)
    if kind:
        raise UnpicklingError(f'an archive of the {kind} format')


@functools.cache
def restricted_pickle() -> types.ModuleType:
    """A substitute for :mod:`pickle`: only tensors, plain values and types of a training."""
    import numpy
    import torch
    from mmengine.logging import HistoryBuffer
    from torch._weights_only_unpickler import _get_allowed_globals

    allowed = dict(_get_allowed_globals())
    own = of_training()
    if hasattr(torch.serialization, 'get_safe_globals'):
        own += torch.serialization.get_safe_globals()
    for entry in own:
        value, name = entry if isinstance(entry, tuple) else (entry, None)
        allowed[name or f'{value.__module__}.{value.__qualname__}'] = value
    allowed['_codecs.encode'] = _encode_latin1
    # Of whose instances a file may set the state; of a class or a function it may not.
    with_state = (OrderedDict, HistoryBuffer, numpy.ndarray, numpy.dtype, torch.Tensor)

    class Unpickler(pickle._Unpickler):
        dispatch = dict(pickle._Unpickler.dispatch)

        def find_class(self, module: str, name: str) -> Any:
            module = {'__builtin__': 'builtins', 'copy_reg': 'copyreg'}.get(module, module)
            try:
                return allowed[f'{module}.{name}']
            except KeyError:
                raise UnpicklingError(f'GLOBAL {module}.{name} was not an allowed global') from None

        def load_build(self) -> None:
            if not isinstance(self.stack[-2], with_state):
                raise UnpicklingError(f'sets the state of GLOBAL {type(self.stack[-2]).__name__}')
            super().load_build()

        dispatch[pickle.BUILD[0]] = load_build

    module = types.ModuleType('tensors_only')
    module.Unpickler = Unpickler
    module.load = lambda file, **kwargs: Unpickler(file, **kwargs).load()
    return module


def _encode_latin1(text: str, encoding: str) -> bytes:
    """How the second pickle protocol writes bytes."""
    if encoding != 'latin1':
        raise UnpicklingError(f'bytes in the encoding {encoding!r}')
    return text.encode('latin1')
