"""Decode head of channelized axial attention (CAA)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from mmcv.cnn import ConvModule
from mmseg.models.utils import SELayer
from mmseg.registry import MODELS
from torch import Tensor, nn

from ..layers.attention import (
    BATCH_NORM,
    IMPLEMENTATIONS,
    AxialAttention,
    ChannelizedAxialAttention,
    ChannelizedSelfAttention,
    Implementation,
    SelfAttention,
)
from ..layers.single_value import explains_single_values
from .deeplab_parts import DeepLabParts

Attention = Literal['channelized_axial', 'axial', 'axial_se', 'channelized_self', 'self']


def with_authors_eps(norm_cfg: dict | None) -> dict | None:
    """Adds the authors' eps of 1e-3 to ``norm_cfg``, if that is a batch norm without an eps.

    Their momentum, 0.1 as PyTorch writes it, is PyTorch's default.
    """
    if not norm_cfg or 'eps' in norm_cfg or 'BN' not in str(norm_cfg.get('type')):
        return norm_cfg
    return dict(norm_cfg, eps=BATCH_NORM['eps'])


@MODELS.register_module()
@explains_single_values
class CAAHead(DeepLabParts):
    """Head with channelized axial attention (thesis chapter 3, figure 3.5).

    The head has two branches. The first is a 3x3 convolution, the attention, and a 1x1 convolution,
    all with ``attention_channels``. The second is the image level: the global mean of the
    backbone's feature and a 1x1 convolution. Both are concatenated; a 1x1 convolution to
    ``channels``, dropout and the classifier follow. ``c1_in_channels`` adds the simple decoder of
    table 3.7, that of DeepLabV3+: a 1x1 convolution of the stride-4 level is concatenated with the
    upsampled feature, and two depthwise separable 3x3 convolutions follow.

    Joint pyramid upsampling is a neck (mmseg's ``JPU``) and an auxiliary loss is another head
    (``FCNHead``); both are set in the config.

    Args:
        channels: channels before the classifier; ``BaseDecodeHead`` takes it by this name too.
        attention: ``'channelized_axial'`` (CAA), ``'axial'`` and ``'axial_se'`` (tables 3.1 and
            3.2, the latter with squeeze and excitation behind the attention), or
            ``'channelized_self'`` and ``'self'`` (table 3.3).
        attention_channels: channels of the attention, of the convolutions around it and of the
            image level.
        qk_channels: channels of query and key.
        gate_channels: width of the channel gates' hidden layers.
        gate_layers: number of the channel gates' hidden layers (table 3.1).
        image_level: whether there is the image level.
        implementation: ``'factorized'``, or ``'grouped'`` for the thesis' algorithm 2; see
            :class:`ChannelizedAxialAttention`.
        groups: number of groups in which ``'grouped'`` computes the terms; more groups need less
            memory.
        c1_in_channels: channels of ``inputs[0]``, the level of stride 4, for the simple decoder;
            0 for none.
        c1_channels: channels to which the decoder reduces it.
        **kwargs: arguments of ``BaseDecodeHead``. If a batch norm in ``norm_cfg`` sets no ``eps``,
            it gets the authors' 1e-3, in the whole head. ``conv_cfg`` holds for all convolutions
            except the classifier.

    Shape:
        Inputs: levels of the backbone or neck, of which ``in_index`` is taken,
        (N, in_channels, H, W); logits (N, num_classes, H, W), with the decoder in the size of
        ``inputs[0]``.

    Raises:
        ValueError: an unknown ``attention`` or ``implementation``, a number less than 1, an input
            of other channels, or the image level is trained with batch norm on a batch of one.

    Differs from the paper:
        The thesis leaves open the ratio of squeeze and excitation (chosen: 16, that of its
        authors) and the widths of the decoder (chosen: DeepLabV3+'s 48).

    Example:
        >>> head = CAAHead(in_channels=32, channels=8, num_classes=4, attention_channels=16)
        >>> head([torch.rand(2, 32, 9, 7)]).shape
        torch.Size([2, 4, 9, 7])
    """

    def __init__(
        self,
        channels: int = 256,
        attention: Attention = 'channelized_axial',
        attention_channels: int = 512,
        qk_channels: int = 64,
        gate_channels: int = 128,
        gate_layers: int = 5,
        image_level: bool = True,
        implementation: Implementation = 'factorized',
        groups: int = 16,
        c1_in_channels: int = 0,
        c1_channels: int = 48,
        **kwargs,
    ) -> None:
        kwargs['norm_cfg'] = with_authors_eps(kwargs.get('norm_cfg'))
        super().__init__(channels=channels, **kwargs)
        if attention not in get_args(Attention):
            raise ValueError(
                f'CAAHead: attention must be one of {get_args(Attention)}, got {attention!r}; '
                "set decode_head.attention='channelized_axial'"
            )
        # Also where no channels are gated: a typo would stay unseen until they are.
        if implementation not in IMPLEMENTATIONS:
            raise ValueError(
                f'CAAHead: implementation must be one of {IMPLEMENTATIONS}, got '
                f"{implementation!r}; set decode_head.implementation='factorized'"
            )
        layer = self._layer
        inner = attention_channels
        self.in_conv = ConvModule(self.in_channels, inner, 3, padding=1, **layer)
        gate = dict(
            gate_channels=gate_channels,
            gate_layers=gate_layers,
            implementation=implementation,
            groups=groups,
        )
        plain = (inner, inner, qk_channels)
        self.attention: nn.Module
        if attention == 'channelized_axial':
            self.attention = ChannelizedAxialAttention(*plain, **gate, **layer)
        elif attention == 'channelized_self':
            self.attention = ChannelizedSelfAttention(*plain, **gate, **layer)
        elif attention == 'self':
            self.attention = SelfAttention(*plain, **layer)
        else:
            self.attention = AxialAttention(*plain, **layer)
        self.squeeze_excitation = None
        if attention == 'axial_se':
            act_cfg = (self.act_cfg or dict(type='ReLU'), dict(type='Sigmoid'))
            self.squeeze_excitation = SELayer(inner, conv_cfg=self.conv_cfg, act_cfg=act_cfg)
        self.out_conv = ConvModule(inner, inner, 1, **layer)
        self._build_image_pool(image_level, inner)
        self.bottleneck = ConvModule(2 * inner if image_level else inner, self.channels, 1, **layer)
        self._build_decoder(c1_in_channels, c1_channels)

    def _forward_feature(self, inputs: Sequence[Tensor]) -> Tensor:
        """The feature before dropout and classifier, (N, channels, ...)."""
        x = self._transform_inputs(inputs)
        if x.shape[1] != self.in_channels:
            raise ValueError(
                f'CAAHead: expected a feature (N, {self.in_channels}, H, W), got '
                f'{tuple(x.shape)}: decode_head.in_channels must be the channels of the level '
                'that in_index names'
            )
        attended = self.attention(self.in_conv(x))
        if self.squeeze_excitation is not None:
            attended = self.squeeze_excitation(attended)
        out = self.bottleneck(self._with_image_level([self.out_conv(attended)], x))
        return self._decoded(out, inputs)
