"""Pixel relation maps: similarity of a pixel's feature to all others (thesis, figure 4.4).

The map is the pixel-to-pixel relation energy of section 4.4.2.8, the dot product of the feature of
one pixel, before the classifier, with that of every pixel of the image. Figures 4.6 and 4.7 show
the same for other models.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import torch
from torch import Tensor

from .figures import WHITE, class_colours, class_patches, legend_below, new_figure, patch, shown_ids
from .layer_features import IGNORE, DataInfo, InputError, Observation, Placement

PixelSimilarity = Literal['dot', 'cosine', 'softmax']

SIMILARITY_NAMES = {
    'dot': r'$x_p \cdot x_q / \sqrt{C}$',
    'cosine': r'$\cos(x_p, x_q)$',
    'softmax': r'$\mathrm{softmax}_q(x_p \cdot x_q / \sqrt{C})$',
}


def pixel_relation(
    feature: Tensor, cell: Sequence[int], similarity: PixelSimilarity = 'dot'
) -> Tensor:
    r"""Relation of one cell of a feature to all of its cells (section 4.4.2.8).

    Args:
        feature: of one image.
        cell: row and column.
        similarity: ``'dot'`` for :math:`x_p \cdot x_q / \sqrt C`, the scale of equation 4.4;
            ``'softmax'`` of that over all cells q; ``'cosine'`` for the dot product of unit
            vectors, 0 where a feature is all zero.

    Shape:
        - feature: (C, H, W).
        - returned: (H, W) float64.

    Raises:
        ValueError: the feature is no map, ``similarity`` is unknown, or the cell is outside.
    """
    if feature.dim() != 3:
        raise ValueError(f'expected a feature of shape (C, H, W), got {tuple(feature.shape)}')
    if similarity not in SIMILARITY_NAMES:
        raise ValueError(
            f'similarity: expected one of {", ".join(SIMILARITY_NAMES)}, got {similarity!r}'
        )
    row, column = cell
    channels, height, width = feature.shape
    if not (0 <= row < height and 0 <= column < width):
        raise ValueError(f'cell ({row}, {column}) is outside the feature of {height} x {width}')
    flat = feature.detach().double().flatten(1)
    if similarity == 'cosine':
        flat = torch.nn.functional.normalize(flat, dim=0)
        relation = flat[:, row * width + column] @ flat
    else:
        relation = flat[:, row * width + column] @ flat / math.sqrt(channels)
        if similarity == 'softmax':
            relation = relation.softmax(0)
    return relation.view(height, width)


def unit_range(values: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Values scaled so that those ``inside`` go from 0 to 1; all 0 where they are constant.

    Args:
        values: any shape, finite.
        inside: of that shape, bool.
    """
    if not inside.any():
        return np.zeros_like(values)
    low, high = values[inside].min(), values[inside].max()
    return (values - low) / (high - low) if high > low else np.zeros_like(values)


def class_contrast(relation: np.ndarray, label: np.ndarray, own: int) -> tuple[float, float]:
    """Mean relation to the pixels of the same class and to those of all other classes.

    The relation is first scaled to [0, 1] over the image, so that models whose features have
    different lengths can be compared.

    Args:
        relation: (H, W) of :func:`pixel_relation`.
        label: (H, W) class ids on the same grid; ignored cells and padding hold 255.
        own: class of the pixel.

    Returns:
        Both means; NaN where the image has no such cell.
    """
    inside = label != IGNORE
    scaled = unit_range(relation, inside)
    means = [
        float(scaled[mask].mean()) if mask.any() else math.nan
        for mask in (label == own, inside & (label != own))
    ]
    return means[0], means[1]


@dataclass(frozen=True)
class Point:
    """A pixel whose relations are drawn.

    Attributes:
        x: column in the image file.
        y: row in the image file.
        category: its class, None if it has none.
    """

    x: int
    y: int
    category: int | None


