"""mmseg_fusion.analysis.figures: what all pictures share."""

from __future__ import annotations

import numpy as np
import pytest

from mmseg_fusion.analysis.figures import (
    class_colours,
    class_patches,
    legend_below,
    new_figure,
    short,
    shown_ids,
)

PALETTE = [[10, 20, 30], [40, 50, 60]]


@pytest.mark.parametrize('length', [1, 12])
def test_a_name_that_fits_stays_and_a_long_one_keeps_its_end(length):
    assert short('a' * length, 12) == 'a' * length
    assert short('street_000123.png', 12) == '...00123.png'


def test_every_id_has_a_colour():
    colours = class_colours(PALETTE)
    assert (colours.shape, colours.dtype) == ((256, 3), np.uint8)
    assert colours[:2].tolist() == PALETTE
    assert (colours[2:] == 255).all()
    assert class_colours(PALETTE * 150)[299].tolist() == PALETTE[1]


def test_a_legend_holds_the_classes_that_are_shown():
    ids = shown_ids([np.array([[1, 255]]), np.array([[1, 0]])])
    assert ids == [0, 1, 255]
    handles = class_patches(ids, ('road', 'sky'), PALETTE)
    assert [handle.get_label() for handle in handles] == ['road', 'sky']
    assert handles[1].get_facecolor() == pytest.approx([40 / 255, 50 / 255, 60 / 255, 1])
    figure = new_figure(3, 2)
    legend_below(figure, handles, 2)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ['road', 'sky']
    assert figure.get_size_inches().tolist() == [3, 2]
