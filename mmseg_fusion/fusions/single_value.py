"""Recognizes the error of a batch norm that sees a single value per channel in training."""

from __future__ import annotations

import traceback

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def is_single_value(error: BaseException) -> bool:
    """Whether an error of torch, or one that quotes it, says that batch norm has a single value."""
    return isinstance(error, ValueError) and 'more than 1 value per channel' in str(error)


def single_value_layer(error: BaseException, owner: nn.Module) -> str | None:
    """Name, in ``owner``, of the batch norm layer that raised the error; None if unknown.

    Args:
        error: torch's error, or one that was raised from it.
        owner: a module that has the layer.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    # Compiled code leaves none of them.
    norms = [f.f_locals['self'] for f in frames if isinstance(f.f_locals.get('self'), _BatchNorm)]
    return next((n for n, m in owner.named_modules() if norms and m is norms[-1]), None)


def explain_single_value(error: ValueError, hint: str) -> ValueError:
    """torch's error about a batch norm with one value per channel, with a remedy."""
    return ValueError(f'{hint} ({error})') if is_single_value(error) else error