def class_at(label: np.ndarray | None, size: tuple[int, int], x: int, y: int) -> int | None:
    """Class of a pixel of the image file, None where it is ignored or there is no label.

    Args:
        label: (h, w) class ids of the whole image, in any resolution.
        size: height and width of the image file.
        x: column of the pixel.
        y: row of the pixel.
    """
    if label is None:
        return None
    row, column = ((v * 2 + 1) * s // (2 * t) for v, s, t in zip((y, x), label.shape, size))
    category = int(label[row, column])
    return None if category == IGNORE else category


def automatic_points(
    label: np.ndarray, size: tuple[int, int], num_classes: int, max_points: int | None = None
) -> list[Point]:
    """One pixel per class, the one farthest inside a region of it; the largest classes first.

    Args:
        label: (h, w) class ids of the whole image, in any resolution.
        size: height and width of the image file.
        num_classes: ids of this value and above are no class.
        max_points: maximum number of classes, None for all.
    """
    classes = [int(c) for c in np.unique(label) if 0 <= c < num_classes]
    classes.sort(key=lambda c: -int((label == c).sum()))
    points = []
    for category in classes[:max_points]:
        # The border of the image ends a region as any other class does.
        mask = np.pad((label == category).astype(np.uint8), 1)
        depth = cv2.distanceTransform(mask, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]
        row, column = np.unravel_index(int(depth.argmax()), depth.shape)
        y, x = (
            int((v * 2 + 1) * t // (2 * s)) for v, t, s in zip((row, column), size, label.shape)
        )
        points.append(Point(x, y, category))
    return points


@dataclass
class Relation:
    """One model's relation map of one pixel.

    Attributes:
        values: (h, w) of :func:`pixel_relation`, over the whole network input.
        own: mean relation to its own class, see :func:`class_contrast`.
        others: mean relation to other classes.
    """

    values: np.ndarray
    own: float = math.nan
    others: float = math.nan


def relate(seen: Observation, point: Point, similarity: PixelSimilarity = 'dot') -> Relation:
    """Relation map of a pixel on what :func:`~.layer_features.observe` returned.

    The label, or without one the model's prediction, determines which pixels have the same class.

    Args:
        seen: a layer on an image.
        point: the pixel.
        similarity: as in :func:`pixel_relation`.

    Raises:
        InputError: the pixel is outside the image.
    """
    seen.placement.check((point.x, point.y), seen.path)
    grid = tuple(seen.feature.shape[1:])
    cell = seen.placement.cell((point.x, point.y), grid)
    values = pixel_relation(seen.feature, cell, similarity).cpu().numpy()
    label = seen.label if seen.label is not None else seen.prediction
    if point.category is None or label is None:
        return Relation(values)
    own, others = class_contrast(values, seen.placement.on_grid(label, grid), point.category)
    return Relation(values, own, others)


def over_image(values: np.ndarray, placement: Placement) -> np.ndarray:
    """A map over the network's input, upsampled bilinearly and cut to the image without padding.

    Args:
        values: (h, w).
        placement: where the image lies in the network's input.

    Returns:
        (height, width) of the image as the network sees it, float32.
    """
    from mmseg.models.utils import resize

    whole = resize(
        torch.from_numpy(values).float()[None, None],
        size=placement.input_size,
        mode='bilinear',
        align_corners=False,
    )[0, 0].numpy()
    top, left, height, width = placement.box
    return whole[top : top + height, left : left + width]


def wrapped(name: str, width: int = 34) -> str:
    """A long config name on several lines, broken where its parts end."""
    lines = ['']
    for part in re.findall(r'[^_\-\s]+[_\-\s]*|[_\-\s]+', name):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append('')
        lines[-1] += part
    return '\n'.join(lines)


def draw_relations(
    seen: Sequence[Observation],
    points: Sequence[Point],
    relations: Sequence[Sequence[Relation]],
    names: Sequence[str],
    info: DataInfo,
    path: str | Path,
    title: str = '',
    similarity: PixelSimilarity = 'dot',
) -> None:
    """One row per pixel: image, label, then relation map and prediction of each model.

    Every map has its own colour bar, since the lengths of features cannot be compared across
    models; cosine similarities share one scale.

    Args:
        seen: the image through each model.
        points: the pixels.
        relations: per pixel, one per model.
        names: what the models are called.
        info: classes and colours.
        path: PNG file to write.
        title: of the picture.
        similarity: the kind of the maps.

    Raises:
        InputError: there is no pixel to draw.
    """
    if not points:
        raise InputError(f'{seen[0].path} has no class to take a pixel from; give one with --point')
    height, width = seen[0].placement.size
    label = seen[0].label
    columns = 1 + (label is not None) + 2 * len(seen)
    panel_width = 2.7
    panel_height = min(5.0, max(1.2, panel_width * height / width))
    used = shown_ids([*(s.prediction for s in seen), *([] if label is None else [label])])
    used = [c for c in used if 0 <= c < len(info.classes)]
    per_line = max(3, int(columns * panel_width / 1.6))
    lines = math.ceil((len(used) + 1) / per_line)
    figure = new_figure(
        columns * panel_width + 0.55 * len(seen) + 0.4,
        len(points) * (panel_height + 0.35) + 0.25 * lines + 0.8,
    )
    axes = figure.subplots(len(points), columns, squeeze=False)
    extent = (0, width, height, 0)
    titles = ['image'] + ['label'] * (label is not None)
    first = len(titles)
    titles += [wrapped(f'{name}: {what}') for name in names for what in ('relation', 'prediction')]
    for number, (row, point, of_models) in enumerate(zip(axes, points, relations)):
        heads = titles.copy() if number == 0 else [''] * columns
        name = '' if point.category is None else info.classes[point.category]
        row[0].imshow(seen[0].image, extent=extent)
        row[0].set_ylabel(f'{name}\n({point.x}, {point.y})'.strip(), fontsize=10)
        if label is not None:
            row[1].imshow(_painted(label, info), extent=extent, interpolation='nearest')
        for k, (relation, view) in enumerate(zip(of_models, seen)):
            heat, answer = row[first + 2 * k], row[first + 2 * k + 1]
            _draw_relation(heat, relation, view, similarity)
            if not math.isnan(relation.own):
                note = f'own class {relation.own:.2f}, others {relation.others:.2f}'
                heads[first + 2 * k] = f'{heads[first + 2 * k]}\n{note}'.lstrip()
            painted = _painted(view.prediction, info)
            answer.imshow(painted, extent=extent, interpolation='nearest')
        for ax, head in zip(row, heads):
            ax.set_title(head, fontsize=10)
            ax.plot(point.x + 0.5, point.y + 0.5, 'o', ms=6, color='#e8112d', mec='white', mew=1.2)
            ax.set(xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0))
    handles = class_patches(used, info.classes, info.palette)
    if label is not None and (_painted(label, info) == 255).all(2).any():
        handles.append(patch(WHITE, 'ignored'))
    legend_below(figure, handles, min(len(handles), per_line))
    subtitle = f'relation = {SIMILARITY_NAMES[similarity]}'
    figure.suptitle(f'{title}\n{subtitle}' if title else subtitle, fontsize=11)
    figure.savefig(path, dpi=110)


def _painted(ids: np.ndarray, info: DataInfo) -> np.ndarray:
    """Class ids in their colours, white what has none."""
    colours = class_colours(info.palette[:255])
    return colours[np.where((ids >= 0) & (ids < len(info.palette)), ids, 255)]


def _draw_relation(
    ax: Any, relation: Relation, view: Observation, similarity: PixelSimilarity
) -> None:
    """One relation map over its image, with a colour bar of its own."""
    height, width = view.placement.size
    extent = (0, width, height, 0)
    heat = over_image(relation.values, view.placement)
    low, high = (min(0.0, float(heat.min())), 1.0) if similarity == 'cosine' else (None, None)
    grey = np.repeat(view.image.mean(2, keepdims=True) / 255, 3, 2)
    ax.imshow(0.35 + 0.65 * grey, extent=extent)
    drawn = ax.imshow(heat, extent=extent, cmap='turbo', alpha=0.72, vmin=low, vmax=high)
    bar = ax.figure.colorbar(drawn, ax=ax, fraction=0.046, pad=0.02)
    bar.ax.tick_params(labelsize=7)
    bar.solids.set_alpha(1)
