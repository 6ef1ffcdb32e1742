"""What the pictures share: a figure of its own, names that fit, colours and a legend of classes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch


#: Of what belongs to no class.
WHITE = (255, 255, 255)


def new_figure(width: float, height: float) -> Figure:
    """A figure of a size in inches, which pyplot would keep, and for which it would choose a
    backend for the whole process."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout='constrained')
    FigureCanvasAgg(figure)
    return figure


def short(name: str, length: int) -> str:
    """As much of a name as fits below a column; the end tells names apart."""
    return name if len(name) <= length else f'...{name[3 - length :]}'


def class_colours(palette: Sequence[Sequence[int]]) -> np.ndarray:
    """The colour of each class id, white where there is no class: (256 or more, 3), uint8."""
    colours = np.full((max(256, len(palette)), 3), 255, np.uint8)
    colours[: len(palette)] = palette
    return colours


def shown_ids(maps: Iterable[np.ndarray]) -> list[int]:
    """All ids in maps of classes, sorted."""
    return sorted({number for ids in maps for number in np.unique(ids).tolist()})


def patch(colour: Sequence[int], label: str) -> Patch:
    """An entry of a legend, of a colour from 0 to 255."""
    from matplotlib.patches import Patch

    return Patch(facecolor=np.array(colour) / 255, edgecolor='0.4', label=label)


def class_patches(
    ids: Iterable[int], classes: Sequence[str], palette: Sequence[Sequence[int]]
) -> list[Patch]:
    """An entry for each of ``ids`` that is a class."""
    return [patch(palette[i], classes[i]) for i in ids if 0 <= i < len(classes)]


def legend_below(figure: Figure, handles: Sequence, columns: int) -> None:
    """A legend below all panels."""
    figure.legend(
        handles=handles, loc='outside lower center', ncols=columns, frameon=False, fontsize=9
    )
