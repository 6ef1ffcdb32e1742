"""Dual attention in sequence, with a branch that has no effect on the network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from mmcv.cnn import ConvModule
from mmseg.models.decode_heads.da_head import CAM, PAM
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.registry import MODELS
from mmseg.utils import ConfigType, SampleList, add_prefix
from torch import Tensor, nn

from ..layers.precision import without_autocast
from ..layers.single_value import explains_single_values

#: The first attention, whose answer the extra branch gives, and the second, by ``order``.
_ORDERS = {'channel_spatial': ('cam', 'pam'), 'spatial_channel': ('pam', 'cam')}


@MODELS.register_module()
@explains_single_values
class SequentialDualAttentionHead(BaseDecodeHead):
    r"""Channel attention, then spatial attention (thesis section 3.2, figures 3.1b and 3.2).

    The sequential counterpart of :class:`mmseg.models.decode_heads.DAHead`, of the same parts:

    .. math::
        \mathbf{c} = g(\mathrm{CAM}(f(\mathbf{x}))), \quad
        \mathbf{s} = h(\mathrm{PAM}(\mathbf{c})), \quad
        \mathbf{y} = W\,\mathbf{s}, \quad
        \mathbf{y}' = W'\,\mathrm{stop}(\mathbf{c})

    with 3x3 conv-norm-activation f, g and h. The extra logits y' show the prediction of the channel
    attention alone. A stop-gradient lets their loss train only W', so that the branch does not
    change the network that it shows. Figure 3.4 compares y' with y.

    The thesis fixes the order of the attentions and the stop-gradient. Chosen: the widths and the
    3x3 convolutions around each attention, as in DANet, and no dropout before W', so that the rest
    of the network draws the same random numbers as without the branch.

    Training logs the branch's loss and accuracy as ``cam.loss_ce``, ``cam.acc_seg``, as DAHead
    does. The branch influences the network in one case: an optimizer wrapper's ``clip_grad``
    measures the norm over all gradients.

    Args:
        pam_channels: channels of query and key in the spatial attention.
        order: ``'channel_spatial'`` is the thesis' order. In ``'spatial_channel'``, the reverse
            order, the extra branch ``pam`` predicts from the spatial attention.
        **kwargs: of :class:`mmseg.models.decode_heads.decode_head.BaseDecodeHead`; ``conv_cfg`` is
            that of f, g and h. MMSegmentation's PAM and both classifiers are plain.

    Shape:
        - Input: levels of the backbone; that of ``in_index`` is (N, in_channels, H, W).
        - Output: two logits, each (N, out_channels, H, W): the head's prediction and the branch's.

    Raises:
        ValueError: ``order`` is none of the two.

    Example:
        >>> head = SequentialDualAttentionHead(
        ...     in_channels=32, channels=8, num_classes=4, pam_channels=4
        ... )
        >>> [tuple(logits.shape) for logits in head([torch.rand(2, 32, 9, 7)])]
        [(2, 4, 9, 7), (2, 4, 9, 7)]
    """

    def __init__(
        self,
        pam_channels: int,
        order: Literal['channel_spatial', 'spatial_channel'] = 'channel_spatial',
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        if order not in _ORDERS:
            raise ValueError(
                f'SequentialDualAttentionHead: order is one of {", ".join(_ORDERS)}, but got '
                f'{order!r}; change model.decode_head.order'
            )
        self.pam_channels = pam_channels
        self.order = order
        self.in_conv = self._conv(self.in_channels)
        self.cam = CAM()
        self.cam_out_conv = self._conv(self.channels)
        self.pam = PAM(self.channels, pam_channels)
        self.pam_out_conv = self._conv(self.channels)
        self.branch_conv_seg = nn.Conv2d(self.channels, self.out_channels, kernel_size=1)

    def _conv(self, in_channels: int) -> ConvModule:
        return ConvModule(
            in_channels,
            self.channels,
            3,
            padding=1,
            conv_cfg=self.conv_cfg,
            norm_cfg=self.norm_cfg,
            act_cfg=self.act_cfg,
        )

    @property
    def branch(self) -> Literal['cam', 'pam']:
        """The attention from which the extra branch predicts."""
        return _ORDERS[self.order][0]

    def _attend(self, name: str, x: Tensor) -> Tensor:
        if name == 'pam':
            return self.pam_out_conv(self.pam(x))
        # Its similarities are sums over all pixels, too large for float16.
        with without_autocast(x.device.type):
            attended = self.cam(x.to(torch.promote_types(x.dtype, torch.float32)))
        return self.cam_out_conv(attended.to(x.dtype))

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The logits of the second attention, and of the first behind the stop-gradient."""
        first, second = _ORDERS[self.order]
        feat = self._attend(first, self.in_conv(self._transform_inputs(inputs)))
        branch = self.branch_conv_seg(feat.detach())
        return self.cls_seg(self._attend(second, feat)), branch

    def predict(
        self, inputs: Sequence[Tensor], batch_img_metas: list[dict], test_cfg: ConfigType
    ) -> Tensor:
        """Logits at the size of the image; the extra branch is left out."""
        return self.predict_by_feat(self.forward(inputs)[0], batch_img_metas)

    def loss_by_feat(
        self, seg_logits: tuple[Tensor, Tensor], batch_data_samples: SampleList
    ) -> dict[str, Tensor]:
        """Losses of the head's prediction, and of the branch's under its prefix."""
        logits, branch = seg_logits
        losses = super().loss_by_feat(logits, batch_data_samples)
        losses.update(add_prefix(super().loss_by_feat(branch, batch_data_samples), self.branch))
        return losses
