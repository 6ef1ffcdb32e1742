"""Computation in full precision under automatic mixed precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

# torch < 2.4 has no such function, and its autocast knows these two devices for certain.
_autocast_available = getattr(
    torch.amp, 'is_autocast_available', lambda device_type: device_type in ('cpu', 'cuda')
)


def without_autocast(device_type: str) -> AbstractContextManager:
    """Context in which operators keep the types that they are given.

    Args:
        device_type: of the tensors, e.g. ``x.device.type``; a type that autocast does not know,
            such as ``meta``, needs no context.
    """
    if _autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
