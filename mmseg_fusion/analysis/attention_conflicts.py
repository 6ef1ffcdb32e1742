"""Where spatial and channel attention contradict each other (thesis section 3.2).

Each attention gives a separate prediction in addition to the head's: in the parallel design through
DANet's auxiliary logits (figure 3.3), in the sequential design through a branch behind a
stop-gradient (figure 3.4).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmseg.models.decode_heads import DAHead
from torch import nn

from ..models.decode_heads import SequentialDualAttentionHead
from .figures import (
    WHITE,
    class_colours,
    class_patches,
    legend_below,
    new_figure,
    patch,
    short,
    shown_ids,
)

SPATIAL, CHANNEL, PREDICTION = 'spatial attention', 'channel attention', 'prediction'
_NAMES = {'pam': SPATIAL, 'cam': CHANNEL}

#: Of the map of conflicts: what a pixel can be, and its colour.
_AGREE, _SOLVED, _LOST, _ALL_WRONG, _UNKNOWN = range(5)
_MARKS = {
    _SOLVED: ('conflict, prediction right', (66, 133, 200)),
    _LOST: ('an attention right, prediction wrong', (214, 39, 40)),
    _ALL_WRONG: ('conflict, all wrong', (70, 60, 80)),
    _UNKNOWN: ('conflict', (235, 140, 30)),
}


def branches_of(head: nn.Module) -> dict[str, int]:
    """Which outputs of a head are the predictions of a single attention.

    Args:
        head: a decode head whose ``forward`` returns several logits, the prediction's first.

    Returns:
        Positions in that output by name, spatial attention first.

    Raises:
        ValueError: the head has no such outputs.
    """
    if isinstance(head, SequentialDualAttentionHead):
        return {_NAMES[head.branch]: 1}
    if isinstance(head, DAHead):
        return {SPATIAL: 1, CHANNEL: 2}
    raise ValueError(
        f'{type(head).__name__} has no logits of its attentions alone; expected '
        "model.decode_head.type='DAHead' (parallel) or 'SequentialDualAttentionHead'"
    )


@contextmanager
def _instead(module: nn.Module, **methods: Any) -> Iterator[None]:
    """Other methods on one module, for the moment."""
    vars(module).update(methods)
    try:
        yield
    finally:
        for name in methods:
            del vars(module)[name]


@torch.no_grad()
def predict_branches(model: nn.Module, data: dict[str, Any]) -> list[dict[str, np.ndarray]]:
    """The head's prediction and that of each attention, through the model's test function.

    Sliding windows, padding and the size of the original image are treated as in
    ``model.test_step``, which runs once per prediction; features and logits are computed once.

    Args:
        model: a segmentor in eval mode whose head :func:`branches_of` knows.
        data: a collated batch.

    Shape:
        - Output: each (H, W) of the original image, class ids.

    Returns:
        One dict per image: the attentions' predictions by name, then the head's prediction.

    Raises:
        ValueError: see :func:`branches_of`.
    """
    head = model.decode_head
    branches, kept = branches_of(head), []
    forward = head.forward

    def keep(inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        kept.append(forward(inputs))
        return kept[-1]

    def answers() -> list[np.ndarray]:
        # The samples are written into: take the answer out at once.
        return [s.pred_sem_seg.data[0].cpu().numpy() for s in model.test_step(data)]

    with _instead(head, forward=keep):
        predicted = {PREDICTION: answers()}
    for name, index in branches.items():
        # The same windows in the same order.
        logits = iter([(outputs[index],) for outputs in kept])
        features = _instead(model, extract_feat=lambda inputs: None)
        with features, _instead(head, forward=lambda inputs, logits=logits: next(logits)):
            predicted[name] = answers()
    names = [*branches, PREDICTION]
    return [dict(zip(names, image)) for image in zip(*(predicted[name] for name in names))]


# --- numbers -----------------------------------------------------------------------------------


@dataclass
class Conflicts:
    """Counts of pixels; two counts can be added.

    Attributes:
        pixels: number of pixels with a label, or of all pixels if there is no label.
        disagree: number of pixels on which the attentions disagree; with one branch, on which the
            branch differs from the head's prediction, which is that of the other attention.
        right: number of right pixels per prediction; empty, like the next attributes, if there is
            no label.
        lost: number of pixels on which the prediction is wrong although an attention was right.
        lost_by: per attention, number of pixels on which it was right and the prediction is wrong.
        gained: number of pixels on which the prediction is right although no attention was.
    """

    pixels: int = 0
    disagree: int = 0
    right: dict[str, int] = field(default_factory=dict)
    lost: int = 0
    lost_by: dict[str, int] = field(default_factory=dict)
    gained: int = 0

    def __add__(self, other: Conflicts) -> Conflicts:
        def merged(a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
            return {name: a.get(name, 0) + b.get(name, 0) for name in {**a, **b}}

        return Conflicts(
            pixels=self.pixels + other.pixels,
            disagree=self.disagree + other.disagree,
            right=merged(self.right, other.right),
            lost=self.lost + other.lost,
            lost_by=merged(self.lost_by, other.lost_by),
            gained=self.gained + other.gained,
        )

    def shares(self) -> dict[str, float]:
        """Everything in per cent of the pixels, as one flat row."""

        def percent(count: int) -> float:
            return 100 * count / max(self.pixels, 1)

        row = {'disagree': percent(self.disagree)}
        if self.right:
            row.update({'lost': percent(self.lost), 'gained': percent(self.gained)})
            row.update({f'{name} right': percent(n) for name, n in self.right.items()})
            row.update(
                {f'{name} right, lost': percent(n) for name, n in self.lost_by.items()},
            )
        return row


def _masks(
    answers: Mapping[str, np.ndarray], truth: np.ndarray | None, ignore_index: int
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Which pixels count, where there is conflict, and where each answer is right."""
    prediction = answers[PREDICTION]
    branches = [answer for name, answer in answers.items() if name != PREDICTION]
    # The attention behind an only branch answers with the prediction.
    first, second = [*branches, prediction][:2]
    if truth is None:
        return np.ones(prediction.shape, bool), first != second, {}
    if truth.shape != prediction.shape:
        raise ValueError(
            f'the label is {truth.shape[0]} x {truth.shape[1]}, the prediction '
            f'{prediction.shape[0]} x {prediction.shape[1]}; LoadAnnotations stands behind Resize '
            'in val_dataloader.dataset.pipeline'
        )
    valid = truth != ignore_index
    right = {name: (answer == truth) & valid for name, answer in answers.items()}
    return valid, (first != second) & valid, right


