"""Spatial attention of a segmentation head: self, axial, and both of them channelized.

Ye Huang, "Context-aware Image Semantic Segmentation", doctoral thesis, University of Technology
Sydney, 2022, chapter 3; Huang et al., "Channelized Axial Attention", AAAI 2022, arXiv 2101.07434.
"""

from __future__ import annotations

import math
from typing import Any, Literal, Union

import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmengine.model import xavier_init
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .precision import without_autocast

Implementation = Literal['factorized', 'grouped']
Bias = Union[bool, Literal['auto']]

IMPLEMENTATIONS: tuple[str, ...] = ('factorized', 'grouped')

#: Batch norm as the method's authors set it, in PyTorch's sense of momentum.
BATCH_NORM = dict(type='BN', eps=1e-3, momentum=0.1)
RELU = dict(type='ReLU')


def _wide(query: Tensor, value: Tensor) -> torch.dtype:
    """Type that logits are computed in: float32, or float64 where an operand has it."""
    return torch.promote_types(torch.promote_types(query.dtype, value.dtype), torch.float32)


def attention_map(query: Tensor, key: Tensor, scale: float = 1.0) -> Tensor:
    """Weights ``softmax(scale * query key^T)`` (equations 3.2 to 3.4), in float32 or wider.

    Shape:
        query (..., L, D), key (..., M, D); result (..., L, M), each row sums to 1.
    """
    dtype = _wide(query, key)
    with without_autocast(query.device.type):
        return (scale * query.to(dtype) @ key.to(dtype).transpose(-2, -1)).softmax(-1)


def dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None = 1.0
) -> Tensor:
    """``softmax(scale * query key^T) value`` by PyTorch's fused attention.

    The thesis does not scale the logits. With 64 channels and values of 32 they already exceed the
    range of float16, and bfloat16 rounds a logit of 300 by 1. Logits, softmax and sum are therefore
    float32, under AMP as well; only the result is converted to the type of ``value``. Logits that
    are divided by ``sqrt(D)`` stay in the type of the operands, in which PyTorch's fused kernels
    are fastest.

    Args:
        query: (..., L, D).
        key: (..., M, D).
        value: (..., M, C); C may differ from D.
        scale: factor of the logits; None for ``1 / sqrt(D)``.

    Returns:
        (..., L, C) in the type of ``value``.
    """
    if scale is None:
        out = F.scaled_dot_product_attention(query.to(value.dtype), key.to(value.dtype), value)
        # Autocast narrows operands of float32.
        return out.to(value.dtype)
    dtype = _wide(query, value)
    # The function's own scale is 1 / sqrt(D); torch 2.0 has no argument to change it.
    query, key = query.to(dtype) * (scale * math.sqrt(query.shape[-1])), key.to(dtype)
    with without_autocast(query.device.type):
        out = F.scaled_dot_product_attention(query, key, value.to(dtype))
    return out.to(value.dtype)


