"""Class-aware regularization (CAR): compact and separate classes.

Ye Huang, "Context-aware Image Semantic Segmentation", doctoral thesis, University of Technology
Sydney, 2022, chapter 4; Huang et al., "CAR: Class-aware Regularizations for Semantic Segmentation",
ECCV 2022, arXiv 2203.07160.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from mmengine.dist import all_reduce, get_world_size
from mmseg.registry import MODELS
from torch import Tensor, nn

from ..layers.precision import without_autocast

#: Pixels that ``class_sums`` adds up before it adds up these sums: 1024 x 1024 numbers of 0.1 in a
#: row give a mean that is 1e-2 off in float32 (2e-3 as a matrix product), and 1e-5 so. A matrix
#: product of fewer pixels would be many small ones on a GPU.
PIXELS_AT_ONCE = dict(scatter=1024, one_hot=8192)

# The authors' guards: the floor of the intra-class loss and Keras' epsilon in the other two.
FLOOR, EPSILON = 1e-5, 1e-7


def resample_label(label: Tensor, size: tuple[int, int]) -> Tensor:
    """Nearest neighbour with the corner pixels aligned, as the authors bring labels to a feature.

    Cell ``i`` of ``n`` takes the label at ``i * (h - 1) / (n - 1)``, halves rounded up; a single
    cell takes the first label. The arithmetic is in integers: the same on every device.

    Args:
        label: (N, h, w).
        size: height and width wanted.

    Returns:
        (N, height, width) as in ``size``.
    """
    for dim, (old, new) in enumerate(zip(label.shape[1:], size), start=1):
        if old != new:
            i = torch.arange(new, device=label.device)
            span = max(2 * (new - 1), 1)
            label = label.index_select(dim, (2 * i * (old - 1) + new - 1) // span)
    return label


def class_sums(
    x: Tensor,
    index: Tensor,
    num_classes: int,
    implementation: Literal['auto', 'scatter', 'one_hot'] = 'auto',
) -> Tensor:
    """Sum of the features of each class in each image: the numerator of equation 4.1.

    Args:
        x: features (N, C, P).
        index: class of each pixel (N, P), int64; ``num_classes`` marks a pixel of no class.
        num_classes: K.
        implementation: ``'scatter'`` adds every feature at its class' place; ``'one_hot'``
            multiplies with a dense matrix (N, K, P). ``'auto'`` takes ``'scatter'`` on the CPU,
            where ``'one_hot'`` takes 3.1 times as long with 59 classes and 3.6 times with 171 (4 x
            512 x 65 x 65, forward and backward, torch 2.13.0, one thread of an AMD EPYC, medians of
            7 turns: ``benchmark_car.py --threads 1 --repeat 7 --no-memory``). It takes
            ``'one_hot'`` on other devices, where additions to few places would wait for each other,
            and would happen in any order.

    Returns:
        (N, K, C).
    """
    n, channels, pixels = x.shape
    if implementation == 'auto':
        implementation = 'scatter' if x.device.type == 'cpu' else 'one_hot'
    if implementation == 'scatter':
        places, parts = num_classes + 1, -(-pixels // PIXELS_AT_ONCE['scatter'])
        if parts > 1:
            part = torch.arange(pixels, device=index.device) // PIXELS_AT_ONCE['scatter']
            index = index + places * part
        sums = x.new_zeros(n, channels, parts * places)
        sums = sums.scatter_add(2, index[:, None].expand(n, channels, pixels), x)
        sums = sums.unflatten(2, (parts, places)).sum(2)
        return sums[..., :-1].transpose(1, 2)
    # One graph node for all parts: the backward pass of a slice would fill a whole map with zeros.
    size = PIXELS_AT_ONCE['one_hot']
    parts = zip(index.split(size, 1), x.split(size, 2))
    return sum(torch.bmm(_membership(i, num_classes).to(x.dtype), y.mT) for i, y in parts)


def _membership(index: Tensor, num_classes: int) -> Tensor:
    """Whether a pixel is of a class, (N, K, P)."""
    return index[:, None] == torch.arange(num_classes, device=index.device)[:, None]


class _SumOverProcesses(torch.autograd.Function):
    """All-reduce whose gradient is all-reduced: each process has a loss that sees all the sums.

    With the mean over processes that data parallel training takes afterwards, the gradients of the
    parameters are those of one process with the whole batch.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        all_reduce(total, op='sum')
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        all_reduce(total, op='sum')
        return total