def compare(
    answers: Mapping[str, np.ndarray], truth: np.ndarray | None = None, ignore_index: int = 255
) -> Conflicts:
    """Counts the pixels of one image.

    Args:
        answers: one dict of :func:`predict_branches`.
        truth: class ids, if they are known.
        ignore_index: the id of pixels without a label.

    Shape:
        - answers, truth: each (H, W).

    Raises:
        ValueError: the truth has another size.
    """
    valid, conflict, right = _masks(answers, truth, ignore_index)
    counts = Conflicts(pixels=int(valid.sum()), disagree=int(conflict.sum()))
    if truth is None:
        return counts
    prediction = right[PREDICTION]
    branches = {name: mask for name, mask in right.items() if name != PREDICTION}
    any_right = np.logical_or.reduce([*branches.values()])
    counts.right = {name: int(mask.sum()) for name, mask in right.items()}
    counts.lost = int((any_right & ~prediction).sum())
    counts.lost_by = {name: int((mask & ~prediction).sum()) for name, mask in branches.items()}
    counts.gained = int((prediction & ~any_right).sum())
    return counts


# --- picture -----------------------------------------------------------------------------------


@dataclass
class Example:
    """One row of the picture.

    Attributes:
        name: of the image.
        image: (H, W, 3), RGB, uint8.
        answers: one dict of :func:`predict_branches`.
        truth: (H, W) class ids; None where it is not known.
        conflicts: result of :func:`compare`.
    """

    name: str
    image: np.ndarray
    answers: dict[str, np.ndarray]
    truth: np.ndarray | None
    conflicts: Conflicts

    @property
    def rank(self) -> float:
        """Share of the pixels that a conflict loses; without labels, of those with a conflict."""
        counts = self.conflicts
        return (counts.disagree if self.truth is None else counts.lost) / max(counts.pixels, 1)


def conflict_map(example: Example, ignore_index: int = 255) -> np.ndarray:
    """What each pixel is: 0 for agreement, then the keys of the legend.

    Shape:
        - Output: (H, W), uint8.
    """
    _, conflict, right = _masks(example.answers, example.truth, ignore_index)
    kinds = np.where(conflict, _UNKNOWN, _AGREE).astype(np.uint8)
    if example.truth is not None:
        branches = [mask for name, mask in right.items() if name != PREDICTION]
        kinds[conflict] = _ALL_WRONG
        kinds[conflict & right[PREDICTION]] = _SOLVED
        kinds[np.logical_or.reduce(branches) & ~right[PREDICTION]] = _LOST
    return kinds


