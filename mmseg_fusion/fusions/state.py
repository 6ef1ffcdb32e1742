"""Restores the state of a module after it was traced or measured."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy
import torch
from torch import nn


@contextlib.contextmanager
def kept_state(module: nn.Module) -> Iterator[None]:
    """Restores buffers, training flags and all random states of a module at the end of the block.

    Buffers that the block replaced or that are normalization statistics are restored by value.
    """
    buffers = [
        (owner, key, value, value.clone())
        for owner in module.modules()
        for key, value in owner._buffers.items()
        if value is not None
    ]
    flags = [(owner, owner.training) for owner in module.modules()]
    devices = sorted({p.device.index for p in module.parameters() if p.device.type == 'cuda'})
    python_state, numpy_state = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)
        with torch.no_grad():
            for owner, key, value, copy in buffers:
                value.copy_(copy)
                owner._buffers[key] = value
        for owner, flag in flags:
            owner.training = flag
