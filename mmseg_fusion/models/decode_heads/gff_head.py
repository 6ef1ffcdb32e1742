"""Decode head of GFF: context, gated fully fusion, dense feature pyramid, classifier.

Li et al., "Gated Fully Fusion for Semantic Segmentation", AAAI 2020, arXiv 1904.01803.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

from mmcv.cnn import ConvModule
from mmengine.logging import print_log
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.registry import MODELS
from mmseg.utils import ConfigType, SampleList
from torch import Tensor, nn

from ..layers.dense_feature_pyramid import DenseFeaturePyramid, Form, stack_features
from ..layers.headless import build_headless, feature_of, with_levels
from ..layers.levels import check_levels
from ..layers.single_value import explains_single_values
from ..necks.gated_fully_fusion import TOP_DOWN


@MODELS.register_module()
@explains_single_values
class GFFHead(BaseDecodeHead):
    """GFFNet behind any backbone (figure 3).

    The context :math:`y_0` is computed from the last level by another decode head without its
    classifier, such as pyramid pooling or ASPP.
    :class:`~mmseg_fusion.models.necks.GatedFullyFusion` fuses the levels. With ``dfp``, the
    :class:`~mmseg_fusion.models.layers.DenseFeaturePyramid` takes both. The results are resized to
    the finest level, concatenated, and classified. The fusion is part of the head, because a neck
    would hide the backbone's levels from the context and from the auxiliary head.

    Args:
        neck: arguments of ``GatedFullyFusion`` (or, with ``type``, another neck with its
            interface): ``dict(fusion='concat')`` gives the row "concat" of table 1.
            ``in_channels``, ``channels``, ``align_corners`` and the configs of the layers default
            to those of the head.
        context: config of the decode head that gives :math:`y_0`, without its classifier, dropout
            and loss. Its ``in_index`` counts the backbone's levels and defaults to the last level
            that is fused, from which negative numbers count; ``in_channels`` follows from it if the
            level is fused; ``channels`` and the rest default to the head's. The paper takes
            PSPNet's context.
        fuse_context: whether the context is also the last level of the fusion. ``'auto'``: for FPN
            and gated FPN, which the paper therefore runs over five levels.
        dfp: None, ``'conv'`` (equation 6) or ``'dilated'`` (the authors' code, which needs
            ``fuse_context=True``).
        num_convs: convolutions between the concatenation and the classifier.
        kernel_size: of these.
        **kwargs: arguments of ``BaseDecodeHead``; ``channels`` is the width of the fusion and of
            the convolutions before the classifier. ``neck=dict(channels=...)`` is the width of the
            fusion alone; the authors' code has 128 there and 256 here. ``conv_cfg`` is the kind of
            all convolutions except the gates and the classifier.

    Shape:
        Inputs: the backbone's levels (N, C_l, H_l, W_l), finest first, of which ``in_index`` lists
        those that are fused. Logits (N, num_classes, H_1, W_1) at the size of the finest of them.

    Raises:
        ValueError: an option that is none of the above, ``dfp='dilated'`` without the context in
            the fusion, or an error of a part.

    Chosen: one 1x1 convolution with norm and activation between the concatenation and the
    classifier. The paper speaks only of the concatenation, and the authors' code has two 3x3
    convolutions there (``num_convs=2, kernel_size=3``), which would cost more than table 3 reports.
    Without ``dfp`` the context and the fused levels are concatenated (chosen).

    The checkpoint of a model whose head has the type of ``context`` can be loaded, since the
    ablation of table 1 starts from a trained PSPNet. Its head's weights are loaded into the
    context; the rest starts from new weights.

    Example:
        >>> head = GFFHead(
        ...     in_channels=[16, 32],
        ...     channels=8,
        ...     num_classes=4,
        ...     context=dict(type='PSPHead', channels=8, pool_scales=(1, 2)),
        ...     dfp='conv',
        ... )
        >>> head([torch.rand(2, 16, 16, 16), torch.rand(2, 32, 8, 8)]).shape
        torch.Size([2, 4, 16, 16])
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int,
        *,
        neck: dict | None = None,
        context: dict = dict(type='PSPHead', channels=512, pool_scales=(1, 2, 3, 6)),  # noqa: B006
        fuse_context: bool | Literal['auto'] = 'auto',
        dfp: Form | None = None,
        num_convs: int = 1,
        kernel_size: int = 1,
        in_index: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        in_index = check_levels('GFFHead', in_channels, in_index, kwargs)
        super().__init__(
            in_channels=in_channels,
            channels=channels,
            in_index=in_index,
            input_transform='multiple_select',
            **kwargs,
        )
        _check_options(neck, fuse_context, dfp, num_convs, kernel_size)
        neck = dict(neck or {})
        if fuse_context == 'auto':
            fuse_context = neck.get('fusion', 'gff') in TOP_DOWN
        self.fuse_context = fuse_context
        context_channels = self._build_context(context)
        levels = [*self.in_channels, context_channels] if fuse_context else self.in_channels
        self._build_neck(neck, levels)
        self._build_pyramid(dfp, len(levels), context_channels)
        self._build_final(len(levels), context_channels, num_convs, kernel_size)

    @property
    def _layer(self) -> dict:
        """Kinds of convolution, norm and activation of every layer."""
        return dict(conv_cfg=self.conv_cfg, norm_cfg=self.norm_cfg, act_cfg=self.act_cfg)

    def _build_context(self, cfg: dict) -> int:
        """``context``, which sees the backbone's levels; channels of its feature."""
        owner = 'GFFHead: context'
        self.context, channels = build_headless(
            owner,
            with_levels(owner, cfg, self.in_index, self.in_channels),
            channels=self.channels,
            num_classes=self.num_classes,
            ignore_index=self.ignore_index,
            out_channels=self.out_channels,
            threshold=self.threshold,
            align_corners=self.align_corners,
            init_cfg=None,
            **self._layer,
        )
        return channels

    def _build_neck(self, cfg: dict, levels: Sequence[int]) -> None:
        """``neck``, which fuses levels of these channels."""
        defaults = dict(
            type='GatedFullyFusion',
            in_channels=levels,
            channels=self.channels,
            align_corners=self.align_corners,
            **self._layer,
        )
        self.neck = MODELS.build({**defaults, **cfg})

    def _build_pyramid(self, form: Form | None, num_levels: int, context_channels: int) -> None:
        """``pyramid`` over the context and the fused levels, None where none is wanted.

        Raises:
            ValueError: the form of the authors' code, which begins with the fused context, where
                that is not fused.
        """
        self.pyramid = None
        if form is None:
            return
        if form == 'dilated' and not self.fuse_context:
            raise ValueError(
                "GFFHead: dfp='dilated' begins with the fused context: set fuse_context=True"
            )
        self.pyramid = DenseFeaturePyramid(
            self.neck.channels,
            num_levels,
            context_channels,
            form,
            self.align_corners,
            **self._layer,
        )

    def _build_final(
        self, num_levels: int, context_channels: int, num_convs: int, kernel_size: int
    ) -> None:
        """``final``, the convolutions between the concatenation and the classifier.

        Without any the classifier itself, ``conv_seg``, takes the concatenation.
        """
        # What is concatenated: see _forward_feature.
        width = self.neck.channels
        if self.pyramid is None:
            total = num_levels * width + (0 if self.fuse_context else context_channels)
        else:
            total = self.pyramid.num_outs * width
            total += width if self.pyramid.form == 'dilated' else 0
        self.final = nn.Sequential(
            *(
                ConvModule(
                    self.channels if i else total,
                    self.channels,
                    kernel_size,
                    padding=kernel_size // 2,
                    **self._layer,
                )
                for i in range(num_convs)
            )
        )
        if not num_convs:
            self.conv_seg = nn.Conv2d(total, self.out_channels, 1)

    def _forward_feature(
        self, inputs: Sequence[Tensor], samples: SampleList | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What the classifier sees, at the size of the finest level; losses of the context."""
        levels = self._transform_inputs(inputs)
        context, losses = feature_of('GFFHead: context', self.context, inputs, samples=samples)
        if self.fuse_context:
            levels = [*levels, context]
        fused, reduced = self.neck(levels, with_reduced=True)
        if self.pyramid is None:
            outs = [*fused] if self.fuse_context else [context, *fused]
        else:
            outs = self.pyramid(context, fused)
            if self.pyramid.form == 'dilated':
                # In the order of the authors' code: its checkpoints can be read.
                outs.insert(1, reduced[-1])
        return self.final(stack_features(outs, fused[0], self.align_corners)), losses

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Logits (N, num_classes, H_1, W_1)."""
        feature, _ = self._forward_feature(inputs)
        return self.cls_seg(feature)

    def feature_and_losses(
        self, inputs: Sequence[Tensor], batch_data_samples: SampleList
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The input of the classifier, and the losses of the context."""
        return self._forward_feature(inputs, batch_data_samples)

    def loss(
        self, inputs: Sequence[Tensor], batch_data_samples: SampleList, train_cfg: ConfigType
    ) -> dict[str, Tensor]:
        """The losses of the logits, and the context's own, whose names begin with ``context_``."""
        feature, losses = self.feature_and_losses(inputs, batch_data_samples)
        return {**self.loss_by_feat(self.cls_seg(feature), batch_data_samples), **losses}

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        _adopt_context(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _check_options(
    neck: dict | None,
    fuse_context: bool | Literal['auto'],
    dfp: Form | None,
    num_convs: int,
    kernel_size: int,
) -> None:
    """Raises:
    ValueError: an argument of GFFHead is none of what it takes.
    """
    if num_convs < 0 or kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(
            'GFFHead: num_convs must not be negative and kernel_size odd, got '
            f'{num_convs=}, {kernel_size=}'
        )
    if dfp not in (None, *get_args(Form)):
        raise ValueError(
            f'GFFHead: dfp must be None (without) or one of {get_args(Form)}, got {dfp!r}'
        )
    if neck is not None and not isinstance(neck, dict):
        raise ValueError(
            f"GFFHead: neck must be a dict of arguments, such as dict(fusion='gff'), got {neck!r}"
        )
    if fuse_context not in ('auto', True, False):
        raise ValueError(
            f"GFFHead: fuse_context must be 'auto', True or False, got {fuse_context!r}"
        )


def _adopt_context(head: GFFHead, state_dict: dict, prefix: str) -> None:
    """Gives the weights of a plain head of the context's type to the context."""
    if any(key.startswith(f'{prefix}context.') for key in state_dict):
        return
    present = [key for key in head.context.state_dict() if f'{prefix}{key}' in state_dict]
    # Old checkpoints have no counters. A context without weights has nothing to adopt.
    needed = {key for key in head.context.state_dict() if 'num_batches_tracked' not in key}
    if not needed or not needed.issubset(present):
        return
    for key in present:
        state_dict[f'{prefix}context.{key}'] = state_dict.pop(f'{prefix}{key}')
    for name in ('weight', 'bias'):
        # The classifier saw other features.
        state_dict.pop(f'{prefix}conv_seg.{name}', None)
    print_log(
        f'GFFHead: the weights of a {type(head.context).__name__} go to {prefix}context; fusion '
        'and classifier start fresh',
        logger='current',
    )
