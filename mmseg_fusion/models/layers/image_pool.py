"""What heads with an image-level branch share."""

from __future__ import annotations

from mmengine.dist import get_world_size
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def check_pooled_batch(head: str, norm: nn.Module | None, x: Tensor) -> None:
    """Refuses to train batch norm on the pooled feature of a single image, and says what to do.

    Args:
        head: name of the decode head, for the message.
        norm: what follows the convolution of the image-level branch; None for nothing.
        x: (N, C, H, W), the feature that is pooled.

    Raises:
        ValueError: ``norm`` is a batch norm that would take its statistics from one value.
    """
    if x.shape[0] != 1 or not isinstance(norm, _BatchNorm) or not norm.training:
        return
    if isinstance(norm, nn.SyncBatchNorm) and get_world_size() > 1:
        return
    raise ValueError(
        f'{head}: batch norm of the image-level branch cannot train on one image per GPU, whose '
        'pooled feature is a single value per channel: expected a batch of 2 or more, got 1. Set '
        'train_dataloader.batch_size=2 (and drop_last=True), '
        "norm_cfg=dict(type='SyncBN') on several GPUs, another decode_head.norm_cfg such as GN, "
        'or decode_head.image_level=False'
    )
