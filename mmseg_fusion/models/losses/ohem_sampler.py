"""Online hard example mining whose loss is the mean over the kept pixels."""

from __future__ import annotations

from typing import Any

import torch
from mmseg.registry import TASK_UTILS
from mmseg.structures.sampler import OHEMPixelSampler
from torch import Tensor, nn


@TASK_UTILS.register_module()
class KeptMeanOHEMPixelSampler(OHEMPixelSampler):
    r"""MMSegmentation's ``OHEMPixelSampler``, with the loss averaged over the kept pixels.

    ``OHEMPixelSampler`` gives kept pixels the weight 1 and others 0, and the losses then divide by
    the number of all pixels. If fewer pixels are kept, the loss and its gradient are smaller. Here
    the weight is P / K, with K of P pixels kept, so that the mean over all pixels is

    .. math:: \frac{1}{P} \sum_{p\ \mathrm{kept}} \frac{P}{K} \ell_p
        = \frac{1}{K} \sum_{p\ \mathrm{kept}} \ell_p

    K counts the pixels of the images on one GPU.

    Args:
        context: the decode head, which passes itself.
        **kwargs: ``thresh`` and ``min_kept`` of ``OHEMPixelSampler``; ``min_kept`` is per image.

    Shape:
        :meth:`sample` takes logits (N, C, H, W) and labels (N, 1, H, W); weights (N, H, W), 0 or P
        / K, in float32 at least. 0 everywhere if no pixel is kept.

    Raises:
        ValueError: a loss divides by another number than that of all pixels: it has
            ``avg_non_ignore=True`` or a ``class_weight``.

    Example:
        >>> import torch
        >>> from mmseg.models.decode_heads import FCNHead
        >>> head = FCNHead(in_channels=4, channels=4, num_classes=3, num_convs=1)
        >>> sampler = KeptMeanOHEMPixelSampler(head, min_kept=2)
        >>> weight = sampler.sample(torch.randn(1, 3, 2, 4), torch.zeros(1, 1, 2, 4))
        >>> weight.unique().tolist(), weight.mean().item()
        ([0.0, 4.0], 1.0)
    """

    def __init__(self, context: nn.Module, **kwargs: Any) -> None:
        super().__init__(context, **kwargs)

    def sample(self, seg_logit: Tensor, seg_label: Tensor) -> Tensor:
        """The weight of every pixel."""
        # A head has its losses only after its sampler.
        losses = self.context.loss_decode
        for loss in losses if isinstance(losses, nn.ModuleList) else [losses]:
            for key in ('avg_non_ignore', 'class_weight'):
                if getattr(loss, key, None):
                    raise ValueError(
                        'KeptMeanOHEMPixelSampler makes the mean over all pixels one over those '
                        f'that are kept, and {type(loss).__name__} with {key} divides by another '
                        f'number: leave loss_decode.{key} out, or take OHEMPixelSampler'
                    )
        # A count of pixels is too large for float16.
        weight = super().sample(seg_logit, seg_label)
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return weight * (weight.numel() / weight.sum().clamp_min(1))
