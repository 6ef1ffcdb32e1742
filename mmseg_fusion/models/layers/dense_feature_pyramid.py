"""Dense feature pyramid (DFP) behind gated fully fusion.

Li et al., "Gated Fully Fusion for Semantic Segmentation", AAAI 2020, arXiv 1904.01803.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from mmcv.cnn import ConvModule
from torch import Tensor, nn

from .levels import resize_to

Form = Literal['conv', 'dilated']


def stack_features(features: Sequence[Tensor], like: Tensor, align_corners: bool) -> Tensor:
    """The features, resized bilinearly to the size of ``like``, along the channels.

    Shape:
        Tensors (N, C_i, H_i, W_i) and ``like`` (N, C, H, W) to (N, sum of C_i, H, W).
    """
    return torch.cat([resize_to(x, like.shape[2:], align_corners) for x in features], 1)


class DenseFeaturePyramid(nn.Module):
    r"""Densely connected levels, from the context down to the finest (equation 6).

    - ``form='conv'``, the paper: :math:`y_i = H_i([y_0, \tilde X_1, ..., \tilde X_{i-1}])` with the
      context :math:`y_0`, the fused levels top-down, and a single convolution (with norm and
      activation) for each :math:`H_i`, from i = 1 to L + 1. Chosen: up to L + 1, since with L the
      finest level would not be used; and 1x1, since table 3 reports 0.8 M parameters for the whole
      module, and a single 3x3 convolution would have more.
    - ``form='dilated'``, the authors' code: :math:`y_i = D_{3i}([y_1, ..., y_{i-1}, \tilde X_i])`
      with the fused levels top-down, the first of them the context, and :math:`D_r` = norm,
      activation, 1x1 convolution, norm, activation, 3x3 convolution of dilation r, both with bias.

    All inputs are first resized bilinearly to the size of the finest level, and every y has that
    size. A dilation of r is thus r cells of the finest level. For ``'dilated'`` the authors' code
    has this size. For ``'conv'`` the paper does not name the size, and the finest was chosen.
    Equation 6 concatenates all levels, which requires one size, and the code takes the finest. The
    costs in table 3 agree: per added parameter, DFP costs 6.5 times as much as GFF, and most of
    GFF's parameters are at stride 8, with a quarter of the cells of the finest level. If each
    :math:`H_i` had the size of the finest level that enters it, DFP would cost as much per
    parameter as GFF.

    Args:
        channels: of the fused levels and of each y.
        num_levels: number L of fused levels.
        context_channels: channels of :math:`y_0`; ``'dilated'`` takes none.
        form: see above.
        align_corners: of the resizing.
        conv_cfg, norm_cfg, act_cfg: of every convolution.

    Shape:
        - context: (N, context_channels, H, W).
        - levels: L tensors (N, channels, H_l, W_l), finest first.
        - output: the :math:`y_i` (N, channels, H_1, W_1), L + 1 for ``'conv'``, L for
          ``'dilated'``.

    Raises:
        ValueError: an unknown ``form``.

    Example:
        >>> pyramid = DenseFeaturePyramid(8, num_levels=2, context_channels=16)
        >>> levels = [torch.rand(2, 8, 16, 16), torch.rand(2, 8, 8, 8)]
        >>> [tuple(y.shape) for y in pyramid(torch.rand(2, 16, 8, 8), levels)]
        [(2, 8, 16, 16), (2, 8, 16, 16), (2, 8, 16, 16)]
    """

    def __init__(
        self,
        channels: int,
        num_levels: int,
        context_channels: int,
        form: Form = 'conv',
        align_corners: bool = False,
        conv_cfg: dict | None = None,
        norm_cfg: dict | None = dict(type='BN'),  # noqa: B006
        act_cfg: dict | None = dict(type='ReLU'),  # noqa: B006
    ) -> None:
        super().__init__()
        if form not in get_args(Form):
            raise ValueError(
                f'form of the dense feature pyramid must be one of {get_args(Form)}, got {form!r}'
            )
        self.form = form
        self.align_corners = align_corners
        conv = dict(conv_cfg=conv_cfg, norm_cfg=norm_cfg, act_cfg=act_cfg)
        self.layers = nn.ModuleList()
        if form == 'conv':
            self.num_outs = num_levels + 1
            for i in range(self.num_outs):
                self.layers.append(ConvModule(context_channels + i * channels, channels, 1, **conv))
            return
        self.num_outs = num_levels
        before = dict(order=('norm', 'act', 'conv'), bias=True, **conv)
        with warnings.catch_warnings():
            # mmcv finds a bias beside a norm needless, also where the norm comes first.
            warnings.filterwarnings('ignore', 'Unnecessary conv bias', UserWarning)
            for i in range(self.num_outs):
                rate = 3 * (i + 1)
                self.layers.append(
                    nn.Sequential(
                        ConvModule((i + 1) * channels, channels, 1, **before),
                        ConvModule(channels, channels, 3, padding=rate, dilation=rate, **before),
                    )
                )

    def forward(self, context: Tensor | None, levels: Sequence[Tensor]) -> list[Tensor]:
        """The :math:`y_i`, coarsest first; see the class for shapes."""
        outs: list[Tensor] = []
        size = levels[0].shape[2:]
        seen = [resize_to(x, size, self.align_corners) for x in levels[::-1]]
        if self.form == 'conv':
            seen.insert(0, resize_to(context, size, self.align_corners))
        for i, layer in enumerate(self.layers):
            # Equation 6 has no y on its right side, the authors' code has no level but one.
            parts = seen[: i + 1] if self.form == 'conv' else [*outs, seen[i]]
            outs.append(layer(torch.cat(parts, 1)))
        return outs

    def extra_repr(self) -> str:
        return f'form={self.form!r}'
