"""A decode head without its classifier."""

from __future__ import annotations

import traceback
from typing import Any

from mmseg.registry import MODELS
from torch import Tensor, nn


def check_head(owner: str, cfg: dict) -> None:
    """``cfg`` is the config of a head.

    Args:
        owner: as of :func:`build_headless`.
        cfg: what was given.

    Raises:
        ValueError: it is no dict with a type.
    """
    if not isinstance(cfg, dict) or 'type' not in cfg:
        raise ValueError(
            f"{owner} must be the config of a decode head, such as dict(type='PSPHead'), "
            f'got {cfg!r}'
        )


def build_headless(owner: str, cfg: dict, **defaults: Any) -> tuple[nn.Module, int]:
    """Builds a decode head that returns the features that it would classify.

    For methods that put one head into another: pyramid pooling or ASPP as the context of GFF, any
    upsampler or encoder in HFGD. The classifier and the dropout before it are taken off; all other
    weights keep their names.

    Args:
        owner: which key of which head asks, for messages, e.g. ``'GFFHead: context'``.
        cfg: config of a ``BaseDecodeHead`` whose forward pass ends in ``cls_seg(features)``.
        **defaults: arguments that ``cfg`` need not give.

    Returns:
        The head, and the number of channels of its features.

    Raises:
        ValueError: ``cfg`` is no config of a head, or the head has no ``conv_seg``.
    """
    check_head(owner, cfg)
    cfg = {**defaults, **cfg}
    try:
        head = MODELS.build(cfg)
    except AssertionError as error:
        # BaseDecodeHead's way to refuse a list where it takes one level, and the reverse.
        if traceback.extract_tb(error.__traceback__)[-1].name != '_init_inputs':
            raise
        raise ValueError(
            f'{owner}: {cfg["type"]} takes other levels than in_index={cfg.get("in_index")} with '
            f'in_channels={cfg.get("in_channels")}; set its in_index (a number for a head on one '
            'level, a list for one on several)'
        ) from error
    classifier = getattr(head, 'conv_seg', None)
    if not isinstance(classifier, nn.Conv2d):
        raise ValueError(
            f'{owner} must be a decode head that classifies with conv_seg; {cfg["type"]} does not'
        )
    head.conv_seg = nn.Identity()
    head.dropout = None
    return head, classifier.in_channels


def one_feature(owner: str, head: nn.Module, output: Any) -> Tensor:
    """``output`` of a head by :func:`build_headless`, if it is one tensor.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(output, Tensor):
        return output
    raise ValueError(
        f'{owner} must be a decode head with one output; {type(head).__name__} returned '
        f'{type(output).__name__}'
    )
