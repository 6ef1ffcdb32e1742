"""Affinity loss of CPNet's context prior.

Yu et al., "Context Prior for Scene Segmentation", CVPR 2020, arXiv 2004.01547, section "Affinity
Loss".
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from mmseg.registry import MODELS
from torch import Tensor, nn

from ..layers.precision import without_autocast

# Below it a ratio counts as 0, as in torch's gradient of the binary cross entropy.
_SMALLEST = 1e-12


@MODELS.register_module()
class AffinityLoss(nn.Module):
    r"""Supervises which cells of a grid belong to one class: CPNet, "Affinity Loss".

    The ideal affinity :math:`a_{ij}` is 1 where the cells i and j have the same label, and
    :math:`p_{ij}` the sigmoid of the prior. The unary term is the mean binary cross entropy of the
    pairs; the global term, for each cell, minus the logarithms of the precision
    :math:`\sum_j a_{ij} p_{ij} / \sum_j p_{ij}`, of the recall
    :math:`\sum_j a_{ij} p_{ij} / \sum_j a_{ij}` and of the specificity
    :math:`\sum_j (1 - a_{ij})(1 - p_{ij}) / \sum_j (1 - a_{ij})`, averaged over the cells.

    Args:
        unary_weight: :math:`\lambda_u` of the paper.
        global_weight: :math:`\lambda_g` of the paper.
        ignored: ``'class'``: ignored cells form a separate class, as in the authors' code.
            ``'leave_out'``: ignored cells and all their pairs are left out.
        exclude_self: whether a cell is excluded from the hits of its own precision and recall, as
            in the authors' code. In the paper's equations it counts like any other cell of its
            class.
        loss_weight: factor of the loss.
        loss_name: key of the loss in the log.

    Shape:
        - prior: logits (N, h * w, h, w); channel j at cell i is the affinity of i and j.
        - label: (N, H, W), integers, of any size: brought to (h, w) by nearest neighbour.
        - output: a scalar, in float32 also under autocast (float64 for a float64 prior).

    Raises:
        ValueError: an option is unknown, or prior and label do not fit.

    Differs from the authors' code: if a cell is the only one of its class, or there is no cell of
    another class, no prior can change the term. The term is then 0 instead of 100 (chosen: the
    gradients are the same).

    Example:
        >>> loss = AffinityLoss()
        >>> prior, label = torch.zeros(1, 12, 3, 4), torch.arange(12).reshape(1, 3, 4) % 2
        >>> round(loss(prior, label).item(), 3)
        2.955
    """

    def __init__(
        self,
        unary_weight: float = 1.0,
        global_weight: float = 1.0,
        ignored: Literal['class', 'leave_out'] = 'class',
        exclude_self: bool = True,
        loss_weight: float = 1.0,
        loss_name: str = 'loss_affinity',
    ) -> None:
        super().__init__()
        if ignored not in ('class', 'leave_out'):
            raise ValueError(f"ignored must be 'class' or 'leave_out', got {ignored!r}")
        self.unary_weight = unary_weight
        self.global_weight = global_weight
        self.ignored = ignored
        self.exclude_self = exclude_self
        self.loss_weight = loss_weight
        self._loss_name = loss_name

    @property
    def loss_name(self) -> str:
        return self._loss_name

    def forward(self, prior: Tensor, label: Tensor, ignore_index: int = 255) -> Tensor:
        """The loss of a prior (N, h * w, h, w) under labels (N, H, W)."""
        if prior.dim() != 4 or prior.shape[1] != prior.shape[2] * prior.shape[3]:
            raise ValueError(
                f'AffinityLoss: prior must be (N, h * w, h, w), one channel per cell, got '
                f'{tuple(prior.shape)}: it takes the prior of a CPHead (loss_prior_decode), not '
                'logits of classes (loss_decode)'
            )
        if label.dim() != 3 or len(label) != len(prior):
            raise ValueError(
                f'AffinityLoss: label must be (N, H, W) with N={len(prior)}, got '
                f'{tuple(label.shape)}'
            )
        # Ids are small integers, which float32 holds exactly.
        label = F.interpolate(label[:, None].float(), prior.shape[2:], mode='nearest').flatten(1)
        known = label != ignore_index if self.ignored == 'leave_out' else None
        with without_autocast(prior.device.type):
            logits = prior if prior.dtype == torch.float64 else prior.float()
            return self.loss_weight * self._loss(logits.flatten(2), label, known)

    def _loss(self, logits: Tensor, label: Tensor, known: Tensor | None) -> Tensor:
        # In all matrices dimension 1 is the other cell j, dimension 2 the cell i itself.
        same = label[:, :, None] == label[:, None]
        other, pairs = ~same, None
        if known is not None:
            pairs = known[:, :, None] & known[:, None]
            same, other = same & pairs, other & pairs
        unary = F.binary_cross_entropy_with_logits(
            logits,
            same.to(logits.dtype),
            weight=None if pairs is None else pairs.to(logits.dtype),
            reduction='sum',
        )
        unary = unary / (logits.numel() if pairs is None else pairs.sum().clamp_min(1))

        p = logits.sigmoid()
        if pairs is not None:
            p = p.masked_fill(~pairs, 0)
        if self.exclude_self:
            same = same & ~torch.eye(same.shape[1], dtype=torch.bool, device=same.device)
        number_same, number_other = same.sum(1), other.sum(1)
        hits = p.masked_fill(~same, 0).sum(1)
        rejected = (1 - p).masked_fill(~other, 0).sum(1)
        precision = _minus_log(hits, p.sum(1)) + _minus_log(hits, number_same)
        specificity = _minus_log(rejected, number_other)
        cells = precision * (number_same > 0) + specificity * (number_other > 0)
        number = cells.numel() if known is None else known.sum().clamp_min(1)
        return self.unary_weight * unary + self.global_weight * cells.sum() / number


def _minus_log(part: Tensor, whole: Tensor) -> Tensor:
    return whole.to(part.dtype).clamp_min(_SMALLEST).log() - part.clamp_min(_SMALLEST).log()
