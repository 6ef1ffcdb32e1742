"""Decode head of densely connected atrous spatial pyramid pooling (DenseASPP).

Yang et al., "DenseASPP for Semantic Segmentation in Street Scenes", CVPR 2018, section 3; a
baseline of GFF (AAAI 2020, arXiv 1904.01803).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmcv.cnn import ConvModule, build_activation_layer
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.registry import MODELS
from torch import Tensor, nn

from ..layers.single_value import explains_single_values


@MODELS.register_module()
@explains_single_values
class DenseASPPHead(BaseDecodeHead):
    """Dilated branches, each of which sees the input and all earlier branches (equation 3).

    A branch is norm, activation, 1x1 convolution to ``bottleneck_channels``, norm, activation,
    dilated 3x3 convolution to ``branch_channels``, dropout. Its input is the concatenation of the
    head's input and the outputs of the branches before it. The paper classifies the concatenation
    of the input and all branches with a 1x1 convolution; so does this head with ``channels=None``.

    As in the authors' code, the activation comes first, so that branches and classifier see an
    input without negative values. The first branch has no norm, because the backbone's features are
    already normalized.

    Args:
        in_channels: channels of the level, or of the levels that ``input_transform`` joins.
        channels: None: the classifier takes the concatenation, as in the paper. A number: a 1x1
            convolution with norm and activation reduces the concatenation to so many channels.
            Class-aware regularization needs such a convolution in front of the classifier.
        dilations: rates of the branches, in cells of the level; the paper's are those for output
            stride 8.
        reduced_channels: channels to which a 1x1 convolution with norm and activation reduces the
            input, or None for no reduction. In the authors' DenseNets the transition behind the
            fourth dense block does this, to half the channels: 512 for DenseNet-121, 1104 for 161.
        bottleneck_channels: of the 1x1 convolutions; None for half of the (reduced) input, as in
            section 3.3.
        branch_channels: of each branch's output; None for an eighth of the (reduced) input, as in
            section 3.3.
        branch_dropout_ratio: dropout of whole channels of a branch's output; None for
            ``dropout_ratio``, the dropout in front of the classifier. The authors use 0.1 in both
            places.
        **kwargs: of :class:`mmseg.models.decode_heads.decode_head.BaseDecodeHead`.

    Shape:
        Input (N, C, H, W) at ``in_index``; logits (N, out_channels, H, W).

    Raises:
        ValueError: a rate or a number of channels is not positive, a ratio is out of range, or
            ``input_transform`` joins nothing.

    Differs from the paper: ``channels``, when given, and ``reduced_channels`` (see above). Differs
    from the authors' code: convolutions have no bias where there are norms; the norms and the
    classifier's bias compensate for it. Their configurations differ from section 3.3:
    (``bottleneck_channels``, ``branch_channels``) is (128, 64) for DenseNet-121, (512, 128) for
    161, (336, 168) for 169 and (480, 240) for 201; and the momentum of their branches' batch norms
    is 0.0003, here that of ``norm_cfg``.

    Example:
        >>> head = DenseASPPHead(in_channels=32, channels=8, num_classes=4, dilations=(2, 3))
        >>> head([torch.rand(2, 32, 9, 7)]).shape
        torch.Size([2, 4, 9, 7])
    """

    def __init__(
        self,
        in_channels: int | Sequence[int],
        channels: int | None = None,
        *,
        dilations: Sequence[int] = (3, 6, 12, 18, 24),
        reduced_channels: int | None = None,
        bottleneck_channels: int | None = None,
        branch_channels: int | None = None,
        branch_dropout_ratio: float | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.get('input_transform') == 'multiple_select':
            raise ValueError(
                "DenseASPPHead takes one feature: input_transform is None or 'resize_concat', but "
                "got 'multiple_select'; change model.decode_head.input_transform"
            )
        joined = in_channels if isinstance(in_channels, int) else sum(in_channels)
        width = joined if reduced_channels is None else reduced_channels
        if bottleneck_channels is None:
            bottleneck_channels = width // 2
        if branch_channels is None:
            branch_channels = width // 8
        rates = tuple(dilations)
        for name, values in (
            ('dilations', rates),
            ('reduced_channels', (width,)),
            ('bottleneck_channels', (bottleneck_channels,)),
            ('branch_channels', (branch_channels,)),
            ('channels', (1 if channels is None else channels,)),
        ):
            if not values or not all(isinstance(v, int) and v > 0 for v in values):
                raise ValueError(
                    f'DenseASPPHead: {name} must be positive, but got {values} for an input of '
                    f'{joined} channels; change model.decode_head.{name}'
                )
        concatenated = width + len(rates) * branch_channels
        super().__init__(in_channels, concatenated if channels is None else channels, **kwargs)
        if branch_dropout_ratio is None:
            branch_dropout_ratio = self.dropout_ratio
        if not 0 <= branch_dropout_ratio <= 1:
            raise ValueError(
                'DenseASPPHead: branch_dropout_ratio is from 0 to 1, but got '
                f'{branch_dropout_ratio}; change model.decode_head.branch_dropout_ratio'
            )
        parts = dict(conv_cfg=self.conv_cfg, norm_cfg=self.norm_cfg, act_cfg=self.act_cfg)
        # What these activations read is the backbone's feature or, without norms, the
        # concatenation: never in place.
        act_cfg = self.act_cfg and {k: v for k, v in self.act_cfg.items() if k != 'inplace'}
        first = dict(
            parts,
            act_cfg=act_cfg,
            order=('norm', 'act', 'conv'),
            inplace=False,
            bias=self.norm_cfg is None,
        )
        if reduced_channels is not None:
            self.entry = ConvModule(joined, width, 1, **parts)
        else:
            self.entry = build_activation_layer(act_cfg) if act_cfg else nn.Identity()
        self.branches = nn.ModuleList()
        for i, rate in enumerate(rates):
            own = dict(first, norm_cfg=None, act_cfg=None) if i == 0 else first
            self.branches.append(
                nn.Sequential(
                    ConvModule(width + i * branch_channels, bottleneck_channels, 1, **own),
                    ConvModule(
                        bottleneck_channels,
                        branch_channels,
                        3,
                        padding=rate,
                        dilation=rate,
                        **first,
                    ),
                    nn.Dropout2d(branch_dropout_ratio),
                )
            )
        self.bottleneck = None
        if channels is not None:
            self.bottleneck = ConvModule(concatenated, channels, 1, **parts)

    def _forward_feature(self, inputs: Sequence[Tensor]) -> Tensor:
        """What the classifier sees, (N, channels, H, W)."""
        x = self.entry(self._transform_inputs(inputs))
        for branch in self.branches:
            x = torch.cat([x, branch(x)], dim=1)
        return x if self.bottleneck is None else self.bottleneck(x)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Logits (N, out_channels, H, W)."""
        return self.cls_seg(self._forward_feature(inputs))