def _boxes(kinds: np.ndarray, count: int = 2) -> list[tuple[int, int, int, int]]:
    """Left, top, width and height around the largest regions that matter most."""
    mask = (kinds == _LOST) | (kinds == _UNKNOWN)
    # Without the seams one or two pixels wide that every two answers differ in.
    mask = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    _, _, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    regions = sorted(stats[1:], key=lambda s: -s[cv2.CC_STAT_AREA])[:count]
    least = 0.002 * kinds.size
    return [tuple(int(v) for v in s[:4]) for s in regions if s[cv2.CC_STAT_AREA] >= least]


def draw_conflicts(
    examples: Sequence[Example],
    metainfo: Mapping[str, Any],
    path: str | Path,
    title: str = '',
    ignore_index: int = 255,
) -> None:
    """Figures 3.3 and 3.4: image, truth, each attention's answer, prediction, and the conflicts.

    Boxes mark the largest regions in which an attention was right and the prediction is wrong
    (without labels, regions in which the attentions disagree). In the last column every pixel of a
    conflict is coloured.

    Args:
        examples: one per row.
        metainfo: ``classes`` and ``palette`` of the data set.
        path: PNG file to write.
        title: of the figure.
        ignore_index: the id of pixels without a label, which are white.

    Raises:
        ValueError: there is nothing to draw.
    """
    if not examples:
        raise ValueError('draw_conflicts: expected at least one example, got none')
    with_truth = any(e.truth is not None for e in examples)
    names = [name for name in examples[0].answers if name != PREDICTION]
    columns = ['image', *(['truth'] if with_truth else []), *names, PREDICTION, 'conflicts']
    ratio = float(np.mean([e.image.shape[0] / e.image.shape[1] for e in examples]))
    cell = 2.4
    width = cell * len(columns) + 0.3
    figure = new_figure(width, (cell * ratio + 0.28) * len(examples) + 1.3)
    axes = figure.subplots(len(examples), len(columns), squeeze=False)
    colours = class_colours(metainfo['palette'])
    kinds = [conflict_map(example, ignore_index) for example in examples]
    for row, example, kind in zip(axes, examples, kinds):
        _draw_example(example, kind, dict(zip(columns, row)), colours)
    for axis, name in zip(axes[0], columns):
        # With one branch the prediction is the answer of the attention behind it.
        behind = f'\n({CHANNEL if names[0] == SPATIAL else SPATIAL})' if len(names) == 1 else ''
        axis.set_title(name + behind if name == PREDICTION else name, fontsize=11)
    shown = shown_ids(ids for example in examples for ids in _maps(example).values())
    handles = class_patches(shown, metainfo['classes'], metainfo['palette'])
    if ignore_index in shown:
        handles.append(patch(WHITE, 'ignored'))
    marked = shown_ids(kinds)
    handles += [patch(colour, name) for kind, (name, colour) in _MARKS.items() if kind in marked]
    legend_below(figure, handles, max(2, round(width / 2.1)))
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=110)


def _maps(example: Example) -> dict[str, np.ndarray]:
    """Class ids by the name of their column."""
    truth = {} if example.truth is None else {'truth': example.truth}
    return {**example.answers, **truth}


def _draw_example(
    example: Example, kinds: np.ndarray, panels: Mapping[str, Any], colours: np.ndarray
) -> None:
    """One row; ``panels`` are its axes by the name of the column."""
    from matplotlib.patches import Rectangle

    # Pale and grey, so that the marks stand out.
    grey = cv2.cvtColor(example.image, cv2.COLOR_RGB2GRAY)
    marks = np.repeat((128 + grey // 2)[..., None], 3, 2)
    for kind, (_, colour) in _MARKS.items():
        marks[kinds == kind] = colour
    pictures = {name: colours[ids] for name, ids in _maps(example).items()}
    pictures.update(image=example.image, conflicts=marks)
    boxes = [(box, line) for box in _boxes(kinds) for line in (('black', 2.6), ('white', 1.3))]
    for name, axis in panels.items():
        axis.set(xticks=[], yticks=[])
        if name not in pictures:
            axis.axis('off')
            continue
        axis.imshow(pictures[name], interpolation='nearest')
        for (left, top, width, height), (edge, line) in boxes:
            box = Rectangle((left, top), width, height, fill=False, ec=edge, lw=line)
            axis.add_patch(box)
    counts = example.conflicts.shares()
    label = f'conflict {counts["disagree"]:.1f} %'
    label += f', lost {counts["lost"]:.1f} %' if 'lost' in counts else ''
    panels['conflicts'].set_xlabel(label, fontsize=9)
    panels['image'].set_xlabel(short(example.name, 34), fontsize=9)
