"""A checkpoint is read as tensors and plain values, wherever it comes from.

mmengine 0.10.7 cannot resume with torch 2.6 or newer, which loads with ``weights_only=True``: ends
with onedl-mmengine 0.10.12. Its loader for http(s), which most other schemes use, calls torch.hub,
which loads with ``weights_only=False``; onedl-mmengine falls back to that: ends with an mmengine
whose loaders of every scheme set ``weights_only``, and torch 2.6.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar
from pickle import UnpicklingError

from ..errors import CheckpointError
from .old_torch import before_torch_2_6, refuse_archives, restricted_pickle
from .quirk import Quirk
from .training_types import of_training
from .unreadable import why_not_loaded

#: Inside of mmengine's CheckpointLoader: why files could not be read so far. None elsewhere.
_LOADING: ContextVar[list[Exception] | None] = ContextVar('_LOADING', default=None)


def resume_weights_only() -> Quirk | None:
    """Names the types in a training checkpoint of mmengine as safe to load.

    torch >= 2.6 loads with ``weights_only=True``, which stays on. mmengine's message hub holds
    other objects, and without this ``--resume`` fails.
    """
    import torch
    from mmengine.runner import checkpoint

    if before_torch_2_6() or hasattr(checkpoint, 'get_torch_safe_globals'):
        return None
    torch.serialization.add_safe_globals(of_training())
    return Quirk(
        'resume_weights_only',
        'HistoryBuffer and the numpy types in a checkpoint are safe globals of torch.load',
        'onedl-mmengine 0.10.12, which declares them itself',
    )


def checkpoints_weights_only() -> Quirk | None:
    """No checkpoint runs code, wherever it comes from.

    mmengine's CheckpointLoader has a loader per scheme. The loader for http(s), which most others
    use, calls torch.hub, which loads with ``weights_only=False``. Below torch 2.6 this is the
    default of ``torch.load``, too, and onedl-mmengine falls back to it if a file needs it. While
    the CheckpointLoader runs, ``torch.load`` reads only tensors and plain values, whatever the
    loader requests; this includes schemes that are registered later. Outside of it ``torch.load``
    is not changed.

    This does not restrict a loader that does not call ``torch.load`` (but ``pickle.load``, for
    example); a registered loader must call ``torch.load``.

    Below torch 2.6 torch's own restricted reader does not know the objects in a training
    checkpoint, and passes archives of the TorchScript and tar formats to unrestricted readers.
    There :mod:`.old_torch` reads instead, and refuses those archives.
    """
    import torch
    from mmengine.runner import CheckpointLoader, checkpoint

    if hasattr(checkpoint, 'get_torch_safe_globals') and not before_torch_2_6():
        # onedl's own list, which comes and goes with each load, lets a file call getattr.
        torch.serialization.add_safe_globals([slice, *of_training()])
        checkpoint.get_torch_safe_globals = list
    torch.load = _tensors_only_while_loading(torch.load)
    CheckpointLoader.load_checkpoint = classmethod(
        _loads_tensors_only(CheckpointLoader.load_checkpoint.__func__)
    )
    return Quirk(
        'checkpoints_weights_only',
        'mmengine loads checkpoints of every scheme with weights_only=True'
        + (', by a reader of this package: torch is older than 2.6' if before_torch_2_6() else ''),
        'mmengine whose loaders of every scheme ask for weights_only, and torch 2.6',
    )


def _tensors_only_while_loading(original: Callable) -> Callable:
    old = before_torch_2_6()

    def tensors_only(f, map_location, pickle_module, kwargs):
        if not old:
            return original(f, map_location, pickle_module, **{**kwargs, 'weights_only': True})
        if pickle_module is not None:
            raise UnpicklingError(f'read by another unpickler, {pickle_module.__name__}')
        refuse_archives(f)
        kwargs.pop('weights_only', None)
        return original(f, map_location, restricted_pickle(), **kwargs)

    @functools.wraps(original)
    def load(f, map_location=None, pickle_module=None, **kwargs):
        failures = _LOADING.get()
        if failures is None:
            return original(f, map_location, pickle_module, **kwargs)
        try:
            return tensors_only(f, map_location, pickle_module, kwargs)
        except Exception as error:
            failures.append(error)
            raise

    return load


def _loads_tensors_only(original: Callable) -> Callable:
    @functools.wraps(original)
    def load_checkpoint(cls, filename, map_location=None, logger='current'):
        import torch

        failures: list[Exception] = []
        token = _LOADING.set(failures)
        try:
            return original(cls, filename, map_location, logger)
        # A file that is not there, a server that does not answer, a package of the scheme that is
        # not installed, no memory: these say what they are.
        except (OSError, ImportError, MemoryError, torch.cuda.OutOfMemoryError, CheckpointError):
            raise
        # Bytes that are no checkpoint end in any kind of error.
        except Exception as error:
            # onedl-mmengine tries a second time, where a stream is at its end already.
            first = failures[0] if failures else error
            raise CheckpointError(why_not_loaded(str(filename), first)) from first
        finally:
            _LOADING.reset(token)

    return load_checkpoint
