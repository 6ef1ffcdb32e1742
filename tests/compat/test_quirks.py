"""All quirks: each is met once, listed, and says what ends it."""

from __future__ import annotations

import re
import sys

import pytest

from mmseg_fusion import compat

from .running import MET


@pytest.mark.stack
def test_each_quirk_is_met_once_and_documented():
    known = [quirk.__name__ for quirk in compat.QUIRKS]
    assert [quirk.name for quirk in compat.APPLIED] == [n for n in known if n in MET]
    assert all(quirk.what and quirk.until for quirk in compat.APPLIED)
    assert compat.apply() is compat.apply()


@pytest.mark.parametrize('quirk', compat.QUIRKS, ids=lambda quirk: quirk.__name__)
def test_a_quirk_stands_in_a_file_that_says_what_ends_it(quirk):
    module = sys.modules[quirk.__module__]
    assert module.__name__.startswith('mmseg_fusion.compat.')
    assert re.search(r'\b[Ee]nds with\b', module.__doc__)
    assert getattr(compat, quirk.__name__) is quirk
    assert quirk.__name__ in compat.__all__
