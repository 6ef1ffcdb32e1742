"""Pictures of predictions: what is right, in which model alone, and that it is drawn."""

from __future__ import annotations

import math
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from matplotlib import rcParams

from mmseg_fusion.analysis.layer_features import DataInfo
from mmseg_fusion.analysis.predictions import (
    FIRST,
    SECOND,
    GainSummary,
    Predictions,
    compared,
    count_gain,
    draw_predictions,
    largest_gains,
    right,
)

INFO = DataInfo(('a', 'b'), ((10, 20, 30), (200, 100, 0)), 255, None, False, ('.jpg', '.png'))


def test_right_counts_labelled_pixels_alone() -> None:
    label = np.array([[0, 1, 255, 1]])
    assert right(np.array([[0, 0, 0, 1]]), label) == pytest.approx(2 / 3)
    assert math.isnan(right(label, np.full((1, 4), 255)))


def test_compared() -> None:
    label = np.array([[0, 0, 0, 0, 255]])
    first = np.array([[0, 0, 1, 1, 0]])
    second = np.array([[0, 1, 0, 1, 1]])
    both, only_first, only_second, none, unlabelled = compared(first, second, label)[0].tolist()
    assert (tuple(only_first), tuple(only_second)) == (FIRST, SECOND)
    assert both == [225] * 3
    assert none == [140] * 3
    assert unlabelled == [255] * 3


def random_views(count: int, classes: int = 4, seed: int = 0) -> list[Predictions]:
    """Two models that are right about half the time; the last class is in no label."""
    random = np.random.default_rng(seed)
    views = []
    for i in range(count):
        # The first has nothing labelled.
        label = random.choice([*range(classes - 1), 255], (5, 7)) if i else np.full((5, 7), 255)
        pair = (
            np.where(random.random((5, 7)) < p, label, random.integers(0, classes, (5, 7)))
            for p in random.random(2)
        )
        views.append(Predictions(f'{i}.png', np.zeros((5, 7, 3), np.uint8), label, tuple(pair)))
    return views


def naive(view: Predictions, classes: int = 4) -> tuple[list[int], list[int], list[int]]:
    """Pixel by pixel: labelled, gained and lost per class."""
    labelled, gained, lost = ([0] * classes for _ in range(3))
    a, b = view.predictions
    for y, x in np.ndindex(view.label.shape):
        c = int(view.label[y, x])
        if c != 255:
            labelled[c] += 1
            gained[c] += int(b[y, x] == c and a[y, x] != c)
            lost[c] += int(a[y, x] == c and b[y, x] != c)
    return labelled, gained, lost


def test_gained_and_lost_pixel_by_pixel() -> None:
    views = random_views(12)
    for view in views:
        found = count_gain(*view.predictions, view.label, 4)
        labelled, gained, lost = naive(view)
        assert (found.labelled.tolist(), found.gained.tolist()) == (labelled, gained)
        assert found.lost.tolist() == lost
        if sum(labelled):
            assert found.shares == pytest.approx(
                (sum(gained) / sum(labelled), sum(lost) / sum(labelled))
            )
            # What is gained less what is lost is the difference of what is right.
            a, b = (right(p, view.label) for p in view.predictions)
            assert found.net == pytest.approx(b - a)
        else:
            assert all(map(math.isnan, (*found.shares, found.net)))


