"""The naive alternative to scale equalization: batch norm after upsampling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mmcv.cnn import ConvModule, build_norm_layer
from mmseg.registry import MODELS
from torch import nn


def _normalize_input(layer: nn.Module, inputs: tuple) -> tuple:
    x, *rest = inputs
    return (layer.input_norm(x), *rest)


def _child(head: nn.Module, name: str, kind: type, key: str) -> nn.Module:
    children = dict(head.named_modules())
    if isinstance(children.get(name), kind):
        return children[name]
    candidates = [n for n, m in children.items() if isinstance(m, kind)]
    raise ValueError(
        f"BatchNormAfterUpsampling: {key} names '{name}', which is no {kind.__name__} of "
        f'{type(head).__name__}; candidates: {", ".join(candidates) or "(none)"}'
    )


@MODELS.register_module('BatchNormAfterUpsampling')
def batch_norm_after_upsampling(
    head: str, layers: Sequence[str], branches: Sequence[str] = (), **kwargs
) -> nn.Module:
    """Any decode head with batch norm on the upsampled branches of its fusions.

    The paper compares with this alternative (arXiv 2402.01149, section 3.2). It changes the
    pipeline of a branch from conv - batch norm - ReLU - upsampling to conv - ReLU - upsampling -
    batch norm. This equalizes the branches as well, but costs a batch norm of the large,
    concatenated feature in every training step. One norm over the concatenation is one norm per
    branch, since batch norm treats each channel by itself.

    It is registered as a function, so that a config can change any head with three keys, in
    addition to the head's own arguments: ``decode_head=dict(type='BatchNormAfterUpsampling',
    head='UPerHead', layers=[...])``.

    Args:
        head: registered name of the head.
        layers: qualified names of the fusion convolutions in the head, e.g.
            ``['fpn_bottleneck.conv']``; :func:`mmseg_fusion.fusions.trace_fusions` lists them.
        branches: qualified names of the ``ConvModule`` at the end of each branch, whose norm is
            removed, e.g. ``['fpn_convs.0', 'bottleneck']``; it gets a bias instead. Empty: the norm
            after upsampling is added to the existing norms.
        **kwargs: arguments of the head; its ``norm_cfg`` is that of the norm after upsampling.

    Returns:
        The head, of its own class.

    Raises:
        ValueError: ``head`` is no name, a layer or branch is no convolution or ``ConvModule`` of
            the head (the candidates are listed), or the head has no norm.

    Example:
        >>> head = batch_norm_after_upsampling(
        ...     'mmseg.UPerHead',
        ...     layers=['fpn_bottleneck.conv'],
        ...     in_channels=[8, 16],
        ...     in_index=[0, 1],
        ...     channels=4,
        ...     num_classes=3,
        ...     pool_scales=(1, 2),
        ...     norm_cfg=dict(type='BN'),
        ... )
        >>> head.fpn_bottleneck.conv.input_norm.num_features
        8
    """
    if not isinstance(head, str):
        raise ValueError(
            "BatchNormAfterUpsampling: head must be the name of a head, e.g. 'UPerHead', and its "
            f'arguments stand beside it; got {head!r}'
        )
    built = MODELS.build(dict(type=head, **kwargs))
    norm_cfg = getattr(built, 'norm_cfg', None)
    if norm_cfg is None:
        raise ValueError(
            f'BatchNormAfterUpsampling: {type(built).__name__} has norm_cfg=None; set '
            "norm_cfg=dict(type='SyncBN', requires_grad=True)"
        )
    for name in branches:
        module = _child(built, name, ConvModule, 'branches')
        if module.with_norm:
            delattr(module, module.norm_name)
            module.with_norm = False
            module.norm_name = None
        if module.conv.bias is None:
            module.conv.bias = nn.Parameter(torch.zeros(module.conv.out_channels))
            module.with_bias = True
    for name in layers:
        layer = _child(built, name, nn.Conv2d, 'layers')
        layer.input_norm = build_norm_layer(norm_cfg, layer.in_channels)[1]
        layer.register_forward_pre_hook(_normalize_input)
    return built
