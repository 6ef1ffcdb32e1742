"""High-level feature guided decoder (HFGD).

Huang et al., "High-level Feature Guided Decoding for Semantic Segmentation", arXiv 2303.08646.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmcv.cnn import ConvModule
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.registry import MODELS
from torch import Tensor, nn
from torch.func import functional_call

from ..layers.attention import AxialAttention
from ..layers.headless import build_headless, one_feature
from ..layers.levels import check_levels


def _in_order(names: Sequence[str], args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """Arguments of a decode head, plain (without the first name) or cascaded, by place or name."""
    unknown = set(kwargs) - set(names)
    if unknown:
        raise TypeError(f'HFGDHead: unexpected arguments {sorted(unknown)}, expected {names}')
    return [*args, *(kwargs[name] for name in names if name in kwargs)]


@MODELS.register_module()
class HFGDHead(BaseDecodeHead):
    """An upsampler that is guided by the backbone's high-level feature (section 3, figure 2).

    Teacher: the last level of the backbone, through ``encoder``, classified by the class tokens,
    which are weight and bias of the 1x1 classifier ``conv_seg``. Student: ``upsampler`` over all
    levels, the last of them replaced by the encoder's feature, then axial attention, classified by
    the same tokens. Both have a cross entropy; the prediction is the student's.

    The student's loss trains the upsampler and the axial attention and nothing else: the levels and
    the encoder's feature enter the upsampler detached, and the student's classification detaches
    the tokens. So the upsampler's feature has to come near that of the teacher, and the pretrained
    backbone sees nothing of the upsampler's noise. At test the teacher's classification is not run.

    Args:
        in_channels: channels of the backbone's levels, finest first.
        channels: width of the class tokens, which is that of the upsampler's feature.
        upsampler: config of any decode head; its classifier is taken off. ``in_index`` counts the
            levels of this head (``in_index`` below), and defaults to all of them; ``in_channels``
            follows from it, ``channels`` and the configs of the layers default to those here.
        encoder: config of the decode head whose feature is the high-level one, without its
            classifier, on the last level by default. Default: the context-augmented encoder, whose
            self-attention is regularized with ``type='CAREncoderDecoder'`` and
            ``car=dict(layer='encoder.out_conv')``. None: the level itself ("Identity").
            An encoder with a coarse prediction of its own (OCR) gets it as the second head of a
            ``CascadeEncoderDecoder``, as MMSegmentation's OCRHead does.
        guidance: whether there is a teacher. Without it the student's loss trains everything, the
            tokens too, and nothing is detached.
        axial_attention: whether one layer of axial attention follows the upsampler; a dict of
            arguments of :class:`~mmseg_fusion.models.layers.AxialAttention` for another one.
        stop_gradient: with ``guidance``: False detaches neither levels, feature nor tokens
            (section 5.2, "removing all stop-grad operations").
        teacher_loss_weight: factor of the teacher's loss (chosen: 1, as the student's).
        **kwargs: arguments of ``BaseDecodeHead``.

    Shape:
        Inputs: the backbone's levels (N, C_i, H_i, W_i), of which ``in_index`` is taken. Logits:
        the student's, (N, num_classes, H, W) of the upsampler's size.

    Losses:
        ``loss_ce`` and ``acc_seg`` of the student, ``teacher_loss_ce`` and ``teacher_acc_seg`` of
        the teacher.

    Raises:
        ValueError: a part has the wrong width or is no decode head with one output.

    Chosen, the paper does not say: without an encoder the teacher is the basic FCN of the authors
    (3x3 convolution to twice the tokens' width, 1x1 convolution to it), on the level itself, and
    the level itself enters the upsampler; an encoder of another width than the tokens has a 1x1
    convolution to it. Axial attention: 4 heads as in the authors' library, query, key and value of
    all channels; both passes share query and key.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int = 256,
        *,
        upsampler: dict = dict(type='USFPNHead'),  # noqa: B006
        encoder: dict | None = dict(type='ContextAugmentedEncoder'),  # noqa: B006
        guidance: bool = True,
        axial_attention: bool | dict | None = True,
        stop_gradient: bool = True,
        teacher_loss_weight: float = 1.0,
        in_index: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        in_index = check_levels('HFGDHead', in_channels, in_index, kwargs)
        super().__init__(
            in_channels=in_channels,
            channels=channels,
            in_index=in_index,
            input_transform='multiple_select',
            **kwargs,
        )
        self.guidance = guidance
        self.stop_gradient = stop_gradient
        self.teacher_loss_weight = teacher_loss_weight
        conv = dict(conv_cfg=self.conv_cfg, norm_cfg=self.norm_cfg, act_cfg=self.act_cfg)
        part = dict(
            conv,
            channels=channels,
            num_classes=self.num_classes,
            out_channels=self.out_channels,
            threshold=self.threshold,
            align_corners=self.align_corners,
            init_cfg=None,
        )
        high_channels, self.encoder = self.in_channels[-1], None
        if encoder is not None:
            self.encoder, high_channels = build_headless(
                'HFGDHead: encoder',
                encoder,
                in_channels=self.in_channels[-1],
                in_index=self.in_index[-1],
                **part,
            )
        levels = [*self.in_channels[:-1], high_channels]
        if not isinstance(upsampler, dict):
            raise ValueError(
                'HFGDHead: upsampler must be the config of a decode head, such as '
                f"dict(type='USFPNHead'), got {upsampler!r}"
            )
        index = upsampler.get('in_index', list(range(len(levels))))
        self.upsampler, width = build_headless(
            'HFGDHead: upsampler',
            upsampler,
            in_channels=levels[index] if isinstance(index, int) else [levels[i] for i in index],
            in_index=index,
            **part,
        )
        if width != channels:
            raise ValueError(
                f'HFGDHead: the class tokens have {channels} channels, and the upsampler '
                f'{upsampler["type"]} gives {width}: set decode_head.channels={width}, or '
                'decode_head.upsampler.channels'
            )
        self.teacher_conv = None
        if guidance and encoder is None:
            self.teacher_conv = nn.Sequential(
                ConvModule(high_channels, 2 * channels, 3, padding=1, **conv),
                ConvModule(2 * channels, channels, 1, **conv),
            )
        elif guidance and high_channels != channels:
            self.teacher_conv = ConvModule(high_channels, channels, 1, **conv)
        self.axial_attention = None
        if axial_attention not in (False, None):
            options = dict(
                qk_channels=channels,
                num_heads=4,
                share_qk=False,
                share_axes=True,
                scale=None,
                conv_cfg=self.conv_cfg,
                norm_cfg=None,
                act_cfg=None,
            )
            if isinstance(axial_attention, dict):
                options.update(axial_attention)
            self.axial_attention = AxialAttention(channels, channels, **options)

    @property
    def _stops(self) -> bool:
        return self.guidance and self.stop_gradient

    def _features(self, inputs: Sequence[Tensor], previous: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The high-level feature and the student's."""
        *levels, high = self._transform_inputs(inputs)
        if self.encoder is not None:
            high = one_feature('HFGDHead: encoder', self.encoder, self.encoder(inputs, *previous))
        levels.append(high)
        if self._stops:
            levels = [x.detach() for x in levels]
        student = one_feature('HFGDHead: upsampler', self.upsampler, self.upsampler(levels))
        if self.axial_attention is not None:
            student = self.axial_attention(student)
        return high, student

    def _classified(self, student: Tensor) -> Tensor:
        """Logits of the student, whose loss does not move the tokens."""
        if not (self._stops and torch.is_grad_enabled()):
            return self.cls_seg(student)
        if self.dropout is not None:
            student = self.dropout(student)
        tokens = {name: value.detach() for name, value in self.conv_seg.named_parameters()}
        return functional_call(self.conv_seg, tokens, (student,))

    def forward(self, inputs: Sequence[Tensor], *previous: Tensor) -> Tensor:
        """Logits of the student."""
        return self._classified(self._features(inputs, previous)[1])

    def loss(self, inputs: Sequence[Tensor], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Losses of student and teacher; arguments as a plain or as a cascaded decode head."""
        names = ('prev_output', 'batch_data_samples', 'train_cfg')
        *previous, samples, _ = _in_order(names, args, kwargs)
        high, student = self._features(inputs, previous)
        losses = self.loss_by_feat(self._classified(student), samples)
        if self.guidance:
            teacher = high if self.teacher_conv is None else self.teacher_conv(high)
            for name, value in self.loss_by_feat(self.cls_seg(teacher), samples).items():
                if 'loss' in name:
                    value = self.teacher_loss_weight * value + self._nothing(inputs)
                losses[f'teacher_{name}'] = value
        return losses

    def _nothing(self, inputs: Sequence[Tensor]) -> Tensor | float:
        """0 with a gradient of 0 for the levels that enter the upsampler detached.

        Swin and ConvNeXt have a norm of their own for each level. Without any gradient it would be
        an unused parameter, at which DistributedDataParallel stops. A sum over nothing, unlike a
        product with 0, stays 0 whatever the level holds.
        """
        if not self._stops:
            return 0.0
        return sum(x.flatten()[:0].sum() for x in self._transform_inputs(inputs)[:-1])

    def predict(self, inputs: Sequence[Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """The student's logits at the size of the image."""
        names = ('prev_output', 'batch_img_metas', 'test_cfg')
        *previous, metas, _ = _in_order(names, args, kwargs)
        return self.predict_by_feat(self.forward(inputs, *previous), metas)