class DotProductAttention(nn.Module):
    """Attention along the last-but-one axis of R independent lines, with heads.

    Args:
        num_heads: heads, over which the channels of query, key and value are split.
        scale: factor of the logits; None for 1 / sqrt(width of a head).

    Shape:
        query and key (N, R, L, D), value (N, R, L, C); result (N, R, L, C). A column pass has
        R = W and L = H, a row pass R = H and L = W, self-attention R = 1 and L = H W.
    """

    def __init__(self, num_heads: int = 1, scale: float | None = 1.0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = scale

    def _heads(self, x: Tensor) -> Tensor:
        """(N, R, L, heads * D) -> (N, R * heads, L, D): fused kernels take four axes."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(2, 3).flatten(1, 2)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attends; see the class for shapes."""
        if self.num_heads == 1:
            return dot_product_attention(query, key, value, self.scale)
        lines = query.shape[1]
        query, key, value = (self._heads(x) for x in (query, key, value))
        out = dot_product_attention(query, key, value, self.scale)
        return out.unflatten(1, (lines, self.num_heads)).transpose(2, 3).flatten(3)

    def extra_repr(self) -> str:
        return f'num_heads={self.num_heads}, scale={self.scale}'


class ChannelGate(nn.Sequential):
    """Channel attention of section 3.3.2.3: dense layers from C channels to C gates in (0, 1).

    ``layers`` hidden dense layers with leaky ReLU of slope 0.2, a last dense layer, a sigmoid; no
    biases, no norm. Weights start as Xavier uniform, as in the authors' code.

    Args:
        channels: C.
        hidden: width of the hidden layers.
        layers: number of hidden layers.

    Shape:
        (..., C) to (..., C).
    """

    def __init__(self, channels: int, hidden: int = 128, layers: int = 5) -> None:
        steps: list[nn.Module] = []
        for i in range(layers):
            steps.append(nn.Linear(hidden if i else channels, hidden, bias=False))
            steps.append(nn.LeakyReLU(0.2))
        super().__init__(*steps, nn.Linear(hidden, channels, bias=False), nn.Sigmoid())
        for step in self:
            if isinstance(step, nn.Linear):
                nn.init.xavier_uniform_(step.weight)


class ChannelizedAttention(nn.Module):
    """Attention whose terms are gated per channel before they are summed (section 3.3.2.2).

    With the weights A of one line's attention and the terms ``A[l, m] value[m]`` (equations 3.6 and
    3.7), the gate of position l is that of the mean of its terms over all lines and all m
    (equations 3.9 and 3.10), and the gated terms are summed over m (equation 3.11). The gate does
    not depend on m, so it can be moved out of the sum: with ``y0 = attention(...)`` the result is
    ``y0 * ChannelGate(mean over lines of y0 / L)``. The mean over m of the terms is y0 divided by
    the number of keys, the length of the axis that is summed over. No single term is computed.

    Args:
        channels: C, channels of the value.
        gate_channels: width of the gate's hidden layers.
        gate_layers: number of the gate's hidden layers.
        scale: factor of the logits; None for 1 / sqrt(D).

    Shape:
        query and key (N, R, L, D), value (N, R, L, C); result (N, R, L, C).

    Raises:
        ValueError: a number less than 1.
    """

    implementation: Implementation = 'factorized'

    def __init__(
        self,
        channels: int,
        gate_channels: int = 128,
        gate_layers: int = 5,
        scale: float | None = 1.0,
    ) -> None:
        super().__init__()
        _check_positive(gate_channels=gate_channels, gate_layers=gate_layers)
        self.gate = ChannelGate(channels, gate_channels, gate_layers)
        self.scale = scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attends; see the class for shapes."""
        out = dot_product_attention(query, key, value, self.scale)
        return out * self.gate(out.mean(1) / key.shape[-2]).unsqueeze(1)

    def extra_repr(self) -> str:
        return f'implementation={self.implementation!r}, scale={self.scale}'


class GroupedChannelizedAttention(ChannelizedAttention):
    """:class:`ChannelizedAttention` by the thesis' algorithm 2, with the same result.

    The terms, a tensor N x R x L x L x C, are computed for L / groups positions at a time. This
    form is slow; it is the reference for tests.

    Args:
        groups: number of groups.
        recompute: whether a group's terms are computed again in the backward pass. If not, autograd
            keeps the terms of every group, as in the authors' loop, and only inference needs the
            memory of a single group. If so, training needs only that memory, too.
        **kwargs: arguments of :class:`ChannelizedAttention`.

    Shape:
        As :class:`ChannelizedAttention`.

    Raises:
        ValueError: a number less than 1.

    Differs from the paper:
        Algorithm 2 pads the positions with zeros to a multiple of the groups and takes the padding
        away at the end; here the last group is shorter. Line 1 of the algorithm says ``H % G``,
        which does not make H divisible.
    """

    implementation = 'grouped'

    def __init__(self, *args: Any, groups: int = 16, recompute: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        _check_positive(groups=groups)
        self.groups = groups
        self.recompute = recompute

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attends; see the class for shapes."""
        scale = key.shape[-1] ** -0.5 if self.scale is None else self.scale
        weights = attention_map(query, key, scale).to(value.dtype)
        size = math.ceil(weights.shape[2] / self.groups)
        recompute = self.recompute and torch.is_grad_enabled()
        return torch.cat(
            [
                checkpoint(self._group, part, value, use_reentrant=False)
                if recompute
                else self._group(part, value)
                for part in weights.split(size, 2)
            ],
            2,
        )

    def _group(self, weights: Tensor, value: Tensor) -> Tensor:
        """(N, R, l, L) weights of l positions and (N, R, L, C) value -> (N, R, l, C)."""
        terms = weights.unsqueeze(-1) * value.unsqueeze(2)
        gate = self.gate(terms.mean((1, 3)))
        return (terms * gate[:, None, :, None]).sum(3).to(value.dtype)

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, groups={self.groups}, recompute={self.recompute}'


def _channelized(
    implementation: Implementation, grouping: dict[str, Any], *gate: Any
) -> ChannelizedAttention:
    """The form of :class:`ChannelizedAttention` that is asked for.

    Args:
        implementation: which.
        grouping: arguments of ``'grouped'`` alone. ``'factorized'`` makes no groups: there they are
            checked and do nothing, so that one key switches between the two.
        *gate: arguments of both.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f'implementation of the channelized attention must be one of {IMPLEMENTATIONS}, '
            f'got {implementation!r}'
        )
    if implementation == 'grouped':
        return GroupedChannelizedAttention(*gate, **grouping)
    _check_positive(groups=grouping.get('groups', 1))
    return ChannelizedAttention(*gate)


def _grouping(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Takes the arguments of :class:`GroupedChannelizedAttention` alone out of ``kwargs``."""
    return {key: kwargs.pop(key) for key in ('groups', 'recompute') if key in kwargs}


def _check_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f'{name} of the attention must be at least 1, got {number}')


