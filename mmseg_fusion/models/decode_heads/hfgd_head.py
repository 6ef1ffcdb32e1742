"""High-level feature guided decoder (HFGD).

Huang et al., "High-level Feature Guided Decoding for Semantic Segmentation", arXiv 2303.08646.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmcv.cnn import ConvModule
from mmseg.models.decode_heads.cascade_decode_head import BaseCascadeDecodeHead
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.registry import MODELS
from mmseg.utils import ConfigType, SampleList
from torch import Tensor, nn
from torch.func import functional_call

from ..layers.attention import AxialAttention
from ..layers.headless import build_headless, check_head, feature_of, with_levels
from ..layers.levels import check_levels
from ..layers.single_value import explains_single_values


def _refines(args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether these are the arguments of a head that refines the prediction of another one.

    They begin with that prediction, and there are three of them; those of a plain head begin with
    the list of samples, and there are two.
    """
    return 'prev_output' in kwargs or len(args) > 2 or isinstance(next(iter(args), None), Tensor)


@MODELS.register_module()
@explains_single_values
class HFGDHead(BaseDecodeHead):
    """An upsampler that is guided by the backbone's high-level feature (section 3, figure 2).

    The teacher is the last level of the backbone, passed through ``encoder``. It is classified by
    the class tokens, the weight and bias of the 1x1 classifier ``conv_seg``. The student is
    ``upsampler``, followed by axial attention. It takes all levels, the last of which is replaced
    by the encoder's feature, and is classified by the same tokens. Both have a cross entropy; the
    prediction is the student's.

    The student's loss trains only the upsampler and the axial attention. The levels and the
    encoder's feature enter the upsampler detached, and the student's classification detaches the
    tokens. The upsampler's feature therefore has to come close to the teacher's, and no gradient of
    the upsampler disturbs the pretrained backbone. At test the teacher's classification is not run.

    Args:
        in_channels: channels of the backbone's levels, finest first.
        channels: width of the class tokens, which is that of the upsampler's feature.
        upsampler: config of a decode head; its classifier, dropout and loss are removed.
            ``in_index`` counts the levels of this head (``in_index`` below), and defaults to all of
            them; ``in_channels`` follows from it, ``channels`` and the configs of the layers
            default to those here.
        encoder: config of the decode head whose feature is the high-level one, without its
            classifier, dropout and loss. ``in_index`` counts the backbone's levels and defaults to
            the last level of this head, from which negative numbers count; ``in_channels`` follows
            from it. Default: the context-augmented encoder, whose self-attention is regularized
            with ``type='CAREncoderDecoder'`` and ``car=dict(layer='encoder.out_conv')``. None: the
            level itself ("Identity"). An encoder that needs a coarse prediction (OCR) gets it if
            this head is the second head of a ``CascadeEncoderDecoder``, as for MMSegmentation's
            OCRHead.
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
        the teacher; ``encoder_...`` and ``upsampler_...``: additional losses of these parts, such
        as the affinity loss of ``CPHead``.

    Raises:
        ValueError: a part has the wrong width or is no decode head with one output.

    Chosen, because the paper does not specify it: without an encoder the teacher is the authors'
    basic FCN on the level itself (a 3x3 convolution to twice the width of the tokens, a 1x1
    convolution to the width of the tokens), and the level itself enters the upsampler. If the
    encoder has another width than the tokens, a 1x1 convolution maps it to their width. Axial
    attention: 4 heads as in the authors' library, query, key and value of all channels; both passes
    share query and key.

    Example:
        >>> head = HFGDHead(
        ...     in_channels=[16, 32],
        ...     channels=8,
        ...     num_classes=4,
        ...     upsampler=dict(type='UPerHead', pool_scales=(1, 2)),
        ...     encoder=None,
        ... )
        >>> head([torch.rand(2, 16, 16, 16), torch.rand(2, 32, 8, 8)]).shape
        torch.Size([2, 4, 16, 16])
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
        high_channels = self._build_encoder(encoder)
        self._build_upsampler(upsampler, [*self.in_channels[:-1], high_channels])
        self._build_teacher_conv(high_channels)
        self._build_axial_attention(axial_attention)

    @property
    def _layer(self) -> dict:
        """Kinds of convolution, norm and activation of every layer."""
        return dict(conv_cfg=self.conv_cfg, norm_cfg=self.norm_cfg, act_cfg=self.act_cfg)

    @property
    def _part(self) -> dict:
        """What the configs of encoder and upsampler need not say."""
        return dict(
            self._layer,
            channels=self.channels,
            num_classes=self.num_classes,
            ignore_index=self.ignore_index,
            out_channels=self.out_channels,
            threshold=self.threshold,
            align_corners=self.align_corners,
            init_cfg=None,
        )

    def _build_encoder(self, cfg: dict | None) -> int:
        """``encoder``, or None where the level itself is taken; channels of its feature."""
        self.encoder = None
        if cfg is None:
            return self.in_channels[-1]
        owner = 'HFGDHead: encoder'
        cfg = with_levels(owner, cfg, self.in_index, self.in_channels)
        self.encoder, high_channels = build_headless(owner, cfg, cascaded=True, **self._part)
        return high_channels

    def _build_upsampler(self, cfg: dict, levels: list[int]) -> None:
        """``upsampler`` over levels of these channels, whose feature is as wide as the tokens.

        Raises:
            ValueError: ``in_index`` names no level, or the feature is of another width.
        """
        owner = 'HFGDHead: upsampler'
        check_head(owner, cfg)
        index = cfg.get('in_index', list(range(len(levels))))
        if not set([index] if isinstance(index, int) else index) <= set(
            range(-len(levels), len(levels))
        ):
            raise ValueError(
                f'{owner}.in_index counts the {len(levels)} levels of the head, 0 to '
                f'{len(levels) - 1}, got {index!r}'
            )
        in_channels = levels[index] if isinstance(index, int) else [levels[i] for i in index]
        self.upsampler, width = build_headless(
            owner, cfg, in_channels=in_channels, in_index=index, **self._part
        )
        if width != self.channels:
            raise ValueError(
                f'HFGDHead: the class tokens have {self.channels} channels, and the upsampler '
                f'{cfg["type"]} gives {width}: set decode_head.channels={width}, or '
                'decode_head.upsampler.channels'
            )

    def _build_teacher_conv(self, high_channels: int) -> None:
        """``teacher_conv``: from the high-level feature to the tokens' width, None where none is
        needed."""
        self.teacher_conv = None
        if self.guidance and self.encoder is None:
            self.teacher_conv = nn.Sequential(
                ConvModule(high_channels, 2 * self.channels, 3, padding=1, **self._layer),
                ConvModule(2 * self.channels, self.channels, 1, **self._layer),
            )
        elif self.guidance and high_channels != self.channels:
            self.teacher_conv = ConvModule(high_channels, self.channels, 1, **self._layer)

    def _build_axial_attention(self, wanted: bool | dict | None) -> None:
        """``axial_attention`` on the upsampler's feature, None where none is wanted.

        Raises:
            ValueError: ``wanted`` is of another type, or the channels cannot be split over the
                heads of the attention.
        """
        self.axial_attention = None
        if not (wanted is None or isinstance(wanted, (bool, dict))):
            raise ValueError(
                f'HFGDHead: axial_attention must be True, False or a dict of arguments, got '
                f'{wanted!r}'
            )
        if wanted is None or wanted is False:
            return
        options = dict(
            qk_channels=self.channels,
            num_heads=4,
            share_qk=False,
            share_axes=True,
            scale=None,
            conv_cfg=self.conv_cfg,
            norm_cfg=None,
            act_cfg=None,
        )
        if isinstance(wanted, dict):
            options.update(wanted)
        if self.channels % options['num_heads']:
            raise ValueError(
                f'HFGDHead: {self.channels} channels cannot be split over {options["num_heads"]} '
                'heads: set decode_head.channels, or decode_head.axial_attention='
                'dict(num_heads=...)'
            )
        self.axial_attention = AxialAttention(self.channels, self.channels, **options)

    @property
    def _stops(self) -> bool:
        return self.guidance and self.stop_gradient

    def _high(
        self,
        inputs: Sequence[Tensor],
        previous: Sequence[Tensor],
        samples: SampleList | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The high-level feature, and the encoder's own losses."""
        if self.encoder is None:
            return inputs[self.in_index[-1]], {}
        cascaded = isinstance(self.encoder, BaseCascadeDecodeHead)
        if cascaded and not previous:
            raise ValueError(
                f'HFGDHead: the encoder {type(self.encoder).__name__} refines the prediction of '
                "another head: set model.type='CascadeEncoderDecoder' and a list of two decode "
                'heads, this one second'
            )
        previous = previous if cascaded else ()
        return feature_of('HFGDHead: encoder', self.encoder, inputs, *previous, samples=samples)

    def _student(
        self, inputs: Sequence[Tensor], high: Tensor, samples: SampleList | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The feature of upsampler and axial attention, and the upsampler's own losses."""
        levels = [*self._transform_inputs(inputs)[:-1], high]
        if self._stops:
            levels = [x.detach() for x in levels]
        student, losses = feature_of('HFGDHead: upsampler', self.upsampler, levels, samples=samples)
        return (student if self.axial_attention is None else self.axial_attention(student)), losses

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
        high, _ = self._high(inputs, previous)
        student, _ = self._student(inputs, high)
        return self._classified(student)

    def loss(self, inputs: Sequence[Tensor], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Losses of student and teacher; arguments as a plain or as a cascaded decode head."""
        form = self._loss_refining if _refines(args, kwargs) else self._loss_alone
        return form(inputs, *args, **kwargs)

    def _loss_alone(
        self, inputs: Sequence[Tensor], batch_data_samples: SampleList, train_cfg: ConfigType
    ) -> dict[str, Tensor]:
        return self._losses(inputs, (), batch_data_samples)

    def _loss_refining(
        self,
        inputs: Sequence[Tensor],
        prev_output: Tensor,
        batch_data_samples: SampleList,
        train_cfg: ConfigType,
    ) -> dict[str, Tensor]:
        return self._losses(inputs, (prev_output,), batch_data_samples)

    def _losses(
        self, inputs: Sequence[Tensor], previous: Sequence[Tensor], samples: SampleList
    ) -> dict[str, Tensor]:
        high, own = self._high(inputs, previous, samples)
        of_teacher = {}
        if self.guidance:
            # Before the upsampler runs: one that works in place would change what the teacher sees.
            teacher = high if self.teacher_conv is None else self.teacher_conv(high)
            for name, value in self.loss_by_feat(self.cls_seg(teacher), samples).items():
                weight = self.teacher_loss_weight if 'loss' in name else 1
                of_teacher[f'teacher_{name}'] = weight * value
        student, more = self._student(inputs, high, samples)
        losses = self.loss_by_feat(self._classified(student), samples)
        losses.update({**own, **more, **of_teacher})
        # To the teacher's where there is one: the student's moves nothing of the backbone.
        last = [name for name in losses if 'loss' in name][-1]
        losses[last] = losses[last] + self._nothing(inputs)
        return losses

    def _nothing(self, inputs: Sequence[Tensor]) -> Tensor:
        """0 with a gradient of 0 for every level.

        Swin and ConvNeXt have a norm of their own for each level. Where a level enters the
        upsampler detached, or not at all, that norm would be an unused parameter, at which
        DistributedDataParallel stops. A sum over nothing, unlike a product with 0, stays 0 whatever
        the level holds.
        """
        return sum(x.flatten()[:0].sum() for x in self._transform_inputs(inputs))

    def predict(self, inputs: Sequence[Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """The student's logits at the size of the image; arguments as for :meth:`loss`."""
        form = self._predict_refining if _refines(args, kwargs) else self._predict_alone
        return form(inputs, *args, **kwargs)

    def _predict_alone(
        self, inputs: Sequence[Tensor], batch_img_metas: list[dict], test_cfg: ConfigType
    ) -> Tensor:
        return self.predict_by_feat(self.forward(inputs), batch_img_metas)

    def _predict_refining(
        self,
        inputs: Sequence[Tensor],
        prev_output: Tensor,
        batch_img_metas: list[dict],
        test_cfg: ConfigType,
    ) -> Tensor:
        return self.predict_by_feat(self.forward(inputs, prev_output), batch_img_metas)
