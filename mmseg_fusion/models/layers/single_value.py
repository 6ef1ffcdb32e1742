"""Errors of heads and necks where batch norm cannot train: on a single value per channel."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from ...errors import InputError
from ...fusions import is_single_value, single_value_layer

Kind = TypeVar('Kind', bound=type[nn.Module])


class SingleValueError(InputError):
    """Batch norm in training saw a single value per channel, which has no variance.

    Args:
        message: what was expected, what was given and what to change.
        remedy: the setting that removes the layer, for the message of an outer module.
    """

    def __init__(self, message: str, remedy: str = '') -> None:
        super().__init__(message)
        self.remedy = remedy


def _explained(method: Callable) -> Callable:
    @functools.wraps(method)
    def wrapped(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except ValueError as error:
            if not is_single_value(error):
                raise
            raise _explanation(self, error) from error

    return wrapped


def _explanation(owner: nn.Module, error: ValueError) -> SingleValueError:
    layer = single_value_layer(error, owner)
    remedy = getattr(error, 'remedy', '')
    for place, key in getattr(owner, 'single_value_remedies', {}).items():
        if layer is not None and layer.startswith(f'{place}.'):
            remedy = key
    # torch's own words, of a part that has explained them already.
    torchs = error
    while torchs.__cause__ is not None:
        torchs = torchs.__cause__
    return SingleValueError(
        f'{type(owner).__name__}: batch norm {layer or "of one of its layers"} cannot train on one '
        'image per GPU where a feature is a single cell, which is a single value per channel: '
        'expected a batch of 2 or more, got 1. Set train_dataloader.batch_size=2 (and '
        "drop_last=True), norm_cfg=dict(type='SyncBN') on several GPUs, its norm_cfg to one that "
        f'needs no batch, such as GN, {f"{remedy}, " if remedy else ""}or, where the image is no '
        f'larger than the stride of a level, a larger crop ({torchs})',
        remedy,
    )


def explains_single_values(cls: Kind) -> Kind:
    """Decorates a head or neck so that an error names the batch norm layer that cannot train.

    torch refuses to train batch norm on one image whose feature has a single cell, but names
    neither the layer nor a remedy. If decorated modules are nested, the outermost one names the
    layer. The class may have ``single_value_remedies``: names of layers, and the setting that
    removes each.

    Raises:
        SingleValueError: in ``forward``, and in ``loss`` if the class defines it, when torch
            refuses.
    """
    cls.forward = _explained(cls.forward)
    # An inherited one calls forward, and must stay recognizable as inherited.
    if 'loss' in vars(cls):
        cls.loss = _explained(cls.loss)
    return cls