def test_summary_over_images() -> None:
    views = random_views(12)
    summary = GainSummary.of([count_gain(*v.predictions, v.label, 4) for v in views])
    rows = [[sum(part) for part in naive(v)] for v in views[1:]]
    assert summary.images == 11
    assert summary.gained == pytest.approx(sum(g / n for n, g, _ in rows) / 11)
    assert summary.lost == pytest.approx(sum(x / n for n, _, x in rows) / 11)
    assert summary.net == pytest.approx(sum((g - x) / n for n, g, x in rows) / 11)
    assert summary.better == sum(g > x for _, g, x in rows)
    assert summary.worse == sum(g < x for _, g, x in rows)
    assert min(summary.better, summary.worse) > 0
    sums = [np.sum([naive(v)[i] for v in views], 0) for i in range(3)]
    lines = summary.table('abcd').splitlines()
    assert len(lines) == 4 + 3  # no row for the class without a pixel
    for line, name, n, g, x in zip(lines[3:], 'abc', *sums):
        cells = [cell.strip() for cell in line.strip('|').split('|')]
        assert cells[0] == name
        expected = [100 * n / sum(sums[0]), 100 * g / n, 100 * x / n, 100 * (g - x) / n]
        assert [float(c) for c in cells[1:]] == pytest.approx(expected, abs=0.0051)
    with pytest.raises(ValueError, match='labelled pixels, got none'):
        GainSummary.of([count_gain(*views[0].predictions, views[0].label, 4)])


def test_largest_gains_are_those_of_a_sort() -> None:
    views = random_views(30)
    chosen, gains = largest_gains(iter(views), 4, 5)
    net = []
    for labelled, gained, lost in map(naive, views):
        net.append((sum(gained) - sum(lost)) / sum(labelled) if sum(labelled) else -math.inf)
    order = sorted(range(30), key=lambda i: -net[i])
    assert [v.path for v in chosen] == [f'{i}.png' for i in order[:5]]
    assert len(gains) == 30
    assert [g.net for g in gains[1:]] == pytest.approx(net[1:])
    # Fewer images than asked for: all of them, the one without a label last.
    assert [v.path for v in largest_gains(views[:3], 4, 9)[0]][-1] == '0.png'


@pytest.mark.parametrize('models', [1, 2, 3])
def test_draws_every_model(models: int, tmp_path: Path) -> None:
    label = np.zeros((40, 60), int)
    label[:, :20], label[:5] = 1, 255
    predictions = tuple(np.full((40, 60), i % 2) for i in range(models))
    image = np.full((20, 30, 3), 128, np.uint8)
    view = Predictions('folder/x.jpg', image, label, predictions)
    path = tmp_path / 'picture.png'
    draw_predictions([view, view], [f'm{i}' for i in range(models)], INFO, path)
    picture = cv2.imread(str(path))[..., ::-1]
    # Image, truth, one per model, and with two models where they differ.
    assert picture.shape[1] == pytest.approx(72 * 2.4 * (2 + models + (models == 2)), abs=2)
    colours = {tuple(c) for c in picture.reshape(-1, 3).tolist()}
    assert {*INFO.palette, (128, 128, 128)} <= colours
    assert ({FIRST, SECOND} <= colours) == (models == 2)


@pytest.mark.parametrize('title', ['', 'a line above'])
def test_words_on_the_picture(title: str, tmp_path: Path, monkeypatch) -> None:
    """Read from the vector form, in which words stay words."""
    monkeypatch.setitem(rcParams, 'svg.fonttype', 'none')
    label = np.array([[0] * 6 + [1, 1, 255, 255]])
    first, second = np.array([[0, 0, 1, 1, 1] + [0] * 5]), np.array([[1, 0, 0, 0, 0] + [0] * 5])
    view = Predictions('x.png', np.zeros((1, 10, 3), np.uint8), label, (first, second))
    draw_predictions([view], ['old', 'new'], INFO, tmp_path / 'x.svg', title)
    found = re.findall(r'<text[^>]*>([^<]*)</text>', (tmp_path / 'x.svg').read_text())
    # 8 pixels have a label: 3 are gained, 1 is lost.
    expected = [
        *['image', 'truth', 'old', 'new', 'gained and lost', 'x.png', '37.5 % right'],
        *['62.5 % right', '37.5 % gained, 12.5 % lost', 'lost: only old is right'],
        *['gained: only new is right', 'both are right', 'none is right', 'a', 'b', 'unlabelled'],
    ]
    assert sorted(found) == sorted(expected + [title] * bool(title))


def test_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='at least one image'):
        draw_predictions([], ['a'], INFO, tmp_path / 'x.png')