@MODELS.register_module()
class ClassAwareRegularization(nn.Module):
    r"""Three losses on a feature and its labels: thesis section 4.3, equations 4.1 to 4.14.

    With :math:`\mu_k` the mean feature of class k over the batch and all processes (zero where the
    class is absent), :math:`\bar\mu` the same without gradient, x a pixel of class y, C channels
    and K classes:

    - intra c2p (equations 4.2, 4.3) pulls pixels to their centre: the mean over pixels and
      channels of :math:`|\bar\mu_y - x|`, squared;
    - inter c2c (equations 4.4 to 4.7) pushes centres apart: in row i of
      :math:`\mathrm{softmax}_j(\mu_i \bar\mu_j / \sqrt C)`, without entry i, the amounts above
      ``inter_c2c_margin / (K - 1)`` are summed; the mean over rows is squared;
    - inter c2p (equations 4.8 to 4.14) pushes pixels away from the other centres: the same for
      :math:`\mathrm{softmax}_k(x \bar\mu_k / \sqrt C)`, with the pixel's own energy replaced by
      :math:`\bar\mu_y \bar\mu_y`; the mean over pixels is squared.

    The arithmetic is float32 (float64 for float64 features), also under autocast.

    Args:
        num_classes: K.
        ignore_index: label of pixels that belong to no class; they are never part of a centre.
        intra_c2p_weight: weight of the first loss. A loss of weight 0 is neither computed nor
            returned.
        inter_c2c_weight: weight of the second.
        inter_c2p_weight: weight of the third.
        inter_c2c_margin: :math:`\epsilon_0` of equation 4.6; table 4.5 has 0.25 for some models
            with 171 classes.
        inter_c2p_margin: :math:`\epsilon_1` of equation 4.13.
        centers: class centres of the ``'batch'`` on all processes, or of each ``'image'`` (table
            4.3).
        moving_average: decay of centres that are averaged over the steps (table 4.2: 0.8, 0.9,
            0.99); None takes the centres of the batch. Classes that are absent from a batch keep
            their centres.
        moving_average_gradient: whether inter c2c reaches the features through the batch's share
            of the moving average.
        channels: C; only needed with ``moving_average``, whose centres are kept in a buffer.
        reduction: ``'squared_mean'``, as the authors' code, or ``'mean_squared'``, as the thesis'
            equations.
        count_ignored: whether ignored pixels count in the denominators of the two pixel losses, and
            in inter c2p as pixels for which every class is another class.
        count_absent: whether absent classes count: as entries of each softmax and as rows of inter
            c2c. Without them K is the number of classes that are present.
        scale_c2p: divides the energies of inter c2p by :math:`\sqrt C`.
        pool: features are averaged over ``pool`` x ``pool`` cells first, labels resampled; the
            authors take 2 for UPerNet and OCRNet.

    Shape:
        - feat: (N, C, H, W), of any floating type.
        - label: (N, h, w) or (N, 1, h, w), integers, of any size: brought to (H, W) and then to
          the pooled size by :func:`resample_label`.
        - output: dict of scalars ``loss_car_intra_c2p``, ``loss_car_inter_c2c`` and
          ``loss_car_inter_c2p``, each multiplied by its weight.

    Raises:
        ValueError: an option is out of range; feature and label do not fit; or a label is neither a
            class nor ``ignore_index``. Reading labels makes a GPU wait, so on a GPU only the labels
            of the first call are checked; later wrong labels fail in the decode head's cross
            entropy.

    Differs from the thesis, which has the mean of squares (``reduction``) and no :math:`\sqrt C` in
    equation 4.11 (``scale_c2p``). The defaults follow the authors' code, which made the published
    numbers. That code counts ignored pixels and absent classes, has a floor of 1e-5 for the
    intra-class loss, and clips the sums of the other two to [1e-7, 1 - 1e-7]. Its moving average
    passes no gradient, so that inter c2c trains nothing (``moving_average_gradient``). It starts
    from random centres, here from zero (chosen). With K = 1 there is no other class, and the
    inter-class losses are constant (chosen).

    Example:
        >>> loss = ClassAwareRegularization(num_classes=2)
        >>> feat = torch.tensor([[1.0, 3.0, -1.0, -1.0]]).view(1, 1, 2, 2)
        >>> losses = loss(feat, torch.tensor([[[0, 0], [1, 1]]]))
        >>> losses['loss_car_intra_c2p']
        tensor(0.2500)
    """

    moving_centers: Tensor

    def __init__(
        self,
        num_classes: int,
        ignore_index: int = 255,
        intra_c2p_weight: float = 1.0,
        inter_c2c_weight: float = 1.0,
        inter_c2p_weight: float = 1.0,
        inter_c2c_margin: float = 0.5,
        inter_c2p_margin: float = 0.25,
        centers: Literal['batch', 'image'] = 'batch',
        moving_average: float | None = None,
        moving_average_gradient: bool = False,
        channels: int | None = None,
        reduction: Literal['squared_mean', 'mean_squared'] = 'squared_mean',
        count_ignored: bool = True,
        count_absent: bool = True,
        scale_c2p: bool = True,
        pool: int = 1,
    ) -> None:
        super().__init__()
        for name, value in (('num_classes', num_classes), ('pool', pool)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f'{name} must be an integer of at least 1, got {value!r}')
        weights = dict(
            intra_c2p_weight=intra_c2p_weight,
            inter_c2c_weight=inter_c2c_weight,
            inter_c2p_weight=inter_c2p_weight,
        )
        margins = dict(inter_c2c_margin=inter_c2c_margin, inter_c2p_margin=inter_c2p_margin)
        for name, value in {**weights, **margins}.items():
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f'{name} must be a finite number of at least 0, got {value!r}')
        if not any(weights.values()):
            raise ValueError(
                f'{", ".join(weights)} are all 0: set car.loss=None to train without the losses'
            )
        for name, value, options in (
            ('centers', centers, ('batch', 'image')),
            ('reduction', reduction, ('squared_mean', 'mean_squared')),
        ):
            if value not in options:
                raise ValueError(f'{name} must be one of {options}, got {value!r}')
        if moving_average is not None:
            if not 0 < moving_average < 1:
                raise ValueError(
                    'moving_average is the share of the old centres, between 0 and 1 (0.9 in the '
                    f'thesis), or None; got {moving_average!r}'
                )
            if centers == 'image':
                raise ValueError(
                    "moving_average goes with centers='batch': an image's centres have no past"
                )
            if channels is None:
                raise ValueError(
                    'moving_average keeps its centres in a buffer: set channels to the number of '
                    'channels of the feature (car.channels, or fewer where the head has fewer)'
                )
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.intra_c2p_weight = intra_c2p_weight
        self.inter_c2c_weight = inter_c2c_weight
        self.inter_c2p_weight = inter_c2p_weight
        self.inter_c2c_margin = inter_c2c_margin
        self.inter_c2p_margin = inter_c2p_margin
        self.centers = centers
        self.moving_average = moving_average
        self.moving_average_gradient = moving_average_gradient
        self.channels = channels
        self.reduction = reduction
        self.count_ignored = count_ignored
        self.count_absent = count_absent
        self.scale_c2p = scale_c2p
        self.pool = pool
        self._labels_checked = False
        if moving_average is not None:
            self.register_buffer('moving_centers', torch.zeros(num_classes, channels))

    def extra_repr(self) -> str:
        keys = ('num_classes', 'ignore_index', 'centers', 'moving_average', 'reduction', 'pool')
        return ', '.join(f'{key}={getattr(self, key)!r}' for key in keys)

    # --- input -----------------------------------------------------------------------------------

    def _check(self, feat: Tensor, label: Tensor) -> Tensor:
        """The label as (N, h, w), after what can be wrong has been looked for."""
        if feat.dim() != 4 or feat.numel() == 0:
            raise ValueError(f'feat must be (N, C, H, W) and not empty, got {tuple(feat.shape)}')
        if self.channels is not None and feat.shape[1] != self.channels:
            raise ValueError(
                f'feat has {feat.shape[1]} channels, but channels={self.channels} (shape '
                f'{tuple(feat.shape)}): set channels={feat.shape[1]}'
            )
        given = tuple(label.shape)
        if label.dim() == 4 and label.shape[1] == 1:
            label = label[:, 0]
        if label.dim() != 3 or label.shape[0] != feat.shape[0] or label.numel() == 0:
            raise ValueError(
                f'label must be (N, h, w) with N={feat.shape[0]} as feat {tuple(feat.shape)}, '
                f'got {given}'
            )
        if label.is_floating_point() or label.dtype == torch.bool:
            raise ValueError(f'label must hold integers, got {label.dtype}')
        label = label.long()
        self.check_labels(label)
        return label

    def check_labels(self, label: Tensor) -> None:
        """Raises ValueError if a label is not a class; on a GPU only in the first call."""
        if label.device.type != 'cpu' and self._labels_checked:
            return
        self._labels_checked = True
        wrong = (label != self.ignore_index) & ((label < 0) | (label >= self.num_classes))
        if wrong.any():
            values = label[wrong].unique().tolist()
            shown = ', '.join(map(str, values[:5])) + (', ...' if len(values) > 5 else '')
            raise ValueError(
                f'label {shown} is neither a class (0 to {self.num_classes - 1}) nor '
                f'ignore_index={self.ignore_index}: set num_classes of the decode head to the '
                "number of the data set's classes, or ignore_index of the head to that label, or "
                'let the data set renumber it (reduce_zero_label, label_map)'
            )

    # --- centres ---------------------------------------------------------------------------------

    def _centers(self, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Centres (M, K, C) and which classes are present (M, K); M is 1 or N."""
        if self.inter_c2c_weight == 0:
            x = x.detach()
        sums = class_sums(x, index, self.num_classes)
        ones = torch.ones_like(index, dtype=x.dtype)
        counts = x.new_zeros(len(x), self.num_classes + 1).scatter_add(1, index, ones)
        both = torch.cat([sums, counts[:, :-1, None]], dim=2)
        if self.centers == 'batch':
            both = both.sum(0, keepdim=True)
            if get_world_size() > 1:
                both = _SumOverProcesses.apply(both)
        sums, counts = both[..., :-1], both[..., -1:].detach()
        centers, present = sums / counts.clamp_min(1), counts[..., 0] > 0
        if self.moving_average is not None:
            centers = self._average(centers, present)
        return centers, present

    def _average(self, centers: Tensor, present: Tensor) -> Tensor:
        old = self.moving_centers.to(centers.dtype)
        if not self.training:
            return old[None]
        moved = old + (1 - self.moving_average) * (centers - old)
        moved = torch.where(present[..., None], moved, old)
        kept = moved.detach()
        self.moving_centers.copy_(kept[0])
        return moved if self.moving_average_gradient else kept

    # --- the three losses ------------------------------------------------------------------------

    def _reduce(self, values: Tensor, counted: Tensor | None) -> Tensor:
        """``f_mse`` of the thesis, or the square of the mean, over the counted values."""
        if self.reduction == 'mean_squared':
            values = values.square()
        if counted is None:
            mean = values.mean()
        else:
            mean = (values * counted).sum() / counted.sum().clamp_min(1)
        return mean if self.reduction == 'mean_squared' else mean.square()

    def _excess(
        self, energy: Tensor, own: Tensor, present: Tensor, margin: float, dim: int
    ) -> Tensor:
        """Softmax over the classes (``dim``), what exceeds the threshold in the others summed."""
        if self.count_absent:
            others = self.num_classes - 1
            threshold = margin / others if others else math.inf
        else:
            # Where nothing is present every entry is 0 below; the softmax must be defined.
            kept = present | ~present.any(dim, keepdim=True)
            energy = energy.masked_fill(~kept, -math.inf)
            others = present.sum(dim, keepdim=True).to(energy.dtype) - 1
            threshold = (margin / others.clamp_min(1)).masked_fill(others < 1, math.inf)
        relation = energy.softmax(dim).masked_fill(own, 0)
        return F.relu(relation - threshold).sum(dim).clamp(EPSILON, 1 - EPSILON)

    def _intra_c2p(self, x: Tensor, index: Tensor, centers: Tensor) -> Tensor:
        n, channels = x.shape[:2]
        # Ignored pixels find a zero behind the last class, and are masked below.
        table = F.pad(-centers, (0, 0, 0, 1)).transpose(1, 2).contiguous()
        away = table.expand(n, -1, -1).gather(2, index[:, None].expand_as(x))
        # Nothing else needs the centres of all pixels: the difference takes their place.
        difference = away.add_(x)
        if self.reduction == 'squared_mean':
            distance = torch.linalg.vector_norm(difference, 1, dim=1)
        else:
            distance = difference.square().sum(1)
        known = index < self.num_classes
        counted = index.numel() if self.count_ignored else known.sum().clamp_min(1)
        mean = (distance * known).sum() / (counted * channels)
        loss = mean if self.reduction == 'mean_squared' else mean.square()
        return loss.clamp_min(FLOOR)

    def _inter_c2c(self, centers: Tensor, present: Tensor) -> Tensor:
        key = centers.detach()
        energy = centers @ key.transpose(1, 2) / math.sqrt(centers.shape[2])
        own = torch.eye(self.num_classes, dtype=torch.bool, device=centers.device)
        rows = self._excess(energy, own, present[:, None], self.inter_c2c_margin, dim=2)
        return self._reduce(rows, None if self.count_absent else present)

    def _inter_c2p(self, x: Tensor, index: Tensor, centers: Tensor, present: Tensor) -> Tensor:
        energy = torch.bmm(centers.expand(len(x), -1, -1), x)
        own = _membership(index, self.num_classes)
        energy = torch.where(own, centers.square().sum(2, keepdim=True), energy)
        if self.scale_c2p:
            energy = energy / math.sqrt(x.shape[1])
        pixels = self._excess(energy, own, present[..., None], self.inter_c2p_margin, dim=1)
        return self._reduce(pixels, None if self.count_ignored else index < self.num_classes)

    def forward(self, feat: Tensor, label: Tensor) -> dict[str, Tensor]:
        """The losses of a feature (N, C, H, W) under labels (N, h, w) of any size."""
        label = self._check(feat, label)
        with without_autocast(feat.device.type):
            x = feat if feat.dtype == torch.float64 else feat.float()
            label = resample_label(label, x.shape[2:])
            if self.pool > 1:
                x = F.avg_pool2d(x, self.pool, ceil_mode=True, count_include_pad=False)
                label = resample_label(label, x.shape[2:])
            x, label = x.flatten(2), label.flatten(1)
            index = label.masked_fill(label == self.ignore_index, self.num_classes)

            centers, present = self._centers(x, index)
            fixed = centers.detach()
            losses = {}
            if self.intra_c2p_weight:
                loss = self._intra_c2p(x, index, fixed)
                losses['loss_car_intra_c2p'] = self.intra_c2p_weight * loss
            if self.inter_c2c_weight:
                loss = self._inter_c2c(centers, present)
                losses['loss_car_inter_c2c'] = self.inter_c2c_weight * loss
            if self.inter_c2p_weight:
                loss = self._inter_c2p(x, index, fixed, present)
                losses['loss_car_inter_c2p'] = self.inter_c2p_weight * loss
        return losses