def _check_heads(num_heads: int, channels: int, qk_channels: int) -> None:
    _check_positive(num_heads=num_heads, channels=channels, qk_channels=qk_channels)
    for name, number in (('channels', channels), ('qk_channels', qk_channels)):
        if number % num_heads:
            raise ValueError(f'{name}={number} of the attention is no multiple of {num_heads=}')


def _projection(
    in_channels: int,
    channels: int,
    bias: Bias,
    conv_cfg: dict | None,
    norm_cfg: dict | None,
    act_cfg: dict | None,
) -> ConvModule:
    module = ConvModule(
        in_channels,
        channels,
        1,
        bias=bias,
        conv_cfg=conv_cfg,
        norm_cfg=norm_cfg,
        act_cfg=act_cfg,
        inplace=False,
    )
    if norm_cfg is None:
        # No norm tames the scale of unscaled logits then: Kaiming's start would make the softmax
        # a one-hot. The authors' layers start as Xavier uniform.
        xavier_init(module.conv, distribution='uniform')
    return module


class QueryKey(nn.Module):
    """Query and key of an attention: 1x1 convolutions, one for both or one each.

    Two convolutions start from the same values, as in the authors' code.

    Args:
        in_channels: channels of the input.
        channels: channels of query and key.
        share: query and key are the same.
        bias: bias of the convolutions; ``'auto'``: if there is no norm.
        conv_cfg: config of the convolutions.
        norm_cfg: config of the norm.
        act_cfg: config of the activation.

    Shape:
        Input (N, in_channels, H, W); two outputs (N, channels, H, W).
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        share: bool = True,
        bias: Bias = 'auto',
        conv_cfg: dict | None = None,
        norm_cfg: dict | None = BATCH_NORM,
        act_cfg: dict | None = RELU,
    ) -> None:
        super().__init__()
        self.query = _projection(in_channels, channels, bias, conv_cfg, norm_cfg, act_cfg)
        self.key = None
        if not share:
            self.key = _projection(in_channels, channels, bias, conv_cfg, norm_cfg, act_cfg)
            self.key.load_state_dict(self.query.state_dict())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Query and key of ``x``."""
        query = self.query(x)
        return query, query if self.key is None else self.key(x)


def _pixels(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, 1, H W, C)."""
    # Not flatten(2).transpose(1, 2): for a batch of one image its backward gives strides with
    # which batch norm's gradient is wrong on CPU (torch 2.13).
    return x.permute(0, 2, 3, 1).flatten(1, 2).unsqueeze(1)


def _columns(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, W, H, C)."""
    return x.permute(0, 3, 2, 1)


