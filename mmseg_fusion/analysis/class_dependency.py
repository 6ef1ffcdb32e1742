"""Class dependency maps: how much each class depends on every other class (thesis, figure 4.5).

The map is the inter-class relation of equation 4.4,

    A = softmax(mu mu^T / sqrt(C)),

of the class centres ``mu``, which are the features before the classifier averaged over all pixels
of a class in a whole data set (section 4.4.2.7). Figure 6 of arXiv 2303.08646 draws the same map
of the class tokens, the rows of the classifier's weight.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from .figures import new_figure
from .layer_features import IGNORE, InputError, Side, find_layer, observe

Similarity = Literal['softmax', 'dot', 'cosine']
Source = Literal['labels', 'predictions']

#: What the colour bar says.
SIMILARITY_NAMES = {
    'softmax': r'dependency, $\mathrm{softmax}(\mu\,\mu^T/\sqrt{C})$',
    'dot': r'similarity, $\mu\,\mu^T/\sqrt{C}$',
    'cosine': 'cosine similarity',
}
#: Cells of absent classes; their hatches and names.
_PALE, _GREY = '#d9d9d9', '#9a9a9a'


class ClassCenters:
    """Sums of features per class over any number of images, in float64.

    Args:
        num_classes: number of classes K.
        ignore_index: label of the pixels that count for nothing.
    """

    def __init__(self, num_classes: int, ignore_index: int = IGNORE) -> None:
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.sums: Tensor | None = None
        self.counts = torch.zeros(num_classes, dtype=torch.int64)

    def add(self, feature: Tensor, label: Tensor) -> None:
        """Adds the pixels of some images.

        Args:
            feature: of any float type.
            label: class ids on the grid of the feature.

        Shape:
            - feature: (N, C, H, W).
            - label: (N, H, W).

        Raises:
            InputError: a label is neither a class nor the ignore index, or the number of channels
                has changed.
            ValueError: the shapes do not fit.
        """
        if feature.dim() != 4 or label.shape != (feature.shape[0], *feature.shape[2:]):
            raise ValueError(
                f'expected a feature (N, C, H, W) and a label (N, H, W), got '
                f'{tuple(feature.shape)} and {tuple(label.shape)}'
            )
        flat = label.to(feature.device).reshape(-1).long()
        ignored = flat == self.ignore_index
        if self.num_classes <= IGNORE:
            # Padding and reduce_zero_label write it whatever the ignore index is.
            ignored |= flat == IGNORE
        wrong = flat[~ignored & ((flat < 0) | (flat >= self.num_classes))]
        if len(wrong):
            raise InputError(
                f'the labels hold class {int(wrong[0])}, but there are {self.num_classes} classes '
                f'(ignore_index is {self.ignore_index}); check num_classes of the head, and '
                'reduce_zero_label of the data set'
            )
        flat = flat[~ignored]
        pixels = feature.movedim(1, -1).reshape(-1, feature.shape[1])[~ignored].double()
        if self.sums is None:
            self.sums = torch.zeros(
                self.num_classes, feature.shape[1], dtype=torch.float64, device=feature.device
            )
        elif self.sums.shape[1] != feature.shape[1]:
            raise InputError(
                f'the layer had {self.sums.shape[1]} channels on an earlier image and has '
                f'{feature.shape[1]} now; name a layer of fixed width with --layer'
            )
        self.sums.index_add_(0, flat, pixels)
        self.counts += torch.bincount(flat, minlength=self.num_classes).cpu()

    @property
    def present(self) -> Tensor:
        """(K,) bool: the classes that have been seen."""
        return self.counts > 0

    @property
    def centers(self) -> Tensor:
        """(K, C) float64 on the CPU: the mean feature of every class, NaN for one never seen."""
        if self.sums is None:
            raise ValueError('no image has been added')
        sums = self.sums.cpu()
        # 0 / 0 is the NaN that marks an absent class.
        return sums / self.counts[:, None]


def collect_centers(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    num_classes: int,
    layer: str = 'auto',
    side: Side = 'input',
    source: Source = 'labels',
    ignore_index: int = IGNORE,
) -> ClassCenters:
    """Class centres of a layer over a data set.

    A cell of the feature belongs to the class under its centre.

    Args:
        model: a segmentor in evaluation mode.
        batches: collated test samples of one image each.
        num_classes: number of classes.
        layer: dotted name, ``'auto'`` for the classifier.
        side: whether the feature is the layer's input or output.
        source: whether a pixel's class is its label's or the model's own prediction.
        ignore_index: label of the pixels that count for nothing.

    Raises:
        InputError: an image has no label though ``source`` is ``'labels'``, or its labels do not
            fit, or the layer gives no feature map.
    """
    centers = ClassCenters(num_classes, ignore_index)
    for batch in batches:
        seen = observe(model, batch, layer, side, predict=source == 'predictions')
        label = seen.prediction if source == 'predictions' else seen.label
        if label is None:
            raise InputError(
                f'{seen.path} has no label; give labels with --ann-dir (or LoadAnnotations in the '
                'pipeline), or take the predicted classes with --classes-from predictions'
            )
        grid = seen.placement.on_grid(label, seen.feature.shape[1:], ignore_index)
        centers.add(seen.feature[None], torch.from_numpy(grid)[None])
    return centers


def class_tokens(model: nn.Module, layer: str = 'auto') -> Tensor:
    """The weight of a classifier, one row per class (figure 6 of arXiv 2303.08646).

    Args:
        model: a segmentor.
        layer: dotted name, ``'auto'`` for the classifier of the (last) decode head.

    Returns:
        (K, C) float64; of a kernel larger than 1 x 1 all taps side by side.

    Raises:
        InputError: the layer has no weight per class.
    """
    name = find_layer(model, layer)
    weight = getattr(model.get_submodule(name), 'weight', None)
    if not isinstance(weight, Tensor) or weight.dim() < 2 or len(weight) < 2:
        shape = tuple(weight.shape) if isinstance(weight, Tensor) else None
        raise InputError(
            f'layer {name!r} has no weight with a row per class: expected (classes, channels, ...),'
            f' got {shape}; name a classifier with --layer'
        )
    return weight.detach().cpu().double().flatten(1)


def dependency_matrix(vectors: Tensor, similarity: Similarity = 'softmax') -> Tensor:
    r"""Inter-class relation of class vectors, equation 4.4 of the thesis.

    Args:
        vectors: centres or tokens; a row of NaN is a class without one.
        similarity: ``'softmax'`` over each row of :math:`\mu \mu^T / \sqrt C`, as equation 4.4;
            ``'dot'`` leaves the softmax out, ``'cosine'`` divides by the lengths instead.

    Shape:
        - vectors: (K, C).
        - returned: (K, K) float64; row i shows how much class i depends on each class. Rows and
          columns of absent classes are NaN, and absent classes are left out of the softmax (chosen;
          the losses of CAR let them enter as zero vectors).

    Raises:
        ValueError: the vectors are no matrix, or ``similarity`` is unknown.
    """
    if vectors.dim() != 2:
        raise ValueError(f'expected vectors of shape (K, C), got {tuple(vectors.shape)}')
    if similarity not in SIMILARITY_NAMES:
        raise ValueError(
            f'similarity: expected one of {", ".join(SIMILARITY_NAMES)}, got {similarity!r}'
        )
    vectors = vectors.detach().cpu().double()
    present = ~vectors.isnan().any(1)
    some = vectors[present]
    if similarity == 'cosine':
        some = torch.nn.functional.normalize(some, dim=1)
        relation = some @ some.T
    else:
        relation = some @ some.T / math.sqrt(vectors.shape[1])
        if similarity == 'softmax':
            relation = relation.softmax(1)
    result = vectors.new_full((len(vectors), len(vectors)), math.nan)
    result[present.outer(present)] = relation.flatten()
    return result


def diagonal_means(matrix: Tensor) -> tuple[float, float]:
    """Mean of the diagonal and mean of everything else, over the classes that are present.

    Args:
        matrix: (K, K) of :func:`dependency_matrix`.

    Returns:
        Both means; NaN where there is nothing to average, as off the diagonal of one class.
    """
    eye = torch.eye(len(matrix), dtype=torch.bool)
    return matrix[eye].nanmean().item(), matrix[~eye].nanmean().item()


def strongest_pairs(
    matrix: Tensor, classes: Sequence[str], count: int = 5
) -> list[tuple[str, str, float]]:
    """The largest entries off the diagonal: class, class on which it depends, value.

    Args:
        matrix: (K, K) of :func:`dependency_matrix`.
        classes: names of the classes.
        count: how many.
    """
    values = matrix.clone().fill_diagonal_(math.nan)
    values = torch.where(values.isnan(), torch.full_like(values, -math.inf), values).flatten()
    order = values.argsort(descending=True, stable=True)[:count].tolist()
    size = len(matrix)
    return [
        (classes[i // size], classes[i % size], values[i].item())
        for i in order
        if math.isfinite(values[i])
    ]


@dataclass
class Dependency:
    """The dependency map of one model.

    Attributes:
        name: what the model is called.
        vectors: (K, C) class centres or tokens.
        matrix: (K, K) of :func:`dependency_matrix`.
        counts: pixels (cells of the feature) per class; None for tokens.
    """

    name: str
    vectors: Tensor
    matrix: Tensor
    counts: Tensor | None = None


def save_dependency(
    maps: Sequence[Dependency], classes: Sequence[str], path: str | Path, **about: Any
) -> None:
    """Writes the numbers of the maps.

    Args:
        maps: one per model.
        classes: names of the classes.
        path: ``.npz`` (arrays ``classes``, ``names``, ``matrix`` (models, K, K), ``counts`` and,
            per model, ``vectors_0`` ...) or ``.json`` (the same but for the vectors; null where a
            class is absent).
        **about: further entries, as the similarity.

    Raises:
        InputError: the file name ends in neither.
    """
    path = Path(path)
    matrices = np.stack([entry.matrix.numpy() for entry in maps])
    if path.suffix not in ('.npz', '.json'):
        raise InputError(f'--matrix: expected a file name in .npz or .json, got {str(path)!r}')
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == '.npz':
        arrays = {f'vectors_{i}': entry.vectors.numpy() for i, entry in enumerate(maps)}
        if maps[0].counts is not None:
            arrays['counts'] = np.stack([entry.counts.numpy() for entry in maps])
        arrays.update({key: np.array(value) for key, value in about.items()})
        names = np.array([entry.name for entry in maps])
        np.savez(path, classes=np.array(classes), names=names, matrix=matrices, **arrays)
        return
    entries = []
    for entry, matrix in zip(maps, matrices):
        rows = [[None if math.isnan(v) else v for v in row] for row in matrix.tolist()]
        diagonal, others = (None if math.isnan(v) else v for v in diagonal_means(entry.matrix))
        entries.append(
            dict(
                name=entry.name,
                mean_diagonal=diagonal,
                mean_off_diagonal=others,
                counts=None if entry.counts is None else entry.counts.tolist(),
                matrix=rows,
            )
        )
    text = json.dumps(dict(classes=list(classes), **about, models=entries))
    path.write_text(text + '\n', encoding='utf-8')


def draw_dependency(
    maps: Sequence[Dependency],
    classes: Sequence[str],
    path: str | Path,
    title: str = '',
    similarity: Similarity = 'softmax',
) -> None:
    """Maps of several models side by side on one colour scale.

    Row i shows how much class i depends on the class of each column. Absent classes and their names
    are hatched grey. The scale ends at the largest value. For ``'softmax'`` it begins at 0 and ends
    at least at twice the value of a uniform row, so that a uniform map has the middle colour.

    Args:
        maps: one per model.
        classes: names of the classes.
        path: PNG file to write.
        title: of the picture.
        similarity: the kind of the numbers.
    """
    from matplotlib.patches import Patch

    count = len(classes)
    # Names stay readable when they are many: the picture grows with them.
    cell = max(0.15, min(0.45, 4.0 / count))
    font = min(10.0, max(6.5, cell * 72 * 0.6))
    side = cell * count
    names = max(map(len, classes)) * font * 0.6 / 72 + 0.15
    width = names + len(maps) * (side + 0.3) + 1.7
    height = side + names + (0.9 if title else 0.6) + 0.35
    figure = new_figure(max(width, 6.0), height)
    axes = figure.subplots(1, len(maps), squeeze=False, sharey=True)[0]
    limits = _limits(maps, similarity)
    absent = np.array([entry.matrix.diagonal().isnan().tolist() for entry in maps])
    for ax, entry, gone in zip(axes, maps, absent):
        drawn = _draw_map(ax, entry, limits)
        ax.set_xticks(range(count), classes, rotation=90, fontsize=font)
        ax.set_yticks(range(count), classes, fontsize=font)
        ax.tick_params(length=2, pad=2, labelleft=ax is axes[0])
        _grey_names(ax.get_xticklabels(), gone)
        diagonal, others = diagonal_means(entry.matrix)
        ax.set_title(
            f'{entry.name}\nmean diagonal {diagonal:.3f}, off diagonal {others:.4f}',
            fontsize=min(11.0, max(8.0, side * 2.1)),
        )
    # Shared ticks: a name is grey on the left where the class is absent from every map.
    _grey_names(axes[0].get_yticklabels(), absent.all(0))
    bar = figure.colorbar(drawn, ax=list(axes), fraction=0.04, pad=0.01, aspect=max(15, 4 * side))
    bar.set_label(SIMILARITY_NAMES[similarity], fontsize=max(9.0, font))
    bar.ax.tick_params(labelsize=max(8.0, font))
    if absent.any():
        hatched = Patch(facecolor=_PALE, edgecolor=_GREY, hatch='////', label='class absent')
        figure.legend(handles=[hatched], loc='outside lower left', frameon=False, fontsize=9)
    if title:
        figure.suptitle(title, fontsize=12)
    figure.savefig(path, dpi=130)


def _limits(maps: Sequence[Dependency], similarity: Similarity) -> tuple[float, float]:
    """Both ends of the colour scale that all maps share."""
    values = torch.stack([entry.matrix for entry in maps])
    finite = values[values.isfinite()]
    high = finite.max().item() if len(finite) else 1.0
    low = finite.min().item() if len(finite) else 0.0
    if similarity == 'softmax':
        # A row sums to 1: where it is uniform it has half of the scale, not the brightest colour.
        low, high = 0.0, max(high, min(1.0, 2 / values.shape[-1]))
    elif similarity == 'cosine':
        low, high = min(0.0, low), 1.0
    return low, high if high > low else low + 1.0


def _draw_map(ax: Any, entry: Dependency, limits: tuple[float, float]) -> Any:
    """One map, its absent classes hatched; returns what a colour bar is made for."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    colours = colormaps['inferno'].copy()
    colours.set_bad(_PALE)
    values = np.ma.masked_invalid(entry.matrix.numpy())
    low, high = limits
    drawn = ax.imshow(values, cmap=colours, vmin=low, vmax=high, interpolation='nearest')
    count = len(values)
    for i in entry.matrix.diagonal().isnan().nonzero().flatten().tolist():
        for corner, w, h in (((-0.5, i - 0.5), count, 1), ((i - 0.5, -0.5), 1, count)):
            box = Rectangle(corner, w, h, fill=False, hatch='////', edgecolor=_GREY, lw=0)
            ax.add_patch(box)
    return drawn


def _grey_names(ticks: Sequence[Any], absent: Sequence[bool]) -> None:
    for tick, gone in zip(ticks, absent):
        if gone:
            tick.set_color(_GREY)
