"""Access to classes of mmpretrain, whose layers the backbones of this package use."""

from __future__ import annotations

import importlib

from torch import nn

from ... import compat


def mmpretrain_backbone(name: str, asked_by: str) -> type[nn.Module]:
    """A class of ``mmpretrain.models.backbones``.

    Args:
        name: of the class.
        asked_by: name of the class that needs it, for the message.

    Raises:
        ImportError: mmpretrain cannot be imported; the message says what to install.
    """
    # Here and not at the top: mmpretrain is optional and takes a second to import.
    try:
        return getattr(importlib.import_module('mmpretrain.models.backbones'), name)
    except ImportError as error:
        raise ImportError(
            f"{asked_by} takes its layers from mmpretrain's {name}, which cannot be imported "
            f"({error}). Install it with pip install 'mmseg-fusion[{compat.family()}]', or set "
            'model.backbone.type to another backbone.'
        ) from error