def _rows(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, H, W, C)."""
    return x.permute(0, 2, 3, 1)


class SelfAttention(nn.Module):
    """Self-attention of all pixels (thesis, equations 3.1 and 3.2), without residual.

    Args:
        in_channels: channels of the input.
        channels: channels of the value and of the result.
        qk_channels: channels of query and key, all heads together.
        num_heads: heads.
        share_qk: query and key are one convolution, as in chapter 3.
        scale: factor of the logits; None for 1 / sqrt(width of a head). The thesis does not
            divide.
        bias: bias of the 1x1 convolutions; ``'auto'``: if there is no norm.
        conv_cfg: config of the 1x1 convolutions.
        norm_cfg: config of their norm, taken as it is; default: batch norm with eps 1e-3.
        act_cfg: config of their activation.

    Shape:
        Input (N, in_channels, H, W), result (N, channels, H, W).

    Raises:
        ValueError: channels are no multiple of the heads, or a number is less than 1.

    Example:
        >>> attention = SelfAttention(32, channels=16, qk_channels=8)
        >>> attention(torch.rand(2, 32, 9, 7)).shape
        torch.Size([2, 16, 9, 7])
    """

    def __init__(
        self,
        in_channels: int,
        channels: int = 512,
        qk_channels: int = 64,
        num_heads: int = 1,
        share_qk: bool = True,
        scale: float | None = 1.0,
        bias: Bias = 'auto',
        conv_cfg: dict | None = None,
        norm_cfg: dict | None = BATCH_NORM,
        act_cfg: dict | None = RELU,
    ) -> None:
        super().__init__()
        _check_heads(num_heads, channels, qk_channels)
        layer = (bias, conv_cfg, norm_cfg, act_cfg)
        self.query_key = QueryKey(in_channels, qk_channels, share_qk, *layer)
        self.value = _projection(in_channels, channels, *layer)
        self.attention: nn.Module = DotProductAttention(num_heads, scale)

    def forward(self, x: Tensor) -> Tensor:
        """Attends over ``x`` (N, in_channels, H, W)."""
        query, key = self.query_key(x)
        out = self.attention(_pixels(query), _pixels(key), _pixels(self.value(x)))
        return out.squeeze(1).transpose(1, 2).unflatten(2, x.shape[2:])


class AxialAttention(nn.Module):
    """Axial attention: along the columns, then along the rows of that result (equation 3.5).

    Query and key of both passes come from the input. The value is computed once; the value of the
    row pass is the result of the column pass. No residual, no norm in between.

    Args:
        in_channels: channels of the input.
        channels: channels of the value and of the result.
        qk_channels: channels of query and key, all heads together.
        num_heads: heads.
        share_qk: query and key of a pass are one convolution (equations 3.3 and 3.4).
        share_axes: both passes use the same query and key; in the thesis each pass has its own.
        scale: factor of the logits; None for 1 / sqrt(width of a head). The thesis does not
            divide.
        bias: bias of the 1x1 convolutions; ``'auto'``: if there is no norm.
        conv_cfg: config of the 1x1 convolutions.
        norm_cfg: config of their norm, taken as it is; default: batch norm with eps 1e-3.
        act_cfg: config of their activation.

    Shape:
        Input (N, in_channels, H, W), result (N, channels, H, W).

    Raises:
        ValueError: channels are no multiple of the heads, or a number is less than 1.

    Example:
        >>> attention = AxialAttention(32, channels=16, qk_channels=8)
        >>> attention(torch.rand(2, 32, 9, 7)).shape
        torch.Size([2, 16, 9, 7])
    """

    def __init__(
        self,
        in_channels: int,
        channels: int = 512,
        qk_channels: int = 64,
        num_heads: int = 1,
        share_qk: bool = True,
        share_axes: bool = False,
        scale: float | None = 1.0,
        bias: Bias = 'auto',
        conv_cfg: dict | None = None,
        norm_cfg: dict | None = BATCH_NORM,
        act_cfg: dict | None = RELU,
    ) -> None:
        super().__init__()
        _check_heads(num_heads, channels, qk_channels)
        layer = (bias, conv_cfg, norm_cfg, act_cfg)
        self.column_query_key = QueryKey(in_channels, qk_channels, share_qk, *layer)
        self.row_query_key = None
        if not share_axes:
            self.row_query_key = QueryKey(in_channels, qk_channels, share_qk, *layer)
        self.value = _projection(in_channels, channels, *layer)
        self.column_attention: nn.Module = DotProductAttention(num_heads, scale)
        self.row_attention: nn.Module = DotProductAttention(num_heads, scale)

    def forward(self, x: Tensor) -> Tensor:
        """Attends over ``x`` (N, in_channels, H, W)."""
        column = self.column_query_key(x)
        row = column if self.row_query_key is None else self.row_query_key(x)
        return self.row_pass(*row, self.column_pass(*column, self.value(x)))

    def column_pass(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention along H; query and key (N, qk_channels, H, W), value (N, channels, H, W)."""
        out = self.column_attention(_columns(query), _columns(key), _columns(value))
        return out.permute(0, 3, 2, 1)

    def row_pass(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention along W; shapes as in :meth:`column_pass`."""
        out = self.row_attention(_rows(query), _rows(key), _rows(value))
        return out.permute(0, 3, 1, 2)


class ChannelizedSelfAttention(SelfAttention):
    """Self-attention with a channel gate inside the sum, per pixel (thesis, section 3.4.2.2).

    The gate of a pixel sees the mean of the pixel's own terms, its attention result divided by
    H W.

    Args:
        in_channels: channels of the input.
        channels: channels of the value and of the result.
        qk_channels: channels of query and key.
        gate_channels: width of the gate's hidden layers; the thesis has a quarter of ``channels``.
        gate_layers: number of the gate's hidden layers.
        implementation: ``'factorized'``, or ``'grouped'`` for the thesis' algorithm 2; see
            :class:`GroupedChannelizedAttention`.
        scale: as in :class:`SelfAttention`.
        **kwargs: other arguments of :class:`SelfAttention`, except ``num_heads``; ``groups`` and
            ``recompute`` of :class:`GroupedChannelizedAttention`.

    Shape:
        Input (N, in_channels, H, W), result (N, channels, H, W).

    Raises:
        ValueError: an unknown ``implementation``, or a number less than 1.

    Example:
        >>> attention = ChannelizedSelfAttention(32, channels=16, qk_channels=8, gate_channels=4)
        >>> attention(torch.rand(2, 32, 9, 7)).shape
        torch.Size([2, 16, 9, 7])
    """

    def __init__(
        self,
        in_channels: int,
        channels: int = 512,
        qk_channels: int = 64,
        gate_channels: int = 128,
        gate_layers: int = 5,
        implementation: Implementation = 'factorized',
        scale: float | None = 1.0,
        **kwargs: Any,
    ) -> None:
        grouping = _grouping(kwargs)
        super().__init__(in_channels, channels, qk_channels, num_heads=1, scale=scale, **kwargs)
        gate = (channels, gate_channels, gate_layers, scale)
        self.attention = _channelized(implementation, grouping, *gate)


class ChannelizedAxialAttention(AxialAttention):
    """Axial attention with channel gates inside both sums (thesis, equations 3.6 to 3.11).

    The column pass has a gate per row, (N, H, C), that sees the mean of that row's terms; the row
    pass has a gate per column, (N, W, C). The thesis' cost, a tensor of N x H x H x W x C, is
    avoided by an exact identity: see :class:`ChannelizedAttention`.

    Args:
        in_channels: channels of the input.
        channels: channels of the value and of the result.
        qk_channels: channels of query and key.
        gate_channels: width of the gates' hidden layers; the thesis has a quarter of ``channels``.
        gate_layers: number of the gates' hidden layers (table 3.1).
        implementation: ``'factorized'``, or ``'grouped'`` for the thesis' algorithm 2; see
            :class:`GroupedChannelizedAttention`.
        scale: as in :class:`AxialAttention`.
        **kwargs: other arguments of :class:`AxialAttention`, except ``num_heads``; ``groups`` and
            ``recompute`` of :class:`GroupedChannelizedAttention`.

    Shape:
        Input (N, in_channels, H, W), result (N, channels, H, W).

    Raises:
        ValueError: an unknown ``implementation``, or a number less than 1.

    Differs from the paper:
        Equations 3.9 and 3.10 show one hidden layer with ReLU; the text of section 3.3.2.3 and the
        authors' code have five with leaky ReLU.

    Example:
        >>> attention = ChannelizedAxialAttention(32, channels=16, qk_channels=8, gate_channels=4)
        >>> attention(torch.rand(2, 32, 9, 7)).shape
        torch.Size([2, 16, 9, 7])
    """

    def __init__(
        self,
        in_channels: int,
        channels: int = 512,
        qk_channels: int = 64,
        gate_channels: int = 128,
        gate_layers: int = 5,
        implementation: Implementation = 'factorized',
        scale: float | None = 1.0,
        **kwargs: Any,
    ) -> None:
        grouping = _grouping(kwargs)
        super().__init__(in_channels, channels, qk_channels, num_heads=1, scale=scale, **kwargs)
        gate = (channels, gate_channels, gate_layers, scale)
        self.column_attention = _channelized(implementation, grouping, *gate)
        self.row_attention = _channelized(implementation, grouping, *gate)
