"""Predictions of several models beside the truth, and where two of them differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from .layer_features import IGNORE, DataInfo

#: Of the pixels that only the first, or only the second, of two models has right.
FIRST, SECOND = (214, 39, 40), (31, 119, 180)


@dataclass(frozen=True)
class Predictions:
    """Several models on one image.

    Attributes:
        path: of the image.
        image: (h, w, 3), RGB, of any size.
        label: (H, W) class ids, 255 where there is none.
        predictions: likewise, one per model.
    """

    path: str
    image: np.ndarray
    label: np.ndarray
    predictions: tuple[np.ndarray, ...]


def right(prediction: np.ndarray, label: np.ndarray) -> float:
    """The share of the labelled pixels that a prediction has right."""
    labelled = label != IGNORE
    return float((prediction == label)[labelled].mean()) if labelled.any() else float('nan')


def compared(first: np.ndarray, second: np.ndarray, label: np.ndarray) -> np.ndarray:
    """A picture of the pixels that only one of two predictions has right.

    Args:
        first: (H, W) class ids.
        second: likewise.
        label: likewise; 255 is shown white.

    Returns:
        (H, W, 3): :data:`FIRST` where ``first`` alone is right, :data:`SECOND` where ``second``
        alone is, light grey where both are, dark grey where none is.
    """
    a, b = first == label, second == label
    picture = np.full((*label.shape, 3), 225, np.uint8)
    picture[~a & ~b] = 140
    picture[a & ~b] = FIRST
    picture[b & ~a] = SECOND
    picture[label == IGNORE] = 255
    return picture


def draw_predictions(
    found: Sequence[Predictions], names: Sequence[str], info: DataInfo, path: str | Path
) -> None:
    """A row per image: image, truth, a prediction per model, and of two models where they differ.

    Args:
        found: one entry per image.
        names: of the models.
        info: of the data set: classes and colours.
        path: PNG file to write.

    Raises:
        ValueError: there is nothing to draw.
    """
    # Without pyplot, which would keep the figure and choose a backend for the whole process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    if not found:
        raise ValueError('draw_predictions: expected at least one image, got none')
    colours = np.full((IGNORE + 1, 3), 255, np.uint8)
    colours[: len(info.palette)] = info.palette
    two = len(names) == 2
    titles = ['image', 'truth', *names] + ['right in one alone'] * two
    ratio = found[0].label.shape[0] / found[0].label.shape[1]
    figure = Figure(
        figsize=(2.4 * len(titles), (2.4 * ratio + 0.25) * len(found) + 0.9), layout='constrained'
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(found), len(titles), squeeze=False)
    for number, view in enumerate(found):
        shape = view.label.shape[::-1]
        pictures = [cv2.resize(view.image, shape, interpolation=cv2.INTER_AREA)]
        pictures += [colours[view.label], *(colours[p] for p in view.predictions)]
        if two:
            pictures.append(compared(*view.predictions, view.label))
        shares = [f'{100 * right(p, view.label):.1f} % right' for p in view.predictions]
        below = [Path(view.path).name, '', *shares, '']
        for ax, picture, title, text in zip(axes[number], pictures, titles, below):
            ax.imshow(picture, interpolation='none')
            ax.set(xticks=[], yticks=[])
            ax.set_xlabel(text, fontsize=8)
            if number == 0:
                ax.set_title(title, fontsize=9)
    shown = sorted({int(c) for v in found for a in (v.label, *v.predictions) for c in np.unique(a)})
    handles = [
        Patch(facecolor=np.array(info.palette[c]) / 255, edgecolor='0.4', label=info.classes[c])
        for c in shown
        if c < len(info.classes)
    ]
    if IGNORE in shown:
        handles.append(Patch(facecolor='white', edgecolor='0.4', label='unlabelled'))
    if two:
        for name, colour in zip(names, (FIRST, SECOND)):
            handles.append(Patch(facecolor=np.array(colour) / 255, label=f'only {name} is right'))
        handles.append(Patch(facecolor='0.88', label='both are right'))
        handles.append(Patch(facecolor='0.55', label='none is right'))
    figure.legend(handles=handles, loc='outside lower center', ncols=8, fontsize=7, frameon=False)
    figure.savefig(path, dpi=72)
